//! The 200 rollouts over the toy MCP server that faults happen to, and what must hold of them at the end.

use serde_json::{Value, json};

use super::client::BatchResult;
use super::model::{self, sum_job, toy_job};
use super::world::{BATCH, Parts, World};

/// How many there are.
pub const ROLLOUTS: usize = 200;
/// Far shorter than the faults, so that leases would end if nothing were done about it.
const LEASE_MS: u64 = 2_000;
const SLOTS: u32 = 8;

/// Sums, and as many that are at work for a second: so some are whenever something happens, and not all have ended when
/// it is over. Two by two, since they are dealt out to two projects.
pub fn jobs(count: usize) -> Vec<Value> {
    let sleep = json!([{"tool": "sleep", "arguments": {"ms": 1000}}, {"answer": "done"}]);
    let job = |n: usize| match n % 4 {
        0 | 1 => toy_job(&format!("job-{n:04}"), &sleep, "done"),
        _ => sum_job(&format!("job-{n:04}"), n),
    };
    (0..count).map(job).collect()
}

/// The usual parts of the world that they run in.
pub async fn parts() -> Parts {
    Parts::new(&model::start().await, LEASE_MS, SLOTS)
}

/// Everything runs, and the rollouts are submitted.
pub async fn start(parts: Parts) -> World {
    let mut world = World::start(parts).await;
    world.submit(BATCH, &jobs(ROLLOUTS)).await;
    world
}

/// Waits for the end. Every rollout was solved, without a failure of its own, and what must hold of any batch does.
pub async fn check(world: &mut World) -> [BatchResult; 2] {
    let results = world.end(BATCH).await;
    for result in &results {
        assert_eq!(result.jobs.len(), ROLLOUTS / 2, "a job was lost");
        assert_eq!(result.solved(), ROLLOUTS / 2, "{:#?}", result.unsolved());
        for (id, job) in &result.jobs {
            assert_eq!(job.handler_failures, 0, "{id} spent an attempt of its own");
        }
    }
    results
}
