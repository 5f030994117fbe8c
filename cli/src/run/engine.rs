//! A pipeline from where it is to where it ends. What is next is [`plan`](super::plan)'s; here steps are begun as soon as they
//! can be, side by side where they can be, and what they come to is noted. Nothing is held but a connection: whoever runs a
//! pipeline may be killed at any moment.

use std::collections::BTreeSet;
use std::time::Duration;

use espalier_core::pipeline::{STEP_RECORD_VERSION, StepCounts, StepOutput, StepRecord};
use espalier_core::time::Timestamp;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use super::batches::of_counts;
use super::drafts::Drafts;
use super::plan::{At, End, Known, Order, Records, Resolved, Work};
use super::records::Desk;
use super::screen::{DRAW_EVERY, Screen};
use crate::client::Client;
use crate::context::Context;
use crate::exit::Problem;

/// Time between two looks at what is no stream.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time between two signs of whoever runs a pipeline.
const BEAT_EVERY: Duration = Duration::from_secs(10);
/// How long who looks on waits for one of them, while nothing else of the pipeline moves.
const SILENCE_MAX: Duration = Duration::from_secs(40);

/// What runs a pipeline, or looks on.
pub struct Engine<'a> {
    /// Where to say what.
    pub context: &'a Context,
    /// The way to the coordinator.
    pub client: Client,
    /// What is written down.
    pub desk: Desk,
    /// What is to be done.
    pub plan: &'a espalier_core::pipeline::PipelinePlan,
    /// What steps submit; none: somebody else runs the pipeline, and here nothing is done but to look on.
    pub drafts: Option<&'a Drafts>,
    /// How long a version may take to be served.
    pub serve_deadline: Duration,
    /// Where it is shown.
    pub screen: &'a Screen<'a>,
}

/// How it came to an end.
#[derive(Debug)]
pub enum Ended {
    /// In good order.
    Well(End),
    /// A step has nothing to go on with, which is nobody's failure.
    Nothing {
        /// The step.
        at: At,
        /// Why.
        why: String,
    },
    /// A step failed.
    Failed {
        /// The step.
        at: At,
        /// Why, and what to do.
        problem: Problem,
    },
    /// Nobody runs it, and none of its jobs is under way.
    Unattended,
}

/// Why a step has no record.
#[derive(Debug)]
pub enum Stop {
    /// There is nothing to go on with.
    Nothing(String),
    /// It failed.
    Failed(Problem),
}

impl<E: Into<Problem>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Engine<'_> {
    /// Goes on from `records` until it ends, and leaves in them what it came to.
    pub async fn run(&self, records: &mut Records) -> Result<Ended, Problem> {
        self.screen
            .resolved(&Resolved::new(self.plan, records), true)?;
        let mut going = Box::pin(self.go(records));
        let mut beside = Box::pin(self.beside());
        let mut ticks = tokio::time::interval(DRAW_EVERY);
        let ended = loop {
            tokio::select! {
                ended = &mut going => break ended,
                ended = &mut beside => break ended,
                _ = ticks.tick() => self.screen.draw(),
            }
        };
        drop(going);
        self.screen.leave();
        ended
    }

    /// Who runs the pipeline says so all the time; who looks on does so until nobody runs it.
    async fn beside(&self) -> Result<Ended, Problem> {
        if self.drafts.is_none() {
            silence(&self.desk, || self.screen.is_running()).await?;
            return Ok(Ended::Unattended);
        }
        loop {
            // Another one follows one that is lost.
            let _ = self.desk.beat(SystemClock.now()).await;
            tokio::time::sleep(BEAT_EVERY).await;
        }
    }

    /// Shows once how far the steps are whose jobs are under way.
    pub async fn look(&self, records: &Records) -> Result<(), Problem> {
        for order in Resolved::new(self.plan, records).ready() {
            if matches!(order.work, Work::Publish { .. }) {
                continue;
            }
            if let (_, Some(found)) = self.find(&order).await? {
                self.screen.running(order.at, of_counts(&found))?;
            }
        }
        Ok(())
    }

    async fn go(&self, records: &mut Records) -> Result<Ended, Problem> {
        let mut begun = BTreeSet::new();
        let mut steps = FuturesUnordered::new();
        loop {
            let resolved = Resolved::new(self.plan, records);
            if let Some(end) = resolved.end() {
                return Ok(Ended::Well(end));
            }
            for order in resolved.ready() {
                if begun.insert(order.at) {
                    let at = order.at;
                    steps.push(async move { (at, Box::pin(self.step(order)).await) });
                }
            }
            match steps.next().await {
                Some((at, Ok(known))) => {
                    self.screen.ended(at, &known.record, false)?;
                    records.insert(known.record.digest.clone(), known);
                }
                Some((at, Err(Stop::Nothing(why)))) => {
                    self.screen.stopped(at, &why)?;
                    return Ok(Ended::Nothing { at, why });
                }
                Some((at, Err(Stop::Failed(problem)))) => {
                    self.screen.stopped(at, &problem.message)?;
                    return Ok(Ended::Failed { at, problem });
                }
                None => return Err(Problem::failed("no step of the pipeline can begin")),
            }
        }
    }

    /// One step, to its record.
    async fn step(&self, order: Order) -> Result<Known, Stop> {
        // Somebody else may have ended it since.
        if let Some(known) = self.desk.step(&order.digest).await? {
            return Ok(known);
        }
        let Some(drafts) = self.drafts else {
            return self.look_on(&order).await;
        };
        match &order.work {
            Work::Rollouts {
                model,
                adapter,
                dropped,
            } => {
                let jobs = || drafts.rollouts(order.at.step, model, dropped);
                self.rollouts(&order, adapter.as_ref(), jobs).await
            }
            Work::Dataset { batches } => self.dataset(&order, drafts.dataset(batches)).await,
            Work::Train { dataset, by_base } => {
                self.train(&order, drafts.train(dataset, by_base)).await
            }
            Work::Comparison {
                before,
                after,
                training,
            } => {
                let training = format!("{training}/{}", crate::train::JOB);
                let draft = drafts.comparison([before, after], &training);
                self.comparison(&order, draft).await
            }
            Work::Publish {
                passed, verdict, ..
            } => {
                let publish = drafts.publish;
                match (*passed, publish.enabled) {
                    (true, true) => self.publish(&order, publish.canary).await,
                    (true, false) => self.leave(&order, "`publish.enabled` is false").await,
                    (false, _) => self.leave(&order, verdict).await,
                }
            }
        }
    }

    /// Writes down what a step came to, in `batch` where it had one.
    pub(super) async fn note(
        &self,
        order: &Order,
        batch: Option<&v1::Batch>,
        times: (Timestamp, Timestamp),
        counts: StepCounts,
        output: StepOutput,
    ) -> Result<Known, Stop> {
        let batch = batch.map(|batch| batch.batch.parse()).transpose()?;
        let record = StepRecord {
            record_version: STEP_RECORD_VERSION,
            pipeline: self.plan.pipeline.clone(),
            digest: order.digest.clone(),
            step: order.at.step,
            round: order.at.round,
            batch,
            inputs: order.inputs.clone(),
            started_at_us: times.0,
            ended_at_us: times.1,
            counts,
            output,
        };
        Ok(self.desk.create(&record).await?)
    }
}

/// Waits until whoever runs the pipeline was not heard for a while, in which none of its jobs was under way.
async fn silence(desk: &Desk, is_running: impl Fn() -> bool) -> Result<(), Problem> {
    let (mut heard, mut since) = (None, Instant::now());
    loop {
        let now = desk.heard().await?;
        if now != heard || is_running() {
            (heard, since) = (now, Instant::now());
        }
        if since.elapsed() >= SILENCE_MAX {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::records::tests::desk;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_looks_on_ends_a_while_after_nobody_is_heard_and_nothing_runs() {
        let desk = desk().await;
        desk.beat(Timestamp(1)).await.unwrap();
        let began = Instant::now();
        let works = Duration::from_secs(100);
        silence(&desk, || began.elapsed() < works).await.unwrap();
        assert!(began.elapsed() >= works + SILENCE_MAX - LOOK_EVERY);
        let began = Instant::now();
        let beats = async {
            for n in 2..10 {
                desk.beat(Timestamp(n)).await.unwrap();
                tokio::time::sleep(BEAT_EVERY).await;
            }
        };
        let (_, silent) = tokio::join!(beats, silence(&desk, || false));
        silent.unwrap();
        assert!(began.elapsed() >= 7 * BEAT_EVERY + SILENCE_MAX);
    }
}
