//! What each step does, from its batch to its record.

use espalier_core::dataset::NOTHING_LEFT;
use espalier_core::id::{BatchId, JobId};
use espalier_core::layout;
use espalier_core::pipeline::{Step, StepCounts, StepOutput};
use espalier_core::spec::{AdapterRef, DatasetRef, JobDraft};
use espalier_core::trace::sha256_hex;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::datasets::Datasets;
use tokio::time::Instant;

use super::batches::times;
use super::drafts::alone;
use super::engine::{Engine, LOOK_EVERY, Stop};
use super::plan::{Known, Order, Work};
use super::screen::Begun;
use super::tally::Tally;
use crate::adapters::comparison::Comparison;
use crate::adapters::latest::{latest, make_latest};
use crate::adapters::{Opened, Wanted};
use crate::evaluate::show::Read;
use crate::exit::Problem;
use crate::output::plain;
use crate::submit::again;
use crate::{dataset, evaluate, json as shown, train};

impl Engine<'_> {
    /// Tasks are tried by the model of the order. Dead rollouts stop nothing while one came out.
    pub(super) async fn rollouts(
        &self,
        order: &Order,
        adapter: Option<&AdapterRef>,
        jobs: impl FnOnce() -> Vec<v1::JobSpec>,
    ) -> Result<Known, Stop> {
        let (batch, found) = self.find(order).await?;
        let is_there = found.as_ref().is_some_and(|found| found.closed);
        if let Some(adapter) = adapter.filter(|_| !is_there) {
            self.wait_until_served(order, adapter).await?;
        }
        self.begin(order.at, &batch, found.as_ref(), jobs).await?;
        let (tally, ended) = self.follow(order.at, &batch).await?;
        let output = self.tried(order, &batch, &tally)?;
        self.note(order, Some(&ended), times(&ended), tally.counts(), output)
            .await
    }

    /// What rollouts leave.
    fn tried(&self, order: &Order, batch: &BatchId, tally: &Tally) -> Result<StepOutput, Stop> {
        if tally.counts().succeeded == 0 {
            let why = tally.error().unwrap_or("nothing was submitted");
            let message = format!(
                "every rollout of batch {batch} is dead, most of them because: {}",
                plain(why)
            );
            return Err(again_retries(Problem::failed(message)).into());
        }
        if order.at.step != Step::Probe {
            return Ok(StepOutput::Rollouts);
        }
        let (tasks, dropped) = tally.buckets();
        Ok(StepOutput::Probe { tasks, dropped })
    }

    /// Traces become a data set.
    pub(super) async fn dataset(&self, order: &Order, draft: JobDraft) -> Result<Known, Stop> {
        let (batch, job, key) = self.one(order, &draft, dataset::build::JOB).await?;
        let datasets = Datasets::new(self.desk.store.clone(), self.desk.project.clone());
        let name = self.plan.pipeline.as_str().parse()?;
        let version = datasets.of_job(&name, &key).await?;
        let version = version.ok_or_else(|| unseen(&key))?;
        let path = layout::dataset_version(&self.desk.project, &name, version.n);
        let output = StepOutput::Dataset {
            dataset: DatasetRef {
                name,
                version: version.n,
            },
            sha256: sha256_hex(&self.desk.store.get(&path).await?),
            train_rows: version.summary.train_rows,
            eval_rows: version.summary.eval_rows,
            tokens: version.summary.tokens,
        };
        self.note(order, Some(&batch), times(&batch), counts(&job), output)
            .await
    }

    /// A data set becomes a version of an adapter.
    pub(super) async fn train(&self, order: &Order, draft: JobDraft) -> Result<Known, Stop> {
        let (batch, job, key) = self.one(order, &draft, train::JOB).await?;
        let name = self.plan.pipeline.as_str().parse()?;
        let version = train::version_of(&self.desk.store, &key, &name).await?;
        let version = version.ok_or_else(|| unseen(&key))?;
        let path = layout::adapter_version(&self.desk.project, &name, version.n);
        let output = StepOutput::Adapter {
            adapter: AdapterRef {
                name,
                version: version.n,
            },
            sha256: sha256_hex(&self.desk.store.get(&path).await?),
            steps: version.training.steps,
            tokens: version.training.tokens,
            loss: version.training.loss,
            eval_loss: version.training.eval_loss,
            agreement: version.training.agreement,
        };
        self.note(order, Some(&batch), times(&batch), counts(&job), output)
            .await
    }

    /// Two models are compared.
    pub(super) async fn comparison(&self, order: &Order, draft: JobDraft) -> Result<Known, Stop> {
        let (batch, job, key) = self.one(order, &draft, evaluate::JOB).await?;
        let read = Read::of(&self.desk.store, &key).await?;
        let group = &read.report.comparison.pooled;
        let output = StepOutput::Comparison {
            report: read.path(),
            sha256: read.sha256.clone(),
            tasks: group.tasks,
            before: group.success.before,
            after: group.success.after,
            difference: group.difference,
            passed: read.report.gate.passed,
            verdict: read.report.gate.words.clone(),
        };
        self.note(order, Some(&batch), times(&batch), counts(&job), output)
            .await
    }

    /// The version becomes `latest`, because of its comparison. Repeating it changes nothing.
    pub(super) async fn publish(
        &self,
        order: &Order,
        adapter: &AdapterRef,
        comparison: &BatchId,
        share: Option<f64>,
    ) -> Result<Known, Stop> {
        let started = SystemClock.now();
        let opened = Opened {
            store: self.desk.store.clone(),
            project: self.desk.project.clone(),
        };
        let current = latest(&opened, &adapter.name).current().await?;
        // The first version has none to stand beside.
        let is_beside = current.is_some_and(|current| current.version != adapter.version);
        let canary = share.filter(|_| is_beside);
        let wanted = Wanted {
            name: adapter.name.clone(),
            version: Some(adapter.version),
        };
        let comparison = Comparison {
            batch: comparison.clone(),
            job: JobId::new(evaluate::JOB)?,
        };
        let (entry, _) = make_latest(&opened, &wanted, Some(&comparison), canary).await?;
        let output = StepOutput::Published {
            adapter: adapter.clone(),
            canary,
            seq: entry.seq,
        };
        let times = (started, SystemClock.now());
        self.note(order, None, times, StepCounts::default(), output)
            .await
    }

    /// The version stays what it is.
    pub(super) async fn leave(&self, order: &Order, why: &str) -> Result<Known, Stop> {
        let output = StepOutput::Unpublished {
            why: why.to_owned(),
        };
        let now = SystemClock.now();
        self.note(order, None, (now, now), StepCounts::default(), output)
            .await
    }

    /// The only job of a step, done well.
    async fn one(
        &self,
        order: &Order,
        draft: &JobDraft,
        id: &str,
    ) -> Result<(v1::Batch, v1::Job, espalier_core::id::JobKey), Stop> {
        let (batch, found) = self.find(order).await?;
        self.begin(order.at, &batch, found.as_ref(), || alone(draft))
            .await?;
        self.one_ended(order, &batch, id).await
    }

    async fn one_ended(
        &self,
        order: &Order,
        batch: &BatchId,
        id: &str,
    ) -> Result<(v1::Batch, v1::Job, espalier_core::id::JobKey), Stop> {
        let (job, key, ended) = self.follow_one(order.at, batch, id).await?;
        if job.state() == v1::JobState::Succeeded {
            return Ok((ended, job, key));
        }
        let why = job.last_error.as_ref().map_or("", |error| &error.message);
        if why.starts_with(NOTHING_LEFT) {
            return Err(Stop::Nothing(plain(why)));
        }
        let state = shown::state(job.state());
        let message = format!("job {batch}/{id} is {state}: {}", plain(why));
        Err(again_retries(Problem::failed(message)).into())
    }

    /// Waits until somebody serves a version of the pipeline's adapter.
    async fn wait_until_served(&self, order: &Order, adapter: &AdapterRef) -> Result<(), Stop> {
        let ends = Instant::now() + self.serve_deadline;
        let mut is_told = false;
        while self.endpoints(adapter).await? == 0 {
            if !is_told {
                let what = format!("for an endpoint that serves {adapter}");
                self.screen.waits(order.at, &what)?;
                is_told = true;
            }
            if Instant::now() >= ends {
                return Err(self.unserved(adapter).into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(self.screen.past(order.at, "served")?)
    }

    async fn endpoints(&self, adapter: &AdapterRef) -> Result<u32, Problem> {
        let request = v1::GetModelRequest {
            name: adapter.to_string(),
        };
        let model = again(&self.client, || {
            let (mut models, request) = (self.client.models(), request.clone());
            async move { models.get_model(request).await }
        });
        Ok(model.await?.endpoints)
    }

    fn unserved(&self, adapter: &AdapterRef) -> Problem {
        let message = format!(
            "nobody served {adapter} within {} s (`serve.deadline_s`)",
            self.serve_deadline.as_secs()
        );
        Problem::failed(message).fix(format!(
            "start an inference worker, and run it again: espalier-infer-worker --model {} --coordinator-url {} --store-url {} \
             --follow {}",
            self.plan.base,
            self.client.url,
            self.desk.store.url(),
            adapter.name
        ))
    }

    /// Somebody else runs the pipeline: what comes of a step is theirs to write down.
    pub(super) async fn look_on(&self, order: &Order) -> Result<Known, Stop> {
        let mut followed = None;
        loop {
            if let Some(known) = self.desk.step(&order.digest).await? {
                return Ok(known);
            }
            if !matches!(order.work, Work::Publish { .. }) {
                let (batch, found) = self.find(order).await?;
                let is_new = found.is_some() && followed.as_ref() != Some(&batch);
                if is_new {
                    self.follow_on(order, &batch).await?;
                    followed = Some(batch);
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn follow_on(&self, order: &Order, batch: &BatchId) -> Result<(), Stop> {
        let planned = self.plan.step(order.at.step).map_or(0, |step| step.jobs);
        self.screen
            .begun(order.at, batch, planned, Begun::Attached)?;
        let id = match &order.work {
            Work::Rollouts { .. } => {
                let (tally, _) = self.follow(order.at, batch).await?;
                return self.tried(order, batch, &tally).map(drop);
            }
            Work::Dataset { .. } => dataset::build::JOB,
            Work::Train { .. } => train::JOB,
            Work::Comparison { .. } | Work::Publish { .. } => evaluate::JOB,
        };
        self.one_ended(order, batch, id).await.map(drop)
    }
}

/// What a job that is no rollout came to.
fn counts(job: &v1::Job) -> StepCounts {
    let is_done = u64::from(job.state() == v1::JobState::Succeeded);
    StepCounts {
        jobs: 1,
        succeeded: is_done,
        dead: 1 - is_done,
        ..StepCounts::default()
    }
}

fn again_retries(problem: Problem) -> Problem {
    problem.fix("put that right; the same command again retries the step, and does nothing twice that has ended")
}

fn unseen(key: &espalier_core::id::JobKey) -> Problem {
    Problem::failed(format!("the version of {key} is not in the store"))
        .fix("name the coordinator's store with --store URL")
}
