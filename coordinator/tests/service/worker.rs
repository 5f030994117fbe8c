//! The stream of a worker: credit, grants, renewals, results, and its end.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::time::Timestamp;
use espalier_core::trace::{
    FileEntry, Manifest, RolloutSummary, SCHEMA_VERSION, StopReason, Summary, Totals,
};
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message as Heard;
use espalier_proto::v1::result_ack::Verdict;
use espalier_proto::v1::worker_message::Message as Said;
use prost::Message;
use tonic::Code;

use crate::support::*;

async fn one_job(coordinator: &Coordinator) -> Jobs {
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    submit(&mut jobs, "b1", 0, vec![plain("j")]).await;
    jobs
}

#[tokio::test]
async fn two_workers_share_the_jobs_and_never_get_more_than_their_credit() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let mut first = coordinator.worker("w1", 4).await;
    let mut second = coordinator.worker("w2", 4).await;
    first.credit(3).await;
    second.credit(4).await;
    let specs: Vec<v1::JobSpec> = (0..10).map(|i| plain(&format!("j{i}"))).collect();
    submit(&mut jobs, "b1", 0, specs).await;
    let mut leases = Vec::new();
    let (by_first, by_second) = (first.grants(3).await, second.grants(4).await);
    assert_eq!((by_first.len(), by_second.len()), (3, 4));
    for grant in by_first.iter().chain(&by_second) {
        assert_eq!(grant.attempt, 1);
        assert!(grant.lease_ttl_ms > 50_000 && grant.lease_ttl_ms <= 60_000);
        leases.push(grant.lease.clone().unwrap());
    }
    let names: BTreeSet<&str> = leases.iter().map(|lease| lease.job.as_str()).collect();
    assert_eq!(names.len(), 7, "no job twice");

    // Renewals are answered, which shows that no further grant came before.
    let renewal = v1::Renewal {
        lease: Some(leases[0].clone()),
        progress: "turn 3".to_owned(),
        number: 7,
    };
    let foreign = v1::Renewal {
        lease: Some(v1::Lease {
            fence: leases[0].fence + 1_000_000_000,
            ..leases[0].clone()
        }),
        progress: String::new(),
        number: 7,
    };
    let renewals = vec![renewal, foreign];
    first.say(Said::Renewals(v1::Renewals { renewals })).await;
    let Heard::RenewalAcks(acks) = first.hear().await else {
        panic!("expected the answer to the renewals");
    };
    assert_eq!((acks.acks.len(), acks.lost.len()), (1, 1));
    assert_eq!(acks.acks[0].number, 7);
    let id = leases[0].job.rsplit('/').next().unwrap();
    let seen = get_job(&mut jobs, "b1", id).await;
    assert_eq!(
        (seen.progress.as_str(), seen.worker.as_str()),
        ("turn 3", "w1")
    );

    first.credit(1).await;
    assert_eq!(first.grants(1).await.len(), 1);
}

#[tokio::test]
async fn a_result_counts_once_and_a_stale_one_never() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let older = v1::Lease {
        fence: lease.fence - 1,
        ..lease.clone()
    };
    let stale = worker.report(older.clone(), success(&older)).await;
    assert_eq!(stale.verdict(), Verdict::Stale);
    for _ in 0..2 {
        let ack = worker.report(lease.clone(), success(&lease)).await;
        assert_eq!(
            (ack.verdict(), ack.lease.as_ref()),
            (Verdict::Accepted, Some(&lease))
        );
    }
    let done = get_job(&mut jobs, "b1", "j").await;
    assert_eq!(done.state(), v1::JobState::Succeeded);
    assert_eq!(done.manifest, "shop/batches/b1/jobs/j/manifest.json");
    assert_eq!(done.summary.unwrap().stop, "answered");
}

#[tokio::test]
async fn results_that_can_never_count_fail_the_attempt() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 1).await;
    let broken: [fn(&mut v1::Success); 3] = [
        |s| s.manifest = "elsewhere/manifest.json".to_owned(),
        |s| s.spawn = vec![Bytes::from_static(b"\xff\xff")],
        |s| s.spawn = vec![job(r#"{"prompt":"","priority":77}"#).encode_to_vec().into()],
    ];
    for (n, change) in broken.into_iter().enumerate() {
        worker.credit(1).await;
        let lease = worker.grants(1).await.remove(0).lease.unwrap();
        let v1::result::Outcome::Success(mut said) = success(&lease) else {
            unreachable!("success() makes one");
        };
        change(&mut said);
        let outcome = v1::result::Outcome::Success(said);
        let ack = worker.report(lease, outcome).await;
        assert_eq!(ack.verdict(), Verdict::Refused, "{}", ack.reason);
        let seen = get_job(&mut jobs, "b1", "j").await;
        assert_eq!(seen.handler_failures as usize, n + 1);
    }
    let dead = get_job(&mut jobs, "b1", "j").await;
    assert_eq!(dead.state(), v1::JobState::Dead);
    let message = dead.last_error.unwrap().message;
    assert!(message.contains("spawn[0].priority"), "{message}");
}

#[tokio::test]
async fn spawned_jobs_enter_with_the_result() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let batch = "b1".to_owned();
    jobs.close_batch(v1::CloseBatchRequest { batch })
        .await
        .unwrap();
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(2).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let v1::result::Outcome::Success(mut said) = success(&lease) else {
        unreachable!("success() makes one");
    };
    said.spawn = vec![job(r#"{"prompt":"next"}"#).encode_to_vec().into()];
    let results = vec![v1::Result {
        lease: Some(lease.clone()),
        outcome: Some(v1::result::Outcome::Success(said)),
    }];
    worker.say(Said::Results(v1::Results { results })).await;
    let (mut acked, mut next) = (false, None);
    while !acked || next.is_none() {
        match worker.hear().await {
            Heard::ResultAcks(acks) => acked = acks.acks[0].verdict() == Verdict::Accepted,
            Heard::Grants(mut grants) => next = grants.grants.pop(),
            other => panic!("heard {other:?}"),
        }
    }
    let name = next.unwrap().lease.unwrap().job;
    assert_eq!(name, format!("shop/b1/s{}-0000", lease.fence));
}

#[tokio::test]
async fn a_cancel_reaches_the_running_job_at_once() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let target = Some(v1::cancel_request::Target::Batch("b1".to_owned()));
    let asked = Instant::now();
    let answer = jobs.cancel(v1::CancelRequest { target }).await.unwrap();
    assert_eq!(answer.get_ref().signalled, 1);
    let heard = worker.hear().await;
    let took = asked.elapsed();
    assert_eq!(
        heard,
        Heard::Cancels(v1::Cancels {
            leases: vec![lease.clone()]
        })
    );
    assert!(took < Duration::from_secs(1), "took {took:?}");
    let error = Some(v1::JobError {
        class: v1::ErrorClass::Cancelled.into(),
        ..v1::JobError::default()
    });
    let failure = v1::Failure {
        error,
        retry_after_ms: 0,
    };
    worker
        .report(lease, v1::result::Outcome::Failure(failure))
        .await;
    assert_eq!(
        get_job(&mut jobs, "b1", "j").await.state(),
        v1::JobState::Cancelled
    );
}

#[tokio::test]
async fn the_cancel_of_a_large_batch_reaches_every_running_job_at_once() {
    const RUNNING: u32 = 200;
    const CHUNK: usize = 1_500;
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    for chunk in 0..2 {
        let names = (0..CHUNK).map(|n| plain(&format!("j{chunk}-{n}")));
        submit(&mut jobs, "b1", chunk, names.collect()).await;
    }
    let mut worker = coordinator.worker("w1", RUNNING).await;
    worker.credit(RUNNING).await;
    let granted = worker.grants(RUNNING as usize).await;
    let mut running: BTreeSet<u64> = granted
        .into_iter()
        .map(|grant| grant.lease.unwrap().fence)
        .collect();
    let target = Some(v1::cancel_request::Target::Batch("b1".to_owned()));
    jobs.cancel(v1::CancelRequest { target }).await.unwrap();
    // Nothing is renewed here, so that the hints are the only way to hear of it.
    while !running.is_empty() {
        let Heard::Cancels(cancels) = worker.hear().await else {
            panic!("expected cancels");
        };
        for lease in cancels.leases {
            assert!(running.remove(&lease.fence), "{lease:?} twice");
        }
    }
}

#[tokio::test]
async fn a_lease_survives_its_stream_and_ends_by_its_deadline() {
    let coordinator = Coordinator::start_with(|config| config.lease_ttl_ms = Some(1_500)).await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    worker.end().await.unwrap();
    assert_eq!(
        get_job(&mut jobs, "b1", "j").await.state(),
        v1::JobState::Leased
    );

    let held = v1::Hello {
        held: vec![
            lease.clone(),
            v1::Lease {
                fence: 3,
                ..lease.clone()
            },
        ],
        ..hello("w1", 1)
    };
    let mut again = coordinator.greet(held).await;
    let Heard::Welcome(welcome) = again.hear().await else {
        panic!("must begin with Welcome");
    };
    assert_eq!((welcome.lost.len(), welcome.lost[0].fence), (1, 3));
    assert_eq!(welcome.lease_ttl_ms, 1_500);
    // Nobody renews: the lease is taken away, and the worker is told.
    let Heard::RenewalAcks(told) = again.hear().await else {
        panic!("expected a lost lease");
    };
    assert_eq!(told.lost, std::slice::from_ref(&lease));
    let ack = again.report(lease.clone(), success(&lease)).await;
    assert_eq!(ack.verdict(), Verdict::Stale);
    assert_eq!(get_job(&mut jobs, "b1", "j").await.infra_failures, 1);
}

#[tokio::test]
async fn a_released_job_is_ready_again_and_has_spent_nothing() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(2).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let (key, fence): (JobKey, _) = (lease.job.parse().unwrap(), lease.fence);
    let left = layout::segment(&key, Fence(fence), 0);
    coordinator.store.put(&left, Bytes::new()).await.unwrap();
    let results = vec![v1::Result {
        lease: Some(lease),
        outcome: Some(v1::result::Outcome::Released(v1::Released::default())),
    }];
    worker.say(Said::Results(v1::Results { results })).await;
    let granted = loop {
        if let Heard::Grants(mut grants) = worker.hear().await {
            break grants.grants.remove(0);
        }
    };
    assert_eq!((granted.attempt, granted.earlier_fences), (2, vec![fence]));
    let seen = get_job(&mut jobs, "b1", "j").await;
    assert_eq!((seen.handler_failures, seen.infra_failures), (0, 0));
}

#[tokio::test]
async fn a_worker_that_breaks_the_protocol_is_sent_away() {
    let coordinator = Coordinator::start().await;
    for (hello, expected) in [
        (v1::Hello::default(), "hello.capacity"),
        (hello("w/1", 1), "hello.worker"),
        (
            v1::Hello {
                held: vec![v1::Lease::default()],
                ..hello("w1", 1)
            },
            "hello.held[0].job",
        ),
        (
            v1::Hello {
                process: "p/1".to_owned(),
                ..hello("w1", 1)
            },
            "hello.process",
        ),
    ] {
        let status = coordinator.greet(hello).await.end().await.unwrap_err();
        assert_eq!(
            (status.code(), field(&status)),
            (Code::InvalidArgument, expected.to_owned())
        );
    }
    let twice = coordinator.worker("w1", 1).await;
    twice.say(Said::Hello(hello("w1", 1))).await;
    assert_eq!(field(&twice.end().await.unwrap_err()), "hello");
    let unknown = coordinator.worker("w1", 1).await;
    unknown
        .say(Said::Credit(v1::Credit { kind: 9, jobs: 1 }))
        .await;
    assert_eq!(field(&unknown.end().await.unwrap_err()), "credit.kind");
}

#[tokio::test]
async fn a_draining_coordinator_takes_results_and_then_ends() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 2).await;
    worker.credit(2).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let mut calls = vec![get_job(&mut jobs, "b1", "j").await];
    assert_eq!(calls.remove(0).state(), v1::JobState::Leased);
    coordinator.shutdown.drain();
    assert!(matches!(worker.hear().await, Heard::GoAway(_)));
    let ack = worker.report(lease.clone(), success(&lease)).await;
    assert_eq!(ack.verdict(), Verdict::Accepted);
    worker.end().await.unwrap();
    coordinator.end().await.unwrap();
}

fn manifest(key: &JobKey, fence: Fence, trace: &[u8]) -> Bytes {
    let manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        job: key.clone(),
        attempt: 1,
        fence,
        spec_sha256: None,
        created_at_us: Timestamp(1),
        files: vec![FileEntry::of(layout::trace(key, fence), trace)],
        parents: Vec::new(),
        summary: Summary::Rollout(RolloutSummary {
            reward: Some(1.0),
            stop: StopReason::Answered,
            reason: String::new(),
            task_id: String::new(),
            task_kind: String::new(),
            totals: Totals::default(),
        }),
    };
    serde_json::to_vec(&manifest).unwrap().into()
}

async fn read_trace(jobs: &mut Jobs) -> Result<Vec<u8>, tonic::Status> {
    let request = v1::GetTraceRequest {
        batch: "b1".to_owned(),
        id: "j".to_owned(),
    };
    let mut stream = jobs.get_trace(request).await?.into_inner();
    let mut text = Vec::new();
    while let Some(piece) = stream.message().await? {
        text.extend_from_slice(&piece.data);
    }
    Ok(text)
}

#[tokio::test]
async fn a_bad_manifest_is_set_aside_and_a_good_trace_is_read_back() {
    let coordinator = Coordinator::start().await;
    let mut jobs = one_job(&coordinator).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let (key, fence): (JobKey, _) = (lease.job.parse().unwrap(), Fence(lease.fence));
    let store = &coordinator.store;
    let zombie = Fence(1);
    store
        .create(&layout::manifest(&key), manifest(&key, zombie, b"half"))
        .await
        .unwrap();

    let report = v1::BadManifest {
        lease: Some(lease.clone()),
        reason: "the trace is missing".to_owned(),
    };
    worker.say(Said::BadManifest(report.clone())).await;
    let Heard::ManifestChecked(checked) = worker.hear().await else {
        panic!("expected the answer to the report");
    };
    assert!(checked.moved, "{}", checked.detail);

    let text: Vec<u8> = br#"{"id":"x"}"#.repeat(300_000);
    let packed = Bytes::from(zstd::encode_all(&text[..], 1).unwrap());
    store
        .put(&layout::trace(&key, fence), packed.clone())
        .await
        .unwrap();
    store
        .create(&layout::manifest(&key), manifest(&key, fence, &packed))
        .await
        .unwrap();
    worker.say(Said::BadManifest(report)).await;
    let Heard::ManifestChecked(checked) = worker.hear().await else {
        panic!("expected the answer to the report");
    };
    assert!(!checked.moved, "{}", checked.detail);

    worker.report(lease.clone(), success(&lease)).await;
    assert_eq!(read_trace(&mut jobs).await.unwrap(), text);
    store
        .put(&layout::trace(&key, fence), Bytes::from_static(b"x"))
        .await
        .unwrap();
    let status = read_trace(&mut jobs).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("damaged"), "{status}");
}

#[tokio::test]
async fn the_submitters_trace_context_comes_with_the_grant() {
    const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const OWN: &str = "00-1af7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01";
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let own = job(&format!(
        r#"{{"id":"b","prompt":"x","traceparent":"{OWN}"}}"#
    ));
    let mut request = tonic::Request::new(v1::SubmitChunkRequest {
        batch: "b1".to_owned(),
        chunk: 0,
        jobs: vec![plain("a"), own],
    });
    request
        .metadata_mut()
        .insert("traceparent", CALLER.parse().unwrap());
    jobs.submit_chunk(request).await.unwrap();
    let mut worker = coordinator.worker("w1", 2).await;
    worker.credit(2).await;
    let mut granted = worker.grants(2).await;
    granted.sort_by(|a, b| {
        a.lease
            .as_ref()
            .unwrap()
            .job
            .cmp(&b.lease.as_ref().unwrap().job)
    });
    let contexts: Vec<&str> = granted.iter().map(|g| g.traceparent.as_str()).collect();
    assert_eq!(contexts, [CALLER, OWN]);
}

#[tokio::test]
async fn an_old_stream_is_asked_to_reconnect_and_grants_no_more() {
    let coordinator = Coordinator::start_with(|config| config.session_max_age_s = 1).await;
    let mut worker = coordinator.worker("w1", 1).await;
    assert!(matches!(worker.hear().await, Heard::GoAway(_)));
    let mut again = coordinator.worker("w1", 1).await;
    again.credit(1).await;
    one_job(&coordinator).await;
    assert_eq!(again.grants(1).await.len(), 1);
    // The newer stream of a worker ends the older one.
    worker.end().await.unwrap();
}

#[tokio::test]
async fn grants_that_a_dead_stream_never_sent_go_back_at_once() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let text = "x".repeat(3_800);
    let spec = |i| job(&format!(r#"{{"id":"j{i}","prompt":"{text}"}}"#));
    let specs: Vec<v1::JobSpec> = (0..2_000).map(spec).collect();
    submit(&mut jobs, "b1", 0, specs).await;
    // More than a connection holds on its way, to a worker that reads nothing of it.
    let worker = coordinator.greet(hello("w1", 2_000)).await;
    worker.credit(2_000).await;
    until(&mut jobs, "b1", |counts| counts.leased == 2_000).await;
    drop(worker);
    until(&mut jobs, "b1", |counts| counts.ready > 0).await;
    let mut other = coordinator.worker("w2", 1).await;
    other.credit(1).await;
    other.grants(1).await;
}
