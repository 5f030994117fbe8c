//! Jobs that wait for jobs, and jobs that bring jobs.

use super::*;
use espalier_core::queue::{DeadReason, JobState, Selector};

fn after(id: &str, deps: &[&str]) -> NewJob {
    NewJob {
        deps: deps.iter().map(|dep| key(dep)).collect(),
        ..new_job(id)
    }
}

fn dependency(job: &JobView) -> bool {
    matches!(
        job.state,
        JobState::Dead {
            reason: DeadReason::Dependency,
            ..
        }
    )
}

pub async fn a_job_waits_for_what_it_needs(f: Fixture) {
    f.open("p", "b").await;
    let late = NewJob {
        not_before: Some(f.now() + 10 * SECOND),
        ..after("late", &["p/b/a"])
    };
    let jobs = vec![
        after("join", &["p/b/a", "p/b/b", "p/b/a"]),
        new_job("a"),
        new_job("b"),
        late,
    ];
    f.submit(0, jobs).await;
    assert_eq!(f.job("p/b/join").await.waits_for, 2);
    f.run_one(succeeded()).await;
    assert_eq!(f.state("p/b/join").await, StateName::Blocked);
    assert_eq!(
        f.state("p/b/late").await,
        StateName::Delayed,
        "then it waits for its moment"
    );
    f.run_one(succeeded()).await;
    assert_eq!(f.lease_ids(5).await, ["join"]);
    f.submit(1, vec![after("more", &["p/b/a"])]).await;
    assert_eq!(
        f.lease_ids(5).await,
        ["more"],
        "what it needs was done already"
    );
}

pub async fn the_end_of_one_is_the_end_of_all_behind_it(f: Fixture) {
    f.open("p", "b").await;
    let jobs = vec![
        new_job("a"),
        after("b", &["p/b/a"]),
        after("c", &["p/b/b"]),
        after("d", &["p/b/c", "p/b/a"]),
    ];
    f.submit(0, jobs).await;
    f.close("p", "b").await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    for id in ["b", "c", "d"] {
        assert!(dependency(&f.job(&format!("p/b/{id}")).await), "{id}");
    }
    assert!(f.batch().await.completed_at.is_some());
}

pub async fn dependencies_reach_across_batches(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.open("p", "next").await;
    let jobs = vec![after("x", &["p/b/a"]), after("y", &["p/next/x"])];
    f.try_submit("p", "next", 0, jobs).await.unwrap();
    assert_eq!(f.state("p/next/x").await, StateName::Blocked);
    f.queue.cancel(Selector::Job(key("p/b/a"))).await.unwrap();
    assert!(dependency(&f.job("p/next/x").await));
    assert!(dependency(&f.job("p/next/y").await));
    f.try_submit("p", "next", 1, vec![after("z", &["p/b/a"])])
        .await
        .unwrap();
    assert!(dependency(&f.job("p/next/z").await), "it could never run");
}

pub async fn cycles_and_missing_ones_are_rejected_alone(f: Fixture) {
    f.open("p", "b").await;
    let jobs = vec![
        after("one", &["p/b/two"]),
        after("two", &["p/b/three"]),
        after("three", &["p/b/one"]),
        after("behind", &["p/b/three"]),
        after("self", &["p/b/self"]),
        after("lost", &["p/b/nobody"]),
        after("after-lost", &["p/b/lost", "p/b/fine"]),
        after("late", &["p/b/fine"]),
        new_job("fine"),
    ];
    let reply = f.submit(0, jobs).await;
    let deps = "deps";
    let wanted = [
        deps, deps, deps, deps, deps, "deps[0]", deps, "accepted", "accepted",
    ];
    assert_eq!(verdicts(&reply), wanted);
    let rule = |n: usize| match &reply.items[n] {
        ItemResult::Rejected(error) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(rule(0).contains("must not depend on itself"), "{}", rule(0));
    assert!(rule(4).contains("must not depend on itself"), "{}", rule(4));
    assert_eq!(
        rule(3),
        "`deps` must not name a job that was rejected, got `three`"
    );
    assert_eq!(
        rule(6),
        "`deps` must not name a job that was rejected, got `lost`"
    );
    assert_eq!(f.batch().await.counters.total(), 2);
    assert_eq!(f.lease_ids(5).await, ["fine"]);
}

pub async fn a_requeue_brings_back_what_died_with_it(f: Fixture) {
    f.open("p", "b").await;
    let jobs = vec![new_job("a"), after("b", &["p/b/a"]), after("c", &["p/b/b"])];
    f.submit(0, jobs).await;
    f.close("p", "b").await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    assert!(f.batch().await.completed_at.is_some());
    let back = f.queue.requeue_dead(Selector::Job(key("p/b/a"))).await;
    assert_eq!(back.unwrap(), 3);
    assert_eq!(f.batch().await.completed_at, None, "it is open work again");
    for id in ["a", "b", "c"] {
        assert_eq!(
            f.run_one(succeeded()).await.grant.key,
            key(&format!("p/b/{id}"))
        );
    }
    assert!(f.batch().await.completed_at.is_some());
    let again = f
        .queue
        .requeue_dead(Selector::Batch(project("p"), batch_id("b")));
    assert_eq!(again.await.unwrap(), 0);
}

pub async fn a_requeue_waits_for_what_stays_dead(f: Fixture) {
    f.open("p", "b").await;
    let jobs = vec![new_job("a"), new_job("b"), after("c", &["p/b/a", "p/b/b"])];
    f.submit(0, jobs).await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    let requeue = |job: &str| f.queue.requeue_dead(Selector::Job(key(job)));
    assert_eq!(requeue("p/b/c").await.unwrap(), 0, "it could never run");
    assert_eq!(requeue("p/b/a").await.unwrap(), 1);
    assert!(
        dependency(&f.job("p/b/c").await),
        "the other one is dead still"
    );
    assert_eq!(requeue("p/b/b").await.unwrap(), 2);
    assert_eq!(f.state("p/b/c").await, StateName::Blocked);
    let unknown = requeue("p/b/nobody").await.unwrap_err();
    assert_eq!(unknown.to_string(), "job p/b/nobody is not known");
}

fn spawning(jobs: Vec<NewJob>) -> Outcome {
    Outcome::Succeeded {
        result: JobResult::default(),
        spawn: jobs.into_iter().map(submission).collect(),
    }
}

pub async fn spawned_jobs_join_with_the_finish(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.close("p", "b").await;
    let outcome = spawning(vec![new_job("s1"), after("s2", &["p/b/s1", "p/b/a"])]);
    let granted = f.lease(1).await.remove(0);
    assert_eq!(
        f.finish(&granted, outcome.clone()).await,
        FinishAck::Accepted
    );
    let batch = f.batch().await;
    assert_eq!((batch.counters.total(), batch.completed_at), (3, None));
    assert_eq!(
        f.finish(&granted, outcome).await,
        FinishAck::AlreadyFinished
    );
    assert_eq!(f.batch().await.counters.total(), 3, "once");
    let first = f.run_one(succeeded()).await;
    assert_eq!(
        (first.grant.key, first.spec),
        (key("p/b/s1"), Bytes::from("spec of s1"))
    );
    assert_eq!(f.run_one(succeeded()).await.grant.key, key("p/b/s2"));
    assert!(f.batch().await.completed_at.is_some());
}

pub async fn a_refused_spawn_changes_nothing(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let granted = f.lease(1).await.remove(0);
    let mut taken = new_job("a");
    taken.spec_digest = [3; 32];
    let ack = f
        .finish(&granted, spawning(vec![new_job("s"), taken]))
        .await;
    let FinishAck::Refused(error) = ack else {
        panic!("{ack:?}");
    };
    assert_eq!(error.field, "spawn[1].id");
    assert_eq!(f.batch().await.counters.total(), 1);
    assert_eq!(
        f.finish(&granted, spawning(vec![new_job("s")])).await,
        FinishAck::Accepted
    );
}
