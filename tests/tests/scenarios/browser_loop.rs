//! The closed loop with a real model: sapling learns in real browsers what no page tells, from rollouts with hints, and is
//! measured without them on tasks that it never saw. A shorter run of what `make demo` does.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::Command;

use espalier_core::compare::Report;
use espalier_practice::tasks::{Kind, Split, generate_of};
use espalier_tests::harness::practice::{self, browser_servers};
use espalier_tests::harness::process::binary;
use espalier_tests::harness::up::Up;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A site whose ways are not those that sapling tries without being told.
const SEED: u64 = 3;
/// Kinds that a page tells how to do, and that sapling knows.
const KNOWN: [Kind; 3] = [Kind::ShopPrice, Kind::Login, Kind::SlowPage];

fn tasks(split: Split, depot: usize, known: usize) -> String {
    let mut tasks = generate_of(&Kind::DEPOT, SEED, depot, split);
    for (n, mut task) in generate_of(&KNOWN, SEED, known, split)
        .into_iter()
        .enumerate()
    {
        task["id"] = json!(format!("known-{n}"));
        tasks.push(task);
    }
    tasks.iter().map(|task| format!("{task}\n")).collect()
}

#[tokio::test]
async fn a_small_model_learns_what_hints_told_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let site = format!("site={}", practice::serve(SEED).await);
    let folder = TempDir::new().unwrap();
    let improve = folder.path().join("improve.toml");
    let file = root.join("examples/sapling/improve.toml");
    std::fs::copy(file, &improve).unwrap();
    std::fs::write(
        folder.path().join("train.jsonl"),
        tasks(Split::Train, 42, 8),
    )
    .unwrap();
    std::fs::write(folder.path().join("eval.jsonl"), tasks(Split::Eval, 24, 8)).unwrap();
    let model = Path::new("examples/sapling/model");
    let data = TempDir::new().unwrap();
    let mut up = Up::spawn_serving(data, &browser_servers(), model, &["--slots", "4"]);
    up.wait_until_ready().await;

    let mut command = Command::new(binary("espalier"));
    command
        .arg("run")
        .arg(&improve)
        .args(["--var", &site, "--json"]);
    command.arg("--out").arg(folder.path().join("report"));
    command.arg("--data-dir").arg(up.folder.path().join("data"));
    // Its model's folder is named from the root of the tree.
    command.current_dir(&root);
    let run = tokio::task::spawn_blocking(move || command.output());
    let run = run.await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert!(
        run.status.success(),
        "{said} {}",
        String::from_utf8_lossy(&run.stderr)
    );
    assert_eq!(last["report"]["published"], "depot@v1", "{last:#}");

    // There is something to learn from only where hints help, in browsers too.
    let counts = &step(&last["report"], "rollouts")["counts"];
    let of = |field: &str| counts[field].as_f64().unwrap();
    assert!(of("solved") >= 0.7 * of("judged"), "{counts}");

    let report = comparison(&up, &last["report"]);
    let kinds = &report.comparison.kinds;
    let rise = |kind: &Kind| kinds[kind.as_str()].difference.value;
    for kind in Kind::DEPOT {
        let success = &kinds[kind.as_str()].success;
        assert!(success.before.value <= 0.3, "{kind:?}: {success:?}");
        assert!(success.after.value >= 0.6, "{kind:?}: {success:?}");
    }
    let fall: f64 = KNOWN.iter().map(rise).sum::<f64>() / KNOWN.len() as f64;
    assert!(fall > -0.2, "{kinds:#?}");
    assert!(report.gate.passed && report.comparison.pooled.difference.low > 0.3);
}

/// The report that the pipeline's comparison left in the store.
fn comparison(up: &Up, report: &Value) -> Report {
    let output = &step(report, "comparison")["output"];
    let path = output["report"].as_str().unwrap();
    let bytes = std::fs::read(up.store_folder().join(path)).unwrap();
    Report::parse(&bytes).unwrap()
}

/// What a step of the only round came to.
fn step<'a>(report: &'a Value, name: &str) -> &'a Value {
    let steps = report["steps"].as_array().unwrap();
    steps.iter().find(|step| step["step"] == name).unwrap()
}
