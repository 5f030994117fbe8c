//! `espalier dataset build`: brings files to the store, submits a `curate` job, and says what came of it.

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey};
use espalier_core::spec::{CurateDraft, CurateSpec, JobDraft};
use espalier_dataset::{Filter, FilterError};
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::datasets::Datasets;
use serde_json::json;

use super::{Place, import, show, tally};
use crate::client::Client;
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{facts, note, plain};
use crate::submit::{default_batch, rename};
use crate::waiting::{self, Shown};
use crate::{json as shown, progress, uploads};

/// The only job of its batch.
pub const JOB: &str = "curate";

/// Options of `dataset build`.
#[derive(Args, Clone, Debug)]
pub struct Build {
    /// Batches whose traces are sources
    #[arg(long, value_name = "BATCH", num_args = 1.., required_unless_present_any = ["import", "extend"])]
    pub from: Vec<String>,
    /// Files whose conversations are sources: the workshop's traces, or rows with `messages` and `tools`, as .jsonl, .json
    /// or .parquet
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub import: Vec<PathBuf>,
    /// A version of a data set whose sources come before these
    #[arg(long, value_name = "NAME@vN")]
    pub extend: Option<String>,
    /// Name of the data set whose next version this becomes
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Which conversations are wanted, such as 'reward >= 0.9 and task_kind = booking' [default: all]
    #[arg(long = "where", value_name = "EXPRESSION")]
    pub filter: Option<String>,
    /// How they become rows: per_user_turn, every_assistant or compat [default: per_user_turn]
    #[arg(long, value_name = "MODE")]
    pub unroll: Option<String>,
    /// Leaves hints out of the rows, as is done without a word
    #[arg(long, conflicts_with = "keep_hints")]
    pub drop_hints: bool,
    /// Leaves hints in the rows
    #[arg(long)]
    pub keep_hints: bool,
    /// How like each other two conversations are, from 0.5 to 1, of which one is dropped [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    pub near: Option<f64>,
    /// Keeps near duplicates, on one side of the split
    #[arg(long)]
    pub keep_near: bool,
    /// Most conversations of one task kind
    #[arg(long, value_name = "N")]
    pub max_per_kind: Option<i64>,
    /// Share of the tasks that is held out [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    pub eval_share: Option<f64>,
    /// Of what is drawn [default: 3407]
    #[arg(long, value_name = "N")]
    pub seed: Option<i64>,
    /// Tokens of the longest sample; longer ones are cut at a whole turn [default: 32768]
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<i64>,
    /// The model whose tokenizer its tokens are of: a repository of the Hugging Face hub, s3://…, or the path of a folder
    /// where the worker allows it [default: the tokenizer that all of Qwen3 have]
    #[arg(long, value_name = "MODEL")]
    pub tokenizer: Option<String>,
    /// Name of the batch; the same name again goes on watching it [default: the data set's name and the time]
    #[arg(long, value_name = "NAME")]
    pub batch: Option<String>,
    /// Submits the job and does not wait for it
    #[arg(long)]
    pub detach: bool,
    /// Where data sets are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Build) -> Outcome {
    import::check(&args.import)?;
    let mut draft = draft(args);
    // Files have names of their own once they are uploaded.
    draft.uploads = args
        .import
        .iter()
        .take(1)
        .map(|_| "rows.jsonl".to_owned())
        .collect();
    let spec = check(&draft)?;
    let name = Path::new(spec.dataset.as_str());
    let batch = match &args.batch {
        Some(name) => BatchId::new(name).map_err(|error| Problem::from(rename(error)))?,
        None => default_batch(name, SystemClock.now())?,
    };
    let project = args.place.project(context)?;
    let store = uploads::open_store(context, args.place.store.as_deref()).await?;
    let building = Building {
        context,
        client: context.client().await?,
        datasets: Datasets::new(store.clone(), project.clone()),
        key: JobKey::new(project.clone(), batch, JOB.parse()?),
        spec,
    };
    draft.uploads = import::upload(&store, &project, &args.import).await?;
    building.submit(draft).await?;
    if args.detach {
        return building.detached();
    }
    let job = building.wait().await?;
    building.finish(&job).await
}

fn draft(args: &Build) -> CurateDraft {
    CurateDraft {
        batches: args.from.clone(),
        uploads: Vec::new(),
        extends: args.extend.clone(),
        filter: args.filter.clone(),
        unroll: args.unroll.clone(),
        drop_hints: args.keep_hints.then_some(false),
        near: args.near,
        keep_near: args.keep_near.then_some(true),
        max_per_kind: args.max_per_kind,
        eval_share: args.eval_share,
        seed: args.seed,
        max_length: args.max_length,
        tokenizer: args.tokenizer.clone(),
        dataset: Some(args.name.clone()),
    }
}

/// Every rule is the coordinator's too, but for the language of filters; said here it costs no upload.
fn check(draft: &CurateDraft) -> Result<CurateSpec, Problem> {
    let job = JobDraft {
        curate: Some(draft.clone()),
        ..JobDraft::default()
    };
    let refuse = |errors: Vec<FieldError>| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Problem::refused(errors.join("; "))
    };
    let job = job.check().map_err(refuse)?;
    let spec = job
        .curate()
        .cloned()
        .ok_or_else(|| Problem::failed("the job is no curation"))?;
    let read: Option<Result<Filter, FilterError>> = spec.filter.as_deref().map(str::parse);
    match read {
        Some(Err(error)) => Err(Problem::refused(format!("`--where`: {error}"))
            .fix("see the fields and signs in `espalier dataset build --help`")),
        _ => Ok(spec),
    }
}

/// A data set that is asked for.
struct Building<'a> {
    context: &'a Context,
    client: Client,
    datasets: Datasets,
    key: JobKey,
    spec: CurateSpec,
}

impl Building<'_> {
    /// Repeating it changes nothing.
    async fn submit(&self, draft: CurateDraft) -> Result<(), Problem> {
        let job = JobDraft {
            id: Some(JOB.to_owned()),
            curate: Some(draft),
            ..JobDraft::default()
        };
        uploads::submit_alone(&self.client, &self.key, &job).await
    }

    fn detached(&self) -> Outcome {
        let (batch, job) = (self.key.batch.as_str(), self.key.job.as_str());
        self.context.out.show(
            || json!({"batch": batch, "job": job, "dataset": self.spec.dataset.as_str()}),
            || facts(&[("watch it", format!("espalier job show {batch}/{job}"))]),
        )?;
        Ok(Exit::Ok)
    }

    /// Shows how far the job is until it has ended.
    async fn wait(&self) -> Result<v1::Job, Problem> {
        let bar = progress::things(0, "building");
        let look = || waiting::job(&self.client, &self.key);
        waiting::wait(self.context, bar, look, shown_of).await
    }

    /// Says what came of it.
    async fn finish(&self, job: &v1::Job) -> Outcome {
        if job.state() != v1::JobState::Succeeded {
            let why = job.last_error.as_ref().map_or("", |error| &error.message);
            let state = shown::state(job.state());
            note(format!("error: the curation is {state}: {}", plain(why)));
            return Ok(Exit::Failed);
        }
        let found = self.datasets.of_job(&self.spec.dataset, &self.key).await?;
        let version = found.ok_or_else(|| {
            let message = format!("the version of {} is not in the store", self.key);
            Problem::failed(message).fix("name the coordinator's store with --store URL")
        })?;
        let tally = tally(&self.datasets, &version).await?;
        self.context.out.show(
            || {
                let mut value = show::as_json(&version, &tally);
                value["batch"] = json!(self.key.batch.as_str());
                value
            },
            || show::summary(&version, &tally),
        )?;
        note(format!(
            "next: espalier train --base {base} --dataset {name}@v{n} --name {name}",
            base = self.spec.tokenizer.as_deref().unwrap_or("MODEL"),
            name = version.name,
            n = version.n
        ));
        Ok(Exit::Ok)
    }
}

fn shown_of(job: &v1::Job) -> Shown {
    let shown = waiting::in_words(job);
    match (places(&job.progress), job.state()) {
        (Some((doing, done, of)), v1::JobState::Leased) => Shown {
            place: Some((done, Some(of))),
            message: plain(doing),
            ..shown
        },
        _ => shown,
    }
}

/// `reading 3/9`, as the worker tells it.
pub fn places(progress: &str) -> Option<(&str, u64, u64)> {
    let (doing, places) = progress.rsplit_once(' ')?;
    let (done, of) = places.split_once('/')?;
    Some((doing, done.parse().ok()?, of.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_two_numbers_or_a_word() {
        assert_eq!(places("reading 3/9"), Some(("reading", 3, 9)));
        assert_eq!(places("publishing"), None);
        assert_eq!(places("read a/b c"), None);
    }

    #[test]
    fn a_filter_is_understood_before_anything_is_sent() {
        let of = |filter: &str| {
            check(&CurateDraft {
                batches: vec!["b".to_owned()],
                dataset: Some("d".to_owned()),
                filter: Some(filter.to_owned()),
                ..CurateDraft::default()
            })
        };
        assert!(of("reward >= 0.9").is_ok());
        let error = of("reward >=").unwrap_err();
        assert_eq!(error.exit, Exit::Refused);
        assert!(
            error.message.starts_with("`--where`: the filter must have"),
            "{error}"
        );
    }
}
