//! What instances have cost since midnight, in UTC. The record lies in the object store, so that a coordinator which takes
//! over knows what was spent before it.
//!
//! It is written when instances come or go, and once a minute. What is lost with a coordinator is no more than an instance that
//! came and went within a minute: of those that are still there, the provider says since when and at what price. One
//! that ended while nobody looked counts until it is missed, which is rather too much than too little.

use std::collections::BTreeMap;

use bytes::Bytes;
use espalier_core::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::provider::Instance;

/// The version of the record.
const VERSION: u32 = 1;
const DAY_US: u64 = 86_400_000_000;
const HOUR_US: f64 = 3_600e6;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    version: u32,
    /// By the provider's id. Those that ended before the day are left out.
    instances: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    /// $.
    price_per_hour: f64,
    from_us: Timestamp,
    until_us: Timestamp,
    /// It is there.
    open: bool,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            version: VERSION,
            instances: BTreeMap::new(),
        }
    }
}

impl Ledger {
    /// The record as it is stored. None: it is of another version, or damaged.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let ledger: Self = serde_json::from_slice(bytes).ok()?;
        (ledger.version == VERSION).then_some(ledger)
    }

    /// As it is stored.
    pub fn encode(&self) -> Bytes {
        // Plain text and numbers are always written.
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// Takes in what the provider has now. True: an instance has come or gone.
    pub fn see(&mut self, instances: &[Instance], now: Timestamp) -> bool {
        let mut changed = false;
        for (id, entry) in &mut self.instances {
            if entry.open && !instances.iter().any(|i| i.id == *id) {
                entry.until_us = now;
                entry.open = false;
                changed = true;
            }
        }
        for instance in instances {
            let entry = self.instances.entry(instance.id.clone());
            let entry = entry.or_insert_with(|| {
                changed = true;
                Entry {
                    price_per_hour: 0.0,
                    from_us: instance.created_at.min(now),
                    until_us: now,
                    open: true,
                }
            });
            // One that was missed for a moment has cost all the time.
            entry.open = true;
            entry.until_us = now;
            entry.price_per_hour = entry.price_per_hour.max(instance.price_per_hour);
        }
        let midnight = midnight(now);
        self.instances
            .retain(|_, entry| entry.open || entry.until_us > midnight);
        changed
    }

    /// What was spent between midnight and `now`, in $.
    pub fn spent_today(&self, now: Timestamp) -> f64 {
        let midnight = midnight(now);
        let entries = self.instances.values();
        let spent = entries.map(|entry| {
            let until = if entry.open { now } else { entry.until_us };
            let lasted = until.since(entry.from_us.max(midnight));
            entry.price_per_hour * lasted.as_micros() as f64 / HOUR_US
        });
        spent.sum()
    }
}

fn midnight(now: Timestamp) -> Timestamp {
    Timestamp(now.0 - now.0 % DAY_US)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaler::provider::InstanceState;
    use std::time::Duration;

    const MIDNIGHT: Timestamp = Timestamp(20_000 * DAY_US);
    const HOUR: Duration = Duration::from_secs(3_600);

    fn instance(id: &str, created_at: Timestamp, price_per_hour: f64) -> Instance {
        Instance {
            id: id.to_owned(),
            pool: "a".to_owned(),
            name: format!("x-a-{id}"),
            state: InstanceState::Running,
            created_at,
            price_per_hour,
        }
    }

    #[test]
    fn what_ran_today_counts_from_midnight_or_its_beginning_to_its_end() {
        let mut ledger = Ledger::default();
        let old = instance("old", Timestamp(MIDNIGHT.0 - DAY_US), 1.0);
        let young = instance("young", MIDNIGHT + HOUR, 2.0);
        assert!(ledger.see(&[old.clone(), young.clone()], MIDNIGHT + 2 * HOUR));
        assert!((ledger.spent_today(MIDNIGHT + 2 * HOUR) - 4.0).abs() < 1e-6);
        assert!(!ledger.see(&[old.clone(), young], MIDNIGHT + 3 * HOUR));
        assert!(ledger.see(std::slice::from_ref(&old), MIDNIGHT + 4 * HOUR));
        let spent = 5.0 + 2.0 * 3.0;
        assert!((ledger.spent_today(MIDNIGHT + 5 * HOUR) - spent).abs() < 1e-6);
        // The next day.
        assert!(!ledger.see(&[old], MIDNIGHT + 25 * HOUR));
        assert!((ledger.spent_today(MIDNIGHT + 25 * HOUR) - 1.0).abs() < 1e-6);
        assert_eq!(
            ledger.instances.len(),
            1,
            "what ended yesterday is forgotten"
        );
    }

    #[test]
    fn another_coordinator_goes_on_from_the_record_and_from_what_runs() {
        let mut ledger = Ledger::default();
        let gone = instance("gone", MIDNIGHT, 1.0);
        let there = instance("there", MIDNIGHT, 3.0);
        ledger.see(&[gone, there.clone()], MIDNIGHT + HOUR);
        let mut other = Ledger::parse(&ledger.encode()).unwrap();
        assert_eq!(other, ledger);
        let unseen = instance("unseen", MIDNIGHT + HOUR, 5.0);
        other.see(&[there, unseen], MIDNIGHT + 2 * HOUR);
        let spent = 2.0 + 6.0 + 5.0;
        assert!((other.spent_today(MIDNIGHT + 2 * HOUR) - spent).abs() < 1e-6);
    }

    #[test]
    fn the_record_reads_as_it_was_written_and_no_other_version_does() {
        let golden = r#"{"version":1,"instances":{"pod1":{"price_per_hour":0.25,"from_us":7,"until_us":9,"open":true}}}"#;
        let ledger = Ledger::parse(golden.as_bytes()).unwrap();
        assert_eq!(ledger.encode(), golden.as_bytes());
        assert_eq!(Ledger::parse(golden.replace(":1,", ":2,").as_bytes()), None);
        assert_eq!(Ledger::parse(b"{"), None);
    }
}
