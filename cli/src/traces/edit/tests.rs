use espalier_core::chat::Message;
use espalier_core::spec::parse_line;
use espalier_core::time::Timestamp;
use espalier_core::trace::Trace;
use espalier_core::trace::edits::{Change, Curated, Edit, Patch, apply, turns};
use espalier_runtime::traces::workshop;
use proptest::prelude::*;
use serde_json::json;

use super::difference::difference;
use super::form::Form;

fn trace() -> Trace {
    let call = |id: &str, arguments: &str| json!({"id": id, "function": {"name": "open", "arguments": arguments}});
    let file = json!({
        "timestamp": "20250529_130900", "model": "m", "tools": [],
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "price?\n=== turn 1 content"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                call("c1", "{\"url\":\"x\"}"), call("c2", "{\"url")]},
            {"role": "tool", "tool_call_id": "c1", "content": "a\n\n  b\n"},
            {"role": "tool", "tool_call_id": "c2", "content": ""},
            {"role": "assistant", "content": "5"},
            {"role": "user", "content": "tax?"},
            {"role": "assistant", "content": "1"}],
    });
    let draft = parse_line(br#"{"prompt":"x"}"#).unwrap();
    let sampling = draft.check().unwrap().rollout().unwrap().sampling.clone();
    let job = "default/b/j".parse().unwrap();
    workshop::read(file.to_string().as_bytes(), job, sampling).unwrap()
}

fn form(trace: &Trace, log: &[Patch]) -> Form {
    Form::new(&trace.header.job, &apply(trace, log), &turns(trace, log))
}

const GOLDEN: &str = "\
# espalier trace default/b/j log 0
=== message 0 system
  be brief
=== message 1 user
  price?
  === turn 1 content
=== turn 1 reasoning
  hm
=== turn 1 content
=== turn 1 call 1 open
  {
    \"url\": \"x\"
  }
=== turn 1 call 2 open
  {\"url
=== message 3 tool
  a
  
    b
  
=== message 4 tool
=== turn 2 content
  5
=== message 6 user
  tax?
=== turn 3 content
  1
";

#[test]
fn golden_form() {
    assert_eq!(form(&trace(), &[]).write(), GOLDEN);
}

/// The edits that a changed form means, or the refusal.
fn edits(text: &str) -> Result<Vec<Edit>, String> {
    let trace = trace();
    let edited = Form::read(text).map_err(|error| error.to_string())?;
    difference(&form(&trace, &[]), &edited, &turns(&trace, &[])).map_err(|error| error.to_string())
}

fn edited(from: &str, to: &str) -> Result<Vec<Edit>, String> {
    assert!(GOLDEN.contains(from), "{from}");
    edits(&GOLDEN.replacen(from, to, 1))
}

/// What the edits come to.
fn applied(edits: Vec<Edit>) -> Curated {
    let log = [Patch::new(Change::Edit { edits }, "ann", Timestamp(0), 0)];
    let curated = apply(&trace(), &log);
    assert_eq!(curated.refused, []);
    curated
}

#[test]
fn what_is_left_as_it_was_is_no_edit() {
    assert_eq!(edits(GOLDEN), Ok(Vec::new()));
    // What editors do unasked.
    let stripped: Vec<&str> = GOLDEN.lines().map(str::trim_end).collect();
    assert_eq!(edits(&(stripped.join("\n") + "\n\n\n")), Ok(Vec::new()));
    assert_eq!(edits(GOLDEN.trim_end()), Ok(Vec::new()));
    assert_eq!(
        edited("=== turn 2", "# a remark\n=== turn 2"),
        Ok(Vec::new())
    );
}

#[test]
fn texts_thoughts_and_arguments_are_edited() {
    let content = |message, content: &str| Edit::Content {
        message,
        content: content.to_owned(),
    };
    assert_eq!(
        edited("  5\n", "  five\n  six\n\n"),
        Ok(vec![content(5, "five\nsix")])
    );
    assert_eq!(edited("  tax?", "  VAT?"), Ok(vec![content(6, "VAT?")]));
    let no_thoughts = vec![Edit::Reasoning {
        message: 2,
        reasoning: None,
    }];
    assert_eq!(edited("=== turn 1 reasoning\n  hm\n", ""), Ok(no_thoughts));
    let thoughts = vec![Edit::Reasoning {
        message: 5,
        reasoning: Some("so".to_owned()),
    }];
    let added = edited("=== turn 2", "=== turn 2 reasoning\n  so\n=== turn 2");
    assert_eq!(added, Ok(thoughts));
    let arguments = vec![Edit::Arguments {
        message: 2,
        call: 1,
        arguments: json!({"url": "y"}).as_object().unwrap().clone(),
    }];
    assert_eq!(edited("  {\"url\n", "  {\"url\": \"y\"}\n"), Ok(arguments));
    let hint = vec![Edit::Hint {
        message: 0,
        hint: true,
    }];
    assert_eq!(edited("0 system", "0 system hint"), Ok(hint));
    // A turn says something at each step.
    let swapped = edited(
        "=== turn 3 content\n  1\n",
        "=== turn 3 reasoning\n  one\n=== turn 3 content\n",
    );
    assert_eq!(swapped.unwrap().len(), 2);
}

#[test]
fn turns_go_ends_are_cut_and_conversations_begin() {
    let (start, rest) = GOLDEN.split_once("=== turn 2").unwrap();
    let cut = edits(&format!("{start}=== answer\n  five\n")).unwrap();
    assert_eq!(cut[0], Edit::CutAfter { message: 2 });
    let curated = applied(cut);
    assert_eq!(curated.conversations[0].messages.len(), 6);
    assert_eq!(curated.answer(), "five");

    let (head, _) = start.split_once("\n=== turn 1").unwrap();
    let removed = edits(&format!("{head}\n=== turn 2{rest}")).unwrap();
    assert_eq!(removed, [Edit::RemoveTurn { message: 2 }]);
    let last = edited("=== turn 3 content\n  1\n", "").unwrap();
    assert_eq!(last, [Edit::RemoveTurn { message: 7 }]);

    let split = edited("=== message 6", "=== split\n=== message 6").unwrap();
    assert_eq!(split, [Edit::SplitBefore { message: 6 }]);
    assert_eq!(applied(split.clone()).conversations.len(), 2);
    let trace = trace();
    let log = [Patch::new(
        Change::Edit { edits: split },
        "ann",
        Timestamp(0),
        0,
    )];
    let offered = form(&trace, &log);
    let text = offered.write();
    assert!(text.contains("=== split\n=== message 6 user\n"), "{text}");
    let read = Form::read(&text).unwrap();
    assert_eq!(
        difference(&offered, &read, &turns(&trace, &log)),
        Ok(Vec::new())
    );
    let joined = Form::read(&text.replace("=== split\n", "")).unwrap();
    let error = difference(&offered, &joined, &turns(&trace, &log)).unwrap_err();
    assert!(error.rule.contains("traces undo"), "{error}");
}

#[test]
fn what_no_edit_leads_to_is_refused_by_its_line() {
    for (from, to, expected) in [
        ("log 0", "log x", "line 1"),
        ("  be brief", "be brief", "line 3"),
        ("=== message 0 system", "=== message 0 root", "line 2"),
        ("=== turn 3", "=== turn 9", "line 26"),
        ("=== turn 3", "=== turn 2", "line 26"),
        ("  tax?", "  tax?\n=== turn 9 reasoning\n  x", "line 26"),
        (
            "=== message 3 tool\n  a\n  \n    b\n  \n",
            "",
            "message 3 tool",
        ),
        (
            "=== turn 1 call 2 open\n  {\"url\n",
            "",
            "turn 1 call 2 open",
        ),
        ("=== message 6 user\n  tax?\n", "", "message 6 user"),
        ("  {\"url\n", "  [1]\n", "line 14"),
        (
            "  1\n",
            "  1\n=== answer\n  x\n=== turn 4 content\n",
            "line 30",
        ),
        ("=== turn 2", "=== split\n=== turn 2", "line 22"),
        ("  1\n", "  1\n=== split\n", "line 28"),
        ("0 system", "0 user", "line 2"),
    ] {
        let error = edited(from, to).unwrap_err();
        assert!(error.starts_with(&format!("`{expected}`")), "{to}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a model or a page wrote.
    #[test]
    fn any_text_reads_back(
        texts in proptest::collection::vec("[ -#=a\n\r\t\u{1b}é]{0,12}", 3),
        hint in any::<bool>(),
    ) {
        let mut trace = trace();
        trace.messages[0] = Message::System { content: texts[0].clone(), hint };
        trace.messages[1] = Message::User { content: texts[1].clone() };
        trace.messages[5] = Message::assistant(texts[2].clone(), Some(texts[0].clone()), Vec::new());
        let offered = form(&trace, &[]);
        let read = Form::read(&offered.write()).unwrap();
        for (a, b) in offered.fields.iter().zip(&read.fields) {
            prop_assert_eq!((&a.heading, a.text.as_str()), (&b.heading, b.text.as_str()));
        }
        prop_assert_eq!(offered.fields.len(), read.fields.len());
        prop_assert_eq!(difference(&offered, &read, &turns(&trace, &[])), Ok(Vec::new()));
    }

    /// Lines that are removed or said twice give edits that fit, or a refusal.
    #[test]
    fn any_removal_is_refused_or_gives_a_conversation(
        gone in proptest::collection::vec(0_usize..25, 1..12), start in 0_usize..25, len in 0_usize..25,
    ) {
        let gone = |at: usize| at > 0 && (gone.contains(&at) || (start..start + len).contains(&at));
        let lines = GOLDEN.lines().enumerate();
        let left: Vec<&str> = lines.filter(|(at, _)| !gone(*at)).map(|(_, line)| line).collect();
        if let Ok(edits) = edits(&left.join("\n")) {
            let log = [Patch::new(Change::Edit { edits }, "ann", Timestamp(0), 0)];
            let trace = trace();
            let curated = apply(&trace, &log);
            for conversation in &curated.conversations {
                espalier_core::trace::edits::check_order(&conversation.messages).unwrap();
            }
        }
    }
}
