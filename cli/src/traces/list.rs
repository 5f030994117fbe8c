//! `espalier traces list`.

use clap::Args;
use espalier_core::id::BatchId;
use espalier_core::trace::edits::{Judgement, Standing};
use serde_json::{Value, json};

use super::source::Entry;
use super::{Filter, Place, Source};
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{count, cut, duration, note, table};

/// Options of `traces list`.
#[derive(Args, Clone, Debug)]
pub struct List {
    /// Only of this batch
    #[arg(value_name = "BATCH")]
    pub batch: Option<BatchId>,
    /// Which traces.
    #[command(flatten)]
    pub filter: Filter,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub limit: usize,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, args: &List) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    let mut entries = source.list(args.batch.as_ref()).await?;
    entries.retain(|entry| args.filter.admits(entry));
    let found = entries.len();
    entries.truncate(args.limit);
    context.out.show(
        || json!({"traces": entries.iter().map(entry_json).collect::<Vec<_>>(), "found": found}),
        || entries_table(&entries),
    )?;
    if found > entries.len() && !context.out.json {
        note(format!(
            "{} of {}; --limit shows more",
            entries.len(),
            count(found as u64)
        ));
    }
    Ok(Exit::Ok)
}

fn entry_json(entry: &Entry) -> Value {
    json!({
        "job": entry.job,
        "published_at_us": entry.published,
        "corrected": entry.patches > 0,
        "corrections": entry.patches,
        "judgement": entry.standing.judgement,
        "dropped": entry.standing.dropped,
        "labels": entry.standing.labels,
        "summary": entry.summary,
    })
}

fn entries_table(entries: &[Entry]) -> String {
    let rows = entries.iter().map(|entry| {
        let summary = &entry.summary;
        let reward = summary
            .reward
            .map(|reward| format!("{reward:.2}"))
            .unwrap_or_default();
        let mark = if entry.patches > 0 { "*" } else { "" };
        let tokens = summary.totals.prompt_tokens + summary.totals.completion_tokens;
        [
            format!("{}/{}", entry.job.batch, entry.job.job),
            format!("{reward}{mark}"),
            marks(&entry.standing),
            summary.task_kind.clone(),
            summary.stop.as_str().to_owned(),
            summary.totals.turns.to_string(),
            summary.totals.tool_calls.to_string(),
            count(tokens),
            duration(summary.totals.wall_ms),
            cut(&summary.reason, 48),
        ]
    });
    let header = [
        "job",
        "reward",
        "marks",
        "task kind",
        "stopped",
        "turns",
        "tool calls",
        "tokens",
        "took",
        "because",
    ];
    table(header, rows.collect())
}

/// What people said of a trace as a whole, in words.
pub fn marks(standing: &Standing) -> String {
    let judgement = standing.judgement.map(Judgement::as_str);
    let dropped = standing.dropped.then_some("dropped");
    let words: Vec<&str> = judgement.into_iter().chain(dropped).collect();
    words.join(", ")
}
