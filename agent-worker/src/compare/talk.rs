//! A conversation as a report shows it: a few texts, each cut to what fits beside another one. Nothing is escaped here.

use espalier_core::chat::Message;
use espalier_core::trace::Trace;
use espalier_runtime::traces::Loaded;

/// Longest text of a message, in characters.
const TEXT_CHARS_MAX: usize = 700;
/// Longest thought, and longest arguments of a call.
const ASIDE_CHARS_MAX: usize = 300;
/// Messages at the beginning of a long conversation, and at its end.
const ENDS: (usize, usize) = (12, 16);

/// One conversation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Talk {
    /// Who answered.
    pub(super) model: String,
    /// Why the loop stopped.
    pub(super) stop: String,
    /// The first check that did not hold; empty where all held.
    pub(super) reason: String,
    /// What the model answered in the end.
    pub(super) answer: String,
    pub(super) turns: Vec<Turn>,
    /// Where the whole is.
    pub(super) file: String,
    /// SHA-256 of it.
    pub(super) sha256: String,
}

/// One message, or a remark in place of several.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) role: &'static str,
    /// What the model thought.
    pub(super) thought: String,
    pub(super) text: String,
    /// Names and arguments.
    pub(super) calls: Vec<String>,
}

impl Talk {
    pub(super) fn of(loaded: &Loaded) -> Self {
        let trace = &loaded.trace;
        let summary = trace.summary();
        let file = loaded.manifest.trace_file();
        Self {
            model: cut(&trace.header.provenance.model, ASIDE_CHARS_MAX),
            stop: summary.stop.as_str().to_owned(),
            reason: cut(&summary.reason, ASIDE_CHARS_MAX),
            answer: cut(trace.answer(), ASIDE_CHARS_MAX),
            turns: turns(trace),
            file: file.map(|file| file.path.clone()).unwrap_or_default(),
            sha256: file.map(|file| file.sha256.clone()).unwrap_or_default(),
        }
    }
}

fn turns(trace: &Trace) -> Vec<Turn> {
    let messages = &trace.messages;
    let (first, last) = ENDS;
    let dropped = messages.len().saturating_sub(first + last);
    if dropped == 0 {
        return messages.iter().map(turn).collect();
    }
    let remark = Turn {
        role: "…",
        thought: String::new(),
        text: format!("{dropped} messages are left out here"),
        calls: Vec::new(),
    };
    let begin = messages[..first].iter().map(turn);
    let end = messages[first + dropped..].iter().map(turn);
    begin.chain([remark]).chain(end).collect()
}

fn turn(message: &Message) -> Turn {
    let (thought, calls) = match message {
        Message::Assistant {
            reasoning_content,
            tool_calls,
            ..
        } => (
            reasoning_content.as_deref().unwrap_or_default(),
            &tool_calls[..],
        ),
        _ => ("", &[][..]),
    };
    let call = |call: &espalier_core::chat::ToolCall| {
        let function = &call.function;
        let arguments = match &function.malformed {
            Some(text) => text.clone(),
            None => serde_json::json!(function.arguments).to_string(),
        };
        format!(
            "{} {}",
            cut(&function.name, ASIDE_CHARS_MAX),
            cut(&arguments, ASIDE_CHARS_MAX)
        )
    };
    Turn {
        role: message.role(),
        thought: cut(thought.trim(), ASIDE_CHARS_MAX),
        text: cut(message.content().trim(), TEXT_CHARS_MAX),
        calls: calls.iter().map(call).collect(),
    }
}

/// The first characters, with a sign that there are more.
fn cut(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn talk(text: &str) -> Talk {
        let turn = |role| Turn {
            role,
            thought: text.to_owned(),
            text: text.to_owned(),
            calls: vec![text.to_owned()],
        };
        Talk {
            model: text.to_owned(),
            stop: "answered".to_owned(),
            reason: text.to_owned(),
            answer: text.to_owned(),
            turns: vec![turn("user"), turn("assistant")],
            file: "p/batches/b/jobs/j/a-1/trace.json.zst".to_owned(),
            sha256: "ab".repeat(32),
        }
    }

    #[test]
    fn texts_are_cut_at_characters() {
        assert_eq!(
            (cut("äöü", 2), cut("äöü", 3)),
            ("äö…".to_owned(), "äöü".to_owned())
        );
    }

    #[test]
    fn a_message_shows_what_was_said_thought_and_called() {
        let json = r#"{"role":"assistant","content":" hi ","reasoning_content":"hm","tool_calls":[
            {"id":"1","type":"function","function":{"name":"open","arguments":{"a":1}}},
            {"id":"2","type":"function","function":{"name":"open","arguments":{},"malformed":"{oops"}}]}"#;
        let message: Message = serde_json::from_str(json).unwrap();
        let found = turn(&message);
        assert_eq!(
            (found.role, &*found.thought, &*found.text),
            ("assistant", "hm", "hi")
        );
        assert_eq!(found.calls, [r#"open {"a":1}"#, "open {oops"]);
    }
}
