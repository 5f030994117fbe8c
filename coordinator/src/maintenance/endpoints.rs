//! Keeps the list of model endpoints, which every session tells its worker: those of the configuration, of workers that
//! are connected here, and of workers of the other coordinators.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use tokio::time::MissedTickBehavior;

use crate::api::Shared;
use crate::endpoints;

/// How late a change at another coordinator is noticed. What changes here is told at once.
const INTERVAL: Duration = Duration::from_secs(1);

/// Goes round until the process aborts. While the queue is away, what others showed last stands.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let peers = &shared.peers;
    // Goes on beside the rest: a queue that stalls holds up no news from here, and no end.
    let mut looks = pin!(stream::unfold(ticks, async |mut ticks| {
        ticks.tick().await;
        Some((peers.workers().await, ticks))
    }));
    let mut of_others = Arc::default();
    loop {
        tokio::select! {
            Some(look) = looks.next() => match look {
                Ok(workers) => of_others = workers,
                Err(error) => tracing::debug!(error = %error, "workers of other coordinators are not known"),
            },
            () = shared.registry.serving_changed.notified() => {}
            () = shared.shutdown.aborted() => return,
        }
        let here = shared.registry.list();
        // A worker that has just come here may still be shown by another.
        let workers = of_others.values().chain(&here);
        let told = endpoints::to_wire(
            &shared.config.model_endpoints,
            &shared.config.worker_key_names,
            workers,
        );
        shared.endpoints.send_if_modified(|now| {
            let changed = *now != told;
            *now = told;
            changed
        });
    }
}
