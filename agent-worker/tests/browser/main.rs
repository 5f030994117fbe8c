//! The MCP host with real browsers: isolation between rollouts, the loss of what is behind a rollout, and what stays
//! behind. Needs Chromium and `npm ci` in `agent-worker/playwright`; without them these tests fail and name the fix.

#![expect(
    clippy::unwrap_used,
    reason = "the pages and processes are part of the tests"
)]

mod ending;
mod figures;
mod isolation;
mod loss;
mod pages;
mod processes;
mod shown;
mod twin;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use espalier_agent_worker::mcp::{
    McpConfig, McpError, McpHost, McpHostConfig, ToolOutcome, Toolbox,
};
use espalier_core::id::ProjectId;
use espalier_core::spec::{McpUse, ToolPolicy};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::Tasks;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(30);

fn host_with(espalier: Value) -> McpHost {
    host_of(json!({"preset": "playwright", "espalier": espalier}))
}

fn host_of(browser: Value) -> McpHost {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("playwright");
    let setup = "run `make setup` first";
    assert!(
        dir.join("node_modules/@playwright/mcp/cli.js").exists(),
        "no Playwright MCP in {dir:?}: {setup}"
    );
    assert!(
        Path::new("/usr/bin/chromium").exists(),
        "no /usr/bin/chromium: {setup}"
    );
    let file = json!({"mcpServers": {"browser": browser}});
    let env: BTreeMap<String, String> = std::env::vars().collect();
    McpHost::new(McpHostConfig {
        servers: McpConfig::parse(&file.to_string(), &env).unwrap(),
        allow_inline: false,
        playwright_dir: Some(dir),
        temp_dir: std::env::temp_dir(),
        env,
        tasks: Tasks::new(Shutdown::new()),
    })
    .unwrap()
}

async fn connect(host: &McpHost) -> Result<Toolbox, McpError> {
    connect_as(host, &ToolPolicy::default()).await
}

async fn connect_as(host: &McpHost, policy: &ToolPolicy) -> Result<Toolbox, McpError> {
    let uses = [McpUse::Named("browser".into())];
    let project = ProjectId::new("p").unwrap();
    host.connect(&project, "r", &uses, policy, CancellationToken::new())
        .await
}

async fn call(toolbox: &Toolbox, name: &str, arguments: Value) -> Result<ToolOutcome, McpError> {
    let arguments: Map<String, Value> = arguments.as_object().cloned().unwrap();
    toolbox.call(name, arguments, LONG).await
}

async fn open(toolbox: &Toolbox, url: &str) {
    let opened = call(toolbox, "browser_navigate", json!({"url": url}))
        .await
        .unwrap();
    assert!(!opened.is_error, "{}", opened.text);
}

async fn snapshot(toolbox: &Toolbox) -> String {
    call(toolbox, "browser_snapshot", json!({}))
        .await
        .unwrap()
        .text
}

/// Waits until `done`, and says what was waited for if it does not come.
async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {LONG:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
