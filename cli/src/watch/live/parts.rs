//! The tables that a look is shown as. Pure.

use std::cmp::Reverse;

use espalier_proto::v1;

use super::look::{Look, done, models, open, pipelines};
use super::rates::Rates;
use super::table::{Cell, Table};
use crate::json;
use crate::output::{count, duration};

/// Of a coordinator's id, its last characters tell it apart.
const COORDINATOR_CHARS: usize = 8;
/// A worker is heard every few seconds, and told of in steps of five.
const NOW_MS: u64 = 10_000;

/// The queue by project and kind, the longest first.
pub fn queues(look: &Look, rates: &Rates) -> Table {
    let mut queues: Vec<&v1::QueueStats> = look.queues.iter().collect();
    let open = |queue: &v1::QueueStats| queue.ready + queue.leased + queue.delayed + queue.blocked;
    queues.sort_by_key(|queue| Reverse(open(queue)));
    let row = |queue: &&v1::QueueStats| {
        let oldest = Some(queue.oldest_ready_ms).filter(|ms| *ms > 0);
        vec![
            Cell::from(queue.project.clone()),
            Cell::from(json::kind(queue.kind())),
            Cell::count(queue.ready),
            Cell::count(queue.leased),
            Cell::count(queue.dead),
            Cell::rate(rates.ends_of(queue)),
            Cell::duration(oldest),
            Cell::count(queue.delayed),
            Cell::count(queue.blocked),
            Cell::count(queue.succeeded),
            Cell::count(queue.cancelled),
        ]
    };
    let header = &[
        "project",
        "kind",
        "ready",
        "running",
        "dead",
        "ends/s",
        "oldest waits",
        "delayed",
        "blocked",
        "succeeded",
        "cancelled",
    ];
    Table::new(header, queues.iter().map(row).collect(), "no jobs")
}

/// Batches in progress, those of which something runs first.
pub fn batches(look: &Look, rates: &Rates) -> Table {
    let mut batches: Vec<&v1::Batch> = look.batches.iter().collect();
    // Newest first they come, and those of which something runs are to be seen first.
    batches.sort_by_key(|batch| batch.counts.is_none_or(|counts| counts.leased == 0));
    let row = |batch: &v1::Batch| {
        let mut row = vec![Cell::from(batch.batch.clone())];
        row.extend(progress(batch, rates));
        row.push(Cell::from(batch.project.clone()));
        row
    };
    let header = &[
        "batch", "done", "running", "dead", "ends/s", "left", "project",
    ];
    let rows = batches.into_iter().map(row).collect();
    Table::new(header, rows, "no batch in progress")
}

/// Steps of pipelines that are under way.
pub fn steps(look: &Look, rates: &Rates) -> Table {
    let row = |(pipeline, step, batch)| {
        let pipeline: espalier_core::id::PipelineName = pipeline;
        let step: espalier_core::pipeline::Step = step;
        let mut row = vec![Cell::from(pipeline.to_string()), Cell::from(step.as_str())];
        row.extend(progress(batch, rates));
        row.push(Cell::from(batch.project.clone()));
        row
    };
    let header = &[
        "pipeline", "step", "done", "running", "dead", "ends/s", "left", "project",
    ];
    let rows = pipelines(&look.batches).map(row).collect();
    Table::new(header, rows, "no pipeline has a step under way")
}

/// How far a batch is: done, running, dead, rate and the time that is left.
fn progress(batch: &v1::Batch, rates: &Rates) -> [Cell; 5] {
    let counts = batch.counts.unwrap_or_default();
    let (done, all) = (done(batch), done(batch) + open(batch));
    let share = done as f64 / all.max(1) as f64;
    let left = rates.left_s(batch).map(|s| (s * 1_000.0) as u64);
    [
        Cell::of(format!("{} of {}", count(done), count(all)), share),
        Cell::count(counts.leased),
        Cell::count(counts.dead),
        Cell::rate(rates.of_batch(batch)),
        Cell::duration(left),
    ]
}

/// The workers of all coordinators.
pub fn workers(look: &Look, rates: &Rates) -> Table {
    let row = |worker: &v1::Worker| {
        let kinds: Vec<&str> = worker.kinds().map(json::kind).collect();
        let silent_ms = look.silent_ms(worker);
        let seen = match silent_ms {
            0..NOW_MS => "now".to_owned(),
            ms => format!("{} ago", duration(ms - ms % 1_000)),
        };
        let age_ms = look.now_us.saturating_sub(worker.connected_at_us) / 1_000;
        vec![
            Cell::from(worker.worker.clone()),
            Cell::of(
                format!("{} of {}", worker.running, worker.capacity),
                f64::from(worker.running),
            ),
            Cell::from(if worker.draining { "draining" } else { "ready" }),
            Cell::of(seen, silent_ms as f64),
            Cell::from(end_of(&worker.coordinator)),
            Cell::rate(rates.of_worker(worker)),
            Cell::from(kinds.join(" ")),
            Cell::from(worker.version.clone()),
            Cell::duration(Some(age_ms - age_ms % 1_000)),
        ]
    };
    let header = &[
        "worker",
        "running",
        "state",
        "heard",
        "coordinator",
        "grants/s",
        "kinds",
        "version",
        "connected for",
    ];
    let none = match look.workers {
        Some(_) => "no workers are connected",
        None => "workers are shown to tokens for all projects",
    };
    let rows = look.workers.iter().flatten().map(row).collect();
    Table::new(header, rows, none)
}

/// The models that workers serve.
pub fn served(look: &Look) -> Table {
    let row = |served: super::look::Served| {
        vec![
            Cell::from(served.model),
            Cell::count(served.workers as u64),
            Cell::count(served.running.into()),
            Cell::from(served.urls.join(" ")),
        ]
    };
    let header = &["model", "workers", "jobs", "at"];
    let found = models(look.workers.iter().flatten());
    let rows = found.into_iter().map(row).collect();
    Table::new(header, rows, "no worker serves a model")
}

fn end_of(id: &str) -> String {
    let skipped = id.chars().count().saturating_sub(COORDINATOR_CHARS);
    id.chars().skip(skipped).collect()
}
