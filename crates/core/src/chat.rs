//! Conversations as they are stored: OpenAI's chat format, with `arguments` as an object and never as a string.
//!
//! Source of the format: OpenAI API reference, *Create chat completion*; `reasoning_content` as vLLM extends it.

mod openai;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use openai::{read_message, read_messages, read_tools};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Message {
    /// Text that sets the frame.
    System {
        /// The text.
        content: String,
        /// Whether the text is help for this rollout only, which a training row leaves out.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        hint: bool,
    },
    /// What the user says.
    User {
        /// The text.
        content: String,
    },
    /// What the model says and does.
    Assistant {
        /// The visible text; whitespace alone is stored as "".
        content: String,
        /// The model's thoughts, where it gave any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reasoning_content: Option<String>,
        /// Calls of tools, in the order in which they are answered.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tool_calls: Vec<ToolCall>,
    },
    /// What a tool answered.
    Tool {
        /// The call that this answers.
        tool_call_id: String,
        /// The text that the model is shown.
        content: String,
    },
}

impl Message {
    /// An assistant turn, with content that is whitespace alone made empty: Qwen3's template would render stray
    /// newlines before `<tool_call>` otherwise.
    pub fn assistant(
        content: String,
        reasoning_content: Option<String>,
        tool_calls: Vec<ToolCall>,
    ) -> Self {
        let content = if content.trim().is_empty() {
            String::new()
        } else {
            content
        };
        let reasoning_content = reasoning_content.filter(|text| !text.trim().is_empty());
        Self::Assistant {
            content,
            reasoning_content,
            tool_calls,
        }
    }

    /// The name of the role on the wire.
    pub fn role(&self) -> &'static str {
        match self {
            Self::System { .. } => "system",
            Self::User { .. } => "user",
            Self::Assistant { .. } => "assistant",
            Self::Tool { .. } => "tool",
        }
    }

    /// The visible text.
    pub fn content(&self) -> &str {
        match self {
            Self::System { content, .. }
            | Self::User { content }
            | Self::Assistant { content, .. }
            | Self::Tool { content, .. } => content,
        }
    }
}

/// A call that the model made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The server's id of the call; unique within a conversation.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type", default)]
    pub call_type: FunctionTag,
    /// What is called, and with what.
    pub function: FunctionCall,
}

impl ToolCall {
    /// A call with well-formed arguments.
    pub fn new(
        id: impl Into<String>,
        name: impl Into<String>,
        arguments: Map<String, Value>,
    ) -> Self {
        let function = FunctionCall {
            name: name.into(),
            arguments,
            malformed: None,
        };
        Self {
            id: id.into(),
            call_type: FunctionTag::Function,
            function,
        }
    }
}

/// The constant `"function"`, which OpenAI's format repeats in calls and tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FunctionTag {
    /// The only kind of tool that there is.
    #[default]
    Function,
}

/// Name and arguments of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// The offered name.
    pub name: String,
    /// The arguments; empty where the model's text was not a JSON object.
    pub arguments: Map<String, Value>,
    /// The model's own text where it was not a JSON object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub malformed: Option<String>,
}

/// A tool as it is offered to the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolDef {
    /// Always `function`.
    #[serde(rename = "type", default)]
    pub tool_type: FunctionTag,
    /// Name, description and parameters.
    pub function: FunctionDef,
}

/// The function of a [`ToolDef`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionDef {
    /// 1 to 64 of `A-Z a-z 0-9 _ -`.
    pub name: String,
    /// What the tool does, for the model.
    #[serde(default)]
    pub description: String,
    /// JSON Schema of the arguments; its root is an object.
    pub parameters: Value,
}

/// The conversation as a model is sent it: Qwen3's template has one system block, so the system texts and hints that a
/// conversation begins with go as one message.
pub fn on_the_wire(messages: &[Message]) -> Vec<Message> {
    let is_system = |message: &&Message| matches!(message, Message::System { .. });
    let systems: Vec<&str> = messages
        .iter()
        .take_while(is_system)
        .map(Message::content)
        .collect();
    let rest = &messages[systems.len()..];
    let mut sent = Vec::with_capacity(rest.len() + 1);
    if !systems.is_empty() {
        sent.push(Message::System {
            content: systems.join("\n\n"),
            hint: false,
        });
    }
    sent.extend_from_slice(rest);
    sent
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_conversation_reads_back_as_openai_writes_it() {
        let text = json!([
            {"role": "system", "content": "look at the footer", "hint": true},
            {"role": "user", "content": "price?"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "open", "arguments": {"url": "x"}}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "ok"},
            {"role": "assistant", "content": "5"},
        ]);
        let messages: Vec<Message> = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(serde_json::to_value(&messages).unwrap(), text);
    }

    #[test]
    fn whitespace_is_no_content() {
        let turn = Message::assistant("\n\n".into(), Some(" ".into()), vec![]);
        assert_eq!(
            turn,
            Message::Assistant {
                content: String::new(),
                reasoning_content: None,
                tool_calls: vec![]
            }
        );
    }

    #[test]
    fn system_and_hints_go_as_one_message() {
        let system = |content: &str, hint| Message::System {
            content: content.into(),
            hint,
        };
        let user = Message::User {
            content: "hi".into(),
        };
        let sent = on_the_wire(&[
            system("be brief", false),
            system("look below", true),
            user.clone(),
        ]);
        assert_eq!(
            sent,
            [system("be brief\n\nlook below", false), user.clone()]
        );
        assert_eq!(on_the_wire(std::slice::from_ref(&user)), [user]);
    }
}
