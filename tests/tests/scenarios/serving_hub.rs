//! A model that `--model` names as a repository of the hub: fetched, taken up again, checked, and found in the cache.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_tests::harness::hub::{Fault, Hub};
use espalier_tests::harness::process::Process;
use espalier_tests::harness::serving::{Serving, command};
use espalier_tests::harness::{tiny, wait_for};
use serde_json::json;
use tempfile::TempDir;

const REPO: &str = "org/tiny";
const TOKEN: &str = "hf_s3cret";
/// Enough for a start on two busy cores, with the retries of a download.
const DEADLINE: Duration = Duration::from_secs(90);

struct World {
    hub: Hub,
    /// What the hub serves.
    _repo: TempDir,
    /// The home of the worker, with its cache.
    home: TempDir,
}

impl World {
    async fn new() -> Self {
        let repo = TempDir::new().unwrap();
        tiny::write_model(repo.path());
        Self {
            hub: Hub::start(REPO, repo.path()).await,
            _repo: repo,
            home: TempDir::new().unwrap(),
        }
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("HF_ENDPOINT", self.hub.url.clone()),
            ("HF_TOKEN", TOKEN.to_owned()),
        ]
    }

    fn start(&self, model: &str) -> Process {
        let mut command = command(self.home.path(), model, &[]);
        command.envs(self.environment());
        Process::start("infer", command, self.home.path())
    }

    /// Starts a worker that serves it, out of the same cache.
    async fn serve(&self, environment: &[(&str, String)]) -> Serving {
        let cache = self.home.path().join(".cache/huggingface/hub");
        let options = ["--download-dir", &cache.display().to_string()];
        let folder = TempDir::new_in(self.home.path()).unwrap();
        Serving::start_on(folder, REPO, &options, environment).await
    }

    /// Starts a worker that cannot serve, and gives what it says of it.
    async fn refused(&self, model: &str) -> String {
        let mut process = self.start(model);
        let status = process.wait(DEADLINE).await;
        assert_eq!(status.code(), Some(1), "{}", process.log());
        let log = process.log();
        assert!(!log.contains(TOKEN), "the token is in the log");
        log
    }
}

#[tokio::test]
async fn a_download_that_was_killed_goes_on_where_it_was_and_is_not_repeated() {
    let world = World::new().await;
    let shard = tiny::SHARDS[0];
    world.hub.fault(shard, Fault::Hangs);
    let mut process = world.start(REPO);
    wait_for("the download to hang", DEADLINE, || {
        let parts = walk(world.home.path());
        let part = parts.into_iter().find(|path| path.ends_with(".part"));
        let bytes = part.and_then(|part| std::fs::metadata(part).ok());
        let bytes = bytes.map_or(0, |meta| meta.len());
        async move { (bytes > 1 << 20).then_some(()).ok_or(bytes) }
    })
    .await;
    process.kill();
    world.hub.heal();

    let serving = world.serve(&world.environment()).await;
    let hub = &world.hub;
    let starts = hub.starts(shard);
    assert_eq!(starts.len(), 2, "{starts:?}");
    assert!(starts[1] > 1 << 20, "it began anew: {starts:?}");
    let asked = hub.asked();
    assert!(
        asked
            .iter()
            .all(|asked| asked.token.as_deref() == Some(TOKEN))
    );
    assert!(!serving.process.log().contains(TOKEN));

    // It says what the same files say from a folder.
    let local = Serving::start(&[]).await;
    let more = json!({"seed": 1});
    let (fetched, here) = (
        serving.chat("hello", more.clone()).await,
        local.chat("hello", more).await,
    );
    assert_eq!(fetched["choices"], here["choices"]);

    // A second start finds everything, also where the hub is not asked.
    let before = hub.asked().len();
    drop(serving);
    let offline = [("HF_HUB_OFFLINE", "1".to_owned())];
    let again = world.serve(&offline).await;
    assert_eq!(again.get("/health").await.0, 200);
    assert_eq!(hub.asked().len(), before);
}

#[tokio::test]
async fn what_the_hub_does_wrong_is_named_and_nothing_of_it_is_kept() {
    let world = World::new().await;
    let shard = tiny::SHARDS[1];
    world.hub.fault(shard, Fault::Lies);
    let log = world.refused(REPO).await;
    assert!(log.contains("SHA-256") && log.contains(shard), "{log}");
    // Nothing of it stays: the next start fetches the file again, whole.
    world.hub.fault(shard, Fault::Breaks);
    let log = world.refused(REPO).await;
    assert!(log.contains(shard), "{log}");
    let starts = world.hub.starts(shard);
    assert_eq!(starts[..2], [0, 0], "{starts:?}");
    assert!(
        starts.len() > 3,
        "a broken connection is tried again: {starts:?}"
    );
    assert!(starts.is_sorted(), "and goes on where it was: {starts:?}");

    let log = world.refused("org/unknown").await;
    assert!(log.contains("org/unknown"), "{log}");
}

/// Every file below a folder.
fn walk(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let below = entries.flat_map(|entry| match entry.path() {
        path if path.is_dir() => walk(&path),
        path => vec![path.display().to_string()],
    });
    below.collect()
}
