//! Rollouts over a toy stdio MCP server: what a user gets when everything works, and what the model gets when it errs.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_core::chat::Message;
use espalier_core::trace::{Decision, StopReason, Trace};
use espalier_proto::v1::JobState;
use espalier_tests::harness::model::{self, sum_job, toy_job};
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

async fn start() -> Up {
    Up::start(&toy_servers(), &model::start().await, &[]).await
}

/// Runs one job and gives its trace.
async fn trace_of(job: Value) -> Trace {
    let up = start().await;
    let mut client = up.client().await;
    let id = job["id"].as_str().unwrap().to_owned();
    let answer = client.submit("b", &[job]).await;
    assert!(answer.rejected.is_empty(), "{:?}", answer.rejected);
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.count(JobState::Succeeded), 1, "{:?}", result.jobs);
    client.trace("b", &id).await
}

fn tool_texts(trace: &Trace) -> Vec<&str> {
    let tools = trace
        .messages
        .iter()
        .filter(|message| matches!(message, Message::Tool { .. }));
    tools.map(Message::content).collect()
}

#[tokio::test]
async fn every_job_of_a_batch_is_solved_and_published_once() {
    let up = start().await;
    let mut client = up.client().await;
    let jobs: Vec<Value> = (0..40).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    assert_eq!(client.submit("b", &jobs).await.accepted, 40);
    let result = client.wait("b", DEADLINE).await;
    assert_eq!((result.jobs.len(), result.solved()), (40, 40));
    for job in result.jobs.values() {
        let manifest = up.store_folder().join(&job.manifest);
        assert!(
            manifest.exists(),
            "{} names {}, which is not there",
            job.id,
            job.manifest
        );
        assert_eq!(
            (job.attempts, job.handler_failures, job.infra_failures),
            (1, 0, 0),
            "{job:?}"
        );
    }
    let trace = client.trace("b", "sum-5").await;
    assert_eq!(trace.answer(), "6");
    assert_eq!(trace.outcome.stop, StopReason::Answered);
    assert_eq!(trace.reward(), Some(1.0));
    assert_eq!((trace.model_calls.len(), trace.tool_calls.len()), (2, 1));
    assert_eq!(trace.header.provenance.mcp_servers[0].name, "toy");
    assert_eq!(trace.header.provenance.model, "scripted");
}

#[tokio::test]
async fn parallel_calls_are_answered_in_order() {
    let steps = json!([
        {"parallel": [{"tool": "echo", "arguments": {"text": "one"}}, {"tool": "echo", "arguments": {"text": "two"}},
                      {"tool": "echo", "arguments": {"text": "three"}}]},
        {"answer": "{{last}}"},
    ]);
    let trace = trace_of(toy_job("j", &steps, "three")).await;
    assert_eq!(tool_texts(&trace), ["one", "two", "three"]);
    assert_eq!(trace.reward(), Some(1.0));
}

#[tokio::test]
async fn the_models_own_errors_are_told_to_the_model() {
    let steps = json!([
        {"tool": "no_such_tool", "arguments": {}},
        {"tool": "echo", "arguments": "{\"text\": "},
        {"tool": "echo", "arguments": "[1]"},
        {"tool": "fail", "arguments": {"message": "it broke"}},
        {"tool": "echo", "arguments": {"text": ""}},
        {"answer": "done"},
    ]);
    let trace = trace_of(toy_job("j", &steps, "done")).await;
    let decisions: Vec<Decision> = trace.tool_calls.iter().map(|call| call.decision).collect();
    use Decision::{Allowed, Malformed, Unknown};
    assert_eq!(decisions, [Unknown, Malformed, Malformed, Allowed, Allowed]);
    let errors: Vec<bool> = trace.tool_calls.iter().map(|call| call.is_error).collect();
    assert_eq!(errors, [true, true, true, true, false]);
    let texts = tool_texts(&trace);
    assert_eq!(texts[0], "Tool no_such_tool not found");
    assert!(texts[3].contains("it broke"), "{texts:?}");
    assert_eq!(texts[4], "(empty tool result)");
    assert_eq!(trace.outcome.totals.tool_errors, 4);
}

#[tokio::test]
async fn several_user_turns_are_one_conversation() {
    let one = json!([{"tool": "note_write", "arguments": {"name": "a", "text": "kept"}}, {"answer": "written"}]);
    let two = json!([{"tool": "note_read", "arguments": {"name": "a"}}, {"answer": "{{last}}"}]);
    let job = json!({
        "id": "j", "mcp": ["toy"], "system": "Be brief.", "hints": "Notes are kept.",
        "prompt": [format!("SCRIPT: {one}"), format!("SCRIPT: {two}")],
        "verify": {"all": [
            {"answer": {"equals": "kept"}},
            {"mcp": {"server": "toy", "tool": "note_read", "arguments": {"name": "a"}, "text": {"equals": "kept"}}},
            {"mcp": {"server": "toy", "resource": "note://a", "text": {"equals": "kept"}}},
            {"tool_called": {"name": "note_*", "arguments": {"name": {"equals": "a"}}}},
        ]},
    });
    let trace = trace_of(job).await;
    assert_eq!(trace.reward(), Some(1.0), "{:?}", trace.outcome.verdict);
    let roles: Vec<&str> = trace.messages.iter().map(Message::role).collect();
    let turn = ["user", "assistant", "tool", "assistant"];
    assert_eq!(roles, [&["system", "system"][..], &turn, &turn].concat());
    assert!(
        matches!(&trace.messages[1], Message::System { hint: true, content } if content == "Notes are kept.")
    );
}

#[tokio::test]
async fn limits_stop_a_rollout_and_say_so() {
    let steps: Vec<Value> = (0..10)
        .map(|n| json!({"tool": "echo", "arguments": {"text": n.to_string()}}))
        .collect();
    let mut job = toy_job("j", &steps.into(), "never");
    job["limits"] = json!({"turns": 3});
    let trace = trace_of(job).await;
    assert_eq!(trace.outcome.stop, StopReason::TurnLimit);
    assert_eq!((trace.outcome.totals.turns, trace.reward()), (3, Some(0.0)));
}

#[tokio::test]
async fn a_large_result_is_cut_for_the_model_and_kept_whole() {
    let steps = json!([{"tool": "big", "arguments": {"bytes": 5_000_000}}, {"answer": "done"}]);
    let mut job = toy_job("j", &steps, "done");
    job["observation"] = json!({"max_tokens": 200});
    let up = start().await;
    let mut client = up.client().await;
    client.submit("b", &[job]).await;
    client.wait("b", DEADLINE).await;
    let trace = client.trace("b", "j").await;
    let call = &trace.tool_calls[0];
    assert!(call.truncated && call.shown_tokens <= 200, "{call:?}");
    let raw = call.raw.as_ref().expect("the raw result is kept");
    assert!(raw.size >= 5_000_000, "{raw:?}");
    let blob = std::fs::read(up.store_folder().join("default/blobs").join(&raw.sha256))
        .expect("the blob is there");
    assert_eq!(espalier_core::trace::sha256_hex(&blob), raw.sha256);
}

#[tokio::test]
async fn a_tool_under_ask_waits_for_an_answer() {
    use espalier_proto::v1::{AnswerQuestionRequest, ListQuestionsRequest};
    use espalier_tests::harness::wait_for;

    let up = start().await;
    let mut client = up.client().await;
    let steps = json!([{"tool": "echo", "arguments": {"text": "hi"}}, {"answer": "{{last}}"}]);
    let mut jobs = vec![
        toy_job("yes", &steps, "hi"),
        toy_job("no", &steps, "User rejected tool call."),
    ];
    jobs.push(toy_job("late", &steps, "User rejected tool call."));
    for job in &mut jobs {
        job["tools"] = json!({"ask": ["echo"]});
    }
    jobs[2]["limits"] = json!({"ask_s": 1});
    client.submit("b", &jobs).await;
    for (job, allow) in [("yes", true), ("no", false)] {
        let api = client.jobs.clone();
        let id = wait_for("the question", DEADLINE, || {
            let mut api = api.clone();
            async move {
                let open = api
                    .list_questions(ListQuestionsRequest {
                        batch: "b".into(),
                        ..Default::default()
                    })
                    .await
                    .unwrap()
                    .into_inner();
                let question = open
                    .questions
                    .iter()
                    .find(|q| q.job == job && q.tool == "echo")
                    .cloned();
                question.map(|q| q.id).ok_or(open.questions)
            }
        })
        .await;
        client
            .jobs
            .answer_question(AnswerQuestionRequest { id, allow })
            .await
            .unwrap();
    }
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 3, "{:?}", result.jobs);
    let decisions = [
        ("yes", Decision::Approved),
        ("no", Decision::Rejected),
        ("late", Decision::Rejected),
    ];
    for (job, decision) in decisions {
        assert_eq!(
            client.trace("b", job).await.tool_calls[0].decision,
            decision,
            "{job}"
        );
    }
}
