//! What `deploy/compose.yaml` describes, as processes of this machine: `deploy/local.py` reads the file and runs the same
//! programs with the same options, and the guide's own words submit to them.

use std::path::Path;
use std::time::Duration;

use espalier_tests::harness::guide::{blocks, shell};
use espalier_tests::harness::process::{Process, binary};

/// Long enough for two busy cores: eight programs and five rollouts of a small model in browsers.
const DEADLINE: Duration = Duration::from_secs(240);
/// Also asked for at the end: the workers as an operator sees them.
const WORKERS: &str = " && ESPALIER_TOKEN=$OPERATOR_TOKEN espalier workers --json";

#[tokio::test]
async fn what_compose_describes_runs_as_processes_and_solves_what_the_guide_submits() {
    let folder = tempfile::TempDir::new().unwrap();
    let data = folder.path().join("data");
    let espalier = binary("espalier");
    let binaries = espalier.parent().unwrap();
    let guide = blocks("compose", "sh").pop().unwrap();
    let is_there_already = |line: &&str| line.starts_with("make ") || line.starts_with("cargo ");
    let commands: Vec<&str> = guide.lines().skip_while(is_there_already).collect();
    let commands = commands
        .join("\n")
        .replace("target/release", &binaries.display().to_string())
        .replace("/tmp/espalier", &data.display().to_string())
        .replace("--watch'", &format!("--watch{WORKERS}'"));
    assert!(commands.contains(WORKERS), "{commands}");
    let mut command = shell(&commands);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
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
