//! `espalier bench redis`: the queue in Redis, with real coordinators over gRPC, beside other queues on the same
//! machine.
//!
//! Each measurement has a Redis of its own, with an append-only file synced every second, and nothing else runs
//! meanwhile. Every figure stands on an exact delivery, counted by the workers and by the coordinator.

mod cycle;
mod dispatch;
mod hold;
mod peers;
mod stack;
mod tenants;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value, json};

use self::stack::{PROJECT, Setup, Stack};
use super::figures::{Bound, Figures, Headline};
use super::{millis, percentile, percentile_ms};
use crate::exit::Problem;

/// The bounds of the issue.
const CYCLE_MIN_PER_S: f64 = 15_000.0;
const BULLMQ_RATIO_MIN: f64 = 2.0;
const CELERY_RATIO_MIN: f64 = 10.0;
const ACKNOWLEDGED_MAX_MS: f64 = 300.0;
const DISPATCH_P50_MAX_MS: f64 = 8.0;
const DISPATCH_P99_MAX_MS: f64 = 25.0;
const GRANTED_AGAIN_MAX_MS: f64 = 1_000.0;
const CANCEL_MAX_MS: f64 = 100.0;
const MEMORY_MAX_BYTES: f64 = 600.0;

/// Jobs of the batch whose acknowledgement is timed, as often as this.
const BATCH_JOBS: usize = 10_000;
const BATCH_ROUNDS: u32 = 5;
/// Cycles at one coordinator and at two; the first of each warms up and does not count.
const CYCLE_ROUNDS: u32 = 4;
/// The lease of the job whose worker is lost, and how often one is.
const LOST_LEASE: Duration = Duration::from_secs(2);
const LOST_ROUNDS: usize = 5;
const CANCEL_ROUNDS: usize = 50;
/// Credit of each worker where jobs come one by one.
const DISPATCH_CREDIT: u32 = 64;

/// Options of `bench redis`.
#[derive(Args, Clone, Debug)]
pub struct RedisArgs {
    /// The coordinator's binary [default: beside this program]
    #[arg(long, value_name = "FILE")]
    pub coordinator: Option<PathBuf>,
    /// Runs BullMQ's part: gets REDIS_URL, prints its figures
    #[arg(long, value_name = "COMMAND")]
    pub bullmq: Option<String>,
    /// Runs Celery's part: gets REDIS_URL, prints its figures
    #[arg(long, value_name = "COMMAND")]
    pub celery: Option<String>,
    /// Only these parts
    #[arg(long, value_name = "PART", value_enum)]
    pub only: Vec<Part>,
    /// Jobs of a cycle, and of the measurement of memory
    #[arg(long, value_name = "N", default_value_t = 50_000)]
    pub jobs: usize,
    /// Jobs a second of the measurement of latency
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Seconds of the measurement of latency
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
    /// Jobs of the large tenant
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    pub backlog: usize,
    /// Workers that do nothing
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub workers: u32,
    /// Credit of each worker in the cycle
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub credit: u32,
}

/// What is measured.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The other queues, and the full cycle at one coordinator and at two
    Cycle,
    /// A batch acknowledged
    Batch,
    /// From submit to a warm worker
    Dispatch,
    /// A lost worker's job granted again
    Lost,
    /// Small tenants beside a large one
    Tenants,
    /// Running work cancelled
    Cancel,
    /// Memory of jobs that wait
    Memory,
}

impl Part {
    const ALL: [Self; 7] = [
        Self::Cycle,
        Self::Batch,
        Self::Dispatch,
        Self::Lost,
        Self::Tenants,
        Self::Cancel,
        Self::Memory,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Cycle => "cycle",
            Self::Batch => "batch",
            Self::Dispatch => "dispatch",
            Self::Lost => "lost",
            Self::Tenants => "tenants",
            Self::Cancel => "cancel",
            Self::Memory => "memory",
        }
    }
}

/// Measures all parts, one after the other.
pub async fn measure(args: &RedisArgs) -> Result<Figures, Problem> {
    let bench = Bench {
        args,
        coordinator: match &args.coordinator {
            Some(file) => file.clone(),
            None => std::env::current_exe()?.with_file_name("espalier-coordinator"),
        },
    };
    let mut values = Map::new();
    let mut headlines = Vec::new();
    for part in Part::ALL {
        if !args.only.is_empty() && !args.only.contains(&part) {
            continue;
        }
        let figures = Box::pin(bench.part(part)).await?;
        values.insert(part.name().to_owned(), figures.values);
        headlines.extend(figures.headlines);
    }
    Ok(Figures {
        values: values.into(),
        headlines,
    })
}

struct Bench<'a> {
    args: &'a RedisArgs,
    coordinator: PathBuf,
}

impl Bench<'_> {
    async fn part(&self, part: Part) -> Result<Figures, Problem> {
        match part {
            Part::Cycle => self.cycle().await,
            Part::Batch => self.batch().await,
            Part::Dispatch => self.dispatch().await,
            Part::Lost => self.lost().await,
            Part::Tenants => self.tenants().await,
            Part::Cancel => self.cancel().await,
            Part::Memory => self.memory().await,
        }
    }

    async fn stack(&self, coordinators: usize) -> Result<Stack, Problem> {
        self.stack_with(coordinators, vec![PROJECT.to_owned()], None)
            .await
    }

    async fn stack_with(
        &self,
        coordinators: usize,
        projects: Vec<String>,
        lease_ttl: Option<Duration>,
    ) -> Result<Stack, Problem> {
        Stack::start(&Setup {
            coordinator: &self.coordinator,
            coordinators,
            projects,
            lease_ttl,
        })
        .await
    }

    async fn cycle(&self) -> Result<Figures, Problem> {
        let mut peers = Map::new();
        let mut ratios = Vec::new();
        for (command, bound) in [
            (&self.args.bullmq, BULLMQ_RATIO_MIN),
            (&self.args.celery, CELERY_RATIO_MIN),
        ] {
            let Some(command) = command else { continue };
            let told = peers::run(command).await?;
            ratios.push((told.system.clone(), told.best_per_s(), bound));
            peers.insert(told.system.clone(), json!(told));
        }
        let (one, of_one) = self.cycles(1).await?;
        let (two, of_two) = self.cycles(2).await?;
        let mut headlines = vec![
            Headline::new("submit + lease + finish, batched", one, "jobs/s")
                .bound(Bound::AtLeast(CYCLE_MIN_PER_S)),
        ];
        for (system, per_s, bound) in ratios {
            headlines.push(Headline::new(
                format!("{system}, its best cycle"),
                per_s,
                "jobs/s",
            ));
            let times = Headline::new(format!("ours, in times of {system}"), one / per_s, "");
            headlines.push(times.bound(Bound::AtLeast(bound)));
        }
        headlines.push(Headline::new("the same at two coordinators", two, "jobs/s"));
        Ok(Figures {
            values: json!({
                "workers": self.args.workers,
                "credit": self.args.credit,
                "one_coordinator": of_one,
                "two_coordinators": of_two,
                "peers": peers,
            }),
            headlines,
        })
    }

    /// The median of the cycles that count, and all of them.
    async fn cycles(&self, coordinators: usize) -> Result<(f64, Value), Problem> {
        let stack = self.stack(coordinators).await?;
        let crew = (self.args.workers, self.args.credit);
        let mut rates = Vec::new();
        let mut rounds = Vec::new();
        for round in 0..CYCLE_ROUNDS {
            let jobs = self.args.jobs;
            let cycle = cycle::full(&stack, coordinators, round, jobs, crew).await?;
            rates.push(cycle.jobs_per_s);
            rounds.push(cycle.values);
        }
        let commands = stack.redis.ask(&["INFO", "commandstats"]).await?;
        let median = percentile(rates.split_off(1), 0.5);
        Ok((
            median,
            json!({ "jobs_per_s": median, "rounds": rounds, "commands": calls(&commands) }),
        ))
    }

    async fn batch(&self) -> Result<Figures, Problem> {
        let stack = self.stack(1).await?;
        let mut times = Vec::new();
        for round in 0..BATCH_ROUNDS {
            times.push(cycle::acknowledged(&stack, round, BATCH_JOBS).await?);
        }
        let median = percentile_ms(&times, 0.5);
        let what = format!("{BATCH_JOBS} jobs acknowledged, median");
        let headline = Headline::new(what, median, "ms");
        Ok(Figures {
            values: json!({
                "jobs": BATCH_JOBS,
                "ms": times.iter().map(|time| millis(*time)).collect::<Vec<_>>(),
                "median_ms": median,
            }),
            headlines: vec![headline.bound(Bound::AtMost(ACKNOWLEDGED_MAX_MS))],
        })
    }

    async fn dispatch(&self) -> Result<Figures, Problem> {
        let stack = self.stack(1).await?;
        let (rate, seconds) = (self.args.rate, self.args.seconds);
        let jobs = (rate * seconds) as usize;
        let crew = (self.args.workers, DISPATCH_CREDIT);
        let cpu = stack.cpu();
        let ways = dispatch::measure(&stack, jobs, rate, crew).await?;
        let cpu = stack.cpu().since(cpu);
        let (p50, p99) = (percentile_ms(&ways, 0.5), percentile_ms(&ways, 0.99));
        let what = |which: &str| format!("submit to a warm worker at {rate} jobs/s, {which}");
        Ok(Figures {
            values: json!({
                "jobs": jobs,
                "jobs_per_s": rate,
                "p50_ms": p50,
                "p90_ms": percentile_ms(&ways, 0.9),
                "p99_ms": p99,
                "worst_ms": percentile_ms(&ways, 1.0),
                "cpu_s": { "redis": cpu.redis, "coordinator": cpu.coordinators, "client_and_workers": cpu.this_process },
            }),
            headlines: vec![
                Headline::new(what("p50"), p50, "ms").bound(Bound::AtMost(DISPATCH_P50_MAX_MS)),
                Headline::new(what("p99"), p99, "ms").bound(Bound::AtMost(DISPATCH_P99_MAX_MS)),
            ],
        })
    }

    async fn lost(&self) -> Result<Figures, Problem> {
        let projects = vec![PROJECT.to_owned()];
        let stack = self.stack_with(1, projects, Some(LOST_LEASE)).await?;
        let waits = hold::losses(&stack, LOST_ROUNDS).await?;
        let lease_ms = millis(LOST_LEASE);
        let beyond = percentile_ms(&waits, 1.0) - lease_ms;
        let headline = Headline::new(
            "a lost worker's job granted again, beyond its lease, worst",
            beyond,
            "ms",
        );
        Ok(Figures {
            values: json!({
                "lease_ms": lease_ms,
                "ms": waits.iter().map(|time| millis(*time)).collect::<Vec<_>>(),
                "worst_beyond_lease_ms": beyond,
            }),
            headlines: vec![headline.bound(Bound::AtMost(GRANTED_AGAIN_MAX_MS))],
        })
    }

    async fn tenants(&self) -> Result<Figures, Problem> {
        let load = tenants::Load {
            small_projects: 50,
            small_jobs: 100,
            big_jobs: self.args.backlog,
        };
        let stack = self.stack_with(1, tenants::projects(load), None).await?;
        tenants::measure(&stack, load, (self.args.workers, DISPATCH_CREDIT)).await
    }

    async fn cancel(&self) -> Result<Figures, Problem> {
        let stack = self.stack(2).await?;
        let times = hold::cancels(&stack, CANCEL_ROUNDS).await?;
        let (median, worst) = (percentile_ms(&times, 0.5), percentile_ms(&times, 1.0));
        let headline = Headline::new(
            "cancel to its worker, at another coordinator, worst",
            worst,
            "ms",
        );
        Ok(Figures {
            values: json!({ "rounds": CANCEL_ROUNDS, "median_ms": median, "worst_ms": worst }),
            headlines: vec![headline.bound(Bound::AtMost(CANCEL_MAX_MS))],
        })
    }

    async fn memory(&self) -> Result<Figures, Problem> {
        let stack = self.stack(1).await?;
        let memory = cycle::memory(&stack, self.args.jobs).await?;
        let beyond = memory.bytes_a_job - memory.payload_bytes;
        let what = "memory of a waiting job in Redis, beyond its payload";
        Ok(Figures {
            values: json!({
                "jobs": self.args.jobs,
                "bytes_a_job": memory.bytes_a_job,
                "payload_bytes": memory.payload_bytes,
                "bytes_beyond_payload": beyond,
            }),
            headlines: vec![
                Headline::new(what, beyond, "bytes").bound(Bound::AtMost(MEMORY_MAX_BYTES)),
            ],
        })
    }
}

/// Calls and microseconds of each command, scripts' commands included, as `INFO commandstats` tells them.
fn calls(info: &str) -> Value {
    let line = |line: &str| {
        let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(':')?;
        let number = |key: &str| {
            let pair = rest.split(',').find_map(|pair| pair.strip_prefix(key))?;
            pair.strip_prefix('=')?.parse::<u64>().ok()
        };
        let told = json!({ "calls": number("calls")?, "us": number("usec")? });
        Some((name.to_owned(), told))
    };
    info.lines().filter_map(line).collect::<Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read() {
        let info = "# Commandstats\r\ncmdstat_evalsha:calls=7,usec=90,usec_per_call=12.86\r\n";
        assert_eq!(calls(info), json!({ "evalsha": { "calls": 7, "us": 90 } }));
    }
}
