//! `espalier train`: a model and a data set become an adapter.
//!
//! The command submits one `train` job and shows how far it is until it ends. It trains nothing itself: that is a train
//! worker's, on this machine (`espalier up`) or elsewhere.

mod plan;

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_core::adapter::{AdapterVersion, Agreement};
use espalier_core::dataset::DatasetVersion;
use espalier_core::error::FieldError;
use espalier_core::id::{AdapterName, BatchId, JobKey, ProjectId};
use espalier_core::layout::{self, UploadName};
use espalier_core::spec::{JobDraft, TrainDraft, TrainSettingsDraft, TrainSpec};
use espalier_core::training::TrainProgress;
use espalier_dataset::Tally;
use espalier_proto::convert::agreement_from_wire;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::datasets::Datasets;
use espalier_runtime::store::{LIST_MAX, Store};
use espalier_train_worker::config::DeviceChoice;
use serde_json::{Value, json};

use crate::client::Client;
use crate::context::Context;
use crate::dataset::{Named, tally};
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, duration, facts, note, plain};
use crate::submit::{default_batch, rename};
use crate::waiting::{self, Shown};
use crate::{json as shown, progress, uploads};

/// The only job of its batch.
pub const JOB: &str = "train";
/// Largest file of rows, in bytes: what one upload takes.
const ROWS_BYTES_MAX: u64 = 1 << 30;
/// Why a training without `--agreement` is not held against serving.
const NOT_ASKED: &str =
    "no batch of rollouts by the base model was named, as `--agreement BATCH` does";

/// Options of `train`.
#[derive(Args, Clone, Debug)]
pub struct Train {
    /// The model to begin with: a repository of the Hugging Face hub, s3://…, or a folder where the worker allows it
    #[arg(long, value_name = "MODEL")]
    pub base: String,
    /// Branch, tag or commit of the hub's repository [default: main]
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
    /// A data set, or one version of it, such as shop@v1; without a version its newest
    #[arg(long, value_name = "NAME[@vN]", required_unless_present = "rows")]
    pub dataset: Option<Named>,
    /// Token rows in place of a data set: {"id":"a","ids":[…],"supervised":[[start,end],…]}, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "dataset")]
    pub rows: Option<PathBuf>,
    /// Token rows that the model is only measured on
    #[arg(long, value_name = "FILE", requires = "rows")]
    pub eval_rows: Option<PathBuf>,
    /// A batch of rollouts by the base model without an adapter: the log-probabilities that were recorded of its sampled tokens
    /// are compared with those that training computes before its first step; may be given several times
    #[arg(long, value_name = "BATCH")]
    pub agreement: Vec<BatchId>,
    /// Settings as TOML [default: the workshop's]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A setting, over those of the file: lr=1e-4, targets=["q_proj","v_proj"]; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Name of the adapter whose next version this becomes
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Name of the batch; the same name again goes on watching it [default: the adapter's name and the time]
    #[arg(long, value_name = "NAME")]
    pub batch: Option<String>,
    /// Shows what would be kept in memory and what a step would take, and trains nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: what it is for: auto (a GPU where this machine has one), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", requires = "plan")]
    pub device: DeviceChoice,
    /// With --plan: operations of matrix products that the machine does in a second, such as 2e12, to tell the time of a step
    /// [default: this machine's CPU is measured]
    #[arg(long, value_name = "FLOPS", requires = "plan")]
    pub peak_flops: Option<f64>,
    /// Submits the job and does not wait for it
    #[arg(long)]
    pub detach: bool,
    /// Project of the token [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME")]
    pub project: Option<ProjectId>,
    /// Object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Train) -> Outcome {
    let mut draft = TrainDraft {
        base: Some(args.base.clone()),
        revision: args.revision.clone(),
        // The newest is looked up once all else is known to be right.
        dataset: args.dataset.as_ref().map(|named| reference(named, 1)),
        // Names of their own once they are uploaded.
        rows: args.rows.is_some().then(|| "rows.jsonl".to_owned()),
        eval_rows: args.eval_rows.is_some().then(|| "rows.jsonl".to_owned()),
        adapter: Some(args.name.clone()),
        agreement: args.agreement.iter().map(ToString::to_string).collect(),
        settings: settings(args)?,
    };
    let spec = check(&draft)?;
    let learned = Learned::find(context, args).await?;
    if args.plan {
        return plan::show(context, args, &spec.settings, learned.as_ref()).await;
    }
    draft.dataset = learned.map(|learned| learned.name());
    let name = Path::new(spec.adapter.as_str());
    let batch = match &args.batch {
        Some(name) => BatchId::new(name).map_err(|error| Problem::from(rename(error)))?,
        None => default_batch(name, SystemClock.now())?,
    };
    let training = Training {
        context,
        client: context.client().await?,
        store: uploads::open_store(context, args.store.as_deref()).await?,
        key: JobKey::new(project(context, args)?, batch, JOB.parse()?),
        adapter: spec.adapter,
    };
    draft.rows = training.upload(args.rows.as_deref()).await?;
    draft.eval_rows = training.upload(args.eval_rows.as_deref()).await?;
    training.submit(draft).await?;
    if args.detach {
        return training.detached();
    }
    let job = training.wait().await?;
    training.finish(&job).await
}

fn project(context: &Context, args: &Train) -> Result<ProjectId, Problem> {
    match &args.project {
        Some(project) => Ok(project.clone()),
        None => context.project(),
    }
}

/// A version of a data set as jobs name it, which is `newest` where none is named.
fn reference(named: &Named, newest: u32) -> String {
    let version = named.version.unwrap_or(newest);
    format!("{}@v{version}", named.name)
}

/// A data set that is learned from.
struct Learned {
    version: DatasetVersion,
    tally: Tally,
}

impl Learned {
    /// The version that is asked for, or the newest; none where rows are.
    async fn find(context: &Context, args: &Train) -> Result<Option<Self>, Problem> {
        let Some(named) = &args.dataset else {
            return Ok(None);
        };
        let store = uploads::open_store(context, args.store.as_deref()).await?;
        let datasets = Datasets::new(store, project(context, args)?);
        let version = datasets.version(&named.name, named.version).await?;
        let tally = tally(&datasets, &version).await?;
        Ok(Some(Self { version, tally }))
    }

    fn name(&self) -> String {
        format!("{}@v{}", self.version.name, self.version.n)
    }
}

/// The settings of the file under those of the command line.
fn settings(args: &Train) -> Result<TrainSettingsDraft, Problem> {
    let file = match &args.config {
        None => TrainSettingsDraft::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                Problem::refused(format!("cannot read {}: {error}", path.display()))
            })?;
            TrainSettingsDraft::parse_toml(&text)?
        }
    };
    Ok(file.overridden(overrides(&args.set)?))
}

/// KEY=VALUE in the form of TOML; a word that is no value of TOML is a text.
fn overrides(set: &[String]) -> Result<TrainSettingsDraft, FieldError> {
    let mut table = toml::Table::new();
    for one in set {
        let (key, value) = one
            .split_once('=')
            .ok_or_else(|| FieldError::new("set", one, "must be KEY=VALUE"))?;
        let read: Result<toml::Table, _> = toml::from_str(&format!("value = {value}"));
        let read = read.ok().and_then(|mut read| read.remove("value"));
        let value = read.unwrap_or_else(|| toml::Value::String(value.to_owned()));
        table.insert(key.trim().to_owned(), value);
    }
    TrainSettingsDraft::parse_toml(&table.to_string())
}

/// Every rule is the coordinator's too; said here it costs no upload.
fn check(draft: &TrainDraft) -> Result<TrainSpec, Problem> {
    let job = JobDraft {
        train: Some(draft.clone()),
        ..JobDraft::default()
    };
    let refuse = |errors: Vec<FieldError>| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Problem::refused(errors.join("; "))
    };
    let job = job.check().map_err(refuse)?;
    job.train()
        .cloned()
        .ok_or_else(|| Problem::failed("the job is no training"))
}

/// A training that is asked for.
struct Training<'a> {
    context: &'a Context,
    client: Client,
    store: Store,
    key: JobKey,
    adapter: AdapterName,
}

impl Training<'_> {
    async fn upload(&self, file: Option<&Path>) -> Result<Option<String>, Problem> {
        let Some(file) = file else { return Ok(None) };
        let path = file.to_owned();
        let read = move || {
            let bytes = std::fs::metadata(&path)?.len();
            if bytes > ROWS_BYTES_MAX {
                let rule = format!("must have at most {ROWS_BYTES_MAX} bytes, has {bytes}");
                return Err(std::io::Error::other(format!("{} {rule}", path.display())));
            }
            std::fs::read(&path)
        };
        let uploaded = uploads::upload(&self.store, &self.key.project, &self.key.batch, read).await;
        Ok(Some(uploaded.map(|name: UploadName| name.to_string())?))
    }

    /// Repeating it changes nothing.
    async fn submit(&self, draft: TrainDraft) -> Result<(), Problem> {
        let job = JobDraft {
            id: Some(JOB.to_owned()),
            train: Some(draft),
            ..JobDraft::default()
        };
        uploads::submit_alone(&self.client, &self.key, &job).await
    }

    fn detached(&self) -> Outcome {
        let (batch, job) = (self.key.batch.as_str(), self.key.job.as_str());
        self.context.out.show(
            || json!({"batch": batch, "job": job, "adapter": self.adapter.as_str()}),
            || facts(&[("watch it", format!("espalier job show {batch}/{job}"))]),
        )?;
        Ok(Exit::Ok)
    }

    /// Shows how far the training is until it has ended.
    async fn wait(&self) -> Result<v1::Job, Problem> {
        let bar = progress::things(0, "training");
        let look = || waiting::job(&self.client, &self.key);
        waiting::wait(self.context, bar, look, shown_of).await
    }

    /// Says what came of it.
    async fn finish(&self, job: &v1::Job) -> Outcome {
        let train = job.summary.as_ref();
        let train = train.and_then(|summary| summary.train.as_ref());
        let (Some(train), v1::JobState::Succeeded) = (train, job.state()) else {
            let why = job.last_error.as_ref().map_or("", |error| &error.message);
            let state = shown::state(job.state());
            note(format!("error: the training is {state}: {}", plain(why)));
            return Ok(Exit::Failed);
        };
        let agreement = train.agreement.as_ref().map(agreement_from_wire);
        let agreement = agreement.unwrap_or_else(|| Agreement::unmeasured(NOT_ASKED));
        if agreement.is_too_far() {
            note("warning: what was served is hardly what was trained, by its log-probabilities");
        }
        let version = version_of(&self.store, &self.key, &self.adapter).await?;
        let name = match &version {
            Some(version) => format!("{}@v{}", self.adapter, version.n),
            None => self.adapter.to_string(),
        };
        let summary = job.summary.as_ref().map(shown::summary);
        self.context.out.show(
            || {
                json!({
                    "batch": self.key.batch.as_str(),
                    "adapter": self.adapter.as_str(),
                    "version": version.as_ref().map(|version| version.n),
                    "manifest": job.manifest,
                    "summary": summary,
                })
            },
            || {
                let held_out = train
                    .eval_loss
                    .map_or("none".to_owned(), |loss| format!("{loss:.4}"));
                facts(&[
                    ("adapter", name),
                    ("steps", count(train.steps)),
                    ("loss", format!("{:.4}", train.loss)),
                    ("held-out loss", held_out),
                    ("computing", duration(train.wall_ms)),
                    ("agreement", agreement.to_string()),
                ])
            },
        )?;
        Ok(Exit::Ok)
    }
}

/// The version that a job became, newest first among those of its name.
pub async fn version_of(
    store: &Store,
    key: &JobKey,
    adapter: &AdapterName,
) -> Result<Option<AdapterVersion>, Problem> {
    let project = &key.project;
    let prefix = layout::adapter_versions(project, adapter);
    let listed = store
        .list(prefix.trim_end_matches('/'), None, LIST_MAX)
        .await?;
    let numbers = listed
        .iter()
        .filter_map(|object| layout::adapter_version_of(project, &object.path));
    let mut numbers: Vec<u32> = numbers.map(|(_, n)| n).collect();
    numbers.sort_unstable();
    for n in numbers.into_iter().rev() {
        let path = layout::adapter_version(project, adapter, n);
        let bytes = store.get(&path).await?;
        if let Ok(record) = AdapterVersion::parse(&bytes, adapter, n)
            && record.job == *key
        {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

fn shown_of(job: &v1::Job) -> Shown {
    let shown = waiting::in_words(job);
    let told = job.progress.parse::<TrainProgress>();
    let event = told.as_ref().map(event).ok();
    let shown = Shown {
        event: event.or(shown.event),
        ..shown
    };
    match (told, job.state()) {
        (Ok(told), v1::JobState::Leased) => Shown {
            place: Some((told.step, Some(told.steps))),
            message: text(&told),
            ..shown
        },
        _ => shown,
    }
}

/// How far it is, beside the bar.
fn text(told: &TrainProgress) -> String {
    let mut text = format!("loss {:.4}", told.loss);
    if let Some(loss) = told.eval_loss {
        text.push_str(&format!(" held-out {loss:.4}"));
    }
    text.push_str(&format!(
        " |g| {:.3} {} tok/s",
        told.grad_norm,
        count(told.tokens_per_s as u64)
    ));
    if let Some(share) = told.peak_share {
        text.push_str(&format!(" {:.0} % of peak", share * 100.0));
    }
    if let Some(left) = told.left_s {
        text.push_str(&format!(" {} left", duration(left * 1000)));
    }
    text
}

fn event(told: &TrainProgress) -> Value {
    json!({
        "step": told.step, "steps": told.steps, "loss": told.loss, "eval_loss": told.eval_loss,
        "grad_norm": told.grad_norm, "tokens_per_s": told.tokens_per_s, "peak_share": told.peak_share,
        "memory_mib": told.memory_mib, "left_s": told.left_s,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_command_line_are_values_of_toml_or_words() {
        let set = [
            "lr=1e-4",
            "schedule=cosine",
            "targets=[\"q_proj\"]",
            "packing=true",
            "rank=8",
        ];
        let draft = overrides(&set.map(str::to_owned)).unwrap();
        assert_eq!((draft.lr, draft.rank), (Some(1e-4), Some(8)));
        assert_eq!(draft.schedule.as_deref(), Some("cosine"));
        assert_eq!(draft.targets, ["q_proj"]);
        let error = overrides(&["rnak=8".to_owned()]).unwrap_err();
        assert_eq!((error.field.as_str(), error.value.as_str()), ("rnak", "8"));
        let error = overrides(&["rank".to_owned()]).unwrap_err();
        assert_eq!(error.rule, "must be KEY=VALUE");
    }

    #[test]
    fn progress_is_told_in_words_and_as_json() {
        let job = |progress: &str| v1::Job {
            progress: progress.to_owned(),
            state: v1::JobState::Leased.into(),
            ..v1::Job::default()
        };
        let told =
            "step 3/9 loss 1.5000 grad 0.2500 tok/s 5200 eval 1.2500 peak 0.43 mem 412 left 95";
        assert_eq!(
            text(&told.parse().unwrap()),
            "loss 1.5000 held-out 1.2500 |g| 0.250 5,200 tok/s 43 % of peak 1 min 35 s left"
        );
        let shown = shown_of(&job(told));
        assert_eq!(shown.event.unwrap()["eval_loss"], 1.25);
        assert_eq!(shown.place, Some((3, Some(9))));
        let shown = shown_of(&job("loading the model"));
        assert_eq!(shown.event.unwrap()["progress"], "loading the model");
        assert_eq!(shown.place, None);
    }
}
