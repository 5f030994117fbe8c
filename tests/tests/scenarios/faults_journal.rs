//! A Redis that goes back to an earlier state, or comes back empty, after it acknowledged work: the coordinators give it
//! again what it lost, and every acknowledged job ends with one result.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_tests::harness::client::Client;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::{self, sum_job};
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::wait_for;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(120);
const LEASE_MS: u64 = 5_000;

struct World {
    redis: RedisServer,
    cluster: Cluster,
    client: Client,
    model_url: String,
}

impl World {
    async fn start() -> Self {
        // Synced, so that a copy of its folder is a state that it was in.
        let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
        let model_url = model::start().await;
        let cluster = Cluster::start_with(Setup {
            coordinators: 2,
            lease_ttl_ms: LEASE_MS,
            ..Setup::new(&redis.url(), &model_url)
        })
        .await;
        let client = cluster.client().await;
        Self {
            redis,
            cluster,
            client,
            model_url,
        }
    }

    fn data(&self) -> PathBuf {
        self.redis.folder().join("appendonlydir")
    }

    /// Kills Redis and starts it with the data in `saved`; with none where it is not given.
    async fn set_back(&mut self, saved: Option<&Path>) {
        self.redis.kill();
        fs::remove_dir_all(self.data()).unwrap();
        if let Some(saved) = saved {
            copy(saved, &self.data());
        }
        self.redis.restart().await;
    }

    async fn check(&mut self, batch: &str, jobs: usize) {
        let result = self.client.wait(batch, DEADLINE).await;
        assert_eq!(
            (result.jobs.len(), result.solved()),
            (jobs, jobs),
            "{:#?}",
            result.unsolved()
        );
        for job in result.jobs.values() {
            self.cluster.manifest(&self.cluster.key(batch, &job.id));
        }
    }

    fn journal(&self) -> Vec<PathBuf> {
        files(&self.cluster.object("_journal"))
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        })
        .collect()
}

fn jobs(numbers: std::ops::Range<usize>) -> Vec<Value> {
    numbers
        .map(|n| sum_job(&format!("job-{n:04}"), n))
        .collect()
}

#[tokio::test]
async fn what_a_redis_that_went_back_had_acknowledged_ends_with_one_result() {
    let mut world = World::start().await;
    let _worker = world.cluster.worker("one", 4);
    world.client.submit("a", &jobs(0..20)).await;
    world.client.open("b").await;
    world.client.chunk("b", 0, &jobs(0..10)).await.unwrap();
    world.client.wait_until_succeeded("b", 5, DEADLINE).await;
    let saved = tempfile::tempdir().unwrap();
    copy(&world.data(), saved.path());

    // Of these the server will know nothing, and of some of them there are results.
    world.client.chunk("b", 1, &jobs(10..30)).await.unwrap();
    world.client.wait_until_succeeded("b", 15, DEADLINE).await;
    let close = espalier_proto::v1::CloseBatchRequest {
        batch: "b".to_owned(),
    };
    world.client.jobs.close_batch(close).await.unwrap();
    world.client.submit("c", &jobs(0..20)).await;
    world.set_back(Some(saved.path())).await;

    for (batch, jobs) in [("a", 20), ("b", 30), ("c", 20)] {
        world.check(batch, jobs).await;
    }
}

#[tokio::test]
async fn an_empty_redis_gets_what_had_not_ended_and_nothing_else() {
    let mut world = World::start().await;
    let worker = world.cluster.worker("early", 4);
    world.client.submit("ended", &jobs(0..10)).await;
    world.check("ended", 10).await;
    // A coordinator that starts goes through the journal.
    world.cluster.coordinators[1].process.kill();
    world.cluster.restart_coordinator(1).await;
    wait_for("the journal to be empty", DEADLINE, || async {
        let left = world.journal();
        left.is_empty().then_some(()).ok_or(left)
    })
    .await;
    let asked = model::completions(&world.model_url).await;

    drop(worker);
    world.client.submit("waits", &jobs(0..10)).await;
    assert_eq!(world.journal().len(), 3, "{:?}", world.journal());
    world.set_back(None).await;
    let _worker = world.cluster.worker("late", 4);
    world.check("waits", 10).await;
    let request = espalier_proto::v1::GetBatchRequest {
        batch: "ended".to_owned(),
    };
    let gone = world.client.jobs.get_batch(request).await.unwrap_err();
    assert_eq!(gone.code(), tonic::Code::NotFound, "{gone}");
    let per_batch = model::completions(&world.model_url).await - asked;
    assert_eq!(
        per_batch, asked,
        "ten jobs, and no job of the batch that had ended"
    );
}
