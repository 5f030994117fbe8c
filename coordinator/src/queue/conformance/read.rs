//! Lists, watching, retention, statistics.

use super::*;
use espalier_core::queue::{BatchSeq, JobFilter};

pub async fn lists_page_by_name(f: Fixture) {
    let ids: Vec<String> = (0..25).map(|n| format!("j{n:02}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    f.with_jobs(&ids).await;
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let filter = JobFilter::default();
        let page = f.queue.jobs(project("p"), batch_id("b"), filter, after, 10);
        let page = page.await.unwrap();
        after = page.last().map(|detail| detail.job.key.job.clone());
        seen.extend(page.iter().map(|detail| detail.job.key.job.to_string()));
        if page.len() < 10 {
            break;
        }
    }
    assert_eq!(seen, ids);
    for batch in ["a2", "a1", "c"] {
        f.open("p", batch).await;
    }
    let names = |after: Option<&str>, limit| {
        let listed = f.queue.batches(project("p"), after.map(batch_id), limit);
        async {
            let listed = listed.await.unwrap();
            let names = listed.iter().map(|batch| batch.batch.to_string());
            names.collect::<Vec<_>>()
        }
    };
    assert_eq!(names(None, 2).await, ["a1", "a2"]);
    assert_eq!(names(Some("a2"), 10).await, ["b", "c"]);
}

pub async fn filters_look_at_state_kind_and_label(f: Fixture) {
    f.open("p", "b").await;
    let labelled = NewJob {
        labels: [("split".to_owned(), "train".to_owned())].into(),
        ..new_job("labelled")
    };
    let compare = NewJob {
        kind: JobKind::Compare,
        ..new_job("report")
    };
    f.submit(0, vec![new_job("a"), labelled, compare]).await;
    f.run_one(succeeded()).await;
    let ids = |filter: JobFilter| {
        let page = f.queue.jobs(project("p"), batch_id("b"), filter, None, 10);
        async {
            let page = page.await.unwrap();
            let ids = page.iter().map(|detail| detail.job.key.job.to_string());
            ids.collect::<Vec<_>>()
        }
    };
    let states = JobFilter {
        states: vec![StateName::Succeeded, StateName::Dead],
        ..JobFilter::default()
    };
    assert_eq!(ids(states).await, ["a"]);
    let kinds = JobFilter {
        kinds: vec![JobKind::Compare],
        ..JobFilter::default()
    };
    assert_eq!(ids(kinds).await, ["report"]);
    let labels = JobFilter {
        labels: [("split".to_owned(), "train".to_owned())].into(),
        ..JobFilter::default()
    };
    assert_eq!(ids(labels).await, ["labelled"]);
    assert_eq!(ids(JobFilter::default()).await, ["a", "labelled", "report"]);
}

pub async fn a_watcher_resumes_after_what_it_saw(f: Fixture) {
    f.with_jobs(&["a", "b", "c", "d"]).await;
    for _ in 0..3 {
        f.run_one(failed(ErrorClass::Invalid)).await;
    }
    let page = |after, limit| {
        f.queue
            .ended_after(project("p"), batch_id("b"), after, limit)
    };
    let first = page(0, 2).await.unwrap();
    let ids = |page: &crate::queue::EndedPage| -> Vec<String> {
        let ids = page
            .jobs
            .iter()
            .map(|(_, detail)| detail.job.key.job.to_string());
        ids.collect()
    };
    assert_eq!(ids(&first), ["a", "b"]);
    let seen = first.jobs[1].0;
    assert_eq!(ids(&page(seen, 10).await.unwrap()), ["c"]);
    let which = espalier_core::queue::Selector::Job(key("p/b/a"));
    f.queue.requeue_dead(which).await.unwrap();
    f.run_one(succeeded()).await;
    let rest = page(seen, 10).await.unwrap();
    assert_eq!(ids(&rest), ["c", "a"], "what ended anew comes anew");
    assert_eq!(rest.batch.last_end, rest.jobs[1].0);
    assert!(page(rest.batch.last_end, 10).await.unwrap().jobs.is_empty());
}

pub async fn complete_batches_are_purged_and_no_others(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.open("p", "next").await;
    let behind = NewJob {
        deps: vec![key("p/b/a")],
        ..new_job("x")
    };
    f.try_submit("p", "next", 0, vec![behind]).await.unwrap();
    f.run_one(succeeded()).await;
    f.close("p", "b").await;
    f.advance(10 * SECOND);
    let purge = |age| f.queue.purge(age, 10);
    assert_eq!(purge(11 * SECOND).await.unwrap(), []);
    let gone = purge(10 * SECOND).await.unwrap();
    assert_eq!(gone, [(project("p"), batch_id("b"))]);
    assert_eq!(purge(Duration::ZERO).await.unwrap(), []);
    assert_eq!(f.queue.job(key("p/b/a")).await.unwrap(), None);
    assert_eq!(f.queue.spec(key("p/b/a")).await.unwrap(), None);
    assert_eq!(f.run_one(succeeded()).await.grant.key, key("p/next/x"));
    f.with_jobs(&["a"]).await;
    assert_eq!(
        f.state("p/b/a").await,
        StateName::Ready,
        "a new batch of that name"
    );
}

pub async fn statistics_count_by_project_and_kind(f: Fixture) {
    f.with_jobs(&["a", "b", "c"]).await;
    f.open("other", "b").await;
    let compare = NewJob {
        kind: JobKind::Compare,
        ..new_job("r")
    };
    f.try_submit("other", "b", 0, vec![compare]).await.unwrap();
    f.lease(1).await;
    f.advance(5 * SECOND);
    let stats = f.queue.stats().await.unwrap();
    assert_eq!(stats.batches_open, 2);
    let lines: Vec<_> = stats
        .lines
        .iter()
        .map(|line| {
            let ready = line.counters.get(StateName::Ready);
            (line.project.as_str(), line.kind, ready, line.oldest_ready)
        })
        .collect();
    let five = Some(5 * SECOND);
    let wanted = [
        ("other", JobKind::Compare, 1, five),
        ("p", JobKind::Rollout, 2, five),
    ];
    assert_eq!(lines, wanted);
    f.advance(60 * SECOND);
    f.tick().await;
    assert_eq!(f.queue.stats().await.unwrap().expired_leases, 1);
}

pub async fn delayed_jobs_are_told_by_kind_when_they_are_due_soon(f: Fixture) {
    f.open("p", "b").await;
    let in_s = |id: &str, kind, seconds| NewJob {
        not_before: Some(f.now() + seconds * SECOND),
        kind,
        ..new_job(id)
    };
    let jobs = vec![
        in_s("a", JobKind::Rollout, 10),
        in_s("b", JobKind::Rollout, 60),
        in_s("c", JobKind::Train, 60),
        in_s("d", JobKind::Export, 61),
        new_job("ready"),
    ];
    f.submit(0, jobs).await;
    let due = async |seconds| f.queue.due_soon(seconds * SECOND).await.unwrap();
    assert_eq!(due(9).await, [].into());
    assert_eq!(due(10).await, [(JobKind::Rollout, 1)].into());
    let both = [(JobKind::Rollout, 2), (JobKind::Train, 1)];
    assert_eq!(due(60).await, both.into());
    f.advance(10 * SECOND);
    f.tick().await;
    let later = [(JobKind::Rollout, 1), (JobKind::Train, 1)];
    assert_eq!(due(50).await, later.into(), "what is ready waits no more");
}

pub async fn what_is_unknown_is_none(f: Fixture) {
    assert_eq!(f.queue.job(key("p/b/a")).await.unwrap(), None);
    assert_eq!(f.queue.spec(key("p/b/a")).await.unwrap(), None);
    let batch = || (project("p"), batch_id("b"));
    let (p, b) = batch();
    assert_eq!(f.queue.batch(p, b).await.unwrap(), None);
    let (p, b) = batch();
    assert_eq!(f.queue.defaults(p, b).await.unwrap(), None);
    let (p, b) = batch();
    assert_eq!(f.queue.intake(p, b, 0).await.unwrap(), None);
    let (p, b) = batch();
    let list = f.queue.jobs(p, b, JobFilter::default(), None, 10).await;
    assert_eq!(list.unwrap_err().to_string(), "batch p/b is not known");
    let batches = f.queue.batches(project("p"), None, 10).await.unwrap();
    assert_eq!(batches, []);
}

pub async fn the_newest_batches_come_first_and_page_by_number(f: Fixture) {
    for name in ["m", "a", "z", "k"] {
        f.open("p", name).await;
    }
    f.open("other", "o").await;
    let page = async |before: Option<BatchSeq>, limit: usize| {
        let found = f.queue.batches_newest(project("p"), before, limit).await;
        let found = found.unwrap();
        let names = found.iter().map(|batch| batch.batch.to_string());
        (
            names.collect::<Vec<_>>(),
            found.last().map(|batch| batch.seq),
        )
    };
    let (first, last) = page(None, 2).await;
    assert_eq!(first, ["k", "z"]);
    let (second, last) = page(last, 2).await;
    assert_eq!(second, ["a", "m"]);
    assert_eq!(page(last, 2).await, (Vec::new(), None));

    f.close("p", "z").await;
    f.advance(10 * SECOND);
    f.queue.purge(SECOND, 10).await.unwrap();
    let (left, _) = page(None, 10).await;
    assert_eq!(left, ["k", "a", "m"], "what was forgotten is not there");
    let nobody = f.queue.batches_newest(project("nobody"), None, 10).await;
    assert!(nobody.unwrap().is_empty());
}
