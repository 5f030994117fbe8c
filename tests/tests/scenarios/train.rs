//! Trainings from the queue, on a tiny model: real coordinator, real workers, real store, and whatever is killed in
//! between.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_core::adapter::AdapterVersion;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_proto::v1::{Job, JobState};
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);
/// Nobody asks a model here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qwen3/tests/golden/tiny-dense")
}

fn rows(count: usize) -> String {
    let row = |n: usize| {
        let ids: Vec<usize> = (0..40 + n % 9).map(|k| (n * 7 + k * 13) % 500).collect();
        json!({"id": format!("s{n}"), "ids": ids, "supervised": [[8, ids.len()]]}).to_string()
    };
    (0..count).map(|n| row(n) + "\n").collect()
}

/// Puts rows among the uploads of the project, and submits a training on them.
async fn submit(cluster: &Cluster, settings: Value) -> JobKey {
    let folder = cluster.object("default/uploads");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("rows.jsonl"), rows(60)).unwrap();
    std::fs::write(folder.join("held-out.jsonl"), rows(6)).unwrap();
    let train = json!({
        "base": model(), "rows": "rows.jsonl", "eval_rows": "held-out.jsonl", "adapter": "tiny", "settings": settings,
    });
    let job = json!({"id": "j", "train": train});
    let answer = cluster.client().await.submit("b", &[job]).await;
    assert_eq!(answer.accepted, 1, "{:?}", answer.rejected);
    cluster.key("b", "j")
}

/// Enough steps to be in the middle of them.
fn settings(steps: u64, checkpoint_every: u64) -> Value {
    json!({
        "max_steps": steps, "batch": 2, "accumulation": 2, "rank": 4, "lr": 5e-3, "warmup_steps": 2,
        "eval_every": 40, "checkpoint_every": checkpoint_every, "keep_checkpoints": 2,
    })
}

/// The newest checkpoint of any attempt.
fn newest(cluster: &Cluster, key: &JobKey) -> Option<(Fence, u64)> {
    let folder = cluster.object(layout::job(key).trim_end_matches('/'));
    let mut found = Vec::new();
    for attempt in std::fs::read_dir(folder).ok()?.flatten() {
        let Ok(steps) = std::fs::read_dir(attempt.path()) else {
            continue;
        };
        for step in steps.flatten() {
            let path = format!(
                "{}{}/{}/checkpoint.json",
                layout::job(key),
                attempt.file_name().to_str()?,
                step.file_name().to_str()?
            );
            let record = layout::checkpoint_of_record(&path);
            found.extend(record.filter(|_| step.path().join("checkpoint.json").exists()));
        }
    }
    let last = found
        .into_iter()
        .map(|(_, fence, step)| (step, fence))
        .max();
    last.map(|(step, fence)| (fence, step))
}

async fn checkpoint_after(cluster: &Cluster, key: &JobKey, step: u64) -> (Fence, u64) {
    wait_for("a checkpoint", DEADLINE, || {
        let found = newest(cluster, key);
        let wanted = found.filter(|(_, at)| *at >= step);
        async move { wanted.ok_or(found) }
    })
    .await
}

async fn done(cluster: &Cluster) -> Job {
    let result = cluster.client().await.wait("b", DEADLINE).await;
    let job = &result.jobs["j"];
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
    job.clone()
}

/// What the published steps came to, as text: bit for bit.
fn losses(cluster: &Cluster, key: &JobKey) -> Vec<String> {
    let manifest = cluster.manifest(key);
    let steps = layout::training_steps(key, manifest.fence);
    assert!(manifest.files.iter().any(|file| file.path == steps));
    let text = std::fs::read_to_string(cluster.object(&steps)).unwrap();
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        format!(
            "{} {} {} {}",
            row["step"], row["loss"], row["grad_norm"], row["eval_loss"]
        )
    };
    text.lines().map(row).collect()
}

/// What a training came to: its steps, and the digest of its weights.
fn came_to(cluster: &Cluster, key: &JobKey) -> (Vec<String>, String) {
    let manifest = cluster.manifest(key);
    (losses(cluster, key), manifest.files[0].sha256.clone())
}

/// The checkpoint that a worker says it went on from.
fn gone_on_from(log: &str) -> Option<(Fence, u64)> {
    let line = log
        .lines()
        .find(|line| line.contains("goes on from a checkpoint"))?;
    let line: Value = serde_json::from_str(line).ok()?;
    Some((Fence(line["of"].as_u64()?), line["step"].as_u64()?))
}

/// A training that nobody disturbs.
async fn undisturbed() -> (Vec<String>, String) {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let _worker = cluster.train_worker("trainer");
    let key = submit(&cluster, settings(200, 50)).await;
    let job = done(&cluster).await;
    assert_eq!(job.summary.unwrap().train.unwrap().steps, 200);
    came_to(&cluster, &key)
}

/// The same one, whose worker is killed in the middle.
async fn killed() -> (Vec<String>, String) {
    let cluster = Cluster::start(NO_MODEL, 3_000).await;
    let mut first = cluster.train_worker("first");
    let key = submit(&cluster, settings(200, 5)).await;
    checkpoint_after(&cluster, &key, 10).await;
    first.kill();
    let (fence, step) = newest(&cluster, &key).expect("a checkpoint");
    assert!(step < 200, "it was in the middle");
    let second = cluster.train_worker("second");
    let job = done(&cluster).await;
    assert_eq!((job.attempts, job.infra_failures), (2, 1), "{job:?}");
    assert_eq!(gone_on_from(&second.log()), Some((fence, step)));
    assert!(cluster.manifest(&key).fence > fence);
    check_version(&cluster, &key);
    came_to(&cluster, &key)
}

#[tokio::test]
async fn a_killed_worker_costs_no_more_than_the_steps_since_its_checkpoint() {
    let (whole, resumed) = tokio::join!(Box::pin(undisturbed()), Box::pin(killed()));
    // `checkpoint_every` changes no number.
    assert_eq!(resumed, whole);
}

/// The published version is an adapter as PEFT has it.
fn check_version(cluster: &Cluster, key: &JobKey) {
    let name = "tiny".parse().unwrap();
    let path = layout::adapter_version(&key.project, &name, 1);
    let record = std::fs::read(cluster.object(&path)).unwrap();
    let record = AdapterVersion::parse(&record, &name, 1).unwrap();
    assert_eq!(record.fence, cluster.manifest(key).fence);
    let folder = cluster.object(&layout::adapter_files(key, record.fence));
    let config = std::fs::read(folder.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(
        (&config["r"], &config["use_rslora"]),
        (&json!(4), &json!(true))
    );
    let weights = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let name = b"base_model.model.model.layers.2.mlp.down_proj.lora_B.weight";
    assert!(weights.windows(name.len()).any(|part| part == name));
    let events = layout::training_events(key, record.fence);
    assert!(std::fs::metadata(cluster.object(&events)).unwrap().len() > 1_000);
}

#[tokio::test]
async fn a_worker_that_ends_in_good_order_hands_its_training_on_and_spends_no_attempt() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let mut first = cluster.train_worker("first");
    let key = submit(&cluster, settings(400, 50)).await;
    checkpoint_after(&cluster, &key, 50).await;
    let status = first.terminate(DEADLINE).await;
    assert!(status.success(), "{}", first.log());
    let (_, step) = newest(&cluster, &key).expect("a checkpoint of the end");
    let told = format!("stopped after step {step}, which is stored");
    assert!(first.log().contains(&told), "{told}: {}", first.log());
    assert!(step < 400, "it was in the middle");
    let second = cluster.train_worker("second");
    let job = done(&cluster).await;
    assert_eq!(
        gone_on_from(&second.log()).map(|(_, step)| step),
        Some(step)
    );
    assert_eq!(
        (job.attempts, job.infra_failures, job.handler_failures),
        (2, 0, 0),
        "{job:?}"
    );
    assert_eq!(losses(&cluster, &key).len(), 400);
}

#[tokio::test]
async fn the_command_trains_on_a_file_of_rows_and_names_the_version() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let _worker = cluster.train_worker("trainer");
    let file = |name: &str, text: &str| {
        let path = cluster.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let rows = file("rows.jsonl", &rows(20));
    let config = file("lora.toml", "rank = 4\nmax_steps = 500\nlr = 1e-3\n");
    let train = |more: &[&str]| {
        let mut command = cluster.user();
        command.args([
            "--json",
            "train",
            "--name",
            "shop",
            "--store",
            &cluster.store_url(),
        ]);
        command.arg("--base").arg(model()).arg("--rows").arg(&rows);
        command.arg("--config").arg(&config).args(more);
        command.output().unwrap()
    };
    let plan = |more: &[&str]| {
        let planned = train(&[&["--plan", "--device", "cpu"], more].concat());
        assert!(planned.status.success(), "{planned:?}");
        serde_json::from_slice::<Value>(&planned.stdout).unwrap()
    };
    // Budget and peak are those of this machine, or those that are given.
    let measured = plan(&[]);
    let bytes = |what: &Value| what.as_u64().unwrap();
    let device = bytes(&measured["bytes"]["device"]);
    assert!(device > 1 << 20, "{measured}");
    assert_eq!(measured["budget"]["is_asked"], json!(false));
    assert!(bytes(&measured["budget"]["bytes"]) >= device, "{measured}");
    assert!(measured["step_s_at_peak"].as_f64().unwrap() > 0.0);
    let given = plan(&["--peak-flops", "1e12", "--set", "memory_budget_mib=64"]);
    assert_eq!(
        given["budget"],
        json!({"bytes": 64 << 20, "is_asked": true})
    );
    let flops = given["step_flops"].as_f64().unwrap();
    assert_eq!(given["step_s_at_peak"].as_f64(), Some(flops / 1e12));
    let little = train(&["--plan", "--set", "memory_budget_mib=1"]);
    assert_eq!(little.status.code(), Some(2));
    let said = String::from_utf8(little.stderr).unwrap();
    assert!(
        said.contains("`memory_budget_mib` must be at least"),
        "{said}"
    );

    let refused = train(&["--set", "rnak=8"]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("rnak"), "{said}");

    let trained = train(&["--set", "max_steps=12"]);
    assert!(trained.status.success(), "{trained:?}");
    let text = String::from_utf8(trained.stdout).unwrap();
    // Lines of progress come before it.
    let start = text.find("\n{\n").map_or(0, |at| at + 1);
    let came: Value = serde_json::from_str(&text[start..]).unwrap();
    assert_eq!(
        (&came["version"], &came["summary"]["steps"]),
        (&json!(1), &json!(12)),
        "{text}"
    );
}

#[tokio::test]
async fn a_worker_says_what_it_trains_on_and_refuses_a_gpu_that_is_not_there() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let auto = cluster.train_worker_on("auto", "auto");
    wait_for("a device in the log", DEADLINE, || {
        let log = auto.log();
        let told = ["no GPU is used", "trains on a GPU"];
        let is_told = told.iter().any(|told| log.contains(told));
        async move { is_told.then_some(()).ok_or(log) }
    })
    .await;
    // No machine has so many.
    let mut none = cluster.train_worker_on("none", "cuda:1000");
    let status = none.wait(DEADLINE).await;
    assert!(!status.success(), "{status:?}");
    let said = "espalier-train-worker: cannot train on cuda:1000: ";
    assert!(none.log().contains(said), "{}", none.log());
}
