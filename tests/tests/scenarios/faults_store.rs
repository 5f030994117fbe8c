//! An object store, a real S3 server behind a proxy, that goes away, dies and crawls while rollouts run. After each
//! round: every job solved at its first attempt, under leases far shorter than the outage, and every trace whole.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_tests::harness::client::Client;
use espalier_tests::harness::faults::{STORE_AWAY, STORE_CRAWLS};
use espalier_tests::harness::store::FarStore;
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::{model, toy};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(180);

struct World {
    store: FarStore,
    client: Client,
    _up: Up,
}

impl World {
    /// `espalier up` over a far store, with leases of six seconds. The rollouts are submitted.
    async fn start() -> Self {
        let store = FarStore::start("up").await;
        let environment = store.environment();
        let up = Up::start_in(
            TempDir::new().unwrap(),
            &toy_servers(),
            &model::start().await,
            // Much shorter than a fault, and long enough for a core that is slow and busy.
            &["--store", store.url(), "--lease-ttl-s", "6"],
            &environment.each_ref().map(|(k, v)| (*k, v.as_str())),
        )
        .await;
        assert_eq!(up.file().store, store.url());
        let mut client = up.client().await;
        let submitted = client.submit("b", &toy::jobs(toy::ROLLOUTS)).await;
        assert_eq!(submitted.accepted as usize, toy::ROLLOUTS);
        Self {
            store,
            client,
            _up: up,
        }
    }

    async fn after(&self, succeeded: u64) {
        let seen = self.client.wait_until_succeeded("b", succeeded, DEADLINE);
        seen.await;
    }

    async fn assert_unfinished(&self) {
        let done = self.client.counts("b").await.succeeded as usize;
        assert!(done < toy::ROLLOUTS, "the fault came too late");
    }

    /// What must hold at the end, whatever the store did.
    async fn check(mut self) {
        let result = self.client.wait("b", DEADLINE).await;
        let counts = result.batch.counts.as_ref().unwrap();
        assert_eq!(counts.succeeded as usize, toy::ROLLOUTS, "{counts:?}");
        assert_eq!(result.solved(), toy::ROLLOUTS, "{:#?}", result.unsolved());
        for job in result.jobs.values() {
            let failures = job.handler_failures + job.infra_failures;
            assert_eq!(failures, 0, "{} spent an attempt", job.id);
            // It is read from the store, and checked against the manifest.
            let trace = self.client.trace("b", &job.id).await;
            assert_eq!(trace.header.job.job.to_string(), job.id);
        }
    }
}

#[tokio::test]
async fn a_store_that_is_away_for_20_s_costs_time_and_no_attempt() {
    let world = World::start().await;
    world.after(20).await;
    world.store.be_away(STORE_AWAY).await;
    world.assert_unfinished().await;
    world.check().await;
}

#[tokio::test]
async fn a_store_that_crawls_for_a_minute_costs_time_and_no_attempt() {
    let world = World::start().await;
    world.after(20).await;
    world.store.crawl(STORE_CRAWLS).await;
    world.assert_unfinished().await;
    world.check().await;
}

#[tokio::test]
async fn a_store_that_is_killed_and_started_again_loses_no_result() {
    let mut world = World::start().await;
    for succeeded in [20, 80] {
        world.after(succeeded).await;
        world.store.server.restart().await;
    }
    world.check().await;
}
