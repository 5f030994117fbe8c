//! `espalier traces show`: a trace to be read like a conversation.
//!
//! Everything in a trace came from models, pages and tools, so nothing of it may steer the terminal: control
//! characters are replaced, and colours are ours alone.

use std::fmt::Write;

use espalier_core::chat::{Message, ToolCall};
use espalier_core::trace::{Decision, ToolCallRecord, Trace};
use serde_json::{Value, json};

use super::{Show, Source};
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{count, cut, duration, plain};

/// Longest argument value in the short form, in characters.
const ARGUMENT_CHARS_MAX: usize = 200;

/// How a trace is drawn.
#[derive(Clone, Copy, Debug)]
struct Style {
    color: bool,
    /// Lines of a tool result; none: all.
    lines: Option<usize>,
}

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const BLUE: &str = "34";
const MAGENTA: &str = "35";

/// Runs the command.
pub async fn run(context: &Context, args: &Show) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    let trace = source.find(&args.job.key(context.project()?)).await?;
    let style = Style {
        color: context.out.color,
        lines: (!args.full).then_some(args.lines),
    };
    context
        .out
        .show(|| json!(trace), || render(&trace, style))?;
    Ok(Exit::Ok)
}

fn render(trace: &Trace, style: Style) -> String {
    let mut text = head(trace, style);
    for (index, message) in trace.messages.iter().enumerate() {
        text.push('\n');
        match message {
            Message::System { content, hint } => {
                let who = if *hint {
                    "hint (left out of training)"
                } else {
                    "system"
                };
                section(&mut text, style, MAGENTA, who, content);
            }
            Message::User { content } => section(&mut text, style, GREEN, "user", content),
            Message::Assistant {
                content,
                reasoning_content,
                tool_calls,
            } => assistant(
                &mut text,
                style,
                reasoning_content.as_deref(),
                content,
                tool_calls,
            ),
            Message::Tool {
                tool_call_id,
                content,
            } => {
                let record = trace
                    .tool_calls
                    .iter()
                    .find(|record| record.message == index);
                tool(&mut text, style, tool_call_id, content, record);
            }
        }
    }
    text.push_str(&verdict(trace, style));
    text
}

fn head(trace: &Trace, style: Style) -> String {
    let header = &trace.header;
    let mut text = style.paint(BOLD, &header.job.to_string());
    let _ = writeln!(
        text,
        "\n{} · attempt {} · {} · {} tools",
        plain(&header.provenance.model),
        header.attempt,
        header.started_at_us,
        header.tools.len()
    );
    if let Some(task) = &header.task.task_id {
        let kind = header.task.task_kind.as_deref().unwrap_or("task");
        let _ = writeln!(text, "{}: {}", plain(kind), plain(task));
    }
    text
}

fn section(text: &mut String, style: Style, color: &str, who: &str, content: &str) {
    let _ = writeln!(text, "{}", style.paint(color, who));
    for line in content.trim_end().lines() {
        let _ = writeln!(text, "  {}", plain(line));
    }
}

fn assistant(
    text: &mut String,
    style: Style,
    thoughts: Option<&str>,
    content: &str,
    calls: &[ToolCall],
) {
    let _ = writeln!(text, "{}", style.paint(BLUE, "assistant"));
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

fn tool(
    text: &mut String,
    style: Style,
    call_id: &str,
    content: &str,
    record: Option<&ToolCallRecord>,
) {
    let name = record.map_or_else(|| call_id.to_owned(), |record| record.name.clone());
    let mut who = format!("tool {}", plain(&name));
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
        let more = format!("  … {} more lines (--full)", lines.len() - shown);
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

fn verdict(trace: &Trace, style: Style) -> String {
    let outcome = &trace.outcome;
    let totals = &outcome.totals;
    let mut text = format!(
        "\n{}: {} turns, {} tool calls ({} errors), {} tokens in, {} out, {}\n",
        outcome.stop.as_str(),
        totals.turns,
        totals.tool_calls,
        totals.tool_errors,
        count(totals.prompt_tokens),
        count(totals.completion_tokens),
        duration(totals.wall_ms)
    );
    if let Some(url) = &outcome.final_url {
        let _ = writeln!(text, "page: {}", plain(url));
    }
    let Some(verdict) = &outcome.verdict else {
        text.push_str("not judged");
        return text;
    };
    let color = if verdict.reward >= 1.0 { GREEN } else { RED };
    text.push_str(&style.paint(color, &format!("reward {:.3}", verdict.reward)));
    for check in &verdict.checks {
        let mark = if check.score >= 1.0 { "✓" } else { "✗" };
        let _ = write!(
            text,
            "\n  {mark} {} {:.2}: {}",
            plain(&check.path),
            check.score,
            plain(&check.reason)
        );
    }
    text
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        if self.color {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::trace::{CheckResult, Verdict};
    use espalier_runtime::traces::workshop;

    fn trace() -> Trace {
        let file = json!({
            "timestamp": "20250529_130900", "model": "qwen",
            "messages": [
                {"role": "system", "content": "look\nwell", "hint": true},
                {"role": "user", "content": "price?\u{1b}[2J"},
                {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                    {"id": "c1", "function": {"name": "open", "arguments": "{\"url\":\"x\"}"}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "1\n2\n3"},
                {"role": "assistant", "content": "5"}],
        });
        let draft = espalier_core::spec::parse_line(br#"{"prompt":"x"}"#).unwrap();
        let sampling = draft.check().unwrap().rollout.sampling;
        let job = "default/b/j".parse().unwrap();
        let mut trace = workshop::read(file.to_string().as_bytes(), job, sampling).unwrap();
        trace.outcome.verdict = Some(Verdict {
            reward: 0.0,
            checks: vec![CheckResult {
                path: "answer".to_owned(),
                score: 0.0,
                reason: "not 7".to_owned(),
            }],
        });
        trace
    }

    #[test]
    fn golden_conversation() {
        let style = Style {
            color: false,
            lines: Some(2),
        };
        let expected = "\
default/b/j
qwen · attempt 1 · 2025-05-29T13:09:00.000000Z · 0 tools

hint (left out of training)
  look
  well

user
  price?\u{fffd}[2J

assistant
  hm
  → open(url: \"x\")

tool open
  1
  2
  … 1 more lines (--full)

assistant
  5

answered: 2 turns, 1 tool calls (0 errors), 0 tokens in, 0 out, 0 ms
reward 0.000
  ✗ answer 0.00: not 7";
        assert_eq!(render(&trace(), style), expected);
    }

    #[test]
    fn the_only_escapes_are_our_colours() {
        let style = Style {
            color: true,
            lines: None,
        };
        let text = render(&trace(), style);
        assert!(text.contains("\u{1b}[2mhm\u{1b}[0m"));
        assert!(!text.contains("\u{1b}[2J"));
    }
}
