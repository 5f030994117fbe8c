//! `espalier run`: a closed loop as one pipeline. The model tries tasks, learns from what it solved, is measured on tasks that
//! it never saw, and takes the place of the one before where that is better; round after round.
//!
//! ```text
//! baseline ────────────────────────────────────────────────────────┐
//! probe ─► rollouts ─► dataset ─► train ─► (served) ─► evaluation ─┴► comparison ─► publish ─► the next round
//! ```
//! Each step is a batch of ordinary jobs that is named by its content; what it came to is written down once. So the command
//! may be killed and given again, by several at once: what has ended is not done again, and what is under way is joined.
//! `docs/decisions/pipelines.md` has the reasons.

mod batches;
mod check;
mod config;
mod display;
mod drafts;
mod engine;
mod plan;
mod read;
mod records;
mod report;
mod screen;
mod steps;
mod tally;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use espalier_core::id::{PipelineName, ProjectId};
use espalier_core::pipeline::{PipelinePlan, Step};
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;
use serde_json::json;

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, cut, note, table};
use crate::submit::pair;
use crate::uploads;
use check::Checked;
use config::Over;
use engine::Engine;
use plan::{Records, Resolved, steps};
use read::Faults;
use records::Desk;
use report::Story;
use screen::Screen;

/// Largest file, in bytes: tasks are in files of their own.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Mistakes that are shown to a person; `--json` has all of them.
const FAULTS_SHOWN_MAX: usize = 40;
/// Time between two looks of who looks on at whether the plan is another one.
const PLAN_EVERY: Duration = Duration::from_secs(5);

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub struct Run {
    /// What is to be done, as TOML
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What ${KEY} stands for in the tasks, over those of the file; may be given several times
    #[arg(long = "var", value_name = "KEY=VALUE", value_parser = pair)]
    pub vars: Vec<(String, String)>,
    /// How often it goes round, each time with the adapter of the round before [default: the file's, or 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,
    /// Does this step of every round anew, and with it what depends on it; may be given several times
    #[arg(long, value_name = "STEP", value_parser = again)]
    pub again: Vec<Step>,
    /// Shows what is done already and what would be, and does nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Folder of this machine that gets the report [default: NAME-report]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Project of the token [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME")]
    pub project: Option<ProjectId>,
    /// Object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// A step that can be done anew.
fn again(text: &str) -> Result<Step, String> {
    let steps = || {
        Step::ALL
            .into_iter()
            .filter(|step| !matches!(step, Step::Serve | Step::Publish))
    };
    let named = steps().find(|step| step.as_str() == text);
    named.ok_or_else(|| match text {
        "publish" => "is done by `espalier adapters promote`".to_owned(),
        _ => {
            let steps: Vec<&str> = steps().map(Step::as_str).collect();
            format!("must be one of {}", steps.join(", "))
        }
    })
}

/// Runs the command.
pub async fn run(context: &Context, args: &Run) -> Outcome {
    let Checked { config, drafts } = checked(context, args).await?;
    let mut plan = drafts.plan(&config, SystemClock.now())?;
    let desk = Desk {
        store: uploads::open_store(context, args.store.as_deref()).await?,
        project: match &args.project {
            Some(project) => project.clone(),
            None => context.project()?,
        },
        name: config.name.clone(),
    };
    if let Some(before) = desk.plan().await? {
        plan.go_on_from(&before);
    }
    let mut records = records(&desk).await?;
    let ended = ended(&plan, &records);
    plan.do_anew(&args.again, &ended)?;
    let screen = Screen::new(context, &plan);
    if args.dry_run {
        screen.resolved(&Resolved::new(&plan, &records), true)?;
        return report::once(context, &plan, &records, &screen.rows());
    }
    let client = context.client().await?;
    desk.announce(&plan).await?;
    let engine = Engine {
        context,
        client,
        desk,
        plan: &plan,
        drafts: Some(&drafts),
        serve_deadline: config.serve_deadline,
        screen: &screen,
    };
    let ended = engine.run(&mut records).await;
    let mut story = Story::read(&engine.desk, &plan, &records, screen.rows(), ended).await;
    story.walk(&engine.desk).await;
    let out = args.out.clone();
    let out = out.unwrap_or_else(|| PathBuf::from(format!("{}-report", config.name)));
    story.write(&out)?;
    story.tell(context, &out)
}

/// Steps that have ended in some round.
fn ended(plan: &PipelinePlan, records: &Records) -> BTreeSet<Step> {
    let resolved = Resolved::new(plan, records);
    let all = steps(plan).into_iter();
    let ended = all.filter(|at| resolved.record(*at).is_some());
    ended.map(|at| at.step).collect()
}

/// The records that can be read.
async fn records(desk: &Desk) -> Result<Records, Problem> {
    let (records, broken) = desk.steps().await?;
    for problem in broken {
        note(format!(
            "{}; only a step that needs it stops",
            problem.message
        ));
    }
    Ok(records)
}

/// Looks on while somebody else runs a pipeline, or `once`; none where nobody ever ran one of that name.
pub async fn watch(
    context: &Context,
    store: Store,
    project: ProjectId,
    name: &PipelineName,
    once: bool,
) -> Result<Option<Exit>, Problem> {
    let desk = Desk {
        store,
        project,
        name: name.clone(),
    };
    let Some(mut plan) = desk.plan().await? else {
        return Ok(None);
    };
    loop {
        let looked = Box::pin(look_on(context, desk.clone(), &plan, once));
        let other = tokio::select! {
            ended = looked => return ended.map(Some),
            other = other_plan(&desk, &plan) => other,
        };
        note("whoever runs the pipeline has given it another file, or asks for steps anew");
        plan = other;
    }
}

/// Waits until the pipeline is to do something else than `plan`.
async fn other_plan(desk: &Desk, plan: &PipelinePlan) -> PipelinePlan {
    loop {
        tokio::time::sleep(PLAN_EVERY).await;
        // A store that is away is told of by whoever needs it.
        if let Ok(Some(newest)) = desk.plan().await
            && !newest.is_like(plan)
        {
            return newest;
        }
    }
}

async fn look_on(context: &Context, desk: Desk, plan: &PipelinePlan, once: bool) -> Outcome {
    let mut records = records(&desk).await?;
    let screen = Screen::new(context, plan);
    let engine = Engine {
        context,
        client: context.client().await?,
        desk,
        plan,
        drafts: None,
        serve_deadline: Duration::ZERO,
        screen: &screen,
    };
    if once {
        screen.resolved(&Resolved::new(plan, &records), true)?;
        engine.look(&records).await?;
        return report::once(context, plan, &records, &screen.rows());
    }
    let ended = engine.run(&mut records).await;
    let story = Story::read(&engine.desk, plan, &records, screen.rows(), ended).await;
    story.tell_end(context)
}

/// The file, where nothing in it is wrong.
async fn checked(context: &Context, args: &Run) -> Result<Checked, Problem> {
    let path = args.file.clone();
    let over = Over {
        vars: args.vars.iter().cloned().collect(),
        rounds: args.rounds,
    };
    let checked = blocking("run.check", move || {
        let text = read_file(&path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Ok::<_, Problem>(check::check(&text, folder, over))
    });
    let checked = checked.await;
    let checked = checked.map_err(|error| Problem::failed(error.to_string()))??;
    checked.map_err(|faults| refuse(context, &args.file, &faults))
}

fn read_file(path: &Path) -> Result<String, Problem> {
    let cannot = |why: String| Problem::refused(format!("cannot read {}: {why}", path.display()));
    let bytes = std::fs::metadata(path).map_err(|error| cannot(error.to_string()))?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(cannot(format!("must have at most {FILE_BYTES_MAX} bytes")));
    }
    std::fs::read_to_string(path).map_err(|error| cannot(error.to_string()))
}

/// Tells of every mistake.
fn refuse(context: &Context, file: &Path, faults: &Faults) -> Problem {
    let all = &faults.0;
    if context.out.json {
        let fault = |fault: &read::Fault| {
            let error = &fault.error;
            json!({"place": fault.place, "field": error.field, "value": error.value, "rule": error.rule})
        };
        let faults: Vec<_> = all.iter().map(fault).collect();
        // Nobody who reads it can be told that it cannot be written.
        let _ = context.out.event(&json!({"faults": faults}));
    } else {
        let row = |fault: &read::Fault| {
            let error = &fault.error;
            [
                fault.place.clone(),
                error.field.clone(),
                cut(&error.value, 40),
                error.rule.clone(),
            ]
        };
        let rows = all.iter().take(FAULTS_SHOWN_MAX).map(row).collect();
        note(table(["line", "field", "value", "rule"], rows));
        if all.len() > FAULTS_SHOWN_MAX {
            let more = count((all.len() - FAULTS_SHOWN_MAX) as u64);
            note(format!(" … and {more} more; --json shows all"));
        }
    }
    let message = format!(
        "{} breaks {} rules; nothing was submitted",
        file.display(),
        count(all.len() as u64)
    );
    Problem::refused(message).fix("put them right: `espalier run --help` has an example")
}
