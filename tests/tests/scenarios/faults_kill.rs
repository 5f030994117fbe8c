//! Processes that are killed and paused. After each round: no acknowledged job lost, one accepted result a job,
//! counters that add up, no process left over.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::client::{BatchResult, Client};
use espalier_tests::harness::model::{self, sum_job, toy_job};
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::soak;
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::wait_for;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(180);

/// Short leases, so that a killed worker's jobs come back while the test looks.
const SHORT_LEASE: [&str; 2] = ["--lease-ttl-s", "2"];

fn sums(count: usize) -> Vec<Value> {
    (0..count)
        .map(|n| sum_job(&format!("sum-{n:04}"), n))
        .collect()
}

/// What must hold of a batch of `count` sums, whatever happened on the way.
fn check(up: &Up, result: &BatchResult, count: usize) {
    let counts = result.batch.counts.as_ref().expect("a batch has counters");
    assert_eq!(result.jobs.len(), count, "a job was lost");
    assert_eq!(counts.succeeded, count as u64, "{counts:?}");
    let sum = counts.blocked
        + counts.delayed
        + counts.ready
        + counts.leased
        + counts.dead
        + counts.cancelled;
    assert_eq!(sum, 0, "{counts:?}");
    assert_eq!(
        result.solved(),
        count,
        "every job is solved: {:#?}",
        result
            .jobs
            .values()
            .find(|j| j.state() != JobState::Succeeded)
    );
    for job in result.jobs.values() {
        let path = up.store_folder().join(&job.manifest);
        let manifest =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let key = format!("default/b/{}", job.id).parse().unwrap();
        let manifest = espalier_core::trace::Manifest::parse(&manifest, &key).unwrap();
        for file in &manifest.files {
            let bytes =
                std::fs::read(up.store_folder().join(&file.path)).expect("a named file is there");
            assert!(
                file.holds(&bytes),
                "{} is not what the manifest says",
                file.path
            );
        }
    }
}

#[tokio::test]
async fn kill_9_of_up_in_the_middle_of_200_rollouts_loses_nothing() {
    let mut up = Up::start(&toy_servers(), &model::start().await, &SHORT_LEASE).await;
    let mut client = up.client().await;
    assert_eq!(client.submit("b", &sums(200)).await.accepted, 200);
    for at_least in [20, 80] {
        client.wait_until_succeeded("b", at_least, DEADLINE).await;
        up.process.kill();
        up.wait_until_gone(Duration::from_secs(10)).await;
        up.restart().await;
        client = up.client().await;
    }
    let result = client.wait("b", DEADLINE).await;
    check(&up, &result, 200);
    let status = up.process.terminate(Duration::from_secs(60)).await;
    assert!(status.success(), "{status:?}");
    up.wait_until_gone(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_pause_past_the_lease_makes_no_second_result() {
    let up = Up::start(&toy_servers(), &model::start().await, &SHORT_LEASE).await;
    let mut client = up.client().await;
    client.submit("b", &sums(60)).await;
    for at_least in [10, 30] {
        client.wait_until_succeeded("b", at_least, DEADLINE).await;
        up.process.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_secs(3)).await;
        up.process.signal(Signal::CONT);
    }
    let result = client.wait("b", DEADLINE).await;
    check(&up, &result, 60);
}

#[tokio::test]
async fn sigterm_drains_and_the_rest_goes_on_after_a_restart() {
    let mut up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let steps = json!([{"tool": "sleep", "arguments": {"ms": 400}}, {"answer": "done"}]);
    let jobs: Vec<Value> = (0..40)
        .map(|n| toy_job(&format!("s{n:02}"), &steps, "done"))
        .collect();
    client.submit("b", &jobs).await;
    client.wait_until_succeeded("b", 2, DEADLINE).await;
    let status = up.process.terminate(Duration::from_secs(60)).await;
    assert!(status.success(), "{status:?}");
    up.wait_until_gone(Duration::from_secs(10)).await;
    up.restart().await;
    let result = up.client().await.wait("b", DEADLINE).await;
    check(&up, &result, 40);
    let spent = result
        .jobs
        .values()
        .filter(|job| job.handler_failures + job.infra_failures > 0)
        .count();
    assert_eq!(spent, 0, "a stop in good order spends no attempt");
}

/// Submits chunk `n` and kills `up` after `delay`, whatever has become of the submission. True if it was acknowledged.
async fn kill_while_submitting(
    up: &mut Up,
    client: &Client,
    n: u32,
    chunk: &[Value],
    delay: Duration,
) -> bool {
    let mut sender = client.clone();
    let mut submission = std::pin::pin!(sender.chunk("b", n, chunk));
    let mut due = std::pin::pin!(tokio::time::sleep(delay));
    let answer = tokio::select! {
        biased;
        answer = &mut submission => {
            due.await;
            up.process.kill();
            answer
        }
        () = &mut due => {
            up.process.kill();
            // The answer may be on its way.
            submission.await
        }
    };
    if let Ok(answer) = &answer {
        assert_eq!(answer.accepted, 10, "{answer:?}");
    }
    answer.is_ok()
}

/// Sends chunk `n` until it is acknowledged, as a client does.
async fn submit_until_acknowledged(client: &Client, n: u32, chunk: &[Value]) {
    let answer = wait_for("a chunk to be acknowledged", DEADLINE, || {
        let mut client = client.clone();
        async move { client.chunk("b", n, chunk).await }
    })
    .await;
    assert_eq!(
        answer.accepted, 10,
        "sent again, accepted again: {answer:?}"
    );
}

/// `ESPALIER_SOAK_ROUNDS` and `ESPALIER_SOAK_SEED` make more of it, or the same again.
#[tokio::test]
async fn random_kills_lose_nothing() {
    let (rounds, seed) = (soak::rounds(), soak::seed());
    println!("seed {seed}: ESPALIER_SOAK_SEED={seed} replays this run");
    let mut random = StdRng::seed_from_u64(seed);
    let mut up = Up::start(&toy_servers(), &model::start().await, &SHORT_LEASE).await;
    let count = 10 * usize::try_from(rounds).unwrap();
    let jobs = sums(count);
    let mut client = up.client().await;
    client.open("b").await;
    let mut interrupted = 0;
    for (n, chunk) in jobs.chunks(10).enumerate() {
        // At once, within the few milliseconds of a submission, and in the middle of rollouts.
        let delay_us_max = [1, 5_000, 150_000][n % 3];
        let delay = Duration::from_micros(random.random_range(0..delay_us_max));
        let n = u32::try_from(n).unwrap();
        if !kill_while_submitting(&mut up, &client, n, chunk, delay).await {
            interrupted += 1;
        }
        up.wait_until_gone(Duration::from_secs(10)).await;
        up.restart().await;
        client = up.client().await;
        submit_until_acknowledged(&client, n, chunk).await;
    }
    println!("{interrupted} of {rounds} kills left a submission without an answer");
    assert!(
        interrupted > 0,
        "no kill came in the middle of a submission"
    );
    client
        .jobs
        .close_batch(espalier_proto::v1::CloseBatchRequest { batch: "b".into() })
        .await
        .unwrap();
    let result = client
        .wait("b", DEADLINE + Duration::from_secs(rounds))
        .await;
    check(&up, &result, count);
    up.process.terminate(Duration::from_secs(60)).await;
    up.wait_until_gone(Duration::from_secs(10)).await;
}
