//! Messages of a conversation as a person reads them in a terminal: `traces show` and `chat`.
//!
//! Everything in a conversation came from models, pages and tools, so nothing of it may steer the terminal: control
//! characters are replaced, and colours are ours alone.

use std::fmt::Write;

use espalier_core::chat::ToolCall;
use espalier_core::trace::{Decision, ToolCallRecord};
use serde_json::Value;

use crate::output::{cut, duration, plain};

/// Longest argument value in the short form, in characters.
const ARGUMENT_CHARS_MAX: usize = 200;

/// How a trace is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Colours.
    pub color: bool,
    /// Lines of a tool result; none: all.
    pub lines: Option<usize>,
    /// How to see the rest of a result.
    pub rest: &'static str,
}

pub const BOLD: &str = "1";
pub const DIM: &str = "2";
pub const RED: &str = "31";
pub const GREEN: &str = "32";
pub const YELLOW: &str = "33";
pub const BLUE: &str = "34";
pub const MAGENTA: &str = "35";

impl Style {
    /// `text` in the colour of an ANSI code.
    pub fn paint(self, code: &str, text: &str) -> String {
        if self.color {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }
}

/// A system or user message.
pub fn section(text: &mut String, style: Style, color: &str, who: &str, content: &str) {
    let _ = writeln!(text, "{}", style.paint(color, who));
    for line in content.trim_end().lines() {
        let _ = writeln!(text, "  {}", plain(line));
    }
}

/// What the model thinks, says and calls. `who` is `assistant`, or says more.
pub fn assistant(
    text: &mut String,
    style: Style,
    who: &str,
    thoughts: Option<&str>,
    content: &str,
    calls: &[ToolCall],
) {
    let _ = writeln!(text, "{}", style.paint(BLUE, who));
    for line in thoughts.unwrap_or_default().trim().lines() {
        let _ = writeln!(text, "  {}", style.paint(DIM, &plain(line)));
    }
    for line in content.trim().lines() {
        let _ = writeln!(text, "  {}", plain(line));
    }
    for call in calls {
        let _ = writeln!(
            text,
            "  {} {}",
            style.paint(YELLOW, "→"),
            call_text(call, style)
        );
    }
}

fn call_text(call: &ToolCall, style: Style) -> String {
    let function = &call.function;
    if let Some(malformed) = &function.malformed {
        let shown = cut(&plain(malformed), ARGUMENT_CHARS_MAX);
        return format!("{}({})", plain(&function.name), style.paint(RED, &shown));
    }
    let argument = |(name, value): (&String, &Value)| {
        let value = plain(&value.to_string());
        let value = match style.lines {
            Some(_) => cut(&value, ARGUMENT_CHARS_MAX),
            None => value,
        };
        format!("{}: {value}", plain(name))
    };
    let arguments: Vec<String> = function.arguments.iter().map(argument).collect();
    format!(
        "{}({})",
        style.paint(BOLD, &plain(&function.name)),
        arguments.join(", ")
    )
}

/// What a tool answered. `place` stands behind its name, where it is not empty.
pub fn tool(
    text: &mut String,
    style: Style,
    place: &str,
    call_id: &str,
    content: &str,
    record: Option<&ToolCallRecord>,
) {
    let name = record.map_or_else(|| call_id.to_owned(), |record| record.name.clone());
    let mut who = format!("tool {}{place}", plain(&name));
    let mut color = MAGENTA;
    if let Some(record) = record {
        if record.latency_ms > 0 {
            let _ = write!(who, " · {}", duration(record.latency_ms));
        }
        if let Some(decision) = not_run(record.decision) {
            let _ = write!(who, " · {decision}");
        }
        if record.truncated {
            who.push_str(" · shortened for the model");
        }
        if record.is_error {
            who.push_str(" · error");
            color = RED;
        }
    }
    let _ = writeln!(text, "{}", style.paint(color, &who));
    let lines: Vec<&str> = content.lines().collect();
    let shown = style.lines.unwrap_or(lines.len()).min(lines.len());
    for line in &lines[..shown] {
        let _ = writeln!(text, "  {}", plain(line));
    }
    if shown < lines.len() {
        let more = format!("  … {} more lines{}", lines.len() - shown, style.rest);
        let _ = writeln!(text, "{}", style.paint(DIM, &more));
    }
}

fn not_run(decision: Decision) -> Option<&'static str> {
    match decision {
        Decision::Allowed => None,
        Decision::Approved => Some("approved"),
        Decision::Rejected => Some("rejected"),
        Decision::Unknown => Some("no such tool"),
        Decision::Malformed => Some("malformed arguments"),
        Decision::OverLimit => Some("one call too many"),
    }
}
