//! Two models of different skill try the same tasks: real coordinator, real worker, the commands that people use, up to the
//! version that becomes `latest` because of it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use espalier_core::compare::{Bucket, GateReason, Report, Side};
use espalier_core::trace::sha256_hex;
use espalier_proto::v1::JobState;
use espalier_qwen3::ContentDigest;
use espalier_runtime::model::ADAPTER_FINGERPRINT;
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::model::{self, sum_job};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
/// It errs in most turns.
const CARELESS: &str = "scripted:0.8";
const CAREFUL: &str = "scripted:0";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../crates/qwen3/tests/golden")
        .join(name)
}

/// A model that errs nowhere, and answers as this adapter does.
fn careful_as(adapter: &str) -> String {
    let read = |file: &str| std::fs::read(golden(adapter).join(file)).unwrap();
    let digest = ContentDigest::of_settings(&read("adapter_config.json")).unwrap();
    let digest = digest.update(&read("adapter_model.safetensors")).finish();
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{ADAPTER_FINGERPRINT}{digest}:0")
}

/// Tasks of two kinds, each with a number of its own. Every third one is for training.
fn tasks(count: usize) -> Vec<Value> {
    let one = |n: usize| {
        let mut job = sum_job(&format!("sum-{n:02}"), n);
        job["task_kind"] = json!(if n.is_multiple_of(2) { "even" } else { "odd" });
        job["split"] = json!(if n % 3 == 2 { "train" } else { "eval" });
        job["hints"] = json!("Add one.");
        job
    };
    (0..count).map(one).collect()
}

fn write(path: &Path, tasks: &[Value], more: &str) {
    let lines: Vec<String> = tasks.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n") + more).unwrap();
}

/// The last line of what a command printed.
fn last(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| {
        panic!(
            "{error}: {text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

async fn evaluate(cluster: &Cluster, tasks: &Path, models: [&str; 2], more: &[&str]) -> Output {
    let [before, after] = models;
    let tasks = tasks.to_str().unwrap();
    let words = [
        "evaluate", "--model", before, "--model", after, "--tasks", tasks,
    ];
    cluster.espalier(&[&words, more].concat()).await
}

#[tokio::test]
async fn the_better_model_is_told_apart_and_becomes_latest() {
    let cluster = Cluster::start(&model::start().await, 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let folder = cluster.folder.path();
    let careful = careful_as("lora-rslora");
    let (file, out) = (folder.join("tasks.jsonl"), folder.join("report"));
    write(
        &file,
        &tasks(18),
        "\nnot JSON\n{\"id\":\"x\",\"promt\":\"y\",\"split\":\"eval\"}\n",
    );
    let more = [
        "--split",
        "eval",
        "--samples",
        "2",
        "--label",
        "careless",
        "--label",
        "careful",
        "--adapter",
        "shop@v2",
        "--price",
        "1,2",
        "--min-tasks",
        "10",
        "--batch",
        "e",
        "--json",
        "--gate",
        "--out",
    ];
    let more = [&more[..], &[out.to_str().unwrap()]].concat();
    let output = evaluate(&cluster, &file, [CARELESS, &careful], &more).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "two lines are bad: {said}");
    let first: Value =
        serde_json::from_slice(output.stdout.split(|b| *b == b'\n').next().unwrap()).unwrap();
    let places: Vec<&Value> = first["refusals"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| &r["place"])
        .collect();
    assert_eq!(
        (places, &first["rollouts"], &first["skipped_tasks"]),
        (vec![&json!(19), &json!(20)], &json!(48), &json!(6))
    );

    let told = last(&output)["evaluation"].clone();
    let bytes = std::fs::read(out.join("report.json")).unwrap();
    assert_eq!(told["report_sha256"], sha256_hex(&bytes));
    let report = Report::parse(&bytes).unwrap();
    let pooled = &report.comparison.pooled;
    assert_eq!((pooled.tasks, pooled.pairs), (12, 24));
    assert_eq!(pooled.success.after.value, 1.0, "{report:?}");
    assert!(
        pooled.difference.low > 0.0 && pooled.lost == 0 && pooled.gained > 6,
        "{pooled:?}"
    );
    assert!(
        pooled.invalid_calls.before > 0.0 && pooled.invalid_calls.after == 0.0,
        "{pooled:?}"
    );
    assert!(pooled.cost_per_solved.before > pooled.cost_per_solved.after);
    assert_eq!(
        report.comparison.kinds.keys().collect::<Vec<_>>(),
        ["even", "odd"]
    );
    assert_eq!(
        report
            .comparison
            .difficulty
            .count(Side::After, Bucket::Always),
        12
    );
    assert_eq!((report.sources.len(), report.shown.len()), (48, 10));
    assert!(
        report
            .shown
            .iter()
            .all(|pair| !pair.solved.before && pair.solved.after),
        "{:?}",
        report.shown
    );
    assert!(report.gate.passed, "{:?}", report.gate);
    assert_eq!(report.arms.after.adapter.as_deref(), Some("shop@v2"));

    let [page, text] =
        ["report.html", "report.md"].map(|name| std::fs::read_to_string(out.join(name)).unwrap());
    assert!(page.matches("<svg").count() == 3 && page.matches("<details>").count() == 11);
    assert!(
        !page.contains("<script") && text.contains("# careless and careful"),
        "{text}"
    );
    let manifest = cluster.manifest(&cluster.key("e", "compare"));
    assert_eq!(
        manifest.parents,
        ["default/batches/e/", "default/adapters/shop/v2.json"]
    );
    let key = cluster.key("e", "a.sum-00.s0");
    let bytes =
        std::fs::read(cluster.object(&cluster.manifest(&key).trace_file().unwrap().path)).unwrap();
    let source = report
        .sources
        .iter()
        .find(|source| source.path.contains("/a.sum-00.s0/"))
        .unwrap();
    assert_eq!(source.sha256, sha256_hex(&bytes));
    let trace =
        espalier_core::trace::Trace::from_json(&zstd::decode_all(&bytes[..]).unwrap()).unwrap();
    assert!(
        trace
            .messages
            .iter()
            .all(|m| !m.content().contains("Add one.")),
        "hints are left out"
    );

    // The same command looks at what is there.
    let again = evaluate(&cluster, &file, [CARELESS, &careful], &more).await;
    assert_eq!(last(&again)["evaluation"], told);
    promote(&cluster).await;
    refuse(&cluster).await;
    worker.terminate(DEADLINE).await;
}

/// Runs `espalier adapters`: its exit code, what it says to programs, and what it says to people beside that.
async fn adapters(cluster: &Cluster, words: &[&str]) -> (Option<i32>, Value, String) {
    let words = [&["adapters"], words, &["--json"]].concat();
    let output = cluster.espalier(&words).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), value, said)
}

async fn add(cluster: &Cluster, name: &str, adapter: &str) {
    let [base, adapter] = ["tiny-dense", adapter].map(|name| golden(name).display().to_string());
    let (code, _, said) = adapters(cluster, &["add", name, &adapter, "--base", &base]).await;
    assert_eq!(code, Some(0), "{said}");
}

/// Versions move on by hand and by the comparison `e`, which is of version 2.
async fn promote(cluster: &Cluster) {
    add(cluster, "shop", "lora-plain").await;
    add(cluster, "shop", "lora-rslora").await;
    let (code, _, said) = adapters(cluster, &["rollback", "shop"]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("no version of `shop` was latest before"),
        "{said}"
    );
    let (_, entry, said) = adapters(cluster, &["promote", "shop", "v1"]).await;
    assert_eq!(
        (&entry["version"], &entry["why"]["by"]),
        (&json!(1), &json!("hand")),
        "{said}"
    );
    // Newer than what the comparison is of.
    add(cluster, "shop", "lora-patterns").await;
    let by = ["promote", "shop", "--comparison", "e"];
    let canary = [&by[..], &["--canary", "0.25"]].concat();
    let (_, entry, said) = adapters(cluster, &canary).await;
    let expected = json!({"version": 2, "share": 0.25});
    assert_eq!(
        (&entry["version"], &entry["canary"]),
        (&json!(1), &expected),
        "{said}"
    );
    let (_, entry, said) = adapters(cluster, &by).await;
    assert_eq!(
        (&entry["version"], &entry["why"]["by"], &entry["new"]),
        (&json!(2), &json!("comparison"), &json!(true)),
        "{said}"
    );
    assert!(
        entry["why"]["report"]
            .as_str()
            .unwrap()
            .ends_with("/report/report.json"),
        "{entry}"
    );
    let (code, same, said) = adapters(cluster, &by).await;
    assert_eq!((&same["new"], &same["seq"]), (&json!(false), &entry["seq"]));
    assert!(
        code == Some(0) && said.contains("nothing is to be done"),
        "{said}"
    );
    let (_, listed, _) = adapters(cluster, &["list"]).await;
    assert_eq!(listed["adapters"][0]["latest"]["version"], 2);
    let lineage = cluster.espalier(&["lineage", "shop@v2", "--json"]).await;
    let tree: Value = serde_json::from_slice(&lineage.stdout).unwrap();
    let latest = &tree["lineage"]["children"][0];
    assert_eq!(
        (&latest["kind"], &latest["children"][0]["state"]),
        (&json!("latest"), &json!("verified")),
        "{tree}"
    );
    assert!(lineage.status.success() && tree["counts"]["broken"] == 0);
    let (_, entry, said) = adapters(cluster, &["rollback", "shop"]).await;
    assert_eq!(
        (&entry["version"], &entry["why"]["from"]),
        (&json!(1), &json!(2)),
        "{said}"
    );
    let (_, shown, _) = adapters(cluster, &["show", "shop@v1"]).await;
    assert_eq!(shown["latest"]["seq"], 4);
}

/// What a comparison does not speak for does not become latest because of it.
async fn refuse(cluster: &Cluster) {
    add(cluster, "clicks", "lora-plain").await;
    let compare = |(job, adapter): (&str, Option<&str>)| {
        let arm = |label: &str| json!({"label": label, "batches": ["e"], "labels": {"arm": label}});
        let mut after = arm("b");
        after["adapter"] = json!(adapter);
        json!({"id": job, "compare": {"arms": [arm("a"), after], "min_tasks": 10}})
    };
    let jobs = [("of-clicks", Some("clicks@v1")), ("of-none", None)].map(compare);
    cluster.client().await.submit("again", &jobs).await;
    let result = cluster.client().await.wait("again", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        2,
        "{:?}",
        result.unsolved()
    );
    for (words, reason) in [
        (
            ["promote", "shop@v1", "--comparison", "e"],
            "the comparison is of shop@v2, and shop@v1 is to become latest",
        ),
        (
            ["promote", "clicks", "--comparison", "e"],
            "the comparison is of shop@v2, and clicks is to become latest",
        ),
        (
            ["promote", "clicks", "--comparison", "again/of-clicks"],
            "the comparison was answered by adapter-sha256:",
        ),
        (
            ["promote", "clicks", "--comparison", "again/of-none"],
            "the comparison names no version of an adapter",
        ),
    ] {
        let (code, _, said) = adapters(cluster, &words).await;
        assert!(
            code == Some(2) && said.contains(reason),
            "{words:?}: {said}"
        );
    }
}

#[tokio::test]
async fn a_check_that_always_says_yes_gives_no_signal_and_dead_rollouts_are_left_out() {
    let cluster = Cluster::start(&model::start().await, 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let file = cluster.folder.path().join("tasks.jsonl");
    let mut all = tasks(6);
    for task in &mut all {
        task["verify"] = json!({"answer": {"regex": "(?s).*"}});
    }
    // One brings its server down while it is judged, each time.
    all[5]["verify"] = json!({"mcp": {"server": "toy", "tool": "die", "text": {"contains": "x"}}});
    all[5]["max_attempts"] = json!(1);
    all[5]["max_infra"] = json!(1);
    write(&file, &all, "\n");
    let more = ["--json", "--gate", "--min-tasks", "1"];
    let output = evaluate(&cluster, &file, [CARELESS, CAREFUL], &more).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let told = &last(&output)["evaluation"];
    assert_eq!(
        told["gate"]["reason"],
        json!(GateReason::NoSignal),
        "{told}"
    );
    let words = told["gate"]["words"].as_str().unwrap();
    assert!(words.contains("the data carry no signal"), "{words}");
    let job = told["job"]
        .as_str()
        .unwrap()
        .strip_prefix("default/")
        .unwrap();
    let refused = cluster
        .espalier(&["adapters", "promote", "shop", "--comparison", job])
        .await;
    assert_eq!(refused.status.code(), Some(2));
    worker.terminate(DEADLINE).await;
}
