//! What a tool answered: the text and images for the model, and everything as it came for the trace.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use rmcp::model::{CallToolResult, ContentBlock, ResourceContents};
use serde_json::{Value, json};

use crate::observe::strip;

/// The answer of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolOutcome {
    /// All text parts, without terminal colours, joined by line breaks. Not shortened.
    pub text: String,
    /// Whether the tool failed.
    pub is_error: bool,
    /// The `CallToolResult` as JSON.
    pub raw: Bytes,
    /// Images, each with its MIME type.
    pub images: Vec<(String, Bytes)>,
    /// From the call to the answer.
    pub latency: Duration,
}

impl ToolOutcome {
    /// From what the server sent.
    pub(super) fn new(result: &CallToolResult, latency: Duration) -> Self {
        let mut texts = Vec::new();
        let mut images = Vec::new();
        for block in &result.content {
            match block {
                ContentBlock::Text(part) => texts.push(strip(&part.text).into_owned()),
                ContentBlock::Image(part) => match BASE64_STANDARD.decode(&part.data) {
                    Ok(data) => images.push((part.mime_type.clone(), data.into())),
                    Err(_) => texts.push("[an image that is not base64]".to_owned()),
                },
                ContentBlock::Audio(part) => texts.push(format!("[audio, {}]", part.mime_type)),
                ContentBlock::Resource(part) => texts.push(resource_text(&part.resource)),
                ContentBlock::ResourceLink(part) => {
                    texts.push(format!("[{}]({})", part.name, part.uri))
                }
                _ => texts.push("[content of an unknown kind]".to_owned()),
            }
        }
        if texts.is_empty()
            && let Some(structured) = &result.structured_content
        {
            texts.push(structured.to_string());
        }
        Self {
            text: texts.join("\n"),
            is_error: result.is_error == Some(true),
            raw: serde_json::to_vec(result).unwrap_or_default().into(),
            images,
            latency,
        }
    }

    /// A failure that the model is told about, where the server sent no result.
    pub(super) fn failure(text: String, latency: Duration) -> Self {
        let raw: Value = json!({"content": [{"type": "text", "text": text}], "isError": true});
        Self {
            raw: raw.to_string().into(),
            text,
            is_error: true,
            images: Vec::new(),
            latency,
        }
    }
}

/// The text of a resource, or what kind of thing it is.
pub(super) fn resource_text(resource: &ResourceContents) -> String {
    match resource {
        ResourceContents::TextResourceContents { text, .. } => strip(text).into_owned(),
        ResourceContents::BlobResourceContents { uri, mime_type, .. } => {
            format!("[{uri}, {}]", mime_type.as_deref().unwrap_or("binary"))
        }
        _ => "[a resource of an unknown kind]".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(result: Value) -> ToolOutcome {
        ToolOutcome::new(&serde_json::from_value(result).unwrap(), Duration::ZERO)
    }

    #[test]
    fn parts_become_text_and_images() {
        let got = outcome(json!({"content": [
            {"type": "text", "text": "\u{1b}[31ma\u{1b}[0m"},
            {"type": "image", "data": "aGk=", "mimeType": "image/png"},
            {"type": "resource", "resource": {"uri": "note://x", "text": "n"}},
            {"type": "text", "text": "b"}
        ], "isError": true}));
        assert_eq!(got.text, "a\nn\nb");
        assert_eq!(
            got.images,
            [("image/png".to_owned(), Bytes::from_static(b"hi"))]
        );
        assert!(got.is_error);
        let raw: Value = serde_json::from_slice(&got.raw).unwrap();
        assert_eq!(raw["content"][1]["data"], "aGk=");
    }

    #[test]
    fn structured_content_stands_in_for_missing_text() {
        assert_eq!(
            outcome(json!({"content": [], "structuredContent": {"n": 1}})).text,
            "{\"n\":1}"
        );
        assert_eq!(outcome(json!({"content": []})).text, "");
    }
}
