use espalier_core::chat::{ToolCall, on_the_wire};
use espalier_qwen3_text::Tokenizer;
use serde_json::{Map, json};

use super::*;
use crate::sample::{Sample, sample};
use crate::source::Facts;

fn renderer() -> Renderer {
    Renderer::new(Tokenizer::shared().unwrap())
}

/// A tokenizer as a model may bring it.
fn small() -> Tokenizer {
    let json = include_str!("../../../qwen3-text/tests/golden/small/tokenizer.json");
    Tokenizer::from_json(json).unwrap()
}

fn user(content: &str) -> Message {
    Message::User {
        content: content.into(),
    }
}

fn result(content: &str) -> Message {
    Message::Tool {
        tool_call_id: "c".into(),
        content: content.into(),
    }
}

fn said(content: &str) -> Message {
    Message::assistant(content.into(), Some("hm".into()), vec![])
}

fn called() -> Message {
    let arguments = json!({"url": "a"}).as_object().cloned();
    let call = ToolCall::new("c", "open", arguments.unwrap_or_default());
    Message::assistant(String::new(), Some("look".into()), vec![call])
}

const CALLED: &str = "<think>\nlook\n</think>\n\n<tool_call>\n{\"name\": \"open\", \"arguments\": {\"url\": \"a\"}}\n</tool_call><|im_end|>";
/// The same call in another spelling: no prompt repeats it so.
const CALLED_TIGHT: &str = "<think>\nlook\n</think>\n\n<tool_call>\n{\"name\":\"open\",\"arguments\":{\"url\":\"a\"}}\n</tool_call><|im_end|>";

fn spelt(content: &str) -> String {
    format!("<think>\nhm\n</think>\n\n{content}<|im_end|>")
}

/// A conversation as a server of ours would have recorded it, with these completions.
fn served(messages: Vec<Message>, completions: &[&str]) -> Source {
    served_by(&mut renderer(), messages, completions)
}

/// The same with another tokenizer.
fn served_by(renderer: &mut Renderer, messages: Vec<Message>, completions: &[&str]) -> Source {
    let turns: Vec<usize> = assistant_turns(&messages).collect();
    let mut calls = Vec::new();
    for (&message, completion) in turns.iter().zip(completions) {
        let before = on_the_wire(&messages[..message]);
        let prompt = renderer.prompt(&before, &[], true).unwrap();
        calls.push(SourceCall {
            message,
            prompt: Some(renderer.encode(&prompt, 0)),
            completion: renderer.tokenizer().encode(completion),
            is_ended: completion.ends_with("<|im_end|>"),
        });
    }
    Source {
        id: "s".into(),
        timestamp: String::new(),
        model: String::new(),
        messages,
        tools: vec![],
        facts: Facts::default(),
        thinking: true,
        keep_hints: None,
        calls,
    }
}

fn shop(completion: &str) -> Source {
    let messages = vec![user("price?"), called(), result("page"), said("five")];
    served(messages, &[completion, &spelt("five")])
}

fn hinted(completion: &str) -> Source {
    let hint = Message::System {
        content: "the footer has it".into(),
        hint: true,
    };
    let mut messages = vec![hint];
    messages.extend(shop(completion).messages);
    served(messages, &[completion, &spelt("five")])
}

fn made(source: &Source, options: RowsOptions) -> (Vec<Row>, Vec<Sample>, Drift) {
    let mut renderer = renderer();
    let (rows, drift) = rows(source, options, Split::Train, &mut renderer).unwrap();
    let samples = rows
        .iter()
        .map(|row| sample(row, 10_000, &mut renderer).unwrap());
    let samples = samples.collect();
    (rows, samples, drift)
}

fn text(ids: &[u32]) -> String {
    Tokenizer::shared().unwrap().decode(ids).unwrap()
}

fn trained(sample: &Sample) -> Vec<String> {
    let spans = sample.supervised.iter();
    spans
        .map(|s| text(&sample.ids[s.start as usize..s.end as usize]))
        .collect()
}

fn breaks(breaks: usize) -> Drift {
    Drift {
        breaks,
        misspelt: 0,
    }
}

#[test]
fn turns_that_continue_each_other_are_one_row() {
    let source = shop(CALLED);
    let (rows, samples, drift) = made(&source, RowsOptions::default());
    assert_eq!((rows.len(), drift), (1, breaks(0)));
    assert_eq!((rows[0].id.as_str(), rows[0].truncated), ("s", false));
    assert_eq!(trained(&samples[0]), [CALLED, &spelt("five")]);
    let last = &source.calls[1];
    let whole = [last.prompt.as_deref().unwrap(), &last.completion].concat();
    assert_eq!(samples[0].ids, whole);
    // Nothing that was sampled differs from what the template writes, so that rendering gives the same.
    let rendered = Source {
        calls: vec![],
        ..source
    };
    let (_, rendered, _) = made(&rendered, RowsOptions::default());
    assert_eq!(rendered[0].ids, samples[0].ids);
    assert_eq!(rendered[0].supervised, samples[0].supervised);
}

#[test]
fn a_prompt_that_does_not_continue_begins_a_row() {
    let source = shop(CALLED_TIGHT);
    let (rows, samples, drift) = made(&source, RowsOptions::default());
    assert_eq!(drift, breaks(1));
    assert_eq!(
        rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(),
        ["s_trunc_1", "s"]
    );
    assert_eq!(rows[0].messages, source.messages[..2]);
    assert_eq!(rows[0].truncation_point, Some(1));
    assert_eq!(rows[1].messages, source.messages);
    assert_eq!(
        (
            rows[0].trained_turns.as_slice(),
            rows[1].trained_turns.as_slice()
        ),
        (&[0][..], &[1][..])
    );
    assert_eq!(trained(&samples[0]), [CALLED_TIGHT]);
    assert_eq!(trained(&samples[1]), [spelt("five")]);
    for (sample, call) in samples.iter().zip(&source.calls) {
        let whole = [call.prompt.as_deref().unwrap(), &call.completion].concat();
        assert_eq!(sample.ids, whole);
    }
}

#[test]
fn hints_go_and_sampled_ids_stay() {
    // Another spelling of "five" than the tokenizer's own.
    let mut source = hinted(CALLED);
    let odd = [
        &Tokenizer::shared()
            .unwrap()
            .encode("<think>\nhm\n</think>\n\n")[..],
        &[69, 72, 85, 68, 151_645],
    ]
    .concat();
    source.calls[1].completion = odd.clone();
    let (rows, samples, drift) = made(&source, RowsOptions::default());
    assert_eq!((rows.len(), drift), (1, breaks(0)));
    assert_eq!(rows[0].messages, source.messages[1..]);
    assert!(!text(&samples[0].ids).contains("footer"));
    assert!(samples[0].ids.ends_with(&odd));
    assert_eq!(trained(&samples[0])[0], CALLED);
    let (_, without, _) = made(&shop(CALLED), RowsOptions::default());
    assert_eq!(text(&samples[0].ids), text(&without[0].ids));
    assert_ne!(samples[0].ids, without[0].ids);

    let keep_hints = RowsOptions {
        keep_hints: true,
        ..RowsOptions::default()
    };
    source.keep_hints = Some(false);
    let (_, left_out, _) = made(&source, keep_hints);
    assert_eq!(left_out, samples, "what the conversation itself says holds");
    source.keep_hints = None;
    let (rows, samples, _) = made(&source, keep_hints);
    assert!(text(&samples[0].ids).contains("footer"));
    assert_eq!(rows[0].messages.len(), 5);
    assert!(
        samples[0]
            .ids
            .starts_with(source.calls[1].prompt.as_deref().unwrap())
    );
}

#[test]
fn what_is_spliced_in_must_be_what_the_next_prompt_spells() {
    let (rows, samples, drift) = made(&hinted(CALLED_TIGHT), RowsOptions::default());
    assert_eq!((rows.len(), drift), (2, breaks(1)));
    assert_eq!(trained(&samples[0]), [CALLED_TIGHT]);
    assert!(
        text(&samples[1].ids).contains(CALLED),
        "the context is what a server would write"
    );
    assert!(
        samples
            .iter()
            .all(|sample| !text(&sample.ids).contains("footer"))
    );
}

#[test]
fn each_question_of_the_user_is_a_row() {
    let messages = vec![user("1?"), said("one"), user("2?"), said("two")];
    let source = served(messages, &[&spelt("one"), &spelt("two")]);
    let (rows, samples, drift) = made(&source, RowsOptions::default());
    // The thoughts of the first answer are gone in the second prompt, which is no drift.
    assert_eq!((rows.len(), drift), (2, breaks(0)));
    assert!(text(&samples[1].ids).contains("assistant\none<|im_end|>"));
    let every = RowsOptions {
        unroll: Unroll::EveryAssistant,
        ..RowsOptions::default()
    };
    let (_, each, _) = made(&source, every);
    assert_eq!(each, samples);
}

#[test]
fn changed_turns_are_rendered_and_what_follows_them_is_spliced() {
    let mut messages = shop(CALLED).messages;
    messages.extend([
        user("sure?"),
        called(),
        result("page"),
        said("yes"),
        called(),
        result("x"),
        said("done"),
    ]);
    let completions = [
        CALLED,
        &spelt("five"),
        CALLED,
        &spelt("yes"),
        CALLED,
        &spelt("done"),
    ];
    let mut source = served(messages, &completions);
    // Somebody wrote the answer `yes`: its ids are gone, and the prompts after it.
    let changed = source.calls.remove(3).message;
    source.messages[changed] = said("yes, quite");
    for call in source
        .calls
        .iter_mut()
        .filter(|call| call.message > changed)
    {
        call.prompt = None;
    }
    let (rows, samples, drift) = made(&source, RowsOptions::default());
    assert_eq!(drift, breaks(0));
    let found: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row.id.as_str(),
                row.trained_turns.as_slice(),
                row.recorded.is_some(),
            )
        })
        .collect();
    let expected: [(&str, &[u32], bool); 4] = [
        ("s_trunc_2", &[0, 1], true),
        ("s_trunc_3", &[2], true),
        ("s_trunc_4", &[3], false),
        ("s", &[4, 5], true),
    ];
    assert_eq!(found, expected);
    assert_eq!(trained(&samples[2]), [spelt("yes, quite")]);
    assert!(text(&samples[3].ids).contains("yes, quite<|im_end|>"));
    assert_eq!(trained(&samples[3]), [CALLED, &spelt("done")]);
}

#[test]
fn ids_that_do_not_spell_their_message_are_not_trusted() {
    let mut source = shop(CALLED);
    source.calls[1].completion = Tokenizer::shared()
        .unwrap()
        .encode("<think>\nhm\n</think>\n\n6<|im_end|>");
    let (rows, samples, drift) = made(&source, RowsOptions::default());
    assert_eq!(
        drift,
        Drift {
            breaks: 0,
            misspelt: 1
        }
    );
    assert_eq!(
        (rows[0].recorded.is_some(), rows[1].recorded.is_some()),
        (true, false)
    );
    assert_eq!(trained(&samples[1]), [spelt("five")]);

    let mut source = shop(CALLED);
    source.calls[0].prompt.as_mut().unwrap()[0] = 151_935;
    let (_, _, drift) = made(&source, RowsOptions::default());
    assert_eq!(drift.misspelt, 1, "no token has the id");
}

#[test]
fn ids_are_of_the_tokenizer_that_rows_are_for() {
    let tokenizers = [Tokenizer::shared().unwrap().clone(), small()];
    let messages = shop(CALLED).messages;
    let completions = [CALLED, &spelt("five")];
    let sources = tokenizers.each_ref().map(|tokenizer| {
        served_by(
            &mut Renderer::new(tokenizer),
            messages.clone(),
            &completions,
        )
    });
    for (to, tokenizer) in tokenizers.iter().enumerate() {
        let mut renderer = Renderer::new(tokenizer);
        let mut made = sources.each_ref().map(|source| {
            let options = RowsOptions::default();
            let (rows, drift) = rows(source, options, Split::Train, &mut renderer).unwrap();
            let sample = sample(&rows[0], 10_000, &mut renderer).unwrap();
            assert_eq!(rows.len(), 1);
            (rows[0].recorded.is_some(), drift.misspelt, sample)
        });
        let (other, own) = (1 - to, to);
        assert_eq!((made[own].0, made[own].1), (true, 0));
        // What another one sampled is rendered, and gives the same.
        assert_eq!((made[other].0, made[other].1), (false, 2));
        made[other].2.origin = made[own].2.origin;
        assert_eq!(made[other].2, made[own].2);
        let [first, last] = &made[own].2.supervised[..] else {
            panic!("{:?}", made[own].2.supervised);
        };
        let decode = |span: &Range<u32>| {
            let ids = &made[own].2.ids[span.start as usize..span.end as usize];
            tokenizer.decode(ids).unwrap()
        };
        assert_eq!([decode(first), decode(last)], [CALLED, &spelt("five")]);
    }
}

#[test]
fn without_thinking_every_step_has_its_own_row() {
    let messages = vec![
        user("?"),
        Message::assistant("a".into(), None, vec![ToolCall::new("c", "f", Map::new())]),
        result("r"),
        Message::assistant("b".into(), None, vec![]),
    ];
    let completions = [
        "a\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call><|im_end|>",
        "b<|im_end|>",
    ];
    let mut source = served(messages, &completions);
    source.thinking = false;
    source.calls.iter_mut().for_each(|call| call.prompt = None);
    let (_, samples, drift) = made(&source, RowsOptions::default());
    // The prompt has an empty think block, and history has none.
    assert_eq!((samples.len(), drift), (2, breaks(1)));
    assert!(text(&samples[0].ids).ends_with(&format!(
        "assistant\n<think>\n\n</think>\n\n{}",
        completions[0]
    )));
    assert_eq!(trained(&samples[1]), ["b<|im_end|>"]);
}

#[test]
fn compat_is_made_from_text() {
    let compat = RowsOptions {
        unroll: Unroll::Compat,
        ..RowsOptions::default()
    };
    let (rows, _, drift) = made(&shop(CALLED_TIGHT), compat);
    assert_eq!(
        rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(),
        ["s_trunc_1", "s"]
    );
    assert!(rows.iter().all(|row| row.recorded.is_none()));
    assert_eq!(drift, breaks(0));
}

#[test]
fn an_end_of_turn_that_the_server_did_not_count_is_there() {
    let made = |source: &Source| made(source, RowsOptions::default()).1;
    let counted = made(&shop(CALLED));
    let mut source = shop(CALLED);
    for call in &mut source.calls {
        call.completion.pop();
    }
    assert_eq!(made(&source), counted);
    source.calls[1].is_ended = false;
    assert_ne!(made(&source), counted);
}
