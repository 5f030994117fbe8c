//! An object store, a real S3 server behind a proxy, that goes away, dies and crawls while rollouts run. After each
//! round: every job solved at its first attempt, under leases far shorter than the outage, and every trace whole.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_tests::harness::client::Client;
use espalier_tests::harness::model::{self, sum_job, toy_job};
use espalier_tests::harness::proxy::{Direction, Network, Proxy};
use espalier_tests::harness::s3::S3Server;
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::{Value, json};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(180);

struct World {
    server: S3Server,
    proxy: Proxy,
    up: Up,
}

impl World {
    /// `espalier up` over a bucket that it reaches over the proxy, with leases of two seconds.
    async fn start() -> Self {
        let server = S3Server::start().await;
        let proxy = Proxy::start(server.address()).await;
        let endpoint = format!("http://{}", proxy.address());
        let environment = S3Server::environment_at(&endpoint);
        let environment = environment.each_ref().map(|(k, v)| (*k, v.as_str()));
        let store = S3Server::store_url("up");
        let up = Up::start_in(
            TempDir::new().unwrap(),
            &toy_servers(),
            &model::start().await,
            &["--store", &store, "--lease-ttl-s", "2"],
            &environment,
        )
        .await;
        assert_eq!(up.file().store, store);
        Self { server, proxy, up }
    }

    /// The store is there, for those who ask next.
    fn heal(&self) {
        self.proxy.heal();
        // A connection that was stuck is given up at once.
        self.proxy.cut();
    }
}

/// Sums, and now and then a rollout that is at work for a second, so that some are whenever the store goes.
fn jobs(count: usize) -> Vec<Value> {
    let sleep = json!([{"tool": "sleep", "arguments": {"ms": 1000}}, {"answer": "done"}]);
    (0..count)
        .map(|n| match n % 10 {
            0 => toy_job(&format!("job-{n:04}"), &sleep, "done"),
            _ => sum_job(&format!("job-{n:04}"), n),
        })
        .collect()
}

/// What must hold of batch `b` of `count` jobs, whatever the store did.
async fn check(client: &mut Client, count: usize) {
    let result = client.wait("b", DEADLINE).await;
    let counts = result.batch.counts.as_ref().unwrap();
    assert_eq!(counts.succeeded, count as u64, "{counts:?}");
    assert_eq!(result.solved(), count, "{:#?}", result.unsolved());
    for job in result.jobs.values() {
        let failures = job.handler_failures + job.infra_failures;
        assert_eq!(failures, 0, "{} spent an attempt", job.id);
        // It is read from the store, and checked against the manifest.
        let trace = client.trace("b", &job.id).await;
        assert_eq!(trace.header.job.job.to_string(), job.id);
    }
}

#[tokio::test]
async fn a_store_that_is_away_for_20_s_costs_time_and_no_attempt() {
    let world = World::start().await;
    let mut client = world.up.client().await;
    assert_eq!(client.submit("b", &jobs(200)).await.accepted, 200);
    client.wait_until_succeeded("b", 20, DEADLINE).await;
    world.proxy.set(Network {
        refusing: true,
        ..Network::default()
    });
    world.proxy.cut();
    tokio::time::sleep(Duration::from_secs(20)).await;
    let done = client.counts("b").await.succeeded;
    assert!(done < 200, "the store was away before all was done");
    world.heal();
    check(&mut client, 200).await;
}

#[tokio::test]
async fn a_store_that_crawls_for_a_minute_costs_time_and_no_attempt() {
    let world = World::start().await;
    let mut client = world.up.client().await;
    assert_eq!(client.submit("b", &jobs(200)).await.accepted, 200);
    client.wait_until_succeeded("b", 20, DEADLINE).await;
    let crawling = Direction {
        delay: Duration::from_secs(1),
        stopped: false,
        bytes_per_s: Some(1000),
    };
    world.proxy.set(Network {
        refusing: false,
        to_target: crawling,
        to_client: crawling,
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    world.heal();
    check(&mut client, 200).await;
}

#[tokio::test]
async fn a_store_that_is_killed_and_started_again_loses_no_result() {
    let mut world = World::start().await;
    let mut client = world.up.client().await;
    assert_eq!(client.submit("b", &jobs(200)).await.accepted, 200);
    for at_least in [20, 80] {
        client.wait_until_succeeded("b", at_least, DEADLINE).await;
        world.server.restart().await;
    }
    check(&mut client, 200).await;
}
