//! The batch of an evaluation: its jobs are submitted, and what comes of the one that compares is told.

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey};
use espalier_core::spec::{CompareDraft, JobDraft, limits};
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::store::Store;
use serde_json::{Value, json};

use super::show::Read;
use super::{Evaluate, JOB, Replay, check_count, forced, recorded};
use crate::client::Client;
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::expand::{Expanded, chunks};
use crate::output::{count, facts, note, plain};
use crate::submit::file::Refusal;
use crate::submit::{again, close_batch, open, refusal_json, refusal_table};
use crate::waiting;
use crate::{json as shown, uploads};

/// What became of the jobs.
pub(super) struct Submitted {
    /// Rollouts that are in the queue.
    rollouts: u64,
    pub(super) refusals: Vec<Refusal>,
    /// Tasks of another split.
    skipped: u64,
    /// What compares them, should it have to be done again.
    compare: CompareDraft,
}

/// An evaluation that is asked for.
pub(super) struct Evaluation<'a> {
    pub(super) context: &'a Context,
    pub(super) client: Client,
    pub(super) store: Store,
    /// The job that compares.
    pub(super) key: JobKey,
}

impl Evaluation<'_> {
    /// What is done without servers; without `--replay` the tasks as they are.
    pub(super) async fn replayed(
        &self,
        args: &Evaluate,
        models: &[String; 2],
        mut tasks: Expanded,
    ) -> Result<Expanded, Problem> {
        let Some(replay) = args.replay else {
            return Ok(tasks);
        };
        let recorded = recorded::find(&self.store, &self.key.project, &args.from).await?;
        match replay {
            Replay::Recorded => {
                let cut = recorded::name(&mut tasks, &recorded, &args.from);
                if cut > 0 {
                    let max = limits::LIST_MAX;
                    note(format!(
                        "{} tasks have more than {max} recordings: the first {max} of each are used",
                        count(cut as u64)
                    ));
                }
            }
            Replay::TeacherForced => tasks = forced::jobs(args, models, &recorded)?,
        }
        check_count(args, &tasks)?;
        Ok(tasks)
    }

    /// Repeating it changes nothing.
    pub(super) async fn submit(
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

    pub(super) fn tell_submitted(
        &self,
        submitted: &Submitted,
        detach: bool,
    ) -> Result<(), Problem> {
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
    pub(super) async fn finish(&self, args: &Evaluate, submitted: &Submitted) -> Outcome {
        let mut key = self.key.clone();
        let mut job = waiting::job(&self.client, &key).await?;
        if job.state() == v1::JobState::Dead && job.attempts == 0 {
            key = self.compare_rest(submitted).await?;
            note(format!(
                "some rollouts are dead, and the comparison with them: what is there is compared without them, as {}, which is also \
                 what `adapters promote --comparison` takes",
                key.batch
            ));
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
        if args.replay == Some(Replay::TeacherForced) {
            let read = Read::of_turns(&self.store, &key).await?;
            let text = read.to_text(self.store.url(), args.out.as_ref());
            self.tell(args, &read, read.to_json(), text)?;
            return Ok(Exit::Ok);
        }
        let read = Read::of(&self.store, &key).await?;
        let text = read.to_text(self.store.url(), args.out.as_ref());
        self.tell(args, &read, read.to_json(), text)?;
        Ok(match args.gate && !read.report.gate.passed {
            true => Exit::Failed,
            false => Exit::Ok,
        })
    }

    fn tell<R>(
        &self,
        args: &Evaluate,
        read: &Read<R>,
        value: Value,
        text: String,
    ) -> Result<(), Problem> {
        if let Some(folder) = &args.out {
            read.write(folder)?;
        }
        let out = &self.context.out;
        match out.json {
            true => out.event(&json!({ "evaluation": value }))?,
            false => out.line(text)?,
        }
        Ok(())
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
