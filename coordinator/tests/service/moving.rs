//! Two coordinators of one queue, and the real worker loop that moves between them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use espalier_coordinator::endpoints::ModelEndpoint;
use espalier_core::layout;
use espalier_core::time::Timestamp;
use espalier_core::trace::{RolloutSummary, StopReason, Summary, Totals};
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::config::Secret;
use espalier_runtime::health::Health;
use espalier_runtime::model::Served;
use espalier_runtime::net::Addresses;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_runtime::worker::{
    Grant, Handler, JobContext, JobOutcome, ProcessId, WorkerConfig, WorkerDeps, run,
};
use tokio_util::sync::CancellationToken;

use crate::support::*;

const SLOTS: u32 = 4;
/// A worker of the test's own, which does nothing.
const STAYS: &str = "stays";

/// Publishes every job: those whose names begin with `long` when the gate opens, others at once.
#[derive(Default)]
struct Work {
    gate: CancellationToken,
    /// How often each job was begun.
    begun: Mutex<BTreeMap<String, u32>>,
    running: Mutex<(u32, u32)>,
    served: Mutex<Vec<Served>>,
}

impl Work {
    fn begin(&self, grant: &Grant) {
        *lock(&self.begun)
            .entry(grant.key.job.to_string())
            .or_default() += 1;
        let mut running = lock(&self.running);
        running.0 += 1;
        running.1 = running.1.max(running.0);
    }

    /// Every job was begun once, and never more than there are slots at a time.
    fn check(&self, jobs: usize) {
        let begun = lock(&self.begun).clone();
        assert_eq!(begun.len(), jobs);
        let again: Vec<_> = begun.iter().filter(|(_, times)| **times > 1).collect();
        assert!(again.is_empty(), "begun again: {again:?}");
        let most = lock(&self.running).1;
        assert!(most <= SLOTS, "{most} at a time");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl Handler for Work {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Rollout
    }

    fn endpoints(&self, served: Vec<Served>) {
        *lock(&self.served) = served;
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        self.begin(&grant);
        if grant.key.job.as_str().starts_with("long") {
            tokio::select! {
                () = self.gate.cancelled() => {}
                () = context.lease().stopped().cancelled_owned() => {}
            }
        }
        lock(&self.running).0 -= 1;
        JobOutcome::Published {
            manifest: layout::manifest(&grant.key),
            summary: Summary::Rollout(RolloutSummary {
                reward: Some(1.0),
                stop: StopReason::Answered,
                reason: String::new(),
                task_id: String::new(),
                task_kind: String::new(),
                totals: Totals::default(),
            }),
            spawn: Vec::new(),
        }
    }
}

/// A worker of `coordinators` that offers the browser.
fn start(coordinators: &[&Coordinator]) -> (Arc<Work>, Tasks) {
    let addresses: Vec<String> = coordinators
        .iter()
        .map(|coordinator| format!("http://{}", coordinator.address))
        .collect();
    let config = WorkerConfig {
        process: ProcessId::default(),
        coordinators: Addresses::parse(&addresses.join(",")).unwrap(),
        tls: None,
        token: Some(Secret::new(WORKER)),
        tags: vec!["mcp:browser".to_owned()],
        slots: SLOTS,
        grace: Duration::ZERO,
        tell_every: None,
        once: None,
    };
    let shutdown = Shutdown::new();
    let tasks = Tasks::new(shutdown.clone());
    let deps = WorkerDeps {
        store: coordinators[0].store.clone(),
        health: Health::default(),
        tasks: tasks.clone(),
    };
    let work = Arc::new(Work::default());
    let running = run(Arc::clone(&work), config, deps, shutdown);
    tasks.spawn("test.worker", OnFailure::Log, running);
    (work, tasks)
}

async fn submit_all(jobs: &mut Jobs, long: usize, short: usize) {
    open(jobs, "b1").await;
    let names = (0..long).map(|i| format!("long{i}"));
    let names = names.chain((0..short).map(|i| format!("short{i}")));
    let specs = names.map(|name| plain(&name)).collect();
    submit(jobs, "b1", 0, specs).await;
}

/// Since when the worker is connected to `coordinator`, where it is.
async fn connected_at(coordinator: &Coordinator) -> Vec<u64> {
    let request = v1::ListWorkersRequest::default();
    let listed = coordinator.admin().list_workers(request).await.unwrap();
    let workers = listed.into_inner().workers;
    let others = workers.iter().filter(|worker| worker.worker != STAYS);
    others.map(|worker| worker.connected_at_us).collect()
}

/// Waits until the worker has been connected `n` times.
async fn streams(coordinators: &[&Coordinator], n: usize) {
    let mut seen = BTreeSet::new();
    let looking = async {
        while seen.len() < n {
            for (i, coordinator) in coordinators.iter().enumerate() {
                let now = connected_at(coordinator).await;
                seen.extend(now.into_iter().map(|at| (i, at)));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(looking).await;
}

#[tokio::test]
async fn a_worker_that_moves_again_and_again_does_every_job_once() {
    let short = |config: &mut espalier_coordinator::CoordinatorConfig| {
        config.session_max_age_s = 1;
        config.lease_ttl_ms = Some(3_000);
    };
    let a = Coordinator::start_with(short).await;
    let b = a.beside(short).await;
    let mut jobs = a.jobs(SHOP);
    submit_all(&mut jobs, 3, 400).await;
    let (work, _tasks) = start(&[&a, &b]);
    until(&mut jobs, "b1", |counts| counts.succeeded == 400).await;
    streams(&[&a, &b], 4).await;
    work.gate.cancel();
    until(&mut jobs, "b1", |counts| counts.succeeded == 403).await;
    work.check(403);
}

#[tokio::test]
async fn a_coordinator_that_shuts_down_hands_its_workers_over() {
    let slow = |config: &mut espalier_coordinator::CoordinatorConfig| {
        config.drain_limit_s = 40;
        config.lease_ttl_ms = Some(3_000);
    };
    let a = Coordinator::start_with(slow).await;
    let b = a.beside(slow).await;
    let (mut one, mut other) = (&a, &b);
    // These do not move, so that the coordinator which shuts down does not end and close the queue of both.
    let (_stays, _stays_too) = (one.worker(STAYS, 1).await, other.worker(STAYS, 1).await);
    submit_all(&mut one.jobs(SHOP), 3, 200).await;
    let (work, _tasks) = start(&[one, other]);
    until(&mut one.jobs(SHOP), "b1", |counts| counts.succeeded == 200).await;

    if connected_at(one).await.is_empty() {
        std::mem::swap(&mut one, &mut other);
    }
    one.shutdown.drain();
    streams(&[other], 1).await;
    let mut jobs = other.jobs(SHOP);
    let more = (0..50).map(|i| plain(&format!("more{i}"))).collect();
    submit(&mut jobs, "b1", 1, more).await;
    until(&mut jobs, "b1", |counts| counts.succeeded == 250).await;
    work.gate.cancel();
    until(&mut jobs, "b1", |counts| counts.succeeded == 253).await;
    work.check(253);
}

#[tokio::test]
async fn workers_are_told_where_models_are_served_before_they_get_jobs() {
    let coordinator = Coordinator::start_with(|config| {
        config.model_endpoints.push(ModelEndpoint {
            name: "pod-a".to_owned(),
            model: "qwen3".to_owned(),
            url: "http://10.0.0.7:8000/v1".to_owned(),
            api_key_name: "pods".to_owned(),
            weight: 2,
            vllm_extensions: true,
            logprobs: true,
        });
    })
    .await;
    let mut jobs = coordinator.jobs(SHOP);
    submit_all(&mut jobs, 0, 1).await;
    let (work, _tasks) = start(&[&coordinator]);
    until(&mut jobs, "b1", |counts| counts.succeeded == 1).await;
    let told = Served {
        name: "pod-a".to_owned(),
        model: "qwen3".to_owned(),
        base_url: "http://10.0.0.7:8000/v1".to_owned(),
        api_key_name: Some("pods".to_owned()),
        weight: 2,
        healthy: true,
        vllm_extensions: true,
        logprobs: true,
        project: None,
    };
    assert_eq!(*lock(&work.served), [told]);
}

/// The machine's clock, wrong by an hour.
#[derive(Debug)]
struct Wrong {
    early: bool,
}

impl Clock for Wrong {
    fn now(&self) -> Timestamp {
        const HOUR_US: u64 = 3_600_000_000;
        let now = SystemClock.now().0;
        Timestamp(if self.early {
            now - HOUR_US
        } else {
            now + HOUR_US
        })
    }
}

#[tokio::test]
async fn clocks_that_differ_by_an_hour_end_no_lease() {
    for early in [true, false] {
        let clock = Arc::new(Wrong { early });
        let change = |config: &mut espalier_coordinator::CoordinatorConfig| {
            config.lease_ttl_ms = Some(1_000);
            config.session_max_age_s = 1;
        };
        let coordinator = Coordinator::start_at(clock, change).await;
        let mut jobs = coordinator.jobs(SHOP);
        submit_all(&mut jobs, 1, 4).await;
        let (work, _tasks) = start(&[&coordinator]);
        // Several times as long as a lease, and over more than one stream.
        streams(&[&coordinator], 3).await;
        work.gate.cancel();
        until(&mut jobs, "b1", |counts| counts.succeeded == 5).await;
        work.check(5);
    }
}
