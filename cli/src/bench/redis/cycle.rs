//! The full cycle at one coordinator or more, with exact delivery; a batch acknowledged; memory of jobs that wait.

use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use futures::future::try_join_all;
use prost::Message;
use serde_json::{Value, json};

use super::stack::{CpuSeconds, PROJECT, Stack};
use crate::bench::crew::Crew;
use crate::bench::{millis, per_second, submit};
use crate::client::Client;
use crate::exit::Problem;
use crate::submit::file::CHUNK_JOBS_MAX;
use crate::submit::{close_batch, open};

/// Longest that one cycle may take: a thousand times slower than it should be is a hang.
const CYCLE_TIMEOUT: Duration = Duration::from_secs(300);

/// What a cycle gave.
pub struct Cycle {
    pub jobs_per_s: f64,
    pub values: Value,
}

/// From the first submission to the last accepted result; workers and clients are shared out over the coordinators.
///
/// # Errors
/// A job was lost, granted twice or accepted twice, by the workers' count or by the coordinator's.
pub async fn full(
    stack: &Stack,
    coordinators: usize,
    round: u32,
    jobs: usize,
    (workers, credit): (u32, u32),
) -> Result<Cycle, Problem> {
    let crew = Crew::of(jobs);
    for n in 0..workers as usize {
        crew.hire(
            stack.tasks(),
            &stack.worker(n % coordinators),
            1,
            credit,
            None,
        );
    }
    let mut clients = Vec::new();
    for n in 0..coordinators {
        clients.push(stack.client(PROJECT, n).await?);
    }
    let batch = BatchId::new(format!("cycle-{round}"))?;
    open(&clients[0], &batch, v1::JobSpec::default()).await?;
    let mut parts: Vec<Vec<_>> = vec![Vec::new(); coordinators];
    let chunks = submit::chunks(&batch, 0..jobs, CHUNK_JOBS_MAX);
    for (n, chunk) in chunks.into_iter().enumerate() {
        parts[n % coordinators].push(chunk);
    }
    let mut done = crew.ledger.done();
    let (began, cpu) = (Instant::now(), stack.cpu());
    let sending = clients
        .iter()
        .zip(parts)
        .map(|(c, part)| submit::send(c, part));
    try_join_all(sending).await?;
    let acknowledged = began.elapsed();
    let all = done.wait_for(|done| *done >= jobs);
    let finished = with_deadline("bench.cycle", CYCLE_TIMEOUT, all)
        .await
        .is_ok();
    let took = began.elapsed();
    let cpu = stack.cpu().since(cpu);
    close_batch(&clients[0], &batch).await?;
    crew.leave();
    let delivery = crew.ledger.to_json();
    let counted = counts(&clients[0], &batch).await?;
    check(jobs, finished && crew.ledger.is_exact(), &delivery, counted)?;
    let jobs_per_s = per_second(jobs, took);
    Ok(Cycle {
        jobs_per_s,
        values: json!({
            "jobs": jobs,
            "ms": millis(took),
            "jobs_per_s": jobs_per_s,
            "acknowledged_ms": millis(acknowledged),
            "delivery": delivery,
            "cpu_us_a_job": cpu_us_a_job(cpu, jobs),
        }),
    })
}

fn check(
    jobs: usize,
    is_exact: bool,
    delivery: &Value,
    counted: v1::Counts,
) -> Result<(), Problem> {
    let expected = v1::Counts {
        succeeded: jobs as u64,
        ..Default::default()
    };
    if is_exact && counted == expected {
        return Ok(());
    }
    Err(Problem::failed(format!(
        "{jobs} jobs were not delivered exactly once each: workers saw {delivery}, the coordinator counts {counted:?}"
    )))
}

/// The coordinator's counters of a batch.
pub async fn counts(client: &Client, batch: &BatchId) -> Result<v1::Counts, Problem> {
    let request = v1::GetBatchRequest {
        batch: batch.to_string(),
    };
    let batch = client.jobs().get_batch(request).await?.into_inner();
    Ok(batch.counts.unwrap_or_default())
}

fn cpu_us_a_job(cpu: CpuSeconds, jobs: usize) -> Value {
    let us = |seconds: f64| (seconds * 10_000_000.0 / jobs as f64).round() / 10.0;
    json!({
        "redis": us(cpu.redis),
        "coordinators": us(cpu.coordinators),
        "client_and_workers": us(cpu.this_process),
    })
}

/// From the first call to the last answer of a batch that nobody works on.
pub async fn acknowledged(stack: &Stack, round: u32, jobs: usize) -> Result<Duration, Problem> {
    let client = stack.client(PROJECT, 0).await?;
    let batch = BatchId::new(format!("submit-{round}"))?;
    let chunks = submit::chunks(&batch, 0..jobs, CHUNK_JOBS_MAX);
    let began = Instant::now();
    open(&client, &batch, v1::JobSpec::default()).await?;
    submit::send(&client, chunks).await?;
    close_batch(&client, &batch).await?;
    Ok(began.elapsed())
}

/// What a job that waits costs Redis.
pub struct Memory {
    /// All of it.
    pub bytes_a_job: f64,
    /// The encoded spec, as the client sent it.
    pub payload_bytes: f64,
}

/// Memory of Redis with `jobs` jobs that wait, less its memory before, for each.
pub async fn memory(stack: &Stack, jobs: usize) -> Result<Memory, Problem> {
    let client = stack.client(PROJECT, 0).await?;
    let batch = BatchId::new("waiting")?;
    let chunks = submit::chunks(&batch, 0..jobs, CHUNK_JOBS_MAX);
    let sizes = chunks.iter().flat_map(|chunk| &chunk.jobs);
    let payload: usize = sizes.map(v1::JobSpec::encoded_len).sum();
    open(&client, &batch, v1::JobSpec::default()).await?;
    let before = stack.redis.info("memory", "used_memory").await?;
    submit::send(&client, chunks).await?;
    let after = stack.redis.info("memory", "used_memory").await?;
    let counted = counts(&client, &batch).await?;
    if counted.ready != jobs as u64 {
        return Err(Problem::failed(format!(
            "{} of {jobs} jobs wait",
            counted.ready
        )));
    }
    Ok(Memory {
        bytes_a_job: after.saturating_sub(before) as f64 / jobs as f64,
        payload_bytes: payload as f64 / jobs as f64,
    })
}
