//! The practice tasks in real browsers: Chromium behind the real Playwright MCP server.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_practice::site;
use espalier_practice::tasks::{self, Split};
use espalier_proto::v1::JobState;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_tests::harness::client::BatchResult;
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::up::Up;
use espalier_tests::harness::{model, wait_for};
use espalier_tests::scripted_model::Config;
use serde_json::{Value, json};
use tokio::net::TcpListener;

const SEED: u64 = 7;
const DEADLINE: Duration = Duration::from_secs(200);

fn browser() -> Value {
    json!({"mcpServers": {"browser": {"preset": "playwright"}}})
}

/// Serves the practice site and gives `count` of its tasks.
async fn practice(count: usize) -> Vec<Value> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let site = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    let server = site::serve(listener, SEED, std::future::pending());
    Tasks::new(Shutdown::new()).spawn("practice_site", OnFailure::Log, server);
    let lines = tasks::generate(SEED, count, Split::Train);
    let fill =
        |line: &Value| serde_json::from_str(&line.to_string().replace("${site}", &site)).unwrap();
    lines.iter().map(fill).collect()
}

fn unsolved(result: &BatchResult) -> BTreeMap<&str, (String, String)> {
    let reason = |job: &espalier_proto::v1::Job| {
        let summary = job.summary.clone().unwrap_or_default();
        let error = job.last_error.clone().unwrap_or_default();
        (
            format!("{:?} {}", job.state(), summary.stop),
            format!("{} {}", summary.reason, error.message),
        )
    };
    let bad = result
        .jobs
        .values()
        .filter(|job| job.summary.as_ref().and_then(|s| s.reward) != Some(1.0));
    bad.map(|job| (job.id.as_str(), reason(job))).collect()
}

#[tokio::test]
async fn every_kind_of_practice_task_can_be_solved() {
    let up = Up::start(&browser(), &model::start().await, &["--slots", "4"]).await;
    let mut client = up.client().await;
    let tasks = practice(18).await;
    assert_eq!(client.submit("b", &tasks).await.accepted, 18);
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 18, "{:#?}", unsolved(&result));
    let kinds: std::collections::BTreeSet<_> = tasks
        .iter()
        .map(|task| task["task_kind"].to_string())
        .collect();
    assert!(kinds.len() >= 6, "{kinds:?}");
    let id = tasks[0]["id"].as_str().unwrap();
    let trace = client.trace("b", id).await;
    assert!(
        trace
            .header
            .provenance
            .browser
            .as_deref()
            .is_some_and(|b| b.contains("1")),
        "{:?}",
        trace.header.provenance
    );
    assert!(trace.outcome.final_url.is_some());
}

#[tokio::test]
async fn mistakes_are_survived_or_judged_and_nothing_is_lost() {
    let url = model::start_with(Config {
        seed: SEED,
        mistakes: 0.3,
        think_ms: 0,
    })
    .await;
    let mut up = Up::start(&browser(), &url, &["--slots", "4"]).await;
    let mut client = up.client().await;
    let tasks = practice(16).await;
    client.submit("b", &tasks).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        16,
        "{:#?}",
        unsolved(&result)
    );
    let errors: u32 = result
        .jobs
        .values()
        .map(|job| job.summary.as_ref().unwrap().tool_errors)
        .sum();
    assert!(
        errors > 0,
        "the model made no mistake, so this test shows nothing"
    );
    assert!(
        result.solved() >= 8,
        "{} solved: {:#?}",
        result.solved(),
        unsolved(&result)
    );
    assert!(
        up.process
            .terminate(Duration::from_secs(60))
            .await
            .success()
    );
    up.wait_until_gone(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn kill_9_in_the_middle_of_16_browser_rollouts_loses_nothing_and_leaves_nothing() {
    let mut up = Up::start(
        &browser(),
        &model::start().await,
        &["--slots", "8", "--lease-ttl-s", "4"],
    )
    .await;
    let mut client = up.client().await;
    let tasks = practice(16).await;
    client.submit("b", &tasks).await;
    wait_for("browsers to work", Duration::from_secs(60), || async {
        let browsers = up
            .processes()
            .into_iter()
            .filter(|(_, line)| line.contains("chromium"))
            .count();
        if browsers > 2 { Ok(()) } else { Err(browsers) }
    })
    .await;
    up.process.kill();
    up.wait_until_gone(Duration::from_secs(10)).await;
    up.restart().await;
    let result = up.client().await.wait("b", DEADLINE).await;
    assert_eq!(
        (result.jobs.len(), result.solved()),
        (16, 16),
        "{:#?}",
        unsolved(&result)
    );
}

#[tokio::test]
async fn a_browser_that_crashes_costs_infrastructure_and_no_blank_page_is_judged() {
    let up = Up::start(
        &browser(),
        &model::start_with(Config {
            seed: SEED,
            mistakes: 0.0,
            think_ms: 300,
        })
        .await,
        &["--slots", "4"],
    )
    .await;
    let mut client = up.client().await;
    let tasks = practice(8).await;
    client.submit("b", &tasks).await;
    // Once one rollout has ended, the others are under way.
    wait_for("a rollout to end", Duration::from_secs(60), || {
        let mut api = client.jobs.clone();
        async move {
            let request = espalier_proto::v1::GetBatchRequest { batch: "b".into() };
            let counts = api
                .get_batch(request)
                .await
                .unwrap()
                .into_inner()
                .counts
                .unwrap();
            if counts.succeeded > 0 {
                Ok(())
            } else {
                Err(counts)
            }
        }
    })
    .await;
    let pid = wait_for("a browser to work", Duration::from_secs(60), || async {
        let lines = up.processes();
        // The browser itself is the one that is no helper of another.
        let main = lines
            .iter()
            .find(|(_, line)| line.contains("chromium") && !line.contains("--type="));
        main.map(|(pid, _)| *pid).ok_or(lines.len())
    })
    .await;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 8, "{:#?}", unsolved(&result));
    let failures: u32 = result.jobs.values().map(|job| job.infra_failures).sum();
    assert!(failures > 0, "the crash was not noticed");
    assert!(
        result.jobs.values().all(|job| job.handler_failures == 0),
        "a crash is not the handler's fault"
    );
}
