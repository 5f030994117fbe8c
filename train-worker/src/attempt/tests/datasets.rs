//! Data sets as what is learned from: both splits are read as they were built, and what is not for the model is refused.

use espalier_core::chat::Message;
use espalier_core::dataset::{
    CurateSummary, DATASET_RECORD_VERSION, DatasetSources, DatasetVersion, MANIFEST_FILE,
};
use espalier_core::spec::DatasetRef;
use espalier_core::time::Timestamp;
use espalier_core::trace::FileEntry;
use espalier_dataset::files::ParquetWriter;
use espalier_dataset::{BuildSpec, Counts, DatasetManifest, Recorded, Row, Split};
use espalier_qwen3_text::{CHAT_TEMPLATE_SHA256, TOKENIZER_SHA256, Tokenizer};
use espalier_runtime::telemetry::error_chain;
use tempfile::TempDir;

use super::*;
use crate::attempt::rows::{Data, Reading};
use crate::data::Rules;

const CONFIG: &str = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "rope_theta": 1000000, "max_position_embeddings": 4096, "tie_word_embeddings": true}"#;

/// A row of one question, with ids as they were sampled or without.
fn row(id: &str, split: Split, recorded: Option<Recorded>) -> Row {
    let question = Message::User {
        content: "What is 1 + 1?".to_owned(),
    };
    Row {
        id: id.to_owned(),
        timestamp: String::new(),
        model: String::new(),
        messages: vec![question, Message::assistant("2".to_owned(), None, vec![])],
        tools: vec![],
        truncated: false,
        original_id: None,
        truncation_point: None,
        task_id: None,
        task_kind: None,
        split,
        reward: None,
        trained_turns: vec![0],
        recorded,
    }
}

fn recorded(ids: &[u32], learned: std::ops::Range<u32>) -> Option<Recorded> {
    Some(Recorded {
        ids: ids.to_vec(),
        supervised: std::iter::once(learned).collect(),
    })
}

/// A version of a data set before it is stored.
struct Built {
    rows: Vec<Row>,
    tokenizer_sha256: String,
    /// Rows to train on that the record names, where it is not what files have.
    train_rows: Option<u64>,
}

impl Built {
    fn of(rows: Vec<Row>) -> Self {
        Self {
            rows,
            tokenizer_sha256: TOKENIZER_SHA256.to_owned(),
            train_rows: None,
        }
    }

    /// Stores it as `shop@v1`, a file for each row.
    async fn store(&self) -> Store {
        let store = Store::open("memory://").await.unwrap();
        let job: JobKey = "p/d/curate".parse().unwrap();
        let folder = layout::dataset_files(&job, Fence(3));
        let mut files = Vec::new();
        let mut counts = [0, 0];
        for row in &self.rows {
            let n = &mut counts[usize::from(row.split == Split::Eval)];
            let path = format!("{folder}{}-{n:05}.parquet", row.split.as_str());
            *n += 1;
            let mut writer = ParquetWriter::new(Vec::new()).unwrap();
            writer.write(row).unwrap();
            files.push((path, writer.finish().unwrap()));
        }
        let manifest = DatasetManifest {
            schema_version: espalier_dataset::SCHEMA_VERSION,
            created_at_us: Timestamp(1),
            settings: BuildSpec::default(),
            template_sha256: CHAT_TEMPLATE_SHA256.to_owned(),
            tokenizer_sha256: self.tokenizer_sha256.clone(),
            counts: Counts::default(),
            models: Vec::new(),
            files: Vec::new(),
            sources: Vec::new(),
        };
        let manifest = serde_json::to_vec(&manifest).unwrap();
        files.push((format!("{folder}{MANIFEST_FILE}"), manifest));
        let mut entries = Vec::new();
        for (path, bytes) in files {
            entries.push(FileEntry::of(path.clone(), &bytes));
            store.put(&path, bytes.into()).await.unwrap();
        }
        let record = DatasetVersion {
            record_version: DATASET_RECORD_VERSION,
            name: "shop".parse().unwrap(),
            n: 1,
            job,
            fence: Fence(3),
            created_at_us: Timestamp(1),
            sources: DatasetSources::default(),
            summary: CurateSummary {
                train_rows: self.train_rows.unwrap_or(counts[0]),
                eval_rows: counts[1],
                ..CurateSummary::default()
            },
            files: entries,
        };
        let record = serde_json::to_vec(&record).unwrap();
        store
            .put("p/datasets/shop/v1.json", record.into())
            .await
            .unwrap();
        store
    }
}

/// What is read of `shop@v1` for a model of so many tokens, in `folder`.
async fn read(
    store: &Store,
    folder: &Path,
    vocabulary: usize,
    max_length: usize,
) -> Result<Data, TrainError> {
    let workshop = workshop(store, fake());
    let tell = |text: &str| assert!(text.len() < 200, "{text}");
    let tokenizer = Tokenizer::of_folder(folder).map_err(Arc::new);
    let reading = Reading {
        key: &key(),
        base: ("base", &tokenizer),
        rules: Rules {
            vocabulary,
            max_length,
        },
        tell: &tell,
    };
    let of: DatasetRef = "shop@v1".parse().unwrap();
    workshop.dataset(&of, reading).await
}

/// What is said of a data set that cannot be learned from, each time as invalid.
async fn refused(store: &Store, folder: &Path, vocabulary: usize, max_length: usize) -> String {
    let error = read(store, folder, vocabulary, max_length).await;
    let Err(error) = error else {
        panic!("it is refused")
    };
    assert_eq!(error.class(), ErrorClass::Invalid);
    error_chain(&error)
}

#[tokio::test]
async fn both_splits_are_read_as_they_were_built() {
    let folder = TempDir::new().unwrap();
    let store = Built::of(vec![
        row("a", Split::Train, recorded(&[1, 2, 3, 4, 5], 2..4)),
        row("b", Split::Eval, recorded(&[7, 8, 9], 1..3)),
        row("c", Split::Train, None),
    ])
    .store()
    .await;
    let data = read(&store, folder.path(), 151_936, 4096).await.unwrap();
    assert_eq!(data.path, "p/datasets/shop/v1.json");
    let tokenizer = Tokenizer::shared().unwrap();
    let mut renderer = espalier_dataset::Renderer::new(tokenizer);
    let rendered = row("c", Split::Train, None);
    let rendered = espalier_dataset::sample(&rendered, 4096, &mut renderer).unwrap();
    let packed = data.samples.pack(&[0, 1]);
    let documents = packed.documents();
    // What follows the last turn that is learned teaches nothing.
    assert_eq!(documents.ids[..4], [1, 2, 3, 4]);
    assert_eq!(documents.supervised[..4], [false, false, true, true]);
    assert_eq!(documents.ids[4..], rendered.ids);
    let learned = 2 + rendered.supervised_tokens();
    assert_eq!(data.samples.supervised_tokens(), learned);
    let counted = documents.supervised.iter().filter(|learned| **learned);
    assert_eq!(counted.count(), learned);
    let held_out = data.held_out.unwrap();
    assert_eq!((held_out.name(0), held_out.lengths()), ("b", vec![3]));
}

#[tokio::test]
async fn without_rows_that_are_held_out_nothing_is() {
    let folder = TempDir::new().unwrap();
    let only = row("a", Split::Train, recorded(&[1, 2, 3], 1..3));
    let store = Built::of(vec![only]).store().await;
    let data = read(&store, folder.path(), 151_936, 4096).await.unwrap();
    assert!(data.held_out.is_none());
    std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    let base = folder.path().display().to_string();
    let line = format!(
        r#"{{"train":{{"base":{base:?},"dataset":"shop@v1","adapter":"shop","settings":{{"max_steps":3}}}}}}"#
    );
    let draft = parse_line(line.as_bytes()).unwrap();
    let loader = workshop(&store, fake());
    let published = attempt(&loader, &draft, 7).await.unwrap();
    let summary = published.summary.train().unwrap();
    assert_eq!((summary.supervised_tokens, summary.eval_loss), (6, None));
    let manifest = manifest(&store).await;
    assert_eq!(manifest.parents[1], "p/datasets/shop/v1.json");
}

/// A tokenizer as a base model may bring it.
const SMALL: &str = include_str!("../../../../crates/qwen3-text/tests/golden/small/tokenizer.json");

#[tokio::test]
async fn a_base_model_learns_from_data_sets_of_its_own_tokenizer_alone() {
    let folder = TempDir::new().unwrap();
    let small = Tokenizer::from_json(SMALL).unwrap();
    let of = |rows| Built {
        tokenizer_sha256: small.sha256().to_owned(),
        ..Built::of(rows)
    };
    let rows = || vec![row("a", Split::Train, None)];
    let store = of(rows()).store().await;
    // A folder without a tokenizer has Qwen3's.
    let said = refused(&store, folder.path(), 151_936, 4096).await;
    let expected = format!("for the tokenizer {TOKENIZER_SHA256}, which is the base model's, got");
    assert!(said.contains(&expected), "{said}");
    std::fs::write(folder.path().join("tokenizer.json"), SMALL).unwrap();
    let data = read(&store, folder.path(), 2112, 4096).await.unwrap();
    let mut renderer = espalier_dataset::Renderer::new(&small);
    let expected = espalier_dataset::sample(&rows()[0], 4096, &mut renderer).unwrap();
    assert_eq!(data.samples.pack(&[0]).documents().ids, expected.ids);
    let said = refused(&store, folder.path(), 2099, 4096).await;
    assert!(said.contains("at least 2100 tokens"), "{said}");
    let said = refused(&Built::of(rows()).store().await, folder.path(), 2112, 4096).await;
    let expected = format!("for the tokenizer {}, which is the base", small.sha256());
    assert!(said.contains(&expected), "{said}");
    assert!(
        said.contains("--extend shop@v1 --tokenizer base`"),
        "{said}"
    );
    let beyond = of(vec![row("a", Split::Train, recorded(&[1, 2100], 1..2))]);
    let said = refused(&beyond.store().await, folder.path(), 2112, 4096).await;
    assert!(said.contains("must have token ids below 2100"), "{said}");
}

#[test]
fn padding_is_no_class_of_a_model_with_its_own_tokenizer() {
    let folder = TempDir::new().unwrap();
    let config = CONFIG.replace("151936", "2112");
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let vocabulary = || {
        let (config, tokenizer) = crate::trainer::config(folder.path()).unwrap();
        (config.real_vocab_size, tokenizer.is_ok())
    };
    assert_eq!(vocabulary(), (2112, true));
    std::fs::write(folder.path().join("tokenizer.json"), SMALL).unwrap();
    assert_eq!(vocabulary(), (2100, true));
    // Rows of token ids are trained on nevertheless.
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert_eq!(vocabulary(), (2112, false));
}

#[tokio::test]
async fn what_is_not_for_the_model_is_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let rows = || {
        vec![
            row("a", Split::Train, recorded(&[1, 2, 3, 4, 5], 2..5)),
            row("b", Split::Train, recorded(&[1, 2, 3], 1..3)),
        ]
    };
    let other = Built {
        tokenizer_sha256: "beef".to_owned(),
        ..Built::of(rows())
    };
    let said = refused(&other.store().await, folder.path(), 151_936, 9).await;
    let expected = "data set shop@v1 must be built for the tokenizer a63080b4";
    assert!(said.starts_with(expected), "{said}");
    assert!(said.contains("got beef: build it again"), "{said}");

    let store = Built::of(rows()).store().await;
    let said = refused(&store, folder.path(), 512, 9).await;
    let expected = "`train.base` must have a vocabulary of at least 151669 tokens, which is that of data set shop@v1; it has \
                    512, got `base`";
    assert_eq!(said, expected);
    let said = refused(&store, folder.path(), 151_936, 4).await;
    let expected = "sample `a` (row 0 of `train-00000.parquet` of data set shop@v1): `supervised` must have a turn that ends \
                    within `max_length`, which is 4, got 5 tokens";
    assert_eq!(said, expected);
    let gap = Built {
        train_rows: Some(3),
        ..Built::of(rows())
    };
    let said = refused(&gap.store().await, folder.path(), 151_936, 9).await;
    let expected = "data set shop@v1 must have 3 rows of `train`, as its record says, got 2";
    assert_eq!(said, expected);
    let nonsense = Built::of(vec![row("a", Split::Train, recorded(&[1, 200_000], 1..2))]);
    let said = refused(&nonsense.store().await, folder.path(), 151_936, 9).await;
    assert!(
        said.starts_with("row 0 of `train-00000.parquet` of data set shop@v1 cannot be learned from: sample `a` must have token ids"),
        "{said}"
    );

    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let said = refused(&store, folder.path(), 151_936, 9).await;
    let expected =
        "the tokenizer of the base model cannot be used: it is no tokenizer of byte pairs: ";
    assert!(said.starts_with(expected), "{said}");
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();

    let path = "p/batches/d/jobs/curate/a-3/dataset/train-00001.parquet";
    store.put(path, "changed".into()).await.unwrap();
    let said = refused(&store, folder.path(), 151_936, 9).await;
    assert!(
        said.starts_with("data set shop@v1 cannot be had: ")
            && said.contains("train-00001.parquet"),
        "{said}"
    );
    store.delete("p/datasets/shop/v1.json").await.unwrap();
    let said = refused(&store, folder.path(), 151_936, 9).await;
    assert!(said.contains("`shop` has no version 1"), "{said}");
}
