//! Ends leases that ran out and makes delayed jobs ready, a few times a second: the longest that either waits beyond
//! its time.

use std::sync::Arc;
use std::time::Duration;

use crate::api::Shared;

/// Time between two ticks. The job of a lost worker meets two of them: at the end of its lease, and after its backoff.
const INTERVAL: Duration = Duration::from_millis(200);
/// Most jobs that one tick moves: bounds how long it holds the queue.
const JOBS_MAX: usize = 1_000;

/// Ticks until the process aborts. A queue that is away is asked again at the next tick.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        if let Err(error) = tick(&shared).await {
            tracing::warn!(error = %error, "the queue could not be ticked");
        }
    }
}

async fn tick(shared: &Shared) -> Result<(), crate::queue::QueueError> {
    loop {
        let done = shared.queue.tick(JOBS_MAX).await?;
        if done.promoted + done.reaped > 0 {
            tracing::debug!(promoted = done.promoted, reaped = done.reaped, "ticked");
        }
        if !done.more {
            return Ok(());
        }
    }
}
