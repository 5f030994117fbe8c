//! A data set gets out: built of a file, pushed to a stand-in for the hub as loaders of others look for it, through what the
//! hub does wrong, and not where its rows seem to hold a key.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::process::{Command, Output};

use axum::body::Bytes;
use espalier_dataset::files::parquet_records;
use espalier_tests::harness::hub::{Hub, Trouble};
use espalier_tests::harness::process::binary;
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::{Value, json};

/// Nobody asks a model here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";
const TOKEN: &str = "hf_of_this_terminal";
const REPO: &str = "me/shop";
/// The same, as the stand-in calls it.
const THERE: &str = "datasets/me/shop";

struct World {
    up: Up,
    hub: Hub,
}

impl World {
    /// With version 1 of `shop`, of conversations in which the user says these.
    async fn new(asked: &[String]) -> Self {
        let up = Up::start(&toy_servers(), NO_MODEL, &[]).await;
        let world = Self {
            up,
            hub: Hub::empty().await,
        };
        let row = |(n, asked): (usize, &String)| {
            json!({"id": format!("c{n}"), "task_id": format!("t{n}"), "model": "Qwen/Qwen3-4B", "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": format!("answer {n}")}]})
        };
        let rows: Vec<String> = asked
            .iter()
            .enumerate()
            .map(|row_of| row(row_of).to_string())
            .collect();
        let file = world.up.folder.path().join("rows.jsonl");
        std::fs::write(&file, rows.join("\n")).unwrap();
        let file = file.to_str().unwrap();
        let build = [
            "build",
            "--import",
            file,
            "--name",
            "shop",
            "--eval-share",
            "0.4",
            "--keep-near",
        ];
        let built = world.dataset(&build);
        assert!(built.status.success(), "{}", said(&built));
        world
    }

    fn dataset(&self, words: &[&str]) -> Output {
        let folder = self.up.folder.path();
        let mut command = Command::new(binary("espalier"));
        command.arg("dataset").args(words);
        command.arg("--data-dir").arg(folder.join("data"));
        command
            .env("HF_TOKEN", TOKEN)
            .env("HF_ENDPOINT", &self.hub.url);
        command
            .env("HOME", folder)
            .current_dir(folder)
            .output()
            .unwrap()
    }

    fn push(&self, more: &[&str]) -> Output {
        let output = self.dataset(&[&["push", REPO, "--json"], more].concat());
        let told = format!(
            "{}{}",
            said(&output),
            String::from_utf8_lossy(&output.stdout)
        );
        assert!(!told.contains(TOKEN), "{told}");
        output
    }

    fn pushed(&self, more: &[&str]) -> Value {
        let output = self.push(more);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.hub.files(THERE).unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn questions() -> Vec<String> {
    (0..12).map(|n| format!("what is {n} times {n}?")).collect()
}

/// Split and pattern of each part of the card's only configuration, as `datasets.load_dataset` reads its header.
fn data_files(card: &str) -> Vec<(String, String)> {
    let header = card
        .strip_prefix("---\n")
        .unwrap()
        .split_once("\n---\n")
        .unwrap()
        .0;
    let (_, configs) = header
        .split_once("configs:\n- config_name: default\n  data_files:\n")
        .unwrap();
    let after = |line: &str, start: &str| line.strip_prefix(start).unwrap().to_owned();
    let lines: Vec<&str> = configs.lines().collect();
    let pairs = lines.chunks(2);
    pairs
        .map(|pair| (after(pair[0], "  - split: "), after(pair[1], "    path: ")))
        .collect()
}

/// The rows of the files that a pattern with one star names.
fn rows(files: &BTreeMap<String, Vec<u8>>, pattern: &str) -> Vec<Value> {
    let (start, end) = pattern.split_once('*').unwrap();
    let named = files
        .iter()
        .filter(|(name, _)| name.starts_with(start) && name.ends_with(end));
    let read =
        named.map(|(name, content)| parquet_records(name, Bytes::from(content.clone())).unwrap());
    read.flatten().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_a_private_repository_that_loaders_open_and_is_pushed_once() {
    let world = World::new(&questions()).await;
    let told = world.pushed(&["--license", "apache-2.0"]);
    assert_eq!(
        (
            &told["dataset"],
            &told["version"],
            &told["changed"],
            &told["public"]
        ),
        (&json!("shop"), &json!(1), &json!(true), &json!(false))
    );
    assert_eq!(told["page"], format!("{}/{THERE}", world.hub.url));
    assert_eq!(world.hub.is_private(THERE), Some(true));
    let files = world.files();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let expected = [
        "README.md",
        "data/eval-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
        "manifest.json",
        "tally.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(told["files"], names.len());
    assert_eq!(told["bytes"], files.values().map(Vec::len).sum::<usize>());

    let card = String::from_utf8(files["README.md"].clone()).unwrap();
    assert!(
        card.starts_with("---\nlicense: \"apache-2.0\"\npretty_name: \"shop@v1\"\n"),
        "{card}"
    );
    for line in [
        "size_categories:\n- n<1K\n",
        "| base tokenizer | Qwen3's |",
        "Models that spoke: Qwen/Qwen3-4B.",
        "- file `rows.jsonl`",
    ] {
        assert!(card.contains(line), "{line} is not in {card}");
    }
    let parts = data_files(&card);
    assert_eq!(
        parts
            .iter()
            .map(|(split, _)| split.as_str())
            .collect::<Vec<_>>(),
        ["train", "eval"]
    );
    // A pull has the same rows as lines.
    let pulled = world.dataset(&["pull", "shop", "-o", "here"]);
    assert!(pulled.status.success(), "{}", said(&pulled));
    let mut all = 0;
    for (split, pattern) in &parts {
        let rows = rows(&files, pattern);
        let lines = world
            .up
            .folder
            .path()
            .join(format!("here/data/{split}-00000-of-00001.jsonl"));
        let lines = std::fs::read_to_string(lines).unwrap();
        let lines: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let brief = |rows: &[Value]| -> Vec<(Value, Value, Value)> {
            rows.iter()
                .map(|row| {
                    (
                        row["id"].clone(),
                        row["messages"].clone(),
                        row["split"].clone(),
                    )
                })
                .collect()
        };
        assert_eq!(brief(&rows), brief(&lines));
        assert!(
            card.contains(&format!("| {split} | {} |", rows.len())),
            "{card}"
        );
        all += rows.len();
    }
    assert_eq!(all, questions().len());

    let again = world.pushed(&["--license", "apache-2.0"]);
    assert_eq!(
        (&again["changed"], &again["commit"]),
        (&json!(false), &told["commit"])
    );
    let made = world.hub.commits(THERE);
    assert_eq!((made.len(), made[0].summary.as_str()), (1, "Add shop v1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hub_does_wrong_is_waited_out_or_told_and_taken_up_again() {
    let world = World::new(&questions()).await;
    // Nobody may write with this token.
    world
        .hub
        .trouble("repos/create", Trouble::Status(401, None), 1);
    let refused = world.push(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said(&refused).contains("401") && said(&refused).contains("HF_TOKEN"),
        "{}",
        said(&refused)
    );
    // The files arrive through a cut and a hub that is busy, and then the hub takes no commit for as long as it is tried.
    world.hub.trouble("PUT /storage", Trouble::Cut, 1);
    world
        .hub
        .trouble("objects/batch", Trouble::Status(429, Some(0)), 1);
    world
        .hub
        .trouble("/commit/", Trouble::Status(429, Some(0)), 5);
    let busy = world.push(&[]);
    assert_eq!(busy.status.code(), Some(1));
    assert!(said(&busy).contains("429"), "{}", said(&busy));
    assert!(world.hub.commits(THERE).is_empty() && world.files().is_empty());
    let sent = world.hub.count("PUT /storage");
    assert_eq!(
        sent,
        2 + 1,
        "each file of rows, and the one that was cut again"
    );
    // What arrived is not sent again. Somebody else's commit comes between, and the answer to ours is lost.
    world.hub.trouble("/commit/", Trouble::Status(409, None), 1);
    world.hub.trouble("/commit/", Trouble::CutAfter, 1);
    assert_eq!(world.pushed(&[])["changed"], true);
    assert_eq!(world.hub.count("PUT /storage"), sent);
    assert_eq!(world.hub.commits(THERE).len(), 1);
    assert_eq!(
        rows(&world.files(), "data/*.parquet").len(),
        questions().len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_seem_to_hold_a_key_stay_here_unless_they_are_let_go() {
    let key = format!("hf_{}", "aB3".repeat(11));
    let mut asked = questions();
    asked[3] = format!("log in with {key}");
    asked[5] = format!("and with {TOKEN}");
    let world = World::new(&asked).await;
    let refused = world.push(&[]);
    let why = said(&refused);
    assert_eq!(refused.status.code(), Some(2), "{why}");
    for part in [
        "`messages`: a token of the Hugging Face hub",
        "`messages`: a secret of this terminal",
        "--allow-secrets",
    ] {
        assert!(why.contains(part), "{part} is not in {why}");
    }
    assert!(!why.contains(&key), "{why}");
    assert!(world.hub.seen().is_empty(), "nobody is asked");
    assert_eq!(world.pushed(&["--allow-secrets"])["changed"], true);
}
