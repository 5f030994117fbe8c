//! The guide to a first adapter (`docs/guides/first-adapter.md`) holds: its server, which is of MCP's Python SDK, answers what its
//! questions expect, and its pipeline is one.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use espalier_core::chat::Message;
use espalier_tests::harness::model;
use espalier_tests::harness::process::binary;
use espalier_tests::harness::up::Up;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn example(file: &str) -> PathBuf {
    root().join("examples/first-adapter").join(file)
}

fn questions() -> Vec<Value> {
    let text = std::fs::read_to_string(example("tasks.jsonl")).unwrap();
    let questions = text.lines().map(|line| serde_json::from_str(line).unwrap());
    questions.collect()
}

/// A machine with that server, whose Python is the one of the tests.
async fn start() -> Up {
    let text = std::fs::read_to_string(example("mcp.json")).unwrap();
    let mut servers: Value = serde_json::from_str(&text).unwrap();
    let python = root().join("target/venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run `make setup-test`",
        python.display()
    );
    let server = &mut servers["mcpServers"]["stockroom"];
    assert_eq!(server["command"], "python3");
    server["command"] = json!(python);
    server["cwd"] = json!(example(""));
    Up::start(&servers, &model::start().await, &[]).await
}

#[tokio::test]
async fn the_stockroom_says_what_the_questions_expect() {
    let up = start().await;
    let mut client = up.client().await;
    let questions = questions();
    let ask = |question: &Value| {
        let part = question["id"].as_str().unwrap().replace('-', " ");
        let steps = json!([
            {"tool": "find_parts", "arguments": {"text": part}},
            {"tool": "shelf", "arguments": {"part": part}},
            {"answer": "{{last}}"},
        ]);
        json!({"id": question["id"], "prompt": format!("SCRIPT: {steps}"), "mcp": ["stockroom"]})
    };
    let jobs: Vec<Value> = questions.iter().map(ask).collect();
    let answer = client.submit("parts", &jobs).await;
    assert!(answer.rejected.is_empty(), "{:?}", answer.rejected);
    client.wait("parts", DEADLINE).await;
    for question in questions {
        let trace = client
            .trace("parts", question["id"].as_str().unwrap())
            .await;
        let said = trace.messages.last().map(Message::content).unwrap();
        let shelf: Value = serde_json::from_str(said).unwrap_or_else(|_| panic!("{said}"));
        let count = |name: &str| shelf[name].as_u64().unwrap();
        let sellable = (count("boxes") - count("promised_boxes")) * count("pieces_per_box");
        assert_eq!(
            question["verify"]["answer"]["number"], sellable,
            "{question}"
        );
    }
}

#[tokio::test]
async fn its_pipeline_is_whole_and_shown_in_the_guide_as_it_is() {
    let up = start().await;
    let plan = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(binary("espalier"));
        command.arg("run").arg(example("improve.toml"));
        command.arg("--dry-run").arg("--data-dir");
        command.arg(up.folder.path().join("data"));
        command.output().unwrap()
    });
    let plan = plan.await.unwrap();
    let shown = String::from_utf8(plan.stdout).unwrap();
    let why = String::from_utf8_lossy(&plan.stderr);
    assert!(plan.status.success(), "{shown}{why}");
    let guide = std::fs::read_to_string(root().join("docs/guides/first-adapter.md")).unwrap();
    assert!(guide.contains(shown.trim()), "{shown}");
    let file = std::fs::read_to_string(example("improve.toml")).unwrap();
    for line in file.lines().filter(|line| !line.starts_with('#')) {
        assert!(guide.contains(line), "the guide does not have {line:?}");
    }
}
