//! The batch of a step: found or begun, followed to its end, taken up again where its jobs are dead.

use std::cell::RefCell;

use espalier_core::id::{BatchId, JobId, JobKey};
use espalier_core::time::Timestamp;
use espalier_core::training::TrainProgress;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use tonic::Code;

use super::display::Running;
use super::engine::{Engine, LOOK_EVERY};
use super::plan::{At, Order};
use super::screen::Begun;
use super::tally::Tally;
use crate::dataset::build::places;
use crate::exit::Problem;
use crate::expand::chunks;
use crate::output::{cut, note};
use crate::submit::{again, close_batch, open};
use crate::{uploads, waiting, watch};

/// Batches of one step that may have been cancelled.
const TRIES_MAX: u32 = 100;
/// Refused jobs that an error tells of.
const REFUSALS_SHOWN_MAX: usize = 5;
/// How much of a worker's words stands in a row, in characters.
const WORDS_CHARS_MAX: usize = 60;

impl Engine<'_> {
    /// The batch of a step: the one that is there, or the first that can be. One that was cancelled is passed over.
    pub(super) async fn find(
        &self,
        order: &Order,
    ) -> Result<(BatchId, Option<v1::Batch>), Problem> {
        for tries in 1..=TRIES_MAX {
            let batch = order
                .digest
                .batch(&self.plan.pipeline, order.at.step, tries)?;
            match self.batch(&batch).await? {
                Some(found) if self.is_cancelled(&found) => {
                    self.leave_behind(&batch, &found).await?
                }
                found => return Ok((batch, found)),
            }
        }
        let message = format!(
            "{TRIES_MAX} batches of step {} were cancelled",
            order.at.step
        );
        Err(Problem::failed(message))
    }

    /// Stops what is left of a batch that is passed over. Who only looks on stops nothing.
    async fn leave_behind(&self, batch: &BatchId, found: &v1::Batch) -> Result<(), Problem> {
        match found.complete || self.drafts.is_none() {
            true => Ok(()),
            false => self.cancel(batch).await,
        }
    }

    async fn cancel(&self, batch: &BatchId) -> Result<(), Problem> {
        let target = v1::cancel_request::Target::Batch(batch.to_string());
        let request = v1::CancelRequest {
            target: Some(target),
        };
        let cancelled = again(&self.client, || {
            let (mut jobs, request) = (self.client.jobs(), request.clone());
            async move { jobs.cancel(request).await }
        });
        cancelled.await.map(drop)
    }

    /// A batch, as it is now; none where nobody opened it, or the queue has forgotten it.
    pub(super) async fn batch(&self, batch: &BatchId) -> Result<Option<v1::Batch>, Problem> {
        let request = v1::GetBatchRequest {
            batch: batch.to_string(),
        };
        again(&self.client, || {
            let (mut jobs, request) = (self.client.jobs(), request.clone());
            async move {
                match jobs.get_batch(request).await {
                    Ok(found) => Ok(found.map(Some)),
                    Err(status) if status.code() == Code::NotFound => {
                        Ok(tonic::Response::new(None))
                    }
                    Err(status) => Err(status),
                }
            }
        })
        .await
    }

    /// Begins the batch, unless all its jobs are there, and puts dead ones back where too little came of it. Repeating it
    /// changes nothing.
    pub(super) async fn begin(
        &self,
        at: At,
        batch: &BatchId,
        found: Option<&v1::Batch>,
        jobs: impl FnOnce() -> Vec<v1::JobSpec>,
    ) -> Result<(), Problem> {
        let mut how = match found {
            Some(_) => Begun::Attached,
            None => Begun::New,
        };
        if !found.is_some_and(|found| found.closed) {
            self.submit(batch, jobs()).await?;
        }
        if found.is_some_and(|found| self.is_retried(found)) {
            self.retry(batch).await?;
            how = Begun::Retried;
        }
        let planned = self.plan.step(at.step).map_or(0, |step| step.jobs);
        self.screen.begun(at, batch, planned, how)
    }

    /// Whether the dead jobs of a batch are put back before it is followed.
    pub(super) fn is_retried(&self, found: &v1::Batch) -> bool {
        let dead = found.counts.unwrap_or_default().dead;
        found.complete && dead > 0 && !self.has_enough(found)
    }

    fn has_enough(&self, found: &v1::Batch) -> bool {
        let counts = found.counts.unwrap_or_default();
        let jobs = counts.succeeded + counts.dead + counts.cancelled;
        is_enough(counts.succeeded, jobs, self.plan.min_share)
    }

    /// Whether somebody cancelled the batch, or so many of its jobs by their names or labels that it cannot count as done.
    fn is_cancelled(&self, found: &v1::Batch) -> bool {
        let cancelled = found.counts.unwrap_or_default().cancelled;
        found.cancelled || found.complete && cancelled > 0 && !self.has_enough(found)
    }

    async fn submit(&self, batch: &BatchId, jobs: Vec<v1::JobSpec>) -> Result<(), Problem> {
        open(&self.client, batch, v1::JobSpec::default()).await?;
        uploads::check_project(&self.client, batch, &self.desk.project).await?;
        let mut refusals = Vec::new();
        let all = chunks(jobs.into_iter().map(|job| (job, ())));
        for (chunk, (jobs, _)) in (0..).zip(all) {
            let request = v1::SubmitChunkRequest {
                batch: batch.to_string(),
                chunk,
                jobs,
            };
            let answer = again(&self.client, || {
                let (mut jobs, request) = (self.client.jobs(), request.clone());
                async move { jobs.submit_chunk(request).await }
            });
            refusals.extend(answer.await?.rejected);
        }
        if !refusals.is_empty() {
            // A part of the step is of no use, and must cost nothing. That it was refused is what must be put right.
            if let Err(problem) = self.cancel(batch).await {
                note(format!("{batch} cannot be cancelled: {problem}"));
            }
            return Err(refused(batch, &refusals));
        }
        close_batch(&self.client, batch).await
    }

    async fn retry(&self, batch: &BatchId) -> Result<(), Problem> {
        let request = v1::RetryRequest {
            batch: batch.to_string(),
            ids: Vec::new(),
        };
        let retried = again(&self.client, || {
            let (mut jobs, request) = (self.client.jobs(), request.clone());
            async move { jobs.retry(request).await }
        });
        retried.await.map(drop)
    }

    /// Follows rollouts to their end.
    pub(super) async fn follow(
        &self,
        at: At,
        batch: &BatchId,
    ) -> Result<(Tally, v1::Batch), Problem> {
        let tally = RefCell::new(Tally::default());
        let first = (SystemClock.now(), None::<u64>);
        let first = RefCell::new(first);
        let take = |event: v1::BatchEvent| {
            let mut tally = tally.borrow_mut();
            tally.take(&event);
            let (seen_at, before) = *first.borrow();
            let before = before.unwrap_or_else(|| tally.over());
            first.borrow_mut().1 = Some(before);
            let opened = event.batch.as_ref().map_or(0, |batch| batch.created_at_us);
            self.screen.running(
                at,
                Running {
                    since: Timestamp(opened),
                    first: Some((seen_at, before)),
                    done: tally.over(),
                    of: tally.jobs(),
                    counts: tally.counts(),
                    words: waits(&tally),
                    left_ms: None,
                },
            )
        };
        let ended = loop {
            let say = |_said: String| {};
            watch::events(self.context, &self.client, batch.as_str(), take, say).await?;
            let ended = self.over(batch).await?;
            // Somebody may have put dead jobs back since.
            if ended.complete {
                break ended;
            }
        };
        let tally = tally.into_inner();
        let checked = tally.check(&ended.counts.unwrap_or_default());
        checked.map_err(|why| {
            Problem::failed(format!("batch {batch}: {why}"))
                .fix("run it again: nothing was written down of the step")
        })?;
        Ok((tally, ended))
    }

    /// Follows the only job of a batch to its end.
    pub(super) async fn follow_one(
        &self,
        at: At,
        batch: &BatchId,
        id: &str,
    ) -> Result<(v1::Job, JobKey, v1::Batch), Problem> {
        let project = self.desk.project.clone();
        let key = JobKey::new(project, batch.clone(), JobId::new(id)?);
        loop {
            let job = waiting::job(&self.client, &key).await?;
            self.screen.running(at, running(&job))?;
            if waiting::has_ended(&job) {
                return Ok((job, key, self.over(batch).await?));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// A batch whose jobs have all ended.
    async fn over(&self, batch: &BatchId) -> Result<v1::Batch, Problem> {
        let found = self.batch(batch).await?;
        let found = found
            .ok_or_else(|| Problem::failed(format!("the queue has forgotten batch {batch}")))?;
        match self.is_cancelled(&found) {
            true => Err(
                Problem::failed(format!("jobs of batch {batch} were cancelled"))
                    .fix("the same command again begins the step anew, in another batch"),
            ),
            false => Ok(found),
        }
    }
}

/// Whether so many of the jobs of a step ended well that it counts as done: at least one, and the share that is asked for.
pub fn is_enough(succeeded: u64, jobs: u64, min_share: f64) -> bool {
    // A share such as 0.9 is no binary number: a count that is it exactly must be enough.
    succeeded > 0 && succeeded as f64 + 1e-6 >= min_share * jobs as f64
}

/// A batch, by its counters alone.
pub fn of_counts(batch: &v1::Batch) -> Running {
    let mut tally = Tally::default();
    tally.take(&v1::BatchEvent {
        batch: Some(batch.clone()),
        ..v1::BatchEvent::default()
    });
    Running {
        since: Timestamp(batch.created_at_us),
        done: tally.over(),
        of: tally.jobs(),
        words: waits(&tally),
        ..Running::default()
    }
}

/// Between which moments a batch was worked on.
pub fn times(batch: &v1::Batch) -> (Timestamp, Timestamp) {
    let ended = match batch.completed_at_us {
        0 => SystemClock.now().0,
        ended => ended,
    };
    (Timestamp(batch.created_at_us), Timestamp(ended))
}

fn refused(batch: &BatchId, refusals: &[v1::Rejection]) -> Problem {
    let said = refusals.iter().flat_map(|rejection| {
        let said = |error: &v1::FieldError| {
            let v1::FieldError { field, value, rule } = error;
            format!("{}: `{field}` {rule}, got `{value}`", rejection.id)
        };
        rejection.errors.iter().map(said)
    });
    let said: Vec<String> = said.take(REFUSALS_SHOWN_MAX).collect();
    let message = format!(
        "the coordinator refused {} jobs of batch {batch}: {}",
        refusals.len(),
        said.join("; ")
    );
    Problem::refused(message)
        .fix("put that right, and run it again: what was accepted is cancelled")
}

/// What nothing runs for.
fn waits(tally: &Tally) -> String {
    match (tally.running(), tally.over() < tally.jobs()) {
        (0, true) => "waits for a worker".to_owned(),
        _ => String::new(),
    }
}

/// A single job, as its worker tells of it.
fn running(job: &v1::Job) -> Running {
    let shown = waiting::in_words(job);
    let mut running = Running {
        since: Timestamp(job.created_at_us),
        words: cut(&shown.message, WORDS_CHARS_MAX),
        ..Running::default()
    };
    if job.state() != v1::JobState::Leased {
        return running;
    }
    if let Ok(told) = job.progress.parse::<TrainProgress>() {
        (running.done, running.of) = (told.step, told.steps);
        running.words = format!("loss {:.4}", told.loss);
        running.left_ms = told.left_s.map(|left_s| left_s * 1_000);
    } else if let Some((doing, done, of)) = places(&job.progress) {
        (running.done, running.of) = (done, of);
        doing.clone_into(&mut running.words);
    }
    running
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_told_of_in_steps_files_or_words() {
        let job = |state: v1::JobState, progress: &str| v1::Job {
            state: state.into(),
            progress: progress.to_owned(),
            created_at_us: 7,
            ..v1::Job::default()
        };
        let leased = |progress| running(&job(v1::JobState::Leased, progress));
        let told =
            "step 3/9 loss 1.5000 grad 0.2500 tok/s 5200 eval 1.2500 peak 0.43 mem 412 left 95";
        let training = leased(told);
        assert_eq!(
            (training.done, training.of, training.left_ms),
            (3, 9, Some(95_000))
        );
        assert_eq!(
            (&*training.words, training.since),
            ("loss 1.5000", Timestamp(7))
        );
        let reading = leased("reading 3/9");
        assert_eq!(
            (reading.done, reading.of, &*reading.words),
            (3, 9, "reading")
        );
        assert_eq!(leased("loading the model").words, "loading the model");
        let waiting = running(&job(v1::JobState::Ready, ""));
        assert_eq!(waiting.words, "ready: waits for a worker");
    }

    #[test]
    fn a_step_is_done_with_the_share_that_is_asked_for() {
        for (succeeded, jobs, share, expected) in [
            (0, 0, 0.0, false),
            (0, 4, 0.0, false),
            (1, 400, 0.0, true),
            (9, 10, 0.9, true),
            (8, 10, 0.9, false),
            (63, 70, 0.9, true),
            (69, 70, 1.0, false),
            (70, 70, 1.0, true),
        ] {
            let case = format!("{succeeded} of {jobs}, {share}");
            assert_eq!(is_enough(succeeded, jobs, share), expected, "{case}");
        }
    }

    #[test]
    fn a_refusal_names_the_first_jobs_and_how_many_there_are() {
        let refusal = |n: usize| v1::Rejection {
            index: 0,
            id: format!("t{n}"),
            errors: vec![v1::FieldError {
                field: "mcp[0]".to_owned(),
                value: "x".to_owned(),
                rule: "must be configured".to_owned(),
            }],
        };
        let all: Vec<_> = (0..9).map(refusal).collect();
        let problem = refused(&"b".parse().unwrap(), &all);
        assert!(
            problem
                .message
                .contains("refused 9 jobs of batch b: t0: `mcp[0]` must")
        );
        assert!(problem.message.contains("t4:") && !problem.message.contains("t5:"));
    }
}
