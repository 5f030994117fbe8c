//! What the server does to the queue: it forgets scripts, is killed, does not answer, has no memory left.

use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId, WorkerId};
use espalier_core::queue::{
    JobKind, LeaseRequest, NewBatch, NewJob, RenewReply, Selector, StateName,
};
use espalier_testbed::redis::RedisServer;
use espalier_testbed::wait_for;

use super::Redis;
use super::tests::open;
use crate::queue::{
    Chunk, Finish, FinishAck, Granted, JobResult, OpenBatch, Outcome, Queue, QueueError, Renewal,
    Submission,
};

const DEADLINE: Duration = Duration::from_secs(30);

fn project() -> ProjectId {
    ProjectId::new("p").unwrap()
}

fn batch(name: &str) -> BatchId {
    BatchId::new(name).unwrap()
}

pub async fn open_batch(queue: &dyn Queue, name: &str) -> Result<(), QueueError> {
    let request = OpenBatch {
        batch: NewBatch {
            project: project(),
            batch: batch(name),
            params_digest: [0; 32],
        },
        defaults: Bytes::new(),
    };
    queue.open_batch(request).await.map(drop)
}

/// `many` jobs with specs of `spec_bytes`.
pub fn chunk(name: &str, n: u32, many: u32, spec_bytes: usize) -> Chunk {
    let job = |i| Submission {
        job: NewJob::new(
            JobId::new(format!("job-{n}-{i}")).unwrap(),
            JobKind::Rollout,
            [1; 32],
        ),
        spec: Bytes::from(vec![b'x'; spec_bytes]),
    };
    Chunk {
        project: project(),
        batch: batch(name),
        n,
        digest: [n as u8; 32],
        jobs: (0..many).map(job).collect(),
    }
}

pub async fn lease(queue: &dyn Queue, n: u32) -> Result<Vec<Granted>, QueueError> {
    let request = LeaseRequest {
        worker: WorkerId::new("w").unwrap(),
        request: 0,
        kind: JobKind::Rollout,
        offers: Default::default(),
        n,
        ttl: None,
    };
    queue.lease(request).await
}

pub fn success(granted: &Granted) -> Finish {
    let result = JobResult {
        summary: Bytes::from("done"),
        manifest: "path".to_owned(),
    };
    Finish {
        key: granted.grant.key.clone(),
        fence: granted.grant.fence,
        outcome: Outcome::Succeeded {
            result,
            spawn: Vec::new(),
        },
    }
}

async fn with_jobs(server: &RedisServer, many: u32) -> std::sync::Arc<Redis> {
    let queue = open(&server.url(), None, 1).await;
    open_batch(queue.as_ref(), "b").await.unwrap();
    let reply = queue.submit(chunk("b", 0, many, 100)).await.unwrap();
    assert_eq!(reply.items.len(), many as usize);
    queue
}

#[tokio::test]
async fn scripts_that_the_server_forgot_are_loaded_again() {
    let server = RedisServer::start().await;
    let queue = with_jobs(&server, 2).await;
    for _ in 0..2 {
        assert_eq!(server.cli(&["SCRIPT", "FLUSH"]).await.trim(), "OK");
        let granted = lease(queue.as_ref(), 1).await.unwrap();
        assert_eq!(granted.len(), 1);
    }
}

#[tokio::test]
async fn the_link_finds_a_server_that_was_killed_and_started_again() {
    let mut server = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let queue = with_jobs(&server, 2).await;
    let first = lease(queue.as_ref(), 1).await.unwrap();
    server.kill();
    let away = lease(queue.as_ref(), 1).await;
    assert!(matches!(away, Err(QueueError::Unavailable { .. })));
    server.restart().await;
    let acks = wait_for("the queue to be back", DEADLINE, || {
        queue.finish(vec![success(&first[0])])
    });
    assert_eq!(acks.await, [FinishAck::Accepted]);
    let second = lease(queue.as_ref(), 5).await.unwrap();
    assert_eq!(second.len(), 1);
    assert!(second[0].grant.fence > first[0].grant.fence);
}

#[tokio::test]
async fn an_answer_that_did_not_come_is_asked_for_again() {
    let server = RedisServer::start().await;
    let queue = with_jobs(&server, 1).await;
    let granted = lease(queue.as_ref(), 1).await.unwrap();
    // Longer than an answer may take: the server does the work, and nobody hears of it.
    let answer = server.cli(&["CLIENT", "PAUSE", "7000", "ALL"]).await;
    assert_eq!(answer.trim(), "OK");
    let unheard = queue.finish(vec![success(&granted[0])]).await;
    assert!(matches!(unheard, Err(QueueError::Unavailable { .. })));
    let acks = wait_for("an answer", DEADLINE, || {
        queue.finish(vec![success(&granted[0])])
    });
    // What a broken connection had sent is lost or done; in no case done twice.
    assert!(matches!(
        acks.await[..],
        [FinishAck::AlreadyFinished | FinishAck::Accepted]
    ));
    let again = queue.finish(vec![success(&granted[0])]).await.unwrap();
    assert_eq!(again, [FinishAck::AlreadyFinished]);
}

/// Submits until the server has no room for one more job. Returns how many it took.
async fn fill(queue: &Redis) -> u64 {
    // Past the look at the server that turns new work away earlier.
    let core = &queue.shards[0].core;
    let (mut taken, mut many) = (0, 100);
    for n in 1..10_000 {
        match core.submit(chunk("b", n, many, 1_000)).await {
            Ok(_) => taken += u64::from(many),
            Err(error) if many == 1 => {
                assert!(error.to_string().contains("maxmemory"), "{error}");
                return taken;
            }
            Err(_) => many = 1,
        }
    }
    panic!("4 MiB hold 10,000 jobs of 1 KB");
}

#[tokio::test]
async fn a_full_server_takes_no_new_work_and_brings_the_rest_to_its_end() {
    let server = RedisServer::start_with(&[("maxmemory", "4mb")]).await;
    let queue = with_jobs(&server, 6).await;
    open_batch(queue.as_ref(), "gone").await.unwrap();
    queue.close_batch(project(), batch("gone")).await.unwrap();
    let jobs = 6 + fill(&queue).await;
    let refused = wait_for("a refusal", DEADLINE, || async {
        let opened = open_batch(queue.as_ref(), "more").await;
        opened.err().ok_or("opened")
    });
    let refused = refused.await.to_string();
    assert!(refused.contains("memory"), "{refused}");

    // A coordinator may start, and all that makes room goes on.
    let queue = open(&server.url(), None, 1).await;
    let queue = queue.as_ref() as &dyn Queue;
    let granted = lease(queue, 4).await.unwrap();
    assert_eq!(granted.len(), 4);
    let renewal = Renewal {
        key: granted[0].grant.key.clone(),
        fence: granted[0].grant.fence,
        progress: Some("turn 3".to_owned()),
    };
    let renewed = queue.renew(vec![renewal]).await.unwrap();
    assert!(matches!(renewed[..], [RenewReply::Held { .. }]));
    queue.tick(100).await.unwrap();
    let failed = Finish {
        outcome: Outcome::Failed {
            class: espalier_core::error::ErrorClass::Invalid,
            message: "no".into(),
            log_tail: String::new(),
            retry_after: None,
        },
        ..success(&granted[1])
    };
    let acks = queue.finish(vec![success(&granted[0]), failed]).await;
    assert_eq!(acks.unwrap(), [FinishAck::Accepted, FinishAck::Accepted]);
    let dead = Selector::Job(granted[1].grant.key.clone());
    assert_eq!(queue.requeue_dead(dead).await.unwrap(), 1);
    let all = Selector::Batch(project(), batch("b"));
    let cancelled = queue.cancel(all).await.unwrap();
    assert_eq!((cancelled.cancelled, cancelled.requested), (jobs - 3, 2));
    let gone = queue.purge(Duration::ZERO, 10).await.unwrap();
    assert_eq!(gone, [(project(), batch("gone"))]);
    let key: JobKey = granted[0].grant.key.clone();
    let kept = queue.job(key).await.unwrap().unwrap();
    assert_eq!(kept.job.state.name(), StateName::Succeeded);
}
