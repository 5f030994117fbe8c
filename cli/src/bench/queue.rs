//! The full cycle of jobs over gRPC, and the way from submit to a warm worker.

use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::crew::Crew;
use super::server::Server;
use super::worker::GRANTS_MAX;
use super::{Bound, Figures, Headline, QueueArgs, disk, millis, per_second, percentile_ms, submit};
use crate::exit::Problem;
use crate::submit::file::CHUNK_JOBS_MAX;
use crate::submit::{close_batch, open};

/// The bound of the issue, for the batched cycle.
const BATCHED_MIN_PER_S: f64 = 15_000.0;
/// Longest that one measurement may take: a thousand times slower than it should be is a hang.
const CYCLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest that one job may take to its worker.
const GRANT_TIMEOUT: Duration = Duration::from_secs(10);

/// Measures, each on a coordinator of its own.
pub async fn measure(args: QueueArgs) -> Result<Figures, Problem> {
    let syncs = disk::syncs_per_second().await?;
    let batched = cycle(args.jobs, CHUNK_JOBS_MAX, args.workers, args.credit).await?;
    let single = cycle(args.single_jobs, 1, args.workers, 1).await?;
    let ways = dispatch(args.latency_jobs, args.credit).await?;
    let batched_per_s = per_second(args.jobs, batched.took);
    let single_per_s = per_second(args.single_jobs, single.took);
    let (p50, p99) = (percentile_ms(&ways, 0.5), percentile_ms(&ways, 0.99));
    Ok(Figures {
        values: json!({
            "workers": args.workers,
            "batched_jobs": args.jobs,
            "batched_credit": args.credit,
            "batched_ms": millis(batched.took),
            "batched_jobs_per_s": batched_per_s,
            "batched_delivery": batched.delivery,
            "single_jobs": args.single_jobs,
            "single_ms": millis(single.took),
            "single_jobs_per_s": single_per_s,
            "single_delivery": single.delivery,
            "disk_syncs_per_s": syncs,
            "single_jobs_per_disk_sync": single_per_s / syncs,
            "dispatch_jobs": args.latency_jobs,
            "dispatch_p50_ms": p50,
            "dispatch_p99_ms": p99,
        }),
        headlines: vec![
            Headline::new("submit + lease + finish, batched", batched_per_s, "jobs/s")
                .bound(Bound::AtLeast(BATCHED_MIN_PER_S)),
            Headline::new(
                "submit + lease + finish, one at a time",
                single_per_s,
                "jobs/s",
            ),
            Headline::new("durable writes of 4 KiB that the disk can do", syncs, "/s"),
            Headline::new("submit to worker, median", p50, "ms"),
            Headline::new("submit to worker, p99", p99, "ms"),
        ],
    })
}

/// What a cycle gave.
struct Cycle {
    took: Duration,
    delivery: Value,
}

/// From the first submission to the last accepted result.
///
/// # Errors
/// A job was lost, granted twice or accepted twice, by the workers' count or by the coordinator's.
async fn cycle(jobs: usize, per_chunk: usize, workers: u32, credit: u32) -> Result<Cycle, Problem> {
    let server = Server::start().await?;
    let crew = Crew::of(jobs);
    crew.hire(server.tasks(), &server.worker, workers, credit, None);
    let batch = BatchId::new("cycle")?;
    let chunks = submit::chunks(&batch, 0..jobs, per_chunk);
    open(&server.client, &batch, v1::JobSpec::default()).await?;
    let mut done = crew.ledger.done();
    let began = Instant::now();
    submit::send(&server.client, chunks).await?;
    let all = done.wait_for(|done| *done >= jobs);
    let finished = with_deadline("bench.cycle", CYCLE_TIMEOUT, all)
        .await
        .is_ok();
    let took = began.elapsed();
    close_batch(&server.client, &batch).await?;
    let request = v1::GetBatchRequest {
        batch: batch.to_string(),
    };
    let counted = server.client.jobs().get_batch(request).await?.into_inner();
    crew.leave();
    server.end().await?;
    let delivery = crew.ledger.to_json();
    let expected = v1::Counts {
        succeeded: jobs as u64,
        ..Default::default()
    };
    if !finished || !crew.ledger.is_exact() || counted.counts != Some(expected) {
        return Err(Problem::failed(format!(
            "{jobs} jobs were not delivered exactly once each: workers saw {delivery}, the coordinator counts {:?}",
            counted.counts
        )));
    }
    Ok(Cycle { took, delivery })
}

/// For each of `jobs`, submitted one after the other: from the call to the grant at a worker that waits.
async fn dispatch(jobs: usize, credit: u32) -> Result<Vec<Duration>, Problem> {
    let server = Server::start().await?;
    let (sender, mut grants) = mpsc::channel(GRANTS_MAX);
    let crew = Crew::of(jobs + 1);
    crew.hire(server.tasks(), &server.worker, 1, credit, Some(&sender));
    let batch = BatchId::new("dispatch")?;
    open(&server.client, &batch, v1::JobSpec::default()).await?;
    let mut ways = Vec::with_capacity(jobs);
    for (n, chunk) in submit::chunks(&batch, 0..jobs + 1, 1)
        .into_iter()
        .enumerate()
    {
        let began = Instant::now();
        submit::send(&server.client, vec![chunk]).await?;
        let granted = with_deadline("bench.grant", GRANT_TIMEOUT, grants.recv()).await;
        let granted = granted
            .ok()
            .flatten()
            .ok_or_else(|| Problem::failed("a job did not reach its worker"))?;
        // The first one waits for the worker to connect.
        if n > 0 {
            ways.push(granted.duration_since(began));
        }
    }
    crew.leave();
    server.end().await?;
    Ok(ways)
}
