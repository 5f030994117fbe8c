//! Inference workers that coordinators tell of: rollouts find them, and none fails when one drains, dies or comes back.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::time::Duration;

use espalier_core::trace::StopReason;
use espalier_proto::v1::JobState;
use espalier_tests::harness::client::Client;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::serving::Serving;
use espalier_tests::harness::{tiny, wait_for};
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(120);
const LEASE_MS: u64 = 30_000;
const ROLLOUTS: usize = 24;

/// A worker that serves the tiny model and is known to all coordinators.
async fn infer(cluster: &Cluster) -> Serving {
    let (options, environment) = cluster.answering();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    Serving::start_with(&options, &environment).await
}

/// A rollout of one answer, which is cut after so many tokens.
fn rollout(id: &str, model: &str, tokens: u32) -> Value {
    json!({
        "id": id, "mcp": ["toy"], "prompt": format!("Go on, {id}."), "model": model,
        "sampling": {"temperature": 0, "thinking": false, "completion_tokens": tokens},
    })
}

/// What `espalier workers` says is served, as its operator sees it at the first coordinator.
async fn served(cluster: &Cluster) -> Vec<BTreeSet<String>> {
    let mut command = cluster.operator(&cluster.addresses()[..1]);
    let output = command.args(["workers", "--json"]).output().unwrap();
    let workers: Value = serde_json::from_slice(&output.stdout).unwrap();
    let workers = workers["workers"].as_array().unwrap().iter();
    let models = workers.filter_map(|worker| worker["serving"]["models"].as_array());
    let name = |model: &Value| model.as_str().unwrap().to_owned();
    models
        .map(|models| models.iter().map(name).collect())
        .collect()
}

async fn until_served(cluster: &Cluster, expected: &[&[&str]]) {
    let expected: Vec<BTreeSet<String>> = expected
        .iter()
        .map(|models| models.iter().map(|model| (*model).to_owned()).collect())
        .collect();
    wait_for("workers to serve", DEADLINE, || async {
        let served = served(cluster).await;
        let is_there =
            served.len() == expected.len() && expected.iter().all(|models| served.contains(models));
        is_there.then_some(()).ok_or(served)
    })
    .await;
}

fn rollouts() -> Vec<Value> {
    let one = |n| rollout(&format!("job-{n:02}"), "tiny", 60);
    (0..ROLLOUTS).map(one).collect()
}

/// Tokens that the worker was asked about.
async fn asked(serving: &Serving) -> f64 {
    serving.metric("vllm:prompt_tokens_total").await
}

/// Submits a batch and waits until both workers have begun with it.
async fn at_work_on(client: &mut Client, batch: &str, [one, other]: [&Serving; 2]) {
    let before = (asked(one).await, asked(other).await);
    client.submit(batch, &rollouts()).await;
    wait_for("both to be asked", DEADLINE, || async {
        let now = (asked(one).await, asked(other).await);
        let more = now.0 > before.0 && now.1 > before.1;
        more.then_some(()).ok_or(now)
    })
    .await;
}

/// Waits for the end: every rollout was solved at its first attempt.
async fn all_solved(client: &mut Client, batch: &str) {
    let result = client.wait(batch, DEADLINE).await;
    let succeeded = result.count(JobState::Succeeded);
    assert_eq!(succeeded, result.jobs.len(), "{:#?}", result.unsolved());
    for (id, job) in &result.jobs {
        let spent = (job.attempts, job.handler_failures, job.infra_failures);
        assert_eq!(spent, (1, 0, 0), "{id}: {job:?}");
    }
}

#[tokio::test]
async fn no_rollout_fails_when_workers_that_serve_drain_die_and_come() {
    let redis = RedisServer::start().await;
    let cluster = Cluster::start_with(Setup {
        coordinators: 2,
        lease_ttl_ms: LEASE_MS,
        ..Setup::new(&redis.url(), "")
    })
    .await;
    let (mut first, mut second) = (infer(&cluster).await, infer(&cluster).await);
    until_served(&cluster, &[&["tiny"], &["tiny"]]).await;
    // Each agent worker knows one coordinator alone, and hears of both.
    let addresses = cluster.addresses();
    let _agents = [
        cluster.worker_at(&addresses[..1], "agent-0", 4),
        cluster.worker_at(&addresses[1..], "agent-1", 4),
    ];
    let mut client = cluster.client().await;

    // One drains in good order while both are at work.
    at_work_on(&mut client, "drains", [&first, &second]).await;
    assert!(first.process.terminate(DEADLINE).await.success());
    all_solved(&mut client, "drains").await;

    // Another comes, and the other one dies while both are at work.
    let third = infer(&cluster).await;
    until_served(&cluster, &[&["tiny"], &["tiny"]]).await;
    at_work_on(&mut client, "dies", [&second, &third]).await;
    second.process.kill();
    all_solved(&mut client, "dies").await;
    let trace = client.trace("dies", "job-00").await;
    assert_eq!(trace.outcome.stop, StopReason::CutAnswer);
    until_served(&cluster, &[&["tiny"]]).await;
}

#[tokio::test]
async fn an_adapter_is_found_where_it_is_loaded_and_a_coordinator_that_restarts_costs_nothing() {
    let mut cluster = Cluster::start_with(Setup {
        lease_ttl_ms: 5_000,
        ..Setup::new("embedded", "")
    })
    .await;
    let (plain, tuned) = (infer(&cluster).await, infer(&cluster).await);
    let folder = tuned.path("adapter");
    tiny::write_adapter(&folder, 5);
    assert_eq!(tuned.load_adapter("tuned", &folder).await.0, 200);
    until_served(&cluster, &[&["tiny"], &["tiny", "tuned"]]).await;
    let _agent = cluster.worker("agent", 4);
    let mut client = cluster.client().await;
    let before = asked(&plain).await;
    let jobs: Vec<Value> = (0..6)
        .map(|n| rollout(&format!("j{n}"), "tuned", 8))
        .collect();
    client.submit("b", &jobs).await;
    all_solved(&mut client, "b").await;
    for n in 0..jobs.len() {
        let trace = client.trace("b", &format!("j{n}")).await;
        let adapter = trace.model_calls[0].adapter.as_ref();
        assert_eq!(adapter.map(|adapter| &*adapter.name), Some("tuned"));
    }
    assert!(
        asked(&plain).await <= before,
        "one that does not have it was asked"
    );

    // A coordinator that starts knows nobody: agents go on with what they know, and workers say it again.
    let jobs: Vec<Value> = (0..8)
        .map(|n| rollout(&format!("k{n}"), "tiny", 60))
        .collect();
    client.submit("c", &jobs).await;
    cluster.coordinators[0].process.kill();
    cluster.restart_coordinator(0).await;
    let mut client = cluster.client().await;
    let result = client.wait("c", DEADLINE).await;
    let succeeded = result.count(JobState::Succeeded);
    assert_eq!(succeeded, result.jobs.len(), "{:#?}", result.unsolved());
    for (id, job) in &result.jobs {
        // A grant that died with the coordinator before it was sent is the one loss that may be.
        let lost = job.last_error.as_ref();
        let is_grant = lost.is_none_or(|error| error.message.contains("lease of worker"));
        assert!(is_grant && job.handler_failures == 0, "{id}: {job:?}");
    }
    until_served(&cluster, &[&["tiny"], &["tiny", "tuned"]]).await;
}
