//! Rollouts against a real inference worker, on a tiny model with random weights: what it says means nothing, and what is
//! recorded of its calls does.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::trace::{StopReason, Trace};
use espalier_proto::v1::JobState;
use espalier_tests::harness::client::Client;
use espalier_tests::harness::process::binary;
use espalier_tests::harness::serving::Serving;
use espalier_tests::harness::tiny;
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Of the model that `up` serves, in tokens: what the tools are told in, and some words.
const CONTEXT: u64 = 1024;
const DEADLINE: Duration = Duration::from_secs(60);
/// Longer than rollouts have to end by themselves.
const DRAIN_DEADLINE: Duration = Duration::from_secs(180);

/// A rollout over the toy server whose first answer is cut after so many tokens.
fn cut_after(tokens: u32, id: &str) -> Value {
    json!({
        "id": id, "mcp": ["toy"], "prompt": "Go.",
        "sampling": {"temperature": 0, "thinking": false, "completion_tokens": tokens},
    })
}

/// The same with a model of its own.
fn of_model(model: &str) -> Value {
    let mut job = cut_after(8, model);
    job["model"] = json!(model);
    job
}

async fn traces(client: &mut Client, jobs: &[Value]) -> Vec<Trace> {
    let answer = client.submit("b", jobs).await;
    assert!(answer.rejected.is_empty(), "{:?}", answer.rejected);
    let result = client.wait("b", DEADLINE).await;
    let succeeded = result.count(JobState::Succeeded);
    assert_eq!(succeeded, jobs.len(), "{:?}", result.unsolved());
    let mut traces = Vec::new();
    for job in jobs {
        traces.push(client.trace("b", job["id"].as_str().unwrap()).await);
    }
    traces
}

#[tokio::test]
async fn a_trace_names_the_adapter_that_answered() {
    let serving = Serving::start(&[]).await;
    let folder = serving.path("adapter");
    tiny::write_adapter(&folder, 5);
    let (status, loaded) = serving.load_adapter("tuned", &folder).await;
    assert_eq!(status, 200, "{loaded}");
    let url = format!("{}/v1", serving.url);
    let up = Up::start(&toy_servers(), &url, &[]).await;
    let jobs = [of_model("tuned"), of_model("tiny")];
    let traces = traces(&mut up.client().await, &jobs).await;
    for trace in &traces {
        assert_eq!(trace.outcome.stop, StopReason::CutAnswer);
        assert_eq!(trace.model_calls.len(), 1);
    }
    let adapter = traces[0].model_calls[0].adapter.as_ref().unwrap();
    assert_eq!(
        (&*adapter.name, adapter.sha256.as_deref()),
        ("tuned", loaded["digest"].as_str())
    );
    assert_eq!(traces[1].model_calls[0].adapter, None);
    assert_ne!(
        traces[0].messages, traces[1].messages,
        "the adapter changes nothing"
    );
}

/// `espalier up` on a model of its own, which a test may spoil first.
fn serve_here(spoil: impl FnOnce(&Path), more: &[&str]) -> Up {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model");
    tiny::write_model(&model);
    spoil(&model);
    Up::spawn_serving(folder, &toy_servers(), &model, more)
}

#[tokio::test]
async fn up_serves_the_model_itself() {
    let mut up = serve_here(|_| {}, &["--max-model-len", &CONTEXT.to_string()]);
    up.wait_until_ready().await;
    let parts = [
        "loading ",
        "model loaded",
        "kernels",
        "threads",
        "bf16",
        "served here on ",
        "training ",
    ];
    wait_for("all of it to be said", DEADLINE, || {
        let log = up.process.log();
        let missing = parts.iter().find(|part| !log.contains(**part));
        let missing = missing.map(|part| format!("`{part}` is not in {log}"));
        async move { missing.map_or(Ok(()), Err) }
    })
    .await;
    let mut client = up.client().await;
    let jobs: Vec<Value> = (0..4).map(|n| cut_after(8, &format!("j{n}"))).collect();
    for trace in traces(&mut client, &jobs).await {
        assert_eq!(trace.outcome.stop, StopReason::CutAnswer);
        assert_eq!(trace.model_calls.len(), 1);
        let ids = trace.model_calls[0].completion_ids.as_ref();
        assert_eq!(ids.map(Vec::len), Some(8), "the ids that training needs");
    }
    follows(&up, &mut client).await;
    chats(&up).await;
    // A rollout that runs when it is told to end: the model stays until the rollout is published.
    let store = up.store_folder();
    client.submit("last", &[cut_after(200, "j")]).await;
    let key: JobKey = "default/last/j".parse().unwrap();
    let attempts = store.with_file_name("worker").join("attempts");
    wait_for("the last rollout to run", DEADLINE, || async {
        let leases = client.leases(std::slice::from_ref(&key)).await;
        // A lease may still be on its way to the worker, which would hand it back.
        let fence = leases.get(&key).ok_or("no lease")?;
        let begun = std::fs::read_dir(&attempts).into_iter().flatten().flatten();
        let mut begun = begun.filter_map(|entry| entry.file_name().into_string().ok());
        let is_begun = begun.any(|name| name.starts_with(&format!("{}-", fence.0)));
        is_begun.then_some(()).ok_or("not begun")
    })
    .await;
    assert!(up.process.terminate(DRAIN_DEADLINE).await.success());
    let manifest = store.join(layout::manifest(&key));
    assert!(manifest.exists(), "{} is not there", manifest.display());
    up.wait_until_gone(DEADLINE).await;
}

/// A chat on the same data asks the model that is served there, though nothing names it.
async fn chats(up: &Up) {
    let data = up.store_folder().with_file_name("");
    let mut command = Command::new(binary("espalier"));
    command.args(["--json", "chat", "--data-dir"]).arg(&data);
    command.arg("--mcp").arg(data.with_file_name("mcp.json"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello.\n").unwrap();
    let talked = tokio::task::spawn_blocking(move || child.wait_with_output());
    let output = talked.await.unwrap().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let manifest = up.store_folder().join(said["manifest"].as_str().unwrap());
    let published: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    // It talks until its context is full.
    let summary = &published["summary"];
    assert_eq!(summary["stop"], "cut_answer", "{summary}");
    let of = |key: &str| summary["totals"][key].as_u64().unwrap();
    assert_eq!(of("prompt_tokens") + of("completion_tokens"), CONTEXT);
}

/// What is added to the store is served, without a word.
async fn follows(up: &Up, client: &mut Client) {
    let folder = up.folder.path();
    let adapter = folder.join("adapter");
    tiny::write_adapter(&adapter, 5);
    let mut command = Command::new(binary("espalier"));
    command.args(["adapters", "add", "shop"]).arg(&adapter);
    command.arg("--base").arg(folder.join("model"));
    command.env("ESPALIER_DATA_DIR", folder.join("data"));
    let added = command.output().unwrap();
    assert!(added.status.success(), "{added:?}");
    wait_for("the adapter to be served", DEADLINE, || {
        let log = up.process.log();
        let is_served = log.contains("what is served has changed");
        async move { is_served.then_some(()).ok_or(log) }
    })
    .await;
    let mut job = cut_after(8, "j");
    job["model"] = json!("shop@v1");
    client.submit("shop", &[job]).await;
    let result = client.wait("shop", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        1,
        "{:?}",
        result.unsolved()
    );
    let trace = client.trace("shop", "j").await;
    let adapter = trace.model_calls[0].adapter.as_ref();
    assert_eq!(adapter.map(|adapter| &*adapter.name), Some("shop@v1"));
}

#[tokio::test]
async fn up_says_why_it_cannot_serve_a_model() {
    let nothing = |_: &Path| {};
    let gone = |model: &Path| std::fs::remove_dir_all(model).unwrap();
    let cut = |model: &Path| {
        let path = model.join(tiny::SHARDS[0]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    let other = |model: &Path| std::fs::write(model.join("config.json"), "{}").unwrap();
    let somebody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = somebody.local_addr().unwrap().to_string();
    let port_taken = ["--listen", &*taken];
    for (mut up, code, reason) in [
        (serve_here(gone, &[]), 1, "is no folder"),
        (serve_here(cut, &[]), 1, "is truncated or not safetensors"),
        (serve_here(other, &[]), 1, "`model_type` must be"),
        (serve_here(nothing, &port_taken), 2, "cannot listen on"),
    ] {
        let status = up.process.wait(DEADLINE).await;
        let log = up.process.log();
        assert_eq!(status.code(), Some(code), "{log}");
        assert!(log.contains(reason), "`{reason}` is not in {log}");
    }
}
