//! From traces to an adapter: rollouts, a data set out of them by `espalier dataset build`, and trainings on it by its
//! name, with real processes.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_core::adapter::AdapterVersion;
use espalier_core::layout;
use espalier_qwen3_text::{TOKENIZER_SHA256, Tokenizer};
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::tiny;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
const ROLLOUTS: usize = 6;
/// The rollout whose trace somebody has marked.
const CORRECTED: &str = "a-red-bicycle-with-a-bent-wheel";
const SUBJECTS: [&str; ROLLOUTS] = [
    "a red bicycle with a bent wheel",
    "tomorrow's weather over the northern islands",
    "the price of seven lemons",
    "an old song about rivers",
    "who repaired the clock tower",
    "a map without any names",
];

/// A job about a subject of its own.
fn echo(subject: &str) -> Value {
    let steps = json!([{"tool": "echo", "arguments": {"text": subject}}, {"answer": "{{last}}"}]);
    let mut job = toy_job(&subject.replace([' ', '\''], "-"), &steps, subject);
    job["prompt"] = format!("Say this: {subject}.\nSCRIPT: {steps}").into();
    job
}

/// The last JSON document that it prints; lines of progress come before it.
async fn result(cluster: &Cluster, words: &[&str]) -> Value {
    let output = cluster.espalier(words).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let start = text.find("\n{\n").map_or(0, |at| at + 1);
    let whole = serde_json::from_str(&text[start..]);
    whole.unwrap_or_else(|_| serde_json::from_str(text.lines().last().unwrap()).unwrap())
}

/// Rollouts of the toy server's, all of them solved.
async fn roll_out(cluster: &Cluster) {
    let jobs: Vec<Value> = SUBJECTS.iter().map(|subject| echo(subject)).collect();
    let mut client = cluster.client().await;
    assert_eq!(client.submit("b", &jobs).await.accepted as usize, ROLLOUTS);
    assert_eq!(client.wait("b", DEADLINE).await.solved(), ROLLOUTS);
    let name = format!("b/{CORRECTED}");
    let words = ["traces", "label", &name, "--accept", "stage=gold"];
    let marked = cluster.espalier(&words).await;
    let said = String::from_utf8_lossy(&marked.stderr);
    assert!(marked.status.success(), "{said}");
}

async fn build(cluster: &Cluster, eval_share: &str) -> Value {
    let words = [
        "dataset",
        "build",
        "--from",
        "b",
        "--name",
        "shop",
        "--eval-share",
        eval_share,
        "--json",
    ];
    result(cluster, &words).await["summary"].clone()
}

struct Trainings<'a> {
    cluster: &'a Cluster,
    base: PathBuf,
    config: PathBuf,
}

impl Trainings<'_> {
    fn words<'w>(&'w self, dataset: &'w str, more: &[&'w str]) -> Vec<&'w str> {
        let words = [
            "train",
            "--dataset",
            dataset,
            "--name",
            "shop",
            "--json",
            "--base",
            self.base.to_str().unwrap(),
            "--config",
            self.config.to_str().unwrap(),
        ];
        [&words, more].concat()
    }

    /// What a training on `dataset` came to, and the version of the adapter that it became.
    async fn train(&self, dataset: &str, batch: &str) -> (Value, AdapterVersion) {
        let words = self.words(dataset, &["--batch", batch]);
        let came = result(self.cluster, &words).await;
        let n = u32::try_from(came["version"].as_u64().unwrap()).unwrap();
        let name = "shop".parse().unwrap();
        let path = layout::adapter_version(&"default".parse().unwrap(), &name, n);
        let record = std::fs::read(self.cluster.object(&path)).unwrap();
        (came, AdapterVersion::parse(&record, &name, n).unwrap())
    }
}

fn write(path: &Path, text: &str) -> PathBuf {
    std::fs::write(path, text).unwrap();
    path.to_owned()
}

#[tokio::test]
async fn traces_become_a_data_set_and_that_an_adapter() {
    let cluster = Cluster::start(&model::start().await, 30_000).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 4);
    let trainer = cluster.train_worker("trainer");
    roll_out(&cluster).await;
    let folder = cluster.folder.path();
    let base = folder.join("tiny");
    tiny::write_model(&base);
    let trainings = Trainings {
        cluster: &cluster,
        base,
        config: write(
            &folder.join("lora.toml"),
            "rank = 4\nbatch = 2\naccumulation = 1\n",
        ),
    };

    // Nothing is held out: all that the record counts is learned, and nothing is measured.
    let built = build(&cluster, "0").await;
    assert_eq!(
        (&built["eval_rows"], &built["train_rows"]),
        (&json!(0), &json!(ROLLOUTS))
    );
    let plan = result(&cluster, &trainings.words("shop@v1", &["--plan"])).await;
    assert_eq!(
        (&plan["dataset"]["name"], &plan["steps"]),
        (&json!("shop@v1"), &json!(3)),
        "{plan}"
    );
    let (came, record) = trainings.train("shop@v1", "t1").await;
    assert_eq!(record.dataset, "default/datasets/shop/v1.json");
    assert_eq!(
        came["summary"]["supervised_tokens"],
        built["supervised_tokens"]
    );
    assert_eq!(
        (&came["summary"]["steps"], &came["summary"]["eval_loss"]),
        (&json!(3), &json!(null))
    );

    // Without a version it is the newest, and what is held out is measured and not learned.
    let built = build(&cluster, "0.5").await;
    assert!(built["eval_rows"].as_u64().unwrap() > 0, "{built}");
    let (came, record) = trainings.train("shop", "t2").await;
    assert_eq!(
        (record.n, &*record.dataset),
        (2, "default/datasets/shop/v2.json")
    );
    assert!(
        came["summary"]["eval_loss"].as_f64().unwrap() > 0.0,
        "{came}"
    );
    let learned = came["summary"]["supervised_tokens"].as_u64().unwrap();
    let all = built["supervised_tokens"].as_u64().unwrap();
    assert!(0 < learned && learned < all, "{learned} of {all}");
    assert_eq!(learned + measured(&trainer.log()), all);

    lineage(&cluster).await;
    let refused = cluster.espalier(&trainings.words("none", &[])).await;
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("data set `none` has no version yet"),
        "{said}"
    );
    worker.terminate(DEADLINE).await;
}

/// From the adapter to the traces, all as it was written down; and one trace that was changed since.
async fn lineage(cluster: &Cluster) {
    let walk = async || {
        let output = cluster.espalier(&["lineage", "shop@v2", "--json"]).await;
        let tree: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), tree)
    };
    let (code, tree) = walk().await;
    assert_eq!(
        (code, &tree["counts"]["broken"]),
        (Some(0), &json!(0)),
        "{tree}"
    );
    let text = tree.to_string();
    for part in [
        "default/adapters/shop/v2.json",
        "default/batches/t2/jobs/train/manifest.json",
        "default/datasets/shop/v2.json",
        "6 traces by scripted",
        "default/b/a-red-bicycle-with-a-bent-wheel",
        "with 1 corrections",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(
        tree["counts"]["unverified"], 1,
        "only the base model is elsewhere: {text}"
    );
    let key = cluster.key("b", CORRECTED);
    let patch = cluster.object(&layout::patch(&key, 0));
    let trace = cluster.manifest(&key).trace_file().unwrap().path.clone();
    let path = cluster.object(&trace);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
    let (code, tree) = walk().await;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(
        (code, &tree["counts"]["broken"]),
        (Some(1), &json!(1)),
        "{tree}"
    );
    let corrected = std::fs::read_to_string(&patch).unwrap();
    std::fs::write(&patch, corrected.replace("gold", "lead")).unwrap();
    let (code, tree) = walk().await;
    std::fs::write(&patch, corrected).unwrap();
    let said = tree.to_string();
    assert!(
        code == Some(1) && said.contains("they are not those"),
        "{said}"
    );
}

/// What a command says that must be refused, and its exit code.
async fn refused(cluster: &Cluster, words: &[&str]) -> (Option<i32>, String) {
    let output = cluster.espalier(words).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{words:?}: {said}");
    (output.status.code(), said)
}

#[tokio::test]
async fn a_model_is_trained_on_a_data_set_of_its_own_tokenizer() {
    let allow = "ESPALIER_AGENT_WORKER_ALLOW_BASE_FOLDERS";
    let cluster = Cluster::start_with(Setup {
        environment: vec![(allow.to_owned(), "true".to_owned())],
        ..Setup::new("embedded", &model::start().await)
    })
    .await;
    let mut worker = cluster.worker_with_cpu_slots("a", 4);
    let _trainer = cluster.train_worker("trainer");
    roll_out(&cluster).await;
    let folder = cluster.folder.path();
    let [base, qwen3] = ["small", "tiny"].map(|name| folder.join(name));
    tiny::write_small_model(&base);
    tiny::write_model(&qwen3);
    let small = Tokenizer::from_json(tiny::SMALL_TOKENIZER).unwrap();
    let name = base.to_str().unwrap();
    let build = |tokenizer| {
        let words = [
            "dataset", "build", "--from", "b", "--name", "shop", "--json",
        ];
        let more = ["--eval-share", "0", "--tokenizer", tokenizer];
        [&words[..], &more].concat()
    };

    let built = result(&cluster, &build(name)).await["summary"].clone();
    assert_eq!(built["train_rows"], json!(ROLLOUTS));
    // The tokenizer lies beside the rows: nothing else is needed from here on.
    let hidden = folder.join("hidden");
    std::fs::rename(&base, &hidden).unwrap();
    let out = folder.join("out");
    let pull = [
        "dataset",
        "pull",
        "shop",
        "--json",
        "-o",
        out.to_str().unwrap(),
    ];
    result(&cluster, &pull).await;
    let file = std::fs::read_to_string(out.join("tokenizer.json")).unwrap();
    assert_eq!(file, tiny::SMALL_TOKENIZER);
    let manifest = std::fs::read(out.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["tokenizer_sha256"], small.sha256());
    assert_eq!(manifest["settings"]["tokenizer"], name);
    let shown = result(&cluster, &["dataset", "show", "shop", "--json"]).await;
    assert_eq!(shown["tokenizer_sha256"], small.sha256());
    let sample = &shown["sample"];
    let pieces = sample["pieces"].as_array().unwrap().iter();
    let text: String = pieces.filter_map(|piece| piece["text"].as_str()).collect();
    assert!(
        text.starts_with("<|im_start|>") && text.ends_with("<|im_end|>"),
        "{text}"
    );
    // All of it is text of the template's and of the tools', which holds no control text.
    assert_eq!(sample["tokens"], small.encode(&text).len());
    std::fs::rename(&hidden, &base).unwrap();

    let config = write(
        &folder.join("lora.toml"),
        "rank = 4\nbatch = 2\naccumulation = 1\n",
    );
    let trainings = |base: &Path| Trainings {
        cluster: &cluster,
        base: base.to_owned(),
        config: config.clone(),
    };
    let (came, record) = trainings(&base).train("shop@v1", "t1").await;
    assert_eq!(record.dataset, "default/datasets/shop/v1.json");
    let learned = &came["summary"]["supervised_tokens"];
    assert_eq!(learned, &built["supervised_tokens"]);
    let loss = came["summary"]["loss"].as_f64().unwrap();
    assert!((4.0..12.0).contains(&loss), "{came}");

    // Of another tokenizer nothing is learned, either way round.
    let other = trainings(&qwen3);
    let (_, said) = refused(&cluster, &other.words("shop@v1", &["--batch", "t2"])).await;
    let expected = format!(
        "data set shop@v1 must be built for the tokenizer {TOKENIZER_SHA256}, which is the base model's, got {}",
        small.sha256()
    );
    assert!(said.contains(&expected), "{said}");
    let plain = result(&cluster, &build("qwen3")).await;
    assert!(plain["summary"]["tokens"].as_u64() < built["tokens"].as_u64());
    let own = trainings(&base);
    let (_, said) = refused(&cluster, &own.words("shop@v2", &["--batch", "t3"])).await;
    let expected = format!("--extend shop@v2 --tokenizer {name}`");
    assert!(said.contains(&expected), "{said}");
    let (code, said) = refused(&cluster, &build("gpt2")).await;
    assert!(
        code == Some(2) && said.contains("curate.tokenizer"),
        "{said}"
    );
    worker.terminate(DEADLINE).await;
}

/// Supervised tokens of what was held out, as the worker told last.
fn measured(log: &str) -> u64 {
    let line = log
        .lines()
        .rfind(|line| line.contains("shop@v2, eval"))
        .unwrap();
    let (_, rest) = line.split_once("supervised_tokens").unwrap();
    let digits = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().unwrap()
}
