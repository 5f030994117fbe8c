//! `espalier evaluate`: two models try the same tasks, and a report says what differs.
//!
//! The command is expanded: each task becomes rollouts of both models, and a `compare` job that waits for them, all in one
//! batch. Nothing is compared here; that is an agent worker's.

mod recorded;
pub mod show;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::spec::{
    AdapterRef, CompareArmDraft, CompareDraft, JobDraft, SamplingDraft, limits,
};
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::store::Store;
use serde_json::{Value, json};

use crate::client::Client;
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::expand::{ARM_LABEL, Arm, Expanded, Plan, chunks};
use crate::output::{count, facts, note, plain};
use crate::submit::file::Refusal;
use crate::submit::{
    again, close_batch, default_batch, open, pair, refusal_json, refusal_table, rename,
};
use crate::waiting;
use crate::{json as shown, uploads, watch};
use show::Read;

/// The job that compares.
pub const JOB: &str = "compare";
/// What ids of rollouts begin with: those of the model before and after.
const ARMS: [&str; 2] = ["a", "b"];

/// Options of `evaluate`.
#[derive(Args, Clone, Debug)]
pub struct Evaluate {
    /// A model or adapter by the name under which it is served: first the one before, then the one after
    #[arg(long = "model", value_name = "NAME", required = true)]
    pub models: Vec<String>,
    /// Tasks, in the form of `espalier submit`: JSONL with one a line, or TOML with [defaults] and [[jobs]]
    #[arg(long, value_name = "FILE")]
    pub tasks: PathBuf,
    /// Scores without servers, by the rollouts of --from
    #[arg(long, value_enum, value_name = "HOW", requires = "from")]
    pub replay: Option<Replay>,
    /// Batch whose rollouts are the recordings of --replay; may be given several times
    #[arg(long = "from", value_name = "BATCH", requires = "replay")]
    pub from: Vec<BatchId>,
    /// Rollouts of each task and model
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub samples: u32,
    /// Only tasks of this split, such as eval [default: all]
    #[arg(long, value_name = "NAME")]
    pub split: Option<String>,
    /// Leaves the hints of tasks in
    #[arg(long, overrides_with = "no_hints")]
    pub hints: bool,
    /// Leaves the hints of tasks out, as is done without a word
    #[arg(long, overrides_with = "hints")]
    pub no_hints: bool,
    /// Seed of tasks that bring none; both models draw alike
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// What ${KEY} stands for in the tasks' texts; may be given several times
    #[arg(long = "var", value_name = "KEY=VALUE", value_parser = pair)]
    pub vars: Vec<(String, String)>,
    /// What reports call a model: given twice, in the order of the models [default: their names]
    #[arg(long = "label", value_name = "TEXT")]
    pub labels: Vec<String>,
    /// The version of an adapter that the second model stands for, for the lineage
    #[arg(long, value_name = "NAME@vN")]
    pub adapter: Option<AdapterRef>,
    /// `train` job whose losses the report plots; may be given several times
    #[arg(long = "training", value_name = "BATCH/JOB")]
    pub trainings: Vec<String>,
    /// What a million prompt and completion tokens cost: for both models, or given twice
    #[arg(long = "price", value_name = "PROMPT,COMPLETION", value_parser = price)]
    pub prices: Vec<(f64, f64)>,
    /// What prices are in [default: USD]
    #[arg(long, value_name = "NAME")]
    pub currency: Option<String>,
    /// The lower end of the difference that the gate asks for [default: -0.02]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub min_difference: Option<f64>,
    /// Tasks that the gate asks for [default: 30]
    #[arg(long, value_name = "N")]
    pub min_tasks: Option<i64>,
    /// Pairs of traces that the report shows side by side [default: 10]
    #[arg(long, value_name = "N")]
    pub traces: Option<i64>,
    /// Ends with exit code 1 where the gate does not pass
    #[arg(long, conflicts_with = "detach")]
    pub gate: bool,
    /// Folder of this machine that gets report.json, report.md and report.html
    #[arg(long, value_name = "DIR", conflicts_with = "detach")]
    pub out: Option<PathBuf>,
    /// Name of the batch; the same name again goes on watching it [default: the file's name and the time]
    #[arg(long, value_name = "NAME")]
    pub batch: Option<String>,
    /// Submits the jobs and does not wait for them
    #[arg(long)]
    pub detach: bool,
    /// Project of the token [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME")]
    pub project: Option<ProjectId>,
    /// Object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// What is done without servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Replay {
    /// Rolls the tasks out: recorded answers stand in for the servers, and a call that was never recorded ends a rollout
    Recorded,
}

/// PROMPT,COMPLETION.
fn price(text: &str) -> Result<(f64, f64), String> {
    let read = |text: &str| text.trim().parse::<f64>().ok();
    let read = text
        .split_once(',')
        .and_then(|(prompt, completion)| read(prompt).zip(read(completion)));
    read.ok_or_else(|| "must be two numbers, such as 0.5,1.5".to_owned())
}

/// Runs the command.
pub async fn run(context: &Context, args: &Evaluate) -> Outcome {
    let models = two_models(args)?;
    let batch = match &args.batch {
        Some(name) => BatchId::new(name).map_err(|error| Problem::from(rename(error)))?,
        None => default_batch(&args.tasks, SystemClock.now())?,
    };
    let draft = compare_draft(args, &models, &batch);
    check(&draft)?;
    let mut tasks = read_tasks(args, models)?;
    let project = match &args.project {
        Some(project) => project.clone(),
        None => context.project()?,
    };
    let evaluation = Evaluation {
        context,
        client: context.client().await?,
        store: uploads::open_store(context, args.store.as_deref()).await?,
        key: JobKey::new(project, batch, JOB.parse()?),
    };
    if args.replay.is_some() {
        let found = recorded::find(&evaluation.store, &evaluation.key.project, &args.from).await?;
        recorded::name(&mut tasks, &found, &args.from);
        check_count(args, &tasks)?;
    }
    let submitted = evaluation.submit(tasks, draft).await?;
    evaluation.tell_submitted(&submitted, args.detach)?;
    let exit = match submitted.refusals.is_empty() {
        true => Exit::Ok,
        false => Exit::Refused,
    };
    if args.detach {
        return Ok(exit);
    }
    let followed =
        watch::follow(context, &evaluation.client, evaluation.key.batch.as_str()).await?;
    let ended = evaluation.finish(args, &submitted).await?;
    Ok(exit.max(followed).max(ended))
}

fn two_models(args: &Evaluate) -> Result<[String; 2], Problem> {
    let [before, after] = &args.models[..] else {
        let message = format!("`--model` must be given twice, got {}", args.models.len());
        return Err(Problem::refused(message).fix("name the model before, then the model after"));
    };
    for (name, given) in [("label", args.labels.len()), ("price", args.prices.len())] {
        let once_is_fine = name == "price";
        if given > 2 || (given == 1 && !once_is_fine) {
            let message = format!("`--{name}` must be given once for each model, got {given}");
            return Err(Problem::refused(message));
        }
    }
    Ok([before.clone(), after.clone()])
}

/// The job that compares; two arms of one model need labels.
fn compare_draft(args: &Evaluate, models: &[String; 2], batch: &BatchId) -> CompareDraft {
    let arm = |n: usize| {
        let price = args.prices.get(n).or(args.prices.first()).copied();
        CompareArmDraft {
            label: args.labels.get(n).cloned(),
            model: Some(models[n].clone()),
            adapter: match n {
                1 => args.adapter.as_ref().map(ToString::to_string),
                _ => None,
            },
            batches: vec![batch.to_string()],
            labels: [(ARM_LABEL.to_owned(), ARMS[n].to_owned())].into(),
            filter: None,
            prompt_price: price.map(|(prompt, _)| prompt),
            completion_price: price.map(|(_, completion)| completion),
        }
    };
    CompareDraft {
        arms: vec![arm(0), arm(1)],
        trainings: args.trainings.clone(),
        traces: args.traces,
        currency: args.currency.clone(),
        min_difference: args.min_difference,
        min_tasks: args.min_tasks,
    }
}

/// Every rule is the coordinator's too; said here it costs no rollout.
fn check(draft: &CompareDraft) -> Result<(), Problem> {
    let job = JobDraft {
        compare: Some(draft.clone()),
        ..JobDraft::default()
    };
    let refuse = |errors: Vec<FieldError>| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Problem::refused(errors.join("; "))
    };
    job.check().map(drop).map_err(refuse)
}

/// The rollouts of the file of tasks.
fn read_tasks(args: &Evaluate, models: [String; 2]) -> Result<Expanded, Problem> {
    let arm = |(name, model)| Arm {
        name: Some(name),
        model: Some(model),
    };
    let plan = Plan {
        arms: ARMS.into_iter().zip(models).map(arm).collect(),
        samples: args.samples,
        split: args.split.clone(),
        hints: args.hints,
        seed: args.seed,
        sampling: SamplingDraft::default(),
        defaults: JobDraft::default(),
        labels: BTreeMap::new(),
        nameless: "task",
        rollouts_max: limits::AFTER_MANY_MAX as u64,
    };
    let vars = args.vars.iter().cloned().collect();
    let tasks = Expanded::read(&args.tasks, vars, plan)?;
    check_count(args, &tasks)?;
    Ok(tasks)
}

fn check_count(args: &Evaluate, tasks: &Expanded) -> Result<(), Problem> {
    let max = limits::AFTER_MANY_MAX as u64;
    if tasks.rollouts > max {
        let message = format!(
            "an evaluation must have at most {} rollouts, got {}",
            count(max),
            count(tasks.rollouts)
        );
        return Err(Problem::refused(message).fix("take fewer tasks, or fewer --samples"));
    }
    if tasks.jobs.is_empty() {
        if !tasks.refusals.is_empty() {
            note(refusal_table(&tasks.refusals));
        }
        let split = args
            .split
            .as_deref()
            .map(|split| format!(" of split `{split}`"));
        let message = format!(
            "{} has no task{} that can be tried",
            args.tasks.display(),
            split.unwrap_or_default()
        );
        return Err(Problem::refused(message));
    }
    Ok(())
}

/// What became of the jobs.
struct Submitted {
    /// Rollouts that are in the queue.
    rollouts: u64,
    refusals: Vec<Refusal>,
    /// Tasks of another split.
    skipped: u64,
    /// What compares them, should it have to be done again.
    compare: CompareDraft,
}

/// An evaluation that is asked for.
struct Evaluation<'a> {
    context: &'a Context,
    client: Client,
    store: Store,
    /// The job that compares.
    key: JobKey,
}

impl Evaluation<'_> {
    /// Repeating it changes nothing.
    async fn submit(
        &self,
        mut tasks: Expanded,
        compare: CompareDraft,
    ) -> Result<Submitted, Problem> {
        let batch = &self.key.batch;
        open(&self.client, batch, v1::JobSpec::default()).await?;
        uploads::check_project(&self.client, batch, &self.key.project).await?;
        let mut submitted = Submitted {
            rollouts: 0,
            refusals: std::mem::take(&mut tasks.refusals),
            skipped: tasks.skipped,
            compare,
        };
        let mut after = Vec::new();
        let mut chunk = 0;
        for (jobs, places) in chunks(tasks.jobs.into_iter().zip(tasks.places)) {
            after.extend(
                self.submit_chunk(chunk, jobs, &places, &mut submitted)
                    .await?,
            );
            chunk += 1;
        }
        submitted.rollouts = after.len() as u64;
        if after.is_empty() {
            close_batch(&self.client, batch).await?;
            note(refusal_table(&submitted.refusals));
            return Err(Problem::refused("no rollout was accepted"));
        }
        let job = JobDraft {
            id: Some(JOB.to_owned()),
            after,
            compare: Some(submitted.compare.clone()),
            ..JobDraft::default()
        };
        uploads::submit_all(&self.client, batch, chunk, &[draft_to_wire(&job)]).await?;
        close_batch(&self.client, batch).await?;
        Ok(submitted)
    }

    /// The ids of the jobs that were accepted.
    async fn submit_chunk(
        &self,
        chunk: u32,
        jobs: Vec<v1::JobSpec>,
        places: &[u64],
        submitted: &mut Submitted,
    ) -> Result<Vec<String>, Problem> {
        let request = v1::SubmitChunkRequest {
            batch: self.key.batch.to_string(),
            chunk,
            jobs,
        };
        let answer = again(&self.client, || {
            let (mut jobs, request) = (self.client.jobs(), request.clone());
            async move { jobs.submit_chunk(request).await }
        })
        .await?;
        let mut is_out = vec![false; request.jobs.len()];
        for rejection in answer.rejected {
            let index = rejection.index as usize;
            if let Some(out) = is_out.get_mut(index) {
                *out = true;
            }
            let place = places.get(index).copied().unwrap_or_default();
            submitted
                .refusals
                .extend(rejection.errors.into_iter().map(|error| Refusal {
                    place,
                    id: rejection.id.clone(),
                    error: FieldError {
                        field: error.field,
                        value: error.value,
                        rule: error.rule,
                    },
                }));
        }
        let accepted = request.jobs.into_iter().zip(is_out);
        let accepted = accepted.filter(|(_, out)| !out);
        Ok(accepted.filter_map(|(job, _)| job.id).collect())
    }

    fn tell_submitted(&self, submitted: &Submitted, detach: bool) -> Result<(), Problem> {
        let batch = self.key.batch.as_str();
        if !self.context.out.json && !submitted.refusals.is_empty() {
            note(refusal_table(&submitted.refusals));
        }
        let told = json!({
            "batch": batch,
            "job": JOB,
            "rollouts": submitted.rollouts,
            "skipped_tasks": submitted.skipped,
            "refusals": submitted.refusals.iter().map(refusal_json).collect::<Vec<Value>>(),
        });
        match (self.context.out.json, detach) {
            (true, _) => self.context.out.event(&told)?,
            (false, true) => self.context.out.line(facts(&[
                ("batch", batch.to_owned()),
                ("rollouts", count(submitted.rollouts)),
                ("watch it", format!("espalier watch {batch}")),
            ]))?,
            (false, false) => note(format!(
                "batch {batch}: {} rollouts",
                count(submitted.rollouts)
            )),
        }
        Ok(())
    }

    /// Says what came of it. Where rollouts are dead, the comparison died with them, and what is there is compared.
    async fn finish(&self, args: &Evaluate, submitted: &Submitted) -> Outcome {
        let mut key = self.key.clone();
        let mut job = waiting::job(&self.client, &key).await?;
        if job.state() == v1::JobState::Dead && job.attempts == 0 {
            note(
                "some rollouts are dead, and the comparison with them: what is there is compared without them",
            );
            key = self.compare_rest(submitted).await?;
            let bar = crate::progress::things(0, "comparing");
            let look = || waiting::job(&self.client, &key);
            job = waiting::wait(self.context, bar, look, waiting::in_words).await?;
        }
        if job.state() != v1::JobState::Succeeded {
            let why = job.last_error.as_ref().map_or("", |error| &error.message);
            let state = shown::state(job.state());
            note(format!("error: the comparison is {state}: {}", plain(why)));
            return Ok(Exit::Failed);
        }
        let read = Read::of(&self.store, &key).await?;
        if let Some(folder) = &args.out {
            read.write(folder)?;
        }
        match self.context.out.json {
            true => self
                .context
                .out
                .event(&json!({"evaluation": read.to_json()}))?,
            false => self
                .context
                .out
                .line(read.to_text(self.store.url(), args.out.as_ref()))?,
        }
        Ok(match args.gate && !read.report.gate.passed {
            true => Exit::Failed,
            false => Exit::Ok,
        })
    }

    /// Compares in a batch of its own, which waits for nothing.
    async fn compare_rest(&self, submitted: &Submitted) -> Result<JobKey, Problem> {
        let stamp = crate::names::stamp(SystemClock.now());
        let name = format!("compare-{stamp}-{}", self.key.batch);
        let name: String = name.chars().take(128).collect();
        let mut key = self.key.clone();
        key.batch = BatchId::new(&name)?;
        let job = JobDraft {
            id: Some(JOB.to_owned()),
            compare: Some(submitted.compare.clone()),
            ..JobDraft::default()
        };
        uploads::submit_alone(&self.client, &key, &job).await?;
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(more: &str) -> Result<Evaluate, String> {
        let words = ["espalier", "evaluate", "--tasks", "t.jsonl"];
        let words = words.into_iter().chain(more.split_whitespace());
        match Cli::try_parse_from(words)
            .map_err(|error| error.to_string())?
            .command
        {
            Command::Evaluate(args) => Ok(*args),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn two_models_are_compared_by_the_words_of_the_command() {
        let found = args(
            "--model base --model shop --price 0.5,2 --adapter shop@v2 --min-difference -0.1 --hints --no-hints",
        );
        let found = found.unwrap();
        assert!(!found.hints, "the last word counts");
        let models = two_models(&found).unwrap();
        let draft = compare_draft(&found, &models, &"b".parse().unwrap());
        check(&draft).unwrap();
        assert_eq!(draft.min_difference, Some(-0.1));
        let [before, after] = &draft.arms[..] else {
            panic!("{draft:?}")
        };
        assert_eq!(
            (before.labels["arm"].as_str(), after.labels["arm"].as_str()),
            ("a", "b")
        );
        assert_eq!(
            (before.adapter.as_deref(), after.adapter.as_deref()),
            (None, Some("shop@v2"))
        );
        assert_eq!(
            (before.prompt_price, after.completion_price),
            (Some(0.5), Some(2.0))
        );
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        for (line, part) in [
            ("--model a", "`--model` must be given twice, got 1"),
            ("--model a --model b --model c", "got 3"),
            (
                "--model a --model b --label x",
                "`--label` must be given once for each model",
            ),
            ("--model a --model a", "must differ"),
        ] {
            let found = args(line).unwrap();
            let models = two_models(&found);
            let problem = models
                .and_then(|models| check(&compare_draft(&found, &models, &"b".parse().unwrap())));
            let problem = problem.unwrap_err();
            assert!(problem.message.contains(part), "{line}: {problem}");
            assert_eq!(problem.exit, Exit::Refused);
        }
        assert!(args("--model a --model b --price 1").is_err());
        assert!(args("--model a --model b --samples 0").is_err());
    }
}
