//! How many jobs there are to do, by kind: those that run, those that are ready, and those whose wait is about to end.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_core::queue::{JobKind, QueueStats, StateName};

use crate::queue::{Queue, QueueError};

/// A job that waits for a time counts from so long before it: about what a worker takes to start. A retry waits for less
/// than that, so that workers do not go and come between two attempts.
const DUE_SOON: Duration = Duration::from_secs(60);

/// Jobs by kind; a kind without a job is left out.
pub type Demand = BTreeMap<JobKind, u64>;

/// Asks the queue.
pub async fn read(queue: &dyn Queue) -> Result<Demand, QueueError> {
    let stats = queue.stats().await?;
    let delayed = |line: &espalier_core::queue::StatLine| line.counters.get(StateName::Delayed);
    let due = match stats.lines.iter().map(delayed).sum::<u64>() {
        0 => Demand::new(),
        _ => queue.due_soon(DUE_SOON).await?,
    };
    Ok(of(&stats, due))
}

fn of(stats: &QueueStats, due: Demand) -> Demand {
    let mut demand = due;
    for line in &stats.lines {
        let jobs = [StateName::Ready, StateName::Leased].map(|state| line.counters.get(state));
        *demand.entry(line.kind).or_default() += jobs.iter().sum::<u64>();
    }
    demand.retain(|_, jobs| *jobs > 0);
    demand
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::queue::{Counters, StatLine};

    #[test]
    fn what_waits_and_runs_counts_over_all_projects() {
        let line = |project: &str, kind, numbers: [u64; 2]| StatLine {
            project: project.parse().unwrap(),
            kind,
            counters: Counters::from(StateName::ALL.map(|state| match state {
                StateName::Ready => numbers[0],
                StateName::Leased => numbers[1],
                // Neither what waits for others, nor what ended, nor what is due much later.
                _ => 1_000,
            })),
            oldest_ready: None,
        };
        let stats = QueueStats {
            lines: vec![
                line("a", JobKind::Rollout, [5, 2]),
                line("a", JobKind::Curate, [0, 0]),
                line("b", JobKind::Rollout, [1, 0]),
            ],
            ..QueueStats::default()
        };
        let due = [(JobKind::Rollout, 10), (JobKind::Train, 1)].into();
        let wanted = [(JobKind::Rollout, 18), (JobKind::Train, 1)];
        assert_eq!(of(&stats, due), wanted.into());
    }
}
