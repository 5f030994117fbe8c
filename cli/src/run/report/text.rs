//! The report as Markdown: the pipeline's own head, then the comparison's report as it is.

use std::fmt::Write;

use espalier_core::compare::MARKDOWN_FILE;
use espalier_core::compare::markup::{inline, markdown_table};

use super::{Story, file};

/// The report.
pub(super) fn markdown(story: &Story<'_>) -> String {
    let plan = story.plan;
    let mut out = String::new();
    // Writing into a `String` cannot fail.
    let _ = writeln!(out, "# Pipeline {}\n", inline(plan.pipeline.as_str()));
    let _ = writeln!(out, "{}\n", inline(&story.verdict()));
    let sections = [
        ("Rounds", story.rounds_table()),
        ("Steps", story.steps_table()),
        ("Train and serve", story.agreement_table()),
        ("Difficulty of the training tasks", story.difficulty_table()),
    ];
    for (title, table) in sections.iter().filter(|(_, table)| !table.rows.is_empty()) {
        let _ = writeln!(out, "## {title}\n\n{}", markdown_table(table));
    }
    if let Some(why) = &story.unread {
        let _ = writeln!(out, "The comparison cannot be shown: {}\n", inline(why));
    }
    if let Some([tree, counted]) = story.lineage() {
        // No name in it has a line of its own, so that none can end the block.
        let _ = writeln!(out, "## Lineage\n\n{counted}:\n\n```text\n{tree}\n```\n");
    }
    if let Some(said) = story.compared_in() {
        let _ = writeln!(out, "{said}\n");
    }
    if let Some((_, read)) = &story.compared {
        out.push_str(&file(read, MARKDOWN_FILE).unwrap_or_default());
    }
    out
}
