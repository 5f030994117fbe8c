//! `espalier submit`: a file of jobs becomes a batch.
//!
//! The file is read on a thread of its own, chunk by chunk; a few chunks are on their way at once, and each is sent
//! again, which is harmless, while the coordinator does not answer.

pub mod file;
pub mod lines;
mod send;
pub mod suggest;
pub mod vars;

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_core::error::FieldError;
use espalier_core::id::BatchId;
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::names;
use crate::output::{count, cut, duration, facts, note, table};
use crate::watch;
use file::{Additions, JobFile, Refusal};
pub use send::{Sent, again, close_batch, open, send};

/// Refusals that are shown to a person; `--json` has all of them.
const REFUSALS_SHOWN_MAX: usize = 20;
/// How much of a file's name a batch's begins with: the time and what jobs add must fit into an id as well.
const STEM_CHARS_MAX: usize = 64;

/// Options of `submit`.
#[derive(Args, Clone, Debug)]
pub struct Submit {
    /// Jobs: JSONL with one job a line, or TOML with [defaults] and [[jobs]]
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name of the batch; the same name again adds to it or repeats it [default: the file's name and the time]
    #[arg(long, value_name = "NAME")]
    pub batch: Option<String>,
    /// What ${KEY} stands for in the jobs' texts; may be given several times
    #[arg(long = "var", value_name = "KEY=VALUE", value_parser = pair)]
    pub vars: Vec<(String, String)>,
    /// Makes K jobs of each task, with ids that end in .s0, .s1, …, compared as one group
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub samples: Option<u32>,
    /// Label on each job, for filters and cancels; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub labels: Vec<(String, String)>,
    /// Shows progress until the batch is done, as `espalier watch` does
    #[arg(long)]
    pub watch: bool,
    /// Leaves the batch open for further submissions under the same name
    #[arg(long, conflicts_with = "watch")]
    pub keep_open: bool,
}

/// KEY=VALUE.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("must have the form KEY=VALUE".to_owned()),
    }
}

/// Runs the command.
pub async fn run(context: &Context, args: &Submit) -> Outcome {
    let batch = match &args.batch {
        Some(name) => BatchId::new(name).map_err(|error| Problem::from(rename(error)))?,
        None => default_batch(&args.file, SystemClock.now())?,
    };
    let additions = Additions {
        vars: args.vars.iter().cloned().collect(),
        samples: args.samples,
        labels: args.labels.iter().cloned().collect(),
    };
    let file = JobFile::open(&args.file, additions)?;
    let client = context.client().await?;
    let sent = send(&client, &batch, file, !args.keep_open).await?;
    report(context, &batch, &sent)?;
    let exit = if sent.refused == 0 {
        Exit::Ok
    } else {
        Exit::Refused
    };
    if args.watch && sent.accepted > 0 {
        return Ok(watch::follow(context, &client, batch.as_str())
            .await?
            .max(exit));
    }
    Ok(exit)
}

/// The rule of names, said of the option.
pub fn rename(error: FieldError) -> FieldError {
    FieldError {
        field: "--batch".to_owned(),
        ..error
    }
}

/// `{file name}-{yyyymmdd-hhmmss}`, made of what a name may hold.
pub fn default_batch(file: &Path, now: Timestamp) -> Result<BatchId, FieldError> {
    let stem = names::of_file(file, STEM_CHARS_MAX, "batch");
    BatchId::new(format!("{stem}-{}", names::stamp(now)))
}

fn report(context: &Context, batch: &BatchId, sent: &Sent) -> Result<(), Problem> {
    if context.out.json {
        let refusals: Vec<Value> = sent.refusals.iter().map(refusal_json).collect();
        return Ok(context.out.event(&json!({
            "batch": batch.as_str(),
            "accepted": sent.accepted,
            "refused": sent.refused,
            "chunks": sent.chunks,
            "elapsed_ms": sent.elapsed_ms,
            "refusals": refusals,
        }))?);
    }
    if !sent.refusals.is_empty() {
        note(refusal_table(&sent.refusals));
    }
    context.out.line(facts(&[
        ("batch", batch.to_string()),
        ("accepted", count(sent.accepted)),
        ("refused", count(sent.refused)),
        ("took", duration(sent.elapsed_ms)),
    ]))?;
    if sent.accepted > 0 {
        note(format!("next: espalier watch {batch}"));
    }
    Ok(())
}

/// A refusal for programs.
pub fn refusal_json(refusal: &Refusal) -> Value {
    json!({
        "place": refusal.place,
        "id": refusal.id,
        "field": refusal.error.field,
        "value": refusal.error.value,
        "rule": refusal.error.rule,
    })
}

/// Refusals for people.
pub fn refusal_table(refusals: &[Refusal]) -> String {
    let row = |refusal: &Refusal| {
        [
            refusal.place.to_string(),
            refusal.id.clone(),
            refusal.error.field.clone(),
            cut(&refusal.error.value, 40),
            refusal.error.rule.clone(),
        ]
    };
    let rows = refusals.iter().take(REFUSALS_SHOWN_MAX).map(row).collect();
    let mut text = format!(
        "refused:\n{}",
        table(["line", "id", "field", "value", "rule"], rows)
    );
    if refusals.len() > REFUSALS_SHOWN_MAX {
        let more = refusals.len() - REFUSALS_SHOWN_MAX;
        text.push_str(&format!(
            "\n … and {} more; --json shows all",
            count(more as u64)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_named_after_its_file() {
        let now = Timestamp::from_ms(1_700_000_000_000);
        let named = |file: &str| default_batch(Path::new(file), now).unwrap().to_string();
        assert_eq!(named("/a/tasks.jsonl"), "tasks-20231114-221320");
        assert_eq!(named("my tasks ä.jsonl"), "my-tasks---20231114-221320");
        assert_eq!(named("-.toml"), "batch-20231114-221320");
    }

    #[test]
    fn pairs_have_a_key() {
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(pair("=b").is_err());
        assert!(pair("ab").is_err());
    }

    #[test]
    fn golden_refusals() {
        let refusal = Refusal {
            place: 3,
            id: "a".to_owned(),
            error: FieldError::new("promt", "x", "is no known key; did you mean `prompt`?"),
        };
        assert_eq!(
            refusal_table(&[refusal]),
            "refused:\n LINE  ID  FIELD  VALUE  RULE\n 3     a   promt  x      is no known key; did you mean `prompt`?"
        );
    }
}
