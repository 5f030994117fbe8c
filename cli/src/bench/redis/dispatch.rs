//! The way from submit to a warm worker under a steady load, each job a call of its own.
//!
//! Jobs are due at fixed moments, whatever became of those before, and their way is counted from the moment that they
//! were due: a system that stalls is not excused from the jobs that it kept from being sent.

use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use futures::{StreamExt, TryStreamExt};

use super::stack::{PROJECT, Stack};
use crate::bench::crew::Crew;
use crate::bench::submit;
use crate::exit::Problem;
use crate::submit::open;

/// Calls on their way at once; beyond, jobs wait at the client, and the wait counts.
const IN_FLIGHT_MAX: usize = 1_000;
/// Jobs that go before those that count, so that connections and caches are warm.
const WARM_UP_JOBS: usize = 500;
const END_LIMIT: Duration = Duration::from_secs(60);

/// The ways of `jobs` jobs at `per_s` a second.
pub async fn measure(
    stack: &Stack,
    jobs: usize,
    per_s: u32,
    (workers, credit): (u32, u32),
) -> Result<Vec<Duration>, Problem> {
    let client = &stack.client(PROJECT, 0).await?;
    let batch = BatchId::new("dispatch")?;
    open(client, &batch, v1::JobSpec::default()).await?;
    let all = WARM_UP_JOBS + jobs;
    let crew = Crew::of(all);
    crew.hire(stack.tasks(), &stack.worker(0), workers, credit, None);
    let mut done = crew.ledger.done();
    let first = Instant::now() + Duration::from_millis(500);
    let due = |n: usize| first + Duration::from_secs_f64(n as f64 / f64::from(per_s));
    let calls = submit::chunks(&batch, 0..all, 1).into_iter().enumerate();
    futures::stream::iter(calls)
        .map(|(n, chunk)| async move {
            tokio::time::sleep_until(due(n).into()).await;
            submit::send(client, vec![chunk]).await
        })
        .buffer_unordered(IN_FLIGHT_MAX)
        .try_collect::<()>()
        .await?;
    let ended = done.wait_for(|done| *done >= all);
    let finished = with_deadline("bench.dispatch", END_LIMIT, ended).await;
    crew.leave();
    if finished.is_err() || !crew.ledger.is_exact() {
        return Err(Problem::failed(format!(
            "{all} jobs were not delivered exactly once each: {}",
            crew.ledger.to_json()
        )));
    }
    let granted = crew.ledger.grants(WARM_UP_JOBS..all);
    let ways = granted.into_iter().flatten().enumerate();
    Ok(ways
        .map(|(n, at)| at.saturating_duration_since(due(WARM_UP_JOBS + n)))
        .collect())
}
