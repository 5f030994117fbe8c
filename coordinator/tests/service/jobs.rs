//! Submitting, reading and steering jobs; every refusal at the door.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::Fence;
use espalier_core::layout;
use espalier_core::time::Timestamp;
use espalier_core::trace::sha256_hex;
use espalier_proto::v1;
use espalier_runtime::clock::ManualClock;
use prost::Message;
use tonic::Code;

use crate::support::*;

fn rejected(answer: &v1::SubmitChunkResponse) -> Vec<(u32, Vec<&str>)> {
    let one = |r: &'_ v1::Rejection| r.index;
    answer
        .rejected
        .iter()
        .map(|r| (one(r), r.errors.iter().map(|e| e.field.as_str()).collect()))
        .collect()
}

#[tokio::test]
async fn bad_jobs_are_refused_by_field_and_the_rest_is_taken() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let lines = [
        r#"{"id":"good","prompt":"x"}"#,
        r#"{"prompt":" "}"#,
        r#"{"prompt":"x","limits":{"turns":-1},"priority":10}"#,
        r#"{"prompt":"x","mcp":["nobody"]}"#,
        r#"{"prompt":"x","mcp":[{"name":"sh","server":{"command":"sh"}}]}"#,
        r#"{"prompt":"x","verify":{"answer":{"regex":"("}}}"#,
        r#"{"prompt":"x","verify":{"answer":{"json_path":"$["}}}"#,
        r#"{"id":"../x","prompt":"x"}"#,
        r#"{"id":"good","prompt":"y"}"#,
        r#"{"id":"lonely","prompt":"x","after":["missing"]}"#,
        r#"{"id":"ring1","prompt":"x","after":["ring2"]}"#,
        r#"{"id":"ring2","prompt":"x","after":["ring1"]}"#,
        r#"{"id":"last","prompt":"x"}"#,
    ];
    let mut specs: Vec<v1::JobSpec> = lines.into_iter().map(job).collect();
    let huge = "x".repeat(10 << 20);
    specs.push(job(&format!(r#"{{"prompt":"{huge}"}}"#)));
    let answer = submit(&mut jobs, "b1", 0, specs).await;
    assert_eq!(answer.accepted, 2);
    let rejected = rejected(&answer);
    let fields = |index: u32| -> Vec<&str> {
        let found = rejected.iter().find(|(i, _)| *i == index);
        found.map(|(_, fields)| fields.clone()).unwrap_or_default()
    };
    assert_eq!(rejected.len(), 12, "{rejected:?}");
    assert_eq!(fields(1), ["prompt"]);
    assert_eq!(fields(2), ["priority", "limits.turns"]);
    assert_eq!(fields(3), ["mcp[0]"]);
    assert_eq!(fields(4), ["mcp[0].server"]);
    assert_eq!(fields(5), ["verify.answer.regex"]);
    assert_eq!(fields(6), ["verify.answer.json_path"]);
    assert_eq!(fields(7), ["id"]);
    assert_eq!(fields(8), ["id"]);
    for dependency in [9, 10, 11] {
        assert!(fields(dependency)[0].starts_with("after"), "{rejected:?}");
    }
    assert_eq!(fields(13), ["spec"]);
    let unknown = &answer
        .rejected
        .iter()
        .find(|r| r.index == 3)
        .unwrap()
        .errors[0];
    assert_eq!(unknown.value, "nobody");
    assert_eq!(unknown.rule, "must be a configured MCP server: browser");
}

#[tokio::test]
async fn sending_again_changes_nothing() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    let opened = open(&mut jobs, "b1").await;
    assert_eq!(open(&mut jobs, "b1").await, opened);
    let unnamed = || vec![job(r#"{"prompt":"x"}"#), job(r#"{"prompt":"y"}"#)];
    let first = submit(&mut jobs, "b1", 7, unnamed()).await;
    assert_eq!((first.accepted, first.rejected.len()), (2, 0));
    assert_eq!(submit(&mut jobs, "b1", 7, unnamed()).await, first);
    assert_eq!(
        get_job(&mut jobs, "b1", "c7-0001").await.state(),
        v1::JobState::Ready
    );

    // The same job in another chunk, and another job under a number that is taken.
    let same = vec![plain("j")];
    assert_eq!(submit(&mut jobs, "b1", 8, same.clone()).await.accepted, 1);
    assert_eq!(submit(&mut jobs, "b1", 9, same).await.accepted, 1);
    let request = v1::SubmitChunkRequest {
        batch: "b1".to_owned(),
        chunk: 8,
        jobs: vec![plain("k")],
    };
    let status = jobs.submit_chunk(request).await.unwrap_err();
    assert_eq!(
        (status.code(), field(&status)),
        (Code::InvalidArgument, "chunk".to_owned())
    );

    let closed = v1::CloseBatchRequest {
        batch: "b1".to_owned(),
    };
    for _ in 0..2 {
        let answer = jobs.close_batch(closed.clone()).await.unwrap();
        assert!(answer.into_inner().batch.unwrap().closed);
    }
    // A resend whose answer was lost finds it even now; a new chunk does not get in.
    assert_eq!(submit(&mut jobs, "b1", 7, unnamed()).await, first);
    let late = v1::SubmitChunkRequest {
        batch: "b1".to_owned(),
        chunk: 10,
        jobs: vec![plain("late")],
    };
    let status = jobs.submit_chunk(late).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_chunk_again_is_accepted_before_its_workers_are_back() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let mut announces = hello("w1", 1);
    announces.tags.push("mcp:shell".to_owned());
    let worker = coordinator.greet(announces).await;
    let shell = |id: &str| job(&format!(r#"{{"id":"{id}","prompt":"x","mcp":["shell"]}}"#));
    let unknown = || job(r#"{"id":"u","prompt":"x","mcp":["nobody"]}"#);
    let chunk = || vec![shell("a"), unknown(), plain("b"), plain("a")];
    let first = submit(&mut jobs, "b1", 0, chunk()).await;
    assert_eq!(first.accepted, 2);
    assert_eq!(rejected(&first), [(1, vec!["mcp[0]"]), (3, vec!["id"])]);
    drop(worker);

    let coordinator = coordinator.restart().await;
    let mut jobs = coordinator.jobs(SHOP);
    let again = submit(&mut jobs, "b1", 0, chunk()).await;
    assert_eq!(again.accepted, 2);
    assert_eq!(rejected(&again), rejected(&first));
    let fresh = submit(&mut jobs, "b1", 1, vec![shell("z")]).await;
    assert_eq!(rejected(&fresh), [(0, vec!["mcp[0]"])]);
}

#[tokio::test]
async fn a_batch_is_opened_with_valid_defaults_and_kept_with_them() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    let request = |batch: &str, defaults: &str| v1::OpenBatchRequest {
        batch: batch.to_owned(),
        defaults: Some(job(defaults)),
    };
    for (batch, defaults, expected) in [
        ("a/b", "{}", "batch"),
        ("", "{}", "batch"),
        ("b1", r#"{"limits":{"turns":0}}"#, "defaults.limits.turns"),
        ("b1", r#"{"id":"x"}"#, "defaults.id"),
    ] {
        let status = jobs.open_batch(request(batch, defaults)).await.unwrap_err();
        assert_eq!(field(&status), expected);
    }
    let good = request("b1", r#"{"mcp":["browser"],"hints":"h"}"#);
    jobs.open_batch(good.clone()).await.unwrap();
    jobs.open_batch(good).await.unwrap();
    let other = jobs.open_batch(request("b1", "{}")).await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument);

    let answer = submit(&mut jobs, "b1", 0, vec![job(r#"{"id":"j","prompt":"x"}"#)]).await;
    assert_eq!(answer.accepted, 1);
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let grant = worker.grants(1).await.remove(0);
    let rollout = v1::JobSpec::decode(grant.spec).unwrap().rollout.unwrap();
    assert_eq!(rollout.mcp[0].name, "browser");
    assert_eq!(
        (rollout.hints.as_deref(), &rollout.prompts[0][..]),
        (Some("h"), "x")
    );
}

#[tokio::test]
async fn a_large_spec_is_granted_by_reference() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let long = "x".repeat(100_000);
    let spec = job(&format!(r#"{{"prompt":"{long}"}}"#));
    submit(&mut jobs, "b1", 0, vec![spec]).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let grant = worker.grants(1).await.remove(0);
    assert!(grant.spec.is_empty());
    let content = coordinator.store.get(&grant.spec_path).await.unwrap();
    assert!(grant.spec_path.ends_with(&sha256_hex(&content)));
    let rollout = v1::JobSpec::decode(content).unwrap().rollout.unwrap();
    assert_eq!(rollout.prompts, [long]);
}

#[tokio::test]
async fn a_chunk_has_bounds_and_a_project_too() {
    let coordinator = Coordinator::start_with(|config| config.jobs_waiting_max = 3).await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let request = |jobs: Vec<v1::JobSpec>| v1::SubmitChunkRequest {
        batch: "b1".to_owned(),
        chunk: 0,
        jobs,
    };
    let none = jobs.submit_chunk(request(Vec::new())).await.unwrap_err();
    assert_eq!(field(&none), "jobs");
    let many = request(vec![plain("a"); 2_001]);
    assert_eq!(field(&jobs.submit_chunk(many).await.unwrap_err()), "jobs");
    let line = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(250 * 1024));
    let heavy = request(vec![job(&line); 40]);
    assert_eq!(field(&jobs.submit_chunk(heavy).await.unwrap_err()), "jobs");

    let four = request(["a", "b", "c", "d"].map(plain).to_vec());
    let status = jobs.submit_chunk(four).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("jobs_waiting_max"), "{status}");
    let three = ["a", "b", "c"].map(plain).to_vec();
    assert_eq!(submit(&mut jobs, "b1", 0, three.clone()).await.accepted, 3);
    let again = submit(&mut jobs, "b1", 0, three).await;
    assert_eq!(again.accepted, 3, "what is there needs no room");
}

#[tokio::test]
async fn pages_of_batches_add_up() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    for batch in ["z", "a", "m"] {
        open(&mut jobs, batch).await;
    }
    let first = jobs.list_batches(batches_after(String::new())).await;
    let first = first.unwrap().into_inner();
    let second = jobs
        .list_batches(batches_after(first.next_page_token))
        .await;
    let second = second.unwrap().into_inner();
    let names = [first.batches, second.batches].concat();
    let names: Vec<&str> = names.iter().map(|b| b.batch.as_str()).collect();
    assert_eq!(names, ["m", "a", "z"], "newest first");
    assert!(second.next_page_token.is_empty());
}

fn batches_after(page_token: String) -> v1::ListBatchesRequest {
    v1::ListBatchesRequest {
        page_size: 2,
        page_token,
    }
}

/// Opens batch `a` with five jobs, of which every other one is even.
async fn open_with_five(jobs: &mut Jobs) {
    open(jobs, "a").await;
    let line = |i| {
        let even = i % 2 == 0;
        format!(r#"{{"id":"j{i}","prompt":"x","labels":{{"even":"{even}"}}}}"#)
    };
    let specs: Vec<v1::JobSpec> = (0..5).map(|i| job(&line(i))).collect();
    submit(jobs, "a", 0, specs).await;
}

fn even_ready_jobs_after(page_token: &str) -> v1::ListJobsRequest {
    v1::ListJobsRequest {
        batch: "a".to_owned(),
        states: vec![v1::JobState::Ready.into()],
        labels: [("even".to_owned(), "true".to_owned())].into(),
        page_size: 2,
        page_token: page_token.to_owned(),
    }
}

#[tokio::test]
async fn pages_of_jobs_add_up_and_their_tokens_stay_at_home() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open_with_five(&mut jobs).await;
    open(&mut jobs, "m").await;
    open(&mut jobs, "z").await;
    let list = even_ready_jobs_after;
    let one = jobs.list_jobs(list("")).await.unwrap().into_inner();
    let two = jobs.list_jobs(list(&one.next_page_token)).await;
    let two = two.unwrap().into_inner();
    let ids: Vec<&str> = one
        .jobs
        .iter()
        .chain(&two.jobs)
        .map(|j| j.id.as_str())
        .collect();
    assert_eq!(ids, ["j0", "j2", "j4"]);

    let token = one.next_page_token;
    let of_batches = jobs.list_batches(batches_after(String::new())).await;
    let of_batches = of_batches.unwrap().into_inner().next_page_token;
    let mut other_filter = list(&token);
    other_filter.labels.clear();
    let mut other_batch = list(&token);
    other_batch.batch = "m".to_owned();
    let tampered = list(&format!("{token}0"));
    for request in [other_filter, other_batch, tampered, list(&of_batches)] {
        let status = jobs.list_jobs(request).await.unwrap_err();
        assert_eq!(field(&status), "page_token");
    }
    let mut bank = coordinator.jobs(BANK);
    open(&mut bank, "a").await;
    let status = bank.list_jobs(list(&token)).await.unwrap_err();
    assert_eq!(field(&status), "page_token");
}

#[tokio::test]
async fn lists_of_unknown_states_and_of_too_many_are_refused() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "a").await;
    let mut unknown_state = even_ready_jobs_after("");
    unknown_state.states = vec![99];
    let status = jobs.list_jobs(unknown_state).await.unwrap_err();
    assert_eq!(field(&status), "states[0]");
    let mut too_many = even_ready_jobs_after("");
    too_many.page_size = 1_001;
    let status = jobs.list_jobs(too_many).await.unwrap_err();
    assert_eq!(field(&status), "page_size");
}

#[tokio::test]
async fn dead_jobs_come_back_when_asked() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    submit(&mut jobs, "b1", 0, vec![plain("j")]).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    let error = v1::JobError {
        class: v1::ErrorClass::Invalid.into(),
        message: "no such page".to_owned(),
        log_tail: "log".to_owned(),
    };
    let failure = v1::Failure {
        error: Some(error.clone()),
        retry_after_ms: 0,
    };
    worker
        .report(lease, v1::result::Outcome::Failure(failure))
        .await;
    let dead = get_job(&mut jobs, "b1", "j").await;
    assert_eq!(
        (dead.state(), dead.last_error),
        (v1::JobState::Dead, Some(error))
    );

    let trace = v1::GetTraceRequest {
        batch: "b1".to_owned(),
        id: "j".to_owned(),
    };
    let status = jobs.get_trace(trace).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);

    let retry = |ids: &[&str]| v1::RetryRequest {
        batch: "b1".to_owned(),
        ids: ids.iter().map(|id| (*id).to_owned()).collect(),
    };
    let unknown = jobs.retry(retry(&["x"])).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert_eq!(
        jobs.retry(retry(&["j"])).await.unwrap().get_ref().requeued,
        1
    );
    assert_eq!(jobs.retry(retry(&[])).await.unwrap().get_ref().requeued, 0);
    worker.credit(1).await;
    assert_eq!(worker.grants(1).await[0].attempt, 2);
}

#[tokio::test]
async fn waiting_jobs_are_cancelled_by_job_label_and_batch() {
    use v1::cancel_request::Target;
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    let labelled = job(r#"{"id":"l","prompt":"x","labels":{"run":"7"},"priority":9}"#);
    submit(&mut jobs, "b1", 0, vec![plain("a"), labelled, plain("b")]).await;
    let seen = get_job(&mut jobs, "b1", "l").await;
    assert_eq!((seen.kind(), seen.priority), (v1::JobKind::Rollout, 9));
    assert!(seen.needs.is_empty());
    assert_eq!(get_job(&mut jobs, "b1", "a").await.needs, ["mcp:browser"]);
    let job_ref = v1::JobRef {
        batch: "b1".to_owned(),
        id: "a".to_owned(),
    };
    let label = v1::Label {
        name: "run".to_owned(),
        value: "7".to_owned(),
    };
    for target in [
        Target::Job(job_ref),
        Target::Label(label),
        Target::Batch("b1".to_owned()),
    ] {
        let target = Some(target);
        let answer = jobs.cancel(v1::CancelRequest { target }).await.unwrap();
        assert_eq!(answer.get_ref().cancelled, 1);
    }
    let batch = "b1".to_owned();
    let batch = jobs.get_batch(v1::GetBatchRequest { batch }).await.unwrap();
    assert!(batch.get_ref().complete && batch.get_ref().cancelled);
    assert!(batch.get_ref().completed_at_us >= batch.get_ref().created_at_us);
    assert_eq!(batch.get_ref().counts.unwrap().cancelled, 3);
    let nothing = jobs.cancel(v1::CancelRequest { target: None }).await;
    assert_eq!(field(&nothing.unwrap_err()), "target");
}

#[tokio::test]
async fn a_restart_forgets_nothing_that_was_acknowledged() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    let defaults = Some(job(r#"{"mcp":["browser"],"system":"s"}"#));
    let batch = "b1".to_owned();
    jobs.open_batch(v1::OpenBatchRequest { batch, defaults })
        .await
        .unwrap();
    let specs = || vec![job(r#"{"prompt":"x"}"#), job(r#"{"prompt":""}"#)];
    let first = submit(&mut jobs, "b1", 0, specs()).await;
    assert_eq!((first.accepted, first.rejected.len()), (1, 1));

    let coordinator = coordinator.restart().await;
    let mut jobs = coordinator.jobs(SHOP);
    assert_eq!(submit(&mut jobs, "b1", 0, specs()).await, first);
    let more = submit(&mut jobs, "b1", 1, vec![job(r#"{"prompt":"y"}"#)]).await;
    assert_eq!(more.accepted, 1);
    let mut worker = coordinator.worker("w1", 2).await;
    worker.credit(2).await;
    for grant in worker.grants(2).await {
        let rollout = v1::JobSpec::decode(grant.spec).unwrap().rollout.unwrap();
        assert_eq!(rollout.system.as_deref(), Some("s"));
    }
}

#[tokio::test]
async fn a_clock_that_was_set_back_shortens_no_delay_and_prolongs_no_lease() {
    let began = Timestamp::from_ms(1_700_000_000_000);
    let clock = Arc::new(ManualClock::new(began));
    let coordinator = Coordinator::start_at(clock.clone(), |_| {}).await;
    open(&mut coordinator.jobs(SHOP), "b1").await;
    clock.set(Timestamp(began.0 - 3_600_000_000));
    let coordinator = coordinator.restart().await;
    let mut jobs = coordinator.jobs(SHOP);
    let later = job(r#"{"id":"later","prompt":"x","delay_ms":60000}"#);
    submit(&mut jobs, "b1", 0, vec![later, plain("now")]).await;
    let seen = get_job(&mut jobs, "b1", "later").await;
    assert_eq!(seen.state(), v1::JobState::Delayed);
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let grant = worker.grants(1).await.remove(0);
    assert_eq!(grant.lease_ttl_ms, worker.welcome.lease_ttl_ms);
}

#[tokio::test]
async fn old_batches_are_forgotten_with_what_lost() {
    let clock = Arc::new(ManualClock::new(Timestamp::from_ms(1_700_000_000_000)));
    let coordinator = Coordinator::start_at(clock.clone(), |_| {}).await;
    let mut jobs = coordinator.jobs(SHOP);
    for batch in ["old", "open"] {
        open(&mut jobs, batch).await;
        submit(&mut jobs, batch, 0, vec![plain("j")]).await;
    }
    let target = Some(v1::cancel_request::Target::Batch("old".to_owned()));
    jobs.cancel(v1::CancelRequest { target }).await.unwrap();
    let lost = layout::trace(&"shop/old/j".parse().unwrap(), Fence(7));
    coordinator.store.put(&lost, "x".into()).await.unwrap();

    clock.advance(Duration::from_secs(31 * 86_400));
    // Retention runs at the start, and then each hour.
    let coordinator = coordinator.restart().await;
    let mut jobs = coordinator.jobs(SHOP);
    let looking = async {
        loop {
            let batch = "old".to_owned();
            if let Err(status) = jobs.get_batch(v1::GetBatchRequest { batch }).await {
                return status.code();
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(soon(looking).await, Code::NotFound);
    let gone = coordinator.store.head(&lost).await.unwrap_err();
    assert!(gone.is_not_found());
    assert_eq!(
        get_job(&mut jobs, "open", "j").await.state(),
        v1::JobState::Ready
    );
}
