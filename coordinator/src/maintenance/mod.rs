//! What a coordinator does by itself: follow the queue's events, end what has run out, measure, count what it costs, forget what is
//! old, give the queue again what it lost, and tell others what it has, where models are and how it is. One file a task; each is idempotent, so that any number of coordinators may run them.

mod costs;
mod endpoints;
mod events;
mod gauges;
mod journal;
mod peers;
mod readiness;
mod rescuer;
mod retention;

use std::sync::Arc;

use espalier_runtime::tasks::OnFailure;
use tonic_health::server::HealthReporter;

use crate::api::Shared;

pub use readiness::report;

/// Starts every task. They end when the process aborts, so that a drain is still looked after.
pub fn start(shared: &Arc<Shared>, health: HealthReporter) {
    let tasks = &shared.tasks;
    // Without these two, jobs are not granted in time and leases do not end: the process is of no use.
    tasks.spawn(
        "maintenance.events",
        OnFailure::ShutDown,
        events::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.rescuer",
        OnFailure::ShutDown,
        rescuer::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.gauges",
        OnFailure::Log,
        gauges::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.costs",
        OnFailure::Log,
        costs::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.retention",
        OnFailure::Log,
        retention::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.journal",
        OnFailure::Log,
        journal::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.peers",
        OnFailure::ShutDown,
        peers::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.endpoints",
        OnFailure::ShutDown,
        endpoints::run(Arc::clone(shared)),
    );
    tasks.spawn(
        "maintenance.readiness",
        OnFailure::ShutDown,
        readiness::run(Arc::clone(shared), health),
    );
}
