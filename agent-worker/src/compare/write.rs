//! The report as Markdown. What others said is made harmless: see [`markup`](espalier_core::compare::markup).

use std::fmt::Write;

use espalier_core::compare::markup::{inline, markdown_table};
use espalier_core::compare::words::{self, Table};
use espalier_core::compare::{Both, Report, Side};

use super::talk::Talk;

/// Sources that the text lists; all of them are in `report.json`.
const SOURCES_SHOWN_MAX: usize = 20;

/// The report as Markdown.
pub(super) fn markdown(report: &Report, talks: &[Both<Talk>]) -> String {
    let mut out = String::new();
    let (before, after) = (&report.arms.before.label, &report.arms.after.label);
    // Writing into a `String` cannot fail.
    let _ = writeln!(out, "# {} and {}\n", inline(before), inline(after));
    let _ = writeln!(out, "{}\n", inline(&headline(report)));
    let _ = writeln!(out, "{}\n", inline(&gate_words(report)));
    section(&mut out, "Success", &words::success(report));
    let _ = writeln!(out, "{}\n", inline(&report.method));
    section(&mut out, "Effort", &words::effort(report));
    let samples = report.comparison.difficulty.samples;
    let title = format!("Difficulty: solved how often of {samples} samples");
    section(&mut out, &title, &words::difficulty(report));
    let left_out = words::left_out(report);
    if !left_out.rows.is_empty() {
        section(&mut out, "Left out", &left_out);
    }
    section(&mut out, "Traces side by side", &shown(report, talks));
    section(&mut out, "Arms", &arms(report));
    lineage(&mut out, report);
    out
}

/// What came of it, in a sentence.
pub(super) fn headline(report: &Report) -> String {
    let group = &report.comparison.pooled;
    format!(
        "Over {} tasks and {} pairs of rollouts, {} solves {} and {} {}: a difference of {} points.",
        group.tasks,
        group.pairs,
        report.arms.before.label,
        words::percent(&group.success.before),
        report.arms.after.label,
        words::percent(&group.success.after),
        words::points(&group.difference),
    )
}

/// What the gate says, in a sentence.
pub(super) fn gate_words(report: &Report) -> String {
    let what = match report.gate.passed {
        true => "The gate passes",
        false => "The gate does not pass",
    };
    format!("{what}: {}.", report.gate.words)
}

/// How each arm came about.
pub(super) fn arms(report: &Report) -> Table {
    let row = |name: &str, of: &dyn Fn(Side) -> String| {
        vec![name.to_owned(), of(Side::Before), of(Side::After)]
    };
    let arm = |side| report.arms.at(side);
    let prices = |side| match arm(side).prices {
        Some(prices) => format!(
            "{} and {} {} for a million prompt and completion tokens",
            prices.prompt, prices.completion, report.currency
        ),
        None => String::new(),
    };
    let rollouts = |side| match (arm(side).rollouts, arm(side).replayed) {
        (all, 0) => all.to_string(),
        (all, replayed) => format!("{all}, {replayed} of them with recorded tools"),
    };
    Table {
        header: vec![
            String::new(),
            arm(Side::Before).label.clone(),
            arm(Side::After).label.clone(),
        ],
        rows: vec![
            row("models", &|side| arm(side).models.join(", ")),
            row("adapter", &|side| {
                arm(side).adapter.clone().unwrap_or_default()
            }),
            row("adapters that answered", &|side| {
                arm(side).adapters.join(", ")
            }),
            row("batches", &|side| arm(side).batches.join(", ")),
            row("rollouts", &rollouts),
            row("prices", &prices),
        ],
    }
}

/// One row a pair.
fn shown(report: &Report, talks: &[Both<Talk>]) -> Table {
    let mut rows = Vec::new();
    for (pair, talk) in report.shown.iter().zip(talks) {
        let side = |side| {
            let talk = talk.at(side);
            let why = match talk.reason.is_empty() {
                true => String::new(),
                false => format!(" ({})", talk.reason),
            };
            format!("{}{why}: {}", outcome(*pair.solved.at(side)), talk.answer)
        };
        rows.push(vec![
            format!("{} s{}", pair.task, pair.sample),
            side(Side::Before),
            side(Side::After),
        ]);
    }
    let (before, after) = (&report.arms.before.label, &report.arms.after.label);
    Table {
        header: vec!["task".to_owned(), before.clone(), after.clone()],
        rows,
    }
}

pub(super) fn outcome(solved: bool) -> &'static str {
    if solved { "solved" } else { "failed" }
}

fn lineage(out: &mut String, report: &Report) {
    let count = report.sources.len();
    let _ = writeln!(
        out,
        "## Lineage\n\nMade by {} of {count} traces, whose digests have the digest `{}`; `report.json` names each.\n",
        inline(&report.job),
        report.sources_sha256
    );
    for source in report.sources.iter().take(SOURCES_SHOWN_MAX) {
        let _ = writeln!(out, "- {} {}", inline(&source.sha256), inline(&source.path));
    }
    if count > SOURCES_SHOWN_MAX {
        let _ = writeln!(out, "- … and {} more", count - SOURCES_SHOWN_MAX);
    }
}

fn section(out: &mut String, title: &str, table: &Table) {
    let _ = writeln!(out, "## {title}\n\n{}", markdown_table(table));
}

#[cfg(test)]
mod tests {
    use super::super::page::tests::report;
    use super::super::talk::tests::talk;
    use super::*;

    #[test]
    fn markdown_says_what_came_of_it() {
        let talks = [Both {
            before: talk("no idea"),
            after: talk("forty-two"),
        }];
        let text = markdown(&report(), &talks);
        for part in [
            "# base and shop@v2\n",
            "| toy | 2 | 2 | 50.0 % (",
            "The gate does not pass: 2 tasks were tried by both arms",
            "failed (no idea): no idea | solved (forty-two): forty-two |",
            "## Lineage",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn nothing_that_was_said_means_anything_in_markdown() {
        let said = "a | b\n# c <script>";
        let talks = [Both {
            before: talk(said),
            after: talk(said),
        }];
        let text = markdown(&report(), &talks);
        assert!(!text.contains("<script") && text.contains("a \\| b \\# c"));
    }
}
