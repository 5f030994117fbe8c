//! A cluster whose parts have a host each, reached by IPv6: what they tell each other of where they are is true
//! elsewhere too, and a host whose cable is pulled costs time only.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::hosts::{Hosts, OPT_OUT};
use espalier_tests::harness::process::{Process, binary};
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::s3::S3Server;
use espalier_tests::harness::{toy, wait_for};

const DEADLINE: Duration = Duration::from_secs(120);
const ROLLOUTS: usize = 120;
/// Shorter than a host is away.
const LEASE_MS: u64 = 3_000;
const AWAY: Duration = Duration::from_secs(8);
const MODEL_PORT: u16 = 8000;

/// The scripted model on the host on which this thread is.
async fn model(hosts: &Hosts, folder: &tempfile::TempDir) -> Process {
    let mut command = Command::new(binary("scripted-model"));
    let ready = folder.path().join("model.ready");
    command.args(["--listen", &hosts.address("model", MODEL_PORT).to_string()]);
    command
        .args(["--mistakes", "0", "--ready-file"])
        .arg(&ready);
    let process = Process::start("model", command, folder.path());
    wait_for("the model", DEADLINE, || async {
        ready.exists().then_some(()).ok_or(())
    })
    .await;
    process
}

#[tokio::test]
async fn hosts_that_lose_their_cable_for_a_while_cost_time_only() {
    let names = [
        "client",
        "model",
        "redis",
        "store",
        "coordinator-0",
        "coordinator-1",
        "worker-0",
        "worker-1",
    ];
    let Some(hosts) = Hosts::start(&names) else {
        return println!("SKIPPED: {OPT_OUT} is set");
    };
    let hosts = Arc::new(hosts);
    let folder = tempfile::TempDir::new().unwrap();
    let _model = {
        let _there = hosts.enter("model");
        model(&hosts, &folder).await
    };
    let redis = {
        let _there = hosts.enter("redis");
        RedisServer::start_with(&[("bind", "127.0.0.1 ::"), ("protected-mode", "no")]).await
    };
    let store = {
        let _there = hosts.enter("store");
        S3Server::start_at(hosts.address_v4("store").into()).await
    };

    let _there = hosts.enter("client");
    let queue = format!("redis://{}", hosts.address("redis", redis.port()));
    let model_url = format!("http://{}/v1", hosts.address("model", MODEL_PORT));
    let cluster = Cluster::start_with(Setup {
        coordinators: 2,
        lease_ttl_ms: LEASE_MS,
        store_url: Some(S3Server::store_url("hosts")),
        environment: store.environment().map(|(k, v)| (k.to_owned(), v)).into(),
        hosts: Some(Arc::clone(&hosts)),
        ..Setup::new(&queue, &model_url)
    })
    .await;
    let mut workers = [cluster.worker("worker-0", 4), cluster.worker("worker-1", 4)];
    let mut client = cluster.client().await;
    client.submit("b", &toy::jobs(ROLLOUTS)).await;
    for (host, done) in [("worker-0", 10), ("coordinator-1", 40)] {
        client.wait_until_succeeded("b", done, DEADLINE).await;
        hosts.unplug(host);
        tokio::time::sleep(AWAY).await;
        hosts.plug(host);
    }
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        ROLLOUTS,
        "{:?}",
        result.unsolved()
    );
    let failures: u32 = result.jobs.values().map(|job| job.handler_failures).sum();
    assert_eq!(failures, 0, "rollouts spent attempts of their own");
    let moved = result.jobs.values().filter(|job| job.attempts > 1).count();
    assert!(moved > 0, "nothing was under way at the host that was away");
    for worker in &mut workers {
        worker.terminate(DEADLINE).await;
    }
}
