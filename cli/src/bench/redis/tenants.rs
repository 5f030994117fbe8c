//! Small projects beside one with a huge backlog: how long their jobs wait, held against a fair share of the workers.
//!
//! All projects weigh the same. Of `n` projects that want something, each has an `n`-th of the grants, so the last of
//! `k` jobs of a small one is granted after `n × k` grants of all. That time, at the rate that the workers were
//! granted jobs meanwhile, is the fair wait.

use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use futures::future::try_join_all;
use serde_json::json;

use super::cycle::counts;
use super::stack::Stack;
use crate::bench::crew::Crew;
use crate::bench::{Figures, Headline, figures::Bound, percentile_ms, submit};
use crate::client::Client;
use crate::exit::Problem;
use crate::submit::file::CHUNK_JOBS_MAX;
use crate::submit::open;

const BIG: &str = "big";
const DRAIN_LIMIT: Duration = Duration::from_secs(600);
/// The bound of the issue: the waits that 99 % stay below, in fair waits.
const SHARES_MAX: f64 = 2.0;

/// Who wants what.
#[derive(Clone, Copy)]
pub struct Load {
    pub small_projects: usize,
    pub small_jobs: usize,
    pub big_jobs: usize,
}

/// The projects of a measurement.
pub fn projects(load: Load) -> Vec<String> {
    let small = (0..load.small_projects).map(|n| format!("small-{n}"));
    small.chain([BIG.to_owned()]).collect()
}

/// Measures on a stack with [`projects`].
pub async fn measure(
    stack: &Stack,
    load: Load,
    (workers, credit): (u32, u32),
) -> Result<Figures, Problem> {
    let Load {
        small_projects,
        small_jobs,
        big_jobs,
    } = load;
    let small_all = small_projects * small_jobs;
    let crew = Crew::of(small_all + big_jobs);
    let batch = BatchId::new("tenants")?;
    let mut clients = Vec::new();
    for project in projects(load) {
        let client = stack.client(&project, 0).await?;
        open(&client, &batch, v1::JobSpec::default()).await?;
        clients.push(client);
    }
    let big = clients.pop().ok_or_else(|| Problem::failed("no project"))?;
    let backlog = submit::chunks(&batch, small_all..small_all + big_jobs, CHUNK_JOBS_MAX);
    submit::send(&big, backlog).await?;
    let mut done = crew.ledger.done();
    crew.hire(stack.tasks(), &stack.worker(0), workers, credit, None);
    // The big one has all workers when the small ones come.
    let busy = done.wait_for(|done| *done >= (workers * credit) as usize);
    let busy = with_deadline("bench.busy", DRAIN_LIMIT, busy).await;
    busy.map_err(|timeout| Problem::failed(timeout.to_string()))?
        .map_err(|_| Problem::failed("the workers have gone"))?;
    let arrivals = try_join_all(clients.iter().enumerate().map(|(n, client)| {
        let jobs = n * small_jobs..(n + 1) * small_jobs;
        arrive(client, submit::chunks(&batch, jobs, CHUNK_JOBS_MAX))
    }))
    .await?;
    let all = small_all + big_jobs;
    let drained = done.wait_for(|done| *done >= all);
    let drained = with_deadline("bench.tenants", DRAIN_LIMIT, drained).await;
    crew.leave();
    let left = counts(&big, &batch).await?;
    if drained.is_err() || !crew.ledger.is_exact() || left.succeeded != big_jobs as u64 {
        return Err(Problem::failed(format!(
            "{all} jobs were not delivered exactly once each: {}",
            crew.ledger.to_json()
        )));
    }
    Ok(judge(load, &crew, &arrivals))
}

async fn arrive(client: &Client, chunks: Vec<v1::SubmitChunkRequest>) -> Result<Instant, Problem> {
    let came = Instant::now();
    submit::send(client, chunks).await?;
    Ok(came)
}

fn judge(load: Load, crew: &Crew, arrivals: &[Instant]) -> Figures {
    let small_all = load.small_projects * load.small_jobs;
    let granted = crew.ledger.grants(0..small_all);
    let arrived = |n: usize| arrivals[n / load.small_jobs];
    let waits: Vec<Duration> = granted
        .iter()
        .enumerate()
        .filter_map(|(n, at)| Some(at.as_ref()?.saturating_duration_since(arrived(n))))
        .collect();
    let first = arrivals.iter().min().copied();
    let last = granted.iter().flatten().max().copied();
    let (Some(first), Some(last)) = (first, last) else {
        return Figures {
            values: json!(null),
            headlines: Vec::new(),
        };
    };
    let all = crew.ledger.grants(0..small_all + load.big_jobs);
    let meanwhile = all
        .iter()
        .flatten()
        .filter(|at| (first..=last).contains(at));
    let per_s = meanwhile.count() as f64 / (last - first).as_secs_f64();
    let fair_ms = ((load.small_projects + 1) * load.small_jobs) as f64 / per_s * 1_000.0;
    let p99 = percentile_ms(&waits, 0.99);
    let shares = p99 / fair_ms;
    let what = format!(
        "{} projects of {} jobs beside {}: p99 wait, in fair waits",
        load.small_projects, load.small_jobs, load.big_jobs
    );
    Figures {
        values: json!({
            "grants_per_s": per_s,
            "fair_wait_ms": fair_ms,
            "wait_p50_ms": percentile_ms(&waits, 0.5),
            "wait_p99_ms": p99,
            "wait_p99_fair_waits": shares,
            "delivery": crew.ledger.to_json(),
        }),
        headlines: vec![Headline::new(what, shares, "").bound(Bound::AtMost(SHARES_MAX))],
    }
}
