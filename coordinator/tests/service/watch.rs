//! Progress as a stream, taken up again after a break.

use espalier_proto::v1;
use tonic::{Code, Streaming};

use crate::support::*;

async fn watch(jobs: &mut Jobs, after_cursor: u64) -> Streaming<v1::BatchEvent> {
    let request = v1::WatchBatchRequest {
        batch: "b1".to_owned(),
        after_cursor,
    };
    jobs.watch_batch(request).await.unwrap().into_inner()
}

async fn next(events: &mut Streaming<v1::BatchEvent>) -> Option<v1::BatchEvent> {
    soon(events.message()).await.unwrap()
}

async fn finish_one(worker: &mut Worker) -> String {
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let ack = worker.report(lease.clone(), success(&lease)).await;
    assert_eq!(ack.verdict(), v1::result_ack::Verdict::Accepted);
    lease.job.rsplit('/').next().unwrap().to_owned()
}

#[tokio::test]
async fn each_end_is_seen_once_even_over_a_break() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let specs = ["a", "b", "c"].map(plain).to_vec();
    submit(&mut jobs, "b1", 0, specs).await;
    let mut worker = coordinator.worker("w1", 1).await;

    let mut events = watch(&mut jobs, 0).await;
    let first = next(&mut events).await.unwrap();
    assert_eq!(first.batch.unwrap().counts.unwrap().ready, 3);
    let mut ended = vec![finish_one(&mut worker).await];
    let cursor = loop {
        let event = next(&mut events).await.unwrap();
        if let [job] = &event.ended[..] {
            assert_eq!((&job.id, job.state()), (&ended[0], v1::JobState::Succeeded));
            assert_eq!(job.summary.as_ref().unwrap().reward, Some(1.0));
            break event.cursor;
        }
    };
    drop(events);

    ended.push(finish_one(&mut worker).await);
    ended.push(finish_one(&mut worker).await);
    let batch = "b1".to_owned();
    jobs.close_batch(v1::CloseBatchRequest { batch })
        .await
        .unwrap();
    let mut events = watch(&mut jobs, cursor).await;
    let mut seen = Vec::new();
    let mut complete = false;
    while let Some(event) = next(&mut events).await {
        seen.extend(event.ended.into_iter().map(|job| job.id));
        complete = event.batch.unwrap().complete;
    }
    assert_eq!(seen, ended[1..]);
    assert!(complete);
}

#[tokio::test]
async fn a_drain_ends_the_stream_with_a_reason_to_come_back() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let mut events = watch(&mut jobs, 0).await;
    assert!(next(&mut events).await.is_some());
    coordinator.shutdown.drain();
    let status = soon(events.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    coordinator.end().await.unwrap();
}

#[tokio::test]
async fn a_token_watches_so_many_batches_at_once() {
    let coordinator = Coordinator::start_with(|config| config.watches_max = 2).await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let first = watch(&mut jobs, 0).await;
    let _second = watch(&mut jobs, 0).await;
    let request = v1::WatchBatchRequest {
        batch: "b1".to_owned(),
        after_cursor: 0,
    };
    let refused = jobs.watch_batch(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("watches_max"), "{refused}");
    // Another token of the same project has places of its own.
    watch(&mut coordinator.jobs(READER), 0).await;
    // A stream that nobody reads any more gives its place back.
    drop(first);
    let again = async {
        while let Err(status) = jobs.watch_batch(request.clone()).await {
            assert_eq!(status.code(), Code::ResourceExhausted);
            tokio::task::yield_now().await;
        }
    };
    soon(again).await;
}
