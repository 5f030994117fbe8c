//! The twin of the practice site shows what a real browser shows, byte for byte.

use std::time::Duration;

use espalier_agent_worker::mcp::McpHost;
use espalier_agent_worker::observe::shape;
use espalier_core::spec::Observation;
use espalier_practice::route::SLOW_DELAY_MS;
use espalier_practice::site;
use espalier_practice::tasks::Kind;
use espalier_practice::teacher::{Act, TAUGHT, episode};
use espalier_practice::world::World;
use espalier_qwen3_text::Tokenizer;
use serde_json::json;
use tokio::net::TcpListener;

use super::{LONG, connect, host_with, snapshot};

/// Sites that together have every way to a parcel.
const SEEDS: [u64; 6] = [7, 8, 9, 10, 11, 12];
/// Tasks of each kind on each site.
const TASKS: usize = 3;

/// A result as the model is shown it. What an action shows lies in a file, so that a snapshot stands for it.
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
        let toolbox = connect(host).await.unwrap();
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
            let seen = shown(&snapshot(&toolbox).await);
            assert_eq!(seen, shown(&result), "{tool} for {}", task.key());
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
    assert!(host.shutdown(LONG).await);
}
