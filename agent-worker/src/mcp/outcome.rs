//! What a tool answered: the text and images for the model, and everything as it came for the trace.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use espalier_runtime::tasks::{BlockingFailed, blocking};
use rmcp::model::{CallToolResult, ContentBlock, ReadResourceResult, ResourceContents};
use serde_json::{Value, json};

use super::inline::put_snapshot;
use crate::observe::strip;

/// Up to this size an answer is converted where it is. Cleaning, decoding and writing it take one to two nanoseconds a
/// byte together, so this is under half a millisecond; of 16 MB, the most that a server may send, it is a stall of
/// everything else on the thread.
const INLINE_BYTES_MAX: usize = 256 << 10;

/// Most images of one answer that are kept as such, more than any model is shown at once: each becomes a file, an
/// object and an entry of the manifest, and an answer may be made of very many empty ones.
const IMAGES_MAX: usize = 32;

/// What a part counts beside its text: an answer may be made of very many empty ones.
const PART_BYTES: usize = 64;

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
    /// From what the server answered to a call.
    pub(super) async fn of_call(
        result: CallToolResult,
        latency: Duration,
    ) -> Result<Self, BlockingFailed> {
        let bytes = call_bytes(&result);
        convert(bytes, move || Self::new(&result, latency)).await
    }

    /// As [`ToolOutcome::of_call`], with the snapshot that `page` has in place of the link to it.
    pub(super) async fn of_call_with_page(
        mut result: CallToolResult,
        page: CallToolResult,
        latency: Duration,
    ) -> Result<Self, BlockingFailed> {
        let bytes = call_bytes(&result).saturating_add(call_bytes(&page));
        let work = move || {
            put_snapshot(&mut result, &page);
            Self::new(&result, latency)
        };
        convert(bytes, work).await
    }

    /// From the `CallToolResult` as it was kept of an earlier call.
    ///
    /// # Errors
    /// Inside: it is no `CallToolResult`.
    pub(crate) async fn of_raw(
        raw: Bytes,
    ) -> Result<Result<Self, serde_json::Error>, BlockingFailed> {
        let work = move || {
            let result: CallToolResult = serde_json::from_slice(&raw)?;
            let outcome = Self::new(&result, Duration::ZERO);
            Ok(Self { raw, ..outcome })
        };
        blocking("mcp.convert", work).await
    }

    /// Whether the answer is small enough to be looked into where it is.
    pub(super) fn is_small(result: &CallToolResult) -> bool {
        call_bytes(result) <= INLINE_BYTES_MAX
    }

    /// From what the server answered when it was asked for a resource.
    pub(super) async fn of_resource(
        result: ReadResourceResult,
        latency: Duration,
    ) -> Result<Self, BlockingFailed> {
        let bytes = result.contents.iter().map(resource_bytes).sum();
        let work = move || {
            let texts: Vec<String> = result.contents.iter().map(resource_text).collect();
            Self {
                text: texts.join("\n"),
                is_error: false,
                raw: serde_json::to_vec(&result).unwrap_or_default().into(),
                images: Vec::new(),
                latency,
            }
        };
        convert(bytes, work).await
    }

    fn new(result: &CallToolResult, latency: Duration) -> Self {
        let mut texts = Vec::new();
        let mut images = Vec::new();
        let mut left_out = 0_u32;
        for block in &result.content {
            match block {
                ContentBlock::Text(part) => texts.push(strip(&part.text).into_owned()),
                ContentBlock::Image(_) if images.len() >= IMAGES_MAX => left_out += 1,
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
        if left_out > 0 {
            texts.push(format!(
                "[{left_out} images more than {IMAGES_MAX} were left out]"
            ));
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

/// Converts an answer of `bytes`: here while it is small, off the async threads otherwise.
async fn convert(
    bytes: usize,
    work: impl FnOnce() -> ToolOutcome + Send + 'static,
) -> Result<ToolOutcome, BlockingFailed> {
    if bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    blocking("mcp.convert", work).await
}

/// About how large an answer is. Structured content has no size that could be told without walking it, so it counts as
/// large.
fn call_bytes(result: &CallToolResult) -> usize {
    if result.structured_content.is_some() {
        return usize::MAX;
    }
    let part = |block: &ContentBlock| match block {
        ContentBlock::Text(part) => PART_BYTES + part.text.len(),
        ContentBlock::Image(part) => PART_BYTES + part.data.len(),
        ContentBlock::Audio(part) => PART_BYTES + part.data.len(),
        ContentBlock::Resource(part) => resource_bytes(&part.resource),
        _ => PART_BYTES,
    };
    result.content.iter().map(part).sum()
}

fn resource_bytes(resource: &ResourceContents) -> usize {
    PART_BYTES
        + match resource {
            ResourceContents::TextResourceContents { text, .. } => text.len(),
            ResourceContents::BlobResourceContents { blob, .. } => blob.len(),
            _ => 0,
        }
}

/// The text of a resource, or what kind of thing it is.
fn resource_text(resource: &ResourceContents) -> String {
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
    fn no_more_images_than_a_few_are_kept_of_one_answer() {
        let image = json!({"type": "image", "data": "aGk=", "mimeType": "image/png"});
        let result: CallToolResult =
            serde_json::from_value(json!({"content": vec![image; 40]})).unwrap();
        let got = ToolOutcome::new(&result, Duration::ZERO);
        assert_eq!(got.images.len(), IMAGES_MAX);
        assert_eq!(got.text, "[8 images more than 32 were left out]");
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

    /// The thread on which an answer of `bytes` is converted.
    async fn thread_for(bytes: usize) -> String {
        let work = || {
            let thread = format!("{:?}", std::thread::current().id());
            ToolOutcome::failure(thread, Duration::ZERO)
        };
        convert(bytes, work).await.unwrap().text
    }

    #[tokio::test]
    async fn large_answers_leave_the_async_thread() {
        let here = format!("{:?}", std::thread::current().id());
        assert_eq!(thread_for(INLINE_BYTES_MAX).await, here);
        assert_ne!(thread_for(INLINE_BYTES_MAX + 1).await, here);
    }

    #[test]
    fn every_heavy_part_counts() {
        let bytes = |result: Value| call_bytes(&serde_json::from_value(result).unwrap());
        let long = "a".repeat(INLINE_BYTES_MAX);
        for part in [
            json!({"type": "text", "text": long}),
            json!({"type": "image", "data": long, "mimeType": "image/png"}),
            json!({"type": "audio", "data": long, "mimeType": "audio/wav"}),
            json!({"type": "resource", "resource": {"uri": "a://b", "text": long}}),
            json!({"type": "resource", "resource": {"uri": "a://b", "blob": long}}),
        ] {
            let kind = part["type"].clone();
            assert!(
                bytes(json!({ "content": [part] })) > INLINE_BYTES_MAX,
                "{kind}"
            );
        }
        let empty = json!({"type": "text", "text": ""});
        assert!(bytes(json!({"content": vec![empty; 10_000]})) > INLINE_BYTES_MAX);
        assert!(bytes(json!({"content": [], "structuredContent": 1})) > INLINE_BYTES_MAX);
        assert!(bytes(json!({"content": [{"type": "text", "text": "a"}]})) < 100);
    }

    #[tokio::test]
    async fn a_large_answer_becomes_the_same_outcome() {
        let data = BASE64_STANDARD.encode(vec![7; 4 << 20]);
        let result: CallToolResult = serde_json::from_value(json!({"content": [
            {"type": "image", "data": data, "mimeType": "image/png"},
            {"type": "text", "text": "\u{1b}[1mx\u{1b}[0m"},
        ]}))
        .unwrap();
        let latency = Duration::from_millis(5);
        let inline = ToolOutcome::new(&result, latency);
        assert_eq!(inline.images[0].1.len(), 4 << 20);
        assert_eq!(ToolOutcome::of_call(result, latency).await.unwrap(), inline);
    }

    #[tokio::test]
    async fn what_was_kept_becomes_the_same_outcome_again() {
        let result = json!({"content": [
            {"type": "text", "text": "\u{1b}[31ma\u{1b}[0m"},
            {"type": "image", "data": "aGk=", "mimeType": "image/png"},
        ], "isError": true});
        let failure = ToolOutcome::failure("no such page".to_owned(), Duration::ZERO);
        for kept in [outcome(result), failure] {
            let again = ToolOutcome::of_raw(kept.raw.clone()).await.unwrap();
            assert_eq!(again.unwrap(), kept);
        }
        let broken = ToolOutcome::of_raw(Bytes::from_static(b"{")).await.unwrap();
        assert!(broken.is_err());
    }

    #[tokio::test]
    async fn a_snapshot_is_in_the_text_and_in_what_is_kept() {
        let text = |text: &str| {
            let result = json!({"content": [{"type": "text", "text": text}], "isError": true});
            serde_json::from_value::<CallToolResult>(result).unwrap()
        };
        let block = "```yaml\n- text: a\n```";
        let got = ToolOutcome::of_call_with_page(
            text("### Error\nx\n### Snapshot\n- [Snapshot](a.yml)"),
            text(&format!("### Snapshot\n{block}")),
            Duration::ZERO,
        );
        let got = got.await.unwrap();
        assert_eq!(got.text, format!("### Error\nx\n### Snapshot\n{block}"));
        let raw: Value = serde_json::from_slice(&got.raw).unwrap();
        assert_eq!(raw["content"][0]["text"], got.text);
        assert!(got.is_error);
    }

    #[tokio::test]
    async fn a_resource_is_text_or_the_name_of_what_it_is() {
        let result = serde_json::from_value(json!({"contents": [
            {"uri": "a://b", "text": "n\u{1b}[0m"},
            {"uri": "a://c", "blob": "aGk=", "mimeType": "image/png"},
        ]}))
        .unwrap();
        let got = ToolOutcome::of_resource(result, Duration::ZERO)
            .await
            .unwrap();
        assert_eq!(got.text, "n\n[a://c, image/png]");
        let raw: Value = serde_json::from_slice(&got.raw).unwrap();
        assert_eq!(raw["contents"][1]["blob"], "aGk=");
    }
}
