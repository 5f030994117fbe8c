//! The practice site in the test's own process, its tasks, and the MCP servers that browse it.

use espalier_practice::site;
use espalier_practice::tasks::{self, Split};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// What the site and its tasks are made from.
pub const SEED: u64 = 7;

/// The pinned Playwright MCP server as `browser`, as an `mcpServers` file.
pub fn browser_servers() -> Value {
    json!({"mcpServers": {"browser": {"preset": "playwright"}}})
}

/// Serves the practice site of a seed and gives its address. The site ends with the test's runtime.
pub async fn serve(seed: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("a bound port").port();
    let server = site::serve(listener, seed, std::future::pending());
    Tasks::new(Shutdown::new()).spawn("practice_site", OnFailure::Log, server);
    format!("http://localhost:{port}")
}

/// Serves the practice site and gives `count` of its tasks.
pub async fn start(count: usize) -> Vec<Value> {
    let site = serve(SEED).await;
    let lines = tasks::generate(SEED, count, Split::Train);
    let fill = |line: &Value| {
        let filled = line.to_string().replace("${site}", &site);
        serde_json::from_str(&filled).expect("an address keeps a task JSON")
    };
    lines.iter().map(fill).collect()
}
