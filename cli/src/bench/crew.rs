//! Workers that do nothing, and what they saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use espalier_runtime::tasks::{OnFailure, Tasks};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ledger::Ledger;
use super::worker::{Orders, work};
use crate::client::Target;

/// Workers with one ledger, at any number of coordinators.
pub struct Crew {
    /// What they saw.
    pub ledger: Arc<Ledger>,
    leave: CancellationToken,
    hired: AtomicU32,
}

impl Crew {
    /// Nobody yet, for `jobs` jobs.
    pub fn of(jobs: usize) -> Self {
        Self {
            ledger: Arc::new(Ledger::new(jobs)),
            leave: CancellationToken::new(),
            hired: AtomicU32::new(0),
        }
    }

    /// Starts workers at one coordinator. `granted` gets the moments of grants.
    pub fn hire(
        &self,
        tasks: &Tasks,
        target: &Target,
        workers: u32,
        credit: u32,
        granted: Option<&mpsc::Sender<Instant>>,
    ) {
        for _ in 0..workers {
            let orders = Orders {
                name: format!("idle-{}", self.hired.fetch_add(1, Ordering::Relaxed)),
                credit,
                ledger: Arc::clone(&self.ledger),
                granted: granted.cloned(),
                leave: self.leave.clone(),
            };
            let working = Box::pin(work(target.clone(), orders));
            tasks.spawn("bench.worker", OnFailure::ShutDown, working);
        }
    }

    /// Lets all of them go.
    pub fn leave(&self) {
        self.leave.cancel();
    }
}
