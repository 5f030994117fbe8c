//! `espalier bench`: what the parts manage on this machine, jobs over real gRPC.
//!
//! `submit` and `queue` start a coordinator of their own on a temporary folder, with the embedded queue and every commit
//! durable; `redis` starts a Redis and coordinators as processes, `infer` model servers, `train` this program; `rollouts`
//! measures a running `espalier up`, `memory` any process. Figures are meant for a release build. `make bench` runs all
//! of them.

mod crew;
mod disk;
mod figures;
mod infer;
mod ledger;
mod machine;
mod memory;
mod overhead;
mod process;
mod queue;
mod redis;
mod rollouts;
mod server;
mod submit;
mod train;
mod worker;

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::facts;
use figures::{Bound, Figures, Headline};

#[cfg(test)]
pub use self::{
    ledger::Ledger,
    server::Server,
    worker::{Orders, work},
};

/// What to measure.
#[derive(Subcommand, Clone, Debug)]
pub enum Bench {
    /// How long a batch of jobs takes to be acknowledged
    Submit(SubmitArgs),
    /// Submit, lease and finish with workers that do nothing: jobs a second, and the way from submit to worker
    Queue(QueueArgs),
    /// The queue in Redis, with real coordinators, beside other queues on the same Redis
    Redis(redis::RedisArgs),
    /// The model server, beside llama.cpp's on the same cores; or the engine on a GPU
    Infer(infer::InferArgs),
    /// Training on the CPU beside what the machine reaches by itself, and how fast its data is made; or on a GPU
    Train(train::TrainArgs),
    /// A running `espalier up`: rollouts a minute, memory, and what a turn costs beside model and tools
    Rollouts(rollouts::Rollouts),
    /// Memory of a process and of what it started; the bound is that of an idle coordinator
    Memory(memory::Memory),
    /// Show what the others wrote with --json as a table
    Table(figures::TableArgs),
}

/// Options of `bench submit`.
#[derive(Args, Clone, Copy, Debug)]
pub struct SubmitArgs {
    /// Jobs of a batch
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub jobs: usize,
    /// Batches, one after the other
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
}

/// Options of `bench queue`.
#[derive(Args, Clone, Copy, Debug)]
pub struct QueueArgs {
    /// Jobs of the batched cycle
    #[arg(long, value_name = "N", default_value_t = 50_000)]
    pub jobs: usize,
    /// Jobs of the cycle that submits, leases and finishes one at a time
    #[arg(long, value_name = "N", default_value_t = 4_000)]
    pub single_jobs: usize,
    /// Jobs whose way from submit to worker is timed
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub latency_jobs: usize,
    /// Workers that do nothing
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub workers: u32,
    /// Credit of each worker in the batched cycle
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub credit: u32,
}

/// Runs the command.
pub async fn run(context: &Context, command: &Bench) -> Outcome {
    let (bench, figures) = match command {
        Bench::Submit(args) => ("submit", submit::measure(*args).await?),
        Bench::Queue(args) => ("queue", queue::measure(*args).await?),
        Bench::Redis(args) => ("redis", Box::pin(redis::measure(args)).await?),
        Bench::Infer(args) => ("infer", Box::pin(infer::measure(args)).await?),
        Bench::Train(args) if args.alone => return train::alone(context.out, args).await,
        Bench::Train(args) => ("train", Box::pin(train::measure(args)).await?),
        Bench::Rollouts(args) => (
            args.name.as_str(),
            Box::pin(rollouts::measure(context, args)).await?,
        ),
        Bench::Memory(args) => ("memory", memory::measure(*args).await?),
        Bench::Table(args) => return figures::show(context, args),
    };
    let report = json!({
        "bench": bench,
        "machine": machine::describe(),
        "figures": figures.values,
        "headlines": figures.headlines,
    });
    if context.out.json {
        context.out.event(&report)?;
    } else {
        context.out.line(figures_text(&report))?;
    }
    Ok(Exit::Ok)
}

fn figures_text(report: &Value) -> String {
    let mut rows = Vec::new();
    for part in ["machine", "figures"] {
        for (name, value) in report[part].as_object().into_iter().flatten() {
            rows.push((
                name.as_str(),
                value.to_string().trim_matches('"').to_owned(),
            ));
        }
    }
    facts(&rows)
}

/// The value below which `share` of the times lie, in milliseconds.
fn percentile_ms(times: &[Duration], share: f64) -> f64 {
    percentile(times.iter().map(|time| millis(*time)).collect(), share)
}

/// The value below which `share` of the values lie; 0 where there are none.
fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let index = ((values.len() as f64 * share).ceil() as usize).max(1) - 1;
    values
        .get(index.min(values.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0.0)
}

/// Milliseconds, to a hundredth.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 100_000.0).round() / 100.0
}

/// Things a second, to a tenth.
fn per_second(things: usize, time: Duration) -> f64 {
    (things as f64 / time.as_secs_f64() * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile_ms(&times, 0.5), 50.0);
        assert_eq!(percentile_ms(&times, 0.99), 99.0);
        assert_eq!(percentile_ms(&times, 1.0), 100.0);
        assert_eq!(percentile_ms(&[], 0.5), 0.0);
        assert_eq!(per_second(10, Duration::from_secs(4)), 2.5);
    }

    #[tokio::test]
    async fn a_small_cycle_comes_to_its_end() {
        let args = QueueArgs {
            jobs: 500,
            single_jobs: 20,
            latency_jobs: 10,
            workers: 2,
            credit: 64,
        };
        let figures = queue::measure(args).await.unwrap().values;
        assert!(
            figures["batched_jobs_per_s"].as_f64().unwrap() > 0.0,
            "{figures}"
        );
        assert_eq!(
            figures["batched_delivery"]["accepted_once"], 500,
            "{figures}"
        );
        assert!(
            figures["dispatch_p99_ms"].as_f64().unwrap() > 0.0,
            "{figures}"
        );
        let figures = submit::measure(SubmitArgs {
            jobs: 300,
            rounds: 2,
        })
        .await
        .unwrap()
        .values;
        assert!(
            figures["ack_median_ms"].as_f64().unwrap() > 0.0,
            "{figures}"
        );
    }
}
