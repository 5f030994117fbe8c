//! What may happen to a cluster beside the death of its parts: a replica of Redis takes the primary's place, clocks are
//! wrong, and the object store goes away and crawls. 200 rollouts each time.

use espalier_tests::harness::faults;
use espalier_tests::harness::toy;
use espalier_tests::harness::world::Parts;

/// Twice: the primary is dead, and then it lives on beside the new one, which takes writes that nobody may acknowledge.
#[tokio::test]
async fn a_promoted_replica_has_everything_that_was_acknowledged() {
    let mut world = toy::start(Parts {
        replicated: true,
        ..toy::parts().await
    })
    .await;
    world.after(20).await;
    faults::fail_over(&mut world).await;
    world.after(90).await;
    faults::fail_over_beside_the_old(&mut world).await;
    toy::check(&mut world).await;
}

/// Both are paused past their leases on the way, by which everybody's clock matters most.
#[tokio::test]
async fn clocks_of_workers_that_are_wrong_by_an_hour_change_nothing() {
    let mut world = toy::start(Parts {
        clocks: [Some("+1h"), Some("-1h")],
        ..toy::parts().await
    })
    .await;
    for (number, succeeded) in [(0, 20), (1, 60)] {
        world.after(succeeded).await;
        faults::pause_worker(&mut world, number).await;
    }
    let results = toy::check(&mut world).await;
    faults::assert_wrong_clocks(&world, &results);
}

#[tokio::test]
async fn a_store_that_is_away_for_20_s_and_then_crawls_for_a_minute_costs_a_cluster_time_only() {
    let mut world = toy::start(Parts {
        far_store: true,
        // Shorter than both faults, and longer than a machine that is busy makes a renewal wait.
        lease_ms: 10_000,
        ..toy::parts().await
    })
    .await;
    world.after(20).await;
    faults::lose_store(&mut world).await;
    world.after(60).await;
    faults::slow_store(&mut world).await;
    let results = toy::check(&mut world).await;
    faults::assert_no_lease_ended(&results);
}
