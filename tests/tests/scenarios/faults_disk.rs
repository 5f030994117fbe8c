//! A disk that is full: nothing that was acknowledged is lost, what cannot be stored is refused, what is under way
//! waits, and all of it goes on once there is room.
//!
//! Each test mounts a small tmpfs in a namespace of its own. Where the machine does not let it, the test fails,
//! unless a person has set `ESPALIER_TEST_WITHOUT_DISKS`: then it prints `SKIPPED` and proves nothing.

use std::time::Duration;

use espalier_core::layout;
use espalier_core::trace::Manifest;
use espalier_proto::v1::{self, JobState};
use espalier_tests::harness::client::{BatchResult, Client};
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::disk::OPT_OUT;
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};
use tonic::Code;

const DEADLINE: Duration = Duration::from_secs(50);
/// Longest that a submission may take to be refused.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
/// Jobs of the batch `b`, which are acknowledged before the disk is full.
const EARLY: u64 = 16;

fn skipped() {
    println!("SKIPPED: {OPT_OUT} is set, and nobody may mount a tmpfs in a namespace of their own");
}

/// Jobs that sleep a little and answer; each spec has about `padding` bytes.
fn naps(name: &str, count: usize, sleep_ms: u64, padding: usize) -> Vec<Value> {
    let steps = json!([{"tool": "sleep", "arguments": {"ms": sleep_ms}}, {"answer": "done"}]);
    let nap = |n| {
        let mut job = toy_job(&format!("{name}-{n:03}"), &steps, "done");
        // A full disk may end attempts; it must not end jobs.
        job["max_infra"] = 20.into();
        job["labels"] = json!({});
        let prompt = job["prompt"].as_str().unwrap_or_default();
        job["prompt"] = format!("{}{prompt}", "z".repeat(padding)).into();
        job
    };
    (0..count).map(nap).collect()
}

async fn counts(client: &Client, batch: &str) -> v1::Counts {
    let mut api = client.jobs.clone();
    let request = v1::GetBatchRequest {
        batch: batch.to_owned(),
    };
    let answer = api.get_batch(request).await;
    let batch = answer.expect("a batch can be read from a full disk");
    batch.into_inner().counts.unwrap_or_default()
}

async fn wait_until_succeeded(client: &Client, batch: &str, at_least: u64) {
    wait_for("some jobs to succeed", DEADLINE, || async {
        let counts = counts(client, batch).await;
        if counts.succeeded >= at_least {
            Ok(())
        } else {
            Err(counts)
        }
    })
    .await;
}

fn check(up: &Up, batch: &str, result: &BatchResult, count: usize) {
    let expected = v1::Counts {
        succeeded: count as u64,
        ..v1::Counts::default()
    };
    assert_eq!(result.batch.counts, Some(expected));
    assert_eq!(result.count(JobState::Succeeded), count);
    assert_eq!(result.solved(), count, "{:#?}", result.jobs);
    for id in result.jobs.keys() {
        let key = format!("default/{batch}/{id}").parse().expect("a key");
        let read = |path: &str| {
            let path = up.store_folder().join(path);
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let manifest =
            Manifest::parse(&read(&layout::manifest(&key)), &key).expect("the manifest reads");
        for file in &manifest.files {
            assert!(file.holds(&read(&file.path)), "{} is damaged", file.path);
        }
    }
}

/// Submits until the coordinator refuses, as it has to when nothing more can be stored.
async fn submit_until_refused(client: &mut Client, chunks: &[Vec<Value>]) -> (usize, Code) {
    for (n, lines) in chunks.iter().enumerate() {
        let submitted = client.chunk("late", u32::try_from(n).unwrap_or(0), lines);
        let answer = tokio::time::timeout(REFUSAL_DEADLINE, submitted)
            .await
            .expect("a full disk makes no submission hang");
        if let Err(status) = answer {
            println!("chunk {n} was refused: {status:?}");
            return (n, status.code());
        }
    }
    panic!("a full disk took every job");
}

/// Sends chunks again as a client does, until each is acknowledged.
async fn submit_until_accepted(client: &mut Client, chunks: &[Vec<Value>]) {
    for (n, lines) in chunks.iter().enumerate() {
        let n = u32::try_from(n).unwrap_or(0);
        wait_for("a chunk to be accepted", DEADLINE, || {
            let mut client = client.clone();
            async move { client.chunk("late", n, lines).await }
        })
        .await;
    }
    let close = v1::CloseBatchRequest {
        batch: "late".to_owned(),
    };
    client.jobs.close_batch(close).await.expect("it closes");
}

/// Fills the disk, sees that new jobs are refused and that rollouts meet it, and that nothing else is the matter. Gives
/// the chunks that make the batch `late`: those that still found room, and the one that was refused.
async fn fill_and_look(up: &mut Up, client: &mut Client) -> Vec<Vec<Value>> {
    let disk = up.disk.take().expect("its disk is small");
    disk.fill();
    let mut chunks: Vec<Vec<Value>> = (0..12)
        .map(|n| naps(&format!("late-{n:02}"), 40, 0, 3_000))
        .collect();
    let (refused, code) = submit_until_refused(client, &chunks).await;
    assert_eq!(code, Code::Unavailable);
    chunks.truncate(refused + 1);
    // A spec that goes to the store, and not to the queue's file.
    let large = naps("large", 1, 0, 100_000);
    let answer = client.chunk("late", 99, &large).await;
    assert_eq!(answer.expect_err("it is full").code(), Code::Unavailable);
    wait_for("rollouts to meet the full disk", DEADLINE, || {
        disk.fill();
        let log = up.process.log();
        let met = log.matches("cannot publish yet").count() + log.matches("disk is full").count();
        async move { if met >= 4 { Ok(()) } else { Err(met) } }
    })
    .await;
    assert!(up.process.ended().is_none(), "a full disk ends nothing");
    let now = counts(client, "b").await;
    let on_the_way = now.ready + now.delayed + now.leased;
    assert_eq!(
        (on_the_way + now.succeeded, now.dead),
        (EARLY, 0),
        "{now:?}"
    );
    assert!(on_the_way > 0, "{now:?}");
    up.disk = Some(disk);
    chunks
}

/// There is room again: everything that was acknowledged completes, and what was refused can be sent again.
async fn finish(up: &mut Up, chunks: &[Vec<Value>]) {
    let mut client = up.client().await;
    submit_until_accepted(&mut client, chunks).await;
    let result = client.wait("b", DEADLINE).await;
    check(up, "b", &result, EARLY as usize);
    let result = client.wait("late", DEADLINE).await;
    check(up, "late", &result, chunks.iter().map(Vec::len).sum());
    let status = up.process.terminate(Duration::from_secs(60)).await;
    assert!(status.success(), "{status:?}");
    up.wait_until_gone(Duration::from_secs(10)).await;
}

/// `up` on a small disk, in the middle of its jobs.
async fn start_in_the_middle() -> Option<(Up, Client)> {
    let model_url = model::start().await;
    let more = ["--slots", "4", "--lease-ttl-s", "3"];
    let up = Up::start_on_small_disk(24 * MIB, &toy_servers(), &model_url, &more).await?;
    let mut client = up.client().await;
    let jobs = naps("early", EARLY as usize, 300, 0);
    assert_eq!(u64::from(client.submit("b", &jobs).await.accepted), EARLY);
    client.open("late").await;
    wait_until_succeeded(&client, "b", 4).await;
    Some((up, client))
}

#[tokio::test]
async fn up_on_a_full_disk_refuses_new_jobs_and_finishes_the_others_once_there_is_room() {
    let Some((mut up, mut client)) = start_in_the_middle().await else {
        return skipped();
    };
    let chunks = fill_and_look(&mut up, &mut client).await;
    up.disk.as_ref().unwrap().free();
    finish(&mut up, &chunks).await;
}

#[tokio::test]
async fn up_that_was_killed_on_a_full_disk_starts_again_with_every_job() {
    let Some((mut up, mut client)) = start_in_the_middle().await else {
        return skipped();
    };
    let chunks = fill_and_look(&mut up, &mut client).await;
    let before = counts(&client, "b").await;
    up.process.kill();
    up.wait_until_gone(Duration::from_secs(10)).await;
    up.disk.as_ref().unwrap().free();
    up.restart().await;
    let after = counts(&up.client().await, "b").await;
    assert!(after.succeeded >= before.succeeded, "{before:?}, {after:?}");
    finish(&mut up, &chunks).await;
}

#[tokio::test]
async fn results_that_find_no_room_on_the_workers_disk_wait_for_it() {
    let cluster = Cluster::start(&model::start().await, 10_000).await;
    let Some(disk) = cluster.small_disk("a", 16 * MIB) else {
        return skipped();
    };
    let mut worker = cluster.worker_on_disk("a", 4, &disk);
    let mut client = cluster.client().await;
    client.submit("first", &naps("nap", 1, 0, 0)).await;
    assert_eq!(client.wait("first", DEADLINE).await.solved(), 1);

    disk.fill();
    let bytes = MIB + MIB / 4;
    let steps = json!([{"tool": "big", "arguments": {"bytes": bytes}}, {"answer": "done"}]);
    let jobs: Vec<Value> = (0..8)
        .map(|n| toy_job(&format!("big-{n:02}"), &steps, "done"))
        .collect();
    client.submit("b", &jobs).await;
    wait_for("the worker to meet the full disk", DEADLINE, || {
        let met = worker.process.log().contains("disk is full");
        async move { met.then_some(()).ok_or("nothing in the log") }
    })
    .await;
    assert!(worker.process.ended().is_none(), "a full disk ends nothing");
    disk.free();
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 8, "{:#?}", result.jobs);
    for (id, job) in &result.jobs {
        assert_eq!(job.attempts, 1, "{id} waited, and was not begun again");
        let manifest = cluster.manifest(&cluster.key("b", id));
        assert!(manifest.files.iter().any(|file| file.size >= bytes));
    }
    worker.terminate(DEADLINE).await;
}
