//! The client in another language: `examples/python/submit.py`, run as a user runs it.

use std::path::Path;
use std::process::Command;

use espalier_tests::harness::model;
use espalier_tests::harness::up::{Up, toy_servers};

#[tokio::test]
async fn the_python_client_submits_watches_and_fetches_a_trace() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join("target/venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run `make setup-test`",
        python.display()
    );
    let up = Up::start(&toy_servers(), &model::start().await, &[]).await;
    let file = up.file();
    let prompt = r#"SCRIPT: [{"tool": "add", "arguments": {"a": 20, "b": 22}}, {"answer": "it is {{last}}"}]"#;
    let mut command = Command::new(python);
    command
        .arg(root.join("examples/python/submit.py"))
        .args(["--mcp", "toy", "--prompt", prompt]);
    command.args([
        "--contains",
        "42",
        "--samples",
        "3",
        "--batch",
        "from-python",
    ]);
    command
        .env("ESPALIER_URL", &file.url)
        .env("ESPALIER_TOKEN", &file.token);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for line in [
        "sample-0: succeeded, reward 1.0, 2 turns",
        "sample-2: succeeded",
        "4 messages",
        "it is 42",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}
