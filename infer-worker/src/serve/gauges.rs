//! Measures the engine every few seconds: what waits, what runs, how full the memory for keys and values is.

use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::telemetry::{metrics, names::attribute};
use opentelemetry::KeyValue;

use super::backend::Served;
use crate::engine::Snapshot;

/// Time between two looks; exports are rarer.
const INTERVAL: Duration = Duration::from_secs(5);

/// Measures until the process aborts.
pub(super) async fn run(served: Arc<Served>, shutdown: Shutdown) {
    let label = [KeyValue::new(
        attribute::GEN_AI_REQUEST_MODEL,
        served.base.name.clone(),
    )];
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut before = Snapshot::default();
    // Once more at the end, or what was counted last would be lost.
    let mut is_over = false;
    while !is_over {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.aborted() => is_over = true,
        }
        let now = served.engine.snapshot();
        record(&before, &now, &label);
        before = now;
    }
}

fn record(before: &Snapshot, now: &Snapshot, label: &[KeyValue]) {
    let metrics = metrics();
    let (was, is) = (&before.scheduler, &now.scheduler);
    metrics.infer_waiting.record(now.queued as u64, label);
    metrics.infer_running.record(is.running as u64, label);
    metrics.infer_batch_rows.record(is.step_rows as u64, label);
    let share = f64::from(is.kv_blocks_used) / f64::from(is.kv_blocks.max(1));
    metrics.infer_kv_used.record(share, label);
    metrics
        .infer_preemptions
        .add(is.preemptions - was.preemptions, label);
    metrics
        .infer_prefix_queries
        .add(is.prompt_tokens - was.prompt_tokens, label);
    metrics
        .infer_prefix_hits
        .add(is.cached_tokens - was.cached_tokens, label);
}
