//! Everything that happens, in the order of a virtual clock.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::id::{BatchId, Fence, JobId, JobKey, ProjectId};
use espalier_core::queue::{
    FinishReply, ItemResult, JobKind, LeaseRequest, Machine, MachineConfig, NewBatch, NewJob,
    Outcome, RenewReply, StateName,
};
use espalier_core::time::Timestamp;

use super::chance::Chance;
use super::worker::{TTL_MS, Worker, failed};

const JOBS: u32 = 40;
const CHUNK: u32 = 8;
const COORDINATORS: usize = 2;
const WORKERS: u64 = 4;
/// Faults are played until then; afterwards everybody gets well, and all must end.
const FAULTS_MS: u64 = 60_000;
/// Longest time that all may take: a job that waits for an hour is one that hangs.
const END_MS: u64 = 3_600_000;

type Lease = (JobKey, Fence);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    /// The client sends a chunk, or sends it again because no answer came.
    Submit(u32),
    /// The queue ends what ran out; every coordinator sees to it each second.
    Tick,
    /// A worker looks after itself: connects, asks, renews, sends results.
    Turn(u64),
    /// An attempt has done its work and publishes.
    Publish(u64, Lease),
    /// A coordinator dies; a new one is in its place later.
    Die(usize),
    Rise(usize),
    /// A worker process dies; another one starts.
    Kill(u64),
    /// A worker stops where it is for a while.
    Pause(u64),
    /// Nobody reaches the queue for a while.
    Outage,
}

/// What happened in a run, to see that faults were more than words.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    stale: u64,
    adopted: u64,
    lost_answers: u64,
    expired: u64,
    repeated_chunks: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        self.stale += other.stale;
        self.adopted += other.adopted;
        self.lost_answers += other.lost_answers;
        self.expired += other.expired;
        self.repeated_chunks += other.repeated_chunks;
    }

    pub fn check_that_faults_had_an_effect(&self) {
        let all = [
            self.stale,
            self.adopted,
            self.lost_answers,
            self.expired,
            self.repeated_chunks,
        ];
        assert!(
            all.iter().all(|n| *n > 10),
            "too tame to show anything: {self:?}"
        );
    }
}

pub struct World {
    chance: Chance,
    now_ms: u64,
    order: u64,
    ahead: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    queue: Machine,
    queue_away_until_ms: u64,
    /// Manifests, created once: which attempt wrote each.
    store: BTreeMap<JobKey, Fence>,
    alive: [bool; COORDINATORS],
    workers: BTreeMap<u64, Worker>,
    next_worker: u64,
    acknowledged: BTreeSet<JobKey>,
    chunks_open: BTreeSet<u32>,
    accepted: BTreeMap<JobKey, u32>,
    /// The newest grant of each job; fences only grow.
    granted: BTreeMap<JobKey, Fence>,
    seen: Seen,
}

fn names() -> (ProjectId, BatchId) {
    (ProjectId::new("p").unwrap(), BatchId::new("b").unwrap())
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut world = Self {
            chance: Chance::new(seed),
            now_ms: 1_000_000,
            order: 0,
            ahead: BinaryHeap::new(),
            queue: Machine::new(MachineConfig::default()),
            queue_away_until_ms: 0,
            store: BTreeMap::new(),
            alive: [true; COORDINATORS],
            workers: BTreeMap::new(),
            next_worker: 0,
            acknowledged: BTreeSet::new(),
            chunks_open: (0..JOBS / CHUNK).collect(),
            accepted: BTreeMap::new(),
            granted: BTreeMap::new(),
            seen: Seen::default(),
        };
        let (project, batch) = names();
        let new = NewBatch {
            project,
            batch,
            params_digest: [0; 32],
        };
        let now = world.time();
        world.queue.open_batch(now, &new).unwrap();
        for n in 0..JOBS / CHUNK {
            world.in_ms(10 * u64::from(n), Happening::Submit(n));
        }
        for _ in 0..WORKERS {
            world.start_worker();
        }
        world.in_ms(1_000, Happening::Tick);
        world.plan_faults();
        world
    }

    fn plan_faults(&mut self) {
        for _ in 0..12 {
            let at = self.chance.below(FAULTS_MS);
            let fault = match self.chance.below(5) {
                0 => Happening::Die(self.chance.below(COORDINATORS as u64) as usize),
                1 | 2 => Happening::Kill(self.chance.below(WORKERS)),
                3 => Happening::Pause(self.chance.below(WORKERS)),
                _ => Happening::Outage,
            };
            self.in_ms(at, fault);
        }
    }

    fn time(&self) -> Timestamp {
        Timestamp::from_ms(self.now_ms)
    }

    fn in_ms(&mut self, wait: u64, what: Happening) {
        self.order += 1;
        self.ahead
            .push(Reverse((self.now_ms + wait, self.order, what)));
    }

    fn faulty(&self) -> bool {
        self.now_ms < 1_000_000 + FAULTS_MS
    }

    /// Plays until nothing is left to do, and checks what must hold.
    pub fn run(mut self) -> Seen {
        while let Some(Reverse((at, _, what))) = self.ahead.pop() {
            self.now_ms = at;
            assert!(at < 1_000_000 + END_MS, "something hangs");
            self.play(what);
            if self.is_over() {
                break;
            }
        }
        self.check_end();
        self.seen
    }

    fn play(&mut self, what: Happening) {
        match what {
            Happening::Submit(n) => self.submit(n),
            Happening::Tick => {
                if self.queue_answers() && self.alive.contains(&true) {
                    let now = self.time();
                    self.queue.tick(now, 100);
                }
                self.in_ms(1_000, Happening::Tick);
            }
            Happening::Turn(w) => self.turn(w),
            Happening::Publish(w, lease) => self.publish(w, lease),
            Happening::Die(c) => {
                self.alive[c] = false;
                let wait = self.chance.ms(100, 5_000);
                self.in_ms(wait, Happening::Rise(c));
            }
            Happening::Rise(c) => self.alive[c] = true,
            Happening::Kill(n) => {
                let victim = self.workers.keys().nth(n as usize).copied();
                victim.map(|w| self.workers.remove(&w));
                self.start_worker();
            }
            Happening::Pause(n) => {
                let until = self.now_ms + self.chance.ms(500, 3 * TTL_MS);
                if let Some(worker) = self.workers.values_mut().nth(n as usize) {
                    worker.paused_until_ms = until;
                }
            }
            Happening::Outage => {
                let length = self.chance.ms(200, 2 * TTL_MS);
                self.queue_away_until_ms = self.queue_away_until_ms.max(self.now_ms + length);
                // Deadlines stand still while nobody can renew.
                self.queue.extend_leases(Duration::from_millis(length));
            }
        }
    }

    fn queue_answers(&self) -> bool {
        self.now_ms >= self.queue_away_until_ms
    }

    /// Whether a call through `coordinator` reaches the queue, and whether its answer comes back.
    fn call(&mut self, coordinator: usize) -> (bool, bool) {
        let reached = self.alive[coordinator] && self.queue_answers();
        let lost = self.faulty() && self.chance.percent(10);
        self.seen.lost_answers += u64::from(reached && lost);
        (reached, reached && !lost)
    }

    fn submit(&mut self, n: u32) {
        let coordinator = self.chance.below(COORDINATORS as u64) as usize;
        let (reached, answered) = self.call(coordinator);
        let (project, batch) = names();
        if reached {
            let ids = (n * CHUNK..(n + 1) * CHUNK).map(|i| JobId::new(format!("j{i}")).unwrap());
            let jobs = ids.map(|id| NewJob {
                max_infra: 1_000,
                ..NewJob::new(id, JobKind::Rollout, [7; 32])
            });
            let jobs: Vec<NewJob> = jobs.collect();
            let keys = jobs
                .iter()
                .map(|job| JobKey::new(project.clone(), batch.clone(), job.id.clone()));
            let keys: Vec<JobKey> = keys.collect();
            let now = self.time();
            let answer = self
                .queue
                .submit(now, &project, &batch, n, [n as u8; 32], jobs)
                .unwrap();
            self.seen.repeated_chunks += u64::from(answer.repeated);
            assert!(
                answer
                    .items
                    .iter()
                    .all(|item| !matches!(item, ItemResult::Rejected(_)))
            );
            if answered {
                self.acknowledged.extend(keys);
                self.chunks_open.remove(&n);
            }
        }
        if self.chunks_open.contains(&n) {
            let wait = self.chance.ms(50, 1_000);
            self.in_ms(wait, Happening::Submit(n));
        } else if self.chunks_open.is_empty() {
            let now = self.time();
            self.queue.close_batch(now, &project, &batch).unwrap();
        }
    }

    fn start_worker(&mut self) {
        let w = self.next_worker;
        self.next_worker += 1;
        self.workers.insert(w, Worker::new(w, 4));
        let wait = self.chance.ms(1, 500);
        self.in_ms(wait, Happening::Turn(w));
    }

    /// What a worker does a few times a second. One that is paused does it when it goes on.
    fn turn(&mut self, w: u64) {
        let Some(mut worker) = self.workers.remove(&w) else {
            return;
        };
        if worker.paused_until_ms > self.now_ms {
            let wait = worker.paused_until_ms - self.now_ms;
            self.workers.insert(w, worker);
            return self.in_ms(wait, Happening::Turn(w));
        }
        worker.stop_overdue(self.now_ms);
        let broken = worker.coordinator.is_none_or(|c| !self.alive[c]);
        if broken || (self.faulty() && self.chance.percent(5)) {
            worker.stream += 1;
            worker.coordinator = Some(self.chance.below(COORDINATORS as u64) as usize);
        } else if let Some(c) = worker.coordinator {
            self.send_results(c, &mut worker);
            self.renew(c, &mut worker);
            self.ask(w, c, &mut worker);
        }
        self.workers.insert(w, worker);
        let wait = self.chance.ms(100, TTL_MS / 3);
        self.in_ms(wait, Happening::Turn(w));
    }

    fn send_results(&mut self, c: usize, worker: &mut Worker) {
        for ((key, fence), outcome) in worker.results.clone() {
            let (reached, answered) = self.call(c);
            if !reached {
                continue;
            }
            let now = self.time();
            match self.queue.finish(now, &key, fence, outcome.clone()) {
                FinishReply::Accepted { .. } => {
                    let counts = matches!(outcome, Outcome::Succeeded { .. });
                    *self.accepted.entry(key.clone()).or_default() += u32::from(counts);
                    let newest = self.granted.get(&key);
                    assert_eq!(
                        newest,
                        Some(&fence),
                        "{key} was finished under an old lease"
                    );
                    let has_manifest = self.store.contains_key(&key);
                    assert!(!counts || has_manifest, "{key} succeeded without a result");
                }
                FinishReply::Stale => self.seen.stale += 1,
                _ => {}
            }
            if answered {
                worker.results.remove(&(key, fence));
            }
        }
    }

    fn renew(&mut self, c: usize, worker: &mut Worker) {
        let (reached, answered) = self.call(c);
        if !reached {
            return;
        }
        let now = self.time();
        for (key, fence) in worker.running.keys().cloned().collect::<Vec<_>>() {
            let reply = self.queue.renew(now, &key, fence, None);
            match (answered, reply) {
                (true, RenewReply::Held { .. }) => worker.hold((key, fence), self.now_ms),
                (true, RenewReply::Lost) => drop(worker.running.remove(&(key, fence))),
                (false, _) => {}
            }
        }
    }

    /// Asks for work; a request whose answer was lost is repeated under its number.
    fn ask(&mut self, w: u64, c: usize, worker: &mut Worker) {
        let (number, n) = worker
            .asking
            .take()
            .unwrap_or((worker.requests + 1, worker.room()));
        if n == 0 {
            return;
        }
        worker.requests = worker.requests.max(number);
        let (reached, answered) = self.call(c);
        let mut grants = Vec::new();
        if reached {
            let request = LeaseRequest {
                worker: worker.id.clone(),
                request: number,
                kind: JobKind::Rollout,
                offers: BTreeSet::new(),
                n,
                ttl: Some(Duration::from_millis(TTL_MS)),
            };
            let now = self.time();
            grants = self.queue.lease(now, &request).unwrap();
        }
        for grant in &grants {
            let before = self.granted.insert(grant.key.clone(), grant.fence);
            assert!(
                before.is_none_or(|before| before <= grant.fence),
                "fences grow"
            );
        }
        if !answered {
            worker.asking = Some((number, n));
            return;
        }
        for grant in grants {
            let lease = (grant.key, grant.fence);
            if worker.running.contains_key(&lease) || worker.results.contains_key(&lease) {
                continue;
            }
            self.begin(w, worker, lease);
        }
    }

    /// An attempt looks first whether the result is there already.
    fn begin(&mut self, w: u64, worker: &mut Worker, lease: Lease) {
        if self.store.contains_key(&lease.0) {
            self.seen.adopted += 1;
            worker
                .results
                .insert(lease, Outcome::Succeeded { spawn: Vec::new() });
            return;
        }
        worker.hold(lease.clone(), self.now_ms);
        let wait = self.chance.ms(50, 2 * TTL_MS);
        self.in_ms(wait, Happening::Publish(w, lease));
    }

    /// Creates the manifest, or finds one. A worker that was paused between its last look at the clock and this write
    /// is a zombie: it writes all the same.
    fn publish(&mut self, w: u64, lease: Lease) {
        let zombie = self.chance.percent(50);
        let Some(worker) = self.workers.get_mut(&w) else {
            return;
        };
        if worker.paused_until_ms > self.now_ms {
            let wait = worker.paused_until_ms - self.now_ms;
            return self.in_ms(wait, Happening::Publish(w, lease));
        }
        if !zombie {
            worker.stop_overdue(self.now_ms);
        }
        if worker.running.remove(&lease).is_none() {
            return;
        }
        let outcome = match self.chance.below(20) {
            0 => failed(ErrorClass::Infra),
            1 => Outcome::Released,
            _ => {
                let found = self.store.entry(lease.0.clone()).or_insert(lease.1);
                self.seen.adopted += u64::from(*found != lease.1);
                Outcome::Succeeded { spawn: Vec::new() }
            }
        };
        worker.results.insert(lease, outcome);
    }

    fn is_over(&self) -> bool {
        let (project, batch) = names();
        let batch = self.queue.batch(&project, &batch).unwrap();
        self.chunks_open.is_empty() && batch.completed_at.is_some()
    }

    fn check_end(&mut self) {
        let (project, batch) = names();
        let batch = self.queue.batch(&project, &batch).unwrap();
        assert_eq!(self.acknowledged.len(), JOBS as usize);
        assert_eq!(
            batch.counters.total(),
            u64::from(JOBS),
            "nothing is lost, nothing comes twice"
        );
        assert_eq!(
            batch.counters.get(StateName::Succeeded),
            u64::from(JOBS),
            "{:?}",
            batch.counters
        );
        for key in &self.acknowledged {
            assert_eq!(
                self.accepted.get(key),
                Some(&1),
                "{key} has one accepted result"
            );
            assert!(self.store.contains_key(key));
        }
        let stats = self.queue.stats(self.time());
        self.seen.expired += stats.expired_leases;
    }
}
