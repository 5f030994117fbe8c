//! Shows the other coordinators what this one has, once a second where it changed, and obeys the orders that they show.

use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::tasks::{self, OnFailure};
use tokio::time::MissedTickBehavior;

use crate::api::Shared;
use crate::peers::{self, Order};
use crate::queue::QueueError;

/// Time between two rounds: how late others see a change, and how often one costs a call.
const INTERVAL: Duration = Duration::from_secs(1);

/// Goes round until the process aborts. A queue that is away is told at the next round.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        if let Err(error) = round(&shared).await {
            tracing::debug!(error = %error, "other coordinators could not be told");
        }
    }
}

async fn round(shared: &Arc<Shared>) -> Result<(), QueueError> {
    let (of, now) = (Arc::clone(shared), shared.now());
    let wanted = tasks::blocking("peers.wanted", move || peers::wanted(&of, now)).await;
    match wanted {
        Ok(wanted) => shared.peers.show(&wanted).await?,
        Err(error) => tracing::error!(error = %error, "what others are to see is not known"),
    }
    for order in shared.peers.orders().await? {
        obey(shared, &order);
    }
    Ok(())
}

/// Obeys, and does not wait for a worker.
pub fn obey(shared: &Arc<Shared>, order: &Order) {
    if let Some(delivery) = peers::obey(shared, order, false) {
        let deliver = peers::deliver(delivery);
        shared.tasks.spawn("peers.answer", OnFailure::Log, deliver);
    }
}
