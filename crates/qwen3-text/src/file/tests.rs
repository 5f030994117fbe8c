use serde_json::{Value, json};

use super::*;
use crate::tokenizer::tests::SMALL;
use crate::{TOKENIZER_SHA256, Tokenizer, asset};

fn small() -> Value {
    serde_json::from_str(SMALL).unwrap()
}

fn read(file: &Value) -> Result<Tokenizer, String> {
    let read = Tokenizer::from_json(&file.to_string());
    read.map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}

/// What is said of the small tokenizer's file after this change.
fn refused(change: impl FnOnce(&mut Value)) -> String {
    let mut file = small();
    change(&mut file);
    read(&file).unwrap_err()
}

#[test]
fn a_file_of_qwen3s_tokenizer_is_known_however_it_is_written() {
    let mut file = asset::tests::json();
    let merges = file["model"]["merges"].as_array_mut().unwrap();
    for merge in merges {
        let pair = merge.as_array().unwrap();
        *merge = format!(
            "{} {}",
            pair[0].as_str().unwrap(),
            pair[1].as_str().unwrap()
        )
        .into();
    }
    // Embedding models add the end of the document to whole texts; nothing is added here.
    file["post_processor"] = json!({"type": "TemplateProcessing"});
    assert_eq!(read(&file).unwrap().sha256(), TOKENIZER_SHA256);
    // With another pattern it is another tokenizer.
    file["post_processor"] = Value::Null;
    let pattern = &mut file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
    *pattern = r"\p{N}{1,3}|\P{N}+".into();
    let other = read(&file).unwrap();
    assert_ne!(other.sha256(), TOKENIZER_SHA256);
    assert_eq!(other.ids(), Tokenizer::shared().unwrap().ids());
}

#[test]
fn qwen3s_pattern_is_known() {
    let file = asset::tests::json();
    assert_eq!(pattern(&file["pre_tokenizer"]).unwrap(), split::QWEN3);
    let has_lines = |tokenizer: &Tokenizer| tokenizer.count_at_most("a\nb", 1);
    assert_eq!(has_lines(Tokenizer::shared().unwrap()), None);
}

#[test]
fn a_folder_without_the_file_has_qwen3s() {
    let folder = std::env::temp_dir().join(format!("espalier-no-tokenizer-{}", std::process::id()));
    let found = Tokenizer::of_folder(&folder).unwrap();
    assert_eq!(found.sha256(), TOKENIZER_SHA256);
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/small");
    let found = Tokenizer::of_folder(golden.as_ref()).unwrap();
    assert_eq!(found.sha256(), sha256_hex(SMALL.as_bytes()));
}

#[test]
fn control_texts_may_have_any_ids_and_stand_outside_of_the_words() {
    let mut file = small();
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|word, _| !CONTROL.contains(&word.as_str()));
    // Words move to the front, in their order, and control texts behind them.
    for id in vocab.values_mut() {
        *id = (id.as_u64().unwrap() - 26).into();
    }
    for token in file["added_tokens"].as_array_mut().unwrap() {
        token["id"] = (token["id"].as_u64().unwrap() + 2074).into();
    }
    let moved = read(&file).unwrap();
    let first = read(&small()).unwrap();
    let text = "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<tool_call>";
    let expected = first.encode(text).into_iter().map(|id| match id < 26 {
        true => id + 2074,
        false => id - 26,
    });
    assert_eq!(moved.encode(text), expected.collect::<Vec<_>>());
    assert_eq!(moved.vocabulary(), 2100);
    assert_eq!(moved.ids().turn_close, 2097);
    assert_eq!(moved.decode(&moved.encode(text)).unwrap(), text);
}

#[test]
fn without_a_normalizer_text_stays_as_it_is() {
    let mut file = small();
    file["normalizer"] = Value::Null;
    let tokenizer = read(&file).unwrap();
    let text = "cafe\u{301} \u{1112}\u{1161}\u{11ab}";
    let ids = tokenizer.encode(text);
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(tokenizer.count_at_most(text, ids.len()), Some(ids.len()));
    let prefix = tokenizer.prefix_within(text, ids.len() - 1);
    assert!(text.starts_with(prefix) && prefix.len() < text.len());
}

#[test]
fn what_is_not_done_here_is_refused_by_name() {
    let settings: [(&[&str], Value, &str); 11] = [
        (
            &["normalizer"],
            json!({"type": "Lowercase"}),
            "`normalizer` must be null or NFC, got {\"type\":\"Lowercase\"}",
        ),
        (
            &["pre_tokenizer"],
            json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}),
            "`pre_tokenizer` must be a Sequence of Split and ByteLevel, got {",
        ),
        (
            &["pre_tokenizer", "pretokenizers", "0", "behavior"],
            json!("Removed"),
            "`pre_tokenizer.pretokenizers[0].behavior` must be \"Isolated\", got \"Removed\"",
        ),
        (
            &["pre_tokenizer", "pretokenizers", "1", "add_prefix_space"],
            json!(true),
            "`pre_tokenizer.pretokenizers[1].add_prefix_space` must be false, got true",
        ),
        (
            &["pre_tokenizer", "pretokenizers", "0", "pattern"],
            json!({"String": " "}),
            "`pre_tokenizer.pretokenizers[0].pattern` must be a Regex, got {\"String\":\" \"}",
        ),
        (
            &["pre_tokenizer", "pretokenizers", "0", "pattern", "Regex"],
            json!("(a+)+b"),
            "`pre_tokenizer.pretokenizers[0].pattern` must be the pattern of a known model, or alternatives ",
        ),
        (
            &["post_processor"],
            json!({"type": "TemplateProcessing"}),
            "`post_processor` must be null or of ByteLevel, got {",
        ),
        (
            &["model", "type"],
            json!("Unigram"),
            "`model.type` must be \"BPE\", got \"Unigram\"",
        ),
        (
            &["model", "dropout"],
            json!(0.1),
            "`model.dropout` must be off, got 0.1",
        ),
        (
            &["model", "ignore_merges"],
            json!(true),
            "`model.ignore_merges` must be off, got true",
        ),
        (
            &["model", "end_of_word_suffix"],
            json!("</w>"),
            "`model.end_of_word_suffix` must be off, got \"</w>\"",
        ),
    ];
    for (path, value, expected) in settings {
        let said =
            refused(|file| *file.pointer_mut(&format!("/{}", path.join("/"))).unwrap() = value);
        assert!(said.starts_with(expected), "{path:?}: {said}");
    }
    assert!(
        read(&json!({}))
            .unwrap_err()
            .starts_with("it is no tokenizer of byte pairs: ")
    );
}

#[test]
fn control_texts_must_be_qwen3s() {
    let added = |change: fn(&mut Vec<Value>)| {
        refused(|file| change(file["added_tokens"].as_array_mut().unwrap()))
    };
    let apart = |id: u32| {
        refused(|file| {
            file["added_tokens"][1]["id"] = id.into();
            let vocab = file["model"]["vocab"].as_object_mut().unwrap();
            vocab.remove("<think>");
        })
    };
    for (said, expected) in [
        (
            added(|added| drop(added.pop())),
            "`added_tokens` must have <|endoftext|>, got none",
        ),
        (
            added(|added| added.push(json!({"id": 2100, "content": "<|audio|>"}))),
            "`added_tokens` must be those of Qwen3, got \"<|audio|>\"",
        ),
        (
            added(|added| added.push(added[1].clone())),
            "`added_tokens` must be named once, got <think> twice",
        ),
        (
            added(|added| added[1]["lstrip"] = true.into()),
            "`added_tokens` must have `lstrip` false, got true of <think>",
        ),
        (apart(7), "`added_tokens` must have an id each, got 7 for "),
        (
            apart(99),
            "`model.vocab` must have an id for each word, got 99 for <think> and ",
        ),
        (
            apart(2100),
            "`model.vocab` must have all ids below 2100, which is how many there are, got 2100",
        ),
        (
            added(|added| added[1]["id"] = 2100.into()),
            "`model.vocab` must give <think> the id 2100 of `added_tokens`, got 1",
        ),
    ] {
        assert!(said.starts_with(expected), "{said}");
    }
}

#[test]
fn words_must_be_whole_and_merges_must_make_them() {
    let vocab = |change: fn(&mut Value)| refused(|file| change(&mut file["model"]["vocab"]));
    let merges = |pair: Value| {
        refused(|file| {
            let word = pair[0].as_str().unwrap().to_owned() + pair[1].as_str().unwrap();
            let has_word = CONTROL.contains(&&*word);
            if has_word {
                // Both halves are words, so that only what they make is wrong.
                for (n, half) in [0, 1].map(|n| (n, pair[n].as_str().unwrap())) {
                    file["model"]["vocab"][half] = (2100 + n).into();
                }
            }
            file["model"]["merges"].as_array_mut().unwrap().push(pair);
        })
    };
    for (said, expected) in [
        (
            vocab(|vocab| vocab["new"] = 99.into()),
            "`model.vocab` must have an id for each word, got 99 for ",
        ),
        (
            vocab(|vocab| vocab["new"] = 5000.into()),
            "`model.vocab` must have all ids below 2101, which is how many there are, got 5000",
        ),
        (
            vocab(|vocab| vocab["日本"] = 2100.into()),
            "`model.vocab` must be written in the alphabet of bytes, got \"日本\"",
        ),
        (
            vocab(|vocab| vocab[""] = 2100.into()),
            "`model.vocab` must be written in the alphabet of bytes, got \"\"",
        ),
        (
            vocab(|vocab| {
                let id = vocab.as_object_mut().unwrap().remove("Ŀ").unwrap();
                vocab["ĿĿ"] = id;
            }),
            "`model.vocab` must have a word for every byte, got none for Ŀ",
        ),
        (
            merges(json!(["q", "zz"])),
            "`model.merges` must be of words of `model.vocab` and make one, got [\"q\",\"zz\"]",
        ),
        (
            merges(json!(["<thi", "nk>"])),
            "`model.merges` must make no control text, got \"<think>\"",
        ),
    ] {
        assert!(said.starts_with(expected), "{said}");
    }
}
