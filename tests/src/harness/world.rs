//! Two coordinators and some workers on one Redis, with a proxy between any two of them, two projects with batches of
//! the same size, and what must hold at the end whatever was done to any part.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use espalier_core::id::{BatchId, JobKey};
use espalier_proto::v1::{self, CloseBatchRequest, Counts};
use serde_json::{Value, json};

use super::client::{BatchResult, Client};
use super::cluster::{Cluster, PROJECTS, Setup, Worker, key};
use super::history::{End, Ended, Event, History};
use super::model::{sum_job, toy_job};
use super::proxy::Proxy;
use super::redis::RedisServer;
use super::wait_for;

/// How long a coordinator may take to hear what it was not told at once.
const TOLD_DEADLINE: Duration = Duration::from_secs(20);
/// How long anything may take that a scenario waits for.
pub const DEADLINE: Duration = Duration::from_secs(180);
/// Far shorter than the faults, so that leases would end if nothing were done about it.
pub const LEASE_MS: u64 = 2_000;
/// How many grants a project may get ahead of another while both have ready jobs. They take turns; a grant whose
/// answer was lost is in no log, and up to the slots of a worker are granted in one answer.
pub const AHEAD_MAX: u64 = 8;
/// How long the processes of a killed worker may stay: the removal of its files may need ten tries, a second apart.
const GONE_DEADLINE: Duration = Duration::from_secs(20);
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// Everything that runs.
#[derive(Debug)]
pub struct World {
    /// The queue's server.
    pub redis: RedisServer,
    /// Between the coordinators and Redis.
    pub to_redis: Proxy,
    /// Between the workers and each coordinator.
    pub to_coordinators: Vec<Proxy>,
    /// The coordinators.
    pub cluster: Cluster,
    /// The workers that have not been killed.
    pub workers: Vec<Worker>,
    /// The client of each project.
    pub clients: [Client; 2],
    slots: u32,
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
    /// Starts two coordinators on this Redis, with what `setup` says beside the queue and the number of coordinators, and
    /// workers with `slots` each.
    pub async fn start(redis: RedisServer, setup: Setup, workers: usize, slots: u32) -> Self {
        let to_redis = Proxy::start(([127, 0, 0, 1], redis.port()).into()).await;
        let cluster = Cluster::start_with(Setup {
            queue: format!("redis://{}", to_redis.address()),
            coordinators: 2,
            ..setup
        })
        .await;
        let mut to_coordinators = Vec::new();
        for address in cluster.addresses() {
            to_coordinators.push(Proxy::start(address).await);
        }
        let clients = cluster.clients_at(cluster.addresses()[0]).await;
        let mut world = Self {
            redis,
            to_redis,
            to_coordinators,
            cluster,
            workers: Vec::new(),
            clients,
            slots,
            killed_workers: Vec::new(),
            workers_made: 0,
            torn: false,
            holes: false,
            had_holes: false,
            chunks: Vec::new(),
            end: Vec::new(),
        };
        for _ in 0..workers {
            world.add_worker();
        }
        world
    }

    /// Starts one more worker, which reaches the coordinators over their proxies.
    pub fn add_worker(&mut self) {
        let worker = self.new_worker(None);
        self.workers.push(worker);
    }

    /// The same, with a clock that is wrong by `offset`, such as `+1h`.
    pub fn add_worker_with_clock(&mut self, offset: &str) {
        let worker = self.new_worker(Some(offset));
        self.workers.push(worker);
    }

    fn new_worker(&mut self, clock: Option<&str>) -> Worker {
        let addresses: Vec<_> = self.to_coordinators.iter().map(Proxy::address).collect();
        self.workers_made += 1;
        let (name, slots) = (format!("w{}", self.workers_made), self.slots);
        match clock {
            None => self.cluster.worker_at(&addresses, &name, slots),
            Some(offset) => self
                .cluster
                .worker_with_clock(&addresses, &name, slots, offset),
        }
    }

    /// Kills a worker. Its MCP servers are left to themselves. Only coordinators tell the history: it gets no hole by that
    /// alone.
    pub fn kill_worker(&mut self, number: usize) {
        self.workers[number].process.kill();
    }

    /// Starts another worker in the place of one that was killed.
    pub fn replace_worker(&mut self, number: usize) {
        let new = self.new_worker(None);
        let killed = std::mem::replace(&mut self.workers[number], new);
        self.killed_workers.push(killed);
    }

    /// Kills a coordinator.
    pub fn kill_coordinator(&mut self, number: usize) {
        self.cluster.coordinators[number].process.kill();
        self.torn = true;
        self.expect_holes();
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

    /// Waits until `succeeded` jobs of `batch` have succeeded in both projects together.
    pub async fn after(&self, batch: &str, succeeded: u64) {
        wait_for("some jobs to succeed", DEADLINE, || async {
            let mut seen = 0;
            for client in &self.clients {
                seen += client.try_counts(batch).await.map_or(0, |c| c.succeeded);
            }
            if seen >= succeeded { Ok(()) } else { Err(seen) }
        })
        .await;
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

    /// Waits for a batch of `count` toy jobs and lets everything end. Whatever happened on the way: every job was solved,
    /// without a failure of its own, every result is whole, nothing is left over, and no rule was broken.
    pub async fn check(&mut self, batch: &str, count: usize) -> [BatchResult; 2] {
        let results = self.wait(batch).await;
        for (project, result) in PROJECTS.iter().zip(&results) {
            assert_eq!(result.jobs.len(), count / 2, "a job was lost");
            assert_eq!(result.solved(), count / 2, "{:#?}", result.unsolved());
            for job in result.jobs.values() {
                assert_eq!(
                    job.handler_failures, 0,
                    "{} spent an attempt of its own",
                    job.id
                );
                if self.cluster.has_folder() {
                    self.cluster.manifest(&key(project, batch, &job.id));
                }
            }
        }
        self.stop_workers().await;
        self.judge();
        results
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

/// Sums, and one in five that is at work for a second, so that some are whenever something happens.
pub fn toy_jobs(count: usize) -> Vec<Value> {
    let sleep = json!([{"tool": "sleep", "arguments": {"ms": 1000}}, {"answer": "done"}]);
    let job = |n: usize| match n % 5 {
        0 => toy_job(&format!("job-{n:04}"), &sleep, "done"),
        _ => sum_job(&format!("job-{n:04}"), n),
    };
    (0..count).map(job).collect()
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
