//! `espalier evaluate`: two models try the same tasks, and a report says what differs.
//!
//! The command is expanded: each task becomes rollouts of both models, and a `compare` job that waits for them, all in one
//! batch. Nothing is compared here; that is an agent worker's.

mod batch;
mod forced;
mod recorded;
pub mod show;

pub use forced::scores_turns;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::spec::{
    AdapterRef, CompareArmDraft, CompareDraft, JobDraft, SamplingDraft, limits,
};
use espalier_runtime::clock::{Clock, SystemClock};

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::expand::{ARM_LABEL, Arm, Expanded, Plan};
use crate::output::{count, note};
use crate::submit::{default_batch, pair, refusal_table, rename};
use crate::{uploads, watch};
use batch::Evaluation;

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
    #[arg(long, value_name = "FILE", required_unless_present = "replay")]
    pub tasks: Option<PathBuf>,
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
    /// Asks for each turn after what was recorded before it, and holds what is said against what was
    TeacherForced,
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
        None => {
            let name = args.tasks.clone().unwrap_or_else(|| "turns".into());
            default_batch(&name, SystemClock.now())?
        }
    };
    let draft = compare_draft(args, &models, &batch);
    check(&draft)?;
    let tasks = match args.replay {
        Some(Replay::TeacherForced) => {
            forced::check(args)?;
            Expanded::default()
        }
        _ => read_tasks(args, models.clone())?,
    };
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
    let tasks = evaluation.replayed(args, &models, tasks).await?;
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
        turns: (args.replay == Some(Replay::TeacherForced)).then_some(true),
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
    let Some(file) = &args.tasks else {
        let message = "`--replay recorded` tries tasks, and there is none";
        return Err(Problem::refused(message).fix("name their file with --tasks FILE"));
    };
    let vars = args.vars.iter().cloned().collect();
    let tasks = Expanded::read(file, vars, plan)?;
    check_count(args, &tasks)?;
    Ok(tasks)
}

fn check_count(args: &Evaluate, tasks: &Expanded) -> Result<(), Problem> {
    let max = limits::AFTER_MANY_MAX as u64;
    if tasks.rollouts > max {
        let (what, fix) = match args.replay {
            Some(Replay::TeacherForced) => ("jobs", "name fewer batches with --from"),
            _ => ("rollouts", "take fewer tasks, or fewer --samples"),
        };
        let message = format!(
            "an evaluation must have at most {} {what}, got {}",
            count(max),
            count(tasks.rollouts)
        );
        return Err(Problem::refused(message).fix(fix));
    }
    if tasks.jobs.is_empty() {
        if !tasks.refusals.is_empty() {
            note(refusal_table(&tasks.refusals));
        }
        let split = args
            .split
            .as_deref()
            .map(|split| format!(" of split `{split}`"));
        let file = args.tasks.as_ref().map(|file| file.display().to_string());
        let message = format!(
            "{} has no task{} that can be tried",
            file.unwrap_or_default(),
            split.unwrap_or_default()
        );
        return Err(Problem::refused(message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    pub(super) fn args(more: &str) -> Result<Evaluate, String> {
        let tasks = match more.contains("--replay") {
            true => &[][..],
            false => &["--tasks", "t.jsonl"],
        };
        let words = ["espalier", "evaluate"].into_iter();
        let words = words.chain(tasks.iter().copied());
        let words = words.chain(more.split_whitespace());
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
        assert!(args("--model a --model b --replay recorded").is_err());
        assert!(args("--model a --model b --from r").is_err());
        let found = args("--model a --model b --replay recorded --from r").unwrap();
        let models = two_models(&found).unwrap();
        let problem = read_tasks(&found, models).unwrap_err();
        assert!(problem.message.contains("tries tasks"), "{problem}");
        assert!(args("--model a --model b --price 1").is_err());
        assert!(args("--model a --model b --samples 0").is_err());
    }
}
