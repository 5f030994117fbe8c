//! `espalier bench redis` measures what it says: real processes, exact delivery. Nothing here looks at the figures.

use std::process::Command;

use espalier_tests::harness::process::binary;
use serde_json::Value;

#[tokio::test]
async fn the_measurements_of_the_queue_in_redis_come_to_their_ends() {
    let mut command = Command::new(binary("espalier"));
    command
        .args(["bench", "redis", "--json", "--coordinator"])
        .arg(binary("espalier-coordinator"))
        .args(["--jobs", "500", "--workers", "2", "--credit", "64"])
        .args(["--rate", "50", "--seconds", "1", "--backlog", "1000"]);
    for part in ["cycle", "dispatch", "tenants", "cancel", "memory"] {
        command.args(["--only", part]);
    }
    let run = move || command.output().expect("espalier starts");
    let output = tokio::task::spawn_blocking(run).await.expect("no panic");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a line of JSON");
    let figures = &report["figures"];
    for coordinators in ["one_coordinator", "two_coordinators"] {
        let rounds = figures["cycle"][coordinators]["rounds"].as_array();
        for round in rounds.expect("rounds") {
            assert_eq!(round["delivery"]["accepted_once"], 500, "{round}");
            assert_eq!(round["delivery"]["granted_again"], 0, "{round}");
        }
    }
    assert_eq!(figures["tenants"]["delivery"]["accepted_once"], 6_000);
    for (part, figure) in [
        ("dispatch", "p99_ms"),
        ("cancel", "worst_ms"),
        ("memory", "bytes_a_job"),
    ] {
        let value = figures[part][figure].as_f64().unwrap_or_default();
        assert!(value > 0.0, "{figures}");
    }
}
