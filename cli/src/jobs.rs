//! `espalier jobs`, `job`, `batches`, `cancel` and `retry`: looking at jobs and steering them.

use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::time::Timestamp;
use espalier_proto::convert::agreement_from_wire;
use espalier_proto::v1;
use serde_json::json;

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::json;
use crate::output::{count, cut, duration, facts, note, plain, table};
use crate::submit::pair;

/// Jobs that one request asks for: the API's limit.
const PAGE_SIZE: u32 = 1000;
/// Rows of a table for people; `--json` and `--limit` show more.
const ROWS_MAX: usize = 200;

/// A job as the command line names it: `BATCH/JOB`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobName {
    /// Its batch.
    pub batch: BatchId,
    /// Its id.
    pub job: JobId,
}

impl JobName {
    /// The full name.
    pub fn key(&self, project: ProjectId) -> JobKey {
        JobKey::new(project, self.batch.clone(), self.job.clone())
    }
}

impl FromStr for JobName {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let rule = "must have the form BATCH/JOB";
        let (batch, job) = text
            .split_once('/')
            .ok_or_else(|| FieldError::new("job", text, rule))?;
        Ok(Self {
            batch: batch.parse()?,
            job: job.parse()?,
        })
    }
}

/// Options of `jobs`.
#[derive(Args, Clone, Debug)]
pub struct Jobs {
    /// The batch
    #[arg(value_name = "BATCH")]
    pub batch: String,
    /// Only jobs in this state; may be given several times
    #[arg(long = "state", value_name = "STATE", value_enum)]
    pub states: Vec<State>,
    /// Only jobs with this label; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub labels: Vec<(String, String)>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = ROWS_MAX)]
    pub limit: usize,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// Waits for other jobs
    Blocked,
    /// Waits for a time
    Delayed,
    /// Waits for a worker
    Ready,
    /// Runs
    Leased,
    /// Ended well
    Succeeded,
    /// Ended badly
    Dead,
    /// Was cancelled
    Cancelled,
}

impl From<State> for v1::JobState {
    fn from(state: State) -> Self {
        match state {
            State::Blocked => Self::Blocked,
            State::Delayed => Self::Delayed,
            State::Ready => Self::Ready,
            State::Leased => Self::Leased,
            State::Succeeded => Self::Succeeded,
            State::Dead => Self::Dead,
            State::Cancelled => Self::Cancelled,
        }
    }
}

/// What to do with one job.
#[derive(Subcommand, Clone, Debug)]
pub enum JobCommand {
    /// Everything that the queue knows of a job
    Show {
        /// The job
        #[arg(value_name = "BATCH/JOB")]
        job: JobName,
    },
    /// Cancels a job; a running one is told at once
    Cancel {
        /// The job
        #[arg(value_name = "BATCH/JOB")]
        job: JobName,
    },
    /// Puts a dead job back into the queue with fresh budgets
    Retry {
        /// The job
        #[arg(value_name = "BATCH/JOB")]
        job: JobName,
    },
}

/// Options of `cancel`.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct Cancel {
    /// The batch, or one job as BATCH/JOB
    #[arg(value_name = "BATCH[/JOB]")]
    pub target: Option<String>,
    /// All jobs of the project with this label
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub label: Option<(String, String)>,
}

/// Options of `retry`.
#[derive(Args, Clone, Debug)]
pub struct Retry {
    /// The batch
    #[arg(value_name = "BATCH")]
    pub batch: String,
    /// Only these jobs [default: all dead ones]
    #[arg(value_name = "JOB")]
    pub ids: Vec<String>,
}

/// Options of `batches`.
#[derive(Args, Clone, Debug)]
pub struct Batches {
    /// At most so many, newest first
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub limit: usize,
}

/// `espalier jobs`.
pub async fn list(context: &Context, args: &Jobs) -> Outcome {
    let client = context.client().await?;
    let states = args
        .states
        .iter()
        .map(|state| v1::JobState::from(*state).into());
    let mut request = v1::ListJobsRequest {
        batch: args.batch.clone(),
        states: states.collect(),
        labels: args.labels.iter().cloned().collect(),
        page_size: PAGE_SIZE
            .min(u32::try_from(args.limit).unwrap_or(PAGE_SIZE))
            .max(1),
        page_token: String::new(),
    };
    let mut jobs = Vec::new();
    let mut more = false;
    while jobs.len() < args.limit {
        let page = client.jobs().list_jobs(request.clone()).await?.into_inner();
        jobs.extend(page.jobs);
        more = !page.next_page_token.is_empty() || jobs.len() > args.limit;
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    jobs.truncate(args.limit);
    context.out.show(
        || json!({"jobs": jobs.iter().map(json::job).collect::<Vec<_>>(), "more": more}),
        || jobs_table(&jobs),
    )?;
    if more {
        note(format!(
            "there are more than {}: narrow it with --state and --label, or raise --limit",
            args.limit
        ));
    }
    Ok(Exit::Ok)
}

fn jobs_table(jobs: &[v1::Job]) -> String {
    let rows = jobs.iter().map(|job| {
        let summary = job.summary.as_ref();
        let is_rollout = |s: &&v1::RolloutSummary| {
            s.generate.is_none()
                && s.export.is_none()
                && s.train.is_none()
                && s.curate.is_none()
                && s.compare.is_none()
                && s.score.is_none()
        };
        let rollout = summary.filter(is_rollout);
        let reward = summary
            .and_then(|s| s.reward)
            .map(|reward| format!("{reward:.2}"));
        let said = match (&job.last_error, job.state()) {
            (Some(error), v1::JobState::Dead | v1::JobState::Delayed | v1::JobState::Ready) => {
                error.message.clone()
            }
            (_, v1::JobState::Leased) => job.progress.clone(),
            _ => summary.map(what_came_of).unwrap_or_default(),
        };
        [
            job.id.clone(),
            json::kind(job.kind()).to_owned(),
            job.priority.to_string(),
            json::state(job.state()).to_owned(),
            job.attempts.to_string(),
            reward.unwrap_or_default(),
            summary.map(|s| s.task_kind.clone()).unwrap_or_default(),
            rollout.map(|s| s.turns.to_string()).unwrap_or_default(),
            cut(&said, 60),
        ]
    });
    table(
        [
            "job",
            "kind",
            "priority",
            "state",
            "attempts",
            "reward",
            "task kind",
            "turns",
            "what",
        ],
        rows.collect(),
    )
}

/// Why a rollout is not solved, how many requests were answered, how a training ended, where an export is, how large a data
/// set, or what a comparison or a score shows.
fn what_came_of(summary: &v1::RolloutSummary) -> String {
    if let Some(train) = &summary.train {
        let held_out = train.eval_loss.map(|loss| format!(", held-out {loss:.4}"));
        return format!(
            "{} steps, loss {:.4}{}",
            count(train.steps),
            train.loss,
            held_out.unwrap_or_default()
        );
    }
    if let Some(curate) = &summary.curate {
        return format!(
            "{} rows, {} held out",
            count(curate.train_rows + curate.eval_rows),
            count(curate.eval_rows)
        );
    }
    if let Some(compare) = &summary.compare {
        let [before, after, low, high] =
            [compare.before, compare.after, compare.low, compare.high].map(|share| share * 100.0);
        return format!(
            "{before:.1} % before, {after:.1} % after, by {low:+.1} to {high:+.1} points"
        );
    }
    if let Some(score) = &summary.score {
        return format!(
            "{} of {} turns the same",
            count(score.agreed),
            count(score.turns)
        );
    }
    if let Some(export) = &summary.export {
        return format!("{} files at {}", count(export.files), export.exported_to);
    }
    match &summary.generate {
        Some(generate) => format!(
            "{} lines, {} with errors",
            count(generate.lines),
            count(generate.failed)
        ),
        None => summary.reason.clone(),
    }
}

/// `espalier job`.
pub async fn one(context: &Context, command: &JobCommand) -> Outcome {
    match command {
        JobCommand::Show { job } => show(context, job).await,
        JobCommand::Cancel { job } => {
            let target = v1::JobRef {
                batch: job.batch.to_string(),
                id: job.job.to_string(),
            };
            cancel_target(context, v1::cancel_request::Target::Job(target)).await
        }
        JobCommand::Retry { job } => {
            retry_ids(context, job.batch.as_str(), vec![job.job.to_string()]).await
        }
    }
}

async fn show(context: &Context, name: &JobName) -> Outcome {
    let client = context.client().await?;
    let request = v1::GetJobRequest {
        batch: name.batch.to_string(),
        id: name.job.to_string(),
    };
    let job = client.jobs().get_job(request).await?.into_inner();
    context.out.show(|| json::job(&job), || job_text(&job))?;
    Ok(Exit::Ok)
}

fn job_text(job: &v1::Job) -> String {
    let mut rows = vec![
        ("job", format!("{}/{}", job.batch, job.id)),
        ("kind", json::kind(job.kind()).to_owned()),
        ("priority", job.priority.to_string()),
        ("state", json::state(job.state()).to_owned()),
        (
            "attempts",
            format!(
                "{} begun, {} failed, {} lost to infrastructure",
                job.attempts, job.handler_failures, job.infra_failures
            ),
        ),
        ("submitted", Timestamp(job.created_at_us).to_string()),
    ];
    if job.ended_at_us > 0 {
        rows.push(("ended", Timestamp(job.ended_at_us).to_string()));
    }
    let texts = [
        ("worker", &job.worker),
        ("progress", &job.progress),
        ("manifest", &job.manifest),
    ];
    rows.extend(
        texts
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(name, text)| (name, text.clone())),
    );
    if !job.needs.is_empty() {
        rows.push(("needs", job.needs.join(" ")));
    }
    if !job.labels.is_empty() {
        let labels: Vec<String> = job.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        rows.push(("labels", labels.join(" ")));
    }
    if let Some(summary) = &job.summary {
        rows.extend(summary_rows(summary));
    }
    let mut text = facts(&rows);
    if let Some(error) = &job.last_error {
        text.push_str(&format!(
            "\n\nlast error ({}): {}",
            json::class(error.class()),
            plain(&error.message)
        ));
        for line in error.log_tail.lines() {
            text.push_str(&format!("\n  {}", plain(line)));
        }
    }
    text
}

fn summary_rows(summary: &v1::RolloutSummary) -> Vec<(&'static str, String)> {
    let tokens = |prompt, completion| format!("{} in, {} out", count(prompt), count(completion));
    if let Some(generate) = &summary.generate {
        return vec![
            ("answers", what_came_of(summary)),
            (
                "tokens",
                tokens(generate.prompt_tokens, generate.completion_tokens),
            ),
        ];
    }
    if let Some(train) = &summary.train {
        let tokens = format!(
            "{}, {} of them learned",
            count(train.tokens),
            count(train.supervised_tokens)
        );
        let mut rows = vec![
            ("training", what_came_of(summary)),
            ("weights", format!("after step {}", count(train.best_step))),
            ("tokens", tokens),
            ("computing", duration(train.wall_ms)),
        ];
        let agreement = train.agreement.as_ref().map(agreement_from_wire);
        rows.extend(agreement.map(|agreement| ("agreement", agreement.to_string())));
        return rows;
    }
    if let Some(export) = &summary.export {
        return vec![
            ("export", what_came_of(summary)),
            ("commit", export.commit.clone()),
            ("bytes", count(export.bytes)),
        ];
    }
    if let Some(compare) = &summary.compare {
        let passed = if compare.passed {
            "passed"
        } else {
            "not passed"
        };
        return vec![
            ("comparison", what_came_of(summary)),
            (
                "pairs",
                format!("{} of {} tasks", count(compare.pairs), count(compare.tasks)),
            ),
            ("gate", format!("{passed}: {}", compare.verdict)),
        ];
    }
    if let Some(score) = &summary.score {
        return vec![
            ("recorded rollouts", count(score.traces)),
            ("turns", what_came_of(summary)),
            (
                "tokens",
                count(score.prompt_tokens + score.completion_tokens),
            ),
        ];
    }
    if let Some(curate) = &summary.curate {
        let dropped: u64 = curate.dropped.values().sum();
        return vec![
            ("data set", what_came_of(summary)),
            (
                "sources",
                format!("{}, {} dropped", count(curate.sources), count(dropped)),
            ),
            (
                "tokens",
                format!(
                    "{}, {} of them learned",
                    count(curate.tokens),
                    count(curate.supervised_tokens)
                ),
            ),
        ];
    }
    let mut rows = vec![
        ("task", format!("{} {}", summary.task_kind, summary.task_id)),
        ("stopped", summary.stop.clone()),
        ("turns", summary.turns.to_string()),
        (
            "tool calls",
            format!(
                "{}, {} with errors",
                summary.tool_calls, summary.tool_errors
            ),
        ),
        (
            "tokens",
            tokens(summary.prompt_tokens, summary.completion_tokens),
        ),
        ("took", duration(summary.wall_ms)),
    ];
    if let Some(reward) = summary.reward {
        rows.push(("reward", format!("{reward:.3}")));
    }
    if !summary.reason.is_empty() {
        rows.push(("because", summary.reason.clone()));
    }
    rows
}

/// `espalier cancel`.
pub async fn cancel(context: &Context, args: &Cancel) -> Outcome {
    use v1::cancel_request::Target;
    let target = match (&args.target, &args.label) {
        (_, Some((name, value))) => Target::Label(v1::Label {
            name: name.clone(),
            value: value.clone(),
        }),
        (Some(text), None) if text.contains('/') => {
            let name: JobName = text.parse()?;
            Target::Job(v1::JobRef {
                batch: name.batch.to_string(),
                id: name.job.to_string(),
            })
        }
        (Some(batch), None) => Target::Batch(batch.clone()),
        (None, None) => return Err(Problem::refused("nothing to cancel was named")),
    };
    cancel_target(context, target).await
}

async fn cancel_target(context: &Context, target: v1::cancel_request::Target) -> Outcome {
    let client = context.client().await?;
    let request = v1::CancelRequest {
        target: Some(target),
    };
    let done = client.jobs().cancel(request).await?.into_inner();
    context.out.show(
        || json!({"cancelled": done.cancelled, "signalled": done.signalled}),
        || {
            format!(
                "cancelled {}, told {} running ones to stop",
                count(done.cancelled),
                count(done.signalled)
            )
        },
    )?;
    Ok(Exit::Ok)
}

/// `espalier retry`.
pub async fn retry(context: &Context, args: &Retry) -> Outcome {
    retry_ids(context, &args.batch, args.ids.clone()).await
}

async fn retry_ids(context: &Context, batch: &str, ids: Vec<String>) -> Outcome {
    let client = context.client().await?;
    let request = v1::RetryRequest {
        batch: batch.to_owned(),
        ids,
    };
    let done = client.jobs().retry(request).await?.into_inner();
    context.out.show(
        || json!({"requeued": done.requeued}),
        || format!("put back {}", count(done.requeued)),
    )?;
    Ok(Exit::Ok)
}

/// `espalier batches`.
pub async fn batches(context: &Context, args: &Batches) -> Outcome {
    let client = context.client().await?;
    let mut request = v1::ListBatchesRequest {
        page_size: PAGE_SIZE
            .min(u32::try_from(args.limit).unwrap_or(PAGE_SIZE))
            .max(1),
        page_token: String::new(),
    };
    let mut batches = Vec::new();
    while batches.len() < args.limit {
        let page = client
            .jobs()
            .list_batches(request.clone())
            .await?
            .into_inner();
        batches.extend(page.batches);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    batches.truncate(args.limit);
    context.out.show(
        || json!({"batches": batches.iter().map(json::batch).collect::<Vec<_>>()}),
        || batches_table(&batches),
    )?;
    Ok(Exit::Ok)
}

fn batches_table(batches: &[v1::Batch]) -> String {
    let rows = batches.iter().map(|batch| {
        let c = batch.counts.unwrap_or_default();
        let state = match (batch.complete, batch.closed) {
            _ if batch.cancelled => "cancelled",
            (true, _) => "complete",
            (false, true) => "running",
            (false, false) => "open",
        };
        let completed = match batch.completed_at_us {
            0 => String::new(),
            at => Timestamp(at).to_string(),
        };
        [
            batch.batch.clone(),
            state.to_owned(),
            count(c.blocked + c.delayed + c.ready),
            count(c.leased),
            count(c.succeeded),
            count(c.dead),
            count(c.cancelled),
            Timestamp(batch.created_at_us).to_string(),
            completed,
        ]
    });
    let header = [
        "batch",
        "state",
        "waiting",
        "running",
        "succeeded",
        "dead",
        "cancelled",
        "opened",
        "completed",
    ];
    table(header, rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_named_with_its_batch() {
        let name: JobName = "b1/j1".parse().unwrap();
        assert_eq!((name.batch.as_str(), name.job.as_str()), ("b1", "j1"));
        for bad in ["b1", "b1/", "/j", "a/b/c"] {
            assert!(bad.parse::<JobName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn golden_jobs() {
        let dead = v1::Job {
            id: "j1".to_owned(),
            kind: v1::JobKind::Rollout.into(),
            priority: 7,
            state: v1::JobState::Dead.into(),
            attempts: 3,
            needs: vec!["mcp:browser".to_owned(), "model:m".to_owned()],
            last_error: Some(v1::JobError {
                class: v1::ErrorClass::Handler.into(),
                message: "no\nmodel".to_owned(),
                log_tail: String::new(),
            }),
            ..Default::default()
        };
        let expected = [
            " JOB  KIND     PRIORITY  STATE  ATTEMPTS  REWARD  TASK KIND  TURNS  WHAT",
            " j1   rollout  7         dead   3                                   no model",
        ];
        assert_eq!(jobs_table(std::slice::from_ref(&dead)), expected.join("\n"));
        let shown = job_text(&dead);
        assert!(
            shown.contains("kind       rollout\npriority   7\n"),
            "{shown}"
        );
        assert!(shown.contains("mcp:browser model:m\n"), "{shown}");
        let value = json::job(&dead);
        assert_eq!(value["needs"], json!(["mcp:browser", "model:m"]));
        assert_eq!(
            (&value["kind"], &value["priority"]),
            (&json!("rollout"), &json!(7))
        );
    }

    #[test]
    fn golden_batches() {
        let running = v1::Batch {
            batch: "a".to_owned(),
            closed: true,
            created_at_us: 1_000_000,
            ..Default::default()
        };
        let cancelled = v1::Batch {
            batch: "b".to_owned(),
            complete: true,
            cancelled: true,
            completed_at_us: 61_000_000,
            ..running.clone()
        };
        let expected = [
            " BATCH  STATE      WAITING  RUNNING  SUCCEEDED  DEAD  CANCELLED  OPENED                       COMPLETED",
            " a      running    0        0        0          0     0          1970-01-01T00:00:01.000000Z",
            " b      cancelled  0        0        0          0     0          1970-01-01T00:00:01.000000Z  1970-01-01T00:01:01.000000Z",
        ];
        assert_eq!(
            batches_table(&[running.clone(), cancelled.clone()]),
            expected.join("\n")
        );
        assert_eq!(json::batch(&running).get("completed_at_us"), None);
        let value = json::batch(&cancelled);
        assert_eq!(value["completed_at_us"], json!(61_000_000));
        assert_eq!(value["cancelled"], json!(true));
    }
}
