//! Two coordinators and two workers on one Redis, of which each part is killed, paused and cut off while 200 rollouts
//! run. After each round: no acknowledged job lost, one accepted result a job, counters that add up, and manifests that
//! hold what they name.

use espalier_tests::harness::faults::{self, Link};
use espalier_tests::harness::toy;

#[tokio::test]
async fn a_redis_that_is_killed_and_started_again_loses_nothing() {
    let mut world = toy::start(toy::parts().await).await;
    for succeeded in [20, 90] {
        world.after(succeeded).await;
        faults::kill_redis(&mut world).await;
    }
    toy::check(&mut world).await;
}

/// Longer than the silence that counts as an outage: leases are prolonged by it, and nobody's result is refused for it.
#[tokio::test]
async fn a_redis_that_stalls_ends_no_lease() {
    let mut parts = toy::parts().await;
    // Half of a stall, and long enough for a core that is slow and busy.
    parts.lease_ms = 6_000;
    let mut world = toy::start(parts).await;
    world.after(20).await;
    faults::stall_redis(&mut world).await;
    let results = toy::check(&mut world).await;
    faults::assert_no_lease_ended(&results);
}

#[tokio::test]
async fn a_coordinator_that_is_killed_leaves_its_workers_to_the_other() {
    let mut world = toy::start(toy::parts().await).await;
    world.after(20).await;
    faults::kill_coordinator(&mut world, 1).await;
    world.after(90).await;
    world.cluster.restart_coordinator(1).await;
    world.after(110).await;
    faults::kill_coordinator(&mut world, 0).await;
    toy::check(&mut world).await;
}

#[tokio::test]
async fn a_coordinator_that_is_paused_goes_on_without_a_second_result() {
    let mut world = toy::start(toy::parts().await).await;
    for (number, succeeded) in [(0, 20), (1, 60)] {
        world.after(succeeded).await;
        faults::pause_coordinator(&mut world, number).await;
    }
    toy::check(&mut world).await;
}

#[tokio::test]
async fn workers_that_die_or_pause_past_their_leases_cost_time_only() {
    let mut world = toy::start(toy::parts().await).await;
    world.after(20).await;
    faults::pause_worker(&mut world, 0).await;
    world.after(60).await;
    faults::kill_worker(&mut world, 1).await;
    toy::check(&mut world).await;
}

/// Answers that take long, commands that were carried out and whose answers never come, commands that come late, and
/// connections that break.
#[tokio::test]
async fn a_bad_network_to_redis_costs_time_only() {
    let mut world = toy::start(toy::parts().await).await;
    faults::bad_network(&mut world, Link::ToRedis, [15, 45, 75, 105]).await;
    toy::check(&mut world).await;
}

/// Longer than a lease: jobs of workers that nobody hears are granted again, and their results are refused or adopted.
/// A worker that hears nothing says the same again and is believed once.
#[tokio::test]
async fn a_bad_network_to_the_workers_costs_time_only() {
    let mut world = toy::start(toy::parts().await).await;
    faults::bad_network(&mut world, Link::ToCoordinators, [15, 45, 75, 105]).await;
    toy::check(&mut world).await;
}

#[tokio::test]
async fn a_full_redis_takes_nothing_new_and_brings_what_it_has_to_its_end() {
    let mut world = toy::start(toy::parts().await).await;
    world.after(20).await;
    faults::fill_redis(&mut world).await;
    toy::check(&mut world).await;
}
