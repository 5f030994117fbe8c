//! Rows, token ids and masks against those that transformers gives: `golden/make.py` makes them.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::Range;
use std::path::Path;

use espalier_core::chat::read_messages;
use espalier_core::trace::sha256_hex;
use espalier_dataset::{Facts, Renderer, RowsOptions, Sample, Source, Split, Unroll, rows, sample};
use espalier_qwen3_text::Tokenizer;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Golden {
    id: String,
    messages: Option<Value>,
    #[serde(default)]
    tools: Vec<Value>,
    rows: BTreeMap<String, Vec<Expected>>,
}

#[derive(Deserialize)]
struct Expected {
    id: String,
    messages: usize,
    truncated: bool,
    truncation_point: Option<u32>,
    trained: Vec<u32>,
    /// Absent, as `ids` and `digest` are, where transformers takes text of the content for control tokens.
    supervised: Option<Vec<(u32, u32)>>,
    ids: Option<Vec<u32>>,
    count: Option<usize>,
    digest: Option<String>,
}

fn golden() -> Vec<Golden> {
    let json = zstd::decode_all(&include_bytes!("golden/rows.json.zst")[..]).unwrap();
    serde_json::from_slice(&json).unwrap()
}

fn source(id: &str, messages: &Value, tools: Vec<Value>) -> Source {
    Source {
        id: id.to_owned(),
        timestamp: String::new(),
        model: String::new(),
        messages: read_messages(messages).unwrap(),
        tools,
        facts: Facts::default(),
        thinking: true,
        keep_hints: None,
        calls: vec![],
    }
}

/// Holds the rows of `source` against what is expected, in every way of unrolling; how many rows there were.
fn check(source: &Source, expected: &BTreeMap<String, Vec<Expected>>) -> usize {
    let mut renderer = Renderer::new(Tokenizer::shared().unwrap());
    let mut checked = 0;
    for (mode, expected) in expected {
        let unroll: Unroll = mode.parse().unwrap();
        let options = RowsOptions {
            unroll,
            keep_hints: false,
        };
        let (found, drift) = rows(source, options, Split::Train, &mut renderer).unwrap();
        assert_eq!(drift, Default::default());
        assert_eq!(found.len(), expected.len(), "{} {mode}", source.id);
        for (row, expected) in found.iter().zip(expected) {
            let place = format!("{mode}: {}", expected.id);
            assert_eq!(row.id, expected.id, "{place}");
            assert_eq!(row.messages.len(), expected.messages, "{place}");
            assert_eq!(row.truncated, expected.truncated, "{place}");
            assert_eq!(row.truncation_point, expected.truncation_point, "{place}");
            assert_eq!(row.original_id.is_some(), expected.truncated, "{place}");
            assert_eq!(row.trained_turns, expected.trained, "{place}");
            let made = sample(row, usize::MAX, &mut renderer).unwrap();
            check_tokens(&made, expected, &place);
            checked += 1;
        }
    }
    checked
}

fn check_tokens(made: &Sample, expected: &Expected, place: &str) {
    let Some(supervised) = &expected.supervised else {
        return;
    };
    let spans: Vec<Range<u32>> = supervised.iter().map(|&(a, b)| a..b).collect();
    match &expected.ids {
        Some(ids) => assert_eq!(&made.ids, ids, "{place}"),
        None => {
            let bytes: Vec<u8> = made.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            assert_eq!(Some(made.ids.len()), expected.count, "{place}");
            assert_eq!(Some(sha256_hex(&bytes)), expected.digest, "{place}");
        }
    }
    assert_eq!(made.supervised, spans, "{place}");
}

#[test]
fn rows_tokens_and_masks_equal_those_of_transformers() {
    let mut checked = 0;
    for golden in golden() {
        if let Some(messages) = &golden.messages {
            let source = source(&golden.id, messages, golden.tools.clone());
            checked += check(&source, &golden.rows);
        }
    }
    assert!(checked >= 60, "only {checked} rows");
}

/// The workshop's recorded conversations, where the folder beside the repository has them.
#[test]
fn the_workshops_traces_unroll_as_they_should() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/workshop-traces");
    if !folder.is_dir() {
        eprintln!("SKIPPED: no workshop traces at {}", folder.display());
        return;
    }
    let mut checked = 0;
    for golden in golden().iter().filter(|golden| golden.messages.is_none()) {
        let json = std::fs::read(folder.join(&golden.id)).unwrap();
        let mut trace: Value = serde_json::from_slice(&json).unwrap();
        let tools = serde_json::from_value(trace["tools"].take()).unwrap();
        checked += check(&source(&golden.id, &trace["messages"], tools), &golden.rows);
    }
    assert!(checked >= 25, "only {checked} rows");
}
