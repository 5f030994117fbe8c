//! `espalier traces import`: the workshop's files become traces of a batch.
//!
//! The batch exists in the store only: its traces are listed, shown and exported like any other, and no queue knows
//! it. Importing a file again into the same batch changes nothing.

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::spec::{JobDraft, PromptDraft, Sampling};
use espalier_core::trace::Trace;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::store::Created;
use espalier_runtime::traces::{Traces, workshop};
use serde_json::json;

use super::{Place, source};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::names;
use crate::output::{note, table};

/// How much of a file's name a job's begins with: the number of a line must fit into an id as well.
const STEM_CHARS_MAX: usize = 100;

/// Options of `traces import`.
#[derive(Args, Clone, Debug)]
pub struct Import {
    /// Files {timestamp, model, messages, tools}; `.jsonl` has one a line
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Name of the batch [default: import- and the time]
    #[arg(long, value_name = "NAME")]
    pub batch: Option<BatchId>,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// What became of one conversation.
struct Imported {
    origin: String,
    result: Result<(JobId, Created, usize), FieldError>,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Import) -> Outcome {
    let project = context.project()?;
    let traces = source::open_store(context, &args.place, &project)
        .await?
        .ok_or_else(|| {
            Problem::refused("traces are imported into an object store, and none is known")
                .fix("name one with --store URL, or start `espalier up`")
        })?;
    let batch = match &args.batch {
        Some(batch) => batch.clone(),
        None => BatchId::new(format!("import-{}", names::stamp(SystemClock.now())))?,
    };
    let sampling = default_sampling()?;
    let mut done = Vec::new();
    for file in &args.files {
        import_file(&traces, &project, &batch, file, &sampling, &mut done).await?;
    }
    report(context, &batch, &done)
}

async fn import_file(
    traces: &Traces,
    project: &ProjectId,
    batch: &BatchId,
    file: &Path,
    sampling: &Sampling,
    done: &mut Vec<Imported>,
) -> Result<(), Problem> {
    for (origin, stem, bytes) in pieces(file)? {
        let read = JobId::new(&stem).and_then(|job| {
            let key = JobKey::new(project.clone(), batch.clone(), job);
            workshop::read(&bytes, key, sampling.clone())
        });
        let result = match read {
            Ok(trace) => Ok(publish(traces, trace).await?),
            Err(error) => Err(error),
        };
        done.push(Imported { origin, result });
    }
    Ok(())
}

async fn publish(traces: &Traces, trace: Trace) -> Result<(JobId, Created, usize), Problem> {
    let (job, messages) = (trace.header.job.job.clone(), trace.messages.len());
    let created = traces.publish(trace, Vec::new(), SystemClock.now()).await?;
    Ok((job, created, messages))
}

/// The conversations of a file: where each stands, a name for its job, its bytes.
fn pieces(file: &Path) -> Result<Vec<(String, String, Vec<u8>)>, Problem> {
    let shown = file.display().to_string();
    let fail = |reason: String| Problem::refused(format!("cannot read {shown}: {reason}"));
    let size = std::fs::metadata(file)
        .map_err(|error| fail(error.to_string()))?
        .len();
    if size > workshop::FILE_BYTES_MAX as u64 {
        return Err(fail(format!(
            "must have at most {} bytes, has {size}",
            workshop::FILE_BYTES_MAX
        )));
    }
    let bytes = std::fs::read(file).map_err(|error| fail(error.to_string()))?;
    let stem = names::of_file(file, STEM_CHARS_MAX, "trace");
    if file.extension().is_none_or(|ext| ext != "jsonl") {
        return Ok(vec![(shown, stem, bytes)]);
    }
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    let lines = lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace));
    Ok(lines
        .map(|(i, line)| {
            (
                format!("{shown}:{}", i + 1),
                format!("{stem}-{:05}", i + 1),
                line.to_vec(),
            )
        })
        .collect())
}

/// What a job without a word about sampling gets: the files do not say how their tokens were drawn.
fn default_sampling() -> Result<Sampling, Problem> {
    let draft = JobDraft {
        prompt: PromptDraft::One("-".to_owned()),
        ..JobDraft::default()
    };
    let spec = draft.check().ok();
    let sampling = spec.and_then(|spec| Some(spec.rollout()?.sampling.clone()));
    sampling.ok_or_else(|| Problem::failed("the default sampling is refused"))
}

fn report(context: &Context, batch: &BatchId, done: &[Imported]) -> Outcome {
    let row_json = |one: &Imported| match &one.result {
        Ok((job, created, messages)) => json!({
            "file": one.origin, "job": job, "new": *created == Created::New, "messages": messages,
        }),
        Err(error) => {
            json!({"file": one.origin, "field": error.field, "value": error.value, "rule": error.rule})
        }
    };
    let row_text = |one: &Imported| match &one.result {
        Ok((job, Created::New, messages)) => [
            job.to_string(),
            messages.to_string(),
            "imported".to_owned(),
            one.origin.clone(),
        ],
        Ok((job, Created::Exists, messages)) => [
            job.to_string(),
            messages.to_string(),
            "was there".to_owned(),
            one.origin.clone(),
        ],
        Err(error) => [
            String::new(),
            String::new(),
            format!("refused: {error}"),
            one.origin.clone(),
        ],
    };
    context.out.show(
        || json!({"batch": batch, "files": done.iter().map(row_json).collect::<Vec<_>>()}),
        || {
            table(
                ["job", "messages", "result", "file"],
                done.iter().map(row_text).collect(),
            )
        },
    )?;
    if done.iter().any(|one| one.result.is_ok()) {
        note(format!("next: espalier traces list {batch}"));
    }
    let refused = done.iter().any(|one| one.result.is_err());
    Ok(if refused { Exit::Refused } else { Exit::Ok })
}
