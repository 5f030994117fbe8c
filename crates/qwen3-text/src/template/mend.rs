//! Mends what recorded conversations are known to have wrong, so that a model is not taught it.

use serde_json::Value;

use super::Conversation;

/// How many of each defect [`Conversation::mend`] mended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    /// `content: null`, which the template cannot render; now empty.
    pub null_contents: usize,
    /// Content of an assistant that was only whitespace, which would be rendered as stray lines; now empty.
    pub blank_contents: usize,
    /// Arguments of a call that were JSON in a string, which would be rendered with its escapes; now objects.
    pub string_arguments: usize,
}

impl Conversation {
    /// Makes content of null and blank content of assistants empty, and arguments that are JSON in a string the object
    /// that they spell. A string that spells no object stays, and is rendered as it is.
    pub fn mend(&mut self) -> Mended {
        let mut mended = Mended::default();
        for message in &mut self.messages {
            mend_message(message, &mut mended);
        }
        mended
    }
}

fn mend_message(message: &mut Value, mended: &mut Mended) {
    let is_assistant = message["role"] == "assistant";
    if let Some(content) = message.get_mut("content") {
        if content.is_null() {
            *content = Value::from("");
            mended.null_contents += 1;
        }
        let blank = |text: &str| !text.is_empty() && text.trim().is_empty();
        if is_assistant && content.as_str().is_some_and(blank) {
            *content = Value::from("");
            mended.blank_contents += 1;
        }
    }
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let function = match call.get_mut("function") {
            Some(function) => function,
            None => call,
        };
        let Some(arguments) = function.get_mut("arguments") else {
            continue;
        };
        let spelled = arguments.as_str().map(serde_json::from_str::<Value>);
        if let Some(Ok(object @ Value::Object(_))) = spelled {
            *arguments = object;
            mended.string_arguments += 1;
        }
    }
}
