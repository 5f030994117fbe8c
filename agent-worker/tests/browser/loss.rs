//! What is behind a rollout is lost: each time an error of the infrastructure, never a blank page.

use std::path::Path;
use std::time::Instant;

use espalier_agent_worker::mcp::{McpError, McpHost, ToolOutcome, Toolbox};
use espalier_core::error::ErrorClass;
use serde_json::json;

use super::pages::{html, serve, storage_site};
use super::processes::{kill_where, parent_of, tree};
use super::{LONG, call, connect, host_of, host_with, open, snapshot, wait_until};

/// Two rollouts on one shared server, each with a page.
async fn two_on_a_page(host: &McpHost) -> (Toolbox, Toolbox, String) {
    let site = serve(storage_site).await;
    let (one, two) = (connect(host).await.unwrap(), connect(host).await.unwrap());
    for toolbox in [&one, &two] {
        open(toolbox, &format!("{site}/put/x")).await;
    }
    assert_eq!(host.process_ids().len(), 1);
    (one, two, site)
}

fn assert_lost(result: Result<ToolOutcome, McpError>) {
    let error = result.expect_err("a lost context must not look like a page");
    assert!(
        matches!(
            error,
            McpError::ContextLost { .. } | McpError::Crashed { .. }
        ),
        "{error}"
    );
    assert_eq!(error.class(), ErrorClass::Infra);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_browser_is_an_error_and_never_a_blank_page() {
    let host = host_with(json!({}));
    let (one, two, site) = two_on_a_page(&host).await;
    let before = host.process_ids();
    kill_where(&before, |line| {
        line.contains("/chromium ") && !line.contains("--type=")
    });
    let started = Instant::now();
    assert_lost(call(&one, "browser_snapshot", json!({})).await);
    assert_lost(
        call(
            &two,
            "browser_navigate",
            json!({"url": format!("{site}/show")}),
        )
        .await,
    );
    assert_lost(call(&two, "browser_snapshot", json!({})).await);
    assert!(
        two.evaluate_page("1", LONG).await.is_err(),
        "a verifier is told as well"
    );
    assert!(started.elapsed() < LONG, "{:?}", started.elapsed());

    let three = connect(&host).await.unwrap();
    assert!(
        host.process_ids().iter().any(|pid| !before.contains(pid)),
        "nobody joins a server in doubt"
    );
    open(&three, &format!("{site}/put/y")).await;
    drop((one, two));
    wait_until("the end of the doubted server", || {
        !host.process_ids().iter().any(|pid| before.contains(pid))
    })
    .await;
    open(&three, &format!("{site}/show")).await;
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_killed_in_the_middle_of_a_call_is_an_error() {
    let host = host_with(json!({}));
    let (one, two, _) = two_on_a_page(&host).await;
    let waiting = call(&one, "browser_wait_for", json!({"time": 5}));
    let killing = async {
        // The other rollout's call shows that the server has taken up the first one.
        snapshot(&two).await;
        kill_where(&host.process_ids(), |line| {
            line.contains("/chromium ") && !line.contains("--type=")
        });
    };
    let (result, ()) = tokio::join!(waiting, killing);
    // The wait itself needs no browser and may end well; the next call cannot.
    if result.is_ok() {
        assert_lost(call(&one, "browser_snapshot", json!({})).await);
    } else {
        assert_lost(result);
    }
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_page_is_an_error_and_never_a_blank_page() {
    let host = host_with(json!({}));
    let (one, two, _) = two_on_a_page(&host).await;
    kill_where(&host.process_ids(), |line| line.contains("--type=renderer"));
    assert_lost(call(&one, "browser_snapshot", json!({})).await);
    assert_lost(call(&two, "browser_tabs", json!({"action": "list"})).await);
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_playwright_of_the_users_own_is_watched_too() {
    let cli = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("playwright/node_modules/@playwright/mcp/cli.js");
    let flags = [
        "--executable-path",
        "/usr/bin/chromium",
        "--headless",
        "--isolated",
        "--no-sandbox",
    ];
    let args: Vec<&str> = [cli.to_str().unwrap()].into_iter().chain(flags).collect();
    let host = host_of(json!({"command": "node", "args": args}));
    let site = serve(storage_site).await;
    let toolbox = connect(&host).await.unwrap();
    open(&toolbox, &format!("{site}/put/x")).await;
    assert_eq!(
        toolbox.evaluate_page("localStorage.m", LONG).await.unwrap(),
        Ok(json!("x"))
    );
    kill_where(&host.process_ids(), |line| {
        line.contains("/chromium ") && !line.contains("--type=")
    });
    assert_lost(call(&toolbox, "browser_snapshot", json!({})).await);
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_an_error_and_takes_its_browser_along() {
    for isolation in ["shared", "process"] {
        let host = host_with(json!({"isolation": isolation}));
        let toolbox = connect(&host).await.unwrap();
        let processes = tree(&host.process_ids());
        kill_where(&host.process_ids(), |line| line.contains("cli.js"));
        let error = call(&toolbox, "browser_snapshot", json!({}))
            .await
            .unwrap_err();
        assert!(
            matches!(error, McpError::Crashed { .. }),
            "{isolation}: {error}"
        );
        wait_until("the end of the browser", || {
            !processes.iter().any(|pid| parent_of(*pid).is_some())
        })
        .await;
        assert!(host.shutdown(LONG).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_an_error_at_the_deadline() {
    let host = host_with(json!({"call_timeout_s": 1}));
    let toolbox = connect(&host).await.unwrap();
    let node = rustix::process::Pid::from_raw(host.process_ids()[0]).unwrap();
    rustix::process::kill_process(node, rustix::process::Signal::STOP).unwrap();
    let error = call(&toolbox, "browser_snapshot", json!({}))
        .await
        .unwrap_err();
    assert!(matches!(error, McpError::Deadline { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(host.shutdown(LONG).await, "even a stopped server ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_hangs_the_tools_costs_a_call_and_not_the_attempt() {
    let site = serve(|_, uri| match uri.as_str() {
        "/hang" => html("<button onclick='for (;;) {}'>hang</button>"),
        _ => html("well"),
    })
    .await;
    let host = host_with(json!({"call_timeout_s": 7}));
    let toolbox = connect(&host).await.unwrap();
    open(&toolbox, &format!("{site}/hang")).await;
    let clicked = call(&toolbox, "browser_click", json!({"target": "button"}))
        .await
        .unwrap();
    let shown = call(&toolbox, "browser_snapshot", json!({})).await.unwrap();
    assert!(
        clicked.is_error || shown.is_error,
        "{} {}",
        clicked.text,
        shown.text
    );
    assert!(host.shutdown(LONG).await);
}
