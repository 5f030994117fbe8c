//! How long a batch takes from the first byte sent to the last job durable and acknowledged.

use std::ops::Range;
use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;

use super::server::Server;
use super::{Bound, Figures, Headline, SubmitArgs, millis, per_second, percentile_ms};
use crate::client::Client;
use crate::exit::Problem;
use crate::submit::file::CHUNK_JOBS_MAX;
use crate::submit::{again, close_batch, open};

/// Chunks on their way at once, as `espalier submit` has them.
const IN_FLIGHT: usize = 4;
/// Bytes of a job's prompt: with the rest, about 300 a job.
const PROMPT_BYTES: usize = 256;
/// The bound of the issue, for [`BOUND_JOBS`] jobs.
const ACK_MAX_MS: f64 = 500.0;
const BOUND_JOBS: usize = 10_000;

/// Measures.
pub async fn measure(args: SubmitArgs) -> Result<Figures, Problem> {
    let server = Server::start().await?;
    let mut times = Vec::new();
    for round in 0..args.rounds {
        let batch = BatchId::new(format!("submit-{round}"))?;
        let chunks = chunks(&batch, 0..args.jobs, CHUNK_JOBS_MAX);
        let began = Instant::now();
        open(&server.client, &batch, v1::JobSpec::default()).await?;
        send(&server.client, chunks).await?;
        close_batch(&server.client, &batch).await?;
        times.push(began.elapsed());
    }
    server.end().await?;
    let best = times.iter().min().copied().unwrap_or(Duration::ZERO);
    let median = percentile_ms(&times, 0.5);
    let headline = Headline::new(
        format!("{} jobs acknowledged, median", args.jobs),
        median,
        "ms",
    );
    let bounded = match args.jobs {
        BOUND_JOBS => headline.bound(Bound::AtMost(ACK_MAX_MS)),
        _ => headline,
    };
    Ok(Figures {
        values: json!({
            "jobs": args.jobs,
            "rounds": args.rounds,
            "ack_median_ms": median,
            "ack_best_ms": millis(best),
            "ack_worst_ms": percentile_ms(&times, 1.0),
            "best_jobs_per_s": per_second(args.jobs, best),
        }),
        headlines: vec![bounded],
    })
}

/// Chunks of small jobs with these numbers.
pub fn chunks(
    batch: &BatchId,
    numbers: Range<usize>,
    per_chunk: usize,
) -> Vec<v1::SubmitChunkRequest> {
    let end = numbers.end;
    let starts = numbers.step_by(per_chunk).enumerate();
    starts
        .map(|(number, start)| v1::SubmitChunkRequest {
            batch: batch.to_string(),
            chunk: u32::try_from(number).unwrap_or(u32::MAX),
            jobs: (start..end.min(start + per_chunk)).map(job).collect(),
        })
        .collect()
}

/// The number of a job that [`job`] made.
pub fn number(job: &str) -> Option<usize> {
    job.rsplit_once('j')?.1.parse().ok()
}

/// A job without tools that asks for nothing.
pub fn job(n: usize) -> v1::JobSpec {
    v1::JobSpec {
        id: Some(format!("j{n:07}")),
        rollout: Some(v1::RolloutSpec {
            prompts: vec!["x".repeat(PROMPT_BYTES)],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Sends chunks, a few at once. Every job must be accepted.
pub async fn send(client: &Client, chunks: Vec<v1::SubmitChunkRequest>) -> Result<(), Problem> {
    let send_one = |chunk: v1::SubmitChunkRequest| async move {
        let response = again(client, || {
            let (mut jobs, chunk) = (client.jobs(), chunk.clone());
            async move { jobs.submit_chunk(chunk).await }
        });
        let response = response.await?;
        match response.rejected.first() {
            None => Ok(()),
            Some(rejection) => Err(Problem::failed(format!(
                "a job was refused: {:?}",
                rejection.errors
            ))),
        }
    };
    futures::stream::iter(chunks)
        .map(send_one)
        .buffer_unordered(IN_FLIGHT)
        .try_collect()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_tells_its_number() {
        let id = job(42).id.unwrap();
        assert_eq!(number(&id), Some(42));
        assert_eq!(number(&format!("bench/cycle/{id}")), Some(42));
        assert_eq!(number("bench/cycle/other"), None);
    }
}
