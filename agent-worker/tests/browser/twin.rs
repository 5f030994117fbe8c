//! The twin of the practice site shows what a real browser shows, byte for byte, and sapling's lessons list the tools that a
//! rollout lists.

use std::time::Duration;

use espalier_agent_worker::mcp::McpHost;
use espalier_agent_worker::observe::shape;
use espalier_core::spec::{Observation, ToolPolicy};
use espalier_practice::route::SLOW_DELAY_MS;
use espalier_practice::site;
use espalier_practice::tasks::Kind;
use espalier_practice::teacher::{Act, TAUGHT, episode};
use espalier_practice::world::World;
use espalier_qwen3_text::Tokenizer;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{LONG, connect_as, host_with};

/// Sites that together have every way to a parcel.
const SEEDS: [u64; 6] = [7, 8, 9, 10, 11, 12];
/// Tasks of each kind on each site.
const TASKS: usize = 3;

/// What the lessons list.
const TOOLS: &str = include_str!("../../../examples/sapling/tools.json");

/// As the demonstration's tasks ask for tools.
fn policy() -> ToolPolicy {
    ToolPolicy {
        allow: ["browser_navigate", "browser_click", "browser_type"]
            .map(String::from)
            .into(),
        brief: Some(true),
        snapshots: Some("inline".into()),
        ..ToolPolicy::default()
    }
}

/// A result as the model is shown it.
fn shown(text: &str) -> String {
    let tokenizer = Tokenizer::shared().unwrap();
    shape(text, Observation::CompactTokens(4096), tokenizer).text
}

/// Does some tasks of a kind in a browser; how many pages it compared.
async fn compare(host: &McpHost, world: &World, kind: Kind, origin: &str) -> usize {
    // Each report takes over a second to come.
    let tasks = if kind == Kind::SlowPage { 1 } else { TASKS };
    let mut pages = 0;
    for task in kind.tasks(world).iter().take(tasks) {
        let toolbox = connect_as(host, &policy()).await.unwrap();
        for turn in episode(world, task, origin).unwrap().turns {
            let Act::Call {
                tool,
                arguments,
                result,
            } = turn.act
            else {
                continue;
            };
            let limit = Duration::from_millis(SLOW_DELAY_MS) + LONG;
            let answered = toolbox.call(tool, arguments, limit).await.unwrap();
            assert!(!answered.is_error, "{}", answered.text);
            assert_eq!(
                shown(&answered.text),
                shown(&result),
                "{tool} for {}",
                task.key()
            );
            pages += 1;
        }
        toolbox.close().await;
    }
    pages
}

#[tokio::test(flavor = "multi_thread")]
async fn the_twin_shows_what_browsers_show() {
    let host = host_with(json!({}));
    let mut pages = 0;
    for seed in SEEDS {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("http://localhost:{}", listener.local_addr().unwrap().port());
        let serving = site::serve(listener, seed, std::future::pending());
        let world = World::new(seed);
        let all = TAUGHT.map(|kind| compare(&host, &world, kind, &origin));
        tokio::select! {
            ended = serving => panic!("the site ended: {ended:?}"),
            compared = futures::future::join_all(all) => pages += compared.iter().sum::<usize>(),
        }
    }
    assert!(pages >= 200, "{pages}");
    let toolbox = connect_as(&host, &policy()).await.unwrap();
    let listed: Vec<Value> = toolbox.tools().iter().map(|tool| json!(tool.def)).collect();
    let lessons: Vec<Value> = serde_json::from_str(TOOLS).unwrap();
    assert_eq!(listed, lessons);
    toolbox.close().await;
    assert!(host.shutdown(LONG).await);
}
