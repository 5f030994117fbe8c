//! Figures of a queue by itself, without gRPC: how fast a batch is acknowledged, and how many jobs a second go
//! through submit, lease and finish. `espalier bench queue` calls it; what it measures includes the disk.

use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, ProjectId, WorkerId};
use espalier_core::queue::{CHUNK_JOBS_MAX, JobKind, LeaseRequest, NewBatch, NewJob};

use super::{Chunk, Finish, JobResult, OpenBatch, Outcome, Queue, QueueError, Submission};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchPlan {
    /// The project that the work is done in; its batches are new ones.
    pub project: ProjectId,
    /// Jobs in all.
    pub jobs: u32,
    /// Jobs in one call; 1 measures jobs one at a time.
    pub per_call: u32,
    /// Loops side by side, each as a worker and its submitter.
    pub workers: u32,
    /// Bytes of each spec.
    pub spec_bytes: usize,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct BenchFigures {
    /// Jobs that were submitted, leased and finished.
    pub jobs: u64,
    /// From the first call to the last answer, in seconds.
    pub seconds: f64,
    /// Jobs a second.
    pub jobs_per_s: f64,
}

impl BenchFigures {
    fn new(jobs: u64, took: Duration) -> Self {
        let seconds = took.as_secs_f64();
        Self {
            jobs,
            seconds,
            jobs_per_s: jobs as f64 / seconds.max(f64::MIN_POSITIVE),
        }
    }
}

/// Submits all jobs in chunks as large as they may be, and waits until they are acknowledged.
pub async fn bulk_submit(
    queue: &dyn Queue,
    plan: &BenchPlan,
    batch: &BatchId,
) -> Result<BenchFigures, QueueError> {
    open(queue, plan, batch).await?;
    let mut chunks = Vec::new();
    let mut left = plan.jobs;
    while left > 0 {
        let jobs = left.min(CHUNK_JOBS_MAX as u32);
        chunks.push(chunk(plan, batch, chunks.len() as u32, jobs)?);
        left -= jobs;
    }
    let started = Instant::now();
    let mut jobs = 0;
    for chunk in chunks {
        jobs += queue.submit(chunk).await?.items.len() as u64;
    }
    Ok(BenchFigures::new(jobs, started.elapsed()))
}

/// Takes all jobs through submit, lease and finish.
pub async fn full_cycles(
    queue: &dyn Queue,
    plan: &BenchPlan,
    batch: &BatchId,
) -> Result<BenchFigures, QueueError> {
    open(queue, plan, batch).await?;
    let rounds = plan.jobs / (plan.per_call * plan.workers).max(1);
    let started = Instant::now();
    let loops = (0..plan.workers).map(|n| one_loop(queue, plan, batch, n, rounds));
    let done = futures::future::try_join_all(loops).await?;
    Ok(BenchFigures::new(done.into_iter().sum(), started.elapsed()))
}

async fn one_loop(
    queue: &dyn Queue,
    plan: &BenchPlan,
    batch: &BatchId,
    number: u32,
    rounds: u32,
) -> Result<u64, QueueError> {
    let worker = WorkerId::new(format!("bench-{number}"))?;
    let mut done = 0;
    for round in 0..rounds {
        let n = number * rounds + round;
        queue.submit(chunk(plan, batch, n, plan.per_call)?).await?;
        let request = LeaseRequest {
            worker: worker.clone(),
            request: u64::from(round) + 1,
            kind: JobKind::Rollout,
            offers: Default::default(),
            n: plan.per_call,
            ttl: None,
        };
        let granted = queue.lease(request).await?;
        let finishes: Vec<_> = granted.into_iter().map(|g| finish(g.grant)).collect();
        done += queue.finish(finishes).await?.len() as u64;
    }
    Ok(done)
}

async fn open(queue: &dyn Queue, plan: &BenchPlan, batch: &BatchId) -> Result<(), QueueError> {
    let request = OpenBatch {
        batch: NewBatch {
            project: plan.project.clone(),
            batch: batch.clone(),
            params_digest: [0; 32],
        },
        defaults: Bytes::new(),
    };
    queue.open_batch(request).await.map(drop)
}

fn chunk(plan: &BenchPlan, batch: &BatchId, n: u32, jobs: u32) -> Result<Chunk, FieldError> {
    let spec = Bytes::from(vec![b'x'; plan.spec_bytes]);
    let jobs = (0..jobs).map(|job| {
        let id = JobId::new(format!("job-{n}-{job}"))?;
        Ok(Submission {
            job: NewJob::new(id, JobKind::Rollout, [0; 32]),
            spec: spec.clone(),
        })
    });
    Ok(Chunk {
        project: plan.project.clone(),
        batch: batch.clone(),
        n,
        digest: [0; 32],
        jobs: jobs.collect::<Result<_, FieldError>>()?,
    })
}

fn finish(grant: espalier_core::queue::Grant) -> Finish {
    Finish {
        key: grant.key,
        fence: grant.fence,
        outcome: Outcome::Succeeded {
            result: JobResult::default(),
            spawn: Vec::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use espalier_core::queue::StateName;
    use espalier_runtime::clock::SystemClock;

    use super::super::{Embedded, EmbeddedConfig};
    use super::*;

    #[tokio::test]
    async fn every_job_goes_through() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.redb");
        let queue = Embedded::open(EmbeddedConfig::new(path, Arc::new(SystemClock))).unwrap();
        let project = ProjectId::new("bench").unwrap();
        let plan = BenchPlan {
            project: project.clone(),
            jobs: 12_000,
            per_call: 100,
            workers: 4,
            spec_bytes: 300,
        };
        let batch = BatchId::new("cycles").unwrap();
        let cycles = full_cycles(&queue, &plan, &batch).await.unwrap();
        assert_eq!(cycles.jobs, 12_000);
        let seen = queue.batch(project, batch).await.unwrap().unwrap();
        assert_eq!(seen.counters.get(StateName::Succeeded), 12_000);
        let batch = BatchId::new("bulk").unwrap();
        let bulk = bulk_submit(&queue, &plan, &batch).await.unwrap();
        assert_eq!(bulk.jobs, 12_000);
        println!("{}", serde_json::to_string(&[cycles, bulk]).unwrap());
    }
}
