//! Conversations of others, in OpenAI's form: what their writers are known to get wrong is mended as they are read.
//!
//! `arguments` that are JSON in a string become objects, and text that spells none is kept as `malformed`; whitespace
//! alone becomes "", null counts as absent, reasoning may have its other name. Called by whatever imports: trace files,
//! data sets.

use serde_json::{Map, Value, json};

use super::{FunctionCall, FunctionTag, Message, ToolCall, ToolDef};
use crate::error::FieldError;

/// Names that reasoning has; the first that is there counts.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];

/// Reads a list of messages.
///
/// # Errors
/// Names the message and its field, such as `messages[2].role`.
pub fn read_messages(list: &Value) -> Result<Vec<Message>, FieldError> {
    read_list(list, "messages", read_message)
}

/// Reads a list of tools.
///
/// # Errors
/// Names the tool, such as `tools[2].function`.
pub fn read_tools(list: &Value) -> Result<Vec<ToolDef>, FieldError> {
    read_list(list, "tools", read_tool)
}

fn read_list<T>(
    list: &Value,
    field: &str,
    read: impl Fn(&Value) -> Result<T, FieldError>,
) -> Result<Vec<T>, FieldError> {
    let items = match list {
        Value::Null => return Ok(Vec::new()),
        Value::Array(items) => items.iter().enumerate(),
        other => return Err(FieldError::new(field, other, "must be a list")),
    };
    items
        .map(|(i, item)| read(item).map_err(|e| e.under(&format!("{field}[{i}]"))))
        .collect()
}

/// Reads one message; fields that are not known are ignored, because the files come from many hands.
///
/// # Errors
/// Names the field.
pub fn read_message(found: &Value) -> Result<Message, FieldError> {
    if !found.is_object() {
        return Err(FieldError::new("role", found, "must be of an object"));
    }
    let content = read_content(&found["content"])?;
    match found["role"].as_str() {
        Some("system" | "developer") => Ok(Message::System {
            content,
            hint: found["hint"].as_bool().unwrap_or_default(),
        }),
        Some("user") => Ok(Message::User { content }),
        Some("assistant") => {
            let reasoning = REASONING_FIELDS
                .iter()
                .find_map(|name| found[name].as_str());
            let calls = read_list(&found["tool_calls"], "tool_calls", read_call)?;
            Ok(Message::assistant(
                content,
                reasoning.map(str::to_owned),
                calls,
            ))
        }
        Some("tool") => {
            let id = found["tool_call_id"].as_str();
            let missing =
                || FieldError::new("tool_call_id", &found["tool_call_id"], "must name the call");
            Ok(Message::Tool {
                tool_call_id: id.ok_or_else(missing)?.to_owned(),
                content,
            })
        }
        other => {
            let rule = "must be system, user, assistant or tool";
            let shown = other.map_or_else(|| found["role"].to_string(), str::to_owned);
            Err(FieldError::new("role", shown, rule))
        }
    }
}

/// Text, nothing, or OpenAI's list of text parts.
fn read_content(content: &Value) -> Result<String, FieldError> {
    let refuse = || FieldError::new("content", content, "must be text or a list of text parts");
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| part.get("text").and_then(Value::as_str).ok_or_else(refuse))
            .collect(),
        _ => Err(refuse()),
    }
}

fn read_call(found: &Value) -> Result<ToolCall, FieldError> {
    let function = match &found["function"] {
        Value::Null => found,
        function => function,
    };
    let missing = || FieldError::new("function.name", &function["name"], "must name a tool");
    let name = function["name"].as_str().ok_or_else(missing)?;
    let (arguments, malformed) = read_arguments(&function["arguments"]);
    Ok(ToolCall {
        id: found["id"].as_str().unwrap_or_default().to_owned(),
        call_type: FunctionTag::Function,
        function: FunctionCall {
            name: name.to_owned(),
            arguments,
            malformed,
        },
    })
}

/// An object, or the text of one; anything else is kept as the text that the model wrote.
fn read_arguments(arguments: &Value) -> (Map<String, Value>, Option<String>) {
    match arguments {
        Value::Object(object) => (object.clone(), None),
        Value::Null => (Map::new(), None),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Object(object)) => (object, None),
            _ => (Map::new(), Some(text.clone())),
        },
        other => (Map::new(), Some(other.to_string())),
    }
}

/// Reads one tool; without parameters it takes none.
///
/// # Errors
/// Says what is missing.
fn read_tool(found: &Value) -> Result<ToolDef, FieldError> {
    let mut tool = found.clone();
    if let Some(function) = tool.get_mut("function").and_then(Value::as_object_mut) {
        function.retain(|_, value| !value.is_null());
        let none = || json!({"type": "object", "properties": {}});
        function.entry("parameters").or_insert_with(none);
    }
    serde_json::from_value(tool).map_err(|error| {
        let rule =
            format!("must be {{type, function: {{name, description, parameters}}}}: {error}");
        FieldError::new("function", &found["function"], rule)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(message: Value) -> String {
        let error = read_messages(&json!([{"role": "user", "content": "x"}, message]));
        error.unwrap_err().to_string()
    }

    #[test]
    fn what_writers_get_wrong_is_mended() {
        let messages = read_messages(&json!([
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {"role": "assistant", "content": "\n\n", "reasoning": "hm", "tool_calls": [
                {"id": "c1", "function": {"name": "f", "arguments": "{\"q\": \"a \\u2013 b\"}"}},
                {"id": null, "name": "g", "arguments": null},
                {"function": {"name": "h", "arguments": "{\"q"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": null},
        ]));
        let object = |value: Value| value.as_object().cloned().unwrap();
        let mut malformed = ToolCall::new("", "h", Map::new());
        malformed.function.malformed = Some("{\"q".into());
        let calls = vec![
            ToolCall::new("c1", "f", object(json!({"q": "a – b"}))),
            ToolCall::new("", "g", Map::new()),
            malformed,
        ];
        let expected = [
            Message::System {
                content: "be brief".into(),
                hint: false,
            },
            Message::assistant(String::new(), Some("hm".into()), calls),
            Message::Tool {
                tool_call_id: "c1".into(),
                content: String::new(),
            },
        ];
        assert_eq!(messages.unwrap(), expected);
        assert_eq!(read_messages(&Value::Null), Ok(vec![]));
    }

    #[test]
    fn refusals_name_message_field_and_rule() {
        let rule = "must be system, user, assistant or tool";
        assert_eq!(
            refused(json!({"role": "root"})),
            format!("`messages[1].role` {rule}, got `root`")
        );
        assert_eq!(
            refused(json!({})),
            format!("`messages[1].role` {rule}, got `null`")
        );
        assert_eq!(
            refused(json!(7)),
            "`messages[1].role` must be of an object, got `7`"
        );
        assert_eq!(
            refused(json!({"role": "user", "content": [{"image": 1}]})),
            "`messages[1].content` must be text or a list of text parts, got `[{\"image\":1}]`"
        );
        assert_eq!(
            refused(json!({"role": "tool", "content": "x"})),
            "`messages[1].tool_call_id` must name the call, got `null`"
        );
        assert_eq!(
            refused(json!({"role": "assistant", "tool_calls": [{"function": {}}]})),
            "`messages[1].tool_calls[0].function.name` must name a tool, got `null`"
        );
        assert_eq!(
            read_messages(&json!("x")).unwrap_err().to_string(),
            "`messages` must be a list, got `\"x\"`"
        );
    }

    #[test]
    fn a_tool_without_parameters_takes_none() {
        let tools = read_tools(
            &json!([{"type": "function", "function": {"name": "f", "description": null}}]),
        )
        .unwrap();
        assert_eq!(
            tools[0].function.parameters,
            json!({"type": "object", "properties": {}})
        );
        let refused = read_tools(&json!([{"name": "f"}])).unwrap_err().to_string();
        assert!(
            refused.starts_with("`tools[0].function` must be {type,"),
            "{refused}"
        );
    }
}
