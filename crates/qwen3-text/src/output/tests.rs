use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::tokenizer::tests::small;
use crate::{ChatTemplate, Conversation};

fn tokenizer() -> &'static Tokenizer {
    Tokenizer::shared().unwrap()
}

fn options() -> ParserOptions {
    ParserOptions::after_prompt(tokenizer().ids(), &[])
}

/// The deltas of each id of `text`, whose control texts are control tokens, and of the end.
fn streamed(text: &str) -> Vec<Delta> {
    OutputParser::parse(tokenizer().clone(), options(), &tokenizer().encode(text))
}

/// Deltas with those of one kind that follow each other joined, one a line.
fn shown(deltas: &[Delta]) -> String {
    let mut lines: Vec<(String, String)> = Vec::new();
    for delta in deltas {
        let (kind, text) = match delta {
            Delta::Reasoning(text) => ("reasoning".to_owned(), text.clone()),
            Delta::Content(text) => ("content".to_owned(), text.clone()),
            Delta::ToolCall { index, name } => (format!("name {index}"), name.clone()),
            Delta::ToolArguments { index, text } => (format!("arguments {index}"), text.clone()),
            Delta::ToolCallDone { index, error: None } => (format!("done {index}"), String::new()),
            Delta::ToolCallDone {
                index,
                error: Some(e),
            } => {
                let kind = if e.unfinished { "unfinished" } else { "error" };
                (format!("{kind} {index}"), e.reason.clone())
            }
        };
        match lines.last_mut() {
            Some((last, whole)) if *last == kind => whole.push_str(&text),
            _ => lines.push((kind, text)),
        }
    }
    let line = |(kind, text): (String, String)| format!("{kind}: {text:?}\n");
    lines.into_iter().map(line).collect()
}

/// Whatever the tokenizer, an answer has the same parts.
fn check(text: &str, expected: &[&str]) {
    let expected: String = expected.iter().map(|line| format!("{line}\n")).collect();
    assert_eq!(shown(&streamed(text)), expected, "{text:?}");
    let deltas = OutputParser::parse(small().clone(), options(), &small().encode(text));
    assert_eq!(shown(&deltas), expected, "{text:?}");
}

const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";

#[test]
fn a_turn_has_reasoning_content_and_calls() {
    check("Hello", &["content: \"Hello\""]);
    check(
        "<think>\nhm\n\nhm\n</think>\n\nHello\n\nyou\n<|im_end|>",
        &[
            "reasoning: \"hm\\n\\nhm\"",
            "content: \"Hello\\n\\nyou\\n\"",
        ],
    );
    check(
        &format!("<think>\nhm\n</think>\n\nI look.\n{CALL}\n{CALL}<|im_end|>"),
        &[
            "reasoning: \"hm\"",
            "content: \"I look.\"",
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": 1}\"",
            "done 0: \"\"",
            "name 1: \"f\"",
            "arguments 1: \"{\\\"a\\\": 1}\"",
            "done 1: \"\"",
        ],
    );
    check(
        &format!("a\n\n{CALL}\n then b\n"),
        &[
            "content: \"a\\n\"",
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": 1}\"",
            "done 0: \"\"",
            "content: \"\\n then b\\n\"",
        ],
    );
}

#[test]
fn blank_parts_are_no_parts() {
    check("", &[]);
    check("<think>\n\n</think>\n\n", &[]);
    check(
        &format!("<think>\n\n</think>\n\n{CALL}"),
        &[
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": 1}\"",
            "done 0: \"\"",
        ],
    );
    check(
        &format!("\n\n{CALL}\n\n"),
        &[
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": 1}\"",
            "done 0: \"\"",
        ],
    );
}

#[test]
fn borders_in_the_wrong_place_are_text() {
    check(
        "a</think>b</tool_call>c",
        &["content: \"a</think>b</tool_call>c\""],
    );
    check(
        "<think>a<think>b<tool_call>c</tool_call>",
        &["reasoning: \"a<think>b<tool_call>c</tool_call>\""],
    );
    check(
        "a<think>b</think>c",
        &["content: \"a\"", "reasoning: \"b\"", "content: \"c\""],
    );
    check(
        "<tool_response>x</tool_response>",
        &["content: \"<tool_response>x</tool_response>\""],
    );
    let in_call =
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"<think></think>\"}}</tool_call>";
    check(
        in_call,
        &[
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": \\\"<think></think>\\\"}\"",
            "done 0: \"\"",
        ],
    );
}

#[test]
fn spelled_borders_are_text() {
    let ids = tokenizer().encode_ordinary("<think>a</think><tool_call>{}</tool_call>");
    let deltas = OutputParser::parse(tokenizer().clone(), options(), &ids);
    assert_eq!(
        shown(&deltas),
        "content: \"<think>a</think><tool_call>{}</tool_call>\"\n"
    );
}

#[test]
fn reasoning_may_be_open_in_the_prompt() {
    let after = |prompt: &str| {
        let [one, other] = [tokenizer(), small()].map(|tokenizer| {
            ParserOptions::after_prompt(tokenizer.ids(), &tokenizer.encode(prompt))
        });
        assert_eq!(one, other);
        one
    };
    assert!(after("<|im_start|>assistant\n<think>\n").in_thought);
    assert!(!after("<|im_start|>assistant\n<think>\n\n</think>\n\n").in_thought);
    assert!(!after("<think><|im_start|>assistant\n").in_thought);
    assert!(!after("").in_thought);
    let ids = tokenizer().encode("hm\n</think>\n\nHello");
    let deltas = OutputParser::parse(tokenizer().clone(), after("<think>"), &ids);
    assert_eq!(shown(&deltas), "reasoning: \"hm\"\ncontent: \"Hello\"\n");
}

#[test]
fn parts_that_are_not_asked_for_stay_content() {
    let text = format!("\n\n<think>\nhm\n</think>\n\nx{CALL}\n\n");
    let plain = ParserOptions {
        in_thought: true,
        reasoning: false,
        tool_calls: false,
    };
    let deltas = OutputParser::parse(tokenizer().clone(), plain, &tokenizer().encode(&text));
    assert_eq!(shown(&deltas), format!("content: {text:?}\n"));
}

#[test]
fn a_call_without_its_end_counts_if_its_object_is_whole() {
    let whole = CALL.strip_suffix("\n</tool_call>").unwrap();
    check(
        whole,
        &[
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": 1}\"",
            "done 0: \"\"",
        ],
    );
    check(
        whole.strip_suffix("1}}").unwrap(),
        &[
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": \"",
            "unfinished 0: \"EOF while parsing a value at line 2 column 33\"",
        ],
    );
    check(
        "<tool_call>",
        &["unfinished 0: \"EOF while parsing a value at line 1 column 0\""],
    );
    check(
        &format!("{}{CALL}", whole.strip_suffix("}").unwrap()),
        &[
            "name 0: \"f\"",
            "arguments 0: \"{\\\"a\\\": 1}\"",
            "error 0: \"EOF while parsing an object at line 2 column 35\"",
            "name 1: \"f\"",
            "arguments 1: \"{\\\"a\\\": 1}\"",
            "done 1: \"\"",
        ],
    );
}

#[test]
fn arguments_come_in_several_forms() {
    for (block, name, arguments) in [
        (
            r#"{"name": "f", "arguments": "{\"a\": \"\\u2013 \u2013 \ud83d\ude42 \\n\"}"}"#,
            "f",
            r#"{"a": "\u2013 – 🙂 \n"}"#,
        ),
        (
            r#"{"arguments": {"a": [{}, "}"]}, "name": "f"}"#,
            "f",
            r#"{"a": [{}, "}"]}"#,
        ),
        (
            r#"{"id": {"x": "{"}, "n\u0061me": "f\"\u00e9", "arguments":{},"z":[1,2]}"#,
            "f\"é",
            "{}",
        ),
        (
            r#"{"a\\": 1, "b\"": 2, "name": "f\\", "arguments": {"a\\": "\\", "b\"": "\""}}"#,
            "f\\",
            r#"{"a\\": "\\", "b\"": "\""}"#,
        ),
        (r#"{"name": "f"}"#, "f", "{}"),
        (r#"{"name": "f", "arguments": null}"#, "f", "{}"),
        (r#"{"name": "f", "arguments": ""}"#, "f", "{}"),
    ] {
        let expected = [
            format!("name 0: {name:?}"),
            format!("arguments 0: {arguments:?}"),
            "done 0: \"\"".to_owned(),
        ];
        let lines: Vec<&str> = expected.iter().map(String::as_str).collect();
        check(&format!("<tool_call>\n{block}\n</tool_call>"), &lines);
    }
}

#[test]
fn what_is_no_call_is_kept_with_the_reason() {
    for (block, reason) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("f(1)", "it does not begin with `{`"),
        ("[]", "it does not begin with `{`"),
        ("{name: 1}", "a key must be in quotes"),
        (r#"{"name" 1}"#, "a key must be followed by `:`"),
        (r#"{"name": 1}"#, "`name` must be a string"),
        (r#"{"name": ""}"#, "`name` is empty"),
        (r#"{"name": "\x"}"#, "a string is not JSON"),
        (r#"{"name": "f", "name": "g"}"#, "`name` is given twice"),
        (
            r#"{"arguments": {}, "arguments": {}}"#,
            "`arguments` are given twice",
        ),
        (r#"{"arguments": {}}"#, "`name` is missing"),
        (
            r#"{"name": "f", "arguments": [1]}"#,
            "`arguments` must be an object",
        ),
        (
            r#"{"name": "f", "arguments": 7}"#,
            "`arguments` must be an object",
        ),
        (
            r#"{"name": "f", "arguments": "7"}"#,
            "`arguments` must be an object",
        ),
        (
            r#"{"name": "f", "arguments": "{"}"#,
            "`arguments` are a string that is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            r#"{"name": "f", "arguments": "\ud83d!"}"#,
            "`arguments` have an escape that is not JSON",
        ),
        (
            r#"{"name": "f", "arguments": {}}}"#,
            "there is text after the object",
        ),
        (
            r#"{"name": "f", "arguments": {"a": tru}}"#,
            "expected ident at line 1 column 37",
        ),
    ] {
        let deltas = streamed(&format!("<tool_call>{block}</tool_call>"));
        let Some(Delta::ToolCallDone {
            index: 0,
            error: Some(error),
        }) = deltas.last()
        else {
            panic!("{block}: {deltas:?}");
        };
        assert_eq!(
            (error.reason.as_str(), error.text.as_str()),
            (reason, block)
        );
        assert!(!error.unfinished);
    }
}

#[test]
fn nesting_without_end_is_an_error_of_the_call() {
    let deep = format!(
        "<tool_call>{{\"name\": \"f\", \"arguments\": {}",
        "{\"a\": ".repeat(50_000)
    );
    assert!(shown(&streamed(&deep)).contains("unfinished 0: \"recursion limit exceeded"));
}

#[test]
fn deltas_come_as_early_as_they_can() {
    let mut parser = OutputParser::new(tokenizer().clone(), options());
    let text = "<think>\nhm hm\n</think>\n\n<tool_call>\n{\"name\": \"click\", \"arguments\": {\"target\": \"e5\"}}";
    let steps: Vec<(String, String)> = tokenizer()
        .encode(text)
        .into_iter()
        .map(|id| (tokenizer().decode(&[id]).unwrap(), shown(&parser.push(id))))
        .filter(|(_, deltas)| !deltas.is_empty())
        .collect();
    let steps: Vec<(&str, &str)> = steps
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    let expected = [
        ("hm", "reasoning: \"hm\"\n"),
        (" hm", "reasoning: \" hm\"\n"),
        ("\",", "name 0: \"click\"\n"),
        (" {\"", "arguments 0: \"{\\\"\"\n"),
        ("target", "arguments 0: \"target\"\n"),
        ("\":", "arguments 0: \"\\\":\"\n"),
        (" \"", "arguments 0: \" \\\"\"\n"),
        ("e", "arguments 0: \"e\"\n"),
        ("5", "arguments 0: \"5\"\n"),
        ("\"}}", "arguments 0: \"\\\"}\"\n"),
    ];
    assert_eq!(steps, expected);
}

#[test]
fn a_finished_parser_begins_anew() {
    let ids = tokenizer().ids();
    let in_thought = ParserOptions::after_prompt(ids, &[ids.thought_open]);
    let mut parser = OutputParser::new(tokenizer().clone(), in_thought);
    for _ in 0..2 {
        let ids = tokenizer().encode(&format!("hm</think>{CALL}"));
        let mut deltas: Vec<Delta> = ids.into_iter().flat_map(|id| parser.push(id)).collect();
        deltas.extend(parser.finish());
        assert!(shown(&deltas).starts_with("reasoning: \"hm\"\nname 0: \"f\"\n"));
    }
}

/// What a turn means, as a message.
fn message(deltas: &[Delta]) -> Value {
    let mut message =
        json!({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []});
    let push =
        |field: &mut Value, text: &str| *field = (field.as_str().unwrap().to_owned() + text).into();
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => push(&mut message["reasoning_content"], text),
            Delta::Content(text) => push(&mut message["content"], text),
            Delta::ToolCall { name, .. } => {
                let calls = message["tool_calls"].as_array_mut().unwrap();
                calls.push(json!({"function": {"name": name, "arguments": ""}}));
            }
            Delta::ToolArguments { index, text } => {
                push(
                    &mut message["tool_calls"][index]["function"]["arguments"],
                    text,
                );
            }
            Delta::ToolCallDone { error, .. } => assert_eq!(error, &None),
        }
    }
    message
}

fn rendered(turn: &Value) -> String {
    let mut conversation = Conversation {
        messages: vec![json!({"role": "user", "content": "x"}), turn.clone()],
        ..Conversation::default()
    };
    conversation.mend();
    let text = ChatTemplate::qwen3().render(&conversation).unwrap();
    let (_, answer) = text.split_once("<|im_start|>assistant\n").unwrap();
    answer.strip_suffix("<|im_end|>\n").unwrap().to_owned()
}

prop_compose! {
    fn turn()(
        reasoning in "[a-z \n]{0,12}",
        content in prop_oneof![Just(String::new()), "[a-z <>{}\n]{1,12}x[ \n]{0,2}"],
        calls in prop::collection::vec(("[a-z_]{1,8}", "[a-z\"\\\\{}\n🙂é<]{0,8}", any::<Option<i64>>()), 0..3),
    ) -> Value {
        let calls: Vec<Value> = calls
            .into_iter()
            .map(|(name, text, number)| json!({"function": {"name": name, "arguments": {"t": text, "n": number}}}))
            .collect();
        json!({"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls})
    }
}

/// A JSON string with everything beyond ASCII escaped, as Python writes it.
fn in_ascii(text: &str) -> String {
    let mut out = String::new();
    for character in Value::from(text).to_string().chars() {
        match character.is_ascii() {
            true => out.push(character),
            false => {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out
}

proptest! {
    #[test]
    fn arguments_in_a_string_are_what_it_spells(text in r"(\PC|[\x00-\x20]|🙂|[\\\x22]){0,24}", ascii in any::<bool>()) {
        let arguments = json!({ "t": text, "n": [1, null] }).to_string();
        let spelled = if ascii { in_ascii(&arguments) } else { Value::from(arguments.as_str()).to_string() };
        let ids = tokenizer().encode_ordinary(&format!("{{\"name\": {}, \"arguments\": {spelled}}}", in_ascii("é🙂")));
        // The pattern's composition of characters is undone by no decoding.
        let block = tokenizer().decode(&ids).unwrap();
        let block: Value = serde_json::from_str(&block).unwrap();
        let marks = tokenizer().ids();
        let ids = [&[marks.call_open], &ids[..], &[marks.call_close]].concat();
        let parsed = message(&OutputParser::parse(tokenizer().clone(), options(), &ids));
        let function = &parsed["tool_calls"][0]["function"];
        prop_assert_eq!(&function["arguments"], &block["arguments"]);
        prop_assert_eq!(&function["name"], "é🙂");
    }

    /// The prompt's prefix cache depends on it: a turn that comes back in the next request has the same ids.
    #[test]
    fn a_parsed_turn_renders_to_what_was_generated(turn in turn()) {
        let generated = rendered(&turn);
        let parsed = message(&streamed(&generated));
        prop_assert_eq!(rendered(&parsed), generated);
    }

    #[test]
    fn cutting_a_turn_anywhere_only_takes_from_its_end(turn in turn(), cut in 0usize..200) {
        let ids = tokenizer().encode(&rendered(&turn));
        let whole = OutputParser::parse(tokenizer().clone(), options(), &ids);
        let mut parser = OutputParser::new(tokenizer().clone(), options());
        let cut = cut.min(ids.len());
        let given: Vec<Delta> = ids[..cut].iter().flat_map(|&id| parser.push(id)).collect();
        prop_assert_eq!(&given[..], &whole[..given.len()]);
    }
}
