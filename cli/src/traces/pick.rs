//! Which traces a correction is about, who makes it, and what became of each.

use clap::Args;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey};
use espalier_core::trace::edits::{Change, Curated, Patch, check};
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::traces::{Loaded, Traces, TracesError};
use serde_json::{Value, json};

use super::{Filter, Place, Source, source};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::jobs::JobName;
use crate::output::table;

/// Stands for the author where the environment names none.
const NOBODY: &str = "espalier";

/// All traces of a batch that fit.
#[derive(Args, Clone, Debug, Default)]
pub struct Whole {
    /// All of this batch in place of single ones
    #[arg(long, value_name = "BATCH")]
    pub batch: Option<BatchId>,
    /// Which of the batch.
    #[command(flatten)]
    pub filter: Filter,
}

/// Who makes a correction, and why.
#[derive(Args, Clone, Debug, Default)]
pub struct Author {
    /// Why, for whoever reads the log
    #[arg(long = "note", value_name = "TEXT", default_value = "")]
    pub why: String,
    /// Who [default: $USER]
    #[arg(long, value_name = "NAME")]
    pub by: Option<String>,
    /// How many corrections you had seen: where the turn has changed since then, nothing is written
    #[arg(long, value_name = "N")]
    pub seen: Option<u32>,
}

/// What became of one trace.
#[derive(Clone, Debug, PartialEq)]
pub enum Written {
    /// A correction was added under this number.
    Added {
        /// The trace.
        job: JobKey,
        /// The number.
        patch: u32,
        /// What kind it is of.
        kind: &'static str,
    },
    /// It is like that already.
    Same(JobKey),
    /// It does not fit.
    Refused(JobKey, FieldError),
}

/// Adds corrections under one name.
pub struct Writer {
    /// Where traces are.
    pub traces: Traces,
    author: Author,
    by: String,
}

impl Writer {
    /// Opens the store.
    pub async fn open(context: &Context, place: &Place, author: &Author) -> Result<Self, Problem> {
        let user = context.environment.get("USER").cloned();
        let user = user.filter(|name| !name.is_empty());
        Ok(Self {
            traces: source::writable(context, place).await?,
            author: author.clone(),
            by: author.by.clone().or(user).unwrap_or(NOBODY.to_owned()),
        })
    }

    /// What it writes was decided when there were so many corrections, unless the command line says another number.
    pub fn has_seen(&mut self, patches: u32) {
        self.author.seen.get_or_insert(patches);
    }

    /// The traces that are meant: those that are named, or those of the batch.
    pub async fn choose(&self, jobs: &[JobName], whole: &Whole) -> Result<Vec<JobKey>, Problem> {
        let project = self.traces.project();
        match &whole.batch {
            Some(_) if !jobs.is_empty() => Err(Problem::refused(
                "traces must be named one by one or by --batch, and both are given",
            )),
            Some(batch) => {
                let source = Source::Store(self.traces.clone());
                let entries = source.choose(batch, &whole.filter).await?;
                Ok(entries.into_iter().map(|entry| entry.job).collect())
            }
            None if jobs.is_empty() => {
                Err(Problem::refused("no trace is named").fix("name it as BATCH/JOB, or --batch"))
            }
            None if whole.filter != Filter::default() => Err(Problem::refused(
                "--min-reward, --kind and the like choose from a batch, and --batch is not given",
            )),
            None => Ok(jobs.iter().map(|job| job.key(project.clone())).collect()),
        }
    }

    /// The trace of `job` with all of its corrections.
    pub async fn load(&self, job: &JobKey) -> Result<Loaded, Problem> {
        source::load(&self.traces, job).await
    }

    /// The correction that `change` would be.
    pub fn patch(&self, loaded: &Loaded, change: Change) -> Patch {
        let seen = self.author.seen.unwrap_or(loaded.curated.patches);
        Patch::new(change, self.by.as_str(), SystemClock.now(), seen)
            .because(self.author.why.as_str())
    }

    /// Adds a correction, unless all is like that already.
    pub async fn write(
        &self,
        loaded: Loaded,
        change: Change,
    ) -> Result<(Written, Option<Loaded>), Problem> {
        let job = loaded.trace.header.job.clone();
        let (kind, is_undo) = (change.kind(), matches!(change, Change::Undo { .. }));
        let patch = self.patch(&loaded, change);
        let checked = check(&loaded.trace, &loaded.log, &patch);
        if checked.is_ok_and(|new| !is_undo && is_same(&new, &loaded.curated)) {
            return Ok((Written::Same(job), Some(loaded)));
        }
        match self.traces.patch(loaded, patch).await {
            Ok((patch, loaded)) => Ok((Written::Added { job, patch, kind }, Some(loaded))),
            Err(TracesError::Refused { source, .. }) => Ok((Written::Refused(job, source), None)),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_same(new: &Curated, old: &Curated) -> bool {
    new.conversations == old.conversations && new.standing == old.standing
}

/// Says what became of each trace.
pub fn report(context: &Context, written: &[Written]) -> Outcome {
    // The only trace that was named is refused: that is the whole story.
    if let [Written::Refused(job, error)] = written {
        let look = format!("{}/{}", job.batch, job.job);
        let fix = format!("look at it with `espalier traces show {look}` and `… log {look}`");
        return Err(Problem::from(error.clone()).fix(fix));
    }
    let count = |is: fn(&Written) -> bool| written.iter().filter(|one| is(one)).count();
    let refused = count(|one| matches!(one, Written::Refused(..)));
    context.out.show(
        || {
            json!({
                "traces": written.iter().map(to_json).collect::<Vec<_>>(),
                "written": count(|one| matches!(one, Written::Added { .. })),
                "unchanged": count(|one| matches!(one, Written::Same(_))),
                "refused": refused,
            })
        },
        || {
            table(
                ["job", "correction", "result"],
                written.iter().map(to_row).collect(),
            )
        },
    )?;
    Ok(if refused > 0 { Exit::Refused } else { Exit::Ok })
}

fn to_json(written: &Written) -> Value {
    match written {
        Written::Added { job, patch, kind } => json!({"job": job, "patch": patch, "kind": kind}),
        Written::Same(job) => json!({"job": job, "patch": null}),
        Written::Refused(job, error) => {
            json!({"job": job, "field": error.field, "value": error.value, "rule": error.rule})
        }
    }
}

fn to_row(written: &Written) -> [String; 3] {
    let name = |job: &JobKey| format!("{}/{}", job.batch, job.job);
    match written {
        Written::Added { job, patch, kind } => {
            [name(job), patch.to_string(), format!("{kind} written")]
        }
        Written::Same(job) => [name(job), String::new(), "nothing to change".to_owned()],
        Written::Refused(job, error) => [name(job), String::new(), format!("refused: {error}")],
    }
}
