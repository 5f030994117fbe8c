//! The day of a release: all processes of a cluster are replaced in good order, one after the other, and its work goes on.

use espalier_tests::harness::toy;
use espalier_tests::harness::world::{BATCH, Parts, World};

const ROLLOUTS: usize = 500;
/// Shorter than the whole, and longer than any part is away.
const LEASE_MS: u64 = 10_000;

/// Coordinators, workers, Redis and the object store. Nothing is lost and nothing fails; what was granted and had not reached its
/// worker when a coordinator ended is granted again.
#[tokio::test]
async fn everything_is_restarted_one_after_the_other_during_500_rollouts() {
    let parts = Parts {
        lease_ms: LEASE_MS,
        far_store: true,
        ..toy::parts().await
    };
    let mut world = World::start(parts).await;
    world.submit(BATCH, &toy::jobs(ROLLOUTS)).await;
    for number in [0, 1] {
        world.after([40, 110][number]).await;
        world.restart_coordinator(number).await;
        world.after([80, 150][number]).await;
        world.restart_worker(number).await;
    }
    world.after(220).await;
    world.restart_redis().await;
    world.after(290).await;
    world.restart_store().await;
    world.after(330).await;
    let results = world.end(BATCH).await;
    for result in &results {
        assert_eq!(result.jobs.len(), ROLLOUTS / 2, "a job was lost");
        assert_eq!(result.solved(), ROLLOUTS / 2, "{:#?}", result.unsolved());
        for (id, job) in &result.jobs {
            let failures = (job.handler_failures, job.infra_failures);
            assert_eq!(failures, (0, 0), "failures of {id}");
        }
    }
}
