//! Two coordinators and two workers on one Redis, of which each part is killed, paused and cut off while 200 rollouts
//! run. After each round: no acknowledged job lost, one accepted result a job, counters that add up, and manifests that
//! hold what they name.

use std::time::Duration;

use espalier_tests::harness::cluster::Setup;
use espalier_tests::harness::model;
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::proxy::{Direction, Network};
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::wait_for;
use espalier_tests::harness::world::{DEADLINE, LEASE_MS, World, toy_jobs};

const JOBS: usize = 200;
const SLOTS: u32 = 8;
/// How long the look of the coordinators at the server's memory may take.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// Everything runs, and half of the jobs are submitted to the batch `b` of each project. Redis syncs each write: with
/// `everysec` one that is killed in the middle of a sync has lost what it held back, which `docs/decisions/redis.md`
/// says.
async fn start() -> World {
    let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let setup = Setup {
        lease_ttl_ms: LEASE_MS,
        ..Setup::new("", &model::start().await)
    };
    let mut world = World::start(redis, setup, 2, SLOTS).await;
    world.submit("b", &toy_jobs(JOBS)).await;
    world
}

/// Of the answers of a server, none arrives.
fn deaf() -> Network {
    Network {
        to_client: stopped(),
        ..Network::default()
    }
}

/// Of what is said to a server, nothing arrives.
fn mute() -> Network {
    Network {
        to_target: stopped(),
        ..Network::default()
    }
}

fn stopped() -> Direction {
    Direction {
        stopped: true,
        ..Direction::default()
    }
}

#[tokio::test]
async fn a_redis_that_is_killed_and_started_again_loses_nothing() {
    let mut world = start().await;
    for succeeded in [20, 90] {
        world.after("b", succeeded).await;
        world.redis.kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.redis.restart().await;
    }
    world.check("b", JOBS).await;
}

/// Longer than the silence that counts as an outage: leases are prolonged by it, and nobody's result is refused for it.
#[tokio::test]
async fn a_redis_that_stalls_ends_no_lease() {
    let mut world = start().await;
    world.after("b", 20).await;
    world.redis.pause();
    tokio::time::sleep(Duration::from_secs(12)).await;
    world.redis.resume();
    world.check("b", JOBS).await;
}

#[tokio::test]
async fn a_coordinator_that_is_killed_leaves_its_workers_to_the_other() {
    let mut world = start().await;
    world.after("b", 20).await;
    world.kill_coordinator(1);
    world.after("b", 90).await;
    world.cluster.restart_coordinator(1).await;
    world.after("b", 110).await;
    world.kill_coordinator(0);
    world.ask_at(1).await;
    world.check("b", JOBS).await;
}

#[tokio::test]
async fn a_coordinator_that_is_paused_goes_on_without_a_second_result() {
    let mut world = start().await;
    for (number, succeeded) in [(0, 20), (1, 60)] {
        world.after("b", succeeded).await;
        let process = &world.cluster.coordinators[number].process;
        process.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_secs(4)).await;
        process.signal(Signal::CONT);
    }
    world.check("b", JOBS).await;
}

#[tokio::test]
async fn workers_that_die_or_pause_past_their_leases_cost_time_only() {
    let mut world = start().await;
    world.after("b", 20).await;
    world.workers[0].process.signal(Signal::STOP);
    tokio::time::sleep(Duration::from_secs(4)).await;
    world.workers[0].process.signal(Signal::CONT);
    world.after("b", 60).await;
    world.kill_worker(1);
    world.replace_worker(1);
    world.check("b", JOBS).await;
}

/// Commands that were carried out and whose answers never come, connections that break, an answer a quarter of a second.
#[tokio::test]
async fn a_bad_network_to_redis_costs_time_only() {
    let mut world = start().await;
    for (succeeded, network) in [
        (15, deaf()),
        (45, Network::partitioned()),
        (75, Network::slow(Duration::from_millis(250))),
        (105, mute()),
    ] {
        world.after("b", succeeded).await;
        world.to_redis.set(network);
        tokio::time::sleep(Duration::from_secs(3)).await;
        world.to_redis.cut();
        world.to_redis.heal();
    }
    world.check("b", JOBS).await;
}

/// Longer than a lease: jobs of workers that nobody hears are granted again, and their results are refused or adopted.
/// A worker that hears nothing says the same again and is believed once.
#[tokio::test]
async fn a_bad_network_to_the_workers_costs_time_only() {
    let mut world = start().await;
    for (succeeded, network) in [
        (15, deaf()),
        (45, mute()),
        (75, Network::partitioned()),
        (105, Network::slow(Duration::from_millis(250))),
    ] {
        world.after("b", succeeded).await;
        for proxy in &world.to_coordinators {
            proxy.set(network);
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        for proxy in &world.to_coordinators {
            proxy.cut();
            proxy.heal();
        }
    }
    world.check("b", JOBS).await;
}

#[tokio::test]
async fn a_full_redis_takes_nothing_new_and_brings_what_it_has_to_its_end() {
    let mut world = start().await;
    world.after("b", 20).await;
    world
        .redis
        .cli(&["CONFIG", "SET", "maxmemory", "1mb"])
        .await;
    let refused = wait_for("nothing new to be taken", LOOK_DEADLINE, || {
        let mut client = world.clients[0].clone();
        async move { refusal(client.try_submit("late", &toy_jobs(1)).await) }
    })
    .await;
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    assert!(refused.message().contains("maxmemory"), "{refused}");
    world.after("b", JOBS as u64).await;
    world.redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    wait_for("something new to be taken", LOOK_DEADLINE, || {
        let mut client = world.clients[0].clone();
        async move { client.try_submit("later", &toy_jobs(1)).await }
    })
    .await;
    world.clients[0].wait("later", DEADLINE).await;
    world.check("b", JOBS).await;
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, tonic::Status>) -> Result<tonic::Status, T> {
    match answer {
        Err(status) => Ok(status),
        Ok(taken) => Err(taken),
    }
}
