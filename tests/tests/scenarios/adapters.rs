//! An adapter gets out: added, listed, pulled, pushed from a terminal, and exported by a job as a merged model. A real `up`,
//! a real store, and a stand-in for the hub.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::hub::{Hub, Trouble};
use espalier_tests::harness::process::binary;
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(60);
/// Nobody asks a model here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";
const TOKEN: &str = "hf_of_the_worker";
/// Long enough to do without a coordinator for some seconds of a busy machine.
const LEASE_TTL_MS: u64 = 10_000;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../crates/qwen3/tests/golden")
        .join(name)
}

struct World {
    up: Up,
    hub: Hub,
    out: TempDir,
}

impl World {
    async fn new() -> Self {
        let hub = Hub::empty().await;
        let environment = [("HF_ENDPOINT", hub.url.as_str()), ("HF_TOKEN", TOKEN)];
        let folder = TempDir::new().unwrap();
        let up = Up::start_in(folder, &toy_servers(), NO_MODEL, &[], &environment).await;
        Self {
            up,
            hub,
            out: TempDir::new().unwrap(),
        }
    }

    fn adapters(&self, arguments: &[&str], token: Option<&str>) -> Output {
        let mut command = Command::new(binary("espalier"));
        let data = self.up.folder.path().join("data");
        command
            .arg("adapters")
            .args(arguments)
            .arg("--data-dir")
            .arg(data);
        command.env_remove("HF_TOKEN").env("HOME", self.out.path());
        command.env("HF_ENDPOINT", &self.hub.url);
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        command.current_dir(self.out.path()).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments = [arguments, &["--json"]].concat();
        let output = self.adapters(&arguments, Some("hf_mine"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_gets_out_as_a_folder_to_the_hub_and_as_a_model() {
    let world = World::new().await;
    let (adapter, base) = (golden("lora-plain"), golden("tiny-dense"));
    let (adapter, base) = (adapter.to_str().unwrap(), base.to_str().unwrap());
    let added = world.json(&["add", "shop", adapter, "--base", base]);
    assert_eq!(
        (&added["version"], &added["new"]),
        (&1.into(), &true.into())
    );
    let listed = world.json(&["list"]);
    assert_eq!(listed["adapters"][0]["name"], "shop");

    world.json(&["pull", "shop"]);
    let pulled = world.out.path().join("shop-v1/adapter_model.safetensors");
    let weights = std::fs::read(golden("lora-plain/adapter_model.safetensors")).unwrap();
    assert!(std::fs::read(pulled).unwrap() == weights);
    let again = world.adapters(&["pull", "shop"], None);
    assert_eq!(again.status.code(), Some(2), "the folder is there");

    let none = world.adapters(&["push", "me/shop"], None);
    assert_eq!(none.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&none.stderr).contains("HF_TOKEN"));
    let pushed = world.json(&["push", "me/shop"]);
    assert_eq!(
        (&pushed["changed"], &pushed["public"]),
        (&true.into(), &false.into())
    );
    assert!(world.hub.files("me/shop").unwrap()["adapter_model.safetensors"] == weights);
    assert_eq!(world.json(&["push", "me/shop"])["changed"], false);

    let job = [
        "push",
        "me/shop-model",
        "--merged",
        "--detach",
        "--batch",
        "out",
    ];
    assert_eq!(world.json(&job)["batch"], "out");
    let result = world.up.client().await.wait("out", DEADLINE).await;
    let job = &result.jobs["export"];
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
    let summary = job.summary.as_ref().unwrap().export.as_ref().unwrap();
    assert_eq!(summary.exported_to, "me/shop-model");
    assert_eq!(summary.commit, world.hub.commits("me/shop-model")[0].id);
    let model = world.hub.files("me/shop-model").unwrap();
    let names: Vec<&str> = model.keys().map(String::as_str).collect();
    assert_eq!(names, ["README.md", "config.json", "model.safetensors"]);
    assert_eq!(world.hub.is_private("me/shop-model"), Some(true));
    let by_the_worker = world
        .hub
        .seen()
        .into_iter()
        .filter(|seen| seen.what.contains("shop-model"));
    assert!(by_the_worker.clone().count() > 0);
    assert!(
        by_the_worker
            .into_iter()
            .all(|seen| seen.token.as_deref() == Some(TOKEN))
    );
    assert!(
        !world.up.process.log().contains(TOKEN),
        "the token is in the log"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_the_hub_refuses_is_dead_with_the_reason() {
    let world = World::new().await;
    let (adapter, base) = (golden("lora-plain"), golden("tiny-dense"));
    let base = base.to_str().unwrap();
    world.json(&["add", "shop", adapter.to_str().unwrap(), "--base", base]);
    world.hub.writer("hf_of_somebody_else");
    world.json(&["push", "me/shop", "--detach", "--batch", "out"]);
    let result = world.up.client().await.wait("out", DEADLINE).await;
    let job = &result.jobs["export"];
    assert_eq!(job.state(), JobState::Dead, "{job:?}");
    let why = &job.last_error.as_ref().unwrap().message;
    assert!(
        why.contains("403") && why.contains("may not do this"),
        "{why}"
    );
    assert!(!why.contains(TOKEN));
}

/// A cluster whose workers export to `hub`, with an adapter and an export of it that waits for them.
async fn with_an_export(hub: &Hub) -> Cluster {
    let mut setup = Setup::new("embedded", NO_MODEL);
    setup.lease_ttl_ms = LEASE_TTL_MS;
    let environment = [("HF_ENDPOINT", hub.url.as_str()), ("HF_TOKEN", TOKEN)];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
    setup.environment = environment.into();
    let cluster = Cluster::start_with(setup).await;
    let (adapter, base) = (golden("lora-plain"), golden("tiny-dense"));
    let mut add = cluster.user();
    add.args(["adapters", "add", "shop"]).arg(adapter);
    add.arg("--base")
        .arg(base)
        .args(["--store", &cluster.store_url()]);
    let added = add.output().unwrap();
    assert!(added.status.success(), "{added:?}");
    let export = json!({"adapter": "shop@v1", "repo": "me/shop"});
    let job = json!({"id": "export", "max_infra": 20, "export": export});
    assert_eq!(
        cluster.client().await.submit("out", &[job]).await.accepted,
        1
    );
    cluster
}

async fn tried_to_commit(hub: &Hub, times: usize) {
    wait_for("a commit that is refused", DEADLINE, || async {
        let tries = hub.count("/commit/");
        if tries >= times { Ok(()) } else { Err(tries) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_killed_while_they_export_make_one_commit_and_one_result() {
    let hub = Hub::empty().await;
    let mut cluster = with_an_export(&hub).await;
    let key = cluster.key("out", "export");
    // The first has sent the files, and waits to try its commit again.
    hub.trouble("/commit/", Trouble::Status(503, Some(60)), 1);
    let mut a = cluster.worker_with_cpu_slots("a", 1);
    tried_to_commit(&hub, 1).await;
    a.kill(DEADLINE).await;
    assert!(hub.commits("me/shop").is_empty());
    // The second one's commit is made once nobody can hear of its result.
    hub.trouble("/commit/", Trouble::Status(503, Some(3)), 1);
    let mut b = cluster.worker_with_cpu_slots("b", 1);
    tried_to_commit(&hub, 2).await;
    cluster.coordinators[0].process.kill();
    cluster.wait_until_published(&key, DEADLINE).await;
    b.kill(DEADLINE).await;
    cluster.restart_coordinator(0).await;
    // The third takes the result over.
    let mut c = cluster.worker_with_cpu_slots("c", 1);
    let result = cluster.client().await.wait("out", DEADLINE).await;
    let job = &result.jobs["export"];
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
    assert!(job.attempts >= 3, "{job:?}");
    let made = hub.commits("me/shop");
    assert_eq!(made.len(), 1, "{made:?}");
    let summary = job.summary.as_ref().unwrap().export.as_ref().unwrap();
    assert_eq!(summary.commit, made[0].id);
    assert_eq!(
        hub.count("PUT /storage"),
        1,
        "what has arrived is not sent again"
    );
    assert_eq!(cluster.manifest(&key).files.len(), 1);
    c.terminate(DEADLINE).await;
}
