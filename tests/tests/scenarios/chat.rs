//! `espalier chat` as a person uses it, with what they type coming through a pipe.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use espalier_tests::harness::model;
use espalier_tests::harness::process::binary;
use espalier_tests::harness::up::toy_servers;
use serde_json::Value;
use tempfile::TempDir;

/// Runs a chat in which `typed` is typed, with further environment.
async fn chat(folder: &Path, typed: &str, environment: &[(&str, &str)]) -> Output {
    let mcp = folder.join("mcp.json");
    std::fs::write(&mcp, toy_servers().to_string()).expect("the folder is writable");
    let mut command = Command::new(binary("espalier"));
    command
        .args(["--json", "chat", "--model", "scripted", "--mcp"])
        .arg(mcp);
    command
        .args(["--model-url", &model::start().await, "--data-dir"])
        .arg(folder.join("data"));
    command.envs(environment.iter().copied());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let typed = typed.to_owned();
    let run = move || {
        let mut child = command.spawn().expect("espalier starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(typed.as_bytes()).expect("espalier reads");
        drop(stdin);
        child.wait_with_output().expect("espalier ends")
    };
    tokio::task::spawn_blocking(run).await.expect("no panic")
}

/// The stored trace that the output names.
fn trace(folder: &Path, output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let said: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let manifest = said["manifest"]
        .as_str()
        .unwrap_or_else(|| panic!("{said}"));
    let read = |path: &str| {
        std::fs::read(folder.join("data/store").join(path)).expect("it is in the store")
    };
    let manifest: Value = serde_json::from_slice(&read(manifest)).expect("a manifest");
    assert_eq!(
        manifest.get("spec_sha256"),
        None,
        "no job takes it for its own"
    );
    let files = manifest["files"].as_array().expect("files");
    let path = files
        .iter()
        .filter_map(|file| file["path"].as_str())
        .find(|path| path.ends_with("trace.json.zst"));
    let packed = read(path.expect("the manifest names the trace"));
    serde_json::from_slice(&zstd::decode_all(&packed[..]).expect("zstd")).expect("a trace")
}

#[tokio::test]
async fn it_asks_before_tools_over_several_turns_and_records_a_trace() {
    let folder = TempDir::new().expect("a temporary folder");
    let typed = r#"SCRIPT: [{"tool": "add", "arguments": {"a": 1, "b": 2}}, {"answer": "{{last}}"}]
y
SCRIPT: [{"tool": "echo", "arguments": {"text": "hello"}}, {"answer": "{{last}}"}]
n
/exit
"#;
    let output = chat(folder.path(), typed, &[]).await;
    assert!(output.status.success(), "{output:?}");
    let trace = trace(folder.path(), &output);
    let decisions: Vec<&Value> = trace["tool_calls"]
        .as_array()
        .expect("calls")
        .iter()
        .map(|c| &c["decision"])
        .collect();
    assert_eq!(decisions, ["approved", "rejected"]);
    let roles: Vec<&Value> = trace["messages"]
        .as_array()
        .expect("messages")
        .iter()
        .map(|m| &m["role"])
        .collect();
    let turn = ["user", "assistant", "tool", "assistant"];
    assert_eq!(roles, [turn, turn].concat());
    assert_eq!(trace["messages"][6]["content"], "User rejected tool call.");
    assert_eq!(trace["outcome"]["stop"], "user_exit");
}

#[tokio::test]
async fn a_chat_that_breaks_off_keeps_what_was_said() {
    let folder = TempDir::new().expect("a temporary folder");
    let environment = [
        ("ESPALIER_UP_MODEL__ENDPOINT__BASE_URL", "http://localhost"),
        ("ESPALIER_UP_MODEL__ENDPOINT__MAX_RETRIES", "0"),
    ];
    let output = chat(
        folder.path(),
        "FAULT: http500 times=always\n/exit\n",
        &environment,
    )
    .await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let trace = trace(folder.path(), &output);
    assert_eq!(
        trace["messages"][0]["content"],
        "FAULT: http500 times=always"
    );
    assert_eq!(trace["outcome"]["stop"], "user_exit");
}
