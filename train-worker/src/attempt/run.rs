//! Steps until the last one, with measurements, reports and checkpoints between them.

use std::time::Duration;

use espalier_runtime::tasks::blocking;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::tell::{Teller, named};
use super::{Bench, Tell, Training, Workshop};
use crate::checkpoint::{Best, Kept, Place, Snapshot, save};
use crate::data::Cursor;
use crate::engine::{DocumentLoss, Documents, EngineError, StepReport};
use crate::error::TrainError;
use crate::report::Step;
use crate::schedule::learning_rate;

/// A checkpoint on its way to the store, beside the steps.
#[derive(Default)]
struct Saving {
    running: Option<BoxFuture<'static, Result<u64, TrainError>>>,
    kept: Kept,
}

/// A step that was done.
struct Done {
    report: StepReport,
    tokens: u64,
    next: Cursor,
    memory: u64,
}

impl Workshop {
    /// Trains to the last step. The checkpoint after it is stored.
    ///
    /// # Errors
    /// [`TrainError::Preempted`]: the process drains, and the checkpoint after the last step that was done is stored.
    pub(super) async fn run(
        &self,
        training: &mut Training,
        tell: Tell<'_>,
    ) -> Result<(), TrainError> {
        let mut saving = Saving::default();
        let ended = self.steps(training, &mut saving, tell).await;
        // However it ended, what is on its way is worth keeping.
        let stored = saving.finish(training).await;
        match ended {
            Ok(()) | Err(TrainError::Preempted { .. }) => stored.and(ended),
            Err(error) => Err(training.with_checkpoint(error)),
        }
    }

    async fn steps(
        &self,
        training: &mut Training,
        saving: &mut Saving,
        tell: Tell<'_>,
    ) -> Result<(), TrainError> {
        let mut teller = Teller::new(training.steps, self.loader.peak_flops());
        while training.step() < training.steps {
            if self.shutdown.is_draining() {
                training.checkpoint(saving).await?;
                let step = training.step();
                return Err(TrainError::Preempted { step });
            }
            let is_better = self.next(training, saving, &mut teller, tell).await?;
            let step = training.step();
            let is_due = step.is_multiple_of(training.spec.settings.checkpoint_every);
            if is_due || is_better || step == training.steps {
                training.checkpoint(saving).await?;
            }
        }
        Ok(())
    }

    /// One step, and the measurement after it where one is due. Whether it is the best so far.
    async fn next(
        &self,
        training: &mut Training,
        saving: &mut Saving,
        teller: &mut Teller,
        tell: Tell<'_>,
    ) -> Result<bool, TrainError> {
        let began = Instant::now();
        let step = training.step() + 1;
        let settings = &training.spec.settings;
        let lr = learning_rate(settings, step - 1, training.steps);
        let is_measured = step == training.steps
            || (settings.eval_every > 0 && step.is_multiple_of(settings.eval_every));
        let cursor = training.cursor;
        let done = training.compute(saving, move |bench| bench.step(cursor, step, lr));
        let done = done.await?;
        let took = began.elapsed();
        let eval_loss = match is_measured {
            true => {
                training
                    .compute(saving, move |bench| bench.measure(step))
                    .await?
            }
            false => None,
        };
        let row = Step {
            step,
            loss: done.report.loss,
            grad_norm: done.report.grad_norm,
            lr,
            tokens: done.tokens,
            supervised: done.report.supervised_tokens,
            took_ms: millis(took),
            at_s: self.clock.now().0 as f64 / 1e6,
            peak_share: teller.peak_share(done.report.flops, took),
            eval_loss,
        };
        training.cursor = done.next;
        training.totals.tokens += row.tokens;
        training.totals.supervised_tokens += row.supervised;
        training.totals.wall_ms += millis(began.elapsed());
        training.history.push(row);
        teller.tell(&training.history, done.memory, tell);
        Ok(training.note_best(eval_loss))
    }
}

impl Training {
    /// Lets the bench work on a thread that may block, and the checkpoint go on meanwhile.
    async fn compute<T: Send + 'static>(
        &mut self,
        saving: &mut Saving,
        work: impl FnOnce(&mut Bench) -> Result<T, TrainError> + Send + 'static,
    ) -> Result<T, TrainError> {
        let Some(mut bench) = self.bench.take() else {
            return Err(TrainError::Stopped);
        };
        let mut computing = Box::pin(blocking("train.compute", move || {
            let worked = work(&mut bench);
            (bench, worked)
        }));
        let computed = loop {
            tokio::select! {
                biased;
                computed = &mut computing => break computed,
                saved = saving.next() => saving.saved(self, saved?).await,
            }
        };
        let (bench, worked) = computed?;
        self.bench = Some(bench);
        worked
    }

    /// Takes a snapshot and begins to store it. One that is still on its way is waited for: there is memory for one.
    async fn checkpoint(&mut self, saving: &mut Saving) -> Result<(), TrainError> {
        saving.finish(self).await?;
        let step = self.step();
        if step == 0 || self.checkpoint == Some(step) {
            return Ok(());
        }
        let state = self
            .compute(saving, |bench| Ok(bench.trainer.state()?))
            .await?;
        let snapshot = Snapshot {
            spec: self.digest.clone(),
            base_sha256: self.base.sha256.clone(),
            data_sha256: self.data_sha256.clone(),
            cursor: self.cursor,
            totals: self.totals,
            best: self.best,
            agreement: self.agreement.clone(),
            state,
            history: self.history.clone(),
        };
        let (place, name) = (self.place.clone(), self.spec.adapter.to_string());
        let kind = super::publish::kind_of(&self.spec.settings.method);
        saving.running = Some(Box::pin(async move {
            let reports = super::publish::Reports::of(&snapshot.history, &name, kind);
            save(&place, snapshot).await?;
            reports.store_for_people(&place).await;
            Ok(step)
        }));
        Ok(())
    }

    /// Notes what the held-out samples say. Whether it is the best so far.
    fn note_best(&mut self, eval_loss: Option<f64>) -> bool {
        let Some(eval_loss) = eval_loss else {
            return false;
        };
        let is_better = self.best.is_none_or(|best| eval_loss < best.eval_loss);
        if is_better {
            self.best = Some(Best {
                fence: self.place.fence,
                step: self.step(),
                eval_loss,
            });
        }
        is_better
    }

    fn with_checkpoint(&self, error: TrainError) -> TrainError {
        match error {
            TrainError::NotFinite { step, samples, .. } => TrainError::NotFinite {
                step,
                samples,
                checkpoint: self.checkpoint,
            },
            other => other,
        }
    }
}

impl Saving {
    /// The end of what is on its way; never, where nothing is.
    async fn next(&mut self) -> Result<u64, TrainError> {
        let saved = match &mut self.running {
            Some(running) => running.await,
            None => std::future::pending().await,
        };
        self.running = None;
        saved
    }

    /// A checkpoint is stored: those that are no more wanted go.
    async fn saved(&mut self, training: &mut Training, step: u64) {
        training.checkpoint = Some(step);
        tracing::info!(job = %training.place.key, step, "checkpoint stored");
        let best = training
            .best
            .filter(|best| best.fence == training.place.fence);
        let keep = training.spec.settings.keep_checkpoints;
        let gone = self.kept.stored(step, keep, best.map(|best| best.step));
        for step in gone {
            remove(&training.place, step).await;
        }
    }

    async fn finish(&mut self, training: &mut Training) -> Result<(), TrainError> {
        if self.running.is_some() {
            let step = self.next().await?;
            self.saved(training, step).await;
        }
        Ok(())
    }
}

/// One that stays costs room and nothing else.
async fn remove(place: &Place, step: u64) {
    if let Err(error) = place.remove(step).await {
        let error = espalier_runtime::telemetry::error_chain(&error);
        tracing::warn!(job = %place.key, step, error, "an old checkpoint stays");
    }
}

impl Bench {
    fn step(&mut self, cursor: Cursor, step: u64, lr: f64) -> Result<Done, TrainError> {
        let (micros, next) = self.order.step(cursor);
        let packed: Vec<_> = micros
            .iter()
            .map(|micro| self.samples.pack(micro))
            .collect();
        let documents: Vec<Documents<'_>> =
            packed.iter().map(|packed| packed.documents()).collect();
        let not_finite = |samples: String| TrainError::NotFinite {
            step,
            samples,
            checkpoint: None,
        };
        let report = self
            .trainer
            .step(&documents, lr)
            .map_err(|error| match error {
                EngineError::LossNotFinite {
                    micro, document, ..
                } => {
                    let index = micros.get(micro).and_then(|micro| micro.get(document));
                    let name = index.map(|index| self.samples.name(*index));
                    not_finite(format!("sample `{}`", name.unwrap_or_default()))
                }
                EngineError::GradientNotFinite { .. } => not_finite(named(
                    micros.iter().flatten().map(|i| self.samples.name(*i)),
                )),
                other => other.into(),
            })?;
        if !(report.loss.is_finite() && report.grad_norm.is_finite()) {
            let names = micros.iter().flatten().map(|i| self.samples.name(*i));
            return Err(not_finite(named(names)));
        }
        Ok(Done {
            report,
            tokens: packed.iter().map(|packed| packed.tokens() as u64).sum(),
            next,
            memory: self.trainer.memory(),
        })
    }

    /// Mean loss of the held-out samples; none: there are none.
    fn measure(&mut self, step: u64) -> Result<Option<f64>, TrainError> {
        let Some(held_out) = &self.held_out else {
            return Ok(None);
        };
        let (mut sum, mut count) = (0.0, 0);
        for indices in held_out.batches(self.tokens_max) {
            let packed = held_out.pack(&indices);
            let losses = self.trainer.evaluate(packed.documents())?;
            for (index, DocumentLoss { sum: loss, tokens }) in indices.iter().zip(losses) {
                if !loss.is_finite() {
                    return Err(TrainError::NotFinite {
                        step,
                        samples: format!("held-out sample `{}`", held_out.name(*index)),
                        checkpoint: None,
                    });
                }
                sum += loss;
                count += tokens;
            }
        }
        Ok(Some(sum / count as f64))
    }
}

fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}
