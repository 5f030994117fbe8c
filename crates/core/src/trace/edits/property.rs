//! Random patches on random conversations: nothing panics, what comes out is a conversation, and what is taken back is
//! as if it had never been.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::tests::{edit, patch, trace_of};
use super::*;
use crate::trace::Trace;
use crate::trace::prompt_ids;

/// A conversation of a few user turns; each number is how many calls a turn makes, 0 being an answer.
fn trace() -> impl Strategy<Value = Trace> {
    let user_turn = vec(0_usize..3, 1..4);
    (0_usize..3, vec(user_turn, 1..4)).prop_map(|(systems, users)| {
        let mut messages: Vec<Value> = (0..systems)
            .map(|n| json!({"role": "system", "content": format!("s{n}"), "hint": n == 1}))
            .collect();
        for (n, turns) in users.iter().enumerate() {
            messages.push(json!({"role": "user", "content": format!("u{n}")}));
            for (turn, calls) in turns.iter().enumerate() {
                add_turn(&mut messages, &format!("{n}-{turn}"), *calls);
            }
        }
        trace_of(Value::Array(messages))
    })
}

fn add_turn(messages: &mut Vec<Value>, name: &str, calls: usize) {
    let call =
        |c| json!({"id": format!("{name}-{c}"), "function": {"name": "open", "arguments": {}}});
    messages.push(json!({
        "role": "assistant", "content": format!("a{name}"),
        "tool_calls": (0..calls).map(call).collect::<Vec<_>>(),
    }));
    let results = (0..calls)
        .map(|c| json!({"role": "tool", "tool_call_id": format!("{name}-{c}"), "content": "r"}));
    messages.extend(results);
}

fn any_edit() -> impl Strategy<Value = Edit> {
    let text = || prop_oneof![Just(String::new()), "[a-c\n ]{0,4}"];
    let message = 0_usize..24;
    (0_u8..8, message, 0_usize..3, text()).prop_map(|(kind, message, call, content)| match kind {
        0 => Edit::Content { message, content },
        1 => Edit::Reasoning {
            message,
            reasoning: (call > 0).then_some(content),
        },
        2 => Edit::Arguments {
            message,
            call,
            arguments: json!({"a": content}).as_object().unwrap().clone(),
        },
        3 => Edit::Answer {
            content,
            reasoning: None,
        },
        4 => Edit::CutAfter { message },
        5 => Edit::RemoveTurn { message },
        6 => Edit::SplitBefore { message },
        _ => Edit::Hint {
            message,
            hint: call > 0,
        },
    })
}

fn any_change() -> impl Strategy<Value = Change> {
    let joined = json!([{"role": "user", "content": "j"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "j", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "j", "content": "r"}]);
    prop_oneof![
        6 => vec(any_edit(), 1..3).prop_map(|edits| Change::Edit { edits }),
        1 => any::<bool>().prop_map(|keep| Change::Hints { keep }),
        1 => Just(Change::Drop),
        1 => Just(Change::Undrop),
        1 => ("[ab]", 0.0..=1.0).prop_map(|(key, reward)| Change::Label {
            labels: [(key, Some("v".to_owned()))].into(),
            judgement: Some(Judgement::Accepted),
            reward: Some(reward),
        }),
        1 => (0_usize..3).prop_map(move |short| Change::Join {
            from: "shop/b/j".parse().unwrap(),
            from_log: 0,
            messages: serde_json::from_value(joined.clone()).map(|mut all: Vec<_>| {
                all.truncate(3 - short / 2);
                all
            }).unwrap(),
            tools: Vec::new(),
        }),
        2 => (0_u32..8).prop_map(|patch| Change::Undo { patch }),
    ]
}

fn assert_valid(trace: &Trace, curated: &Curated) {
    assert!(!curated.conversations.is_empty());
    for conversation in &curated.conversations {
        check_order(&conversation.messages).unwrap();
        assert_eq!(conversation.messages.len(), conversation.origins.len());
        let roles: Vec<&str> = conversation.messages.iter().map(|m| m.role()).collect();
        assert!(roles.contains(&"assistant"), "{roles:?}");
        let first = roles.iter().find(|role| **role != "system");
        assert_eq!(first, Some(&"user"));
    }
    for one in curated.traces(trace) {
        let text = serde_json::to_vec(&one).unwrap();
        assert_eq!(Trace::from_json(&text).unwrap(), one);
        prompt_ids(&one.model_calls).unwrap();
        for (call, recorded) in one.model_calls.iter().zip(&trace.model_calls) {
            let message = &trace.messages[recorded.message];
            assert_eq!(&one.messages[call.message], message);
        }
    }
}

/// What counts of it, whatever the length of the log.
fn meaning(curated: &Curated) -> (&Vec<Conversation>, &Standing) {
    (&curated.conversations, &curated.standing)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Also those that passed no door.
    #[test]
    fn any_log_gives_conversations(trace in trace(), changes in vec(any_change(), 0..8)) {
        let log: Vec<Patch> = changes.into_iter().map(|change| patch(change, &[])).collect();
        let curated = apply(&trace, &log);
        assert_valid(&trace, &curated);
        prop_assert_eq!(Standing::of(&log), curated.standing);
        for patch in &log {
            let text = serde_json::to_vec(patch).unwrap();
            prop_assert_eq!(&Patch::parse(&text).unwrap(), patch);
        }
    }

    /// The newest patch, taken back, leaves what was there before it; all of them, what was recorded.
    #[test]
    fn what_is_taken_back_was_never_there(trace in trace(), changes in vec(any_change(), 1..8)) {
        let mut log: Vec<Patch> = Vec::new();
        let mut before = vec![apply(&trace, &[])];
        for change in changes {
            let next = patch(change, &log);
            if let Ok(curated) = check(&trace, &log, &next) {
                prop_assert!(curated.refused.is_empty(), "the door lets none of them in");
                log.push(next);
                before.push(curated);
            }
        }
        let written = log.len();
        for n in (0..written).rev() {
            let undo = patch(Change::Undo { patch: u32::try_from(n).unwrap() }, &log);
            let undone = check(&trace, &log, &undo).unwrap();
            prop_assert_eq!(meaning(&undone), meaning(&before[n]));
            log.push(undo);
        }
    }

    /// Texts of different messages and labels of different names do not ask in which order they are changed.
    #[test]
    fn patches_about_different_things_commute(
        trace in trace(), a in 0_usize..24, b in 0_usize..24, turn in 0_usize..24,
    ) {
        let content = |message, text: &str| edit(Edit::Content { message, content: text.to_owned() });
        let label = |key: &str| Change::Label {
            labels: [(key.to_owned(), None)].into(), judgement: None, reward: None,
        };
        let split = edit(Edit::SplitBefore { message: turn });
        let changes = [content(a, "x"), content(b, "y"), label("k"), label("l"), split];
        prop_assume!(a != b);
        let forth: Vec<Patch> = changes.iter().map(|c| patch(c.clone(), &[])).collect();
        let back: Vec<Patch> = forth.iter().rev().cloned().collect();
        let (forth, back) = (apply(&trace, &forth), apply(&trace, &back));
        prop_assert_eq!(meaning(&forth), meaning(&back));
    }
}
