//! The full cycle of jobs over gRPC, and the way from submit to a warm worker.

use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::tasks::{OnFailure, with_deadline};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::server::Server;
use super::worker::{GRANTS_MAX, Orders, Tally, work};
use super::{QueueArgs, millis, per_second, percentile_ms, submit};
use crate::exit::Problem;
use crate::submit::file::CHUNK_JOBS_MAX;
use crate::submit::{close_batch, open};

/// Longest that one measurement may take: a thousand times slower than it should be is a hang.
const CYCLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest that one job may take to its worker.
const GRANT_TIMEOUT: Duration = Duration::from_secs(10);

/// Measures, each on a coordinator of its own.
pub async fn measure(args: QueueArgs) -> Result<Value, Problem> {
    let batched = cycle(args.jobs, CHUNK_JOBS_MAX, args.workers, args.credit).await?;
    let single = cycle(args.single_jobs, 1, args.workers, 1).await?;
    let mut ways = dispatch(args.latency_jobs, args.credit).await?;
    Ok(json!({
        "workers": args.workers,
        "batched_jobs": args.jobs,
        "batched_credit": args.credit,
        "batched_ms": millis(batched),
        "batched_jobs_per_s": per_second(args.jobs, batched),
        "single_jobs": args.single_jobs,
        "single_ms": millis(single),
        "single_jobs_per_s": per_second(args.single_jobs, single),
        "dispatch_jobs": args.latency_jobs,
        "dispatch_p50_ms": percentile_ms(&mut ways, 0.5),
        "dispatch_p99_ms": percentile_ms(&mut ways, 0.99),
    }))
}

/// Workers on a server, and how to let them go.
struct Crew {
    tally: Tally,
    leave: CancellationToken,
}

fn hire(
    server: &Server,
    workers: u32,
    credit: u32,
    granted: Option<&mpsc::Sender<Instant>>,
) -> Crew {
    let crew = Crew {
        tally: Arc::new(watch::Sender::new(0)),
        leave: CancellationToken::new(),
    };
    for n in 0..workers {
        let orders = Orders {
            name: format!("idle-{n}"),
            credit,
            tally: Arc::clone(&crew.tally),
            granted: granted.cloned(),
            leave: crew.leave.clone(),
        };
        let working = Box::pin(work(server.worker.clone(), orders));
        server
            .tasks()
            .spawn("bench.worker", OnFailure::ShutDown, working);
    }
    crew
}

/// From the first submission to the last accepted result.
async fn cycle(
    jobs: usize,
    per_chunk: usize,
    workers: u32,
    credit: u32,
) -> Result<Duration, Problem> {
    let server = Server::start().await?;
    let crew = hire(&server, workers, credit, None);
    let batch = BatchId::new("cycle")?;
    let chunks = submit::chunks(&batch, jobs, per_chunk);
    open(&server.client, &batch, v1::JobSpec::default()).await?;
    let began = Instant::now();
    submit::send(&server.client, chunks).await?;
    let mut done = crew.tally.subscribe();
    let finished = with_deadline(
        "bench.cycle",
        CYCLE_TIMEOUT,
        done.wait_for(|done| *done >= jobs),
    )
    .await;
    let took = began.elapsed();
    if finished.is_err() {
        let seen = *crew.tally.borrow();
        return Err(Problem::failed(format!(
            "{seen} of {jobs} jobs were done after {CYCLE_TIMEOUT:?}"
        )));
    }
    close_batch(&server.client, &batch).await?;
    crew.leave.cancel();
    server.end().await?;
    Ok(took)
}

/// For each of `jobs`, submitted one after the other: from the call to the grant at a worker that waits.
async fn dispatch(jobs: usize, credit: u32) -> Result<Vec<Duration>, Problem> {
    let server = Server::start().await?;
    let (sender, mut grants) = mpsc::channel(GRANTS_MAX);
    let crew = hire(&server, 1, credit, Some(&sender));
    let batch = BatchId::new("dispatch")?;
    open(&server.client, &batch, v1::JobSpec::default()).await?;
    let mut ways = Vec::with_capacity(jobs);
    for (n, chunk) in submit::chunks(&batch, jobs + 1, 1).into_iter().enumerate() {
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
    crew.leave.cancel();
    server.end().await?;
    Ok(ways)
}
