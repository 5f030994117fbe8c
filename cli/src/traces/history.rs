//! `espalier traces log` and `undo`: the corrections of a trace, and taking one back.

use clap::Args;
use espalier_core::trace::edits::{Change, Edit, Patch, live, turns};
use serde_json::json;

use super::pick::{Author, Writer, report};
use super::source::Found;
use super::{Place, Source};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::jobs::JobName;
use crate::output::{cut, note, table};

/// Characters of a reason that a table shows.
const WHY_CHARS_MAX: usize = 60;

/// Options of `traces log`.
#[derive(Args, Clone, Debug)]
pub struct Log {
    /// The job that made it
    #[arg(value_name = "BATCH/JOB")]
    pub job: JobName,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Options of `traces undo`.
#[derive(Args, Clone, Debug)]
pub struct Undo {
    /// The job that made it
    #[arg(value_name = "BATCH/JOB")]
    pub job: JobName,
    /// Number of the correction, also one that took another back [default: the newest that counts]
    #[arg(value_name = "N")]
    pub patch: Option<u32>,
    /// Who, and why.
    #[command(flatten)]
    pub author: Author,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs `traces log`.
pub async fn log(context: &Context, args: &Log) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    if !matches!(source, Source::Store(_)) {
        return Err(
            Problem::refused("corrections are read from the store, not the API")
                .fix("name it with --store URL"),
        );
    }
    let job = args.job.key(context.project()?);
    let found = source.find(&job).await?;
    let live = live(&found.log);
    let entries = || (0_u32..).zip(&found.log).zip(&live);
    let turns = turns(&found.trace, &found.log);
    context.out.show(
        || {
            let entry = |((n, patch), live): ((u32, &Patch), &bool)| {
                let mut value = json!(patch);
                value["patch"] = json!(n);
                value["counts"] = json!(live);
                value
            };
            json!({
                "job": job,
                "log": entries().map(entry).collect::<Vec<_>>(),
                "refused": refused(&found),
            })
        },
        || {
            let row = |((n, patch), live): ((u32, &Patch), &bool)| {
                [
                    n.to_string(),
                    patch.at_us.to_string(),
                    patch.by.clone(),
                    told(&patch.change, &turns),
                    if *live { "" } else { "taken back" }.to_owned(),
                    cut(&patch.why, WHY_CHARS_MAX),
                ]
            };
            let header = ["n", "when", "who", "what", "state", "why"];
            table(header, entries().map(row).collect())
        },
    )?;
    for one in &found.curated.refused {
        note(format!(
            "correction {} does not fit and counts not: {}",
            one.patch, one.error
        ));
    }
    Ok(Exit::Ok)
}

fn refused(found: &Found) -> serde_json::Value {
    let refused = found.curated.refused.iter();
    refused
        .map(|one| json!({"patch": one.patch, "field": one.error.field, "rule": one.error.rule}))
        .collect()
}

/// Runs `traces undo`.
pub async fn undo(context: &Context, args: &Undo) -> Outcome {
    let writer = Writer::open(context, &args.place, &args.author).await?;
    let job = args.job.key(writer.traces.project().clone());
    let loaded = writer.load(&job).await?;
    let patch = match args.patch {
        Some(patch) => patch,
        None => newest(&loaded.log).ok_or_else(|| {
            Problem::refused(format!(
                "no correction of `{}/{}` counts",
                job.batch, job.job
            ))
            .fix("see them with `espalier traces log`")
        })?,
    };
    let joined = usize::try_from(patch)
        .ok()
        .and_then(|n| loaded.log.get(n))
        .and_then(|patch| match &patch.change {
            Change::Join { from, .. } => Some(from.clone()),
            _ => None,
        });
    let (written, _) = writer.write(loaded, Change::Undo { patch }).await?;
    let exit = report(context, &[written])?;
    if let Some(from) = joined {
        note(format!(
            "{0}/{1} was left out when it was merged: espalier traces undrop {0}/{1}",
            from.batch, from.job
        ));
    }
    Ok(exit)
}

/// The newest patch that counts and takes none back.
fn newest(log: &[Patch]) -> Option<u32> {
    let counting = (0_u32..).zip(log).zip(live(log));
    let counting =
        counting.filter(|((_, patch), live)| *live && !matches!(patch.change, Change::Undo { .. }));
    counting.last().map(|((n, _), _)| n)
}

/// What a change says, for people. `turns` are the numbers of the assistant messages.
fn told(change: &Change, turns: &[usize]) -> String {
    match change {
        Change::Verdict { verdict } => format!("reward {:.3} by its checks", verdict.reward),
        Change::Edit { edits } => {
            let edits: Vec<String> = edits.iter().map(|edit| told_edit(edit, turns)).collect();
            cut(&edits.join("; "), 2 * WHY_CHARS_MAX)
        }
        Change::Hints { keep: true } => "keep hints".to_owned(),
        Change::Hints { keep: false } => "leave out hints".to_owned(),
        Change::Label {
            labels,
            judgement,
            reward,
        } => {
            let judgement = judgement.map(|judgement| judgement.as_str().to_owned());
            let reward = reward.map(|reward| format!("reward {reward:.3}"));
            let labels = labels.iter().map(|(key, value)| match value {
                Some(value) => format!("{key}={value}"),
                None => format!("no {key}"),
            });
            let words: Vec<String> = judgement.into_iter().chain(reward).chain(labels).collect();
            words.join(", ")
        }
        Change::Drop => "drop".to_owned(),
        Change::Undrop => "undrop".to_owned(),
        Change::Join { from, messages, .. } => format!(
            "join {} messages of {}/{}",
            messages.len(),
            from.batch,
            from.job
        ),
        Change::Undo { patch } => format!("undo {patch}"),
    }
}

fn told_edit(edit: &Edit, turns: &[usize]) -> String {
    let place = |message: &usize| match turns.iter().position(|turn| turn == message) {
        Some(at) => format!("turn {}", at + 1),
        None => format!("message {message}"),
    };
    match edit {
        Edit::Content { message, .. } => format!("{}: content", place(message)),
        Edit::Reasoning { message, .. } => format!("{}: reasoning", place(message)),
        Edit::Arguments { message, call, .. } => {
            format!("{}: arguments of call {}", place(message), call + 1)
        }
        Edit::Answer { .. } => "add an answer".to_owned(),
        Edit::CutAfter { message } => format!("cut after {}", place(message)),
        Edit::RemoveTurn { message } => format!("remove {}", place(message)),
        Edit::SplitBefore { message } => format!("split before {}", place(message)),
        Edit::Hint { message, hint } => {
            let what = if *hint { "a hint" } else { "no hint" };
            format!("{} is {what}", place(message))
        }
    }
}
