//! The conformance suite on a disk that loses power, and what only this backend can get wrong: its file and its
//! commits.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId, WorkerId};
use espalier_core::queue::{ItemResult, JobKind, LeaseRequest, NewBatch, NewJob, StateName};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, ManualClock};
use futures::FutureExt;

use super::super::conformance::{Ending, Fixture, conformance_tests};
use super::super::{
    Chunk, ChunkReply, Finish, FinishAck, JobResult, OpenBatch, Outcome, Queue, QueueError,
    Submission,
};
use super::disk::Disk;
use super::{Embedded, EmbeddedConfig, OpenError};

const START: Timestamp = Timestamp(1_700_000_000_000_000);

fn on_disk(disk: &Disk, clock: &Arc<ManualClock>) -> Arc<Embedded> {
    let config = EmbeddedConfig::new("disk", clock.clone() as Arc<dyn Clock>);
    Arc::new(Embedded::open_with(config, disk.opener()).unwrap())
}

async fn fixture() -> Fixture {
    let (disk, clock) = (Disk::default(), Arc::new(ManualClock::new(START)));
    let queue = on_disk(&disk, &clock);
    let same_clock = clock.clone();
    let reopen = move |old: Arc<dyn Queue>, how| {
        if how == Ending::Killed {
            disk.cut_power();
        }
        drop(old);
        let queue: Arc<dyn Queue> = on_disk(&disk, &same_clock);
        futures::future::ready(queue).boxed()
    };
    Fixture {
        queue,
        clock,
        reopen: Box::new(reopen),
    }
}

conformance_tests!(fixture);

fn names() -> (ProjectId, BatchId) {
    (ProjectId::new("p").unwrap(), BatchId::new("b").unwrap())
}

async fn open_batch(queue: &dyn Queue) {
    let (project, batch) = names();
    let request = OpenBatch {
        batch: NewBatch {
            project,
            batch,
            params_digest: [0; 32],
        },
        defaults: Bytes::new(),
    };
    queue.open_batch(request).await.unwrap();
}

async fn submit(queue: &dyn Queue, n: u32, jobs: u32) -> Result<ChunkReply, QueueError> {
    let (project, batch) = names();
    let jobs = (0..jobs).map(|job| {
        let id = JobId::new(format!("j{n}-{job}")).unwrap();
        Submission {
            job: NewJob::new(id, JobKind::Rollout, [1; 32]),
            spec: Bytes::from(vec![7; 300]),
        }
    });
    let chunk = Chunk {
        project,
        batch,
        n,
        digest: [1; 32],
        jobs: jobs.collect(),
    };
    queue.submit(chunk).await
}

fn lease_request(n: u32) -> LeaseRequest {
    LeaseRequest {
        worker: WorkerId::new("w").unwrap(),
        request: 0,
        kind: JobKind::Rollout,
        offers: Default::default(),
        n,
        ttl: None,
    }
}

fn finish(key: &JobKey, fence: espalier_core::id::Fence) -> Finish {
    Finish {
        key: key.clone(),
        fence,
        outcome: Outcome::Succeeded {
            result: JobResult::default(),
            spawn: Vec::new(),
        },
    }
}

fn unavailable<T: std::fmt::Debug>(result: &Result<T, QueueError>) -> bool {
    matches!(result, Err(QueueError::Unavailable { .. }))
}

#[tokio::test]
async fn what_could_not_be_stored_never_happened() {
    let (disk, clock) = (Disk::default(), Arc::new(ManualClock::new(START)));
    let queue = on_disk(&disk, &clock);
    open_batch(&*queue).await;
    submit(&*queue, 0, 10).await.unwrap();
    let granted = queue.lease(lease_request(1)).await.unwrap().remove(0);
    let mut events = queue.events();
    disk.set_full(true);
    let ended = finish(&granted.grant.key, granted.grant.fence);
    assert!(unavailable(&queue.finish(vec![ended.clone()]).await));
    let said = submit(&*queue, 1, 10).await.unwrap_err().to_string();
    assert!(said.contains("is full; free space"), "{said}");
    assert!(unavailable(&queue.lease(lease_request(1)).await));
    assert!(events.try_recv().is_err(), "nobody is told of it");

    disk.set_full(false);
    clock.advance(Duration::from_secs(1));
    let (project, batch) = names();
    let seen = queue.batch(project, batch).await.unwrap().unwrap();
    assert_eq!(seen.counters.total(), 10);
    assert_eq!(seen.counters.get(StateName::Leased), 1);
    let refused = submit(&*queue, 1, 10).await;
    assert!(
        unavailable(&refused),
        "new work waits a moment: {refused:?}"
    );
    assert_eq!(
        refused.unwrap_err().to_string(),
        said,
        "for the same reason"
    );
    let acks = queue.finish(vec![ended]).await.unwrap();
    assert_eq!(acks, [FinishAck::Accepted], "what is under way goes on");
    clock.advance(Duration::from_secs(5));
    let reply = submit(&*queue, 1, 10).await.unwrap();
    assert!(!reply.repeated);
    assert!(reply.items.iter().all(|item| *item == ItemResult::Accepted));
}

#[tokio::test]
async fn a_panic_of_a_rule_undoes_its_group_and_no_more() {
    let (disk, clock) = (Disk::default(), Arc::new(ManualClock::new(START)));
    let queue = on_disk(&disk, &clock);
    open_batch(&*queue).await;
    submit(&*queue, 0, 3).await.unwrap();
    let broken = queue.call(
        false,
        0,
        |turn| {
            let _ = turn.machine.lease(turn.now, &lease_request(3));
            panic!("a rule that does not hold")
        },
        |(), _| Ok(()),
    );
    assert!(unavailable(&broken.await));
    let granted = queue.lease(lease_request(5)).await.unwrap();
    assert_eq!(granted.len(), 3, "the leases of the broken call are undone");
}

#[tokio::test]
async fn concurrent_calls_share_commits_and_each_gets_its_answer() {
    let (disk, clock) = (Disk::default(), Arc::new(ManualClock::new(START)));
    let queue = on_disk(&disk, &clock);
    open_batch(&*queue).await;
    let calls = (0..200).map(|n| {
        let queue = queue.clone();
        async move { submit(&*queue, n, n % 5).await.unwrap().items.len() }
    });
    let answers = futures::future::join_all(calls).await;
    let wanted: Vec<usize> = (0..200).map(|n| n % 5).collect();
    assert_eq!(answers, wanted);
    disk.cut_power();
    drop(queue);
    let queue = on_disk(&disk, &clock);
    let (project, batch) = names();
    let seen = queue.batch(project, batch).await.unwrap().unwrap();
    assert_eq!(seen.counters.total(), 400);
}

#[tokio::test]
async fn time_goes_on_where_the_clock_was_set_back_between_two_processes() {
    let (disk, clock) = (Disk::default(), Arc::new(ManualClock::new(START)));
    let queue = on_disk(&disk, &clock);
    open_batch(&*queue).await;
    clock.advance(Duration::from_secs(3_600));
    submit(&*queue, 0, 1).await.unwrap();
    queue.close().await;
    drop(queue);

    clock.set(START);
    let queue = on_disk(&disk, &clock);
    let grant = queue.lease(lease_request(1)).await.unwrap().remove(0).grant;
    clock.advance(Duration::from_secs(61));
    assert_eq!(queue.tick(10).await.unwrap().reaped, 1);
    let job = queue.job(grant.key).await.unwrap().unwrap().job;
    assert!(job.changed_at > START + Duration::from_secs(3_600));
}

#[tokio::test]
async fn a_second_process_on_the_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deeper/queue.redb");
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(START));
    let config = EmbeddedConfig::new(&path, clock);
    let first = Embedded::open(config.clone()).unwrap();
    let second = Embedded::open(config.clone()).unwrap_err();
    assert!(matches!(second, OpenError::InUse { .. }), "{second}");
    let told = format!(
        "the queue's file {} is in use by another process",
        path.display()
    );
    assert_eq!(second.to_string(), told);
    open_batch(&first).await;
    first.close().await;
    let again = Embedded::open(config).unwrap();
    let (project, batch) = names();
    assert!(again.batch(project, batch).await.unwrap().is_some());
}

#[tokio::test]
async fn a_file_of_something_else_is_refused_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("queue.redb");
    std::fs::write(
        &path,
        b"PK\x03\x04 this is a zip archive, not a queue".repeat(200),
    )
    .unwrap();
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(START));
    let error = Embedded::open(EmbeddedConfig::new(&path, clock)).unwrap_err();
    assert!(matches!(error, OpenError::Unusable { .. }));
    assert!(error.to_string().contains("queue.redb"), "{error}");
}

#[tokio::test]
async fn a_power_cut_between_any_two_calls_loses_nothing_answered() {
    let (disk, clock) = (Disk::default(), Arc::new(ManualClock::new(START)));
    let mut queue = on_disk(&disk, &clock);
    open_batch(&*queue).await;
    let mut finished = Vec::new();
    for round in 0..30 {
        submit(&*queue, round, 4).await.unwrap();
        let granted = queue.lease(lease_request(2)).await.unwrap();
        let ended = &granted[0].grant;
        queue
            .finish(vec![finish(&ended.key, ended.fence)])
            .await
            .unwrap();
        finished.push(ended.key.clone());
        // The answer of this one nobody waits for: it may be stored or not, and never by half.
        let unanswered = submit(&*queue, 1_000 + round, 4);
        let waited = Duration::from_micros(u64::from(round) * 40);
        let _ = tokio::time::timeout(waited, unanswered).await;
        disk.cut_power();
        drop(queue);
        queue = on_disk(&disk, &clock);
        for key in &finished {
            let job = queue.job(key.clone()).await.unwrap().unwrap().job;
            assert_eq!(job.state.name(), StateName::Succeeded);
        }
        let (project, batch) = names();
        let total = queue
            .batch(project, batch)
            .await
            .unwrap()
            .unwrap()
            .counters
            .total();
        assert_eq!(total % 4, 0, "a chunk is there as a whole or not at all");
        assert!(total >= 4 * u64::from(round + 1));
    }
}
