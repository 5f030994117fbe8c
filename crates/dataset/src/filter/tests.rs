use espalier_core::chat::Message;

use super::*;
use crate::row::Split;
use crate::source::Facts;

fn source() -> Source {
    Source {
        id: "shop/b/j@1".into(),
        timestamp: String::new(),
        model: "Qwen/Qwen3-4B".into(),
        messages: vec![
            Message::User {
                content: "x".into(),
            },
            Message::assistant("y".into(), None, vec![]),
        ],
        tools: vec![],
        facts: Facts {
            reward: Some(0.9),
            task_kind: Some("two words".into()),
            split: Some(Split::Eval),
            labels: [("quality".into(), "good".into())].into(),
            tokens: 1200,
            ..Facts::default()
        },
        thinking: true,
        keep_hints: None,
        calls: vec![],
    }
}

fn admits(text: &str) -> bool {
    text.parse::<Filter>().unwrap().admits(&source())
}

#[test]
fn what_holds_and_what_does_not() {
    for text in [
        "reward >= 0.9",
        "reward=0.9",
        "turns == 1 and messages = 2",
        "tokens > 1e3 and tokens<1201",
        "not solved",
        "task_kind = \"two words\"",
        "task_kind ~ 'two w'",
        "label.quality != bad",
        "label.absent != x",
        "model ~ Qwen3-4B",
        "split = eval",
        "reward < 0.5 or id ~ shop",
        "not (reward < 0.5 or turns > 3) and stop != cut_answer",
        "solved or solved or turns = 1",
        "not not turns=1",
    ] {
        assert!(admits(text), "{text}");
    }
    for text in [
        "solved",
        "reward > 0.9",
        "stop = answered",
        "label.absent ~ x",
        "task_id = x",
        "turns = 1 and turns = 2 or turns = 3",
        "not turns = 1 or turns = 2",
    ] {
        assert!(!admits(text), "{text}");
    }
}

#[test]
fn what_is_absent_is_neither_above_nor_below() {
    let mut source = source();
    source.facts.reward = None;
    for (text, holds) in [
        ("reward >= 0", false),
        ("reward < 1", false),
        ("reward = 0", false),
        ("reward != 0", true),
        ("solved", false),
    ] {
        assert_eq!(
            text.parse::<Filter>().unwrap().admits(&source),
            holds,
            "{text}"
        );
    }
}

#[test]
fn refusals_point_at_the_column() {
    let fields = "a field (reward, solved, turns, messages, tool_errors, tokens, wall_s, id, model, stop, task_id, \
                  task_kind, split, label.NAME)";
    for (text, rule, column, got) in [
        ("", fields, 1, "its end"),
        ("reward >= 0.9 and", fields, 18, "its end"),
        ("rewrd > 1", fields, 1, "`rewrd`"),
        ("label. = x", fields, 1, "`label.`"),
        ("reward > high", "a number", 10, "`high`"),
        ("reward > inf", "a number", 10, "`inf`"),
        ("reward ~ 1", "one of =, !=, <, <=, >, >=", 8, "`~`"),
        ("model < x", "one of =, !=, ~", 7, "`<`"),
        ("model", "one of =, !=, ~", 6, "its end"),
        ("model =", "a text", 8, "its end"),
        ("(solved", "`and`, `or` or `)`", 8, "its end"),
        ("solved solved", "`and`, `or` or its end", 8, "`solved`"),
        ("id = 'ü' oder", "`and`, `or` or its end", 10, "`oder`"),
        ("id = 'x", "a closing quote to the one", 6, "`'x`"),
        ("!reward", fields, 1, "`!reward`"),
    ] {
        let error = text.parse::<Filter>().unwrap_err().to_string();
        let expected = format!("the filter must have {rule} at column {column}, got {got}");
        assert_eq!(error, expected, "{text}");
    }
}

#[test]
fn nesting_and_length_are_bounded() {
    let deep = format!("{}solved", "not ".repeat(65));
    assert_eq!(
        deep.parse::<Filter>().unwrap_err().rule,
        "at most 64 levels"
    );
    let deep = format!("{}solved", "(".repeat(1000));
    assert_eq!(
        deep.parse::<Filter>().unwrap_err().rule,
        "at most 64 levels"
    );
    let long = format!("id = {}", "x".repeat(5000));
    assert_eq!(
        long.parse::<Filter>().unwrap_err().rule,
        "at most 4096 bytes"
    );
}

#[test]
fn it_is_written_as_it_was_read() {
    let json = "\"reward >= 0.9  and solved\"";
    let filter: Filter = serde_json::from_str(json).unwrap();
    assert_eq!(serde_json::to_string(&filter).unwrap(), json);
    assert!(serde_json::from_str::<Filter>("\"no\"").is_err());
}

proptest::proptest! {
    #[test]
    fn no_text_brings_it_down(text in "[a-z.=<>~!()'\" 0-9é]{0,60}") {
        if let Ok(filter) = text.parse::<Filter>() {
            filter.admits(&source());
        }
    }
}
