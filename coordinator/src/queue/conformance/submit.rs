//! Batches and chunks.

use super::*;
use espalier_core::queue::{MachineConfig, NEEDS_MAX, PROJECT_LANES_MAX, Refusal, Selector};

pub async fn a_chunk_again_has_no_second_effect(f: Fixture) {
    f.open("p", "b").await;
    let jobs = || {
        let mut bad = new_job("bad");
        bad.priority = 10;
        vec![new_job("a"), bad, new_job("c"), new_job("a")]
    };
    let first = f.submit(0, jobs()).await;
    assert_eq!(verdicts(&first), ["accepted", "priority", "accepted", "id"]);
    assert!(!first.repeated);
    let again = f.submit(0, jobs()).await;
    assert!(again.repeated);
    assert_eq!(verdicts(&again), ["there", "priority", "there", "id"]);
    assert_eq!(f.batch().await.counters.total(), 2);
    let other = f.try_submit("p", "b", 0, vec![new_job("z")]).await;
    let error = other.unwrap_err().to_string();
    assert!(error.contains("`chunk` was submitted before"), "{error}");
}

pub async fn a_chunk_again_is_judged_by_what_the_caller_lets_through(f: Fixture) {
    f.open("p", "b").await;
    let send = async |ids: &[&str]| {
        let jobs: Vec<NewJob> = ids.iter().map(|id| new_job(id)).collect();
        let chunk = Chunk {
            project: project("p"),
            batch: batch_id("b"),
            n: 3,
            digest: [5; 32],
            jobs: jobs.into_iter().map(submission).collect(),
        };
        f.queue.submit(chunk).await.unwrap()
    };
    let known = || f.queue.chunk_digest(project("p"), batch_id("b"), 3);
    assert!(send(&[]).await.items.is_empty());
    assert_eq!(known().await.unwrap(), None, "nothing of it is there");
    assert_eq!(verdicts(&send(&["a", "b"]).await), ["accepted"; 2]);
    assert_eq!(known().await.unwrap(), Some([5; 32]));
    assert_eq!(verdicts(&send(&["b"]).await), ["there"]);
    let more = send(&["a", "b", "c"]).await;
    assert_eq!(verdicts(&more), ["there", "there", "accepted"]);
    f.close("p", "b").await;
    let late = send(&["a", "d"]).await;
    assert_eq!(verdicts(&late), ["there", "batch"]);
    assert_eq!(f.batch().await.counters.total(), 3);
}

pub async fn what_was_rejected_may_come_in_when_the_reason_has_gone(f: Fixture) {
    f.open("p", "b").await;
    let jobs = || {
        let mut late = new_job("late");
        late.deps = vec![key("p/b/first")];
        vec![new_job("a"), late]
    };
    assert_eq!(
        verdicts(&f.submit(0, jobs()).await),
        ["accepted", "deps[0]"]
    );
    f.submit(1, vec![new_job("first")]).await;
    assert_eq!(verdicts(&f.submit(0, jobs()).await), ["there", "accepted"]);
}

pub async fn a_job_again_is_the_same_job(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let mut other = new_job("a");
    other.spec_digest = [2; 32];
    assert_eq!(verdicts(&f.submit(1, vec![new_job("a")]).await), ["there"]);
    assert_eq!(verdicts(&f.submit(2, vec![other]).await), ["id"]);
    f.run_one(succeeded()).await;
    assert_eq!(verdicts(&f.submit(3, vec![new_job("a")]).await), ["there"]);
    assert_eq!(f.state("p/b/a").await, StateName::Succeeded);
    assert_eq!(f.lease(5).await, []);
}

pub async fn each_job_is_judged_alone(f: Fixture) {
    f.open("p", "b").await;
    let bad = |change: fn(&mut NewJob)| {
        let mut job = new_job("bad");
        change(&mut job);
        job
    };
    let cases: Vec<(&str, NewJob)> = vec![
        ("priority", bad(|job| job.priority = 10)),
        ("max_attempts", bad(|job| job.max_attempts = 0)),
        ("max_infra", bad(|job| job.max_infra = 0)),
        (
            "max_runtime",
            bad(|job| job.max_runtime = Some(Duration::ZERO)),
        ),
        ("needs", bad(|job| job.needs = ["a\nb".to_owned()].into())),
        (
            "needs",
            bad(|job| job.needs = (0..=NEEDS_MAX).map(|n| n.to_string()).collect()),
        ),
        (
            "labels",
            bad(|job| job.labels = [(String::new(), String::new())].into()),
        ),
        (
            "labels.k",
            bad(|job| job.labels = [("k".to_owned(), "v".repeat(257))].into()),
        ),
        (
            "traceparent",
            bad(|job| job.traceparent = Some("0".repeat(500))),
        ),
        ("deps[0]", bad(|job| job.deps = vec![key("p/b/nobody")])),
        ("deps[0]", bad(|job| job.deps = vec![key("other/b/good")])),
    ];
    for (n, (field, job)) in cases.into_iter().enumerate() {
        let n = n as u32;
        let good = new_job(&format!("good-{n}"));
        let reply = f.submit(n, vec![job, good]).await;
        assert_eq!(verdicts(&reply), [field, "accepted"]);
    }
    let long = Submission {
        job: new_job("long"),
        spec: Bytes::from(vec![0; super::super::SPEC_BYTES_MAX + 1]),
    };
    let chunk = Chunk {
        project: project("p"),
        batch: batch_id("b"),
        n: 100,
        digest: [0; 32],
        jobs: vec![long],
    };
    let error = f.queue.submit(chunk).await.unwrap_err();
    assert!(
        error.to_string().contains("`jobs[0].spec` must have"),
        "{error}"
    );
}

pub async fn a_batch_again_is_the_same_batch(f: Fixture) {
    let first = f.open("p", "b").await;
    f.submit(0, vec![new_job("a")]).await;
    f.advance(SECOND);
    let again = f.open("p", "b").await;
    assert_eq!(again.opened_at, first.opened_at);
    assert_eq!(again.counters.total(), 1);
    let other = OpenBatch {
        batch: NewBatch {
            project: project("p"),
            batch: batch_id("b"),
            params_digest: [8; 32],
        },
        defaults: Bytes::from("others"),
    };
    let refused = f.queue.open_batch(other).await;
    assert!(matches!(refused, Err(QueueError::Refused(_))));
    let kept = f.queue.defaults(project("p"), batch_id("b")).await.unwrap();
    assert_eq!(kept.unwrap(), "defaults of b");
}

pub async fn a_closed_batch_refuses_new_chunks_only(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.close("p", "b").await;
    let again = f.submit(0, vec![new_job("a")]).await;
    assert!(again.repeated);
    let new = f.try_submit("p", "b", 1, vec![new_job("z")]).await;
    let error = new.unwrap_err().to_string();
    assert_eq!(error, "batch p/b is closed");
    let unknown = f.try_submit("p", "nobody", 0, vec![new_job("z")]).await;
    let error = unknown.unwrap_err().to_string();
    assert_eq!(error, "batch p/nobody is not known");
}

pub async fn a_batch_is_complete_when_closed_and_done(f: Fixture) {
    f.with_jobs(&["a", "b", "c"]).await;
    f.run_one(succeeded()).await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    f.close("p", "b").await;
    assert_eq!(f.batch().await.completed_at, None);
    f.advance(SECOND);
    f.run_one(succeeded()).await;
    let batch = f.batch().await;
    assert_eq!(batch.completed_at, Some(f.now()));
    assert_eq!(batch.counters.get(StateName::Succeeded), 2);
    assert_eq!(batch.counters.get(StateName::Dead), 1);
    f.open("p", "empty").await;
    assert!(f.close("p", "empty").await.completed_at.is_some());
}

pub async fn needs_that_one_project_makes_up_take_no_room_of_others(f: Fixture) {
    let needing = |n: usize| {
        let mut job = new_job(&format!("j{n}"));
        job.needs = [format!("made-up-{n}")].into();
        job
    };
    f.open("p", "b").await;
    f.open("other", "b").await;
    let many = (0..PROJECT_LANES_MAX).map(needing).collect();
    let reply = f.submit(0, many).await;
    assert!(reply.items.iter().all(|item| *item == ItemResult::Accepted));

    let mut known = new_job("known");
    known.needs = needing(0).needs;
    let more = vec![
        needing(PROJECT_LANES_MAX),
        known,
        new_job("plain"),
        needing(PROJECT_LANES_MAX + 1),
    ];
    let reply = f.submit(1, more).await;
    assert_eq!(
        verdicts(&reply),
        ["needs", "accepted", "accepted", "needs"],
        "what is there already takes no more room"
    );
    let ItemResult::Rejected(error) = &reply.items[0] else {
        panic!("{reply:?}");
    };
    assert!(
        error.to_string().contains("a project has at most 256"),
        "{error}"
    );
    let others = vec![needing(PROJECT_LANES_MAX), needing(0)];
    let reply = f.try_submit("other", "b", 0, others).await.unwrap();
    assert_eq!(verdicts(&reply), ["accepted", "accepted"]);

    f.open("p", "next").await;
    let all = Selector::Batch(project("p"), batch_id("b"));
    f.queue.cancel(all).await.unwrap();
    f.advance(10 * SECOND);
    let gone = f.queue.purge(SECOND, 10).await.unwrap();
    assert_eq!(gone, [(project("p"), batch_id("b"))]);
    let later = vec![needing(PROJECT_LANES_MAX), needing(0)];
    let reply = f.try_submit("p", "next", 0, later).await.unwrap();
    assert_eq!(verdicts(&reply), ["accepted", "accepted"]);
}

pub async fn a_project_has_so_many_open_batches_until_idle_ones_are_closed(f: Fixture) {
    let most = MachineConfig::OPEN_BATCHES_MAX_DEFAULT;
    let request = |project_name: &str, n: usize| OpenBatch {
        batch: NewBatch {
            project: project(project_name),
            batch: batch_id(&format!("b{n}")),
            params_digest: [9; 32],
        },
        defaults: Bytes::new(),
    };
    for n in 0..most {
        f.queue.open_batch(request("p", n)).await.unwrap();
    }
    let jobs = vec![new_job("waits")];
    f.try_submit("p", "b0", 0, jobs).await.unwrap();
    let full = f.queue.open_batch(request("p", most)).await.unwrap_err();
    let expected = QueueError::Refused(Refusal::TooManyOpenBatches {
        project: project("p"),
        max: most,
    });
    assert_eq!(full.to_string(), expected.to_string());
    f.queue.open_batch(request("p", 3)).await.unwrap();
    f.queue.open_batch(request("other", 0)).await.unwrap();
    f.close("p", "b1").await;
    f.close("p", "b1").await;
    f.queue.open_batch(request("p", most)).await.unwrap();
    f.queue
        .open_batch(request("p", most + 1))
        .await
        .unwrap_err();

    f.advance(10 * SECOND);
    let none = f.queue.close_idle(20 * SECOND, 10).await.unwrap();
    assert_eq!(none, []);
    let some = f.queue.close_idle(5 * SECOND, 2).await.unwrap();
    let names = ["b2", "b3"].map(|name| (project("p"), batch_id(name)));
    assert_eq!(some, names, "b0 has a job that waits");
    f.queue.close_idle(5 * SECOND, 1_000).await.unwrap();
    let found = f.queue.batch(project("p"), batch_id("b0")).await.unwrap();
    assert!(!found.unwrap().closed);
    let found = f.queue.batch(project("p"), batch_id("b5")).await.unwrap();
    let found = found.unwrap();
    assert!(found.closed && !found.cancelled && found.completed_at.is_some());
    f.queue.open_batch(request("p", most + 1)).await.unwrap();
}
