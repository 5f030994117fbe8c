//! Two coordinators and two workers on one Redis, with a proxy between any two of them, two projects with batches of
//! the same size, and what must hold at the end whatever was done to any part.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use espalier_core::id::{BatchId, JobKey};
use espalier_core::layout;
use espalier_proto::v1::{self, CloseBatchRequest, Counts, JobState};
use serde_json::Value;
use tonic::Status;

use super::client::{BatchResult, Client};
use super::cluster::{Cluster, PROJECTS, Setup, Worker, key};
use super::history::{End, Ended, Event, History};
use super::proxy::Proxy;
use super::redis::RedisServer;
use super::store::FarStore;
use super::wait_for;

/// How long a coordinator may take to hear what it was not told at once.
const TOLD_DEADLINE: Duration = Duration::from_secs(20);
/// How long anything may take that a scenario waits for.
pub const DEADLINE: Duration = Duration::from_secs(180);
/// The batch of each project in which the rollouts are that faults happen to.
pub const BATCH: &str = "b";
/// What is past the end of a lease, by which somebody else has been granted its job: a lease that ended is found within
/// a second.
const PAST_END: Duration = Duration::from_secs(2);
/// How many grants a project may get ahead of another while both have ready jobs. They take turns; a grant whose
/// answer was lost is in no log, and up to the slots of a worker are granted in one answer.
pub const AHEAD_MAX: u64 = 8;
/// How long the processes of a killed worker may stay: the removal of its files may need ten tries, a second apart.
const GONE_DEADLINE: Duration = Duration::from_secs(20);
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// What workers ask.
    pub model_url: String,
    /// How long leases last.
    pub lease_ms: u64,
    /// Of each worker.
    pub slots: u32,
    /// By how much the clock of each worker is wrong, such as `+1h`, where it is.
    pub clocks: [Option<&'static str>; 2],
    /// Whether Redis has a replica, and what counts is there too.
    pub replicated: bool,
    /// Whether the store is an S3 server behind a proxy, in place of a folder.
    pub far_store: bool,
}

impl Parts {
    /// The usual ones: right clocks, a Redis without replica, and a folder.
    pub fn new(model_url: &str, lease_ms: u64, slots: u32) -> Self {
        Self {
            model_url: model_url.to_owned(),
            lease_ms,
            slots,
            clocks: [None; 2],
            replicated: false,
            far_store: false,
        }
    }

    fn setup(&self, queue: String, store: Option<&FarStore>) -> Setup {
        let environment = store.map(|store| store.environment().map(|(k, v)| (k.to_owned(), v)));
        Setup {
            coordinators: 2,
            lease_ttl_ms: self.lease_ms,
            acknowledge: if self.replicated {
                "replicated"
            } else {
                "fast"
            },
            store_url: store.map(|store| store.url().to_owned()),
            environment: environment.into_iter().flatten().collect(),
            ..Setup::new(&queue, &self.model_url)
        }
    }
}

/// Everything that runs.
#[derive(Debug)]
pub struct World {
    /// The queue's server.
    pub redis: RedisServer,
    /// Its replica, where it has one.
    pub replica: Option<RedisServer>,
    /// Between the coordinators and Redis.
    pub to_redis: Proxy,
    /// Between the workers and each coordinator.
    pub to_coordinators: Vec<Proxy>,
    /// The object store, where it is not a folder.
    pub store: Option<FarStore>,
    /// The coordinators.
    pub cluster: Cluster,
    /// The workers that have not been killed.
    pub workers: Vec<Worker>,
    /// The client of each project.
    pub clients: [Client; 2],
    parts: Parts,
    killed_workers: Vec<Worker>,
    workers_made: usize,
    /// A coordinator was killed, so that a line may have no end.
    torn: bool,
    holes: bool,
    had_holes: bool,
    chunks: Vec<Vec<JobKey>>,
    end: Vec<BatchEnd>,
}

/// How a batch of one project ended.
#[derive(Debug)]
struct BatchEnd {
    batch: BatchId,
    jobs: BTreeMap<JobKey, Ended>,
    counts: Counts,
}

impl World {
    /// Starts everything. Redis syncs each write: with `everysec` one that is killed in the middle of a sync has lost
    /// what it held back, which `docs/decisions/redis.md` says.
    pub async fn start(parts: Parts) -> Self {
        let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
        let replica = match parts.replicated {
            true => Some(RedisServer::start_replica(&redis).await),
            false => None,
        };
        let store = match parts.far_store {
            true => Some(FarStore::start("cluster").await),
            false => None,
        };
        let to_redis = Proxy::start(([127, 0, 0, 1], redis.port()).into()).await;
        let queue = format!("redis://{}", to_redis.address());
        let cluster = Cluster::start_with(parts.setup(queue, store.as_ref())).await;
        let mut to_coordinators = Vec::new();
        for address in cluster.addresses() {
            to_coordinators.push(Proxy::start(address).await);
        }
        let clients = cluster.clients_at(cluster.addresses()[0]).await;
        let mut world = Self {
            redis,
            replica,
            to_redis,
            to_coordinators,
            store,
            cluster,
            workers: Vec::new(),
            clients,
            parts,
            killed_workers: Vec::new(),
            workers_made: 0,
            torn: false,
            holes: false,
            had_holes: false,
            chunks: Vec::new(),
            end: Vec::new(),
        };
        for clock in world.parts.clocks {
            let worker = world.new_worker(clock);
            world.workers.push(worker);
        }
        world
    }

    /// Starts one more worker, which reaches the coordinators over their proxies.
    fn new_worker(&mut self, clock: Option<&str>) -> Worker {
        let addresses: Vec<_> = self.to_coordinators.iter().map(Proxy::address).collect();
        self.workers_made += 1;
        let (name, slots) = (format!("w{}", self.workers_made), self.parts.slots);
        match clock {
            None => self.cluster.worker_at(&addresses, &name, slots),
            Some(offset) => self
                .cluster
                .worker_with_clock(&addresses, &name, slots, offset),
        }
    }

    /// A time after which every lease of a part that was silent meanwhile has ended, and its job is somebody else's.
    pub fn past_lease(&self) -> Duration {
        Duration::from_millis(self.parts.lease_ms) + PAST_END
    }

    /// Kills a worker. Its MCP servers are left to themselves. Only coordinators tell the history: it gets no hole by that
    /// alone.
    pub fn kill_worker(&mut self, number: usize) {
        self.workers[number].process.kill();
    }

    /// Starts another worker in the place of one that was killed.
    pub fn replace_worker(&mut self, number: usize) {
        let new = self.new_worker(self.parts.clocks[number]);
        let killed = std::mem::replace(&mut self.workers[number], new);
        self.killed_workers.push(killed);
    }

    /// Kills a coordinator.
    pub fn kill_coordinator(&mut self, number: usize) {
        self.cluster.coordinators[number].process.kill();
        self.torn = true;
        self.expect_holes();
    }

    /// Lets a worker end in good order, and then starts another in its place.
    pub async fn restart_worker(&mut self, number: usize) {
        self.workers[number].terminate(STOP_DEADLINE).await;
        self.workers[number] = self.new_worker(self.parts.clocks[number]);
    }

    /// Lets a coordinator end in good order, and starts it again.
    pub async fn restart_coordinator(&mut self, number: usize) {
        let process = &mut self.cluster.coordinators[number].process;
        let status = process.terminate(STOP_DEADLINE).await;
        assert!(status.success(), "{status:?}");
        self.cluster.restart_coordinator(number).await;
    }

    /// Lets Redis end in good order, and starts it again. Answers that were on their way are lost.
    pub async fn restart_redis(&mut self) {
        self.expect_holes();
        self.redis.cli(&["SHUTDOWN"]).await;
        self.redis.restart().await;
    }

    /// Starts the store again, where it is a server.
    pub async fn restart_store(&mut self) {
        if let Some(store) = &mut self.store {
            store.server.restart().await;
        }
    }

    /// Of what happened to batches that are judged from now on, everything is told again.
    pub fn close_holes(&mut self) {
        self.holes = false;
    }

    /// Something may happen that nobody hears of, since answers of Redis are lost.
    pub fn expect_holes(&mut self) {
        self.holes = true;
        self.had_holes = true;
    }

    /// Sends the clients to another coordinator.
    pub async fn ask_at(&mut self, number: usize) {
        let address = self.cluster.coordinators[number].address;
        self.clients = self.cluster.clients_at(address).await;
    }

    /// Submits half of `lines` to `batch` of each project, as one chunk, and closes it.
    pub async fn submit(&mut self, batch: &str, lines: &[Value]) {
        for project in 0..PROJECTS.len() {
            let half: Vec<Value> = lines.iter().skip(project).step_by(2).cloned().collect();
            let client = &self.clients[project];
            let keys = submit_until_acknowledged(client, project, batch, 0, &half).await;
            self.acknowledged(keys);
            self.close(project, batch).await;
        }
    }

    /// Notes that a chunk with these jobs was acknowledged.
    pub fn acknowledged(&mut self, chunk: Vec<JobKey>) {
        self.chunks.push(chunk);
    }

    /// Closes `batch` of a project.
    pub async fn close(&self, project: usize, batch: &str) {
        let client = &self.clients[project];
        wait_for("the batch to be closed", DEADLINE, || {
            let mut client = client.clone();
            let batch = batch.to_owned();
            async move { client.jobs.close_batch(CloseBatchRequest { batch }).await }
        })
        .await;
    }

    /// Waits until `succeeded` of the jobs that were acknowledged have succeeded, both projects together.
    pub async fn after(&self, succeeded: u64) {
        wait_for("some jobs to succeed", DEADLINE, || async {
            match self.try_counts().await {
                Ok(counts) if counts.succeeded >= succeeded => Ok(()),
                seen => Err(seen),
            }
        })
        .await;
    }

    /// The counters of everything that was acknowledged, both projects together, as soon as somebody can tell.
    pub async fn counts(&self) -> Counts {
        wait_for("somebody to tell the counters", DEADLINE, || {
            self.try_counts()
        })
        .await
    }

    async fn try_counts(&self) -> Result<Counts, Status> {
        let mut sum = Counts::default();
        for (project, client) in PROJECTS.iter().zip(&self.clients) {
            let keys = self.chunks.iter().flatten();
            let own = keys.filter(|key| key.project.as_str() == *project);
            let batches: BTreeSet<&BatchId> = own.map(|key| &key.batch).collect();
            for batch in batches {
                add(&mut sum, &client.try_counts(batch.as_str()).await?);
            }
        }
        Ok(sum)
    }

    /// Waits until `batch` has ended in both projects, and keeps how, for [`World::judge`].
    pub async fn wait(&mut self, batch: &str) -> [BatchResult; 2] {
        let [one, other] = &mut self.clients;
        let results = [
            one.wait(batch, DEADLINE).await,
            other.wait(batch, DEADLINE).await,
        ];
        for (project, result) in PROJECTS.iter().zip(&results) {
            let ended = |(id, job): (&String, &v1::Job)| {
                let ended = Ended {
                    state: job.state(),
                    attempts: job.attempts,
                    handler_failures: job.handler_failures,
                    infra_failures: job.infra_failures,
                };
                (key(project, batch, id), ended)
            };
            self.end.push(BatchEnd {
                batch: batch.parse().expect("names of tests are valid"),
                jobs: result.jobs.iter().map(ended).collect(),
                counts: result.batch.counts.expect("a batch has counters"),
            });
        }
        results
    }

    /// Judges everything that was said so far, of batches that were waited for.
    ///
    /// # Panics
    /// At a rule that was broken.
    pub fn judge(&self) {
        let ended: BTreeSet<BatchId> = self.end.iter().map(|end| end.batch.clone()).collect();
        let broken = self.broken(&ended, self.had_holes);
        assert!(broken.is_empty(), "{broken:#?}");
    }

    /// Judges one batch that was waited for, while everything runs on: an end may be in the queue before the coordinator
    /// whose answer was lost hears of it.
    ///
    /// # Panics
    /// At a rule that was broken.
    pub async fn judge_batch(&self, batch: &str) {
        let batches = BTreeSet::from([batch.parse().expect("names of tests are valid")]);
        wait_for("the rules to hold", TOLD_DEADLINE, || async {
            let broken = self.broken(&batches, self.holes);
            if broken.is_empty() {
                Ok(())
            } else {
                Err(broken)
            }
        })
        .await;
    }

    fn broken(&self, batches: &BTreeSet<BatchId>, holes: bool) -> Vec<String> {
        let mut history = History {
            chunks: self.chunks.clone(),
            events: self.cluster.history(self.torn),
            holes,
        };
        history.events.retain(|e| batches.contains(&e.job().batch));
        let of_batches = |chunk: &Vec<JobKey>| chunk.iter().all(|key| batches.contains(&key.batch));
        history.chunks.retain(of_batches);
        let granted = history
            .events
            .iter()
            .any(|e| matches!(e, Event::Granted(_)));
        assert!(granted, "the coordinators told no history");
        let mut end = End::default();
        for ended in self.end.iter().filter(|end| batches.contains(&end.batch)) {
            end.jobs.extend(ended.jobs.clone());
            add(&mut end.counts, &ended.counts);
        }
        history.broken(&end, AHEAD_MAX)
    }

    /// Waits for `batch` and lets everything end. Whatever happened on the way: every result that was accepted is whole,
    /// nothing is left over, and no rule was broken.
    pub async fn end(&mut self, batch: &str) -> [BatchResult; 2] {
        let results = self.wait(batch).await;
        for (project, result) in results.iter().enumerate() {
            let jobs = result.jobs.values();
            for job in jobs.filter(|job| job.state() == JobState::Succeeded) {
                self.check_published(project, batch, job).await;
            }
        }
        self.stop_workers().await;
        self.judge();
        results
    }

    /// The manifest of a job is where its result says, and what it names is there and whole.
    async fn check_published(&mut self, project: usize, batch: &str, job: &v1::Job) {
        let key = key(PROJECTS[project], batch, &job.id);
        assert_eq!(job.manifest, layout::manifest(&key));
        if self.store.is_none() {
            let manifest = self.cluster.manifest(&key);
            assert!(self.cluster.has_trace(&key, manifest.fence), "{key}");
        } else {
            // The coordinator reads it from the store, and checks it against the manifest.
            let trace = self.clients[project].trace(batch, &job.id).await;
            assert_eq!(trace.header.job, key);
        }
    }

    /// Lets the workers drain, and waits until nothing is left of them and of those that were killed: no process, no
    /// temporary file.
    pub async fn stop_workers(&mut self) {
        for worker in &mut self.workers {
            worker.terminate(STOP_DEADLINE).await;
        }
        for worker in &self.killed_workers {
            worker.trail.wait_until_cold(GONE_DEADLINE).await;
        }
        self.workers.clear();
        self.killed_workers.clear();
    }
}

/// Submits a chunk to `batch` of a project until it is acknowledged, as a client does. Gives the jobs that were.
pub async fn submit_until_acknowledged(
    client: &Client,
    project: usize,
    batch: &str,
    chunk: u32,
    lines: &[Value],
) -> Vec<JobKey> {
    let answer = wait_for("a chunk to be acknowledged", DEADLINE, || {
        let mut client = client.clone();
        async move {
            client.try_open(batch).await?;
            client.chunk(batch, chunk, lines).await
        }
    })
    .await;
    assert_eq!(answer.accepted as usize, lines.len(), "{answer:?}");
    let id = |line: &Value| line["id"].as_str().expect("a job has an id").to_owned();
    let keys = lines
        .iter()
        .map(|line| key(PROJECTS[project], batch, &id(line)));
    keys.collect()
}

fn add(sum: &mut Counts, counts: &Counts) {
    sum.blocked += counts.blocked;
    sum.delayed += counts.delayed;
    sum.ready += counts.ready;
    sum.leased += counts.leased;
    sum.succeeded += counts.succeeded;
    sum.dead += counts.dead;
    sum.cancelled += counts.cancelled;
}
