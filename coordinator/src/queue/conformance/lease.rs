//! Leases: grants, renewals, expiry.

use super::*;
use crate::queue::Renewal;
use espalier_core::queue::{DeadReason, JobState, LEASE_REPEAT, RenewReply};

fn renewal(granted: &Granted) -> Renewal {
    Renewal {
        key: granted.grant.key.clone(),
        fence: granted.grant.fence,
        progress: Some("turn 3".into()),
    }
}

pub async fn a_lost_reply_is_repeated_for_a_while(f: Fixture) {
    f.with_jobs(&["a", "b", "c"]).await;
    let ask = |request, worker: &str| {
        let asked = LeaseRequest {
            request,
            ..lease_request(worker, 1)
        };
        f.queue.lease(asked)
    };
    let first = ask(7, "w").await.unwrap();
    f.advance(LEASE_REPEAT - SECOND);
    assert_eq!(
        ask(7, "w").await.unwrap(),
        first,
        "the same grants, with payloads"
    );
    let others = ask(7, "other").await.unwrap();
    assert_ne!(others[0].grant.key, first[0].grant.key);
    f.finish(&first[0], succeeded()).await;
    assert_eq!(
        ask(7, "w").await.unwrap(),
        [],
        "what ended is not granted again"
    );
    f.advance(2 * SECOND);
    let later = ask(7, "w").await.unwrap();
    assert_eq!(later[0].grant.key, key("p/b/c"));
}

pub async fn an_expired_lease_goes_to_another_with_a_greater_fence(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let mut events = f.queue.events();
    let first = f.lease(1).await.remove(0);
    f.advance(JobKind::Rollout.lease_ttl() - SECOND);
    f.tick().await;
    assert_eq!(
        f.state("p/b/a").await,
        StateName::Leased,
        "the deadline decides"
    );
    f.advance(SECOND);
    f.tick().await;
    let job = f.job("p/b/a").await;
    assert_eq!((job.budgets.infra, job.budgets.failures), (1, 0));
    f.advance(2 * SECOND);
    let second = f.lease(1).await.remove(0);
    assert!(second.grant.fence > first.grant.fence);
    assert_eq!(second.grant.attempt, 2);
    let lost = f.queue.renew(vec![renewal(&first)]).await.unwrap();
    assert_eq!(lost, [RenewReply::Lost]);
    assert_eq!(f.finish(&first, succeeded()).await, FinishAck::Stale);
    assert_eq!(f.finish(&second, succeeded()).await, FinishAck::Accepted);
    let of_first = |event: &Event| matches!(event, Event::Revoked { fence, .. } if *fence == first.grant.fence);
    Fixture::event(&mut events, of_first).await;
}

pub async fn a_renewed_lease_holds(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    let granted = f.lease(1).await.remove(0);
    for _ in 0..10 {
        f.advance(20 * SECOND);
        let unknown = Renewal {
            key: key("p/b/nobody"),
            ..renewal(&granted)
        };
        let replies = f
            .queue
            .renew(vec![renewal(&granted), unknown])
            .await
            .unwrap();
        let deadline = f.now() + JobKind::Rollout.lease_ttl();
        let held = RenewReply::Held {
            deadline,
            cancel_requested: false,
        };
        assert_eq!(replies, [held, RenewReply::Lost]);
        f.tick().await;
    }
    let JobState::Leased(lease) = f.job("p/b/a").await.state else {
        panic!("not leased");
    };
    assert_eq!(lease.progress.as_deref(), Some("turn 3"));
    assert_eq!(f.finish(&granted, succeeded()).await, FinishAck::Accepted);
}

pub async fn a_run_too_long_is_a_failure_of_the_handler(f: Fixture) {
    f.open("p", "b").await;
    let slow = NewJob {
        max_runtime: Some(90 * SECOND),
        max_attempts: 1,
        ..new_job("slow")
    };
    f.submit(0, vec![slow]).await;
    let granted = f.lease(1).await.remove(0);
    let end = f.now() + 90 * SECOND;
    assert_eq!(granted.grant.run_until, Some(end));
    f.advance(50 * SECOND);
    let replies = f.queue.renew(vec![renewal(&granted)]).await.unwrap();
    let RenewReply::Held { deadline, .. } = replies[0] else {
        panic!("lost");
    };
    assert_eq!(deadline, end, "no renewal goes beyond it");
    f.advance(40 * SECOND);
    f.tick().await;
    let job = f.job("p/b/slow").await;
    let JobState::Dead { reason, .. } = job.state else {
        panic!("{:?}", job.state);
    };
    assert_eq!(reason, DeadReason::Attempts);
    let error = job.error.unwrap();
    assert_eq!(error.message, "ran longer than `max_runtime`, 90000 ms");
}

pub async fn a_late_finish_counts_until_somebody_reaps(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let granted = f.lease(1).await.remove(0);
    f.advance(3_600 * SECOND);
    assert_eq!(f.finish(&granted, succeeded()).await, FinishAck::Accepted);
}

pub async fn an_outage_is_not_a_mass_expiry(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    let granted = f.lease(2).await;
    f.advance(300 * SECOND);
    f.queue.extend_leases(300 * SECOND).await.unwrap();
    f.tick().await;
    assert_eq!(f.state("p/b/a").await, StateName::Leased);
    let replies = f.queue.renew(granted.iter().map(renewal).collect());
    assert!(!replies.await.unwrap().contains(&RenewReply::Lost));
}

pub async fn a_worker_gets_only_what_it_can_do(f: Fixture) {
    f.open("p", "b").await;
    let with = |id: &str, kind, needs: &[&str]| NewJob {
        kind,
        needs: needs.iter().map(|tag| (*tag).to_owned()).collect(),
        ..new_job(id)
    };
    let jobs = vec![
        with("both", JobKind::Rollout, &["gpu", "mcp:browser"]),
        with("browser", JobKind::Rollout, &["mcp:browser"]),
        with("plain", JobKind::Rollout, &[]),
        with("report", JobKind::Compare, &[]),
    ];
    f.submit(0, jobs).await;
    assert_eq!(f.lease_ids(10).await, ["plain"]);
    let offers = |tags: &[&str], kind| LeaseRequest {
        kind,
        offers: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        ..lease_request("w", 10)
    };
    let got = f.queue.lease(offers(&["mcp:browser"], JobKind::Rollout));
    assert_eq!(got.await.unwrap()[0].grant.key, key("p/b/browser"));
    let got = f.queue.lease(offers(&[], JobKind::Compare));
    assert_eq!(got.await.unwrap()[0].grant.key, key("p/b/report"));
    let got = f
        .queue
        .lease(offers(&["gpu", "mcp:browser", "x"], JobKind::Rollout));
    assert_eq!(got.await.unwrap()[0].grant.key, key("p/b/both"));
}

pub async fn limits_are_refused_by_field(f: Fixture) {
    let too_many = f.queue.lease(lease_request("w", 1_001)).await.unwrap_err();
    assert!(too_many.to_string().contains("`n` must be at most 1000"));
    let too_long = LeaseRequest {
        ttl: Some(7_200 * SECOND),
        ..lease_request("w", 1)
    };
    let too_long = f.queue.lease(too_long).await.unwrap_err();
    assert!(too_long.to_string().contains("`ttl_ms` must be"));
    assert_eq!(f.lease(0).await, []);
}

pub async fn grants_carry_what_was_submitted(f: Fixture) {
    f.open("p", "b").await;
    let job = NewJob {
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        labels: [("split".to_owned(), "train".to_owned())].into(),
        ..new_job("a")
    };
    f.submit(0, vec![job.clone()]).await;
    let submitted_at = f.now();
    f.advance(SECOND);
    let ttl = LeaseRequest {
        ttl: Some(10 * SECOND),
        ..lease_request("w", 1)
    };
    let granted = f.queue.lease(ttl).await.unwrap().remove(0);
    assert_eq!(granted.spec, "spec of a");
    assert_eq!(granted.defaults, "defaults of b");
    let grant = granted.grant;
    assert_eq!(grant.traceparent, job.traceparent);
    assert_eq!(grant.labels, job.labels);
    assert_eq!(
        (grant.submitted_at, grant.ready_since),
        (submitted_at, submitted_at)
    );
    assert_eq!(grant.deadline, f.now() + 10 * SECOND);
    assert_eq!(grant.attempt, 1);
    let spec = f.queue.spec(key("p/b/a")).await.unwrap().unwrap();
    assert_eq!((spec.spec, spec.defaults), (granted.spec, granted.defaults));
}
