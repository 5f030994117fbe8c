//! The work at one provider: looks, lets the plan decide, and does what it says; while another coordinator does, nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::layout;
use espalier_core::queue::JobKind;
use espalier_core::time::Timestamp;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry;
use futures::StreamExt;
use futures::stream;
use tokio::time::{Instant, MissedTickBehavior};

use super::Source;
use super::demand::{self, Demand};
use super::ledger::Ledger;
use super::memory::Memory;
use super::plan::{Action, Look, Plan, Seen, Why, plan};
use super::provider::{Answer, Instance, ProviderError};
use super::tell::Tell;
use crate::api::Shared;
use crate::peers::{self, Order};
use crate::queue::{QueueError, Table};

/// How long a provider may take to list, and to take or end one instance.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long the queue may take.
const QUEUE_LIMIT: Duration = Duration::from_secs(15);
/// Calls of a provider at once.
const CALLS_MAX: usize = 8;
/// Looks wait after a provider that failed.
const PROVIDER_BACKOFF: Backoff = Backoff {
    first: Duration::from_secs(5),
    max: Duration::from_secs(300),
};
/// After that time what other coordinators had when it was decided is seen: they show it once a second, and what they show is
/// used for a second.
const SEEN_AFTER: Duration = Duration::from_secs(2);
/// The record of what was spent is written this often at least.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Work {
    shared: Arc<Shared>,
    source: Source,
    interval: Duration,
    memory: Memory,
    books: Option<Books>,
    tell: Tell,
    failures: u32,
    /// Until then the provider is asked nothing.
    not_before: Instant,
    /// Until then it is asked for no instance; others are ended all the same.
    no_creates_before: Instant,
}

/// What was spent, and when that was last stored.
struct Books {
    ledger: Ledger,
    saved_at: Option<Instant>,
}

/// Why a round was not done. The next one comes.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the queue cannot be asked")]
    Queue(#[from] QueueError),
    #[error("the provider cannot be asked")]
    Provider(#[from] ProviderError),
    #[error(transparent)]
    Late(#[from] espalier_runtime::tasks::DeadlineExceeded),
}

impl Work {
    pub(super) fn new(shared: Arc<Shared>, source: Source, interval: Duration) -> Self {
        Self {
            shared,
            tell: Tell::new(&source),
            source,
            interval,
            memory: Memory::default(),
            books: None,
            failures: 0,
            not_before: Instant::now(),
            no_creates_before: Instant::now(),
        }
    }

    /// Goes round until the coordinator drains.
    pub(super) async fn run(mut self) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shutdown = self.shared.shutdown.clone();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.draining() => break,
            }
            if Instant::now() < self.not_before {
                continue;
            }
            // Boxed: it is large, and waits most of the time.
            let round = tokio::select! {
                round = Box::pin(self.round()) => round,
                () = shutdown.draining() => break,
            };
            match round {
                Ok(()) => {}
                Err(RoundError::Provider(error)) => self.provider_failed("list", &error),
                Err(error) => {
                    let error = telemetry::error_chain(&error);
                    tracing::warn!(provider = self.source.key, error, "scaling waits");
                }
            }
        }
        self.tell.silence();
        self.source.provider.close();
    }

    async fn round(&mut self) -> Result<(), RoundError> {
        let leads = with_deadline("scaler.leader", QUEUE_LIMIT, self.leads()).await;
        let leads = match leads.map_err(RoundError::from).and_then(|leads| Ok(leads?)) {
            Ok(Some(leads)) => leads,
            // Nobody has said yet that they may, this one neither.
            Ok(None) => return Ok(()),
            Err(error) => {
                // Another one may lead meanwhile, keep the books, and make instances.
                self.books = None;
                self.memory.forget_seen();
                return Err(error);
            }
        };
        if !leads && !self.source.is_own {
            self.rest();
            return Ok(());
        }
        let listing = self.source.provider.list();
        let instances = with_deadline("scaler.list", CALL_LIMIT, listing).await;
        let instances =
            instances.map_err(|late| ProviderError::Unavailable(late.to_string()))??;
        let asking = demand::read(&*self.shared.queue);
        let demand = with_deadline("scaler.demand", QUEUE_LIMIT, asking).await??;
        let spent_today = self.count(&instances).await;
        let workers = self.workers().await?;
        let spent = spent_today.as_ref().copied().unwrap_or_default();
        let mut plan = self.decide(leads.then_some(&demand), &instances, &workers, spent);
        if let Err(error) = &spent_today {
            let error = telemetry::error_chain(error);
            tracing::warn!(
                error,
                "what was spent today cannot be read, so that nothing is asked for"
            );
            plan.actions
                .retain(|action| !matches!(action, Action::Create { .. }));
        }
        self.tell.round(&plan, &instances, spent);
        let failures = self.failures;
        self.perform(plan).await;
        if self.failures == failures {
            self.failures = 0;
        }
        Ok(())
    }

    /// Whether this coordinator is the one that asks the provider: the first of those that say they may, by their ids, so
    /// that the oldest goes on until it ends. None: nobody says so.
    async fn leads(&self) -> Result<Option<bool>, QueueError> {
        let shown = self.shared.queue.shown(Table::Scalers).await?;
        let able = shown.iter().filter(|shown| shown.key == self.source.key);
        let first = able.map(|shown| shown.by.as_str()).min();
        Ok(first.map(|first| first == self.shared.peers.me().as_str()))
    }

    /// Another coordinator does the work: what this one knows gets old.
    fn rest(&mut self) {
        self.memory = Memory::default();
        self.books = None;
        self.tell.silence();
    }

    async fn workers(&self) -> Result<BTreeMap<String, Seen>, RoundError> {
        let asking = self.shared.workers();
        let workers = with_deadline("scaler.workers", QUEUE_LIMIT, asking).await??;
        Ok(by_instance(&workers))
    }

    /// A time after which no lease holds that was not renewed: twice that of the kind whose leases last longest.
    fn lease(&self) -> Duration {
        let longest = JobKind::ALL.map(JobKind::lease_ttl).into_iter().max();
        self.shared
            .config
            .lease_ttl()
            .or(longest)
            .unwrap_or_default()
            * 2
    }

    fn decide(
        &mut self,
        demand: Option<&Demand>,
        instances: &[Instance],
        workers: &BTreeMap<String, Seen>,
        spent_today: f64,
    ) -> Plan {
        let look = Look {
            now: self.shared.now(),
            prefix: &self.source.prefix,
            pools: &self.source.pools,
            demand,
            instances,
            workers,
            lease: self.lease(),
            budget: self.source.budget,
            spent_today,
        };
        plan(&look, &mut self.memory)
    }

    /// Enters what there is into the books, where there is a budget of the day. Gives what was spent since midnight, in $.
    async fn count(&mut self, instances: &[Instance]) -> Result<f64, StoreError> {
        if self.source.budget.per_day.is_none() {
            return Ok(0.0);
        }
        let now = self.shared.now();
        let path = layout::scaler_ledger(&self.shared.config.queue_name, self.source.key);
        if self.books.is_none() {
            self.books = Some(self.open_books(&path).await?);
        }
        let Some(books) = &mut self.books else {
            return Ok(0.0);
        };
        let changed = books.ledger.see(instances, now);
        let is_old = |at: &Instant| at.elapsed() >= SAVE_INTERVAL;
        if changed || books.saved_at.as_ref().is_none_or(is_old) {
            match self.shared.store.put(&path, books.ledger.encode()).await {
                Ok(()) => books.saved_at = Some(Instant::now()),
                Err(error) => {
                    let error = telemetry::error_chain(&error);
                    tracing::warn!(path, error, "what was spent today cannot be stored");
                }
            }
        }
        Ok(books.ledger.spent_today(now))
    }

    async fn open_books(&self, path: &str) -> Result<Books, StoreError> {
        let ledger = match self.shared.store.get(path).await {
            Ok(bytes) => Ledger::parse(&bytes).unwrap_or_else(|| {
                tracing::error!(path, "the record of what was spent today cannot be read: it begins anew with what runs now");
                Ledger::default()
            }),
            Err(error) if error.is_not_found() => Ledger::default(),
            Err(error) => return Err(error),
        };
        Ok(Books {
            ledger,
            saved_at: None,
        })
    }

    async fn perform(&mut self, plan: Plan) {
        let (mut deletes, mut drains, mut creates) = (Vec::new(), Vec::new(), Vec::new());
        for action in plan.actions {
            match action {
                Action::Delete { instance, why } => deletes.push((instance, why)),
                Action::Drain { name, workers } => drains.push((name, workers)),
                Action::Create { pool, name } => creates.push((pool, name)),
            }
        }
        if !deletes.is_empty() {
            self.delete(deletes).await;
        }
        for (name, workers) in drains {
            tracing::info!(instance = name, "no longer needed: it takes no more jobs");
            for worker in workers {
                let order = Order::Drain { worker };
                let given = peers::give(&self.shared, &order);
                match with_deadline("scaler.drain", QUEUE_LIMIT, given).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => self.not_drained(&name, &error),
                    Err(late) => self.not_drained(&name, &ApiError::Unavailable(late.to_string())),
                }
            }
        }
        if !creates.is_empty() && Instant::now() >= self.no_creates_before {
            self.create(creates).await;
        }
    }

    fn not_drained(&self, name: &str, error: &ApiError) {
        tracing::warn!(instance = name, error = %error, "a worker could not be told to take no more jobs");
    }

    /// Ends those that may still be ended by what is seen then.
    async fn delete(&mut self, deletes: Vec<(Instance, Why)>) {
        tokio::time::sleep(SEEN_AFTER).await;
        let workers = match self.workers().await {
            Ok(workers) => workers,
            Err(error) => {
                let error = telemetry::error_chain(&error);
                tracing::warn!(
                    error,
                    "no instance is ended, since their workers are not known"
                );
                return;
            }
        };
        let provider = &self.source.provider;
        let (now, lease) = (self.shared.now(), self.lease());
        let may = |(instance, why): &(Instance, Why)| {
            let seen = workers.get(&instance.name);
            self.memory.may_end(instance, *why, seen, now, lease)
        };
        let calls = deletes.iter().filter(|delete| may(delete));
        let calls = calls.map(|(instance, why)| async move {
            let done = within("scaler.delete", provider.delete(instance)).await;
            (instance, *why, done)
        });
        let calls: Vec<_> = stream::iter(calls.collect::<Vec<_>>())
            .buffered(CALLS_MAX)
            .collect()
            .await;
        let (now, mut failed) = (self.shared.now(), None);
        for (instance, why, done) in calls {
            match done {
                Ok(()) => {
                    self.tell
                        .deleted(instance, why, self.memory.was_named(instance));
                    self.memory.ended(instance, why, now);
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            self.provider_failed("delete", &error);
        }
    }

    async fn create(&mut self, creates: Vec<(String, String)>) {
        let provider = &self.source.provider;
        let began = Instant::now();
        // Others take one after the other, each with a time of its own; what is left over waits for the next look.
        let at_once = if self.source.is_own { CALLS_MAX } else { 1 };
        let calls = creates.iter().map(|(pool, name)| async move {
            if began.elapsed() >= CALL_LIMIT {
                return None;
            }
            let done = within("scaler.create", provider.create(pool, name)).await;
            Some((pool, name, done))
        });
        let calls: Vec<_> = stream::iter(calls.collect::<Vec<_>>())
            .buffered(at_once)
            .filter_map(|call| async move { call })
            .collect()
            .await;
        let now = self.shared.now();
        let mut failed = None;
        for (pool, name, done) in calls {
            if let Some(error) = self.created(pool, name, done, now) {
                failed = Some(error);
            }
        }
        if let Some(error) = failed {
            self.provider_failed("create", &error);
        }
    }

    /// Notes what came of a request. Gives the error where it is the provider that fails, and not that pool.
    fn created(
        &mut self,
        pool: &str,
        name: &str,
        done: Result<(), ProviderError>,
        now: Timestamp,
    ) -> Option<ProviderError> {
        match done {
            Ok(()) => {
                self.memory.created(pool, name, now);
                self.tell.created(pool, name);
                None
            }
            Err(error @ (ProviderError::NoCapacity(_) | ProviderError::Refused(_))) => {
                self.memory.refused(pool, now);
                self.tell.refused(pool, &error);
                None
            }
            Err(error @ ProviderError::RateLimited { .. }) => Some(error),
            Err(error @ ProviderError::Unavailable(_)) => {
                // There may be one all the same.
                self.memory.created(pool, name, now);
                Some(error)
            }
        }
    }

    /// The provider is left alone for a while.
    fn provider_failed(&mut self, operation: &'static str, error: &ProviderError) {
        self.failures = self.failures.saturating_add(1);
        let wait = match error {
            ProviderError::RateLimited { retry_after } => *retry_after,
            // Nobody else is kept busy by being asked.
            _ if self.source.is_own => Duration::ZERO,
            _ => PROVIDER_BACKOFF.jittered(self.failures),
        };
        let until = Instant::now() + wait;
        match (operation, error) {
            // What there is goes on costing: it is still looked at.
            ("create", ProviderError::Unavailable(_)) => self.no_creates_before = until,
            _ => self.not_before = until,
        }
        self.tell.failed(operation, error, wait);
    }
}

async fn within(name: &'static str, call: Answer<'_, ()>) -> Result<(), ProviderError> {
    match with_deadline(name, CALL_LIMIT, call).await {
        Ok(done) => done,
        Err(late) => Err(ProviderError::Unavailable(late.to_string())),
    }
}

/// The workers that are somebody's instances, by the name of the instance.
fn by_instance(workers: &[v1::Worker]) -> BTreeMap<String, Seen> {
    let mut all: BTreeMap<String, Seen> = BTreeMap::new();
    for worker in workers.iter().filter(|worker| !worker.instance.is_empty()) {
        let seen = all.entry(worker.instance.clone()).or_default();
        match (worker.draining, worker.worker.parse()) {
            (false, Ok(id)) => seen.open.push(id),
            (true, Ok(id)) => seen.drained.push(id),
            // Coordinators have checked it.
            (_, Err(_)) => {}
        }
        seen.running += u64::from(worker.running);
        seen.processes.insert(worker.process.clone());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_an_instance_are_taken_together_and_workers_of_nobody_left_out() {
        let session = |worker: &str, process: &str, instance: &str, draining, running| v1::Worker {
            worker: worker.to_owned(),
            process: process.to_owned(),
            instance: instance.to_owned(),
            draining,
            running,
            ..v1::Worker::default()
        };
        let seen = by_instance(&[
            session("w1", "p1", "x-a-0", false, 2),
            session("w2", "p1", "x-a-0", true, 1),
            session("w3", "p3", "", false, 1),
            session("w4", "p4", "x-a-1", false, 0),
        ]);
        let first = Seen {
            open: vec!["w1".parse().unwrap()],
            drained: vec!["w2".parse().unwrap()],
            running: 3,
            processes: ["p1".to_owned()].into(),
        };
        assert_eq!(seen["x-a-0"], first);
        assert_eq!(seen.keys().collect::<Vec<_>>(), ["x-a-0", "x-a-1"]);
    }
}
