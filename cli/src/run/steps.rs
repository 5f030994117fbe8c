//! What each step does, from its batch to its record.

use std::time::Duration;

use espalier_adapters::list_one;
use espalier_core::adapter::LatestEntry;
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

use super::batches::{is_enough, times};
use super::drafts::alone;
use super::engine::{Engine, LOOK_EVERY, Stop};
use super::plan::{Known, Order, Work};
use super::records::Desk;
use super::screen::Begun;
use super::tally::Tally;
use crate::adapters::comparison::Comparison;
use crate::adapters::latest::{latest, made_latest, make_latest};
use crate::adapters::{Opened, Wanted};
use crate::evaluate::show::Read;
use crate::exit::Problem;
use crate::output::{count, plain};
use crate::submit::again;
use crate::{dataset, evaluate, json as shown, train};

/// Time between two looks at which versions there are, while one is waited for.
const FOLLOWED_EVERY: Duration = Duration::from_secs(15);

impl Engine<'_> {
    /// Tasks are tried by the model of the order. Dead rollouts stop nothing while enough came to an end.
    pub(super) async fn rollouts(
        &self,
        order: &Order,
        adapter: Option<&AdapterRef>,
        jobs: impl Fn() -> Vec<v1::JobSpec>,
    ) -> Result<Known, Stop> {
        let (batch, found) = self.find(order).await?;
        let is_under_way = found
            .as_ref()
            .is_some_and(|found| found.closed && !self.is_retried(found));
        if let Some(adapter) = adapter.filter(|_| !is_under_way) {
            self.wait_until_served(order, adapter).await?;
        }
        self.begin(order.at, &batch, found.as_ref(), &jobs).await?;
        let (tally, ended) = self.follow(order.at, &batch).await?;
        self.check_share(&batch, &tally)?;
        let output = match order.at.step {
            Step::Probe => {
                let (tasks, dropped) = tally.buckets(&jobs());
                StepOutput::Probe { tasks, dropped }
            }
            _ => StepOutput::Rollouts,
        };
        self.note(order, Some(&ended), times(&ended), tally.counts(), output)
            .await
    }

    /// What died says nothing of the model: a step of which too much did is not done.
    fn check_share(&self, batch: &BatchId, tally: &Tally) -> Result<(), Stop> {
        let StepCounts {
            succeeded, jobs, ..
        } = tally.counts();
        let dead = jobs - succeeded;
        if is_enough(succeeded, jobs, self.plan.min_share) {
            return Ok(());
        }
        let why = plain(tally.error().unwrap_or("nothing was submitted"));
        let message = match succeeded {
            0 => format!("every rollout of batch {batch} is dead, most of them because: {why}"),
            _ => format!(
                "{} of {} rollouts of batch {batch} are dead or cancelled, and {} % must come to an end (`rollouts.min_share`); most of \
                 them died because: {why}",
                count(dead),
                count(jobs),
                self.plan.min_share * 100.0
            ),
        };
        Err(again_retries(Problem::failed(message)).into())
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

    /// The version becomes `latest`, because of its comparison, unless it would take the place of one that it was not measured
    /// against. Repeating it changes nothing, also where somebody has taken it back since.
    pub(super) async fn publish(&self, order: &Order, share: Option<f64>) -> Result<Known, Stop> {
        let Work::Publish {
            adapter,
            against,
            comparison,
            ..
        } = &order.work
        else {
            return Err(Problem::failed("this step publishes nothing").into());
        };
        let started = SystemClock.now();
        let opened = Opened {
            store: self.desk.store.clone(),
            project: self.desk.project.clone(),
        };
        let current = latest(&opened, &adapter.name).current().await?;
        // The first version has none to stand beside.
        let beside = current.filter(|current| current.version != adapter.version);
        let canary = share.filter(|_| beside.is_some());
        let wanted = Wanted {
            name: adapter.name.clone(),
            version: Some(adapter.version),
        };
        let by = Comparison {
            batch: comparison.clone(),
            job: JobId::new(evaluate::JOB)?,
        };
        let entry = match made_latest(&opened, &wanted, &by, canary).await? {
            Some(entry) => entry,
            None => {
                let replaced =
                    beside.map(|current| format!("{}@v{}", adapter.name, current.version));
                let is_measured = |replaced: &String| canary.is_some() || replaced == against;
                if let Some(latest) = replaced.filter(|replaced| !is_measured(replaced)) {
                    return self
                        .leave(order, &unmeasured(adapter, &latest, against))
                        .await;
                }
                make_latest(&opened, &wanted, Some(&by), canary).await?.0
            }
        };
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
        let began = Instant::now();
        let mut checked: Option<Instant> = None;
        while self.endpoints(adapter).await? == 0 {
            if checked.is_none() {
                let what = format!("for an endpoint that serves {adapter}");
                self.screen.waits(order.at, &what)?;
            }
            if checked.is_none_or(|at| at.elapsed() >= FOLLOWED_EVERY) {
                self.check_followed(adapter).await?;
                checked = Some(Instant::now());
            }
            if began.elapsed() >= self.serve_deadline {
                return Err(self.unserved(adapter).into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(self.screen.past(order.at, "served")?)
    }

    /// Whether workers that follow the adapter serve this version, sooner or later.
    async fn check_followed(&self, adapter: &AdapterRef) -> Result<(), Stop> {
        let Desk { store, project, .. } = &self.desk;
        let listed = list_one(store, project, &adapter.name).await?;
        let newest = listed.and_then(|listed| listed.versions.last().copied());
        let opened = Opened {
            store: store.clone(),
            project: project.clone(),
        };
        let entry = latest(&opened, &adapter.name).current().await?;
        match newest.filter(|newest| !is_followed(adapter.version, *newest, entry.as_ref())) {
            None => Ok(()),
            Some(newest) => Err(outdated(adapter, newest).into()),
        }
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
             --follow {}/{}",
            self.plan.base,
            self.client.url,
            self.desk.store.url(),
            self.desk.project,
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
                    self.screen.handed_on(order.at);
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
                return self.check_share(batch, &tally);
            }
            Work::Dataset { .. } => dataset::build::JOB,
            Work::Train { .. } => train::JOB,
            Work::Comparison { .. } | Work::Publish { .. } => evaluate::JOB,
        };
        self.one_ended(order, batch, id).await.map(drop)
    }
}

/// Whether followers serve a version: the newest, and those that the entry names that counts.
fn is_followed(version: u32, newest: u32, entry: Option<&LatestEntry>) -> bool {
    let is_named = |entry: &LatestEntry| {
        let canary = entry.canary.map(|canary| canary.version);
        entry.version == version || canary == Some(version)
    };
    version == newest || entry.is_some_and(is_named)
}

/// Why a version does not take the place of another one.
fn unmeasured(adapter: &AdapterRef, latest: &str, against: &str) -> String {
    format!(
        "{latest} is latest, and {adapter} was measured against {against} alone: compare the two by `espalier evaluate --model \
         {latest} --model {adapter} --tasks FILE`, and let that decide with `espalier adapters promote {adapter} --comparison BATCH`"
    )
}

fn outdated(adapter: &AdapterRef, newest: u32) -> Problem {
    let name = &adapter.name;
    let message = format!(
        "nobody serves {adapter}, and nobody will: who follows {name} serves its newest version, which is {name}@v{newest}, and \
         what is latest"
    );
    Problem::failed(message).fix(format!(
        "train it anew, which makes it the newest one: espalier run FILE --again train; or load {adapter} into a worker by hand, \
         and run it again"
    ))
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

#[cfg(test)]
mod tests {
    use espalier_core::adapter::{Canary, Why};
    use espalier_core::time::Timestamp;

    use super::*;

    #[test]
    fn followers_serve_the_newest_version_and_those_that_the_log_names() {
        let entry = |version, canary: Option<u32>| LatestEntry {
            record_version: 1,
            name: "shop".parse().unwrap(),
            seq: 1,
            version,
            canary: canary.map(|version| Canary {
                version,
                share: 0.1,
            }),
            why: Why::Hand,
            created_at_us: Timestamp(0),
        };
        let both = entry(1, Some(2));
        for (version, expected) in [(1, true), (2, true), (3, false), (4, true)] {
            assert_eq!(is_followed(version, 4, Some(&both)), expected, "{version}");
        }
        assert!(is_followed(4, 4, None) && !is_followed(3, 4, None));
        assert!(!is_followed(3, 4, Some(&entry(2, None))));
    }
}
