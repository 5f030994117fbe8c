//! How long an answer is waited for: as long as the engine goes on, within reason.

use std::time::Duration;

use espalier_runtime::tasks::with_deadline;
use futures::{Stream, StreamExt as _};
use tokio::time::Instant;

use super::backend::{Backend, Condition, Load};
use super::error::ApiError;

/// Longest wait for the next token of an answer while the engine goes on with others: in the queue, or set aside.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(3_600);
/// The same of an answer of a batch, which waits for as long as clients keep coming.
pub(super) const OFFLINE_SILENCE_MAX: Duration = Duration::from_secs(86_400);
/// Longest time without a step of an engine that has an answer to give. A step has a limit of its own, which is shorter;
/// this is for an engine that hangs where it cannot say so.
const STANDSTILL_MAX: Duration = Duration::from_secs(600);
/// How often a wait looks at the engine.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The next event, within `silence_max`.
pub(super) async fn next<T>(
    events: &mut (impl Stream<Item = T> + Unpin),
    backend: &dyn Backend,
    silence_max: Duration,
) -> Result<T, ApiError> {
    let next = async {
        let mut seen = None;
        loop {
            tokio::select! {
                event = events.next() => return event.ok_or_else(ApiError::internal),
                () = tokio::time::sleep(LOOK_EVERY) => look(backend.load(), &mut seen)?,
            }
        }
    };
    let waited = with_deadline("api.engine", silence_max, next).await;
    waited.unwrap_or(Err(ApiError::waited(silence_max)))
}

/// Whether the engine goes on. `seen` are the steps that it had made, and since when it has made no other.
fn look(load: Load, seen: &mut Option<(u64, Instant)>) -> Result<(), ApiError> {
    if load.condition == Condition::Failed {
        return Err(ApiError::failed());
    }
    match *seen {
        Some((steps, since)) if steps == load.steps => {
            if since.elapsed() >= STANDSTILL_MAX {
                return Err(ApiError::hangs(STANDSTILL_MAX));
            }
        }
        _ => *seen = Some((load.steps, Instant::now())),
    }
    Ok(())
}
