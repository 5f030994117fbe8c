//! What `deploy/compose.yaml` describes, as processes of this machine: `deploy/local.py` reads the file and runs the same
//! programs with the same options, and the guide's own words submit to them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use espalier_tests::harness::process::{Process, binary};

/// Long enough for two busy cores: eight programs and five rollouts of a small model in browsers.
const DEADLINE: Duration = Duration::from_secs(240);
/// What the guide submits, and the workers as an operator sees them.
const COMMANDS: &str = r#"
"$0/espalier" submit deploy/shop.toml --var site=$SITE --batch shop --watch || exit 1
ESPALIER_TOKEN=$OPERATOR_TOKEN "$0/espalier" workers --json
"#;

#[tokio::test]
async fn what_compose_describes_runs_as_processes_and_solves_what_the_guide_submits() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let venv = root.join("target/venv/bin");
    let espalier = binary("espalier");
    let folder = tempfile::TempDir::new().unwrap();
    let mut command = Command::new(venv.join("python"));
    command.current_dir(&root).arg("deploy/local.py");
    command.args(["--scale", "agent-worker=2"]);
    command
        .arg(espalier.parent().unwrap())
        .arg(venv.join("weed"));
    command.arg(folder.path().join("data"));
    command.args(["--", "bash", "-c", COMMANDS]);
    command.arg(espalier.parent().unwrap());
    let mut topology = Process::start("compose", command, folder.path());
    let status = topology.wait(DEADLINE).await;
    let said = topology.log();
    assert!(status.success(), "{said}");
    let table = said.lines().find(|line| line.contains("shop_price  "));
    let cells: Vec<&str> = table.unwrap().split_whitespace().collect();
    assert_eq!(
        cells[1..5],
        ["5", "5", "0", "0"],
        "jobs, solved, failed, dead: {said}"
    );
    let kind = |kind: &str| said.matches(&format!("\"{kind}\"")).count();
    assert!(
        kind("rollout") >= 2 && kind("generate") >= 1 && kind("train") >= 1,
        "{said}"
    );
}
