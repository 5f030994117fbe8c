//! `espalier generate`: a file of requests becomes a file of answers.
//!
//! The file is checked line by line, goes to the object store, and becomes one job, or several where it is large or names
//! several models, so that several workers can answer it. Their answers are joined in the order of the requests.

mod answers;
mod requests;

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::layout::UploadName;
use espalier_core::spec::{GenerateDraft, JobDraft};
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;
use serde_json::{Value, json};

use crate::client::Client;
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, facts, note};
use crate::submit::{again, close_batch, default_batch, open, refusal_json, refusal_table, rename};
use crate::waiting::{self, Shown, has_ended};
use crate::{json as shown, progress, uploads};
use requests::{Part, Requests};

/// Jobs of one page of the API, and of one chunk.
const PAGE_SIZE: u32 = 1000;
/// Options of `generate`.
#[derive(Args, Clone, Debug)]
pub struct Generate {
    /// Requests, one a line
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The model of lines that name none; a worker that serves it answers [default: the base model of any worker]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// File of the answers [default: FILE with .answers.jsonl at its end]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Name of the batch; the same name again goes on with it [default: the file's name and the time]
    #[arg(long, value_name = "NAME")]
    pub batch: Option<String>,
    /// Project of the token [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME")]
    pub project: Option<ProjectId>,
    /// Object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// What the answers are asked from.
struct Asked<'a> {
    context: &'a Context,
    client: Client,
    store: Store,
    project: ProjectId,
    batch: BatchId,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Generate) -> Outcome {
    let (file, model) = (args.file.clone(), args.model.clone());
    let check = move || requests::check(&file, model.as_deref());
    let checked = blocking("generate.check", check).await;
    let requests = checked.map_err(|error| Problem::failed(error.to_string()))??;
    if !requests.refusals.is_empty() {
        return refuse(context, &requests);
    }
    let batch = match &args.batch {
        Some(name) => BatchId::new(name).map_err(|error| Problem::from(rename(error)))?,
        None => default_batch(&args.file, SystemClock.now())?,
    };
    let asked = Asked {
        context,
        client: context.client().await?,
        store: uploads::open_store(context, args.store.as_deref()).await?,
        project: match &args.project {
            Some(project) => project.clone(),
            None => context.project()?,
        },
        batch,
    };
    asked.submit(&args.file, &requests.parts).await?;
    let jobs = asked.wait(&requests).await?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| answers_of(&args.file));
    asked.finish(&jobs, &output).await
}

/// `{file}.answers.jsonl`, without the ending of the requests.
fn answers_of(file: &Path) -> PathBuf {
    file.with_extension("answers.jsonl")
}

fn refuse(context: &Context, requests: &Requests) -> Outcome {
    if context.out.json {
        let refusals: Vec<Value> = requests.refusals.iter().map(refusal_json).collect();
        context.out.event(&json!({"refusals": refusals}))?;
    } else {
        note(refusal_table(&requests.refusals));
        note("nothing was sent");
    }
    Ok(Exit::Refused)
}

impl Asked<'_> {
    /// Opens the batch, uploads the parts and submits a job for each. Repeating it changes nothing.
    async fn submit(&self, file: &Path, parts: &[Part]) -> Result<(), Problem> {
        open(&self.client, &self.batch, v1::JobSpec::default()).await?;
        uploads::check_project(&self.client, &self.batch, &self.project).await?;
        let bar = progress::bytes(parts.last().map_or(0, |part| part.end), "uploading");
        let mut jobs = Vec::new();
        for (n, part) in parts.iter().enumerate() {
            let requests = self.upload(file, part).await?;
            bar.set_position(part.end);
            jobs.push(draft_to_wire(&JobDraft {
                id: Some(job_id(n)?.to_string()),
                generate: Some(GenerateDraft {
                    requests: Some(requests.as_str().to_owned()),
                    model: part.model.clone(),
                }),
                ..JobDraft::default()
            }));
        }
        bar.finish_and_clear();
        for (chunk, jobs) in (0..).zip(jobs.chunks(PAGE_SIZE as usize)) {
            uploads::submit_all(&self.client, &self.batch, chunk, jobs).await?;
        }
        close_batch(&self.client, &self.batch).await?;
        note(format!("batch {}", self.batch));
        Ok(())
    }

    /// Uploads a part under the name of its content, unless it is there and young.
    async fn upload(&self, file: &Path, part: &Part) -> Result<UploadName, Problem> {
        let (file, part) = (file.to_owned(), part.clone());
        let read = move || requests::read(&file, &part);
        uploads::upload(&self.store, &self.project, &self.batch, read).await
    }

    /// Shows how far the jobs are until all of them have ended.
    async fn wait(&self, requests: &Requests) -> Result<Vec<v1::Job>, Problem> {
        let bar = progress::things(requests.lines, "answering");
        let shown = |jobs: &Vec<v1::Job>| shown_of(jobs, requests);
        waiting::wait(self.context, bar, || self.jobs(), shown).await
    }

    /// The jobs of the batch, in the order of their parts.
    async fn jobs(&self) -> Result<Vec<v1::Job>, Problem> {
        let mut request = v1::ListJobsRequest {
            batch: self.batch.to_string(),
            page_size: PAGE_SIZE,
            ..Default::default()
        };
        let mut jobs = Vec::new();
        loop {
            let page = again(&self.client, || {
                let (mut jobs, request) = (self.client.jobs(), request.clone());
                async move { jobs.list_jobs(request).await }
            })
            .await?;
            jobs.extend(page.jobs);
            if page.next_page_token.is_empty() {
                return Ok(jobs);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Writes the answers, and says what came of the requests.
    async fn finish(&self, jobs: &[v1::Job], output: &Path) -> Outcome {
        let bad: Vec<&v1::Job> = jobs
            .iter()
            .filter(|job| job.state() != v1::JobState::Succeeded)
            .collect();
        for job in &bad {
            let why = job.last_error.as_ref().map_or("", |error| &error.message);
            let state = shown::state(job.state());
            note(format!(
                "error: job {}/{} is {state}: {why}",
                job.batch, job.id
            ));
        }
        if !bad.is_empty() {
            note(format!(
                "see `espalier jobs {}`; no answers were written",
                self.batch
            ));
            return Ok(Exit::Failed);
        }
        let keys = jobs.iter().map(|job| {
            let job = job.id.parse()?;
            Ok(JobKey::new(self.project.clone(), self.batch.clone(), job))
        });
        let keys = keys.collect::<Result<Vec<_>, Problem>>()?;
        answers::write(&self.store, &keys, output).await?;
        self.report(jobs, output)
    }

    fn report(&self, jobs: &[v1::Job], output: &Path) -> Outcome {
        let summaries = jobs.iter().filter_map(|job| job.summary.as_ref()?.generate);
        let mut total = v1::GenerateSummary::default();
        for summary in summaries {
            total.lines += summary.lines;
            total.failed += summary.failed;
            total.prompt_tokens += summary.prompt_tokens;
            total.completion_tokens += summary.completion_tokens;
        }
        self.context.out.show(
            || {
                json!({
                    "batch": self.batch.as_str(),
                    "answers": output.display().to_string(),
                    "lines": total.lines,
                    "failed": total.failed,
                    "prompt_tokens": total.prompt_tokens,
                    "completion_tokens": total.completion_tokens,
                })
            },
            || {
                let tokens = format!(
                    "{} in, {} out",
                    count(total.prompt_tokens),
                    count(total.completion_tokens)
                );
                facts(&[
                    ("answers", output.display().to_string()),
                    ("lines", count(total.lines)),
                    ("with errors", count(total.failed)),
                    ("tokens", tokens),
                ])
            },
        )?;
        Ok(match total.failed {
            0 => Exit::Ok,
            _ => Exit::Refused,
        })
    }
}

fn shown_of(jobs: &[v1::Job], requests: &Requests) -> Shown {
    let lines: u64 = jobs.iter().map(lines_of).sum();
    let waits = waits_for(jobs, &requests.parts);
    let told = format!(
        "{} of {} lines answered",
        count(lines),
        count(requests.lines)
    );
    let line = match waits.is_empty() {
        true => told,
        false => format!("{told}, {waits}"),
    };
    Shown {
        is_over: jobs.iter().all(has_ended),
        place: Some((lines, None)),
        message: waits,
        line,
        // Programs read the answers.
        event: None,
    }
}

/// Sorts as the parts do.
fn job_id(n: usize) -> Result<JobId, Problem> {
    Ok(JobId::new(format!("part-{n:06}"))?)
}

/// Whom the jobs wait for, if none of them runs.
fn waits_for(jobs: &[v1::Job], parts: &[Part]) -> String {
    let mut left = jobs.iter().zip(parts).filter(|(job, _)| !has_ended(job));
    let Some((first, part)) = left.next() else {
        return String::new();
    };
    let is_ready = |job: &v1::Job| job.state() == v1::JobState::Ready;
    if !is_ready(first) || !left.all(|(job, _)| is_ready(job)) {
        return String::new();
    }
    match &part.model {
        Some(model) => format!("waits for a worker that serves `{model}`"),
        None => "waits for a worker".to_owned(),
    }
}

/// Lines that are answered, as far as the worker has told.
fn lines_of(job: &v1::Job) -> u64 {
    let summary = job.summary.as_ref().and_then(|summary| summary.generate);
    let told = || job.progress.split(' ').next()?.parse().ok();
    match summary {
        Some(summary) => summary.lines,
        None => told().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_what_the_worker_told_last() {
        let job = |progress: &str| v1::Job {
            progress: progress.to_owned(),
            ..v1::Job::default()
        };
        assert_eq!(lines_of(&job("120 lines answered, 60 %")), 120);
        assert_eq!((lines_of(&job("publishing")), lines_of(&job(""))), (0, 0));
    }

    #[test]
    fn whom_jobs_wait_for_is_said_where_none_runs() {
        use v1::JobState::{Leased, Ready, Succeeded};
        let said = |states: [v1::JobState; 2]| {
            let jobs = states.map(|state| v1::Job {
                state: state.into(),
                ..v1::Job::default()
            });
            let parts = [None, Some("tuned".to_owned())].map(|model| Part {
                start: 0,
                end: 1,
                model,
            });
            waits_for(&jobs, &parts)
        };
        assert_eq!(said([Ready, Ready]), "waits for a worker");
        let tuned = "waits for a worker that serves `tuned`";
        assert_eq!(said([Succeeded, Ready]), tuned);
        for busy in [[Leased, Ready], [Ready, Leased], [Succeeded, Succeeded]] {
            assert_eq!(said(busy), "", "{busy:?}");
        }
    }

    #[test]
    fn answers_lie_beside_their_requests() {
        let named = |file: &str| answers_of(Path::new(file)).display().to_string();
        assert_eq!(named("a/night.jsonl"), "a/night.answers.jsonl");
        assert_eq!(named("night"), "night.answers.jsonl");
    }
}
