//! Commands for [`super::property`]: few names, so that they meet often, over two projects and four batches.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId, WorkerId};
use espalier_core::queue::{JobKind, LeaseRequest, NewJob, Selector};
use espalier_core::time::Timestamp;
use proptest::collection::vec;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

#[derive(Clone, Debug)]
pub enum Command {
    Open {
        batch: u8,
        params: u8,
    },
    Submit {
        batch: u8,
        chunk: u32,
        jobs: Vec<Spec>,
    },
    /// What was sent before, as it was.
    SubmitAgain(usize),
    Close(u8),
    Lease(Lease),
    Renew(Vec<(usize, Option<String>)>),
    Finish {
        grant: usize,
        how: How,
    },
    FinishMany(Vec<(usize, How)>),
    Cancel(u8, u8),
    Requeue(u8, u8),
    Tick(usize),
    Wait(u64),
    StepBack(u64),
    Outage(u64),
    Purge {
        age_ms: u64,
        limit: usize,
    },
    Reopen,
}

/// Worker, kind, request, most grants, and what is offered: 1 a GPU, 2 a browser.
pub type Lease = (u8, u8, u64, u32, u8);

#[derive(Clone, Debug)]
pub struct Spec {
    id: u8,
    kind: u8,
    deps: Vec<u8>,
    priority: u8,
    needs: u8,
    delay_ms: u64,
    runtime_ms: u64,
    budgets: (u16, u16),
    label: Option<String>,
}

#[derive(Clone, Debug)]
pub enum How {
    Succeed(Vec<Spec>),
    Fail(ErrorClass, Option<u64>),
    Release,
}

/// A chunk as it was sent.
#[derive(Clone, Debug)]
pub struct Sent {
    pub batch: u8,
    pub chunk: u32,
    pub digest: [u8; 32],
    pub jobs: Vec<NewJob>,
}

impl Sent {
    pub fn new(now: Timestamp, batch: u8, chunk: u32, specs: &[Spec]) -> Self {
        Self {
            batch,
            chunk,
            digest: Sha256::digest(format!("{specs:?}")).into(),
            jobs: specs.iter().map(|spec| spec.job(now, batch)).collect(),
        }
    }
}

impl Spec {
    /// The job of `batch` that this stands for. Its priority is in its digest: another priority is another job.
    pub fn job(&self, now: Timestamp, batch: u8) -> NewJob {
        let mut digest = [self.priority; 32];
        digest[0] = self.id;
        let parity = ("parity".to_owned(), (self.id % 2).to_string());
        let label = self.label.clone().map(|label| ("x".to_owned(), label));
        let delay = Duration::from_millis(self.delay_ms);
        NewJob {
            priority: self.priority,
            needs: tags(self.needs),
            deps: self.deps.iter().map(|dep| key(batch, *dep)).collect(),
            not_before: (self.delay_ms > 0).then(|| now + delay),
            max_attempts: self.budgets.0,
            max_infra: self.budgets.1,
            max_runtime: (self.runtime_ms > 0).then(|| Duration::from_millis(self.runtime_ms)),
            labels: BTreeMap::from_iter([parity].into_iter().chain(label)),
            traceparent: self
                .id
                .is_multiple_of(3)
                .then(|| format!("00-trace-{}", self.id)),
            ..NewJob::new(key(batch, self.id).job, kind(self.kind), digest)
        }
    }
}

fn kind(n: u8) -> JobKind {
    [JobKind::Rollout, JobKind::Generate][usize::from(n)]
}

fn tags<C: FromIterator<String>>(bits: u8) -> C {
    let all = [(1, "gpu"), (2, "mcp:browser")];
    let set = all.into_iter().filter(|(bit, _)| bits & bit > 0);
    set.map(|(_, tag)| tag.to_owned()).collect()
}

pub fn lease_request(&(worker, of, request, n, offers): &Lease) -> LeaseRequest {
    LeaseRequest {
        worker: WorkerId::new(format!("w{worker}")).unwrap(),
        request,
        kind: kind(of),
        offers: tags(offers),
        n,
        ttl: None,
    }
}

/// How many batches there are.
pub fn batches() -> u8 {
    4
}

/// Batches 0 to 2 are of project `a`, 3 of project `b`.
pub fn names(batch: u8) -> (ProjectId, BatchId) {
    let project = if batch < 3 { "a" } else { "b" };
    let batch = BatchId::new(format!("batch-{batch}")).unwrap();
    (ProjectId::new(project).unwrap(), batch)
}

/// Jobs 0 to 19 are of the batch itself, those above of its neighbour.
pub fn key(batch: u8, job: u8) -> JobKey {
    let (batch, job) = if job < 20 {
        (batch, job)
    } else {
        ((batch + 1) % batches(), job - 20)
    };
    let (project, batch) = names(batch);
    JobKey::new(project, batch, JobId::new(format!("job-{job}")).unwrap())
}

pub fn selector(batch: u8, job: u8) -> Selector {
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

fn spec() -> impl Strategy<Value = Spec> {
    (
        0u8..20,
        prop::bool::weighted(0.2).prop_map(u8::from),
        vec(0u8..24, 0..4),
        prop_oneof![6 => Just(5u8), 2 => 0u8..10, 1 => Just(10)],
        prop_oneof![4 => Just(0u8), 1 => 0u8..4],
        prop_oneof![3 => Just(0u64), 1 => 0u64..20_000],
        prop_oneof![3 => Just(0u64), 1 => 1u64..90_000],
        prop_oneof![1 => Just((3u16, 20u16)), 1 => (1u16..3, 1u16..4)],
        prop_oneof![
            2 => Just(None),
            1 => "[ -~é√]{0,6}".prop_map(Some),
            1 => "x{60,70}".prop_map(Some),
        ],
    )
        .prop_map(
            |(id, kind, deps, priority, needs, delay_ms, runtime_ms, budgets, label)| Spec {
                id,
                kind,
                deps,
                priority,
                needs,
                delay_ms,
                runtime_ms,
                budgets,
                label,
            },
        )
}

fn failure() -> impl Strategy<Value = How> {
    let class = prop_oneof![
        1 => Just(ErrorClass::Invalid),
        4 => Just(ErrorClass::Handler),
        2 => Just(ErrorClass::Infra),
        1 => Just(ErrorClass::Preempted),
        1 => Just(ErrorClass::Cancelled),
    ];
    let wait_ms = prop_oneof![3 => Just(None), 1 => (0u64..4_000_000).prop_map(Some)];
    (class, wait_ms).prop_map(|(class, wait_ms)| How::Fail(class, wait_ms))
}

/// Without jobs that follow.
fn plain_end() -> impl Strategy<Value = How> {
    prop_oneof![
        4 => Just(How::Succeed(Vec::new())),
        4 => failure(),
        1 => Just(How::Release),
    ]
}

fn how() -> impl Strategy<Value = How> {
    prop_oneof![
        2 => plain_end(),
        1 => vec(spec(), 1..4).prop_map(How::Succeed),
    ]
}

fn lease() -> impl Strategy<Value = Lease> {
    let kind = prop::bool::weighted(0.2).prop_map(u8::from);
    (0u8..3, kind, 0u64..4, 0u32..6, 0u8..4)
}

pub fn command() -> impl Strategy<Value = Command> {
    let grant = || 0usize..64;
    let progress = prop_oneof![Just(None), Just(Some("half".to_owned()))];
    prop_oneof![
        4 => (0u8..4, prop_oneof![9 => Just(0u8), 1 => Just(1)])
            .prop_map(|(batch, params)| Command::Open { batch, params }),
        8 => (0u8..4, 0u32..6, vec(spec(), 0..8))
            .prop_map(|(batch, chunk, jobs)| Command::Submit { batch, chunk, jobs }),
        2 => (0usize..20).prop_map(Command::SubmitAgain),
        1 => (0u8..4).prop_map(Command::Close),
        10 => lease().prop_map(Command::Lease),
        3 => vec((grant(), progress), 1..4).prop_map(Command::Renew),
        8 => (grant(), how()).prop_map(|(grant, how)| Command::Finish { grant, how }),
        3 => vec((grant(), plain_end()), 1..5).prop_map(Command::FinishMany),
        1 => (0u8..4, 0u8..24).prop_map(|(b, j)| Command::Cancel(b, j)),
        2 => (0u8..4, 0u8..24).prop_map(|(b, j)| Command::Requeue(b, j)),
        2 => (1usize..20).prop_map(Command::Tick),
        3 => (0u64..70_000).prop_map(Command::Wait),
        1 => (0u64..5_000).prop_map(Command::StepBack),
        1 => (0u64..5_000).prop_map(Command::Outage),
        1 => (0u64..60_000, 1usize..3).prop_map(|(age_ms, limit)| Command::Purge { age_ms, limit }),
        1 => Just(Command::Reopen),
    ]
}
