//! Other queues: each a program that takes its jobs through the same Redis, alone, and tells what came of it.
//!
//! Such a program gets the address of an empty Redis as `REDIS_URL` and prints one line of JSON, see `Told`. What it
//! tells counts only if every job was done exactly once and nothing is left.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_runtime::tasks::with_deadline;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::stack::RedisServer;
use crate::exit::Problem;

/// Longest that another queue may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What such a program tells.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    /// Name and version.
    pub system: String,
    /// Jobs of each cycle.
    pub jobs: u64,
    /// By the manner of the cycle, such as all submitted first, or submitted beside the work.
    pub cycles: BTreeMap<String, ToldCycle>,
}

/// One cycle.
#[derive(Debug, Serialize, Deserialize)]
pub struct ToldCycle {
    /// Jobs in.
    pub add_jobs_per_s: f64,
    /// Jobs done, where that is apart from submitting.
    pub process_jobs_per_s: Option<f64>,
    /// Both.
    pub cycle_jobs_per_s: f64,
    /// Jobs that ran exactly once.
    pub done_once: u64,
    /// Ends that were counted.
    pub completed: u64,
    /// Jobs that are still there.
    pub left: u64,
}

impl Told {
    /// The fastest cycle: what is held against ours.
    pub fn best_per_s(&self) -> f64 {
        let rates = self.cycles.values().map(|cycle| cycle.cycle_jobs_per_s);
        rates.fold(0.0, f64::max)
    }

    fn check(self) -> Result<Self, Problem> {
        let jobs = self.jobs;
        let exact = |c: &ToldCycle| c.done_once == jobs && c.completed == jobs && c.left == 0;
        match self.cycles.iter().find(|(_, cycle)| !exact(cycle)) {
            None if !self.cycles.is_empty() && jobs > 0 => Ok(self),
            wrong => Err(Problem::failed(format!(
                "{} did not do each of {jobs} jobs exactly once: {wrong:?}",
                self.system
            ))),
        }
    }
}

/// Runs one on a Redis of its own. `command` is split at spaces.
pub async fn run(command: &str) -> Result<Told, Problem> {
    let redis = RedisServer::start().await?;
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let running = Command::new(program)
        .args(words)
        .env("REDIS_URL", redis.url())
        .kill_on_drop(true)
        .output();
    let output = with_deadline("bench.peer", LIMIT, running).await;
    let output = output.map_err(|timeout| Problem::failed(timeout.to_string()))??;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Problem::failed(format!("`{command}` failed: {said}")));
    }
    let told: Told = serde_json::from_slice(&output.stdout).map_err(|error| {
        Problem::failed(format!(
            "`{command}` must print its figures as JSON: {error}"
        ))
    })?;
    told.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(done_once: u64, left: u64) -> Told {
        let cycle = |cycle_jobs_per_s| ToldCycle {
            add_jobs_per_s: 1.0,
            process_jobs_per_s: None,
            cycle_jobs_per_s,
            done_once,
            completed: 10,
            left,
        };
        let cycles = [("a".to_owned(), cycle(3.0)), ("b".to_owned(), cycle(2.0))];
        Told {
            system: "x".to_owned(),
            jobs: 10,
            cycles: cycles.into(),
        }
    }

    #[test]
    fn the_best_cycle_counts_and_only_exact_ones_do() {
        assert_eq!(told(10, 0).check().unwrap().best_per_s(), 3.0);
        assert!(told(9, 0).check().is_err());
        assert!(told(10, 1).check().is_err());
    }
}
