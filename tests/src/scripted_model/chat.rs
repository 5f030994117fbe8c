//! A chat request as the scripted model reads it, and the reply that it makes.
//!
//! Reading is lenient: what is missing is empty. Called by the HTTP layer; the rules see only these types.

use serde_json::Value;

/// What of a request matters.
#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub model: String,
    pub messages: Vec<Message>,
    /// Names of the offered tools.
    pub tools: Vec<String>,
    pub stream: bool,
    pub include_usage: bool,
    /// The sampling seed.
    pub seed: u64,
    /// Rough size of the prompt in tokens.
    pub prompt_tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
    Tool,
}

#[derive(Clone, Debug)]
pub(super) struct Message {
    pub role: Role,
    pub content: String,
    /// Names of the tools that an assistant message called.
    pub called: Vec<String>,
}

/// What the model says in one turn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    pub thought: String,
    pub content: String,
    pub calls: Vec<Call>,
    /// Whether the token limit cut the reply.
    pub cut_short: bool,
}

/// One tool call; the arguments are text because a model may write anything there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub tool: String,
    pub arguments: String,
}

impl Reply {
    pub(super) fn say(thought: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            thought: thought.into(),
            content: content.into(),
            ..Self::default()
        }
    }

    pub(super) fn call(thought: impl Into<String>, tool: &str, arguments: Value) -> Self {
        Self {
            thought: thought.into(),
            calls: vec![Call {
                tool: tool.to_owned(),
                arguments: arguments.to_string(),
            }],
            ..Self::default()
        }
    }

    /// Rough size of the reply in tokens.
    pub(super) fn tokens(&self) -> usize {
        let calls: usize = self
            .calls
            .iter()
            .map(|call| call.tool.len() + call.arguments.len())
            .sum();
        tokens(self.thought.len() + self.content.len() + calls)
    }
}

impl Request {
    pub(super) fn parse(body: &Value) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self {
            model: text(&body["model"]),
            messages: list(&body["messages"]).iter().filter_map(message).collect(),
            tools: list(&body["tools"])
                .iter()
                .map(|tool| text(&tool["function"]["name"]))
                .collect(),
            stream: body["stream"].as_bool().unwrap_or(false),
            include_usage: body["stream_options"]["include_usage"]
                .as_bool()
                .unwrap_or(false),
            seed: body["seed"].as_u64().unwrap_or(0),
            prompt_tokens: tokens(
                body["messages"].to_string().len() + body["tools"].to_string().len(),
            ),
        }
    }

    /// The newest thing that the user said.
    pub(super) fn prompt(&self) -> &str {
        self.messages
            .iter()
            .rev()
            .find(|m| m.role == Role::User)
            .map_or("", |m| m.content.as_str())
    }

    /// Assistant turns so far.
    pub(super) fn turn(&self) -> usize {
        let is_turn = |m: &&Message| m.role == Role::Assistant;
        self.messages.iter().filter(is_turn).count()
    }

    /// Assistant turns since the user last spoke.
    pub(super) fn turns_since_prompt(&self) -> usize {
        self.messages
            .iter()
            .rev()
            .take_while(|m| m.role != Role::User)
            .filter(|m| m.role == Role::Assistant)
            .count()
    }

    /// The offered tool that goes by `name`, whatever prefix its server's name put before it; `name` itself when none
    /// does.
    pub(super) fn offered(&self, name: &str) -> String {
        let exact = self.tools.iter().find(|tool| *tool == name);
        let ending = || self.tools.iter().find(|tool| tool.ends_with(name));
        exact
            .or_else(ending)
            .cloned()
            .unwrap_or_else(|| name.to_owned())
    }
}

fn message(value: &Value) -> Option<Message> {
    let role = match value["role"].as_str()? {
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        _ => Role::System,
    };
    let called = value["tool_calls"].as_array().into_iter().flatten();
    Some(Message {
        role,
        content: content(&value["content"]),
        called: called
            .filter_map(|call| call["function"]["name"].as_str().map(str::to_owned))
            .collect(),
    })
}

/// Content is a string or a list of parts, of which the text counts.
fn content(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .filter_map(|part| part["text"].as_str())
            .collect::<Vec<_>>()
            .join("\n"),
        _ => String::new(),
    }
}

fn tokens(bytes: usize) -> usize {
    bytes.div_ceil(4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_request_is_read_with_parts_and_prefixed_tools() {
        let request = Request::parse(&json!({
            "model": "scripted",
            "messages": [
                {"role": "system", "content": "hints"},
                {"role": "user", "content": [{"type": "text", "text": "first"}]},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "3"},
                {"role": "user", "content": "second"},
            ],
            "tools": [{"function": {"name": "toy__add"}}],
            "seed": 5,
        }));
        assert_eq!(request.prompt(), "second");
        assert_eq!((request.turn(), request.turns_since_prompt()), (2, 0));
        assert_eq!(request.messages[2].called, ["add"]);
        assert_eq!(request.offered("add"), "toy__add");
        assert_eq!(request.offered("echo"), "echo");
    }

    #[test]
    fn nonsense_is_an_empty_request() {
        let request = Request::parse(&json!({"messages": "x", "tools": 5}));
        assert!(request.messages.is_empty() && request.tools.is_empty());
        assert_eq!(request.prompt(), "");
    }
}
