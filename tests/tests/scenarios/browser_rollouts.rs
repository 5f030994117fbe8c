//! The practice tasks in real browsers: Chromium behind the real Playwright MCP server.

use std::process::Command;
use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::practice::{self, SEED, browser_servers};
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::up::Up;
use espalier_tests::harness::{model, wait_for};
use espalier_tests::scripted_model::Config;

const DEADLINE: Duration = Duration::from_secs(200);

/// The version of the machine's browser, as it says itself: `Chromium 140.0.7339.80 built on …`.
fn chromium_version() -> String {
    let output = Command::new("chromium").arg("--version").output();
    let text = String::from_utf8_lossy(&output.expect("chromium is installed").stdout).into_owned();
    let version = text.split(' ').find(|word| word.matches('.').count() == 3);
    version
        .unwrap_or_else(|| panic!("no version in {text:?}"))
        .to_owned()
}

#[tokio::test]
async fn every_kind_of_practice_task_can_be_solved() {
    let up = Up::start(&browser_servers(), &model::start().await, &["--slots", "4"]).await;
    let mut client = up.client().await;
    let tasks = practice::start(18).await;
    assert_eq!(client.submit("b", &tasks).await.accepted, 18);
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 18, "{:#?}", result.unsolved());
    let kinds: std::collections::BTreeSet<_> = tasks
        .iter()
        .map(|task| task["task_kind"].to_string())
        .collect();
    assert!(kinds.len() >= 6, "{kinds:?}");
    let id = tasks[0]["id"].as_str().unwrap();
    let trace = client.trace("b", id).await;
    let browser = trace.header.provenance.browser.expect("a browser was used");
    let version = chromium_version();
    assert!(browser.contains(&version), "{browser:?} is not {version}");
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
    let mut up = Up::start(&browser_servers(), &url, &["--slots", "4"]).await;
    let mut client = up.client().await;
    let tasks = practice::start(16).await;
    client.submit("b", &tasks).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        16,
        "{:#?}",
        result.unsolved()
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
        result.unsolved()
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
        &browser_servers(),
        &model::start().await,
        &["--slots", "8", "--lease-ttl-s", "4"],
    )
    .await;
    let mut client = up.client().await;
    let tasks = practice::start(16).await;
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
        result.unsolved()
    );
}

#[tokio::test]
async fn a_browser_that_crashes_costs_infrastructure_and_no_blank_page_is_judged() {
    let up = Up::start(
        &browser_servers(),
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
    let tasks = practice::start(8).await;
    client.submit("b", &tasks).await;
    // Once one rollout has ended, the others are under way.
    client
        .wait_until_succeeded("b", 1, Duration::from_secs(60))
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
    assert_eq!(result.solved(), 8, "{:#?}", result.unsolved());
    let failures: u32 = result.jobs.values().map(|job| job.infra_failures).sum();
    assert!(failures > 0, "the crash was not noticed");
    assert!(
        result.jobs.values().all(|job| job.handler_failures == 0),
        "a crash is not the handler's fault"
    );
}
