//! Random commands on a virtual clock: after each, every rule of [`super::check`] holds; at random points the
//! machine is written and read back, and must go on as the one that was not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::super::{
    FinishReply, Grant, ItemResult, JobKind, LeaseRequest, NewBatch, NewJob, Outcome, RenewReply,
    Selector, StateName,
};
use super::check::{Rows, check, load, same, store, visible};
use super::{Cursor, Machine, MachineConfig};
use crate::error::ErrorClass;
use crate::id::{BatchId, Fence, JobId, JobKey, ProjectId, WorkerId};
use crate::time::Timestamp;

#[derive(Clone, Debug)]
enum Command {
    Open(u8),
    Submit {
        batch: u8,
        chunk: u8,
        jobs: Vec<Spec>,
    },
    Close(u8),
    Lease {
        worker: u8,
        n: u32,
        request: u64,
        gpu: bool,
    },
    Renew(usize),
    Finish {
        grant: usize,
        how: How,
    },
    Cancel(u8, u8),
    Requeue(u8, u8),
    Tick(usize),
    Wait(u64),
    StepBack(u64),
    Outage(u64),
    Purge(u64),
    Restart,
}

#[derive(Clone, Debug)]
struct Spec {
    id: u8,
    deps: Vec<u8>,
    priority: u8,
    gpu: bool,
    delay_ms: u64,
    runtime_ms: u64,
}

#[derive(Clone, Debug)]
enum How {
    Succeed(Vec<Spec>),
    Fail(ErrorClass),
    Release,
}

fn spec() -> impl Strategy<Value = Spec> {
    (
        0u8..20,
        vec(0u8..24, 0..3),
        prop_oneof![Just(5u8), 0u8..10],
        prop::bool::weighted(0.2),
        prop_oneof![3 => Just(0u64), 1 => 0u64..20_000],
        prop_oneof![3 => Just(0u64), 1 => 1u64..90_000],
    )
        .prop_map(|(id, deps, priority, gpu, delay_ms, runtime_ms)| Spec {
            id,
            deps,
            priority,
            gpu,
            delay_ms,
            runtime_ms,
        })
}

fn how() -> impl Strategy<Value = How> {
    let class = prop_oneof![
        Just(ErrorClass::Invalid),
        Just(ErrorClass::Handler),
        Just(ErrorClass::Infra),
        Just(ErrorClass::Preempted),
        Just(ErrorClass::Cancelled),
    ];
    prop_oneof![
        4 => prop_oneof![3 => Just(Vec::new()), 1 => vec(spec(), 1..3)].prop_map(How::Succeed),
        4 => class.prop_map(How::Fail),
        1 => Just(How::Release),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        2 => (0u8..4).prop_map(Command::Open),
        6 => (0u8..4, 0u8..6, vec(spec(), 0..8))
            .prop_map(|(batch, chunk, jobs)| Command::Submit { batch, chunk, jobs }),
        1 => (0u8..4).prop_map(Command::Close),
        8 => (0u8..3, 0u32..5, 0u64..4, any::<bool>())
            .prop_map(|(worker, n, request, gpu)| Command::Lease { worker, n, request, gpu }),
        3 => (0usize..64).prop_map(Command::Renew),
        8 => (0usize..64, how()).prop_map(|(grant, how)| Command::Finish { grant, how }),
        1 => (0u8..4, 0u8..24).prop_map(|(b, j)| Command::Cancel(b, j)),
        2 => (0u8..4, 0u8..24).prop_map(|(b, j)| Command::Requeue(b, j)),
        2 => (1usize..20).prop_map(Command::Tick),
        3 => (0u64..70_000).prop_map(Command::Wait),
        1 => (0u64..5_000).prop_map(Command::StepBack),
        1 => (0u64..5_000).prop_map(Command::Outage),
        1 => (0u64..60_000).prop_map(Command::Purge),
        2 => Just(Command::Restart),
    ]
}

/// Batches 0 to 2 are of project `a`, 3 of project `b`.
fn names(batch: u8) -> (ProjectId, BatchId) {
    let project = if batch < 3 { "a" } else { "b" };
    let batch = BatchId::new(format!("batch-{batch}")).unwrap();
    (ProjectId::new(project).unwrap(), batch)
}

/// Jobs 0 to 19 are of the batch itself, those above of its neighbour.
fn key(batch: u8, job: u8) -> JobKey {
    let (batch, job) = if job < 20 {
        (batch, job)
    } else {
        ((batch + 1) % 4, job - 20)
    };
    let (project, batch) = names(batch);
    JobKey::new(project, batch, JobId::new(format!("job-{job}")).unwrap())
}

struct World {
    machine: Machine,
    rows: Rows,
    now: Timestamp,
    grants: Vec<Grant>,
    last_fence: Fence,
    accepted: BTreeMap<JobKey, u32>,
    acknowledged: BTreeSet<JobKey>,
    succeeded: BTreeSet<JobKey>,
}

impl World {
    fn new() -> Self {
        Self {
            machine: Machine::new(MachineConfig::default()),
            rows: Rows::default(),
            now: Timestamp::from_ms(1_000_000),
            grants: Vec::new(),
            last_fence: Fence(0),
            accepted: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            succeeded: BTreeSet::new(),
        }
    }

    fn job(&self, batch: u8, spec: &Spec) -> NewJob {
        let id = key(batch, spec.id).job;
        let mut digest = [spec.priority; 32];
        digest[0] = spec.id;
        NewJob {
            priority: spec.priority,
            needs: spec.gpu.then(|| "gpu".to_owned()).into_iter().collect(),
            deps: spec.deps.iter().map(|dep| key(batch, *dep)).collect(),
            not_before: (spec.delay_ms > 0)
                .then(|| self.now + Duration::from_millis(spec.delay_ms)),
            max_attempts: 2,
            max_infra: 3,
            max_runtime: (spec.runtime_ms > 0).then(|| Duration::from_millis(spec.runtime_ms)),
            labels: BTreeMap::from([("parity".to_owned(), (spec.id % 2).to_string())]),
            ..NewJob::new(id, JobKind::Rollout, digest)
        }
    }

    fn run(&mut self, command: Command) {
        match command {
            Command::Open(batch) => {
                let (project, batch) = names(batch);
                let new = NewBatch {
                    project,
                    batch,
                    params_digest: [0; 32],
                };
                self.machine.open_batch(self.now, &new).unwrap();
            }
            Command::Submit { batch, chunk, jobs } => self.submit(batch, chunk, &jobs),
            Command::Close(batch) => {
                let (project, batch) = names(batch);
                let _ = self.machine.close_batch(self.now, &project, &batch);
            }
            Command::Lease {
                worker,
                n,
                request,
                gpu,
            } => self.lease(worker, n, request, gpu),
            Command::Renew(n) => self.renew(n),
            Command::Finish { grant, how } => self.finish(grant, how),
            Command::Cancel(batch, job) => {
                let which = selector(batch, job);
                let mut cursor = Cursor::default();
                while !cursor.is_at_end() {
                    let page = self.machine.cancel_some(self.now, &which, &mut cursor, 3);
                    check(&self.machine);
                    if page.is_err() {
                        break;
                    }
                }
            }
            Command::Requeue(batch, job) => {
                let which = selector(batch, job);
                let mut cursor = Cursor::default();
                while !cursor.is_at_end() {
                    let page = self.machine.requeue_some(self.now, &which, &mut cursor, 3);
                    check(&self.machine);
                    if page.is_err() {
                        break;
                    }
                }
            }
            Command::Tick(limit) => {
                self.machine.tick(self.now, limit);
            }
            Command::Wait(ms) => self.now = self.now + Duration::from_millis(ms),
            Command::StepBack(ms) => {
                self.now = Timestamp(self.now.0.saturating_sub(ms * 1_000));
            }
            Command::Outage(ms) => self.machine.extend_leases(Duration::from_millis(ms)),
            Command::Purge(age_ms) => self.purge(age_ms),
            Command::Restart => self.restart(),
        }
    }

    fn submit(&mut self, batch: u8, chunk: u8, specs: &[Spec]) {
        let (project, name) = names(batch);
        let jobs: Vec<_> = specs.iter().map(|spec| self.job(batch, spec)).collect();
        let digest = Sha256::digest(format!("{specs:?}")).into();
        let send = |machine: &mut Machine, now| {
            let n = u32::from(chunk);
            machine.submit(now, &project, &name, n, digest, jobs.clone())
        };
        let Ok(answer) = send(&mut self.machine, self.now) else {
            return;
        };
        assert_eq!(answer.items.len(), specs.len());
        for (spec, item) in specs.iter().zip(&answer.items) {
            if *item == ItemResult::Accepted {
                self.acknowledged.insert(key(batch, spec.id));
            }
        }
        let before = visible(&self.machine);
        let again = send(&mut self.machine, self.now).unwrap();
        assert!(again.added.is_empty());
        for (first, second) in answer.items.iter().zip(&again.items) {
            match first {
                ItemResult::Accepted => assert_eq!(*second, ItemResult::AlreadyThere),
                other => assert_eq!(second, other),
            }
        }
        same(&before, &visible(&self.machine));
    }

    fn lease(&mut self, worker: u8, n: u32, request: u64, gpu: bool) {
        let request = LeaseRequest {
            worker: WorkerId::new(format!("w{worker}")).unwrap(),
            request,
            kind: JobKind::Rollout,
            offers: gpu.then(|| "gpu".to_owned()).into_iter().collect(),
            n,
            ttl: None,
        };
        for grant in self.machine.lease(self.now, &request).unwrap() {
            let known = self.grants.iter().any(|g| g.fence == grant.fence);
            if !known {
                assert!(grant.fence > self.last_fence, "fences grow");
                self.last_fence = grant.fence;
                self.grants.push(grant);
            }
        }
    }

    fn renew(&mut self, n: usize) {
        if self.grants.is_empty() {
            return;
        }
        let grant = &self.grants[n % self.grants.len()];
        let reply = self
            .machine
            .renew(self.now, &grant.key, grant.fence, Some("half"));
        let job = self.machine.job(&grant.key);
        if let RenewReply::Held { .. } = reply {
            assert_eq!(job.unwrap().state.name(), StateName::Leased);
        }
    }

    fn finish(&mut self, n: usize, how: How) {
        if self.grants.is_empty() {
            return;
        }
        let grant = self.grants[n % self.grants.len()].clone();
        let succeeds = matches!(how, How::Succeed(_));
        let batch: u8 = grant.key.batch.as_str()[6..].parse().unwrap();
        let outcome = match how {
            How::Succeed(specs) => Outcome::Succeeded {
                spawn: specs.iter().map(|spec| self.job(batch, spec)).collect(),
            },
            How::Fail(class) => Outcome::Failed {
                class,
                message: "no".into(),
                log_tail: "line".into(),
                retry_after: None,
            },
            How::Release => Outcome::Released,
        };
        let before = visible(&self.machine);
        let reply = self
            .machine
            .finish(self.now, &grant.key, grant.fence, outcome.clone());
        match reply {
            FinishReply::Accepted { .. } => {
                *self.accepted.entry(grant.key.clone()).or_default() += u32::from(succeeds);
                if succeeds {
                    self.succeeded.insert(grant.key.clone());
                }
                let again = self
                    .machine
                    .finish(self.now, &grant.key, grant.fence, outcome);
                assert_eq!(again, FinishReply::AlreadyFinished);
            }
            _ => assert_eq!(
                before,
                visible(&self.machine),
                "a refused finish has no effect"
            ),
        }
    }

    fn purge(&mut self, age_ms: u64) {
        let before = Timestamp(self.now.0.saturating_sub(age_ms * 1_000));
        for (project, batch) in self.machine.purgeable(before, 2) {
            // Most are forgotten job by job, with other commands in between.
            let purged = match age_ms % 4 {
                0 => self
                    .machine
                    .purge_batch(self.now, &project, &batch)
                    .map(drop),
                _ => self
                    .machine
                    .forget_name(self.now, &project, &batch)
                    .map(drop),
            };
            purged.unwrap();
            let kept = |key: &JobKey| key.project != project || key.batch != batch;
            self.acknowledged.retain(kept);
            self.succeeded.retain(kept);
            self.accepted.retain(|key, _| kept(key));
            self.grants.retain(|grant| kept(&grant.key));
        }
    }

    fn restart(&mut self) {
        store(&mut self.rows, self.machine.take_changes());
        let loaded = load(&self.rows).unwrap();
        check(&loaded);
        same(&visible(&loaded), &visible(&self.machine));
        self.machine = loaded;
        self.machine.refresh_leases(self.now);
    }

    fn check(&mut self) {
        self.machine.purge_some(1);
        check(&self.machine);
        for key in &self.acknowledged {
            assert!(self.machine.job(key).is_some(), "{key} is lost");
        }
        for key in &self.succeeded {
            let state = self.machine.job(key).map(|job| job.state.name());
            assert_eq!(state, Some(StateName::Succeeded), "success is final");
        }
        assert!(self.accepted.values().all(|n| *n <= 1), "one result a job");
        self.machine.take_events();
    }
}

fn selector(batch: u8, job: u8) -> Selector {
    let (project, name) = names(batch);
    match job {
        0 => Selector::Batch(project, name),
        1 | 2 => Selector::Label {
            project,
            key: "parity".into(),
            value: (job % 2).to_string(),
        },
        job => Selector::Job(key(batch, job)),
    }
}

/// Runs what is left until nothing can move any more: no job hangs.
fn drain(world: &mut World) {
    for batch in 0..4 {
        world.run(Command::Close(batch));
    }
    for _ in 0..100 {
        world.grants.clear();
        world.run(Command::Lease {
            worker: 9,
            n: 50,
            request: 0,
            gpu: true,
        });
        for n in 0..world.grants.len() {
            world.run(Command::Finish {
                grant: n,
                how: How::Succeed(Vec::new()),
            });
        }
        if active(world) == 0 {
            break;
        }
        world.run(Command::Wait(60_000));
    }
    let stats = world.machine.stats(world.now);
    assert_eq!((active(world), stats.batches_open), (0, 0), "{stats:?}");
}

fn active(world: &World) -> u64 {
    let stats = world.machine.stats(world.now);
    stats.lines.iter().map(|line| line.counters.active()).sum()
}

proptest! {
    #[test]
    fn rules_hold_after_every_command(commands in vec(command(), 1..120)) {
        let mut world = World::new();
        for command in commands {
            world.run(command);
            world.check();
        }
        drain(&mut world);
        world.check();
        world.restart();
    }

    /// A machine that was written and read back decides as the one that was not.
    #[test]
    fn a_restart_changes_no_decision(
        commands in vec(command(), 1..60),
        later in vec(command(), 1..60),
    ) {
        let lasting = |c: &Command| !matches!(c, Command::Restart | Command::Lease { request: 1.., .. });
        let mut world = World::new();
        let stored = |c: &Command| !matches!(c, Command::Renew(_) | Command::Outage(_));
        commands.into_iter().filter(stored).for_each(|command| world.run(command));
        // How far time had come is not stored: the clock of the new process has to be as far.
        world.now = world.now.max(world.machine.now);
        let mut restarted = World::new();
        restarted.now = world.now;
        restarted.grants = world.grants.clone();
        restarted.last_fence = world.last_fence;
        restarted.machine = world.machine.clone();
        restarted.rows = world.rows.clone();
        restarted.restart();
        world.machine.refresh_leases(world.now);
        for command in later.into_iter().filter(lasting) {
            world.run(command.clone());
            restarted.run(command);
            same(&visible(&world.machine), &visible(&restarted.machine));
        }
    }
}
