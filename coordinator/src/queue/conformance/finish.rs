//! Ends of attempts, budgets, retries.

use super::*;
use espalier_core::queue::{DeadReason, JobState};

pub async fn a_repeated_finish_is_one_finish(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    let granted = f.lease(2).await;
    assert_eq!(
        f.finish(&granted[0], succeeded()).await,
        FinishAck::Accepted
    );
    assert_eq!(
        f.finish(&granted[0], succeeded()).await,
        FinishAck::AlreadyFinished
    );
    let other = failed(ErrorClass::Invalid);
    assert_eq!(
        f.finish(&granted[0], other).await,
        FinishAck::AlreadyFinished
    );
    assert_eq!(f.state("p/b/a").await, StateName::Succeeded);

    let retried = failed(ErrorClass::Handler);
    assert_eq!(
        f.finish(&granted[1], retried.clone()).await,
        FinishAck::Accepted
    );
    assert_eq!(
        f.finish(&granted[1], retried.clone()).await,
        FinishAck::AlreadyFinished
    );
    f.advance(2 * SECOND);
    let second = f.lease(1).await;
    assert_eq!(
        f.finish(&granted[1], retried).await,
        FinishAck::AlreadyFinished
    );
    assert_eq!(f.job("p/b/b").await.budgets.failures, 1, "counted once");
    assert_eq!(f.finish(&second[0], succeeded()).await, FinishAck::Accepted);
}

pub async fn an_old_fence_changes_nothing(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let granted = f.lease(1).await.remove(0);
    for fence in [Fence(0), Fence(granted.grant.fence.0 - 1), Fence(u64::MAX)] {
        let ack = f.finish_as(&granted.grant.key, fence, succeeded()).await;
        assert_eq!(ack, FinishAck::Stale);
    }
    let nobody = key("p/b/nobody");
    let ack = f.finish_as(&nobody, granted.grant.fence, succeeded()).await;
    assert_eq!(ack, FinishAck::Stale);
    assert_eq!(f.state("p/b/a").await, StateName::Leased);
    assert_eq!(f.queue.stats().await.unwrap().stale_fences, 4);
}

/// Lets the one job fail `class` until it is dead; returns how often it ran.
async fn runs_until_dead(f: &Fixture, class: ErrorClass) -> u32 {
    for runs in 1..=100 {
        f.run_one(failed(class)).await;
        match f.job("p/b/a").await.state {
            JobState::Dead { .. } => return runs,
            // The first worker that is lost costs no wait.
            JobState::Ready => assert_eq!((class, runs), (ErrorClass::Infra, 1)),
            JobState::Delayed { until } => f.clock.set(until),
            other => panic!("{other:?}"),
        }
    }
    panic!("never dead")
}

pub async fn handler_failures_spend_attempts(f: Fixture) {
    f.with_jobs(&["a"]).await;
    assert_eq!(runs_until_dead(&f, ErrorClass::Handler).await, 3);
    let job = f.job("p/b/a").await;
    assert!(matches!(
        job.state,
        JobState::Dead {
            reason: DeadReason::Attempts,
            ..
        }
    ));
    assert_eq!((job.budgets.failures, job.budgets.infra), (3, 0));
}

pub async fn infrastructure_failures_spend_another_budget(f: Fixture) {
    f.with_jobs(&["a"]).await;
    assert_eq!(runs_until_dead(&f, ErrorClass::Infra).await, 20);
    let job = f.job("p/b/a").await;
    assert!(matches!(
        job.state,
        JobState::Dead {
            reason: DeadReason::Infra,
            ..
        }
    ));
    assert_eq!((job.budgets.failures, job.budgets.infra), (0, 20));
    let back = f
        .queue
        .requeue_dead(espalier_core::queue::Selector::Job(key("p/b/a")));
    assert_eq!(back.await.unwrap(), 1);
    assert_eq!(
        runs_until_dead(&f, ErrorClass::Handler).await,
        3,
        "fresh budgets"
    );
}

pub async fn invalid_is_dead_at_once_and_keeps_its_error(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    let job = f.job("p/b/a").await;
    assert!(matches!(
        job.state,
        JobState::Dead {
            reason: DeadReason::Invalid,
            ..
        }
    ));
    let error = job.error.unwrap();
    assert_eq!(
        (error.message.as_str(), error.log_tail.as_str()),
        ("it broke", "last line")
    );
    assert_eq!(error.class, ErrorClass::Invalid);
}

pub async fn a_release_spends_nothing(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    for round in 0..30 {
        let granted = f.run_one(Outcome::Released).await;
        assert_eq!(granted.grant.key, key("p/b/a"), "it keeps its place");
        assert_eq!(granted.grant.attempt, 2 * round + 1);
        f.run_one(failed(ErrorClass::Preempted)).await;
    }
    let job = f.job("p/b/a").await;
    assert_eq!((job.budgets.failures, job.budgets.infra), (0, 0));
    assert_eq!(job.error, None);
}

pub async fn a_retry_waits_as_long_as_it_was_told(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.run_one(failed(ErrorClass::Handler)).await;
    let JobState::Delayed { until } = f.job("p/b/a").await.state else {
        panic!("not delayed");
    };
    let wait = until.since(f.now());
    assert!(wait >= SECOND / 2 && wait <= SECOND, "{wait:?}");
    f.clock.set(until);
    let asked = Outcome::Failed {
        class: ErrorClass::Infra,
        message: "429".into(),
        log_tail: String::new(),
        retry_after: Some(77 * SECOND),
    };
    f.run_one(asked).await;
    f.advance(76 * SECOND);
    assert_eq!(f.lease(1).await, []);
    f.advance(SECOND);
    assert_eq!(f.lease_ids(1).await, ["a"]);
}

pub async fn results_come_back(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let result = JobResult {
        summary: Bytes::from_static(b"\x00reward 1"),
        manifest: "p/batches/b/jobs/a/manifest.json".into(),
    };
    let outcome = Outcome::Succeeded {
        result: result.clone(),
        spawn: Vec::new(),
    };
    f.run_one(outcome).await;
    let found = f.queue.job(key("p/b/a")).await.unwrap().unwrap();
    assert_eq!(found.result, Some(result.clone()));
    let page = f.queue.ended_after(project("p"), batch_id("b"), 0, 10);
    assert_eq!(page.await.unwrap().jobs[0].1.result, Some(result));
}

pub async fn one_bad_finish_spoils_no_other(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    let granted = f.lease(2).await;
    let finish = |n: usize, outcome| Finish {
        key: granted[n].grant.key.clone(),
        fence: granted[n].grant.fence,
        outcome,
    };
    let long = Outcome::Succeeded {
        result: JobResult {
            summary: Bytes::from(vec![0; super::super::SUMMARY_BYTES_MAX + 1]),
            manifest: String::new(),
        },
        spawn: Vec::new(),
    };
    let finishes = vec![
        finish(0, long),
        finish(1, succeeded()),
        finish(1, succeeded()),
    ];
    let acks = f.queue.finish(finishes).await.unwrap();
    let FinishAck::Refused(error) = &acks[0] else {
        panic!("{acks:?}");
    };
    assert_eq!(error.field, "summary");
    assert_eq!(acks[1..], [FinishAck::Accepted, FinishAck::AlreadyFinished]);
    assert_eq!(f.state("p/b/a").await, StateName::Leased, "the lease holds");
}
