//! `espalier traces show`: a trace to be read like a conversation.

use std::fmt::Write;

use espalier_core::chat::Message;
use espalier_core::id::Fence;
use espalier_core::time::Timestamp;
use espalier_core::trace::edits::{Conversation, Curated, Origin, turns};
use espalier_core::trace::{
    AdapterRef, Outcome, Step, StopReason, Totals, Trace, TraceError, Verdict,
};
use serde_json::{Value, json};

use super::edit::form::Form;
use super::list::marks;
use super::source::Found;
use super::{Show, Source, diff};
use crate::context::Context;
use crate::exit::{self, Exit, Problem};
use crate::output::{count, duration, plain};
use crate::render::{BOLD, GREEN, MAGENTA, RED, Style, assistant, section, tool};

/// How to see the whole of a result.
const FULL: &str = " (--full)";

/// Stands where the end of an attempt would.
const BROKE_OFF: &str = "\nthe steps break off here: the attempt has no outcome";

/// Runs the command.
pub async fn run(context: &Context, args: &Show) -> exit::Outcome {
    let source = Source::open(context, &args.place).await?;
    let job = args.job.key(context.project()?);
    let style = Style {
        color: context.out.color,
        lines: (!args.full).then_some(args.lines),
        rest: FULL,
    };
    let (found, has_ended) = match args.attempt {
        None => (source.find(&job).await?, true),
        Some(fence) => {
            let (trace, has_ended) = read_steps(&source.steps(&job, Fence(fence)).await?)?;
            (trace.into(), has_ended)
        }
    };
    let found = if args.raw { found.trace.into() } else { found };
    if args.diff {
        let painted = || diff::painted(&found, style);
        context.out.show(|| diff::to_json(&found), painted)?;
    } else if args.form {
        let turns = turns(&found.trace, &found.log);
        let form = Form::new(&job, &found.curated, &turns).write();
        context.out.show(
            || json!({"job": job, "form": form}),
            || form.trim_end_matches('\n').to_owned(),
        )?;
    } else {
        context.out.show(
            || as_json(&found, has_ended),
            || match has_ended {
                true => render(&found, style),
                false => conversations(&found, style) + BROKE_OFF,
            },
        )?;
    }
    Ok(Exit::Ok)
}

/// What the steps of an attempt add up to, and whether they hold its end.
fn read_steps(lines: &str) -> Result<(Trace, bool), Problem> {
    let refuse = |error: TraceError| Problem::failed(format!("the steps cannot be read: {error}"));
    match Trace::from_lines(lines) {
        Ok(trace) => Ok((trace, true)),
        Err(TraceError::NoOutcome { .. }) => {
            // A trace has an outcome; this one is not shown.
            let end = Step::Outcome(Box::new(Outcome {
                stop: StopReason::UserExit,
                ended_at_us: Timestamp(0),
                final_url: None,
                verdict: None,
                totals: Totals::default(),
            }));
            let trace = Trace::from_lines(&format!("{lines}{}", json!(end)));
            Ok((trace.map_err(refuse)?, false))
        }
        Err(error) => Err(refuse(error)),
    }
}

/// The trace as it was recorded, with the verdict that counts, and beside it what corrections made of it.
fn as_json(found: &Found, has_ended: bool) -> Value {
    let mut value = json!(found.trace);
    if !found.log.is_empty() {
        value["outcome"]["verdict"] = json!(found.curated.verdict);
        value["curation"] = said(&found.curated);
        let conversations = found.curated.conversations.iter();
        value["curation"]["conversations"] = conversations.map(conversation_json).collect();
    }
    if let (false, Some(fields)) = (has_ended, value.as_object_mut()) {
        fields.remove("outcome");
    }
    value
}

fn conversation_json(conversation: &Conversation) -> Value {
    let numbers = conversation.origins.iter().map(|origin| origin.number());
    json!({
        "numbers": numbers.collect::<Vec<_>>(),
        "messages": conversation.messages,
        "tools": conversation.tools,
        "untouched_calls": conversation.untouched_calls,
    })
}

/// What is said of a trace as a whole.
pub fn said(curated: &Curated) -> Value {
    let standing = &curated.standing;
    json!({
        "corrections": curated.patches,
        "judgement": standing.judgement,
        "dropped": standing.dropped,
        "hints": standing.hints.map(|keep| if keep { "keep" } else { "drop" }),
        "labels": standing.labels,
    })
}

fn render(found: &Found, style: Style) -> String {
    let mut text = conversations(found, style);
    text.push_str(&verdict(
        &found.trace,
        found.curated.verdict.as_ref(),
        style,
    ));
    let count = found.log.len();
    if count > 0 {
        let marks = marks(&found.curated.standing);
        let marks = if marks.is_empty() {
            marks
        } else {
            format!("{marks} · ")
        };
        let line = format!("\n{marks}{count} corrections (--diff, --raw)");
        text.push_str(&style.paint(MAGENTA, &line));
    }
    text
}

fn conversations(found: &Found, style: Style) -> String {
    let mut text = head(&found.trace, style);
    let turns = turns(&found.trace, &found.log);
    let all = found.curated.traces(&found.trace);
    for (n, (trace, conversation)) in all.iter().zip(&found.curated.conversations).enumerate() {
        if all.len() > 1 {
            let line = format!("conversation {} of {}", n + 1, all.len());
            let _ = writeln!(text, "\n{}", style.paint(BOLD, &line));
        }
        add_conversation(&mut text, trace, conversation, &turns, style);
    }
    text
}

/// Every message with its number, by which corrections name it.
fn add_conversation(
    text: &mut String,
    trace: &Trace,
    conversation: &Conversation,
    turns: &[usize],
    style: Style,
) {
    let numbered = trace.messages.iter().zip(&conversation.origins);
    for (index, (message, origin)) in numbered.enumerate() {
        text.push('\n');
        let number = origin.number();
        let mark = match origin {
            Origin::Recorded(_) => "",
            Origin::Edited(_) => " · edited",
            Origin::Added(_) => " · added",
        };
        let place = format!(" · message {number}{mark}");
        match message {
            Message::System { content, hint } => {
                let hint = if *hint {
                    "hint (left out of training)"
                } else {
                    "system"
                };
                section(text, style, MAGENTA, &format!("{hint}{place}"), content);
            }
            Message::User { content } => {
                section(text, style, GREEN, &format!("user{place}"), content);
            }
            Message::Assistant {
                content,
                reasoning_content,
                tool_calls,
            } => {
                let turn = turns.iter().position(|turn| *turn == number);
                let who = format!("assistant · turn {}{mark}", turn.map_or(0, |turn| turn + 1));
                let thoughts = reasoning_content.as_deref();
                assistant(text, style, &who, thoughts, content, tool_calls);
            }
            Message::Tool {
                tool_call_id,
                content,
            } => {
                let mut records = trace.tool_calls.iter();
                let record = records.find(|record| record.message == index);
                tool(text, style, &place, tool_call_id, content, record);
            }
        }
    }
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
    for (adapter, calls) in adapters(trace) {
        let digest = adapter.sha256.as_deref().unwrap_or("digest unknown");
        let _ = writeln!(
            text,
            "adapter {} ({}): {calls} of {} calls",
            plain(&adapter.name),
            plain(digest),
            trace.model_calls.len()
        );
    }
    text
}

/// The adapters that answered, in their order, each with how many calls it answered: one that is replaced while the
/// rollout runs is two.
fn adapters(trace: &Trace) -> Vec<(&AdapterRef, usize)> {
    let mut found: Vec<(&AdapterRef, usize)> = Vec::new();
    for adapter in trace
        .model_calls
        .iter()
        .filter_map(|call| call.adapter.as_ref())
    {
        match found.iter_mut().find(|(known, _)| *known == adapter) {
            Some((_, calls)) => *calls += 1,
            None => found.push((adapter, 1)),
        }
    }
    found
}

fn verdict(trace: &Trace, verdict: Option<&Verdict>, style: Style) -> String {
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
    let Some(verdict) = verdict else {
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

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::trace::{CheckResult, ModelCall};
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
        let sampling = draft.check().unwrap().rollout().unwrap().sampling.clone();
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
            rest: FULL,
        };
        let expected = "\
default/b/j
qwen · attempt 1 · 2025-05-29T13:09:00.000000Z · 0 tools

hint (left out of training) · message 0
  look
  well

user · message 1
  price?\u{fffd}[2J

assistant · turn 1
  hm
  → open(url: \"x\")

tool open · message 3
  1
  2
  … 1 more lines (--full)

assistant · turn 2
  5

answered: 2 turns, 1 tool calls (0 errors), 0 tokens in, 0 out, 0 ms
reward 0.000
  ✗ answer 0.00: not 7";
        assert_eq!(render(&trace().into(), style), expected);
    }

    #[test]
    fn adapters_are_named_with_what_they_answered() {
        let style = Style {
            color: false,
            lines: None,
            rest: FULL,
        };
        let mut trace = trace();
        let call = |sha256: &str| ModelCall {
            adapter: Some(AdapterRef {
                name: "tuned".to_owned(),
                sha256: Some(sha256.to_owned()),
            }),
            ..ModelCall::default()
        };
        trace.model_calls = vec![call("aa"), ModelCall::default(), call("bb"), call("aa")];
        let text = render(&trace.into(), style);
        let expected =
            "0 tools\nadapter tuned (aa): 2 of 4 calls\nadapter tuned (bb): 1 of 4 calls\n\n";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn the_steps_of_a_killed_attempt_are_shown_without_an_end() {
        let whole = trace();
        let lines = |steps: &[Step]| -> String {
            steps
                .iter()
                .map(|step| format!("{}\n", json!(step)))
                .collect()
        };
        let mut steps = vec![Step::Header(Box::new(whole.header.clone()))];
        let messages = whole.messages.iter().take(2).cloned();
        steps.extend(messages.map(|message| Step::Message { message }));
        let (killed, has_ended) = read_steps(&lines(&steps)).unwrap();
        assert!(!has_ended && killed.messages.len() == 2, "{killed:?}");
        assert!(as_json(&killed.into(), has_ended).get("outcome").is_none());
        steps.push(Step::Outcome(Box::new(whole.outcome)));
        assert!(read_steps(&lines(&steps)).unwrap().1);
        assert!(read_steps("").is_err());
    }

    #[test]
    fn the_only_escapes_are_our_colours() {
        let style = Style {
            color: true,
            lines: None,
            rest: FULL,
        };
        let text = render(&trace().into(), style);
        assert!(text.contains("\u{1b}[2mhm\u{1b}[0m"));
        assert!(!text.contains("\u{1b}[2J"));
    }
}
