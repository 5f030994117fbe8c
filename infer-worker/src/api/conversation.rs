//! Messages and tools of a request, checked and brought to the one form that chat templates take.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Most messages of a conversation.
const MESSAGES_MAX: usize = 10_000;
/// Most tools on offer.
const TOOLS_MAX: usize = 1_024;
/// Longest name of a tool, in bytes.
const TOOL_NAME_BYTES_MAX: usize = 256;

/// A tool on offer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tool {
    pub(super) name: String,
    /// JSON schema of the arguments.
    pub(super) parameters: Value,
    /// As the request has it, which is how the model sees it.
    pub(super) shown: Value,
}

/// Objects with `role` and `content`.
pub(super) fn messages(list: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if list.is_empty() || list.len() > MESSAGES_MAX {
        let rule = format!(
            "`messages` must have 1 to {MESSAGES_MAX} entries, got {}",
            list.len()
        );
        return Err(ApiError::about("messages", rule));
    }
    let message = |(i, value)| message(value, &format!("messages[{i}]"));
    list.into_iter().enumerate().map(message).collect()
}

/// The turn of an assistant.
pub(super) fn turn(value: Value, at: &str) -> Result<Value, ApiError> {
    let turn = message(value, at)?;
    match turn["role"] == "assistant" {
        true => Ok(turn),
        false => Err(ApiError::field(
            format!("{at}.role"),
            "must be assistant",
            &turn["role"],
        )),
    }
}

fn message(value: Value, at: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(value, at)?;
    let role = match fields.text("role")?.as_deref() {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool") => "tool",
        other => {
            let rule = "must be system, developer, user, assistant or tool";
            return Err(ApiError::field(fields.path("role"), rule, &json!(other)));
        }
    };
    let content_at = fields.path("content");
    let content = match fields.take("content") {
        Some(content) => text_of(content, &content_at)?,
        // What an assistant did may be all in its calls and thoughts.
        None if role == "assistant" => String::new(),
        None => {
            let rule = "must be a string or a list of text parts";
            return Err(ApiError::field(content_at, rule, &Value::Null));
        }
    };
    let mut out = Map::new();
    out.insert("role".to_owned(), json!(role));
    out.insert("content".to_owned(), json!(content));
    if let Some(name) = fields.text("name")? {
        out.insert("name".to_owned(), json!(name));
    }
    match role {
        "assistant" => {
            let newer = fields.text("reasoning")?;
            if let Some(reasoning) = fields.text("reasoning_content")?.or(newer) {
                out.insert("reasoning_content".to_owned(), json!(reasoning));
            }
            let calls_at = fields.path("tool_calls");
            if let Some(calls) = fields.list("tool_calls")?.filter(|calls| !calls.is_empty()) {
                let call = |(i, call)| tool_call(call, &format!("{calls_at}[{i}]"));
                let calls: Result<Vec<Value>, _> =
                    calls.into_iter().enumerate().map(call).collect();
                out.insert("tool_calls".to_owned(), json!(calls?));
            }
        }
        "tool" => {
            if let Some(id) = fields.text("tool_call_id")? {
                out.insert("tool_call_id".to_owned(), json!(id));
            }
        }
        _ => {}
    }
    Ok(Value::Object(out))
}

/// A string, or the texts of parts, one a line.
fn text_of(content: Value, at: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => {
            let part = |(i, part)| text_part(part, &format!("{at}[{i}]"));
            let texts: Result<Vec<String>, _> = parts.into_iter().enumerate().map(part).collect();
            Ok(texts?.join("\n"))
        }
        other => Err(ApiError::field(
            at,
            "must be a string or a list of text parts",
            &other,
        )),
    }
}

fn text_part(part: Value, at: &str) -> Result<String, ApiError> {
    if let Value::String(text) = part {
        return Ok(text);
    }
    let mut fields = Fields::of(part, at)?;
    match fields.text("type")?.as_deref() {
        Some("text") => {}
        other => {
            let rule = "must be text, which is all that this model reads";
            return Err(ApiError::field(fields.path("type"), rule, &json!(other)));
        }
    }
    let text = fields.text("text")?;
    text.ok_or_else(|| ApiError::field(fields.path("text"), "must be a string", &Value::Null))
}

/// Arguments become an object, because the template would put a string's escapes before the model. A string that is no
/// object stays what it is: the model sees what it wrote.
fn tool_call(call: Value, at: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(call, at)?;
    let id = fields.text("id")?;
    let function_at = fields.path("function");
    let function = fields.object("function")?;
    let mut function =
        function.ok_or_else(|| ApiError::field(function_at, "must be an object", &Value::Null))?;
    let name = tool_name(&mut function)?;
    let arguments_at = function.path("arguments");
    let arguments = match function.take("arguments") {
        None => json!({}),
        Some(Value::Object(arguments)) => Value::Object(arguments),
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(Value::Object(arguments)) => Value::Object(arguments),
            _ if text.trim().is_empty() => json!({}),
            _ => Value::String(text),
        },
        Some(other) => {
            let rule = "must be a string that holds a JSON object";
            return Err(ApiError::field(arguments_at, rule, &other));
        }
    };
    let function = json!({"name": name, "arguments": arguments});
    Ok(match id {
        Some(id) => json!({"id": id, "type": "function", "function": function}),
        None => json!({"type": "function", "function": function}),
    })
}

/// The tools on offer, each with a name of its own.
pub(super) fn tools(list: Vec<Value>) -> Result<Vec<Tool>, ApiError> {
    if list.len() > TOOLS_MAX {
        let rule = format!(
            "`tools` must have at most {TOOLS_MAX} entries, got {}",
            list.len()
        );
        return Err(ApiError::about("tools", rule));
    }
    let mut names = HashSet::new();
    let mut tools = Vec::with_capacity(list.len());
    for (i, value) in list.into_iter().enumerate() {
        let tool = tool(value, &format!("tools[{i}]"))?;
        if !names.insert(tool.name.clone()) {
            let at = format!("tools[{i}].function.name");
            return Err(ApiError::field(
                at,
                "must be another than those before",
                &json!(tool.name),
            ));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(value: Value, at: &str) -> Result<Tool, ApiError> {
    let shown = value.clone();
    let mut fields = Fields::of(value, at)?;
    match fields.text("type")?.as_deref() {
        Some("function") => {}
        other => {
            return Err(ApiError::field(
                fields.path("type"),
                "must be function",
                &json!(other),
            ));
        }
    }
    let function_at = fields.path("function");
    let function = fields.object("function")?;
    let mut function =
        function.ok_or_else(|| ApiError::field(function_at, "must be an object", &Value::Null))?;
    let name = tool_name(&mut function)?;
    function.text("description")?;
    let at = function.path("parameters");
    let parameters = match function.take("parameters") {
        None => json!({"type": "object"}),
        Some(schema @ Value::Object(_)) => schema,
        Some(other) => return Err(ApiError::field(at, "must be a JSON schema", &other)),
    };
    Ok(Tool {
        name,
        parameters,
        shown,
    })
}

fn tool_name(function: &mut Fields) -> Result<String, ApiError> {
    let at = function.path("name");
    let name = function.text("name")?.unwrap_or_default();
    if name.is_empty() || name.len() > TOOL_NAME_BYTES_MAX || name.contains(char::is_control) {
        let rule = format!("must be a name of 1 to {TOOL_NAME_BYTES_MAX} bytes");
        return Err(ApiError::field(at, &rule, &json!(name)));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_content_becomes_a_string() {
        let list = json!([
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"u\": \"\\u2013\"}"}},
                {"function": {"name": "g", "arguments": "{bad"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "r", "unknown": 1},
        ]);
        let Value::Array(list) = list else {
            unreachable!()
        };
        let expected = json!([
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"u": "–"}}},
                {"type": "function", "function": {"name": "g", "arguments": "{bad"}}]},
            {"role": "tool", "content": "r", "tool_call_id": "c"},
        ]);
        assert_eq!(json!(messages(list).unwrap()), expected);
    }

    #[test]
    fn wrong_messages_are_refused_by_place() {
        for (message, param) in [
            (json!({"content": "x"}), "messages[0].role"),
            (json!({"role": "robot", "content": "x"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "user", "content": 3}), "messages[0].content"),
            (
                json!({"role": "user", "content": [{"type": "image_url"}]}),
                "messages[0].content[0].type",
            ),
            (
                json!({"role": "user", "content": [{"type": "text"}]}),
                "messages[0].content[0].text",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {}}]}),
                "messages[0].tool_calls[0].function.name",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (json!("hi"), "messages[0]"),
        ] {
            let error = super::messages(vec![message.clone()]).unwrap_err();
            assert_eq!(error.param(), Some(param), "{message}");
        }
        assert_eq!(messages(vec![]).unwrap_err().param(), Some("messages"));
    }

    #[test]
    fn tools_need_names_of_their_own() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        assert_eq!(tools(vec![tool("a"), tool("b")]).unwrap()[1].name, "b");
        for (list, param) in [
            (
                vec![json!({"type": "function", "function": {}})],
                "tools[0].function.name",
            ),
            (vec![tool("")], "tools[0].function.name"),
            (vec![tool("a"), tool("a")], "tools[1].function.name"),
            (vec![json!({"type": "function"})], "tools[0].function"),
            (vec![json!({"function": {"name": "a"}})], "tools[0].type"),
            (
                vec![json!({"type": "function", "function": {"name": "a", "parameters": []}})],
                "tools[0].function.parameters",
            ),
        ] {
            assert_eq!(tools(list).unwrap_err().param(), Some(param));
        }
    }
}
