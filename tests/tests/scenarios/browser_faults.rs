//! 16 rollouts in real browsers over a cluster, to each part of which everything happens that may: what the failure
//! matrix names, and what `faults_redis.rs` and `faults_cluster.rs` show with 200 rollouts over the toy server. Every
//! rollout ends solved, or failed for a reason that is told; each has one accepted result; no process and no file is
//! left over.

use espalier_proto::v1::{Job, JobState};
use espalier_tests::harness::client::BatchResult;
use espalier_tests::harness::cluster::PROJECTS;
use espalier_tests::harness::faults::{self, Link};
use espalier_tests::harness::model;
use espalier_tests::harness::practice::{self, SEED};
use espalier_tests::harness::world::{BATCH, Parts, World};
use espalier_tests::scripted_model::Config;

const ROLLOUTS: usize = 16;
/// Four browsers at once keep two cores busy; more would only wait for each other.
const SLOTS: u32 = 2;
/// Short enough to be outlasted, long enough for a worker that starts browsers on two busy cores to renew it.
const LEASE_MS: u64 = 4_000;

/// The usual parts, with a model that thinks for so long before each turn that there are rollouts left for the faults.
async fn parts(think_ms: u64) -> Parts {
    let thinking = Config {
        seed: SEED,
        mistakes: 0.0,
        think_ms,
    };
    Parts::new(&model::start_with(thinking).await, LEASE_MS, SLOTS)
}

/// The rollouts have begun, and two have ended.
async fn start(parts: Parts) -> World {
    let mut world = World::start(parts).await;
    world.submit(BATCH, &practice::start(ROLLOUTS).await).await;
    world.after(2).await;
    world
}

/// Whether it was solved, or says why not.
fn is_honest(job: &Job) -> bool {
    let summary = job.summary.as_ref();
    match job.state() {
        JobState::Succeeded => {
            summary.is_some_and(|s| s.reward == Some(1.0) || !s.reason.is_empty())
        }
        JobState::Dead => job
            .last_error
            .as_ref()
            .is_some_and(|e| !e.message.is_empty()),
        _ => false,
    }
}

/// What must hold at the end, whatever happened on the way.
async fn check(world: &mut World) -> [BatchResult; 2] {
    let results = world.end(BATCH).await;
    let mut solved = 0;
    for (project, result) in PROJECTS.iter().zip(&results) {
        assert_eq!(result.jobs.len(), ROLLOUTS / 2, "a rollout was lost");
        let dishonest: Vec<&Job> = result.jobs.values().filter(|j| !is_honest(j)).collect();
        assert!(dishonest.is_empty(), "{dishonest:#?}");
        println!("not solved of {project}: {:?}", result.unsolved());
        solved += result.solved();
    }
    // What a fault costs is tried again; a rollout whose page was lost on the way is the exception.
    assert!(solved >= ROLLOUTS - 2, "only {solved} were solved");
    results
}

#[tokio::test]
async fn workers_die_and_pause_under_16_browser_rollouts() {
    let mut world = start(parts(300).await).await;
    faults::kill_worker(&mut world, 0).await;
    world.after(6).await;
    faults::pause_worker(&mut world, 1).await;
    check(&mut world).await;
}

#[tokio::test]
async fn coordinators_die_and_pause_under_16_browser_rollouts() {
    let mut world = start(parts(300).await).await;
    faults::kill_coordinator(&mut world, 1).await;
    world.after(5).await;
    world.cluster.restart_coordinator(1).await;
    faults::pause_coordinator(&mut world, 0).await;
    check(&mut world).await;
}

#[tokio::test]
async fn redis_dies_and_stalls_and_is_full_under_16_browser_rollouts() {
    let mut world = start(parts(300).await).await;
    faults::kill_redis(&mut world).await;
    world.after(4).await;
    faults::stall_redis(&mut world).await;
    world.after(8).await;
    faults::fill_redis(&mut world).await;
    check(&mut world).await;
}

/// Twice: the primary is dead, and then it lives on beside the new one.
#[tokio::test]
async fn replicas_of_redis_are_promoted_under_16_browser_rollouts() {
    let mut world = start(Parts {
        replicated: true,
        ..parts(300).await
    })
    .await;
    faults::fail_over(&mut world).await;
    world.after(7).await;
    faults::fail_over_beside_the_old(&mut world).await;
    check(&mut world).await;
}

#[tokio::test]
async fn the_network_to_redis_is_bad_under_16_browser_rollouts() {
    let mut world = start(parts(500).await).await;
    faults::bad_network(&mut world, Link::ToRedis, [2, 4, 6, 8]).await;
    check(&mut world).await;
}

/// Leases end on the way, by which everybody's clock matters most.
#[tokio::test]
async fn the_network_to_workers_is_bad_and_their_clocks_are_wrong_under_16_browser_rollouts() {
    let mut world = start(Parts {
        clocks: [Some("+1h"), Some("-1h")],
        ..parts(500).await
    })
    .await;
    faults::bad_network(&mut world, Link::ToCoordinators, [2, 4, 6, 8]).await;
    let results = check(&mut world).await;
    faults::assert_wrong_clocks(&world, &results);
}

#[tokio::test]
async fn the_store_goes_away_and_crawls_under_16_browser_rollouts() {
    let mut world = start(Parts {
        far_store: true,
        // Shorter than both faults, and longer than a machine that is busy makes a renewal wait.
        lease_ms: 15_000,
        ..parts(500).await
    })
    .await;
    faults::lose_store(&mut world).await;
    faults::slow_store(&mut world).await;
    let results = check(&mut world).await;
    faults::assert_no_lease_ended(&results);
}
