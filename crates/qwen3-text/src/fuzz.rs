//! The entry for fuzzers: bytes become the ids of an answer, and what the parser makes of it is compared with a second
//! reading that takes the answer whole.

use serde_json::Value;

use crate::Tokenizer;
use crate::output::{CallError, Delta, OutputParser, ParserOptions};

/// Text that answers are made of and that is likely to be read wrong.
const PIECES: [&str; 40] = [
    "{\"name\": \"",
    "\", \"arguments\": ",
    "{\"name\": \"f\", \"arguments\": ",
    "{\"arguments\": ",
    ", \"name\": \"g\"",
    "{",
    "}",
    "}}",
    "[",
    "]",
    "\"",
    "\\",
    "\\\"",
    "\\u",
    "\\u2013",
    "\\ud83d",
    "\\ude42",
    "\\n",
    ":",
    ",",
    " ",
    "\n",
    "\n\n",
    "null",
    "true",
    "-1.5e3",
    "1e999",
    "\"a\": ",
    "\"b\": {\"c\": [1, {}]}",
    "{}",
    "{\"x\": 1}",
    "\"{}\"",
    "\"{\\\"x\\\": 1}\"",
    "\"{\\\"",
    "é🙂",
    "\t",
    "text",
    "\r\n",
    "\"name\": ",
    "<tool_call>",
];

/// Control tokens that borders are made of, and some that mean nothing in an answer.
const BORDERS: [&str; 8] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_call>",
    "</tool_call>",
    "<|im_end|>",
    "<tool_response>",
];

/// What the parts of an answer lie between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Border {
    ThoughtOpen,
    ThoughtClose,
    CallOpen,
    CallClose,
}

/// What an answer holds, read whole.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    content: String,
    calls: Vec<Call>,
}

#[derive(Debug, Default, PartialEq)]
struct Call {
    name: Option<String>,
    arguments: String,
    error: Option<CallError>,
}

/// Reads `data` as an answer and panics if the parser breaks a rule: the deltas must come in order and, joined, equal
/// the whole reading. For `cargo fuzz` and the like:
/// `fuzz_target!(|data: &[u8]| espalier_qwen3_text::fuzz_output_parser(data));`
pub fn fuzz_output_parser(data: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::shared() {
        check(tokenizer, data);
    }
}

fn check(tokenizer: &Tokenizer, data: &[u8]) {
    let (&flags, data) = data.split_first().unwrap_or((&0, &[]));
    let options = ParserOptions {
        in_thought: flags & 1 != 0,
        reasoning: flags & 2 == 0,
        tool_calls: flags & 4 == 0,
    };
    let ids = answer(tokenizer, data);
    let deltas = OutputParser::parse(tokenizer.clone(), options, &ids);
    let joined = joined(&deltas);
    let whole = whole(tokenizer, options, &ids);
    assert_eq!(joined.reasoning, whole.reasoning, "{ids:?}");
    assert_eq!(joined.content, whole.content, "{ids:?}");
    assert_eq!(joined.calls.len(), whole.calls.len(), "{ids:?}");
    for (joined, whole) in joined.calls.iter().zip(&whole.calls) {
        compare(joined, whole);
    }
}

/// The ids that `data` stands for.
fn answer(tokenizer: &Tokenizer, data: &[u8]) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut bytes = data.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            0..40 => ids.extend(tokenizer.encode(BORDERS[usize::from(byte) % BORDERS.len()])),
            40..200 => {
                let piece = PIECES[usize::from(byte - 40) % PIECES.len()];
                ids.extend(tokenizer.encode_ordinary(piece));
            }
            // Of Qwen3's vocabulary these are tokens of one byte, which make broken UTF-8.
            200..220 => ids.push(u32::from(bytes.next().unwrap_or(byte))),
            // Any id, padding included.
            _ => {
                let (high, low) = (bytes.next().unwrap_or(0), bytes.next().unwrap_or(0));
                let id = u32::from_be_bytes([0, byte & 3, high, low]);
                ids.push(id % (2 * tokenizer.vocabulary()));
            }
        }
    }
    ids
}

/// Joins deltas, and holds them against the order that they must come in.
fn joined(deltas: &[Delta]) -> Answer {
    let mut answer = Answer::default();
    let mut done = 0;
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => answer.reasoning.push_str(text),
            Delta::Content(text) => answer.content.push_str(text),
            Delta::ToolCall { index, name } => {
                assert_eq!(
                    (*index, answer.calls.len()),
                    (done, done),
                    "a call within a call"
                );
                answer.calls.push(Call {
                    name: Some(name.clone()),
                    ..Call::default()
                });
            }
            Delta::ToolArguments { index, text } => {
                assert_eq!(
                    (*index, answer.calls.len()),
                    (done, done + 1),
                    "arguments without a name"
                );
                assert!(!text.is_empty());
                answer.calls[done].arguments.push_str(text);
            }
            Delta::ToolCallDone { index, error } => {
                assert_eq!(*index, done);
                answer.calls.resize_with(done + 1, Call::default);
                answer.calls[done].error.clone_from(error);
                done += 1;
            }
        }
    }
    assert_eq!(answer.calls.len(), done, "a call without an end");
    answer
}

/// Reads an answer by cutting it at its borders first.
fn whole(tokenizer: &Tokenizer, options: ParserOptions, ids: &[u32]) -> Answer {
    let mut answer = Answer::default();
    let marks = tokenizer.ids();
    let border = |id: u32| match id {
        _ if id == marks.thought_open => Some(Border::ThoughtOpen),
        _ if id == marks.thought_close => Some(Border::ThoughtClose),
        _ if id == marks.call_open => Some(Border::CallOpen),
        _ if id == marks.call_close => Some(Border::CallClose),
        _ => None,
    };
    let mut kind = match options.in_thought && options.reasoning {
        true => Border::ThoughtOpen,
        false => Border::ThoughtClose,
    };
    let mut rest = ids;
    loop {
        let means = |found: &Border| match kind {
            Border::ThoughtOpen => *found == Border::ThoughtClose,
            Border::CallOpen => matches!(found, Border::CallOpen | Border::CallClose),
            _ => {
                *found == Border::ThoughtOpen && options.reasoning
                    || *found == Border::CallOpen && options.tool_calls
            }
        };
        let mut borders = rest.iter().enumerate();
        let next = borders.find_map(|(at, id)| Some((at, border(*id).filter(means)?)));
        let text = text(tokenizer, &rest[..next.map_or(rest.len(), |(at, _)| at)]);
        match kind {
            Border::ThoughtOpen => answer.reasoning.push_str(text.trim_matches('\n')),
            Border::CallOpen => answer.calls.push(whole_call(&text, next.is_none())),
            _ if !options.reasoning && !options.tool_calls => answer.content.push_str(&text),
            _ => {
                let next = next.map(|(_, next)| next);
                answer.content.push_str(whole_content(&text, kind, next));
            }
        }
        let Some((at, next)) = next else {
            return answer;
        };
        kind = next;
        rest = &rest[at + 1..];
    }
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let shown = |id: &u32| !tokenizer.is_special(*id) && tokenizer.token_bytes(*id).is_some();
    let ids: Vec<u32> = ids.iter().copied().filter(shown).collect();
    tokenizer.decode(&ids).unwrap_or_default()
}

fn whole_content(text: &str, after: Border, before: Option<Border>) -> &str {
    if text.trim().is_empty() {
        return "";
    }
    let text = match after {
        Border::CallClose => text,
        _ => text.trim_start_matches('\n'),
    };
    match before {
        Some(Border::CallOpen) => text.strip_suffix('\n').unwrap_or(text),
        _ => text,
    }
}

/// A block read by a JSON parser alone. Errors have no reason here: the readings find different ones first.
fn whole_call(text: &str, unfinished: bool) -> Call {
    let read = || -> Option<Call> {
        let block: Value = serde_json::from_str(text).ok()?;
        let arguments = match block.get("arguments") {
            None | Some(Value::Null) => "{}".to_owned(),
            Some(Value::String(spelled)) if spelled.trim().is_empty() => format!("{spelled}{{}}"),
            Some(Value::String(spelled)) => spelled.clone(),
            Some(arguments) => arguments.to_string(),
        };
        let is_object = serde_json::from_str::<Value>(&arguments).ok()?.is_object();
        let name = block
            .get("name")?
            .as_str()
            .filter(|name| !name.is_empty())?;
        is_object.then(|| Call {
            name: Some(name.to_owned()),
            arguments,
            error: None,
        })
    };
    read().unwrap_or_else(|| Call {
        error: Some(CallError {
            reason: String::new(),
            text: text.to_owned(),
            unfinished,
        }),
        ..Call::default()
    })
}

fn compare(joined: &Call, whole: &Call) {
    match (&joined.error, &whole.error) {
        (None, None) => {
            assert_eq!(joined.name, whole.name);
            let value = |call: &Call| serde_json::from_str::<Value>(&call.arguments).ok();
            assert_eq!(value(joined), value(whole), "{joined:?} {whole:?}");
        }
        (Some(error), Some(expected)) => {
            assert_eq!(error.text, expected.text);
            assert_eq!(error.unfinished, expected.unfinished);
            assert!(!error.reason.is_empty());
        }
        // JSON parsers take the last of two equal keys; the first may already be given.
        (Some(error), None) => assert!(error.reason.ends_with("given twice"), "{error:?}"),
        (None, Some(_)) => panic!("{joined:?} is no call: {whole:?}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::tests::small;

    /// Numbers that are the same in each run (SplitMix64).
    fn numbers(mut seed: u64) -> impl FnMut() -> u64 {
        move || {
            seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }
    }

    #[test]
    fn answers_at_random_are_read_as_a_whole_reading_reads_them() {
        let mut calls = [0, 0];
        for seed in 0..8_000 {
            let mut next = numbers(seed);
            let length = next() % 64;
            let data: Vec<u8> = (0..length).map(|_| next() as u8).collect();
            fuzz_output_parser(&data);
            check(small(), &data);
        }
        // Mostly well-formed calls with one byte changed: the random ones above seldom get past the name.
        for seed in 0..8_000 {
            let mut next = numbers(1 << 32 | seed);
            let mut data = vec![0];
            for _ in 0..1 + next() % 3 {
                data.push(if next().is_multiple_of(2) { 2 } else { 4 });
                data.extend([42, 40 + (28 + next() % 7) as u8, 46, 3]);
            }
            if !next().is_multiple_of(4) {
                let at = 1 + next() as usize % (data.len() - 1);
                data[at] = next() as u8;
            }
            for (tokenizer, calls) in [Tokenizer::shared().unwrap(), small()]
                .iter()
                .zip(&mut calls)
            {
                check(tokenizer, &data);
                let deltas = OutputParser::parse(
                    (*tokenizer).clone(),
                    ParserOptions::after_prompt(tokenizer.ids(), &[]),
                    &answer(tokenizer, &data[1..]),
                );
                let good = joined(&deltas)
                    .calls
                    .into_iter()
                    .filter(|call| call.error.is_none());
                *calls += good.count();
            }
        }
        assert!(
            calls.iter().all(|calls| *calls > 2_000),
            "only {calls:?} calls were good: the cases are not what they claim"
        );
    }

    #[test]
    fn a_fuzzer_without_bytes_finds_nothing() {
        fuzz_output_parser(&[]);
    }

    proptest! {
        #[test]
        fn bytes_at_random_break_no_rule(data in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz_output_parser(&data);
        }
    }
}
