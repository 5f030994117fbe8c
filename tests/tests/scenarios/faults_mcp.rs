//! MCP servers that misbehave: die, hang, flood, are not there. Each rollout ends and nothing is left running.

use std::time::Duration;

use espalier_proto::v1::{ErrorClass, JobState};
use espalier_tests::harness::model::{self, sum_job, toy_job};
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(90);

fn job_that_calls(id: &str, tool: &str, arguments: Value) -> Value {
    let steps = json!([{"tool": tool, "arguments": arguments}, {"answer": "done"}]);
    let mut job = toy_job(id, &steps, "done");
    job["max_infra"] = 1.into();
    job["max_attempts"] = 1.into();
    job["limits"] = json!({"tool_call_s": 2});
    job
}

#[tokio::test]
async fn a_server_that_dies_or_floods_is_a_failure_of_infrastructure() {
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let mut jobs = vec![
        job_that_calls("die", "die", json!({"message": "out of luck"})),
        job_that_calls("flood", "flood", json!({})),
    ];
    jobs.extend((0..5).map(|n| sum_job(&format!("good-{n}"), n)));
    client.submit("b", &jobs).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 5, "{:#?}", result.jobs);
    for id in ["die", "flood"] {
        let job = &result.jobs[id];
        assert_eq!(job.state(), JobState::Dead, "{job:?}");
        let error = job.last_error.as_ref().unwrap();
        assert_eq!(error.class(), ErrorClass::Infra, "{error:?}");
        assert!(
            error.message.contains("toy"),
            "the server is named: {error:?}"
        );
    }
    let died = result.jobs["die"].last_error.as_ref().unwrap();
    assert!(
        format!("{} {}", died.message, died.log_tail).contains("out of luck"),
        "its last words are kept: {died:?}"
    );
}

#[tokio::test]
async fn a_call_that_hangs_ends_at_its_deadline() {
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    client
        .submit(
            "b",
            &[job_that_calls("hang", "sleep", json!({"ms": 600_000}))],
        )
        .await;
    let result = client.wait("b", Duration::from_secs(30)).await;
    let job = &result.jobs["hang"];
    assert_eq!(
        job.state(),
        JobState::Dead,
        "a server that answers nothing is broken: {job:?}"
    );
    let message = &job.last_error.as_ref().unwrap().message;
    assert!(
        message.contains("sleep") && message.contains("2"),
        "the call and its deadline are named: {message}"
    );
}

#[tokio::test]
async fn a_server_that_cannot_be_started_is_the_jobs_fault() {
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let mut job = sum_job("inline", 1);
    job["mcp"] = json!([{"name": "gone", "server": {"command": "/no/such/program"}}]);
    client.submit("b", &[job, sum_job("good", 1)]).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 1);
    let job = &result.jobs["inline"];
    let error = job.last_error.as_ref().unwrap();
    assert_eq!(
        (job.state(), error.class()),
        (JobState::Dead, ErrorClass::Invalid),
        "{job:?}"
    );
    assert!(
        error.message.contains("/no/such/program") && error.message.contains("command"),
        "{error:?}"
    );
    assert_eq!(
        job.attempts, 1,
        "a job that can never work is not tried again"
    );
}

#[tokio::test]
async fn nothing_is_left_running_after_a_stop() {
    let mut up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let mut client = up.client().await;
    let jobs: Vec<Value> = (0..8)
        .map(|n| job_that_calls(&format!("s{n}"), "sleep", json!({"ms": 600_000})))
        .collect();
    client.submit("b", &jobs).await;
    espalier_tests::harness::wait_for("toy servers to run", DEADLINE, || async {
        let toys = up
            .processes()
            .into_iter()
            .filter(|(_, line)| line.contains("toy-mcp"))
            .count();
        if toys > 0 { Ok(()) } else { Err(toys) }
    })
    .await;
    let status = up.process.terminate(Duration::from_secs(60)).await;
    assert!(status.success(), "{status:?}");
    up.wait_until_gone(Duration::from_secs(10)).await;
}
