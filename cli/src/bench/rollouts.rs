//! A running `espalier up` at work: a file of jobs from submission to the end of the last one, its memory meanwhile,
//! and afterwards, from the stored traces, what a turn cost beside model and tools.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use futures::TryStreamExt;
use serde_json::{Value, json};

use super::memory::{self, Sample};
use super::overhead::{Turn, turns};
use super::{Bound, Figures, Headline, percentile};
use crate::client::Client;
use crate::context::Context;
use crate::exit::Problem;
use crate::names::stamp;
use crate::submit::file::{Additions, JobFile};
use crate::submit::{pair, send};
use crate::traces::{Place, Source};
use crate::watch::Report;

/// The bound of the issue for a worker's own memory: this much,
const OWN_MAX_MB: f64 = 200.0;
/// and this much for each rollout that runs.
const OWN_MAX_MB_PER_ROLLOUT: f64 = 2.0;
/// Looks at memory that are kept: an hour of them.
const SAMPLES_MAX: usize = 18_000;

/// Options of `bench rollouts`.
#[derive(Args, Clone, Debug)]
pub struct Rollouts {
    /// Jobs, as `espalier submit` takes them
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What ${KEY} stands for in the jobs' texts; may be given several times
    #[arg(long = "var", value_name = "KEY=VALUE", value_parser = pair)]
    pub vars: Vec<(String, String)>,
    /// What the measurement is called in the report
    #[arg(long, value_name = "NAME", default_value = "rollouts")]
    pub name: String,
    /// Says that more rollouts run than the cores can serve: a turn then waits for a core most of the time, and no
    /// bound is held against that
    #[arg(long)]
    pub saturating: bool,
}

/// Measures.
pub async fn measure(context: &Context, args: &Rollouts) -> Result<Figures, Problem> {
    let client = context.client().await?;
    let up = context.up_file()?;
    let idle = match &up {
        Some(up) => Some(memory::look(up.pid).await?),
        None => None,
    };
    let (running, mut samples) = (AtomicU64::new(0), Vec::new());
    let at_work = Box::pin(run(&client, args, &running));
    let ran = match &up {
        None => at_work.await?,
        Some(up) => {
            let looking = memory::watch(up.pid, |sample| {
                if samples.len() < SAMPLES_MAX {
                    samples.push((running.load(Ordering::Relaxed), sample));
                }
            });
            tokio::select! {
                ran = at_work => ran?,
                gone = looking => return Err(gone.err().unwrap_or_else(|| Problem::failed("`up` is gone"))),
            }
        }
    };
    let costs = turn_costs(context, &ran.batch).await?;
    let memory = idle.and_then(|idle| Memory::of(idle, &samples));
    Ok(report(&ran, &costs, memory.as_ref(), args.saturating))
}

/// A batch that is done.
struct Ran {
    batch: BatchId,
    rollouts: u64,
    took: Duration,
    report: Value,
}

/// Submits the file and waits for its last job; `running` says meanwhile how many rollouts run.
async fn run(client: &Client, args: &Rollouts, running: &AtomicU64) -> Result<Ran, Problem> {
    let batch = BatchId::new(format!("bench-{}", stamp(SystemClock.now())))?;
    let additions = Additions {
        vars: args.vars.iter().cloned().collect(),
        ..Additions::default()
    };
    let file = JobFile::open(&args.file, additions)?;
    let began = Instant::now();
    let sent = send(client, &batch, file, true).await?;
    if sent.refused > 0 || sent.accepted == 0 {
        let name = args.file.display();
        let (refused, accepted) = (sent.refused, sent.accepted);
        let text = format!("{refused} jobs of {name} were refused and {accepted} accepted");
        return Err(Problem::refused(text).fix("`espalier submit` shows which and why"));
    }
    let mut report = Report::default();
    let request = v1::WatchBatchRequest {
        batch: batch.to_string(),
        after_cursor: 0,
    };
    let mut events = client.jobs().watch_batch(request).await?.into_inner();
    while !report.batch.complete {
        let event = events.message().await?;
        report.take(event.ok_or_else(|| Problem::failed("the coordinator ended the watch early"))?);
        running.store(report.counts().leased, Ordering::Relaxed);
    }
    let took = began.elapsed();
    let faults = report.faults();
    if !faults.is_empty() {
        return Err(Problem::failed(faults.join("; ")));
    }
    Ok(Ran {
        batch,
        rollouts: sent.accepted,
        took,
        report: report.to_json(None)["report"]["kinds"].take(),
    })
}

/// The turns of every trace of the batch.
async fn turn_costs(context: &Context, batch: &BatchId) -> Result<Vec<Turn>, Problem> {
    let source = Source::open(context, &Place { store: None }).await?;
    let entries = source.list(Some(batch)).await?;
    let traces = source.load_all(entries);
    let all = traces.try_fold(Vec::new(), async |mut all, found| {
        all.extend(turns(&found.trace));
        Ok(all)
    });
    Box::pin(all).await
}

/// Memory while rollouts ran.
#[derive(Debug, PartialEq)]
struct Memory {
    idle: Sample,
    /// The largest of the process's own resident sizes, by how much of the bound it is, and how many ran then.
    own: (u64, Sample),
    /// The largest of the process's own resident sizes among the looks when the most rollouts ran.
    busy: Sample,
    /// The largest of what it started, among the looks when the most rollouts ran.
    below: (u64, Sample),
    looks: usize,
}

impl Memory {
    fn of(idle: Sample, samples: &[(u64, Sample)]) -> Option<Self> {
        let most = samples.iter().map(|(running, _)| *running).max()?;
        let largest_by = |of: fn(&(u64, Sample)) -> f64, at_least: u64| {
            let samples = samples
                .iter()
                .filter(|(running, _)| *running >= at_least && *running > 0);
            samples.max_by(|a, b| of(a).total_cmp(&of(b))).copied()
        };
        Some(Self {
            idle,
            own: largest_by(|(running, s)| s.own_rss_mb / own_bound(*running), 0)?,
            busy: largest_by(|(_, s)| s.own_rss_mb, most)?.1,
            below: largest_by(|(_, s)| s.below_pss_mb, most)?,
            looks: samples.len(),
        })
    }

    fn pss_per_rollout_mb(&self) -> f64 {
        self.below.1.below_pss_mb / self.below.0 as f64
    }

    fn to_json(&self) -> Value {
        json!({
            "up_idle_rss_mb": self.idle.own_rss_mb,
            "up_idle_pss_mb": self.idle.own_pss_mb,
            "up_busy_rss_mb": self.busy.own_rss_mb,
            "up_busy_pss_mb": self.busy.own_pss_mb,
            "up_rss_mb": self.own.1.own_rss_mb,
            "up_pss_mb": self.own.1.own_pss_mb,
            "up_rollouts_running": self.own.0,
            "below_idle_pss_mb": self.idle.below_pss_mb,
            "below_pss_mb": self.below.1.below_pss_mb,
            "below_processes": self.below.1.below,
            "below_processes_unreadable": self.below.1.unreadable,
            "below_rollouts_running": self.below.0,
            "pss_per_rollout_mb": self.pss_per_rollout_mb(),
            "looks": self.looks,
        })
    }
}

fn own_bound(running: u64) -> f64 {
    OWN_MAX_MB + OWN_MAX_MB_PER_ROLLOUT * running as f64
}

/// The value below which `share` of the turns lie.
fn of_turns(costs: &[Turn], of: fn(&Turn) -> f64, share: f64) -> f64 {
    percentile(costs.iter().map(of).collect(), share)
}

fn ours_ms(turn: &Turn) -> f64 {
    turn.ours_us as f64 / 1e3
}

fn turn_headlines(costs: &[Turn], saturating: bool) -> Vec<Headline> {
    if costs.is_empty() {
        return Vec::new();
    }
    let at = |share| of_turns(costs, ours_ms, share);
    let mut headlines = vec![
        Headline::new("our part of a turn, median", at(0.5), "ms"),
        Headline::new("our part of a turn, p90", at(0.9), "ms"),
    ];
    if !saturating {
        let share = of_turns(costs, Turn::share_of_bound, 0.5);
        let headline = Headline::new("our part of a turn by its bound, median", share, "");
        headlines.push(headline.bound(Bound::AtMost(1.0)));
    }
    headlines
}

fn report(ran: &Ran, costs: &[Turn], memory: Option<&Memory>, saturating: bool) -> Figures {
    let seconds = ran.took.as_secs_f64();
    let per_min = ran.rollouts as f64 / seconds * 60.0;
    let within = costs.iter().filter(|t| t.share_of_bound() <= 1.0).count();
    let values = json!({
        "batch": ran.batch,
        "rollouts": ran.rollouts,
        "seconds": seconds,
        "rollouts_per_min": per_min,
        "rollouts_per_s": per_min / 60.0,
        "turns": costs.len(),
        "turn_result_chars_median": of_turns(costs, |t| t.result_chars as f64, 0.5),
        "turn_overhead_median_ms": of_turns(costs, ours_ms, 0.5),
        "turn_overhead_p90_ms": of_turns(costs, ours_ms, 0.9),
        "turn_overhead_of_bound_median": of_turns(costs, Turn::share_of_bound, 0.5),
        "turn_overhead_of_bound_p90": of_turns(costs, Turn::share_of_bound, 0.9),
        "turns_within_bound": within,
        "memory": memory.map(Memory::to_json),
        "report": ran.report,
    });
    let mut headlines = vec![Headline::new("rollouts", per_min, "/min")];
    headlines.extend(turn_headlines(costs, saturating));
    if let Some(memory) = memory {
        let (running, sample) = memory.own;
        headlines.extend([
            Headline::new(
                format!("`up` itself, resident, nearest its bound, {running} running"),
                sample.own_rss_mb,
                "MB",
            )
            .bound(Bound::AtMost(own_bound(running))),
            Headline::new(
                format!("`up` itself, resident, {} running", memory.below.0),
                memory.busy.own_rss_mb,
                "MB",
            ),
            Headline::new("`up` itself, resident, idle", memory.idle.own_rss_mb, "MB"),
            Headline::new(
                format!("PSS of a rollout, {} running", memory.below.0),
                memory.pss_per_rollout_mb(),
                "MB",
            ),
        ]);
    }
    Figures { values, headlines }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(own_rss_mb: f64, below_pss_mb: f64) -> Sample {
        Sample {
            own_rss_mb,
            below_pss_mb,
            ..Sample::default()
        }
    }

    #[test]
    fn memory_is_of_the_busiest_looks() {
        let samples = [
            (0, sample(90.0, 50.0)),
            (8, sample(100.0, 800.0)),
            (8, sample(101.0, 960.0)),
            // More memory, but of fewer rollouts than there were.
            (7, sample(99.0, 1_000.0)),
        ];
        let memory = Memory::of(sample(60.0, 0.0), &samples).unwrap();
        assert_eq!(memory.below.1.below_pss_mb, 960.0);
        assert_eq!(memory.pss_per_rollout_mb(), 120.0);
        assert_eq!(memory.own.1.own_rss_mb, 101.0);
        assert_eq!(memory.busy.own_rss_mb, 101.0);
        assert_eq!(Memory::of(sample(60.0, 0.0), &samples[..1]), None);
    }

    #[test]
    fn headlines_have_the_bounds_of_what_ran() {
        let ran = Ran {
            batch: BatchId::new("b").unwrap(),
            rollouts: 30,
            took: Duration::from_secs(60),
            report: Value::Null,
        };
        let costs = [(4_000, 0), (6_000, 0), (5_600, 1_000)].map(|(ours_us, result_chars)| Turn {
            ours_us,
            result_chars,
        });
        let figures = report(&ran, &costs, None, false);
        assert_eq!(figures.values["rollouts_per_min"], 30.0);
        assert_eq!(figures.values["turn_overhead_median_ms"], 5.6);
        assert_eq!(figures.values["turn_overhead_of_bound_median"], 1.0);
        assert_eq!(figures.values["turns_within_bound"], 2);
        assert_eq!(own_bound(8), 216.0);
        let bounded = |saturating| {
            let headlines = turn_headlines(&costs, saturating);
            headlines.iter().filter(|one| one.holds.is_some()).count()
        };
        assert_eq!([bounded(false), bounded(true)], [1, 0]);
    }
}
