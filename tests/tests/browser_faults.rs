//! 16 rollouts in real browsers over a cluster, of which each part is killed, paused or cut off meanwhile. Every one ends
//! solved, or failed for a reason that is told; each has one accepted result; no process and no file is left over.

use std::time::Duration;

use espalier_core::layout;
use espalier_proto::v1::{Job, JobState};
use espalier_tests::harness::cluster::{PROJECTS, Setup, key};
use espalier_tests::harness::model;
use espalier_tests::harness::practice::{self, SEED};
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::proxy::Network;
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::world::World;
use espalier_tests::scripted_model::Config;

const ROLLOUTS: usize = 16;
const WORKERS: usize = 2;
const SLOTS: u32 = 3;
/// Short enough to be outlasted, long enough for a worker that starts browsers on two busy cores to renew it.
const LEASE_MS: u64 = 4_000;
const PAST_LEASE: Duration = Duration::from_secs(6);

/// The rollouts have begun, and two have ended.
async fn start() -> World {
    let thinking = Config {
        seed: SEED,
        mistakes: 0.0,
        think_ms: 100,
    };
    let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let setup = Setup {
        lease_ttl_ms: LEASE_MS,
        ..Setup::new("", &model::start_with(thinking).await)
    };
    let mut world = World::start(redis, setup, WORKERS, SLOTS).await;
    world.submit("b", &practice::start(ROLLOUTS).await).await;
    world.after("b", 2).await;
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
async fn check(mut world: World) {
    let mut solved = 0;
    for (project, result) in PROJECTS.iter().zip(world.wait("b").await) {
        assert_eq!(result.jobs.len(), ROLLOUTS / 2, "a rollout was lost");
        let dishonest: Vec<&Job> = result.jobs.values().filter(|j| !is_honest(j)).collect();
        assert!(dishonest.is_empty(), "{dishonest:#?}");
        println!("not solved of {project}: {:?}", result.unsolved());
        solved += result.solved();
        for (id, job) in &result.jobs {
            if job.state() == JobState::Succeeded {
                let key = key(project, "b", id);
                assert_eq!(job.manifest, layout::manifest(&key));
                let manifest = world.cluster.manifest(&key);
                assert!(world.cluster.has_trace(&key, manifest.fence));
            }
        }
    }
    // What a fault costs is tried again; a rollout whose page was lost on the way is the exception.
    assert!(solved >= ROLLOUTS - 2, "only {solved} were solved");
    world.stop_workers().await;
    world.judge();
}

#[tokio::test]
async fn workers_die_and_pause_under_16_browser_rollouts() {
    let mut world = start().await;
    world.kill_worker(0);
    world.replace_worker(0);
    world.after("b", 6).await;
    let paused = &world.workers[1].process;
    paused.signal(Signal::STOP);
    tokio::time::sleep(PAST_LEASE).await;
    paused.signal(Signal::CONT);
    check(world).await;
}

#[tokio::test]
async fn coordinators_die_and_pause_under_16_browser_rollouts() {
    let mut world = start().await;
    world.kill_coordinator(1);
    world.after("b", 5).await;
    world.cluster.restart_coordinator(1).await;
    let paused = &world.cluster.coordinators[0].process;
    paused.signal(Signal::STOP);
    tokio::time::sleep(PAST_LEASE).await;
    paused.signal(Signal::CONT);
    check(world).await;
}

#[tokio::test]
async fn redis_dies_and_the_network_is_cut_under_16_browser_rollouts() {
    let mut world = start().await;
    world.redis.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.redis.restart().await;
    world.after("b", 6).await;
    for proxy in &world.to_coordinators {
        proxy.set(Network::partitioned());
    }
    tokio::time::sleep(PAST_LEASE).await;
    for proxy in &world.to_coordinators {
        proxy.cut();
        proxy.heal();
    }
    check(world).await;
}
