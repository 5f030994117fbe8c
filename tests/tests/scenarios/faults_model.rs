//! A model endpoint that misbehaves: slow, cut, wrong, silent. Each rollout ends, and nothing is lost.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_core::trace::{Decision, StopReason};
use espalier_proto::v1::{ErrorClass, JobState};
use espalier_tests::harness::model::{self, faulty_job};
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(90);

async fn start_impatient(url: &str) -> Up {
    let folder = tempfile::TempDir::new().unwrap();
    Up::start_in(folder, &toy_servers(), url, &[], &model::impatient(url)).await
}

/// Faults that pass: the client tries again, and the rollout never notices.
const PASSING: [&str; 6] = [
    "http500 times=2",
    "http429",
    "cut",
    "html",
    "empty_choices",
    "slow delay_ms=300",
];

#[tokio::test]
async fn faults_that_pass_cost_a_retry_and_no_attempt() {
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let job = |(n, fault): (usize, &&str)| faulty_job(&format!("job-{n}"), n, fault);
    let jobs: Vec<Value> = PASSING.iter().enumerate().map(job).collect();
    client.submit("b", &jobs).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), PASSING.len(), "{:#?}", result.jobs);
    for (n, fault) in PASSING.iter().enumerate() {
        let job = &result.jobs[&format!("job-{n}")];
        assert_eq!(
            (job.attempts, job.handler_failures, job.infra_failures),
            (1, 0, 0),
            "{fault}: {job:?}"
        );
        let trace = client.trace("b", &job.id).await;
        let retries: u32 = trace.model_calls.iter().map(|call| call.retries).sum();
        assert_eq!(
            retries > 0,
            !fault.starts_with("slow"),
            "{fault}: {retries} retries"
        );
    }
}

#[tokio::test]
async fn what_the_model_says_wrong_is_told_to_the_model() {
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let faults = ["bad_arguments", "unknown_tool", "reasoning_field"];
    let jobs: Vec<Value> = faults
        .iter()
        .map(|fault| faulty_job(fault, 1, fault))
        .collect();
    client.submit("b", &jobs).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        faults.len(),
        "{:#?}",
        result.jobs
    );
    assert_eq!(
        client.trace("b", "bad_arguments").await.tool_calls[0].decision,
        Decision::Malformed
    );
    assert_eq!(
        client.trace("b", "unknown_tool").await.tool_calls[0].decision,
        Decision::Unknown
    );
    let trace = client.trace("b", "reasoning_field").await;
    let thoughts = trace.messages.iter().filter(|message| {
        matches!(
            message,
            espalier_core::chat::Message::Assistant {
                reasoning_content: Some(_),
                ..
            }
        )
    });
    assert_eq!(thoughts.count(), trace.model_calls.len());
}

#[tokio::test]
async fn a_tool_call_without_an_end_is_not_run() {
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let mut always = faulty_job("always", 2, "unclosed_tool_call times=always");
    always["limits"] = serde_json::json!({"turns": 3});
    let jobs = [faulty_job("once", 1, "unclosed_tool_call"), always];
    client.submit("b", &jobs).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.count(JobState::Succeeded), 2, "{:#?}", result.jobs);
    for (id, stop) in [
        ("once", StopReason::Answered),
        ("always", StopReason::TurnLimit),
    ] {
        let trace = client.trace("b", id).await;
        assert_eq!(trace.outcome.stop, stop, "{:?}", trace.outcome);
        assert_eq!(
            trace.tool_calls[0].decision,
            Decision::Malformed,
            "half a call was run"
        );
        assert_eq!(trace.model_calls[0].finish_reason, "length");
    }
}

#[tokio::test]
async fn faults_that_stay_end_in_a_dead_letter_with_the_reason() {
    let up = start_impatient(&model::start().await).await;
    let mut client = up.client().await;
    let faults = [
        ("http500", "answered 500"),
        ("html", "not a chat completion"),
        ("empty_choices", "holds no choices"),
        ("cut", "was cut after"),
        ("hang", "timed out"),
    ];
    let job = |(fault, _): &(&str, &str)| {
        let mut job = faulty_job(fault, 1, &format!("{fault} times=always"));
        job["max_attempts"] = 1.into();
        job["max_infra"] = 1.into();
        job
    };
    client
        .submit("b", &faults.iter().map(job).collect::<Vec<_>>())
        .await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Dead),
        faults.len(),
        "{:#?}",
        result.jobs
    );
    for (fault, words) in faults {
        let job = &result.jobs[fault];
        let error = job.last_error.as_ref().expect("a dead job has its error");
        assert_eq!(error.class(), ErrorClass::Infra, "{fault}: {error:?}");
        assert!(error.message.contains(words), "{fault}: {error:?}");
    }
}

#[tokio::test]
async fn a_model_that_is_not_there_costs_no_job() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let up = start_impatient(&format!("http://{address}/v1")).await;
    let mut client = up.client().await;
    client.submit("b", &[model::sum_job("j", 1)]).await;
    let deadline = Duration::from_secs(20);
    let job = espalier_tests::harness::wait_for("an infrastructure failure", deadline, || {
        let mut api = client.jobs.clone();
        async move {
            let request = espalier_proto::v1::GetJobRequest {
                batch: "b".into(),
                id: "j".into(),
            };
            let job = api.get_job(request).await.unwrap().into_inner();
            if job.infra_failures > 0 {
                Ok(job)
            } else {
                Err(job)
            }
        }
    })
    .await;
    assert_eq!(job.handler_failures, 0, "{job:?}");
    assert!(
        job.last_error
            .unwrap()
            .message
            .contains(&address.to_string())
    );
}
