//! Says through gRPC's health service whether this coordinator should be sent requests.
//!
//! It is not ready while the queue is away, or has no room. Workers are served while there is no room: what they bring
//! makes room. That the process lives is another question, which [`LIVENESS`] answers: to restart it would help nobody.

use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::telemetry::metrics;
use tokio::time::MissedTickBehavior;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::api::Shared;
use crate::queue::Condition;

/// The name under which the process lives, whatever it is ready for.
pub const LIVENESS: &str = "liveness";
const WORKERS: &str = "espalier.v1.WorkerService";
const OTHERS: [&str; 4] = [
    "",
    "espalier.v1.JobService",
    "espalier.v1.ModelService",
    "espalier.v1.AdminService",
];
/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Follows the queue's condition until the coordinator drains, and says then that it serves no more.
pub async fn run(shared: Arc<Shared>, health: HealthReporter) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // As it was said at the start.
    let mut reported = (true, true);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.draining() => break,
        }
        let condition = shared.queue.condition().await;
        if shared.shutdown.is_draining() {
            break;
        }
        let serves = match condition {
            Condition::Serving => (true, true),
            Condition::Full { .. } => (false, true),
            Condition::Away { .. } => (false, false),
        };
        // Whoever watches hears every report, so that one which says nothing new is not made.
        if serves != reported {
            report(&health, serves.0, serves.1).await;
            reported = serves;
        }
    }
    // A report that was under way may have come after that of the drain.
    report(&health, false, false).await;
}

/// Says who is served, and that the process lives.
pub async fn report(health: &HealthReporter, all: bool, workers: bool) {
    let status = |serves| match serves {
        true => ServingStatus::Serving,
        false => ServingStatus::NotServing,
    };
    for service in OTHERS {
        health.set_service_status(service, status(all)).await;
    }
    health.set_service_status(WORKERS, status(workers)).await;
    metrics().coordinator_ready.record(workers.into(), &[]);
    health.set_service_status(LIVENESS, status(true)).await;
}
