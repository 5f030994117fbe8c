//! How far a training is, for people, and as numbers for telemetry.

use std::time::Duration;

use espalier_core::training::TrainProgress;
use espalier_runtime::telemetry;
use tokio::time::Instant;

use super::Tell;
use crate::report::History;

/// How often people are told.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Names in one message.
const NAMES_MAX: usize = 8;

/// Tells.
pub(super) struct Teller {
    steps: u64,
    peak_flops: Option<f64>,
    began: Instant,
    /// Steps that were done when it began.
    first: Option<u64>,
    told: Option<Instant>,
}

impl Teller {
    pub(super) fn new(steps: u64, peak_flops: Option<f64>) -> Self {
        Self {
            steps,
            peak_flops,
            began: Instant::now(),
            first: None,
            told: None,
        }
    }

    /// The share of the machine's peak that `flops` operations within `took` are.
    pub(super) fn peak_share(&self, flops: u64, took: Duration) -> Option<f64> {
        let share = flops as f64 / took.as_secs_f64() / self.peak_flops?;
        share.is_finite().then_some(share)
    }

    /// Tells of the last step of `history`, with `memory` bytes in use.
    pub(super) fn tell(&mut self, history: &History, memory: u64, tell: Tell<'_>) {
        let Some(step) = history.last() else { return };
        let first = *self.first.get_or_insert(step.step - 1);
        let each = self.began.elapsed().as_secs_f64() / (step.step - first) as f64;
        let left_s = each * self.steps.saturating_sub(step.step) as f64;
        let metrics = telemetry::metrics();
        metrics.train_step.record(step.step, &[]);
        metrics.train_loss.record(step.loss, &[]);
        metrics.train_grad_norm.record(step.grad_norm, &[]);
        metrics.train_tokens.add(step.tokens, &[]);
        metrics
            .train_tokens_per_second
            .record(step.tokens_per_s(), &[]);
        metrics.train_memory.record(memory, &[]);
        metrics.train_time_left.record(left_s, &[]);
        if let Some(share) = step.peak_share {
            metrics.train_peak_share.record(share, &[]);
        }
        if let Some(loss) = step.eval_loss {
            metrics.train_eval_loss.record(loss, &[]);
        }
        if self.told.is_some_and(|told| told.elapsed() < TELL_EVERY) && step.step < self.steps {
            return;
        }
        self.told = Some(Instant::now());
        let progress = TrainProgress {
            step: step.step,
            steps: self.steps,
            loss: step.loss,
            grad_norm: step.grad_norm,
            tokens_per_s: step.tokens_per_s(),
            eval_loss: history.last_eval(),
            peak_share: step.peak_share,
            memory_mib: Some(memory >> 20),
            left_s: Some(left_s as u64),
        };
        tell(&progress.to_string());
    }
}

/// Some names of samples, for a message.
pub(super) fn named<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(NAMES_MAX);
    let shown = names[..names.len() - more].join(", ");
    match more {
        0 => format!("one of the samples {shown}"),
        more => format!("one of the samples {shown} and {more} more"),
    }
}
