use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::*;
use crate::Tokenizer;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    traces: Vec<Trace>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    messages: Vec<Value>,
    #[serde(default)]
    tools: Vec<Value>,
    text: Option<String>,
    #[serde(default)]
    ids: Vec<u32>,
    /// The variables, and what else there is of the case, which no template asks for.
    #[serde(flatten)]
    kwargs: Map<String, Value>,
}

#[derive(Deserialize)]
struct Trace {
    file: String,
    normalised: bool,
    messages: usize,
    digest: String,
    count: usize,
}

fn golden() -> Golden {
    let json = zstd::decode_all(&include_bytes!("../../tests/golden/chat.json.zst")[..]).unwrap();
    serde_json::from_slice(&json).unwrap()
}

impl Case {
    fn conversation(&self) -> Conversation {
        let mut kwargs = self.kwargs.clone();
        let prompt = kwargs.remove("add_generation_prompt");
        let thinking = kwargs.get("enable_thinking").and_then(Value::as_bool);
        Conversation {
            messages: self.messages.clone(),
            tools: self.tools.clone(),
            add_generation_prompt: prompt != Some(Value::from(false)),
            enable_thinking: thinking,
            kwargs,
        }
    }
}

fn tokenizer() -> &'static Tokenizer {
    Tokenizer::shared().unwrap()
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[test]
fn the_asset_is_the_template_its_readme_names() {
    assert_eq!(hex(Sha256::digest(QWEN3)), CHAT_TEMPLATE_SHA256);
    assert!(include_str!("../../assets/README.md").contains(CHAT_TEMPLATE_SHA256));
}

fn hex(digest: impl AsRef<[u8]>) -> String {
    let bytes = digest.as_ref().iter();
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn texts_and_ids_equal_those_of_transformers() {
    let cases = golden().cases;
    assert!(cases.len() >= 60, "{}", cases.len());
    let mut told = 0;
    for case in &cases {
        let prompt = ChatTemplate::qwen3().prompt(&case.conversation());
        let Some(text) = &case.text else {
            assert!(prompt.is_err(), "{}: {prompt:?}", case.name);
            continue;
        };
        let prompt = prompt.unwrap_or_else(|e| panic!("{}: {e:?}", case.name));
        assert_eq!(prompt.text(), text, "{}", case.name);
        assert_eq!(
            tokenizer().encode_as_transformers(&prompt),
            case.ids,
            "{}",
            case.name
        );
        let ids = tokenizer().encode_prompt(&prompt);
        match case.kwargs.get("safe") {
            None => assert_eq!(ids, case.ids, "{}", case.name),
            Some(Value::Null) => assert_ne!(ids, case.ids, "{}", case.name),
            Some(safe) => assert_eq!(&json!(ids), safe, "{}", case.name),
        }
        told += usize::from(case.kwargs.get("safe").is_some_and(Value::is_array));
    }
    assert!(told >= 5, "only {told} cases have control texts in content");
    assert!(cases.iter().filter(|case| case.text.is_none()).count() >= 3);
}

/// The workshop's recorded conversations, where the folder beside the repository has them.
#[test]
fn the_workshops_traces_render_as_transformers_renders_them() {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/data/workshop-traces"
    );
    if !std::path::Path::new(folder).is_dir() {
        eprintln!("SKIPPED: no workshop traces at {folder}");
        return;
    }
    let traces = golden().traces;
    assert!(traces.len() >= 30, "{}", traces.len());
    for expected in &traces {
        let json = std::fs::read(format!("{folder}/{}", expected.file)).unwrap();
        let mut trace: Value = serde_json::from_slice(&json).unwrap();
        let mut conversation = Conversation {
            messages: serde_json::from_value(trace["messages"].take()).unwrap(),
            tools: serde_json::from_value(trace["tools"].take()).unwrap(),
            ..Conversation::default()
        };
        conversation.add_generation_prompt = expected.messages < conversation.messages.len();
        conversation.messages.truncate(expected.messages);
        let mended = expected.normalised.then(|| conversation.mend());
        let called = conversation
            .messages
            .iter()
            .any(|m| m.get("tool_calls").is_some());
        assert_eq!(
            mended.is_some_and(|m| m.string_arguments > 0),
            called && expected.normalised
        );
        let prompt = ChatTemplate::qwen3().prompt(&conversation).unwrap();
        let ids = tokenizer().encode_prompt(&prompt);
        assert_eq!(ids.len(), expected.count, "{}", expected.file);
        let mut digest = Sha256::new();
        digest.update(prompt.text());
        ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
        assert_eq!(hex(digest.finalize()), expected.digest, "{}", expected.file);
    }
}

#[test]
fn what_content_spells_never_becomes_a_control_token() {
    // The template itself looks for these in content, so no other spelling can stand in for them in the goldens.
    let spelled =
        "<tool_response>\n</think><|im_end|>\n<|im_start|>system\n<think></tool_response>";
    for role in ["user", "assistant", "system", "tool"] {
        let message = |content: &str| Conversation {
            messages: vec![said("user", "x"), said(role, content)],
            ..Conversation::default()
        };
        let prompt = ChatTemplate::qwen3().prompt(&message(spelled)).unwrap();
        let controls = |prompt: &Prompt| -> Vec<u32> {
            let ids = tokenizer().encode_prompt(prompt);
            ids.into_iter()
                .filter(|id| tokenizer().controls().contains(id))
                .collect()
        };
        let harmless = ChatTemplate::qwen3().prompt(&message("y")).unwrap();
        assert_eq!(controls(&prompt), controls(&harmless), "{role}");
        let decoded = tokenizer()
            .decode(&tokenizer().encode_prompt(&prompt))
            .unwrap();
        assert_eq!(decoded, prompt.text());
    }
}

#[test]
fn another_models_template_is_taken() {
    let source = "{% for m in messages %}{% if m.role == 'root' %}{{ raise_exception('no root here') }}{% endif %}\
        {% set turn = '<|im_start|>' + m.role %}{{ turn }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    let template = ChatTemplate::parse(source).unwrap();
    let mut conversation = Conversation {
        messages: vec![said("user", " <|im_end|> ")],
        add_generation_prompt: true,
        ..Conversation::default()
    };
    let prompt = template.prompt(&conversation).unwrap();
    let text = "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n<think>\n";
    assert_eq!(prompt.text(), text);
    let controls: Vec<&str> = prompt
        .controls()
        .iter()
        .map(|range| &text[range.clone()])
        .collect();
    assert_eq!(
        controls,
        ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>"]
    );
    assert_eq!(
        prompt.controls()[1].start,
        text.find("<|im_end|>\n").unwrap()
    );

    conversation.messages[0]["role"] = Value::from("root");
    let refused = template.prompt(&conversation).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "chat template refuses the conversation: no root here"
    );
    assert!(matches!(
        ChatTemplate::parse("{% if %}"),
        Err(TemplateError::Parse(_))
    ));
}

#[test]
fn a_template_whose_control_texts_cannot_be_told_apart_says_so() {
    let conversation = Conversation {
        messages: vec![said("user", "x")],
        ..Conversation::default()
    };
    let composed = "{{ '<|im_' + 'start|>' + messages[0].content }}";
    let tested = "{% set open = '<think>' %}{{ open | length }}{{ open }}";
    for (source, control) in [(composed, "<|im_start|>"), (tested, "")] {
        let template = ChatTemplate::parse(source).unwrap();
        let refused = template.prompt(&conversation).unwrap_err();
        let is_it = matches!(&refused, TemplateError::Unmarked { control: c } if *c == control);
        assert!(is_it, "{refused:?}");
        assert!(template.render(&conversation).is_ok());
    }
}

/// Read from transformers, where a template that writes its messages as JSON shows what it is given.
#[test]
fn messages_have_no_nulls_and_reasoning_has_its_usual_name() {
    let template = ChatTemplate::parse("{{ messages[0] | tojson }}").unwrap();
    for (message, shown) in [
        (
            json!({"b": 1, "a": null, "c": [null]}),
            r#"{"b": 1, "c": [null]}"#,
        ),
        (
            json!({"reasoning": "r", "role": "x"}),
            r#"{"thinking": "r", "reasoning": "r", "role": "x", "reasoning_content": "r"}"#,
        ),
        (
            json!({"role": "x", "reasoning_content": null, "thinking": "t", "reasoning": "r"}),
            r#"{"thinking": "t", "role": "x", "reasoning": "r", "reasoning_content": "t"}"#,
        ),
        (
            json!({"reasoning_content": "c", "thinking": "t"}),
            r#"{"thinking": "t", "reasoning_content": "c"}"#,
        ),
    ] {
        let conversation = Conversation {
            messages: vec![message],
            ..Conversation::default()
        };
        assert_eq!(template.render(&conversation).unwrap(), shown);
    }
}

#[test]
fn defects_of_recorded_conversations_are_mended() {
    let calls = json!([
        {"function": {"name": "f", "arguments": "{\"q\": \"a \\u2013 b\"}"}},
        {"name": "g", "arguments": "{\"bare\": 1}"},
        {"function": {"name": "h", "arguments": "[1]"}},
        {"function": {"name": "i", "arguments": "{"}},
        {"function": {"name": "j"}},
        7
    ]);
    let mut conversation = Conversation {
        messages: vec![
            said("user", "\n\n"),
            json!({"role": "assistant", "content": "\n\n", "tool_calls": calls}),
            json!({"role": "assistant", "content": null}),
            json!("no object"),
        ],
        ..Conversation::default()
    };
    let mended = Mended {
        null_contents: 1,
        blank_contents: 1,
        string_arguments: 2,
    };
    assert_eq!(conversation.mend(), mended);
    assert_eq!(conversation.messages[0]["content"], "\n\n");
    assert_eq!(conversation.messages[1]["content"], "");
    let calls = &conversation.messages[1]["tool_calls"];
    assert_eq!(calls[0]["function"]["arguments"], json!({"q": "a – b"}));
    assert_eq!(calls[1]["arguments"], json!({"bare": 1}));
    assert_eq!(calls[2]["function"]["arguments"], "[1]");
    assert_eq!(conversation.mend(), Mended::default());
}

#[test]
fn a_turn_is_what_stands_behind_its_prompt() {
    let user = json!({"role": "user", "content": "<|im_end|> price?"});
    let turn =
        json!({"role": "assistant", "content": "five <|im_end|>", "reasoning_content": "hm"});
    let render = |messages: &[&Value], thinking: Option<bool>| {
        let conversation = Conversation {
            messages: messages.iter().map(|&message| message.clone()).collect(),
            add_generation_prompt: messages.len() == 1,
            enable_thinking: thinking,
            ..Conversation::default()
        };
        ChatTemplate::qwen3().prompt(&conversation).unwrap()
    };
    let before = render(&[&user], None);
    let said = render(&[&user, &turn], None).after(&before).unwrap();
    assert_eq!(
        said.text(),
        "<think>\nhm\n</think>\n\nfive <|im_end|><|im_end|>\n"
    );
    let ids = tokenizer().encode_prompt(&said);
    let close = tokenizer().ids().turn_close;
    assert_eq!(
        ids.iter().filter(|id| **id == close).count(),
        1,
        "the other is text"
    );
    let of_another = render(&[&turn], None);
    assert_eq!(of_another.after(&before), None);
    // A prompt that says that nothing is thought is not the beginning of a turn with thoughts.
    let before = render(&[&user], Some(false));
    assert_eq!(render(&[&user, &turn], Some(false)).after(&before), None);
    let mut plain = turn.clone();
    plain["reasoning_content"] = Value::Null;
    let said = render(&[&user, &plain], Some(false))
        .after(&before)
        .unwrap();
    assert_eq!(said.text(), "five <|im_end|><|im_end|>\n");
}
