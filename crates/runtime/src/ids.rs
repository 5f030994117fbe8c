//! New identifiers: time-ordered UUIDs in production, countable names in tests.
//!
//! What comes out always satisfies the rule of names in `espalier_core::id`, so it may stand in a path.

use std::sync::atomic::{AtomicU64, Ordering};

/// Where new identifiers come from.
pub trait IdSource: Send + Sync {
    /// A name that nobody else was given.
    fn fresh(&self) -> String;
}

/// UUID version 7: unique without coordination, and sorted by the time they were made.
#[derive(Clone, Copy, Debug, Default)]
pub struct UuidIds;

impl IdSource for UuidIds {
    fn fresh(&self) -> String {
        uuid::Uuid::now_v7().to_string()
    }
}

/// `{prefix}-000001`, `{prefix}-000002`, …: ids that a test can predict.
#[derive(Debug)]
pub struct SequentialIds {
    prefix: &'static str,
    last: AtomicU64,
}

impl SequentialIds {
    /// Counts from 1.
    pub fn new(prefix: &'static str) -> Self {
        Self {
            prefix,
            last: AtomicU64::new(0),
        }
    }
}

impl IdSource for SequentialIds {
    fn fresh(&self) -> String {
        let n = self.last.fetch_add(1, Ordering::SeqCst) + 1;
        format!("{}-{n:06}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::id::BatchId;

    #[test]
    fn ids_are_names_and_sort_by_age() {
        let ids: Vec<String> = (0..1000).map(|_| UuidIds.fresh()).collect();
        assert!(ids.is_sorted_by(|a, b| a < b));
        assert!(ids.iter().all(|id| BatchId::new(id).is_ok()));
    }

    #[test]
    fn sequential_ids_count() {
        let ids = SequentialIds::new("b");
        assert_eq!([ids.fresh(), ids.fresh()], ["b-000001", "b-000002"]);
    }
}
