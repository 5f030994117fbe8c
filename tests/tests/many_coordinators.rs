//! Several coordinators as processes of their own on one Redis: whatever a client or an operator asks, any of them does.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::model::{self, sum_job};
use espalier_tests::harness::redis::RedisServer;

const DEADLINE: Duration = Duration::from_secs(120);
/// As long as no test waits for one to end.
const LEASE_TTL_MS: u64 = 30_000;

async fn two_coordinators(redis: &RedisServer) -> Cluster {
    Cluster::start_on(&redis.url(), 2, &model::start().await, LEASE_TTL_MS).await
}

#[tokio::test]
async fn what_is_submitted_at_one_is_done_by_a_worker_of_the_other() {
    let redis = RedisServer::start().await;
    let cluster = two_coordinators(&redis).await;
    let [first, second] = cluster.addresses()[..] else {
        panic!("two coordinators");
    };
    let mut client = cluster.client_at(first).await;
    let _worker = cluster.worker_at(&[second], "w", 4);
    let jobs: Vec<_> = (0..20).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    client.submit("sums", &jobs).await;
    let result = client.wait("sums", DEADLINE).await;
    assert_eq!(result.count(JobState::Succeeded), 20);
    let seen = cluster.client_at(second).await.counts("sums").await;
    assert_eq!(seen.succeeded, 20);
}
