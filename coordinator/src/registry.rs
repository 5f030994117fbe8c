//! The workers that are connected to this coordinator now: who offers what, who runs what, and how to reach them.
//!
//! In memory, and rebuilt by reconnecting workers: nothing here decides about leases, which are the queue's. The
//! sessions enter and leave, the event task wakes and tells them, the API layer lists them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use espalier_core::id::{Fence, JobKey, WorkerId};
use espalier_core::queue::JobKind;
use espalier_core::spec::model_tag;
use espalier_core::time::Timestamp;
use espalier_proto::v1;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::api::view;

/// Most workers at one coordinator: each has a stream and a few tasks.
const WORKERS_MAX: usize = 10_000;
/// Most ids of drained workers that are remembered for their next stream; the smallest ids, which are the oldest
/// processes, go first.
const DRAINED_MAX: usize = 10_000;
/// What a worker was last heard at is rounded down to this, so that others need not be shown each of its messages.
const HEARD_STEP_US: u64 = 5_000_000;
/// The prefix of the tags that stand for MCP servers.
pub const MCP_TAG: &str = "mcp:";

/// A way to a worker: bounded, so that one which does not read cannot take the memory of others.
pub type Outbox = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// One worker's stream, as others see it.
#[derive(Debug)]
pub struct Connected {
    /// Who it is.
    pub worker: WorkerId,
    /// Whose session it is.
    pub process: WorkerId,
    /// The name of the instance that a scaler started it as; empty: nobody's.
    pub instance: String,
    /// Tells this stream from an earlier or later one of the same worker.
    pub number: u64,
    /// What it said that it offers.
    pub tags: BTreeSet<String>,
    /// The kinds of jobs that it takes.
    pub kinds: BTreeSet<JobKind>,
    /// How many jobs it runs at once.
    pub capacity: u32,
    /// Its version.
    pub version: String,
    /// Since when.
    pub connected_at: Timestamp,
    /// Rung when there may be something to grant.
    pub wake: Notify,
    /// No more grants: the worker asked for it, or an operator did.
    pub draining: AtomicBool,
    /// No more grants on this stream: the worker is asked to move to another one.
    pub moving: AtomicBool,
    /// The end of the stream.
    pub ended: CancellationToken,
    outbox: Outbox,
    running: Mutex<HashMap<JobKey, Fence>>,
    serving: Mutex<Option<v1::Serving>>,
    /// It may have jobs that are not listed: the queue is being asked for some for it, those that it gave are on their way, or
    /// the leases that it came with are not renewed yet.
    granting: AtomicBool,
    granted: AtomicU64,
    heard_at_us: AtomicU64,
}

/// What a worker said in its first message, checked.
#[derive(Debug)]
pub struct Introduction {
    /// Who it is.
    pub worker: WorkerId,
    /// Whose session it is.
    pub process: WorkerId,
    /// The name of the instance that a scaler started it as; empty: nobody's.
    pub instance: String,
    /// What it offers.
    pub tags: BTreeSet<String>,
    /// The kinds of jobs that it takes.
    pub kinds: BTreeSet<JobKind>,
    /// How many jobs it runs at once.
    pub capacity: u32,
    /// Its version.
    pub version: String,
}

impl Connected {
    /// Whether it may be given a job of `kind` that needs `needs`.
    fn takes(&self, kind: JobKind, needs: &BTreeSet<String>) -> bool {
        let serves = |need: &String| {
            let serving = lock(&self.serving);
            let models = serving.iter().flat_map(|serving| &serving.models);
            models.into_iter().any(|model| model_tag(model) == *need)
        };
        let offers = |need| self.tags.contains(need) || serves(need);
        self.kinds.contains(&kind) && needs.iter().all(offers)
    }

    /// What a job that it is given may need: its tags, and the models that it serves.
    pub fn offers(&self) -> BTreeSet<String> {
        let mut offers = self.tags.clone();
        let serving = lock(&self.serving);
        let models = serving.iter().flat_map(|serving| &serving.models);
        offers.extend(models.map(|model| model_tag(model)));
        offers
    }

    /// Notes that the queue is asked for jobs for the worker from now on, or no longer. To be said before
    /// [`takes_no_more`](Self::takes_no_more) is asked: then whoever sees a drained worker without a job sees the truth.
    pub fn grants(&self, now: bool) {
        self.granting.store(now, Ordering::SeqCst);
    }

    /// Whether nothing is granted on this stream any more.
    pub fn takes_no_more(&self) -> bool {
        self.draining.load(Ordering::SeqCst) || self.moving.load(Ordering::Relaxed)
    }

    /// The way to the worker.
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Tells the worker something that it would learn later anyway; dropped where its outbox is full.
    pub fn hint(&self, message: v1::coordinator_message::Message) {
        let message = v1::CoordinatorMessage {
            message: Some(message),
        };
        if self.outbox.try_send(Ok(message)).is_err() {
            tracing::debug!(worker = %self.worker, "a hint was dropped: the worker reads too slowly or has gone");
        }
    }

    /// Notes that the worker said something.
    pub fn heard(&self, at: Timestamp) {
        self.heard_at_us.store(at.0, Ordering::Relaxed);
    }

    /// Notes that the worker was given a job, which it has from now on.
    pub fn granted(&self, key: JobKey, fence: Fence) {
        self.granted.fetch_add(1, Ordering::Relaxed);
        self.started(key, fence);
    }

    /// Notes that the worker has a job.
    pub fn started(&self, key: JobKey, fence: Fence) {
        lock(&self.running).insert(key, fence);
    }

    /// Notes that the worker has a job no longer.
    pub fn stopped(&self, key: &JobKey, fence: Fence) {
        let mut running = lock(&self.running);
        if running.get(key) == Some(&fence) {
            running.remove(key);
        }
    }

    fn view(&self) -> v1::Worker {
        let draining = self.draining.load(Ordering::SeqCst);
        // A grant that was under way when it was drained may still bring a job. Looked at before the jobs, since such a grant
        // becomes one of those. Of others this says nothing, so that they need not be shown each time.
        let granting = draining && self.granting.load(Ordering::SeqCst);
        let serving = lock(&self.serving).clone().filter(|_| !draining);
        let running = lock(&self.running).len() + usize::from(granting);
        let heard_at_us = self.heard_at_us.load(Ordering::Relaxed);
        v1::Worker {
            worker: self.worker.to_string(),
            tags: self.tags.iter().cloned().collect(),
            capacity: self.capacity,
            running: u32::try_from(running).unwrap_or(u32::MAX),
            draining,
            connected_at_us: self.connected_at.0,
            version: self.version.clone(),
            kinds: self.kinds.iter().map(|k| view::kind(*k).into()).collect(),
            // Who asks the registry knows whose it is.
            coordinator: String::new(),
            last_seen_us: heard_at_us - heard_at_us % HEARD_STEP_US,
            granted: self.granted.load(Ordering::Relaxed),
            serving,
            process: self.process.to_string(),
            instance: self.instance.clone(),
        }
    }
}

/// The registry. One a process.
#[derive(Debug)]
pub struct Registry {
    inner: Mutex<Inner>,
    last_number: AtomicU64,
    /// Rung when what workers serve may have changed.
    pub serving_changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    connected: BTreeMap<WorkerId, Arc<Connected>>,
    drained: BTreeSet<WorkerId>,
}

/// There is no room for another worker.
#[derive(Debug, thiserror::Error)]
#[error("this coordinator serves at most {WORKERS_MAX} workers")]
pub struct Full;

impl Default for Registry {
    /// An empty registry. Numbers begin anywhere, so that they repeat neither after a restart nor at another coordinator,
    /// which may have started at the same moment: lease requests are numbered by them, and the queue answers a number
    /// that a worker's last coordinator used some seconds ago with what was granted then.
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            last_number: AtomicU64::new(anywhere()),
            serving_changed: Notify::new(),
        }
    }
}

impl Registry {
    /// A number that was not given before: for streams and lease requests.
    pub fn next_number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Enters a worker. An older stream of the same worker ends: the worker has reconnected. Until [`Connected::grants`] is told
    /// otherwise it may have jobs that are not listed.
    pub fn enter(
        &self,
        who: Introduction,
        connected_at: Timestamp,
        outbox: Outbox,
        ended: CancellationToken,
    ) -> Result<Arc<Connected>, Full> {
        let mut inner = lock(&self.inner);
        if inner.connected.len() >= WORKERS_MAX && !inner.connected.contains_key(&who.worker) {
            return Err(Full);
        }
        let connected = Arc::new(Connected {
            number: self.next_number(),
            tags: who.tags,
            kinds: who.kinds,
            capacity: who.capacity,
            version: who.version,
            connected_at,
            wake: Notify::new(),
            draining: AtomicBool::new(inner.drained.contains(&who.worker)),
            moving: AtomicBool::new(false),
            serving: Mutex::default(),
            ended,
            outbox,
            running: Mutex::default(),
            granting: AtomicBool::new(true),
            granted: AtomicU64::new(0),
            heard_at_us: AtomicU64::new(connected_at.0),
            process: who.process,
            instance: who.instance,
            worker: who.worker.clone(),
        });
        if let Some(older) = inner.connected.insert(who.worker, Arc::clone(&connected)) {
            older.ended.cancel();
        }
        Ok(connected)
    }

    /// Takes a stream off the list.
    pub fn leave(&self, connected: &Connected) {
        let mut inner = lock(&self.inner);
        let present = inner.connected.get(&connected.worker);
        if present.is_some_and(|present| present.number == connected.number) {
            inner.connected.remove(&connected.worker);
        }
        if lock(&connected.serving).is_some() {
            self.serving_changed.notify_one();
        }
    }

    /// Notes what a worker serves; without a model: nothing.
    pub fn serves(&self, connected: &Connected, serving: v1::Serving) {
        let serving = Some(serving).filter(|serving| !serving.models.is_empty());
        *lock(&connected.serving) = serving;
        self.serving_changed.notify_one();
        // There may be jobs for what is new.
        connected.wake.notify_one();
    }

    /// The stream of a worker.
    pub fn find(&self, worker: &WorkerId) -> Option<Arc<Connected>> {
        lock(&self.inner).connected.get(worker).cloned()
    }

    /// Rings every worker that may take a job of `kind` which needs `needs`.
    pub fn wake(&self, kind: JobKind, needs: &BTreeSet<String>) {
        for connected in lock(&self.inner).connected.values() {
            if connected.takes(kind, needs) {
                connected.wake.notify_one();
            }
        }
    }

    /// Rings every worker.
    pub fn wake_all(&self) {
        for connected in lock(&self.inner).connected.values() {
            connected.wake.notify_one();
        }
    }

    /// Gives a worker no more jobs on this stream, and nobody goes to what it serves any more.
    pub fn drains(&self, connected: &Connected) {
        connected.draining.store(true, Ordering::SeqCst);
        self.serving_changed.notify_one();
    }

    /// The same on this stream and on later ones.
    pub fn drain(&self, worker: &WorkerId) {
        let mut inner = lock(&self.inner);
        if let Some(connected) = inner.connected.get(worker) {
            self.drains(connected);
        }
        inner.drained.insert(worker.clone());
        if inner.drained.len() > DRAINED_MAX {
            inner.drained.pop_first();
        }
    }

    /// Workers that are given no more jobs, connected or not.
    pub fn drained(&self) -> Vec<WorkerId> {
        lock(&self.inner).drained.iter().cloned().collect()
    }

    /// All workers, ordered by id.
    pub fn list(&self) -> Vec<v1::Worker> {
        let inner = lock(&self.inner);
        inner.connected.values().map(|c| c.view()).collect()
    }

    /// The kinds of jobs that each session takes.
    pub fn kinds(&self) -> Vec<BTreeSet<JobKind>> {
        let inner = lock(&self.inner);
        inner.connected.values().map(|c| c.kinds.clone()).collect()
    }

    /// Names of the MCP servers that connected workers offer.
    pub fn mcp_servers(&self) -> BTreeSet<String> {
        let inner = lock(&self.inner);
        let tags = inner.connected.values().flat_map(|c| &c.tags);
        tags.filter_map(|tag| tag.strip_prefix(MCP_TAG))
            .map(str::to_owned)
            .collect()
    }
}

/// No code that may panic runs under these locks, and the state is valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number with room for as many again behind it. The keys of a hasher are random.
fn anywhere() -> u64 {
    RandomState::new().build_hasher().finish() >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(registry: &Registry, worker: &str, tags: &[&str]) -> Arc<Connected> {
        let (outbox, _) = mpsc::channel(1);
        let who = Introduction {
            worker: worker.parse().unwrap(),
            process: worker.parse().unwrap(),
            instance: String::new(),
            tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            kinds: [JobKind::Rollout].into(),
            capacity: 1,
            version: String::new(),
        };
        let ended = CancellationToken::new();
        registry.enter(who, Timestamp(1), outbox, ended).unwrap()
    }

    #[test]
    fn a_worker_that_comes_back_ends_its_older_stream_and_stays_drained() {
        let registry = Registry::default();
        let older = enter(&registry, "w", &[]);
        registry.drain(&older.worker);
        let newer = enter(&registry, "w", &["mcp:browser"]);
        assert!(older.ended.is_cancelled());
        assert!(newer.draining.load(Ordering::Relaxed));

        registry.leave(&older);
        assert_eq!(registry.find(&newer.worker).unwrap().number, newer.number);
        assert_eq!(registry.mcp_servers(), ["browser".to_owned()].into());
        registry.leave(&newer);
        assert!(registry.list().is_empty());
        assert_eq!(registry.drained(), vec![newer.worker.clone()]);
    }

    #[test]
    fn a_worker_that_was_drained_elsewhere_is_drained_when_it_comes() {
        let registry = Registry::default();
        registry.drain(&"w".parse().unwrap());
        let worker = enter(&registry, "w", &[]);
        assert!(worker.draining.load(Ordering::Relaxed));
    }

    #[test]
    fn what_a_worker_was_granted_is_counted_and_small_changes_of_when_it_was_heard_are_not_shown() {
        let registry = Registry::default();
        let worker = enter(&registry, "w", &[]);
        let key: JobKey = "p/b/j".parse().unwrap();
        worker.granted(key.clone(), Fence(1));
        worker.stopped(&key, Fence(1));
        worker.granted(key.clone(), Fence(2));
        worker.started(key, Fence(2));
        worker.heard(Timestamp(12_345_678));
        let [first] = &registry.list()[..] else {
            panic!("one worker");
        };
        assert_eq!((first.granted, first.running), (2, 1));
        assert_eq!(first.last_seen_us, 10_000_000);
        assert_eq!(first.kinds, [i32::from(v1::JobKind::Rollout)]);
        worker.heard(Timestamp(14_999_999));
        assert_eq!(registry.list()[0], *first);
    }

    #[test]
    fn a_drained_worker_has_no_job_only_when_none_is_on_its_way() {
        let registry = Registry::default();
        let worker = enter(&registry, "w", &[]);
        worker.grants(true);
        assert_eq!(worker.view().running, 0, "it may as well come to nothing");
        registry.drain(&worker.worker);
        assert_eq!(worker.view().running, 1);
        worker.granted("p/b/j".parse().unwrap(), Fence(1));
        worker.grants(false);
        assert_eq!(worker.view().running, 1);
        worker.stopped(&"p/b/j".parse().unwrap(), Fence(1));
        assert_eq!(worker.view().running, 0);
    }

    #[test]
    fn coordinators_that_start_together_number_their_requests_apart() {
        let [one, other] = [Registry::default(), Registry::default()].map(|r| r.next_number());
        assert!(one.abs_diff(other) > 1_000_000, "{one} and {other}");
    }

    #[test]
    fn what_a_worker_serves_is_shown_until_it_is_drained() {
        let registry = Registry::default();
        let worker = enter(&registry, "w", &[]);
        let serving = v1::Serving {
            models: vec!["qwen3".to_owned()],
            ..v1::Serving::default()
        };
        let shown = || registry.list()[0].serving.clone();
        registry.serves(&worker, serving.clone());
        assert_eq!(shown(), Some(serving.clone()));
        // It still serves while it moves to another coordinator.
        worker.moving.store(true, Ordering::Relaxed);
        assert!(worker.takes_no_more() && shown().is_some());
        // Jobs for the model are for this worker.
        let needs = [model_tag("qwen3")].into();
        assert_eq!(worker.offers(), needs);
        assert!(worker.takes(JobKind::Rollout, &needs));
        assert!(!worker.takes(JobKind::Rollout, &[model_tag("other")].into()));
        registry.serves(&worker, v1::Serving::default());
        assert_eq!(shown(), None);
        registry.serves(&worker, serving);
        registry.drain(&worker.worker);
        assert_eq!(shown(), None);
    }

    #[test]
    fn an_end_under_an_old_fence_leaves_the_present_lease() {
        let registry = Registry::default();
        let worker = enter(&registry, "w", &[]);
        let key: JobKey = "p/b/j".parse().unwrap();
        worker.started(key.clone(), Fence(2));
        worker.stopped(&key, Fence(1));
        assert_eq!(worker.view().running, 1);
        worker.stopped(&key, Fence(2));
        assert_eq!(worker.view().running, 0);
    }
}
