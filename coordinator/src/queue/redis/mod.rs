//! The queue in Redis, for any number of coordinators: every decision is one script on the server.
//!
//! A project belongs to one shard, whose keys share a slot; the scripts are in `lua/`, and do what the pure state
//! machine of [`espalier_core::queue`] does. The layout of the keys is in `docs/decisions/redis.md`. What a method
//! may do in several calls, it does so that a break in between leaves what a repetition completes.

mod address;
#[cfg(test)]
mod commands;
mod core;
mod decode;
mod encode;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod figures;
mod gather;
mod health;
#[cfg(test)]
mod layout;
mod link;
mod listen;
mod operate;
mod peers;
#[cfg(test)]
mod property;
mod read;
mod script;
mod server;
mod submit;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod topologies;
#[cfg(test)]
mod waits;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, CoordinatorId, JobId, JobKey, ProjectId};
use espalier_core::queue::{
    BatchSeq, BatchView, Cancelled, Event, JobFilter, JobKind, LeaseRequest, MachineConfig,
    QueueStats, RenewReply, Selector, Ticked,
};
use espalier_runtime::clock::Clock;
use espalier_runtime::config::Secret;
use espalier_runtime::tasks::{OnFailure, TaskHandle, Tasks};
use futures::FutureExt;
use futures::future::BoxFuture;
use sha2::{Digest, Sha256};
use tokio::sync::broadcast;

use self::core::{Core, LAYOUT};
use self::gather::{Gather, ITEMS_MAX};
use self::health::Health;
use self::link::Link;
use self::peers::Peers;
use super::{
    Answer, Change, Chunk, ChunkReply, Condition, EndedPage, Finish, FinishAck, Granted, Intake,
    JobDetail, JobSpec, OpenBatch, PAGE_MAX, Queue, QueueError, Renewal, Shown, Table,
};

pub use link::Acknowledge;
pub use server::{Aspect, Grade, Unfit, examine};

/// Events that a slow listener may lag behind before it loses some.
const EVENTS_MAX: usize = 1_024;
/// Most shards of one queue.
const SHARDS_MAX: u16 = 64;

/// Where the queue is and how it is used. Every coordinator of a queue has the same.
pub struct RedisConfig {
    /// See [`address`].
    pub url: Secret,
    /// Tells queues on one server apart.
    pub name: String,
    /// Parts of the queue that may lie on different nodes of a Cluster. Fixed when the queue is first used.
    pub shards: u16,
    /// What a write must have reached before it counts.
    pub acknowledge: Acknowledge,
    /// Shares of projects.
    pub machine: MachineConfig,
    /// Stands in for the server's clock in tests.
    pub clock: Option<Arc<dyn Clock>>,
}

/// Why a queue could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The configuration breaks a rule.
    #[error(transparent)]
    Config(#[from] FieldError),
    /// The server cannot be asked.
    #[error("`queue` leads to {place}, where Redis cannot be asked")]
    Unreachable {
        /// The address without user and password.
        place: String,
        /// Why.
        source: QueueError,
    },
    /// The server was reached, and failed.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A queue must not lie on this server.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// The queue was made with another number of shards.
    #[error(
        "the queue has {found} shards and was configured with {asked}; their number is fixed when it is first used"
    )]
    Shards {
        /// What it has.
        found: u16,
        /// What was asked for.
        asked: u16,
    },
    /// Another version of this program wrote the queue.
    #[error(
        "the queue has layout {found} and this version reads layout {LAYOUT}: let the version that wrote it bring its \
         jobs to their end, and give this one another `queue_name`"
    )]
    OtherLayout {
        /// The layout that it has.
        found: u32,
    },
}

/// The queue in Redis.
#[derive(Debug)]
pub struct Redis {
    shards: Vec<Shard>,
    /// Most batches of a project that are not closed.
    open_batches_max: usize,
    next_shard: AtomicUsize,
    events: broadcast::Sender<Event>,
    health: Arc<Health>,
    peers: Peers,
    background: [TaskHandle; 2],
    closed: AtomicBool,
}

#[derive(Debug)]
struct Shard {
    core: Arc<Core>,
    finishes: Gather<Finish, FinishAck>,
    renewals: Gather<Renewal, RenewReply>,
    intakes: Gather<(ProjectId, BatchId, u32), Option<Intake>>,
}

impl Shard {
    fn start(core: Arc<Core>, tasks: &Tasks) -> Self {
        let (finishing, renewing) = (Arc::clone(&core), Arc::clone(&core));
        let taking = Arc::clone(&core);
        let finish = move |items| {
            let core = Arc::clone(&finishing);
            async move { core.finish(items).await }
        };
        let renew = move |items| {
            let core = Arc::clone(&renewing);
            async move { core.renew(items).await }
        };
        let take_in = move |chunks| {
            let core = Arc::clone(&taking);
            async move { core.intakes(chunks).await }
        };
        Self {
            core,
            finishes: Gather::start(tasks, "queue.finishes", finish),
            renewals: Gather::start(tasks, "queue.renewals", renew),
            intakes: Gather::start(tasks, "queue.intakes", take_in),
        }
    }
}

impl Redis {
    /// Connects, and begins to listen for events. Fails where the server cannot be reached now: a coordinator that
    /// starts should say so at once.
    pub async fn open(config: RedisConfig, tasks: &Tasks) -> Result<Self, ConnectError> {
        check(&config)?;
        let link = Arc::new(Link::new(
            address::Address::parse(&config.url)?,
            config.acknowledge,
        ));
        let server = server::ask(&link, config.acknowledge).await;
        let server = server.map_err(|source| ConnectError::Unreachable {
            place: address::shown(&config.url),
            source,
        })?;
        server.check(config.acknowledge)?;
        for warning in server.warnings(config.acknowledge) {
            tracing::warn!("{warning}");
        }
        link.set_synced(server.syncs_each_write());
        let health = Arc::new(Health::new(config.clock.clone()));
        health.note(&server);
        let core = |n: u16| {
            let prefix = format!("{{{}:{n}}}:", config.name);
            Arc::new(Core::new(Arc::clone(&link), prefix, config.clock.clone()))
        };
        let cores: Vec<Arc<Core>> = (0..config.shards).map(core).collect();
        let open_batches_max = config.machine.open_batches_max;
        let shards = Shards {
            cores: cores.clone(),
            machine: config.machine,
        };
        shards.join().await?;
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let first = listen::subscribe(&cores).await?;
        let listening = listen::listen(cores.clone(), first, events.clone());
        let watching = health::watch(
            link,
            config.acknowledge,
            Arc::clone(&health),
            server,
            shards,
            events.clone(),
        );
        let [first_core, ..] = &cores[..] else {
            return Err(QueueError::Closed.into());
        };
        Ok(Self {
            health,
            peers: Peers::new(Arc::clone(first_core)),
            background: [
                tasks.spawn_apart("queue.events", OnFailure::ShutDown, listening),
                tasks.spawn_apart("queue.health", OnFailure::ShutDown, watching),
            ],
            shards: cores
                .into_iter()
                .map(|core| Shard::start(core, tasks))
                .collect(),
            open_batches_max,
            next_shard: AtomicUsize::new(0),
            events,
            closed: AtomicBool::new(false),
        })
    }

    /// The server's time, by which leases end and jobs come due.
    pub fn clock(&self) -> Arc<dyn Clock> {
        self.health.clock()
    }

    fn shard(&self, project: &ProjectId) -> Result<&Shard, QueueError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(QueueError::Closed);
        }
        Ok(&self.shards[self.place(project)])
    }

    /// The shard of a project. All of a project is in one, so that dependencies, labels and fairness stay in a script.
    fn place(&self, project: &ProjectId) -> usize {
        let digest: [u8; 32] = Sha256::digest(project.as_str()).into();
        let [a, b, ..] = digest;
        usize::from(u16::from_le_bytes([a, b])) % self.shards.len()
    }

    fn core(&self, project: &ProjectId) -> Result<&Core, QueueError> {
        self.shard(project).map(|shard| shard.core.as_ref())
    }

    /// Asks every shard for its part of `items`, and puts the answers in the order of `items`.
    async fn divided<I, O: Clone, F>(
        &self,
        items: Vec<I>,
        project: impl Fn(&I) -> &ProjectId,
        ask: impl Fn(usize, Vec<I>) -> F,
    ) -> Result<Vec<O>, QueueError>
    where
        F: Future<Output = Result<Vec<O>, QueueError>>,
    {
        let mut parts: BTreeMap<usize, (Vec<usize>, Vec<I>)> = BTreeMap::new();
        let many = items.len();
        for (n, item) in items.into_iter().enumerate() {
            self.shard(project(&item))?;
            let (places, part) = parts.entry(self.place(project(&item))).or_default();
            places.push(n);
            part.push(item);
        }
        let mut answers: Vec<Option<O>> = vec![None; many];
        for (shard, (places, part)) in parts {
            for (place, answer) in places.into_iter().zip(ask(shard, part).await?) {
                answers[place] = Some(answer);
            }
        }
        answers
            .into_iter()
            .collect::<Option<_>>()
            .ok_or_else(|| decode::unreadable("too few answers"))
    }
}

fn check(config: &RedisConfig) -> Result<(), FieldError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if config.name.is_empty() || config.name.len() > 64 || !config.name.chars().all(plain) {
        return Err(FieldError::new(
            "queue_name",
            &config.name,
            "must be 1 to 64 of A-Z a-z 0-9 . _ -",
        ));
    }
    if config.shards == 0 || config.shards > SHARDS_MAX {
        let rule = format!("must be from 1 to {SHARDS_MAX}");
        return Err(FieldError::new("queue_shards", config.shards, rule));
    }
    Ok(())
}

/// What a coordinator tells every shard when it comes.
struct Shards {
    cores: Vec<Arc<Core>>,
    machine: MachineConfig,
}

impl Shards {
    /// The first coordinator of a queue says how many shards it has; the others must say the same.
    async fn join(&self) -> Result<(), ConnectError> {
        let asked = u16::try_from(self.cores.len()).unwrap_or(u16::MAX);
        for core in &self.cores {
            let (found, layout) = core.join(asked, &self.machine).await?;
            if found != asked {
                return Err(ConnectError::Shards { found, asked });
            }
            if layout != LAYOUT {
                return Err(ConnectError::OtherLayout { found: layout });
            }
        }
        Ok(())
    }
}

impl Queue for Redis {
    fn open_batch(&self, request: OpenBatch) -> Answer<'_, BatchView> {
        async move {
            self.health.admit()?;
            self.core(&request.batch.project)?
                .open_batch(request.clone(), self.open_batches_max)
                .await
        }
        .boxed()
    }

    fn submit(&self, chunk: Chunk) -> Answer<'_, ChunkReply> {
        async move {
            self.health.admit()?;
            self.core(&chunk.project.clone())?.submit(chunk).await
        }
        .boxed()
    }

    fn close_batch(&self, project: ProjectId, batch: BatchId) -> Answer<'_, BatchView> {
        async move {
            self.core(&project)?
                .close_batch(&project, &batch, false)
                .await
        }
        .boxed()
    }

    /// A repetition begins at the same shard, so that it finds what the request was granted.
    fn lease(&self, request: LeaseRequest) -> Answer<'_, Vec<Granted>> {
        async move {
            if self.closed.load(Ordering::Acquire) {
                return Err(QueueError::Closed);
            }
            let many = self.shards.len();
            let first = match request.request {
                0 => self.next_shard.fetch_add(1, Ordering::Relaxed),
                n => n as usize,
            };
            let mut granted = self.shards[first % many].core.lease(&request).await?;
            for offset in 1..many {
                let n = request.n.saturating_sub(granted.len() as u32);
                if n == 0 {
                    break;
                }
                let rest = LeaseRequest {
                    n,
                    ..request.clone()
                };
                granted.extend(
                    self.shards[(first + offset) % many]
                        .core
                        .lease(&rest)
                        .await?,
                );
            }
            Ok(granted)
        }
        .boxed()
    }

    fn renew(&self, renewals: Vec<Renewal>) -> Answer<'_, Vec<RenewReply>> {
        async move {
            let mut replies = Vec::with_capacity(renewals.len());
            for part in in_parts(renewals) {
                let ask = |shard: usize, items| self.shards[shard].renewals.ask(items);
                replies.extend(
                    self.divided(part, |renewal| &renewal.key.project, ask)
                        .await?,
                );
            }
            Ok(replies)
        }
        .boxed()
    }

    fn finish(&self, finishes: Vec<Finish>) -> Answer<'_, Vec<FinishAck>> {
        async move {
            let mut acks = Vec::with_capacity(finishes.len());
            for part in in_parts(finishes) {
                let ask = |shard: usize, items| self.shards[shard].finishes.ask(items);
                acks.extend(
                    self.divided(part, |finish| &finish.key.project, ask)
                        .await?,
                );
            }
            Ok(acks)
        }
        .boxed()
    }

    fn cancel(&self, which: Selector) -> Answer<'_, Cancelled> {
        async move { self.core(which.project())?.cancel(&which).await }.boxed()
    }

    fn requeue_dead(&self, which: Selector) -> Answer<'_, u64> {
        async move { self.core(which.project())?.requeue_dead(&which).await }.boxed()
    }

    /// Every shard is ticked, whatever becomes of the others.
    fn tick(&self, limit: usize) -> Answer<'_, Ticked> {
        async move {
            let (mut all, mut failed) = (Ticked::default(), None);
            for shard in self.open_shards()? {
                match shard.core.tick(limit).await {
                    Ok(one) => {
                        all.promoted += one.promoted;
                        all.reaped += one.reaped;
                        all.more |= one.more;
                    }
                    Err(error) => failed = Some(error),
                }
            }
            failed.map_or(Ok(all), Err)
        }
        .boxed()
    }

    fn extend_leases(&self, by: Duration) -> Answer<'_, ()> {
        async move {
            for shard in self.open_shards()? {
                shard.core.extend_leases(by).await?;
            }
            Ok(())
        }
        .boxed()
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Answer<'_, Vec<(ProjectId, BatchId)>> {
        async move {
            let mut gone = Vec::new();
            for shard in self.open_shards()? {
                let left = limit.saturating_sub(gone.len());
                gone.extend(shard.core.purge(older_than, left).await?);
            }
            Ok(gone)
        }
        .boxed()
    }

    fn close_idle(
        &self,
        idle_for: Duration,
        limit: usize,
    ) -> Answer<'_, Vec<(ProjectId, BatchId)>> {
        async move {
            let mut closed = Vec::new();
            for shard in self.open_shards()? {
                let left = limit.saturating_sub(closed.len());
                closed.extend(shard.core.close_idle(idle_for, left).await?);
            }
            Ok(closed)
        }
        .boxed()
    }

    fn job(&self, key: JobKey) -> Answer<'_, Option<JobDetail>> {
        async move { self.core(&key.project)?.job(&key).await }.boxed()
    }

    fn spec(&self, key: JobKey) -> Answer<'_, Option<JobSpec>> {
        async move { self.core(&key.project)?.spec(&key).await }.boxed()
    }

    fn batch(&self, project: ProjectId, batch: BatchId) -> Answer<'_, Option<BatchView>> {
        async move { self.core(&project)?.batch(&project, &batch).await }.boxed()
    }

    fn defaults(&self, project: ProjectId, batch: BatchId) -> Answer<'_, Option<Bytes>> {
        async move { self.core(&project)?.defaults(&project, &batch).await }.boxed()
    }

    fn intake(&self, project: ProjectId, batch: BatchId, chunk: u32) -> Answer<'_, Option<Intake>> {
        async move {
            let shard = self.shard(&project)?;
            let asked = vec![(project, batch, chunk)];
            let mut found = shard.intakes.ask(asked).await?;
            Ok(found.pop().flatten())
        }
        .boxed()
    }

    fn chunk_digest(
        &self,
        project: ProjectId,
        batch: BatchId,
        n: u32,
    ) -> Answer<'_, Option<[u8; 32]>> {
        async move { self.core(&project)?.chunk_digest(&project, &batch, n).await }.boxed()
    }

    fn batches(
        &self,
        project: ProjectId,
        after: Option<BatchId>,
        limit: usize,
    ) -> Answer<'_, Vec<BatchView>> {
        async move {
            self.core(&project)?
                .batches(&project, after.as_ref(), limit)
                .await
        }
        .boxed()
    }

    fn batches_newest(
        &self,
        project: ProjectId,
        before: Option<BatchSeq>,
        limit: usize,
    ) -> Answer<'_, Vec<BatchView>> {
        async move {
            self.core(&project)?
                .batches_newest(&project, before, limit)
                .await
        }
        .boxed()
    }

    fn jobs(
        &self,
        project: ProjectId,
        batch: BatchId,
        filter: JobFilter,
        after: Option<JobId>,
        limit: usize,
    ) -> Answer<'_, Vec<JobDetail>> {
        async move {
            let core = self.core(&project)?;
            core.jobs(&project, &batch, &filter, after.as_ref(), limit)
                .await
        }
        .boxed()
    }

    fn ended_after(
        &self,
        project: ProjectId,
        batch: BatchId,
        after: u64,
        limit: usize,
    ) -> Answer<'_, EndedPage> {
        async move {
            self.core(&project)?
                .ended_after(&project, &batch, after, limit)
                .await
        }
        .boxed()
    }

    fn stats(&self) -> Answer<'_, QueueStats> {
        async move {
            let mut all = QueueStats::default();
            for shard in self.open_shards()? {
                let one = shard.core.stats().await?;
                all.lines.extend(one.lines);
                all.batches_open += one.batches_open;
                all.stale_fences += one.stale_fences;
                all.expired_leases += one.expired_leases;
            }
            all.lines
                .sort_by(|a, b| (&a.project, a.kind).cmp(&(&b.project, b.kind)));
            Ok(all)
        }
        .boxed()
    }

    fn due_soon(&self, within: Duration) -> Answer<'_, BTreeMap<JobKind, u64>> {
        async move {
            let mut all = BTreeMap::new();
            for shard in self.open_shards()? {
                for (kind, jobs) in shard.core.due_soon(within).await? {
                    *all.entry(kind).or_default() += jobs;
                }
            }
            Ok(all)
        }
        .boxed()
    }

    fn announce(&self, by: CoordinatorId, changes: Vec<Change>) -> Answer<'_, bool> {
        async move {
            self.open_shards()?;
            self.peers.announce(&by, &changes).await
        }
        .boxed()
    }

    fn shown(&self, table: Table) -> Answer<'_, Vec<Shown>> {
        async move {
            self.open_shards()?;
            self.peers.shown(table).await
        }
        .boxed()
    }

    fn tell(&self, notice: Bytes) -> Answer<'_, ()> {
        async move {
            self.open_shards()?;
            self.peers.tell(&notice).await
        }
        .boxed()
    }

    fn restarts(&self) -> Option<u64> {
        Some(self.health.restarts())
    }

    fn condition(&self) -> BoxFuture<'_, Condition> {
        async { self.health.condition() }.boxed()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.closed.store(true, Ordering::Release);
        self.background.iter().for_each(TaskHandle::abort);
        async {}.boxed()
    }
}

impl Redis {
    fn open_shards(&self) -> Result<&[Shard], QueueError> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(QueueError::Closed),
            false => Ok(&self.shards),
        }
    }
}

/// Parts of at most [`ITEMS_MAX`].
fn in_parts<T>(items: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.into_iter().peekable();
    std::iter::from_fn(move || {
        items.peek()?;
        Some(items.by_ref().take(ITEMS_MAX.min(PAGE_MAX)).collect())
    })
}
