//! `espalier generate`: a file of requests becomes a file of answers.
//!
//! The file is checked line by line, goes to the object store, and becomes one job, or several where it is large, so that
//! several workers can answer it. Their answers are joined in the order of the requests.

mod answers;
mod requests;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
use crate::uploads::{self, has_ended};
use crate::{json as shown, progress};
use requests::{Part, Requests};

/// Time between two looks at the jobs.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often a line is printed where there is no terminal for a bar.
const LINE_EVERY: Duration = Duration::from_secs(5);
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
    let file = args.file.clone();
    let checked = blocking("generate.check", move || requests::check(&file)).await;
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
    asked.submit(args, &requests.parts).await?;
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
    async fn submit(&self, args: &Generate, parts: &[Part]) -> Result<(), Problem> {
        open(&self.client, &self.batch, v1::JobSpec::default()).await?;
        uploads::check_project(&self.client, &self.batch, &self.project).await?;
        let bar = progress::bytes(parts.last().map_or(0, |part| part.end), "uploading");
        let mut jobs = Vec::new();
        for (n, part) in parts.iter().enumerate() {
            let requests = self.upload(&args.file, part).await?;
            bar.set_position(part.end);
            jobs.push(draft_to_wire(&JobDraft {
                id: Some(job_id(n)?.to_string()),
                generate: Some(GenerateDraft {
                    requests: Some(requests.as_str().to_owned()),
                    model: args.model.clone(),
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

    /// Uploads a part under the name of its content, unless it is there.
    async fn upload(&self, file: &Path, part: &Part) -> Result<UploadName, Problem> {
        let (file, part) = (file.to_owned(), part.clone());
        let read = move || requests::read(&file, &part);
        uploads::upload(&self.store, &self.project, read).await
    }

    /// Shows how far the jobs are until all of them have ended.
    async fn wait(&self, requests: &Requests) -> Result<Vec<v1::Job>, Problem> {
        let bar = progress::things(requests.lines, "answering");
        let mut said = Instant::now();
        loop {
            let jobs = self.jobs().await?;
            let lines: u64 = jobs.iter().map(lines_of).sum();
            bar.set_position(lines);
            if jobs.iter().all(has_ended) {
                bar.finish_and_clear();
                return Ok(jobs);
            }
            let no_worker = jobs.iter().all(|job| job.state() == v1::JobState::Ready);
            bar.set_message(if no_worker { "waits for a worker" } else { "" });
            if bar.is_hidden() && !self.context.out.json && said.elapsed() >= LINE_EVERY {
                said = Instant::now();
                let lines = count(lines);
                note(format!(
                    "{lines} of {} lines answered",
                    count(requests.lines)
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
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

/// Sorts as the parts do.
fn job_id(n: usize) -> Result<JobId, Problem> {
    Ok(JobId::new(format!("part-{n:06}"))?)
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
    fn answers_lie_beside_their_requests() {
        let named = |file: &str| answers_of(Path::new(file)).display().to_string();
        assert_eq!(named("a/night.jsonl"), "a/night.answers.jsonl");
        assert_eq!(named("night"), "night.answers.jsonl");
    }
}
