//! Conversations out of files of others: the workshop's traces, and data sets in `messages`/`tools` form.
//!
//! A record is an object with `messages` and perhaps `tools`, each a list or JSON in a string, and any of `id`,
//! `timestamp`, `model`, `task_id`, `task_kind`, `reward` and `split`. One that breaks a rule is refused with file, row,
//! message and rule, and the next ones are read.

use espalier_core::chat::{read_messages, read_tools};
use espalier_core::error::FieldError;
use serde_json::Value;

use crate::files::{FileError, Records};
use crate::row::Split;
use crate::source::{Facts, Source};

/// Most messages and tools of one conversation.
const MESSAGES_MAX: usize = 100_000;
const TOOLS_MAX: usize = 10_000;

/// The conversations of a file, each record by itself.
pub fn import(
    file: impl Into<String>,
    records: Records,
) -> impl Iterator<Item = Result<Source, FileError>> {
    let file = file.into();
    records.enumerate().map(move |(row, record)| {
        let refused = |source| FileError::Row {
            file: file.clone(),
            row,
            source,
        };
        source(record?, || format!("{file}#{row}")).map_err(refused)
    })
}

/// The records of one JSON document: the object that it is, as the workshop's traces are, or the items of its list.
///
/// # Errors
/// It is no JSON, or neither of the two.
pub fn json_records(file: &str, bytes: &[u8]) -> Result<Records, FileError> {
    let refused = |reason: String| FileError::Read {
        file: file.to_owned(),
        row: 0,
        source: reason.into(),
    };
    match serde_json::from_slice(bytes) {
        Ok(record @ Value::Object(_)) => Ok(Box::new(std::iter::once(Ok(record)))),
        Ok(Value::Array(records)) => Ok(Box::new(records.into_iter().map(Ok))),
        Ok(_) => Err(refused("must be an object or a list of objects".to_owned())),
        Err(error) => Err(refused(error.to_string())),
    }
}

fn source(mut record: Value, name: impl Fn() -> String) -> Result<Source, FieldError> {
    if !record.is_object() {
        return Err(FieldError::new(
            "row",
            record,
            "must be an object with `messages`",
        ));
    }
    let messages = read_messages(&list(&mut record, "messages", MESSAGES_MAX)?)?;
    if !messages.iter().any(|message| message.role() == "assistant") {
        let rule = "must have a message of the assistant";
        return Err(FieldError::new("messages", messages.len(), rule));
    }
    let tools = tools(list(&mut record, "tools", TOOLS_MAX)?)?;
    let text = |field: &str| match &record[field] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    let reward = match &record["reward"] {
        Value::Null => None,
        value => {
            let rule = "must be a number in [0, 1]";
            let reward = value.as_f64().filter(|reward| (0.0..=1.0).contains(reward));
            Some(reward.ok_or_else(|| FieldError::new("reward", value, rule))?)
        }
    };
    Ok(Source {
        id: text("id").unwrap_or_else(name),
        timestamp: text("timestamp").unwrap_or_default(),
        model: text("model").unwrap_or_default(),
        facts: Facts {
            reward,
            task_id: text("task_id"),
            task_kind: text("task_kind"),
            split: text("split").as_deref().and_then(Split::named),
            ..Facts::default()
        },
        messages,
        tools,
        thinking: true,
        keep_hints: None,
        calls: Vec::new(),
    })
}

/// A column that is a list, or JSON of one in a string.
fn list(record: &mut Value, field: &str, items_max: usize) -> Result<Value, FieldError> {
    let mut value = record[field].take();
    if let Value::String(text) = &value {
        let refuse = |error| FieldError::new(field, text, format!("must be a JSON list: {error}"));
        value = serde_json::from_str(text).map_err(refuse)?;
    }
    match &value {
        Value::Array(items) if items.len() > items_max => {
            let rule = format!("must have at most {items_max} items");
            Err(FieldError::new(field, items.len(), rule))
        }
        Value::Array(_) | Value::Null => Ok(value),
        other => Err(FieldError::new(field, other, "must be a list")),
    }
}

/// Tools as they are: the template renders every key of them in its order. Some files hold each as JSON in a string.
fn tools(list: Value) -> Result<Vec<Value>, FieldError> {
    let Value::Array(mut tools) = list else {
        return Ok(Vec::new());
    };
    for (n, tool) in tools.iter_mut().enumerate() {
        if let Value::String(text) = tool {
            let refuse = |error| {
                FieldError::new(
                    format!("tools[{n}]"),
                    &*text,
                    format!("must be JSON: {error}"),
                )
            };
            *tool = serde_json::from_str(text).map_err(refuse)?;
        }
        if tool["function"].is_object() {
            read_tools(&Value::Array(vec![tool.clone()])).map_err(|mut error| {
                error.field = format!("tools[{n}].function");
                error
            })?;
        } else if !tool["name"].is_string() {
            let rule = "must be {type, function: {name, …}} or {name, …}";
            return Err(FieldError::new(format!("tools[{n}]"), &*tool, rule));
        }
    }
    Ok(tools)
}

#[cfg(test)]
mod tests {
    use espalier_core::chat::Message;
    use serde_json::json;

    use super::*;

    fn of(record: Value) -> Result<Source, String> {
        let records: Records = Box::new([Ok(json!({})), Ok(record)].into_iter());
        let mut sources = import("f.jsonl", records);
        assert!(sources.next().is_some_and(|first| first.is_err()));
        sources.next().unwrap().map_err(|error| {
            assert!(error.goes_on());
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        })
    }

    #[test]
    fn a_record_needs_messages_and_takes_the_rest() {
        let source = of(
            json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
        );
        let source = source.unwrap();
        assert_eq!(
            (source.id.as_str(), source.messages.len()),
            ("f.jsonl#1", 2)
        );
        let full = of(json!({
            "id": 7, "timestamp": "20250529_195610", "model": "m", "task_id": "t", "task_kind": "k", "reward": 0.5,
            "split": "eval", "more": [1],
            "messages": "[{\"role\": \"assistant\", \"content\": \"\\n\", \"reasoning_content\": \"hm\"}]",
            "tools": ["{\"type\": \"function\", \"function\": {\"name\": \"f\", \"strict\": true}}", {"name": "bare"}],
        }))
        .unwrap();
        assert_eq!(full.id, "7");
        assert_eq!(full.facts.split, Some(Split::Eval));
        assert_eq!(full.facts.reward, Some(0.5));
        let turn = Message::assistant(String::new(), Some("hm".into()), vec![]);
        assert_eq!(full.messages, [turn]);
        let tool = json!({"type": "function", "function": {"name": "f", "strict": true}});
        assert_eq!(full.tools, [tool, json!({"name": "bare"})]);
    }

    #[test]
    fn refusals_name_file_row_message_and_rule() {
        let said = json!({"role": "assistant", "content": "y"});
        for (record, reason) in [
            (json!(7), "`row` must be an object with `messages`, got `7`"),
            (
                json!({"messages": "["}),
                "`messages` must be a JSON list: EOF while parsing a list at line 1 column 1, got `[`",
            ),
            (
                json!({"messages": {"a": 1}}),
                "`messages` must be a list, got `{\"a\":1}`",
            ),
            (
                json!({"messages": [said, {"role": "x"}]}),
                "`messages[1].role` must be system, user, assistant or tool, got `x`",
            ),
            (
                json!({"messages": []}),
                "`messages` must have a message of the assistant, got `0`",
            ),
            (
                json!({"messages": [said], "reward": 2}),
                "`reward` must be a number in [0, 1], got `2`",
            ),
            (
                json!({"messages": [said], "tools": [7]}),
                "`tools[0]` must be {type, function: {name, …}} or {name, …}, got `7`",
            ),
        ] {
            assert_eq!(
                of(record),
                Err(format!("row 1 of `f.jsonl` is refused: {reason}"))
            );
        }
        let error = of(json!({"messages": [said], "tools": [{"function": {}}]})).unwrap_err();
        assert!(error.contains("`tools[0].function` must be"), "{error}");
    }

    #[test]
    fn a_document_is_one_record_or_a_list() {
        let count = |text: &str| json_records("f.json", text.as_bytes()).map(Iterator::count);
        assert_eq!(count("{}").unwrap(), 1);
        assert_eq!(count("[{}, {}]").unwrap(), 2);
        assert!(count("7").is_err());
        let error = count("{").unwrap_err();
        assert_eq!(error.to_string(), "`f.json` cannot be read at row 0");
        assert!(!error.goes_on());
    }
}
