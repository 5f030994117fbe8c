use std::io::Cursor;

use bytes::Bytes;
use espalier_core::chat::{Message, ToolCall};
use serde_json::json;

use super::*;
use crate::import;
use crate::row::Recorded;

fn row(n: usize) -> Row {
    let arguments = json!({"q": "a – b", "none": null}).as_object().cloned();
    let call = ToolCall::new("c", "f", arguments.unwrap_or_default());
    let recorded = Recorded {
        ids: (0..u32::try_from(n).unwrap() + 2).collect(),
        supervised: vec![1..2],
    };
    Row {
        id: format!("row-{n}"),
        timestamp: "20250529_195610".into(),
        model: "Qwen/Qwen3-4B".into(),
        messages: vec![
            Message::User {
                content: "Grüße 🙂".into(),
            },
            Message::assistant(String::new(), Some("hm".into()), vec![call]),
        ],
        tools: vec![
            json!({"type": "function", "function": {"name": "f", "parameters": {"default": null, "x": 1e-5}}}),
        ],
        truncated: n.is_multiple_of(2),
        original_id: n.is_multiple_of(2).then(|| "row".into()),
        truncation_point: n.is_multiple_of(2).then_some(4_000_000_000),
        task_id: n.is_multiple_of(3).then(|| "t".into()),
        task_kind: None,
        split: if n.is_multiple_of(5) {
            Split::Eval
        } else {
            Split::Train
        },
        reward: n.is_multiple_of(3).then_some(0.1 + 0.2),
        trained_turns: vec![0; n % 3],
        recorded: n.is_multiple_of(2).then_some(recorded),
    }
}

fn parquet(rows: &[Row]) -> Vec<u8> {
    let mut writer = ParquetWriter::new(Vec::new()).unwrap();
    rows.iter().for_each(|row| writer.write(row).unwrap());
    writer.finish().unwrap()
}

fn read(records: Records) -> Vec<Row> {
    read_rows("f", records).map(|row| row.unwrap()).collect()
}

fn causes(error: &FileError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

#[test]
fn parquet_is_read_as_it_was_written() {
    // More than one row group.
    let rows: Vec<Row> = (0..1_100).map(row).collect();
    let bytes = parquet(&rows);
    assert_eq!(parquet(&rows), bytes, "the same rows are the same bytes");
    let again = read(parquet_records("f", Bytes::from(bytes)).unwrap());
    assert_eq!(again.len(), rows.len());
    for (again, row) in again.iter().zip(&rows) {
        assert_eq!(again, row);
    }
    let none = parquet(&[]);
    assert_eq!(read(parquet_records("f", Bytes::from(none)).unwrap()), []);
}

#[test]
fn lists_that_are_empty_are_not_absent() {
    let mut rows: Vec<Row> = (0..4).map(row).collect();
    rows[0].recorded = Some(Recorded {
        ids: vec![],
        supervised: vec![],
    });
    rows[2].recorded.as_mut().unwrap().supervised = vec![0..u32::MAX, 7..8, 1..1];
    let again = read(parquet_records("f", Bytes::from(parquet(&rows))).unwrap());
    assert_eq!(again, rows);
}

#[test]
fn json_lines_are_read_as_they_were_written() {
    let rows: Vec<Row> = (0..20).map(row).collect();
    let mut writer = JsonlWriter::new(Vec::new());
    rows.iter().for_each(|row| writer.write(row).unwrap());
    let mut bytes = writer.finish().unwrap();
    bytes.extend(b"\n  \n");
    assert_eq!(read(jsonl_records("f", Cursor::new(bytes))), rows);
}

#[test]
fn a_bad_row_is_named_and_the_good_ones_are_read() {
    let mut good = Vec::new();
    let mut writer = JsonlWriter::new(&mut good);
    writer.write(&row(0)).unwrap();
    writer.finish().unwrap();
    let good = String::from_utf8(good).unwrap();
    let half = good.replace(
        "\"supervised\":[{\"start\":1,\"end\":2}]",
        "\"supervised\":null",
    );
    let bad = good.replace("\\\"role\\\":\\\"user\\\"", "\\\"role\\\":\\\"root\\\"");
    let text = format!("{good}{{\n{half}{bad}{{}}\n{good}");
    let found: Vec<_> =
        read_rows("f", jsonl_records("f", Cursor::new(text.into_bytes()))).collect();
    let errors: Vec<String> = found
        .iter()
        .filter_map(|row| row.as_ref().err().map(causes))
        .collect();
    assert_eq!(found.len() - errors.len(), 2);
    assert!(
        errors[0].starts_with("row 1 of `f` is refused: `row` must be JSON: EOF"),
        "{}",
        errors[0]
    );
    assert_eq!(
        errors[1],
        "row 2 of `f` is refused: `ids, supervised` must both be there, or neither, got `one of them`"
    );
    let role = "`messages[0].role` must be system, user, assistant or tool, got `root`";
    assert_eq!(errors[2], format!("row 3 of `f` is refused: {role}"));
    assert!(
        errors[3].contains("must have the columns of a data set, got `missing field"),
        "{}",
        errors[3]
    );
}

#[test]
fn what_is_no_parquet_is_refused() {
    let error = parquet_records("f", Bytes::from_static(b"PAR1 no"))
        .err()
        .unwrap();
    assert_eq!(error.to_string(), "`f` cannot be read at row 0");
    let mut cut = parquet(&[row(0)]);
    cut.truncate(cut.len() - 9);
    assert!(parquet_records("f", Bytes::from(cut)).is_err());
}

/// Written by pyarrow 26 through `golden/nested.py`: what a data set of nested columns looks like, with the keys of
/// every call in every other one.
#[test]
fn nested_columns_of_arrow_lose_their_nulls() {
    let bytes = Bytes::from_static(include_bytes!("golden/nested.parquet"));
    let sources: Vec<_> = import("nested", parquet_records("nested", bytes).unwrap()).collect();
    let [first, second, third] = &sources[..] else {
        panic!("{}", sources.len());
    };
    let first = first.as_ref().unwrap();
    let calls = |message: &Message| match message {
        Message::Assistant { tool_calls, .. } => json!(tool_calls),
        other => panic!("{other:?}"),
    };
    let called = |name: &str, arguments: Value| json!([{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}]);
    assert_eq!(
        calls(&first.messages[1]),
        called("open", json!({"url": "a – b"}))
    );
    assert_eq!(
        calls(&first.messages[3]),
        called("click", json!({"ref": 5, "deep": {"x": [1, 2]}}))
    );
    assert_eq!(first.messages[1].content(), "");
    let url = json!({"url": {"type": "string"}});
    assert_eq!(first.tools[0]["function"]["parameters"]["properties"], url);
    assert_eq!(first.facts.reward, Some(0.5));
    assert_eq!(second.as_ref().unwrap().tools, [json!({"name": "bare"})]);
    let refused = causes(third.as_ref().unwrap_err());
    let role = "`messages[0].role` must be system, user, assistant or tool, got `narrator`";
    assert_eq!(refused, format!("row 2 of `nested` is refused: {role}"));
}

#[test]
fn names_tell_split_number_and_form() {
    assert_eq!(
        file_name(Split::Train, 0, 2, Format::Parquet),
        "data/train-00000-of-00002.parquet"
    );
    assert_eq!(
        file_name(Split::Eval, 1, 2, Format::Jsonl),
        "data/eval-00001-of-00002.jsonl"
    );
    assert_eq!(Format::of("a.b/c.PARQUET"), Some(Format::Parquet));
    assert_eq!(Format::of("x.ndjson"), Some(Format::Jsonl));
    assert_eq!(Format::of("x.json"), Some(Format::Json));
    assert_eq!((Format::of("x.csv"), Format::of("x")), (None, None));
}
