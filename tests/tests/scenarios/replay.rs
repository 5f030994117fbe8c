//! Rollouts without their servers: recorded once with a real MCP server, then scored by what it answered.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::process::Output;
use std::time::Duration;

use espalier_core::chat::Message;
use espalier_core::compare::{Both, Report};
use espalier_core::layout;
use espalier_core::trace::{StopReason, Trace};
use espalier_proto::v1::{Counts, JobState};
use espalier_tests::harness::client::Client;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::{self, sum_job};
use espalier_tests::harness::serving::Serving;
use espalier_tests::harness::tiny;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);

/// Runs a batch to its end.
pub async fn run(client: &mut Client, batch: &str, jobs: &[Value]) {
    let answer = client.submit(batch, jobs).await;
    assert!(answer.rejected.is_empty(), "{:?}", answer.rejected);
    let result = client.wait(batch, DEADLINE).await;
    let succeeded = result.count(JobState::Succeeded);
    assert_eq!(succeeded, jobs.len(), "{:?}", result.unsolved());
}

/// The conversation without the ids of calls, which are the server's own.
fn said(trace: &Trace) -> Vec<(String, String, Vec<Value>)> {
    let one = |message: &Message| {
        let calls = match message {
            Message::Assistant { tool_calls, .. } => &tool_calls[..],
            _ => &[],
        };
        let calls = calls.iter().map(|call| json!(call.function)).collect();
        (
            message.role().to_owned(),
            message.content().to_owned(),
            calls,
        )
    };
    trace.messages.iter().map(one).collect()
}

async fn evaluate(cluster: &Cluster, more: &[&str]) -> Output {
    let tasks = cluster.folder.path().join("tasks.jsonl");
    let words = ["evaluate", "--tasks", tasks.to_str().unwrap(), "--json"];
    cluster.espalier(&[&words, more].concat()).await
}

#[tokio::test]
async fn models_are_scored_by_what_a_server_said_once() {
    let cluster = Cluster::start(&model::start().await, 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let mut client = cluster.client().await;
    let mut jobs: Vec<Value> = (0..8).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    // As a file has it that names no tasks.
    jobs[0].as_object_mut().unwrap().remove("task_id");
    run(&mut client, "rec", &jobs).await;

    // The server is gone, one task adds something else, and one was never recorded.
    let mut tasks = jobs.clone();
    for task in &mut tasks {
        task["mcp"] = json!(["gone"]);
    }
    tasks[7]["prompt"] = sum_job("", 70)["prompt"].clone();
    tasks.push(json!({"id": "new", "prompt": "x"}));
    let lines: Vec<String> = tasks.iter().map(Value::to_string).collect();
    std::fs::write(cluster.folder.path().join("tasks.jsonl"), lines.join("\n")).unwrap();
    let out = cluster.folder.path().join("report");
    let out_text = out.to_str().unwrap();
    let output = evaluate(
        &cluster,
        &[
            "--replay",
            "recorded",
            "--from",
            "rec",
            "--model",
            "scripted:0.8",
            "--model",
            "scripted:0",
            "--batch",
            "e",
            "--out",
            out_text,
        ],
    )
    .await;
    let said_too = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        output.status.code(),
        Some(2),
        "a task is refused: {said_too}"
    );
    let first = output.stdout.split(|byte| *byte == b'\n').next().unwrap();
    let first: Value = serde_json::from_slice(first).unwrap();
    assert_eq!(
        (&first["rollouts"], &first["refusals"][0]["place"]),
        (&json!(16), &json!(9))
    );
    assert_eq!(
        first["refusals"][0]["rule"],
        "must have a published rollout in `rec`"
    );

    let report = Report::parse(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    let pooled = &report.comparison.pooled;
    assert_eq!(
        (pooled.tasks, pooled.success.after.value),
        (7, 1.0),
        "{report:?}"
    );
    assert!(pooled.success.before.value < 1.0, "{pooled:?}");
    let unrecorded = Both {
        before: 1,
        after: 1,
    };
    assert_eq!(report.comparison.left_out.unrecorded, unrecorded);
    assert_eq!(
        (report.arms.before.replayed, report.arms.after.replayed),
        (8, 8)
    );
    let text = std::fs::read_to_string(out.join("report.md")).unwrap();
    for part in [
        "a call was never recorded | 1 | 1",
        "8, 8 of them with recorded tools",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    let (was, is) = (
        client.trace("rec", "sum-3").await,
        client.trace("e", "b.sum-3.s0").await,
    );
    assert_eq!(said(&is), said(&was));
    assert_eq!(is.header.tools, was.header.tools);
    assert_eq!(is.outcome.verdict, was.outcome.verdict);
    let recorded = cluster.key("rec", "sum-3");
    assert_eq!(is.header.provenance.replay[0].job, recorded);
    let parents = cluster.manifest(&cluster.key("e", "b.sum-3.s0")).parents;
    assert!(
        parents.contains(&layout::manifest(&recorded)),
        "{parents:?}"
    );
    let ended = client.trace("e", "b.sum-7.s0").await;
    assert_eq!(
        (ended.outcome.stop, ended.reward()),
        (StopReason::Unrecorded, None)
    );
    worker.terminate(DEADLINE).await;
}

/// Makes a model with random weights call one tool in each turn: of a boolean and a call it may say either, and the mark
/// of a call is far ahead.
pub const CALLS: &str = r#"{ guided_json = { type = "boolean" }, logit_bias = { "151657" = 100 }, parallel_tool_calls = false }"#;

/// A rollout of such a model: what it says means nothing, and comes from its seed alone.
pub fn drawn(n: usize, more: &Value) -> Value {
    let mut job = json!({
        "id": format!("j{n}"), "mcp": ["toy"], "model": "tiny", "prompt": "Go.", "limits": {"turns": 3},
        "tools": {"allow": ["add"]}, "verify": {"tool_called": {"name": "add"}},
        "sampling": {"thinking": false, "temperature": 1, "seed": n, "completion_tokens": 60},
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        job[key] = value.clone();
    }
    job
}

/// Token ids of every call, and the conversation.
pub fn ids(trace: &Trace) -> Value {
    let calls = trace.model_calls.iter();
    let calls = calls.map(|call| json!([call.prompt, call.completion_ids]));
    json!([
        calls.collect::<Vec<_>>(),
        said(trace),
        trace.outcome.stop,
        trace.reward()
    ])
}

#[tokio::test]
async fn kills_change_nothing_of_rollouts_with_recorded_tools_and_seeds() {
    let serving = Serving::start(&[]).await;
    let extra = "ESPALIER_AGENT_WORKER_MODEL_EXTRA";
    let mut cluster = Cluster::start_with(Setup {
        lease_ttl_ms: 2_000,
        environment: vec![(extra.to_owned(), CALLS.to_owned())],
        ..Setup::new("embedded", &format!("{}/v1", serving.url))
    })
    .await;
    let mut worker = cluster.worker("a", 2);
    let count = 8;
    let mut client = cluster.client().await;
    let jobs: Vec<Value> = (0..count).map(|n| drawn(n, &json!({}))).collect();
    run(&mut client, "rec", &jobs).await;
    let replayed = |n: usize| {
        drawn(
            n,
            &json!({"mcp": ["gone"], "replay": [format!("rec/j{n}")]}),
        )
    };
    let jobs: Vec<Value> = (0..count).map(replayed).collect();
    run(&mut client, "calm", &jobs).await;

    client.submit("torn", &jobs).await;
    // Both places of the worker are taken, and more jobs wait for them.
    let is_amid = |counts: &Counts| counts.succeeded > 0 && counts.leased > 1 && counts.ready > 0;
    client
        .wait_until_counts("work to be under way", "torn", DEADLINE, is_amid)
        .await;
    cluster.coordinators[0].process.kill();
    worker.kill(DEADLINE).await;
    cluster.restart_coordinator(0).await;
    let mut worker = cluster.worker("a", 2);
    let mut client = cluster.client().await;
    let result = client.wait("torn", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        count,
        "{:?}",
        result.unsolved()
    );
    let again = result.jobs.values().filter(|job| job.attempts > 1).count();
    assert!(again > 0, "nothing was under way when all was killed");
    let mut answers = 0;
    for n in 0..count {
        let name = format!("j{n}");
        let was = client.trace("rec", &name).await;
        answers += was
            .tool_calls
            .iter()
            .filter(|call| call.raw.is_some())
            .count();
        for batch in ["calm", "torn"] {
            assert_eq!(
                ids(&client.trace(batch, &name).await),
                ids(&was),
                "{batch}/{name}"
            );
        }
    }
    assert!(answers > count, "recordings answered: {answers}");
    worker.terminate(DEADLINE).await;
}

/// What a model says of recorded turns: by `espalier evaluate`, from the last line that it prints.
async fn teacher_forced(cluster: &Cluster, batch: &str, models: [&str; 2]) -> Value {
    let [before, after] = models;
    let words = [
        "evaluate",
        "--replay",
        "teacher-forced",
        "--from",
        "rec",
        "--model",
        before,
        "--model",
        after,
        "--label",
        "one",
        "--label",
        "other",
        "--batch",
        batch,
        "--json",
    ];
    let output = cluster.espalier(&words).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    last["evaluation"].clone()
}

/// Agreement and log-probability of both arms.
fn told(evaluation: &Value, what: &str) -> (f64, f64) {
    let arms = &evaluation["turns"]["pooled"][what]["arms"];
    let value = |arm: &str| arms[arm]["value"].as_f64().unwrap_or(f64::NAN);
    (value("before"), value("after"))
}

#[tokio::test]
async fn a_model_says_again_what_it_said_and_another_one_does_not() {
    let cluster = Cluster::start(&model::start().await, 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let mut client = cluster.client().await;
    let jobs: Vec<Value> = (0..20).map(|n| sum_job(&format!("sum-{n}"), n)).collect();
    run(&mut client, "rec", &jobs).await;
    let found = teacher_forced(&cluster, "e", ["scripted:0.5", "scripted:0"]).await;
    let (careless, careful) = told(&found, "agreement");
    assert!(careless < 1.0 && careful == 1.0, "{found}");
    assert_eq!(told(&found, "answers").1, 1.0);
    let pooled = &found["turns"]["pooled"];
    assert_eq!(
        (&pooled["tasks"], &pooled["turns"]),
        (&json!(20), &json!(40))
    );
    assert_eq!(pooled["logprob"], Value::Null, "it tells of no given turn");
    assert_eq!(found["arms"]["after"]["without_logprob"], 40);
    let promote = ["adapters", "promote", "shop", "--comparison", "e"];
    let refused = cluster.espalier(&promote).await;
    assert_eq!(refused.status.code(), Some(2), "turns open no gate");
    worker.terminate(DEADLINE).await;
}

/// A given turn is as likely as each of its tokens is where it is drawn by itself.
async fn check_given_turn(serving: &Serving) {
    let more = json!({
        "forced_message": {"role": "assistant", "content": "Hello world."},
        "chat_template_kwargs": {"enable_thinking": false},
        "logprobs": true, "return_token_ids": true,
    });
    let answer = serving.chat("Hi.", more).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "Hello world.");
    assert_eq!(choice["finish_reason"], "stop");
    let mut ids = answer["prompt_token_ids"].as_array().unwrap().clone();
    let given = choice["token_ids"].as_array().unwrap();
    let told = choice["logprobs"]["content"].as_array().unwrap();
    assert!(given.len() > 2 && told.len() == given.len(), "{answer}");
    for (id, told) in given.iter().zip(told) {
        let body = json!({
            "model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 0,
            "logit_bias": {id.to_string(): 100}, "return_token_ids": true,
        });
        let (status, drawn) = serving.ask("/v1/completions", &body).await;
        assert_eq!(status, 200, "{drawn}");
        let drawn = &drawn["choices"][0];
        assert_eq!(drawn["token_ids"], json!([id]));
        assert_eq!(drawn["logprobs"]["token_logprobs"][0], told["logprob"]);
        ids.push(id.clone());
    }
}

#[tokio::test]
async fn an_own_server_tells_how_likely_recorded_turns_are() {
    let serving = Serving::start(&[]).await;
    let folder = serving.path("adapter");
    tiny::write_adapter(&folder, 5);
    let (status, loaded) = serving.load_adapter("tuned", &folder).await;
    assert_eq!(status, 200, "{loaded}");
    check_given_turn(&serving).await;
    let cluster = Cluster::start(&format!("{}/v1", serving.url), 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 2);
    let mut client = cluster.client().await;
    // The most likely word each time, until the turn is cut: a model of random weights never ends it.
    let job = |n: usize| {
        json!({
            "id": format!("j{n}"), "task_id": format!("t{n}"), "model": "tiny", "prompt": format!("Say {n}."),
            "sampling": {"thinking": false, "temperature": 0, "completion_tokens": 12},
        })
    };
    let jobs: Vec<Value> = (0..4).map(job).collect();
    run(&mut client, "rec", &jobs).await;
    let found = teacher_forced(&cluster, "e", ["tiny", "tuned"]).await;
    let (one, other) = told(&found, "answers");
    assert!(one == 1.0 && other < 1.0, "{found}");
    let (likely, unlikely) = told(&found, "logprob");
    assert!(likely > unlikely, "{found}");
    worker.terminate(DEADLINE).await;
}
