//! Measures the queue every few seconds: depth by project and state, and the age of the oldest ready job.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::queue::{QueueStats, StateName};
use espalier_runtime::telemetry::{metrics, names::attribute};
use opentelemetry::KeyValue;

use crate::api::Shared;
use crate::session;

/// Time between two looks; exports are rarer.
const INTERVAL: Duration = Duration::from_secs(5);

/// Measures until the process aborts.
pub async fn run(shared: Arc<Shared>) {
    // Told from the start, so that the first one is an increase.
    metrics().queue_failovers.add(0, &[]);
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        match shared.queue.stats().await {
            Ok(stats) => record(&stats),
            Err(error) => tracing::debug!(error = %error, "the queue could not be measured"),
        }
    }
}

fn record(stats: &QueueStats) {
    let mut oldest: BTreeMap<&str, Duration> = BTreeMap::new();
    for line in &stats.lines {
        let age = oldest.entry(line.project.as_str()).or_default();
        *age = (*age).max(line.oldest_ready.unwrap_or_default());
        for state in StateName::ALL {
            let labels = [
                KeyValue::new(attribute::PROJECT, line.project.to_string()),
                KeyValue::new(attribute::JOB_KIND, line.kind.as_str()),
                KeyValue::new(attribute::JOB_STATE, state.as_str()),
            ];
            metrics()
                .queue_depth
                .record(line.counters.get(state), &labels);
        }
    }
    for (project, age) in oldest {
        session::tell_counters(project);
        let label = KeyValue::new(attribute::PROJECT, project.to_owned());
        metrics()
            .lease_expiries
            .add(0, std::slice::from_ref(&label));
        metrics()
            .queue_oldest_ready_age
            .record(age.as_secs_f64(), &[label]);
    }
}
