//! The calls of one assistant turn, as they are stored and as they are answered. Pure.
//!
//! What a model writes may be anything: each call gets arguments that are an object, or an error that the model can
//! read, and never ends the rollout.

use espalier_core::chat::ToolCall;
use espalier_core::error::shorten;
use espalier_core::trace::Decision;
use espalier_runtime::model::RawToolCall;
use serde_json::{Map, Value};

/// What is to be done with a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It may run, as far as the turn and the arguments say.
    Run,
    /// It does not run; the model is told why.
    Refuse {
        /// For the record.
        decision: Decision,
        /// For the model.
        text: String,
    },
}

/// The calls of a turn with their fates.
pub(super) fn prepare(
    raw: Vec<RawToolCall>,
    calls_max: u32,
    is_offered: impl Fn(&str) -> bool,
) -> Vec<(ToolCall, Fate)> {
    let calls_max = usize::try_from(calls_max).unwrap_or(usize::MAX);
    let mut prepared = Vec::with_capacity(raw.len());
    for (n, raw) in raw.into_iter().enumerate() {
        let parsed = parse_arguments(&raw.arguments);
        let fate = if n >= calls_max {
            refuse(
                Decision::OverLimit,
                format!(
                    "Error: at most {calls_max} tool calls are answered in one turn. This one was not run."
                ),
            )
        } else if !is_offered(&raw.name) {
            refuse(Decision::Unknown, format!("Tool {} not found", raw.name))
        } else if let Err(reason) = &parsed {
            refuse(
                Decision::Malformed,
                format!("Error: {} was not run: {reason}", raw.name),
            )
        } else {
            Fate::Run
        };
        let malformed = parsed.is_err().then_some(raw.arguments);
        let mut call = ToolCall::new(raw.id, raw.name, parsed.unwrap_or_default());
        call.function.malformed = malformed;
        prepared.push((call, fate));
    }
    prepared
}

fn refuse(decision: Decision, text: String) -> Fate {
    Fate::Refuse { decision, text }
}

/// The arguments as an object. Some models write nothing where there are none, and some write the object as a string.
pub(crate) fn parse_arguments(text: &str) -> Result<Map<String, Value>, String> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    let begin = || format!("They begin with: {}", shorten(text));
    let not_json = |error| format!("its arguments are not valid JSON ({error}). {}", begin());
    let mut value: Value = serde_json::from_str(text).map_err(not_json)?;
    if let Value::String(inner) = &value
        && let Ok(object @ Value::Object(_)) = serde_json::from_str(inner)
    {
        value = object;
    }
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(format!("its arguments must be a JSON object. {}", begin())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn raw(id: &str, name: &str, arguments: &str) -> RawToolCall {
        RawToolCall {
            id: id.into(),
            name: name.into(),
            arguments: arguments.into(),
        }
    }

    fn prepared(calls: Vec<RawToolCall>) -> Vec<(ToolCall, Fate)> {
        prepare(calls, 3, |name| name == "add")
    }

    fn text(fate: &Fate) -> &str {
        match fate {
            Fate::Run => "",
            Fate::Refuse { text, .. } => text,
        }
    }

    #[test]
    fn what_cannot_run_is_told_to_the_model() {
        let calls = prepared(vec![
            raw("1", "subtract", "{}"),
            raw("2", "add", "{\"a\": "),
            raw("3", "add", "[1]"),
            raw("4", "add", "{}"),
        ]);
        assert_eq!(text(&calls[0].1), "Tool subtract not found");
        assert!(
            text(&calls[1].1)
                .starts_with("Error: add was not run: its arguments are not valid JSON (EOF"),
            "{}",
            text(&calls[1].1)
        );
        assert!(text(&calls[1].1).ends_with("They begin with: {\"a\": "));
        assert_eq!(calls[1].0.function.malformed.as_deref(), Some("{\"a\": "));
        assert!(text(&calls[2].1).contains("must be a JSON object"));
        assert!(text(&calls[3].1).starts_with("Error: at most 3 tool calls"));
        assert_eq!(calls[3].0.function.malformed, None);
    }

    #[test]
    fn an_object_written_as_a_string_and_nothing_at_all_are_arguments() {
        let calls = prepared(vec![
            raw("1", "add", r#""{\"a\": 1}""#),
            raw("2", "add", " "),
            raw("3", "add", r#"{"a": 1}"#),
        ]);
        assert!(calls.iter().all(|(_, fate)| *fate == Fate::Run));
        let arguments: Vec<Value> = calls
            .into_iter()
            .map(|(call, _)| Value::Object(call.function.arguments))
            .collect();
        assert_eq!(arguments, [json!({"a": 1}), json!({}), json!({"a": 1})]);
    }
}
