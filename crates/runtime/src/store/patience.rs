//! How those wait for a store that is away who cannot go on without it: as long as they have their lease or the
//! deadline that they set themselves. The tries within one operation are over by then.

use std::time::Duration;

use espalier_core::id::JobKey;

use super::{StoreError, StoreErrorKind};
use crate::backoff::Backoff;
use crate::telemetry;

/// Waits between tries while the store is away. The longest is what a result is late by when the store comes back, and
/// short against a lease.
pub const AWAY_BACKOFF: Backoff = Backoff {
    first: Duration::from_secs(1),
    max: Duration::from_secs(10),
};

impl StoreErrorKind {
    /// Whether the store may take or give the same later, without a person's doing. Missing rights may come back too,
    /// but only when somebody acts, which may be days.
    pub fn may_come_back(self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Full => true,
            Self::Denied | Self::NotFound | Self::Invalid => false,
        }
    }
}

/// A wait of one job for the store.
#[derive(Debug)]
pub struct Patience<'a> {
    job: &'a JobKey,
    what: &'static str,
    failures: u32,
}

impl<'a> Patience<'a> {
    /// A wait of `job` for `what`.
    pub fn new(job: &'a JobKey, what: &'static str) -> Self {
        Self {
            job,
            what,
            failures: 0,
        }
    }

    /// Waits a while and says whether to try again; at once, where `error` will not pass.
    pub async fn after(&mut self, error: &StoreError) -> bool {
        if !error.kind.may_come_back() {
            return false;
        }
        self.failures += 1;
        tracing::warn!(
            job = %self.job,
            what = self.what,
            failures = self.failures,
            error = telemetry::error_chain(error),
            "waits for the store"
        );
        tokio::time::sleep(AWAY_BACKOFF.jittered(self.failures)).await;
        true
    }
}
