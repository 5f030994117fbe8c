//! What the model is shown of a tool's result.
//!
//! Pure functions over text: nothing is fetched, stored or rendered here; the rollout loop calls [`shape`] on each
//! result and keeps the raw one as a blob. Work is bounded by the budget, not by the result, except for one pass over
//! the bytes, or a few where pages are compacted; it may still take milliseconds, so it does not belong on an async thread.
//!
//! Results are untrusted. Text that spells a control token (`<|im_end|>`, `</tool_response>`) is left as it is, so
//! that the model sees what the page says; it is counted as ordinary text, and whoever renders a prompt from it must
//! encode it as ordinary text too.

mod ansi;
mod compact;
mod line;
mod snapshot;

use std::borrow::Cow;

use espalier_core::spec::Observation;
use espalier_qwen3_text::Tokenizer;

pub(crate) use ansi::strip;
use snapshot::{References, Snapshot};

/// What stands for a result without text.
pub const EMPTY_RESULT: &str = "(empty tool result)";

/// A tool's result as the model is shown it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shaped {
    /// The text of the tool message.
    pub text: String,
    /// Tokens of `text`, as Qwen3 counts ordinary text.
    pub tokens: usize,
    /// Whether anything was left out beside terminal colours and what compaction leaves out.
    pub truncated: bool,
    /// Nodes of the accessibility tree that are not shown; 0 for text that is no snapshot.
    pub dropped_nodes: usize,
    /// Bytes of the result, or of what compaction left of it, that are not shown.
    pub dropped_bytes: usize,
}

/// Shapes the text of one tool result by the job's rule.
///
/// Under [`Observation::MaxTokens`] the result never has more tokens than that. ANSI escapes are removed; what then
/// fits stays as it is. A Playwright snapshot loses whole nodes (the rule is in `observe/snapshot.rs`), any other text its end, at a line
/// where that costs less than half. The last line then says what is missing and how to see it.
///
/// Under [`Observation::CompactTokens`] the same is done to what compaction leaves of a result of Playwright (the rule is
/// in `observe/compact`).
///
/// Under [`Observation::CompatChars`] it is the workshop's: the first so many characters and a sentence, exactly.
pub fn shape(raw: &str, rule: Observation, tokenizer: &Tokenizer) -> Shaped {
    match rule {
        Observation::MaxTokens(max_tokens) => within_tokens(
            ansi::strip(raw),
            usize::try_from(max_tokens).unwrap_or(usize::MAX),
            References::All,
            tokenizer,
        ),
        Observation::CompactTokens(max_tokens) => within_tokens(
            compact::compact(&ansi::strip(raw)).into(),
            usize::try_from(max_tokens).unwrap_or(usize::MAX),
            References::Operable,
            tokenizer,
        ),
        Observation::CompatChars(max_chars) => compat(
            raw,
            usize::try_from(max_chars).unwrap_or(usize::MAX),
            tokenizer,
        ),
    }
}

fn compat(raw: &str, max_chars: usize, tokenizer: &Tokenizer) -> Shaped {
    let (text, dropped_bytes) = match raw.char_indices().nth(max_chars) {
        _ if raw.is_empty() => (EMPTY_RESULT.to_owned(), 0),
        None => (raw.to_owned(), 0),
        Some((end, _)) => {
            let kept = &raw[..end];
            let text = format!("{kept}\n[Content truncated to {max_chars} characters]");
            (text, raw.len() - end)
        }
    };
    Shaped {
        tokens: tokenizer.count(&text),
        text,
        truncated: dropped_bytes > 0,
        dropped_nodes: 0,
        dropped_bytes,
    }
}

fn within_tokens(
    mut text: Cow<'_, str>,
    max_tokens: usize,
    references: References,
    tokenizer: &Tokenizer,
) -> Shaped {
    if text.is_empty() {
        text = Cow::Borrowed(EMPTY_RESULT);
    }
    if let Some(tokens) = tokenizer.count_at_most(&text, max_tokens) {
        return Shaped {
            text: text.into_owned(),
            tokens,
            truncated: false,
            dropped_nodes: 0,
            dropped_bytes: 0,
        };
    }
    let snapshot = Snapshot::parse(&text, references);
    let shaped = snapshot.and_then(|snapshot| snapshot.fit(text.len(), max_tokens, tokenizer));
    shaped.unwrap_or_else(|| cut_text(&text, max_tokens, tokenizer))
}

/// The start of `text` and a line that says how much more there was; without that line where it alone does not fit.
fn cut_text(text: &str, max_tokens: usize, tokenizer: &Tokenizer) -> Shaped {
    // The line with the largest number it can hold, and one token for the line break before it.
    let reserved = tokenizer.count(&rest_line(text.len())) + 1;
    let mut body_tokens = max_tokens.saturating_sub(reserved);
    while body_tokens > 0 {
        let body = whole_lines(tokenizer.prefix_within(text, body_tokens));
        let chars_left = text[body.len()..].chars().count();
        let line_break = if body.ends_with('\n') { "" } else { "\n" };
        let shown = format!("{body}{line_break}{}", rest_line(chars_left));
        let tokens = tokenizer.count(&shown);
        if tokens <= max_tokens {
            return cut(shown, tokens, text.len() - body.len());
        }
        body_tokens = body_tokens.saturating_sub(tokens - max_tokens);
    }
    let body = tokenizer.prefix_within(text, max_tokens);
    cut(
        body.to_owned(),
        tokenizer.count(body),
        text.len() - body.len(),
    )
}

fn cut(text: String, tokens: usize, dropped_bytes: usize) -> Shaped {
    Shaped {
        text,
        tokens,
        truncated: true,
        dropped_nodes: 0,
        dropped_bytes,
    }
}

fn rest_line(chars: usize) -> String {
    format!("[{chars} more characters are not shown. Ask for a smaller part to see them.]")
}

/// `body` up to its last line break, unless that would lose more than half of it.
fn whole_lines(body: &str) -> &str {
    match body.rfind('\n') {
        Some(at) if at >= body.len() / 2 => &body[..=at],
        _ => body,
    }
}

#[cfg(test)]
mod tests;
