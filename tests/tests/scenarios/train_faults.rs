//! Trainings that meet a full disk, a store that breaks off, checkpoints of another training, numbers that are none and
//! input that cannot be trained: nothing that was done is lost, and what is refused says which value breaks which rule.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::trace::Manifest;
use espalier_proto::v1::{Job, JobState};
use espalier_tests::harness::client::Client;
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::disk::OPT_OUT;
use espalier_tests::harness::history::Event;
use espalier_tests::harness::process::{Process, binary};
use espalier_tests::harness::store::FarStore;
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);
/// Nobody asks a model here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";
const MIB: u64 = 1 << 20;
/// Smaller than a checkpoint and than an adapter of these trainings, larger than any other request.
const BREAKS_AFTER: u64 = 40_000;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../crates/qwen3/tests/golden")
        .join(name)
}

/// Samples of tokens below `vocabulary`.
fn rows(count: usize, vocabulary: usize) -> Vec<Value> {
    let row = |n: usize| {
        let ids: Vec<usize> = (0..20 + n % 9)
            .map(|k| (n * 7 + k * 13) % vocabulary)
            .collect();
        json!({"id": format!("s{n}"), "ids": ids, "supervised": [[8, ids.len()]]})
    };
    (0..count).map(row).collect()
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn settings(steps: u64, checkpoint_every: u64) -> Value {
    json!({
        "max_steps": steps, "batch": 1, "accumulation": 1, "rank": 4, "lr": 1e-3, "warmup_steps": 0,
        "eval_every": 0, "checkpoint_every": checkpoint_every, "keep_checkpoints": 2,
    })
}

fn job(id: &str, base: &str, rows: &str, settings: &Value) -> Value {
    json!({"id": id, "train": {
        "base": golden(base), "rows": rows, "adapter": "tiny", "settings": settings,
    }})
}

fn put_rows(uploads: &Path, name: &str, rows: &[Value]) {
    std::fs::create_dir_all(uploads).unwrap();
    std::fs::write(uploads.join(name), lines(rows)).unwrap();
}

/// Waits until so many lines of a log have all of `parts`.
async fn logged(process: &Process, parts: &[&str], times: usize) {
    wait_for(&format!("{parts:?} in a log"), DEADLINE, || {
        let log = process.log();
        let found = log
            .lines()
            .filter(|line| parts.iter().all(|part| line.contains(part)));
        let found = found.count();
        async move { if found >= times { Ok(()) } else { Err(found) } }
    })
    .await;
}

async fn succeeded(client: &mut Client, batch: &str, id: &str) -> Job {
    let result = client.wait(batch, DEADLINE).await;
    let job = &result.jobs[id];
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
    job.clone()
}

fn key(batch: &str, id: &str) -> JobKey {
    format!("default/{batch}/{id}").parse().unwrap()
}

/// Every file of a result is as its manifest says.
fn check_files(store: &Path, key: &JobKey) -> Manifest {
    let manifest = std::fs::read(store.join(layout::manifest(key))).unwrap();
    let manifest = Manifest::parse(&manifest, key).unwrap();
    for file in &manifest.files {
        let content = std::fs::read(store.join(&file.path)).unwrap();
        assert!(file.holds(&content), "{} is damaged", file.path);
    }
    manifest
}

/// Numbers of the steps that a result was made of.
fn steps(store: &Path, manifest: &Manifest) -> Vec<u64> {
    let path = layout::training_steps(&manifest.job, manifest.fence);
    let text = std::fs::read_to_string(store.join(path)).unwrap();
    let row = |line: &str| {
        serde_json::from_str::<Value>(line).unwrap()["step"]
            .as_u64()
            .unwrap()
    };
    text.lines().map(row).collect()
}

/// `up` on a disk of its own; none where nobody may mount one, which is printed.
async fn on_small_disk() -> Option<Up> {
    let up =
        Up::start_on_small_disk(24 * MIB, &toy_servers(), NO_MODEL, &["--lease-ttl-s", "5"]).await;
    if up.is_none() {
        println!(
            "SKIPPED: {OPT_OUT} is set, and nobody may mount a tmpfs in a namespace of their own"
        );
    }
    up
}

/// Keeps the disk full until `what` has waited for it twice.
async fn stay_full(up: &Up, what: &str) {
    let disk = up.disk.as_ref().unwrap();
    wait_for("the full disk to be met", DEADLINE, || {
        disk.fill();
        let log = up.process.log();
        let waits = log
            .lines()
            .filter(|line| line.contains("waits for the store") && line.contains(what));
        let waits = waits.count();
        async move { if waits >= 2 { Ok(()) } else { Err(waits) } }
    })
    .await;
}

#[tokio::test]
async fn a_checkpoint_that_finds_no_room_waits_for_it_and_the_training_goes_on() {
    let Some(mut up) = on_small_disk().await else {
        return;
    };
    put_rows(
        &up.store_folder().join("default/uploads"),
        "rows.jsonl",
        &rows(40, 500),
    );
    let mut client = up.client().await;
    let train = job("j", "tiny-dense", "rows.jsonl", &settings(600, 10));
    assert_eq!(client.submit("b", &[train]).await.accepted, 1);
    logged(&up.process, &["checkpoint stored"], 1).await;
    stay_full(&up, "checkpoint").await;
    assert!(up.process.ended().is_none(), "a full disk ends nothing");
    assert_eq!(client.job(&key("b", "j")).await.state(), JobState::Leased);
    up.disk.as_ref().unwrap().free();
    let job = succeeded(&mut client, "b", "j").await;
    assert_eq!(
        (job.attempts, job.infra_failures, job.handler_failures),
        (1, 0, 0),
        "{job:?}"
    );
    let store = up.store_folder();
    let manifest = check_files(&store, &key("b", "j"));
    assert_eq!(steps(&store, &manifest), (1..=600).collect::<Vec<_>>());
}

/// So many conversations that differ, and take a while to compare.
fn conversations(count: usize) -> String {
    let one = |n: usize| {
        let words: Vec<String> = (0..60)
            .map(|word| format!("w{}", (n * 7919 + word * 31) % 9973))
            .collect();
        json!({"id": n.to_string(), "messages": [
            {"role": "user", "content": words.join(" ")},
            {"role": "assistant", "content": format!("that was {n}")}]})
    };
    (0..count).map(|n| format!("{}\n", one(n))).collect()
}

#[tokio::test]
async fn a_data_set_that_finds_no_room_waits_for_it() {
    let Some(mut up) = on_small_disk().await else {
        return;
    };
    let uploads = up.store_folder().join("default/uploads");
    std::fs::create_dir_all(&uploads).unwrap();
    std::fs::write(uploads.join("many.jsonl"), conversations(200)).unwrap();
    let mut client = up.client().await;
    let curate = json!({"id": "j", "curate": {"uploads": ["many.jsonl"], "dataset": "many"}});
    assert_eq!(client.submit("b", &[curate]).await.accepted, 1);
    wait_for("the job to be leased", DEADLINE, || async {
        let job = client.job(&key("b", "j")).await;
        if job.state() == JobState::Leased {
            Ok(())
        } else {
            Err(job)
        }
    })
    .await;
    stay_full(&up, "dataset").await;
    assert!(up.process.ended().is_none(), "a full disk ends nothing");
    up.disk.as_ref().unwrap().free();
    let job = succeeded(&mut client, "b", "j").await;
    assert_eq!((job.attempts, job.infra_failures), (1, 0), "{job:?}");
    let summary = job.summary.unwrap().curate.unwrap();
    assert_eq!(
        (summary.sources, summary.train_rows + summary.eval_rows),
        (200, 200)
    );
    check_files(&up.store_folder(), &key("b", "j"));
    assert!(
        up.store_folder()
            .join("default/datasets/many/v1.json")
            .exists()
    );
}

/// `espalier` beside an `up` whose store is far away.
fn espalier(up: &Up, far: &FarStore, words: &[&str]) -> std::process::Output {
    let folder = up.folder.path();
    let mut command = Command::new(binary("espalier"));
    command
        .args(words)
        .arg("--data-dir")
        .arg(folder.join("data"));
    command
        .envs(far.environment())
        .env("HOME", folder)
        .current_dir(folder);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    output
}

/// Submits a training of `steps` steps, all of which are between two checkpoints.
fn train_far(up: &Up, far: &FarStore, steps: u64) {
    let file = up.folder.path().join("rows.jsonl");
    std::fs::write(&file, lines(&rows(40, 500))).unwrap();
    let base = golden("tiny-dense");
    let (base, file) = (base.to_str().unwrap(), file.to_str().unwrap());
    let steps = [
        format!("max_steps={steps}"),
        format!("checkpoint_every={}", steps / 2),
    ];
    let mut words = vec![
        "train", "--base", base, "--rows", file, "--name", "tiny", "--batch", "b", "--detach",
    ];
    for set in [
        "rank=8",
        "batch=1",
        "accumulation=1",
        "eval_every=0",
        &steps[0],
        &steps[1],
    ] {
        words.extend(["--set", set]);
    }
    espalier(up, far, &words);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_break_off_half_way_are_begun_again_and_cost_no_attempt() {
    let far = FarStore::start("train").await;
    let environment = far.environment();
    let environment = environment
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let more = ["--store", far.url(), "--lease-ttl-s", "5"];
    let folder = TempDir::new().unwrap();
    let up = Up::start_in(folder, &toy_servers(), NO_MODEL, &more, &environment).await;
    // What is sent before the checkpoint in the middle is smaller.
    far.break_after(BREAKS_AFTER);
    train_far(&up, &far, 12);
    logged(&up.process, &["waits for the store", "checkpoint"], 1).await;
    assert!(far.broken() >= 2, "{} uploads broke off", far.broken());
    assert!(!up.process.log().contains("checkpoint stored"));
    // Late enough that what follows the last checkpoint is still on its way when its end is seen.
    far.be_slow(Duration::from_millis(300));
    logged(&up.process, &["checkpoint stored", "\"step\":12,"], 1).await;
    let before = far.broken();
    far.break_after(BREAKS_AFTER);
    logged(&up.process, &["waits for the store", "adapter"], 1).await;
    assert!(
        far.broken() >= before + 2,
        "{} uploads broke off",
        far.broken()
    );
    far.heal();
    let mut client = up.client().await;
    let result = client.wait("b", DEADLINE).await;
    let job = result.jobs.values().next().unwrap();
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
    assert_eq!(
        (job.attempts, job.infra_failures, job.handler_failures),
        (1, 0, 0),
        "{job:?}"
    );
    // Each file is checked against the digest of the version's record.
    espalier(&up, &far, &["adapters", "pull", "tiny", "-o", "out"]);
    assert!(
        up.folder
            .path()
            .join("out/adapter_model.safetensors")
            .exists()
    );
}

/// A training whose worker is killed with a checkpoint in the store.
async fn killed_with_a_checkpoint(cluster: &Cluster) -> JobKey {
    put_rows(
        &cluster.object("default/uploads"),
        "rows.jsonl",
        &rows(40, 500),
    );
    let mut first = cluster.train_worker("first");
    let train = job("j", "tiny-dense", "rows.jsonl", &settings(2_000, 3));
    assert_eq!(
        cluster.client().await.submit("b", &[train]).await.accepted,
        1
    );
    logged(&first, &["checkpoint stored"], 2).await;
    first.kill();
    cluster.key("b", "j")
}

/// What a worker makes of the job that is left: it passes over what is there, for this reason, and begins at the first step.
async fn begins_anew(cluster: &Cluster, why: &str, last: u64) {
    let second = cluster.train_worker("second");
    succeeded(&mut cluster.client().await, "b", "j").await;
    let log = second.log();
    let told = log
        .lines()
        .any(|line| line.contains("a checkpoint is passed over") && line.contains(why));
    assert!(told, "{why}: {log}");
    assert!(!log.contains("goes on from a checkpoint"), "{log}");
    let manifest = cluster.manifest(&cluster.key("b", "j"));
    let store = cluster.object("");
    assert_eq!(steps(&store, &manifest).last(), Some(&last));
}

#[tokio::test]
async fn a_checkpoint_of_another_data_set_is_not_taken_up_and_that_is_said() {
    let cluster = Cluster::start(NO_MODEL, 3_000).await;
    let mut first = cluster.train_worker("first");
    put_rows(
        &cluster.object("default/uploads"),
        "rows.jsonl",
        &rows(40, 500),
    );
    // Slow enough to be killed, and short enough for the next one: one epoch.
    let mut settings = settings(1, 1);
    settings.as_object_mut().unwrap().remove("max_steps");
    settings["epochs"] = 1.into();
    settings["accumulation"] = 4.into();
    let train = job("j", "tiny-dense", "rows.jsonl", &settings);
    assert_eq!(
        cluster.client().await.submit("b", &[train]).await.accepted,
        1
    );
    logged(&first, &["checkpoint stored"], 1).await;
    first.kill();
    let published = cluster.object(&layout::manifest(&cluster.key("b", "j")));
    assert!(!published.exists(), "it was in the middle");
    // Others are there under the same name.
    put_rows(
        &cluster.object("default/uploads"),
        "rows.jsonl",
        &rows(24, 400),
    );
    begins_anew(&cluster, "another data set", 6).await;
}

#[tokio::test]
async fn a_checkpoint_of_other_settings_is_not_taken_up_and_that_is_said() {
    let mut cluster = Cluster::start(NO_MODEL, 3_000).await;
    killed_with_a_checkpoint(&cluster).await;
    // Nobody knows the batch any more, and somebody submits another under its name.
    cluster.forget_batches().await;
    let other = job("j", "tiny-dense", "rows.jsonl", &settings(9, 3));
    assert_eq!(
        cluster.client().await.submit("b", &[other]).await.accepted,
        1
    );
    begins_anew(&cluster, "another job, or other settings", 9).await;
}

/// `tiny-moe` in `folder`, of whose embeddings that of `token` is no number.
fn broken_model(folder: &Path, token: usize) {
    for entry in std::fs::read_dir(golden("tiny-moe")).unwrap() {
        let entry = entry.unwrap();
        let mut content = std::fs::read(entry.path()).unwrap();
        let name = entry.file_name();
        if name.to_str().unwrap().ends_with(".safetensors") {
            break_embedding(&mut content, token);
        }
        std::fs::write(folder.join(name), content).unwrap();
    }
}

/// Safetensors: the length of a header, the header in JSON, the numbers. These are bf16.
fn break_embedding(file: &mut [u8], token: usize) {
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&file[8..header]).unwrap();
    let tensor = &tensors["model.embed_tokens.weight"];
    let Some(start) = tensor["data_offsets"][0].as_u64() else {
        return;
    };
    assert_eq!(tensor["dtype"], "BF16");
    let hidden = tensor["shape"][1].as_u64().unwrap() as usize;
    let row = header + start as usize + token * hidden * 2;
    for number in file[row..row + hidden * 2].chunks_mut(2) {
        number.copy_from_slice(&0x7fc0_u16.to_le_bytes());
    }
}

#[tokio::test]
async fn a_loss_that_is_no_number_ends_the_job_names_the_sample_and_keeps_the_checkpoint() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let base = cluster.folder.path().join("broken");
    std::fs::create_dir(&base).unwrap();
    broken_model(&base, 499);
    // Tokens of the others are far below.
    let mut rows = rows(12, 300);
    rows[7]["ids"][3] = 499.into();
    put_rows(&cluster.object("default/uploads"), "rows.jsonl", &rows);
    let _worker = cluster.train_worker("trainer");
    let mut train = job("j", "tiny-moe", "rows.jsonl", &settings(12, 1));
    train["train"]["base"] = json!(base);
    // Of the order in which samples come: the broken one is not the first.
    train["train"]["settings"]["seed"] = 1.into();
    let mut client = cluster.client().await;
    assert_eq!(client.submit("b", &[train]).await.accepted, 1);
    let result = client.wait("b", DEADLINE).await;
    let job = &result.jobs["j"];
    assert_eq!((job.state(), job.attempts), (JobState::Dead, 1), "{job:?}");
    let why = &job.last_error.as_ref().unwrap().message;
    let (step, rest) = why.strip_prefix("step ").unwrap().split_once(' ').unwrap();
    let good = step.parse::<u64>().unwrap() - 1;
    let expected = format!(
        "has a loss or gradient that is not finite, at sample `s7`; the checkpoint of step {good} is kept"
    );
    assert_eq!(rest, expected);
    let grants = cluster.history(false).into_iter();
    let mut fences = grants.filter_map(|event| match event {
        Event::Granted(grant) => Some(Fence(grant.fence)),
        Event::Finished(_) => None,
    });
    let record = layout::checkpoint_record(&cluster.key("b", "j"), fences.next().unwrap(), good);
    assert!(cluster.object(&record).exists(), "{record}");
}

#[tokio::test]
async fn what_can_be_known_at_the_door_is_refused_there() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let with = |field: &str, value: Value| {
        let mut settings = settings(1, 1);
        settings[field] = value;
        job(field, "tiny-dense", "rows.jsonl", &settings)
    };
    let mut no_data = job("no-data", "tiny-dense", "rows.jsonl", &settings(1, 1));
    no_data["train"].as_object_mut().unwrap().remove("rows");
    let jobs = [
        with("rank", json!(0)),
        with("targets", json!(["lm_head"])),
        with("max_length", json!(1)),
        with("memory_budget_mib", json!(0)),
        with("lr", json!(0)),
        with("epochs", json!(2)),
        job("path", "tiny-dense", "../rows.jsonl", &settings(1, 1)),
        no_data,
        job("good", "tiny-dense", "rows.jsonl", &settings(1, 1)),
    ];
    let answer = cluster.client().await.submit("b", &jobs).await;
    let found: Vec<(&str, &str, &str)> = answer
        .rejected
        .iter()
        .map(|refused| {
            assert_eq!(refused.errors.len(), 1, "{refused:?}");
            let error = &refused.errors[0];
            (&*error.field, &*error.value, &*error.rule)
        })
        .collect();
    let projections =
        "must be one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
    let expected = [
        ("train.settings.rank", "0", "must be in 1..=1024"),
        ("train.settings.targets[0]", "lm_head", projections),
        ("train.settings.max_length", "1", "must be in 2..=1048576"),
        (
            "train.settings.memory_budget_mib",
            "0",
            "must be in 1..=16777216",
        ),
        ("train.settings.lr", "0", "must be in (0, 1]"),
        (
            "train.settings.epochs",
            "2",
            "must be absent where `max_steps` is given",
        ),
    ];
    assert_eq!(found[..6], expected);
    assert_eq!((found[6].0, found[6].1), ("train.rows", "../rows.jsonl"));
    assert_eq!(
        found[7],
        ("train.dataset", "", "must be NAME@vN, or `rows` an upload")
    );
    assert_eq!(answer.accepted, 1, "the good one goes on");
}

/// `tiny-moe` in `folder`, said to have experts in every layer.
fn experts_everywhere(folder: &Path) {
    for entry in std::fs::read_dir(golden("tiny-moe")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let config = folder.join("config.json");
    let mut said: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    said["mlp_only_layers"] = json!([]);
    std::fs::write(config, said.to_string()).unwrap();
}

/// Files of rows of which only the first can be trained on.
fn put_bad_rows(uploads: &Path) {
    let sample = |id: &str, ids: &[usize], supervised: Value| json!({"id": id, "ids": ids, "supervised": supervised});
    put_rows(uploads, "rows.jsonl", &rows(4, 500));
    put_rows(uploads, "empty.jsonl", &[]);
    put_rows(
        uploads,
        "unsupervised.jsonl",
        &[sample("u", &[1, 2, 3], json!([]))],
    );
    put_rows(
        uploads,
        "beyond.jsonl",
        &[sample("x", &[1, 512], json!([[1, 2]]))],
    );
}

/// Jobs that no worker can do, each with what is said of it.
fn impossible(experts: &Path) -> Vec<(Value, &'static [&'static str])> {
    let of_rows = |id: &str| job(id, "tiny-dense", &format!("{id}.jsonl"), &settings(1, 1));
    let with = |field: &str, value: Value| {
        let mut settings = settings(1, 1);
        settings[field] = value;
        job(field, "tiny-dense", "rows.jsonl", &settings)
    };
    let mut targets = with("targets", json!(["gate_proj"]));
    targets["train"]["base"] = json!(experts);
    let mut full = with("method", json!("full"));
    full["train"]["base"] = json!(experts);
    let of_full = full["train"]["settings"].as_object_mut();
    of_full.unwrap().remove("rank");
    vec![
        (
            of_rows("empty"),
            &["`default/uploads/empty.jsonl` must have at least one sample, and it is empty"],
        ),
        (
            of_rows("unsupervised"),
            &[
                "sample `u` (line 1 of",
                "`supervised` must have at least one token after the first, got []",
            ],
        ),
        (
            of_rows("beyond"),
            &[
                "sample `x` (line 1 of",
                "`ids` must be below the model's vocabulary, 512, got 512 at 1",
            ],
        ),
        (
            of_rows("missing"),
            &["there is no file of rows at `default/uploads/missing.jsonl`"],
        ),
        (
            with("max_length", json!(513)),
            &["`train.settings.max_length` must be at most 512, the model's, got `513`"],
        ),
        (
            with("memory_budget_mib", json!(1)),
            &["`memory_budget_mib` must be at least", "got 1;", "fit"],
        ),
        (
            targets,
            &["`targets` must name a projection that this model has outside of its experts"],
        ),
        (
            full,
            &["must be an adapter for a mixture of experts: its experts are frozen"],
        ),
    ]
}

#[tokio::test]
async fn what_only_the_worker_can_know_ends_the_job_with_field_value_and_rule() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    put_bad_rows(&cluster.object("default/uploads"));
    let experts = cluster.folder.path().join("experts");
    std::fs::create_dir(&experts).unwrap();
    experts_everywhere(&experts);
    let impossible = impossible(&experts);
    let jobs: Vec<Value> = impossible.iter().map(|(job, _)| job.clone()).collect();
    let _worker = cluster.train_worker("trainer");
    let mut client = cluster.client().await;
    let answer = client.submit("b", &jobs).await;
    assert_eq!(answer.rejected, [], "each is well said");
    let result = client.wait("b", DEADLINE).await;
    for (job, parts) in impossible {
        let job = &result.jobs[job["id"].as_str().unwrap()];
        assert_eq!((job.state(), job.attempts), (JobState::Dead, 1), "{job:?}");
        let why = &job.last_error.as_ref().unwrap().message;
        for part in parts {
            assert!(why.contains(part), "{}: {part} is not in {why}", job.id);
        }
    }
}
