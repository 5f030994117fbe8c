use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::chat::Message;
use crate::error::FieldError;
use crate::time::Timestamp;
use crate::trace::{ModelCall, PromptTokens, Trace, Verdict};

const GOLDEN: &str = include_str!("../../../tests/golden/trace-v1.json");
const NOW: Timestamp = Timestamp(1_700_000_000_000_000);

/// A trace with these messages; each assistant message is a model call with token ids.
pub(super) fn trace_of(messages: Value) -> Trace {
    let mut trace = Trace::from_json(GOLDEN.as_bytes()).unwrap();
    trace.messages = serde_json::from_value(messages).unwrap();
    let assistants = trace.messages.iter().enumerate();
    let assistants = assistants.filter(|(_, m)| m.role() == "assistant");
    trace.model_calls = assistants
        .enumerate()
        .map(|(call, (message, _))| ModelCall {
            message,
            prompt: Some(PromptTokens {
                extends: call.checked_sub(1),
                keep: call * 2,
                append: vec![1],
            }),
            completion_ids: Some(vec![2]),
            ..ModelCall::default()
        })
        .collect();
    trace.tool_calls.clear();
    trace
}

/// system 0, hint 1, user 2, turn 3 with result 4, answer 5, user 6, answer 7.
fn trace() -> Trace {
    trace_of(json!([
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "look below", "hint": true},
        {"role": "user", "content": "price?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "function": {"name": "open", "arguments": {"url": "x"}}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "assistant", "content": "it is 5"},
        {"role": "user", "content": "and tax?"},
        {"role": "assistant", "content": "1"},
    ]))
}

pub(super) fn patch(change: Change, log: &[Patch]) -> Patch {
    Patch::new(change, "ann", NOW, u32::try_from(log.len()).unwrap())
}

pub(super) fn edit(edit: Edit) -> Change {
    Change::Edit { edits: vec![edit] }
}

fn content(message: usize, content: &str) -> Change {
    let content = content.to_owned();
    edit(Edit::Content { message, content })
}

/// The log of these changes, each of which must pass the door.
fn log(changes: impl IntoIterator<Item = Change>) -> Vec<Patch> {
    let mut log = Vec::new();
    for change in changes {
        add(&mut log, change).unwrap();
    }
    log
}

fn add(log: &mut Vec<Patch>, change: Change) -> Result<Curated, FieldError> {
    let patch = patch(change, log);
    let curated = check(&trace(), log, &patch)?;
    log.push(patch);
    assert_eq!(curated, apply(&trace(), log));
    Ok(curated)
}

fn refusal(log: &[Patch], change: Change) -> FieldError {
    check(&trace(), log, &patch(change, log)).unwrap_err()
}

fn numbers(conversation: &Conversation) -> Vec<usize> {
    conversation.origins.iter().map(|o| o.number()).collect()
}

#[test]
fn without_patches_a_trace_is_what_was_recorded() {
    let trace = trace();
    let curated = apply(&trace, &[]);
    assert_eq!(curated.conversations.len(), 1);
    assert_eq!(curated.conversations[0].untouched_calls, 3);
    assert_eq!(curated.traces(&trace), std::slice::from_ref(&trace));
    let mut empty = trace;
    (empty.messages, empty.model_calls) = (Vec::new(), Vec::new());
    assert_eq!(apply(&empty, &[]).conversations.len(), 1);
}

#[test]
fn an_edited_turn_and_what_follows_lose_their_tokens() {
    let log = log([content(5, "it costs 5")]);
    let curated = apply(&trace(), &log);
    let conversation = &curated.conversations[0];
    assert_eq!(conversation.messages[5].content(), "it costs 5");
    assert_eq!(conversation.origins[5], Origin::Edited(5));
    assert_eq!(conversation.origins[7], Origin::Recorded(7));
    assert_eq!(conversation.untouched_calls, 1);
    let written = &curated.traces(&trace())[0];
    assert_eq!(written.model_calls.len(), 1);
    assert!(written.model_calls[0].completion_ids.is_some());
    // Edited back, it is as it was recorded.
    let mut log = log;
    add(&mut log, content(5, "it is 5")).unwrap();
    assert_eq!(apply(&trace(), &log).conversations[0].untouched_calls, 3);
}

#[test]
fn thoughts_and_arguments_are_edited_in_place() {
    let arguments = json!({"url": "y"}).as_object().unwrap().clone();
    let edits = vec![
        Edit::Reasoning {
            message: 3,
            reasoning: None,
        },
        Edit::Arguments {
            message: 3,
            call: 0,
            arguments: arguments.clone(),
        },
    ];
    let curated = apply(&trace(), &log([Change::Edit { edits }]));
    let Message::Assistant {
        reasoning_content: None,
        tool_calls,
        ..
    } = &curated.conversations[0].messages[3]
    else {
        panic!("{curated:?}");
    };
    assert_eq!(tool_calls[0].function.arguments, arguments);
}

#[test]
fn turns_are_removed_with_their_results_and_cut() {
    let log = log([edit(Edit::RemoveTurn { message: 3 })]);
    let removed = apply(&trace(), &log);
    assert_eq!(numbers(&removed.conversations[0]), [0, 1, 2, 5, 6, 7]);
    assert_eq!(removed.conversations[0].untouched_calls, 0);
    let error = refusal(&log, content(4, "x"));
    assert_eq!(
        error.to_string(),
        "`edits[0].message` must be a message that is there and was not removed, got `4`"
    );

    let cut = super::apply(
        &trace(),
        &self::log([
            edit(Edit::CutAfter { message: 3 }),
            edit(Edit::Answer {
                content: "five".to_owned(),
                reasoning: None,
            }),
            content(8, "5 €"),
        ]),
    );
    assert_eq!(numbers(&cut.conversations[0]), [0, 1, 2, 3, 4, 8]);
    assert_eq!(cut.conversations[0].origins[5], Origin::Added(8));
    assert_eq!(cut.answer(), "5 €");
    assert_eq!(
        turns(&trace(), &log),
        [3, 5, 7],
        "removed ones keep their numbers"
    );
    assert_eq!(cut.conversations[0].untouched_calls, 1);
}

#[test]
fn a_split_gives_conversations_with_the_same_frame() {
    let log = log([
        edit(Edit::SplitBefore { message: 6 }),
        edit(Edit::CutAfter { message: 3 }),
    ]);
    let curated = apply(&trace(), &log);
    let parts: Vec<Vec<usize>> = curated.conversations.iter().map(numbers).collect();
    assert_eq!(parts, [vec![0, 1, 2, 3, 4], vec![0, 1, 6, 7]]);
    let calls: Vec<usize> = curated
        .conversations
        .iter()
        .map(|one| one.untouched_calls)
        .collect();
    assert_eq!(
        calls,
        [1, 0],
        "the prompts of the second had the first in them"
    );
    let ids: Vec<String> = curated
        .traces(&trace())
        .into_iter()
        .map(|one| one.header.id)
        .collect();
    assert_eq!(ids, ["shop/b1/lamp@7", "shop/b1/lamp@7#2"]);
    for message in [2, 6, 7] {
        let error = refusal(&log, edit(Edit::SplitBefore { message }));
        assert_eq!(error.field, "edits[0].message", "{error}");
    }
}

#[test]
fn hints_are_kept_or_left_out_without_a_change_of_tokens() {
    let system = |curated: &Curated| -> Vec<bool> {
        let messages = curated.conversations[0].messages.iter();
        messages
            .filter_map(|message| match message {
                Message::System { hint, .. } => Some(*hint),
                _ => None,
            })
            .collect()
    };
    let mut log = Vec::new();
    let left_out = add(&mut log, Change::Hints { keep: false }).unwrap();
    assert_eq!(system(&left_out), [false]);
    assert_eq!(left_out.conversations[0].untouched_calls, 3);
    assert_eq!(left_out.traces(&trace())[0].model_calls[0].message, 2);
    let kept = add(&mut log, Change::Hints { keep: true }).unwrap();
    assert_eq!(system(&kept), [false, false]);
    let marked = edit(Edit::Hint {
        message: 0,
        hint: true,
    });
    let marked = apply(&trace(), &self::log([marked]));
    assert_eq!(system(&marked), [true, true]);
    assert_eq!(marked.conversations[0].untouched_calls, 3);
}

#[test]
fn labels_judgement_and_reward_are_the_newest() {
    let label = |labels: &[(&str, Option<&str>)], judgement, reward| Change::Label {
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.map(str::to_owned)))
            .collect(),
        judgement,
        reward,
    };
    let mut log = Vec::new();
    let accepted = Some(Judgement::Accepted);
    add(
        &mut log,
        label(&[("stage", Some("gold"))], accepted, Some(1.0)),
    )
    .unwrap();
    add(&mut log, label(&[("run", None)], None, None)).unwrap();
    let curated = add(&mut log, Change::Drop).unwrap();
    assert_eq!(curated.standing, Standing::of(&log));
    assert_eq!(curated.standing.judgement, accepted);
    assert!(!curated.standing.is_wanted());
    assert_eq!(curated.reward(), Some(1.0));
    let trace_now = &curated.traces(&trace())[0];
    let expected = BTreeMap::from([("stage".to_owned(), "gold".to_owned())]);
    assert_eq!(trace_now.header.labels, expected);
    assert_eq!(trace_now.summary().reward, Some(1.0));

    let mut log = self::log([label(&[], None, Some(0.25))]);
    let verdict = Verdict {
        reward: 0.5,
        checks: Vec::new(),
    };
    assert_eq!(
        Standing::of(&log).verdict.unwrap().checks[0].reason,
        "labelled by ann"
    );
    add(&mut log, Change::Verdict { verdict }).unwrap();
    assert_eq!(apply(&trace(), &log).reward(), Some(0.5));

    assert_eq!(refusal(&[], label(&[], None, None)).field, "labels");
    assert_eq!(refusal(&[], label(&[], None, Some(1.5))).field, "reward");
    let nan = refusal(&[], label(&[], None, Some(f64::NAN)));
    assert_eq!(nan.to_string(), "`reward` must be in [0, 1], got `NaN`");
    assert_eq!(
        refusal(&[], label(&[("a b", None)], None, None)).field,
        "labels"
    );
}

fn join(messages: Value, tools: Value) -> Change {
    Change::Join {
        from: "shop/b1/cup".parse().unwrap(),
        from_log: 0,
        messages: serde_json::from_value(messages).unwrap(),
        tools: serde_json::from_value(tools).unwrap(),
    }
}

#[test]
fn a_joined_conversation_goes_on_where_the_first_ends() {
    let cup = json!([{"role": "user", "content": "cup?"}, {"role": "assistant", "content": "4"}]);
    let mut log = log([join(cup.clone(), json!([]))]);
    let joined = add(&mut log, content(9, "4 €")).unwrap();
    assert_eq!(
        numbers(&joined.conversations[0]),
        (0..10).collect::<Vec<_>>()
    );
    assert_eq!(joined.answer(), "4 €");
    assert_eq!(turns(&trace(), &log), [3, 5, 7, 9]);
    assert_eq!(joined.conversations[0].untouched_calls, 3);
    let fly = json!([{"function": {"name": "fly", "parameters": {"type": "object"}}}]);
    let with_tools = apply(&trace(), &self::log([join(cup.clone(), fly)]));
    assert_eq!(with_tools.conversations[0].tools.len(), 2);
    assert_eq!(
        with_tools.conversations[0].untouched_calls, 0,
        "tools stand in every prompt"
    );
    assert_ne!(
        with_tools.traces(&trace())[0]
            .header
            .provenance
            .tools_sha256,
        trace().header.provenance.tools_sha256
    );

    let known = json!([{"function": {"name": "browser_navigate", "parameters": {}}}]);
    assert_eq!(refusal(&[], join(cup, known)).field, "tools[0].name");
    for (messages, field) in [
        (json!([]), "messages[0].role"),
        (
            json!([{"role": "user", "content": "x"}]),
            "messages[0].role",
        ),
        (
            json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"},
                {"role": "tool", "tool_call_id": "c", "content": ""}]),
            "messages[2].tool_call_id",
        ),
        (
            json!([{"role": "user", "content": "x"}, {"role": "system", "content": "s"},
                {"role": "assistant", "content": "y"}]),
            "messages[1].role",
        ),
    ] {
        assert_eq!(refusal(&[], join(messages, json!([]))).field, field);
    }
}

#[test]
fn what_was_taken_back_counts_again_when_that_is_taken_back() {
    let mut log = log([content(5, "five"), Change::Drop]);
    let undone = add(&mut log, Change::Undo { patch: 0 }).unwrap();
    assert_eq!(undone.answer(), "1");
    assert_eq!(undone.conversations[0].messages[5].content(), "it is 5");
    assert!(undone.standing.dropped);
    let again = refusal(&log, Change::Undo { patch: 0 });
    assert!(again.rule.contains("taken back"), "{again}");
    assert!(
        refusal(&log, Change::Undo { patch: 3 })
            .rule
            .contains("less than 3")
    );
    let redone = add(&mut log, Change::Undo { patch: 2 }).unwrap();
    assert_eq!(redone.conversations[0].messages[5].content(), "five");
}

#[test]
fn what_later_patches_need_is_not_taken_back_before_them() {
    let answer = Edit::Answer {
        content: "five".to_owned(),
        reasoning: None,
    };
    let mut log = log([edit(Edit::CutAfter { message: 3 }), edit(answer)]);
    let error = refusal(&log, Change::Undo { patch: 0 });
    assert_eq!(
        error.to_string(),
        "`patch` must be kept, because patch 1 needs it: take that one back first, got `0`"
    );
    add(&mut log, Change::Undo { patch: 1 }).unwrap();
    let back = add(&mut log, Change::Undo { patch: 0 }).unwrap();
    assert_eq!(back.conversations, apply(&trace(), &[]).conversations);
}

#[test]
fn a_patch_that_does_not_fit_is_named_and_counts_not_at_all() {
    let edits = vec![
        Edit::Content {
            message: 5,
            content: "five".to_owned(),
        },
        Edit::CutAfter { message: 2 },
    ];
    let strange = Change::Edit { edits };
    let error = refusal(&[], strange.clone());
    assert_eq!(error.field, "edits[1].message");
    assert!(
        error.rule.contains("must be an assistant message"),
        "{error}"
    );
    let curated = apply(&trace(), &[patch(strange, &[]), patch(Change::Drop, &[])]);
    assert_eq!(curated.refused, [Refused { patch: 0, error }]);
    assert_eq!(curated.conversations, apply(&trace(), &[]).conversations);
    assert!(curated.standing.dropped);
}

#[test]
fn bad_edits_are_refused_by_field_value_and_rule() {
    let text = |text: &str| text.to_owned();
    let long = "x".repeat(TEXT_BYTES_MAX + 1);
    let only = |message| edit(Edit::RemoveTurn { message });
    for (change, field) in [
        (Change::Edit { edits: vec![] }, "edits"),
        (content(99, "x"), "edits[0].message"),
        (content(2, " "), "edits[0].content"),
        (content(5, "\n"), "edits[0].content"),
        (content(5, &long), "edits[0].content"),
        (
            edit(Edit::Reasoning {
                message: 4,
                reasoning: None,
            }),
            "edits[0].message",
        ),
        (
            edit(Edit::Arguments {
                message: 3,
                call: 1,
                arguments: Default::default(),
            }),
            "edits[0].call",
        ),
        (
            edit(Edit::Answer {
                content: text("x"),
                reasoning: None,
            }),
            "edits[0].content",
        ),
        (
            edit(Edit::Hint {
                message: 2,
                hint: true,
            }),
            "edits[0].message",
        ),
        (edit(Edit::CutAfter { message: 4 }), "edits[0].message"),
    ] {
        assert_eq!(refusal(&[], change).field, field);
    }
    let log = log([only(3), only(5)]);
    assert!(refusal(&log, only(7)).rule.contains("only turn"));
    let mut nobody = patch(Change::Drop, &[]);
    nobody.by = String::new();
    assert_eq!(check(&trace(), &[], &nobody).unwrap_err().field, "by");
    let full: Vec<Patch> = (0..PATCHES_MAX).map(|_| patch(Change::Drop, &[])).collect();
    assert_eq!(refusal(&full, Change::Undrop).field, "patches");
}

#[test]
fn a_patch_against_an_older_log_is_taken_only_where_its_turn_is_the_same() {
    let log = log([content(4, "6"), content(7, "2")]);
    let late = |change| Patch::new(change, "bob", NOW, 0);
    let error = recheck(&trace(), &log, &late(content(3, "I look."))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`edits[0].message` must not have changed since it was looked at, after 0 patches; the log has 2 now, got `3`"
    );
    let answer = Edit::Answer {
        content: "x".to_owned(),
        reasoning: None,
    };
    assert!(recheck(&trace(), &log, &late(edit(answer))).is_err());
    for change in [
        content(5, "five"),
        content(2, "cost?"),
        Change::Drop,
        edit(Edit::RemoveTurn { message: 5 }),
    ] {
        recheck(&trace(), &log, &late(change)).unwrap();
    }
    let newer = Patch::new(Change::Drop, "bob", NOW, 3);
    assert_eq!(recheck(&trace(), &log, &newer).unwrap_err().field, "log");
}
