//! Keeps the list of model endpoints, which every session tells its worker: those of the configuration, of workers that
//! are connected here, and of workers of the other coordinators.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::api::Shared;
use crate::endpoints;

/// How late a change at another coordinator is noticed. What changes here is told at once.
const INTERVAL: Duration = Duration::from_secs(1);

/// Goes round until the process aborts. While the queue is away, what others showed last stands.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut of_others = Arc::default();
    loop {
        tokio::select! {
            _ = ticks.tick() => match shared.peers.workers().await {
                Ok(workers) => of_others = workers,
                Err(error) => tracing::debug!(error = %error, "workers of other coordinators are not known"),
            },
            () = shared.registry.serving_changed.notified() => {}
            () = shared.shutdown.aborted() => return,
        }
        let here = shared.registry.list();
        // A worker that has just come here may still be shown by another.
        let workers = of_others.values().chain(&here);
        let told = endpoints::to_wire(&shared.config.model_endpoints, workers);
        shared.endpoints.send_if_modified(|now| {
            let changed = *now != told;
            *now = told;
            changed
        });
    }
}
