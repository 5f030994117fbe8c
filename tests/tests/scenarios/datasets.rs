//! Data sets out of traces and files: real coordinator, real workers, the command that people use, and a worker that is
//! killed while it builds and again before it can report.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use espalier_core::dataset::DatasetVersion;
use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);
/// Long enough to do without a coordinator for some seconds of a busy machine.
const LEASE_TTL_MS: u64 = 10_000;
/// Conversations that the workers which are killed are given.
const CONVERSATIONS: usize = 150;
/// Nobody asks a model here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";
const SUBJECTS: [&str; 6] = [
    "a red bicycle with a bent wheel",
    "tomorrow's weather over the northern islands",
    "the price of seven lemons",
    "an old song about rivers",
    "who repaired the clock tower",
    "a map without any names",
];

/// A job about a subject of its own; a wrong one is judged as failed.
fn echo(n: usize, is_right: bool) -> Value {
    let steps =
        json!([{"tool": "echo", "arguments": {"text": SUBJECTS[n]}}, {"answer": "{{last}}"}]);
    let answer = if is_right {
        SUBJECTS[n]
    } else {
        "something else"
    };
    let mut job = toy_job(&format!("task-{n}"), &steps, answer);
    job["prompt"] = format!("Say this: {}.\nSCRIPT: {steps}", SUBJECTS[n]).into();
    job
}

async fn told(cluster: &Cluster, words: &[&str]) -> String {
    let output = cluster.espalier(words).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// The last JSON document of an answer; lines of progress come before it.
fn result(text: &str) -> Value {
    let start = text.find("\n{\n").map_or(0, |at| at + 1);
    serde_json::from_str(&text[start..]).unwrap()
}

/// A conversation as the workshop's files have them: a hint, arguments as text, a line break for an empty answer.
fn workshop() -> Value {
    json!({
        "timestamp": "20250529_130900", "model": "Qwen/Qwen3-30B-A3B-FP8",
        "messages": [
            {"role": "system", "content": "look at the footer", "hint": true},
            {"role": "user", "content": "What does the lamp cost?"},
            {"role": "assistant", "content": "\n\n", "reasoning_content": "I open the page.", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "open", "arguments": "{\"url\": \"/lamp\"}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "Lamp, 12 EUR"},
            {"role": "assistant", "content": "It costs 12 EUR."},
            {"role": "user", "content": "And in dollars?"},
            {"role": "assistant", "content": "I do not know the rate."}],
        "tools": [{"type": "function", "function": {"name": "open", "description": "opens a page",
            "parameters": {"type": "object", "properties": {"url": {"type": "string"}}}}}],
    })
}

/// Rows of one split in a folder that was pulled.
fn rows(folder: &Path, split: &str) -> Vec<Value> {
    let file = folder.join(format!("data/{split}-00000-of-00001.jsonl"));
    let text = std::fs::read_to_string(file).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn tasks(rows: &[Value]) -> BTreeSet<String> {
    rows.iter().map(|row| row["task_id"].to_string()).collect()
}

fn dropped(manifest: &Value) -> BTreeSet<(String, String)> {
    let sources = manifest["sources"].as_array().unwrap();
    let told = |field: &Value| field.as_str().unwrap_or_default().to_owned();
    let dropped = sources
        .iter()
        .filter(|source| source["dropped"].is_string());
    let end = |name: String| name.rsplit('/').next().unwrap().to_owned();
    dropped
        .map(|s| (end(told(&s["source"])), told(&s["dropped"])))
        .collect()
}

#[tokio::test]
async fn a_batch_and_files_become_a_data_set_that_is_shown_and_pulled() {
    let cluster = Cluster::start(&model::start().await, 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let jobs: Vec<Value> = (0..6).map(|n| echo(n, n != 5)).collect();
    let mut client = cluster.client().await;
    assert_eq!(client.submit("b", &jobs).await.accepted, 6);
    assert_eq!(client.wait("b", DEADLINE).await.solved(), 5);
    let folder = TempDir::new().unwrap();
    let [trace, lines] = ["trace.json", "more.jsonl"].map(|name| folder.path().join(name));
    std::fs::write(&trace, workshop().to_string()).unwrap();
    std::fs::write(&lines, format!("{}\nnot JSON\n", workshop())).unwrap();
    let [trace, lines] = [&trace, &lines].map(|path| path.to_str().unwrap());

    let build = [
        "dataset",
        "build",
        "--from",
        "b",
        "--import",
        trace,
        lines,
        "--name",
        "shop",
        "--eval-share",
        "0.3",
        "--near",
        "1",
        "--where",
        "not (reward < 0.9)",
        "--json",
    ];
    let built = result(&told(&cluster, &build).await);
    assert_eq!(
        (&built["dataset"], &built["version"]),
        (&json!("shop"), &json!(1))
    );
    let expected = json!({"duplicate": 1, "filtered": 1, "unreadable": 1});
    assert_eq!(built["summary"]["dropped"], expected);
    assert_eq!(built["summary"]["sources"], 9);
    assert_eq!(
        built["summary"]["train_rows"].as_u64().unwrap()
            + built["summary"]["eval_rows"].as_u64().unwrap(),
        7
    );

    let to = folder.path().join("out");
    told(
        &cluster,
        &["dataset", "pull", "shop", "-o", to.to_str().unwrap()],
    )
    .await;
    let [train, held_out] = ["train", "eval"].map(|split| rows(&to, split));
    assert_eq!(built["summary"]["train_rows"], train.len());
    assert!(
        tasks(&train).is_disjoint(&tasks(&held_out)),
        "{train:?} {held_out:?}"
    );
    let all = [train, held_out].concat();
    let of_file: Vec<&Value> = all.iter().filter(|row| row["task_id"].is_null()).collect();
    assert_eq!(of_file.len(), 2, "one row for each question");
    assert!(
        !of_file[0]["messages"].to_string().contains("footer"),
        "hints are dropped"
    );
    let manifest = std::fs::read(to.join("manifest.json")).unwrap();
    let dropped = dropped(&serde_json::from_slice(&manifest).unwrap());
    let expected = [
        ("more.jsonl#0", "duplicate"),
        ("more.jsonl#1", "unreadable"),
        ("task-5", "filtered"),
    ];
    assert_eq!(
        dropped,
        expected.map(|(a, b)| (a.to_owned(), b.to_owned())).into()
    );
    let card = std::fs::read_to_string(to.join("README.md")).unwrap();
    assert!(card.contains("data/train-*.parquet"), "{card}");

    let shown = told(&cluster, &["dataset", "show", "shop@v1"]).await;
    assert!(
        shown.contains("[[") && shown.contains("toy") && shown.contains('█'),
        "{shown}"
    );
    assert!(
        told(&cluster, &["dataset", "list"])
            .await
            .contains("shop@v1")
    );
    let empty = [
        "dataset",
        "build",
        "--from",
        "b",
        "--name",
        "none",
        "--where",
        "reward > 1",
    ];
    let output = cluster.espalier(&empty).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no conversation is left to train on: of 6, dropped were 6 filtered"),
        "{said}"
    );
    worker.terminate(DEADLINE).await;
}

/// So many conversations that differ.
fn conversations(count: usize) -> String {
    let one = |n: usize| {
        let words: Vec<String> = (0..60)
            .map(|word| format!("w{}", (n * 7919 + word * 31) % 9973))
            .collect();
        json!({"id": n.to_string(), "task_id": (n / 4).to_string(), "messages": [
            {"role": "user", "content": words.join(" ")},
            {"role": "assistant", "content": format!("that was {n}")}]})
    };
    let lines: Vec<String> = (0..count).map(|n| one(n).to_string()).collect();
    lines.join("\n")
}

#[tokio::test]
async fn a_worker_that_is_killed_costs_no_second_version() {
    let mut cluster = Cluster::start(NO_MODEL, LEASE_TTL_MS).await;
    let uploads = cluster.object("default/uploads");
    std::fs::create_dir_all(&uploads).unwrap();
    std::fs::write(uploads.join("many.jsonl"), conversations(CONVERSATIONS)).unwrap();
    let key = cluster.key("d", "curate");
    let mut client = cluster.client().await;
    let curate = json!({"uploads": ["many.jsonl"], "dataset": "many"});
    let job = json!({"id": "curate", "max_infra": 20, "curate": curate});
    assert_eq!(client.submit("d", &[job]).await.accepted, 1);

    // The first dies while it builds.
    let mut a = cluster.worker_with_cpu_slots("a", 1);
    leased(&cluster, &key, 1).await;
    a.kill(DEADLINE).await;
    // The second publishes, and dies before it can say so.
    let mut b = cluster.worker_with_cpu_slots("b", 1);
    leased(&cluster, &key, 2).await;
    // What a coordinator has granted is on its way to the worker when it dies.
    wait_for("the grant to arrive", DEADLINE, || {
        let log = b.process.log();
        let is_there = log.contains("job granted");
        async move { is_there.then_some(()).ok_or(log) }
    })
    .await;
    cluster.coordinators[0].process.kill();
    cluster.wait_until_published(&key, DEADLINE).await;
    b.kill(DEADLINE).await;
    cluster.restart_coordinator(0).await;
    // The third takes that over.
    let mut c = cluster.worker_with_cpu_slots("c", 1);
    let mut client = cluster.client().await;
    let ended = client.wait("d", DEADLINE).await;
    let job = &ended.jobs["curate"];
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");

    let versions = cluster.object("default/datasets/many");
    let names = std::fs::read_dir(&versions).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // What a killed worker was writing lies beside it, as `v1.json#1`, and is no object.
    let names: Vec<String> = names.filter(|name| !name.contains('#')).collect();
    assert_eq!(names, ["v1.json"]);
    let record = std::fs::read(versions.join("v1.json")).unwrap();
    let record = DatasetVersion::parse(&record, &"many".parse().unwrap(), 1).unwrap();
    let manifest = cluster.manifest(&key);
    assert_eq!(
        (record.fence, &record.files),
        (manifest.fence, &manifest.files)
    );
    assert!(job.attempts >= 3, "{job:?}");
    assert_eq!(manifest.parents, ["default/uploads/many.jsonl"]);
    let summary = job.summary.as_ref().unwrap().curate.as_ref().unwrap();
    assert_eq!(summary.sources, CONVERSATIONS as u64);
    c.terminate(DEADLINE).await;
}

/// Waits until the job was given out for the `attempt`th time.
async fn leased(cluster: &Cluster, key: &espalier_core::id::JobKey, attempt: u32) {
    let client = cluster.client().await;
    wait_for("the job to be leased", DEADLINE, || async {
        let job = client.job(key).await;
        match job.state() == JobState::Leased && job.attempts >= attempt {
            true => Ok(()),
            false => Err(job),
        }
    })
    .await;
}

/// What an operator is told, by a command that succeeds.
async fn operator(cluster: &Cluster, words: &[&str]) -> Value {
    let mut command = cluster.operator(&cluster.addresses());
    command.args(words).arg("--json");
    let run = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = run.await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn a_worker_of_several_kinds_of_jobs_is_one_worker_and_drains_as_one() {
    let cluster = Cluster::start(NO_MODEL, LEASE_TTL_MS).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 3);
    let told = wait_for("all sessions", DEADLINE, || async {
        let told = operator(&cluster, &["workers"]).await;
        let sessions = told["workers"][0]["sessions"].as_array().map(Vec::len);
        if sessions == Some(4) {
            Ok(told)
        } else {
            Err(told)
        }
    })
    .await;
    assert_eq!(told["workers"].as_array().unwrap().len(), 1, "{told}");
    let one = &told["workers"][0];
    let kinds = one["kinds"].as_array().unwrap().iter();
    let kinds: BTreeSet<&str> = kinds.filter_map(Value::as_str).collect();
    assert_eq!(kinds, ["compare", "curate", "export", "rollout"].into());
    let slots = one["sessions"].as_array().unwrap().iter();
    let slots: u64 = slots
        .filter_map(|session| session["capacity"].as_u64())
        .sum();
    assert_eq!(
        (&one["capacity"], &one["draining"]),
        (&json!(slots), &json!(false))
    );
    operator(&cluster, &["drain", one["worker"].as_str().unwrap()]).await;
    let told = operator(&cluster, &["workers"]).await;
    let sessions = told["workers"][0]["sessions"].as_array().unwrap();
    assert!(
        sessions.iter().all(|session| session["draining"] == true),
        "{told}"
    );
    worker.terminate(DEADLINE).await;
}
