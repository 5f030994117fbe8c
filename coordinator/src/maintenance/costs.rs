//! Counts the workers that are connected here, and what they cost, every few seconds; tells the prices that tokens have.
//!
//! Each worker is connected to one coordinator, so that the numbers of all coordinators add up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use espalier_core::queue::JobKind;
use espalier_runtime::telemetry::{metrics, names::attribute};
use opentelemetry::KeyValue;
use tokio::time::{Instant, MissedTickBehavior};

use crate::api::Shared;
use crate::prices::Prices;

/// Time between two looks; exports are rarer.
const INTERVAL: Duration = Duration::from_secs(5);
/// Tokens that a price is of.
const MILLION: f64 = 1e6;

/// Counts until the process aborts.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        let now = Instant::now();
        let prices = &shared.config.prices;
        record(prices, &tally(prices, &shared.registry.kinds()), now - last);
        last = now;
    }
}

/// Sessions and dollars an hour, by kind.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    sessions: BTreeMap<JobKind, u64>,
    per_hour: BTreeMap<JobKind, f64>,
}

fn tally(prices: &Prices, sessions: &[BTreeSet<JobKind>]) -> Tally {
    let mut tally = Tally::default();
    // One that is none is told as well, or the last number would stand.
    tally.sessions.extend(JobKind::ALL.map(|kind| (kind, 0)));
    for kinds in sessions {
        for kind in kinds {
            *tally.sessions.entry(*kind).or_default() += 1;
        }
        if let Some((kind, price)) = prices.of_session(kinds) {
            *tally.per_hour.entry(kind).or_default() += price;
        }
    }
    tally
}

fn record(prices: &Prices, tally: &Tally, passed: Duration) {
    let metrics = metrics();
    let kind_of = |kind: &JobKind| [KeyValue::new(attribute::JOB_KIND, kind.as_str())];
    for (kind, sessions) in &tally.sessions {
        metrics.workers_connected.record(*sessions, &kind_of(kind));
    }
    let hours = passed.as_secs_f64() / 3_600.0;
    for (kind, per_hour) in &tally.per_hour {
        metrics.cost_workers.add(per_hour * hours, &kind_of(kind));
    }
    for (model, tokens) in &prices.models {
        for (token_type, price) in [("input", tokens.input), ("output", tokens.output)] {
            let labels = [
                KeyValue::new(attribute::GEN_AI_REQUEST_MODEL, model.clone()),
                KeyValue::new(attribute::GEN_AI_TOKEN_TYPE, token_type),
            ];
            metrics.cost_token_price.record(price / MILLION, &labels);
        }
    }
    if let Some(budget) = prices.budget_per_day {
        metrics.cost_budget.record(budget, &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_there_is_counted_and_costs_by_kind() {
        let mut prices = Prices::default();
        prices.workers.insert(JobKind::Rollout, 0.5);
        prices.workers.insert(JobKind::Train, 2.0);
        let of = |kinds: &[JobKind]| kinds.iter().copied().collect();
        let sessions = [
            of(&[JobKind::Rollout]),
            of(&[JobKind::Rollout]),
            of(&[JobKind::Curate]),
            of(&[JobKind::Train, JobKind::Rollout]),
        ];
        let found = tally(&prices, &sessions);
        let count = |kind| found.sessions[&kind];
        assert_eq!(count(JobKind::Rollout), 3);
        assert_eq!((count(JobKind::Curate), count(JobKind::Export)), (1, 0));
        let expected = [(JobKind::Rollout, 1.0), (JobKind::Train, 2.0)];
        assert_eq!(found.per_hour, expected.into());
    }
}
