//! `espalier traces show --diff`: what corrections have changed, as a unified difference of what a person reads.

use std::fmt::Write;

use espalier_core::trace::edits::{Curated, apply, turns};
use serde_json::{Value, json};
use similar::{Algorithm, TextDiff};

use super::edit::form::Form;
use super::list::marks;
use super::show::said;
use super::source::Found;
use crate::output::plain;
use crate::render::{BLUE, GREEN, RED, Style};

/// Lines around a change that stay in sight.
const CONTEXT_LINES: usize = 3;

/// The difference; empty where nothing that is shown was changed.
pub fn unified(found: &Found) -> String {
    let recorded = text(found, &apply(&found.trace, &[]));
    let now = text(found, &found.curated);
    let mut config = TextDiff::configure();
    let diff = config
        .algorithm(Algorithm::Myers)
        .diff_lines(&recorded, &now);
    let count = found.log.len();
    let name = match count {
        1 => "after 1 correction".to_owned(),
        count => format!("after {count} corrections"),
    };
    let mut unified = diff.unified_diff();
    unified
        .context_radius(CONTEXT_LINES)
        .header("recorded", &name)
        .to_string()
}

/// The same for a terminal.
pub fn painted(found: &Found, style: Style) -> String {
    let unified = unified(found);
    if unified.is_empty() {
        return "nothing was changed".to_owned();
    }
    let paint = |line: &str| {
        let line = plain(line);
        match line.as_bytes().first() {
            Some(b'+') => style.paint(GREEN, &line),
            Some(b'-') => style.paint(RED, &line),
            Some(b'@') => style.paint(BLUE, &line),
            _ => line,
        }
    };
    let lines: Vec<String> = unified.trim_end().lines().map(paint).collect();
    lines.join("\n")
}

/// The same for programs.
pub fn to_json(found: &Found) -> Value {
    json!({
        "job": found.trace.header.job,
        "diff": unified(found),
        "curation": said(&found.curated),
    })
}

/// What is said of the trace as a whole, then the conversation.
fn text(found: &Found, curated: &Curated) -> String {
    let mut text = "=== trace\n".to_owned();
    let reward = curated.reward().map(|reward| format!("reward {reward:.3}"));
    let hints = curated.standing.hints.map(|keep| match keep {
        true => "hints kept".to_owned(),
        false => "hints left out".to_owned(),
    });
    let marks = Some(marks(&curated.standing)).filter(|marks| !marks.is_empty());
    for line in reward.into_iter().chain(marks).chain(hints) {
        let _ = writeln!(text, "  {line}");
    }
    for (key, value) in curated.standing.labels_over(&found.trace.header.labels) {
        let _ = writeln!(text, "  {key}={value}");
    }
    let turns = turns(&found.trace, &found.log);
    let form = Form::new(&found.trace.header.job, curated, &turns).write();
    // The first line names the log, which is no change of what is read.
    text + form.split_once('\n').map_or("", |(_, rest)| rest)
}
