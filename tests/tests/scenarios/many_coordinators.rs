//! Several coordinators as processes of their own on one Redis: whatever a client or an operator asks, any of them does.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::model::{self, sum_job};
use espalier_tests::harness::process::{Process, binary};
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

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

#[tokio::test]
async fn coordinators_are_replaced_one_after_the_other_and_no_attempt_is_lost() {
    let redis = RedisServer::start().await;
    let mut cluster = two_coordinators(&redis).await;
    let mut client = cluster.client().await;
    let _workers = [cluster.worker("w1", 4), cluster.worker("w2", 4)];
    let jobs: Vec<_> = (0..200).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    client.submit("sums", &jobs).await;
    for (number, done) in [(0, 20), (1, 80)] {
        let other = cluster.client_at(cluster.addresses()[1 - number]).await;
        other.wait_until_succeeded("sums", done, DEADLINE).await;
        let process = &mut cluster.coordinators[number].process;
        assert!(process.terminate(DEADLINE).await.success());
        cluster.restart_coordinator(number).await;
    }
    let result = cluster.client().await.wait("sums", DEADLINE).await;
    assert_eq!(result.count(JobState::Succeeded), 200);
    let repeated = result.jobs.values().filter(|job| job.attempts > 1).count();
    assert_eq!(repeated, 0, "a stop in good order spends no attempt");
}

/// One look of `espalier watch` at the whole system, by an operator of the coordinators behind `at`.
async fn one_look(cluster: &Cluster, at: SocketAddr) -> Value {
    let mut command = tokio::process::Command::from(cluster.operator(&[at]));
    let looking = command.args(["watch", "--once", "--json"]).output();
    let output = looking.await.expect("the command runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).expect("a look is JSON")
}

#[tokio::test]
async fn an_operator_of_one_watches_jobs_and_workers_of_both() {
    let redis = RedisServer::start().await;
    let cluster = two_coordinators(&redis).await;
    let addresses = cluster.addresses();
    let [first, second] = addresses[..] else {
        panic!("two coordinators");
    };
    let mut client = cluster.client_at(first).await;
    client.open("sums").await;
    // In progress as long as it is open, whatever becomes of its jobs.
    let jobs: Vec<_> = (0..20).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    client.chunk("sums", 0, &jobs).await.unwrap();
    let look = one_look(&cluster, second).await;
    assert_eq!(look["queues"][0]["ready"], 20, "{look}");
    assert_eq!(look["batches"][0]["batch"], "sums", "{look}");

    let _workers = [
        cluster.worker_at(&[first], "w1", 1),
        cluster.worker_at(&[second], "w2", 1),
    ];
    wait_for("the look to show both", DEADLINE, || async {
        let look = one_look(&cluster, second).await;
        let both = look["workers"].as_array().map(Vec::len) == Some(2);
        both.then_some(()).ok_or(look.to_string())
    })
    .await;
    // On a busy machine one may have done all by itself before the other was there.
    let more: Vec<_> = (20..60).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    client.chunk("sums", 1, &more).await.unwrap();
    wait_for("the look to show both at work", DEADLINE, || async {
        let look = one_look(&cluster, second).await;
        let shown: Vec<&Value> = look["workers"].as_array().unwrap().iter().collect();
        let granted = shown.iter().filter(|w| w["granted"].as_u64() > Some(0));
        let named = granted.filter_map(|w| w["coordinator"].as_str().filter(|id| !id.is_empty()));
        let at: BTreeSet<&str> = named.collect();
        let (done, both) = (look["queues"][0]["succeeded"] == 60, at.len() == 2);
        (done && both).then_some(()).ok_or(look.to_string())
    })
    .await;
    // The first one sees the worker of the second a moment later.
    let look = wait_for("the other one to show both", DEADLINE, || async {
        let look = one_look(&cluster, first).await;
        match look["workers"].as_array().map(Vec::len) {
            Some(2) => Ok(look),
            _ => Err(look.to_string()),
        }
    })
    .await;
    assert_eq!(look["batches"][0]["counts"]["succeeded"], 60, "{look}");
    assert_eq!(look["queues"][0]["kind"], "rollout", "{look}");
    assert_eq!(look["workers"][1]["kinds"], json!(["rollout"]), "{look}");
    assert_eq!(look["open_questions"], 0, "{look}");
}

#[tokio::test]
async fn a_redis_that_throws_jobs_away_is_refused_and_its_password_not_shown() {
    let redis = RedisServer::start_with(&[("maxmemory-policy", "allkeys-lru")]).await;
    redis
        .cli(&["CONFIG", "SET", "requirepass", "hunter2"])
        .await;
    let folder = tempfile::TempDir::new().unwrap();
    let start = |name: &str, password: &str| {
        let mut command = Command::new(binary("espalier-coordinator"));
        command
            .args(["--listen", "127.0.0.1:0", "--store", "memory://", "--queue"])
            .arg(format!("redis://:{password}@127.0.0.1:{}", redis.port()))
            .env(
                "ESPALIER_COORDINATOR_TOKENS",
                format!(
                    r#"[{{ name = "t", sha256 = "{}", project = "p", roles = ["read"] }}]"#,
                    "ab".repeat(32)
                ),
            );
        Process::start(name, command, folder.path())
    };
    let mut evicting = start("evicting", "hunter2");
    assert!(!evicting.wait(DEADLINE).await.success());
    let said = evicting.log();
    assert!(
        said.contains("set `maxmemory-policy` to `noeviction`"),
        "{said}"
    );
    assert!(!said.contains("hunter2"), "{said}");

    let mut locked_out = start("locked-out", "hunter3");
    assert!(!locked_out.wait(DEADLINE).await.success());
    let said = locked_out.log();
    assert!(said.contains("Redis") && !said.contains("hunter"), "{said}");
}
