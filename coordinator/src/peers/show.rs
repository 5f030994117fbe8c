//! Showing others what this process has: what it should be, what was announced, and the difference, page by page.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::time::Timestamp;
use prost::Message;
use tokio::time::Instant;

use super::Peers;
use super::order::Order;
use crate::api::Shared;
use crate::queue::{ANNOUNCE_MAX, Change, QueueError, Table};
use crate::scaler;

/// How often it is said that this process is here, at least: a third of the time after which it is forgotten.
const INTERVAL: Duration = Duration::from_secs(5);
/// Bytes after which a page ends, so that none holds the queue for long.
const PAGE_BYTES: usize = 1 << 20;

/// Entries by list and key.
pub type Entries = BTreeMap<(Table, String), Bytes>;

/// What was announced. An entry without a value may be there or not: it has to be announced again.
#[derive(Debug, Default)]
pub(super) struct Shown {
    entries: BTreeMap<(Table, String), Option<Bytes>>,
    last: Option<Instant>,
}

impl Shown {
    /// A page of what has to be announced so that others see `wanted`; empty: they do.
    fn page(&self, wanted: &Entries) -> Vec<Change> {
        let gone = self.entries.keys().filter(|key| !wanted.contains_key(*key));
        let gone = gone.map(|(table, key)| Change {
            table: *table,
            key: key.clone(),
            value: None,
        });
        let differs = |(key, value): &(&(Table, String), &Bytes)| {
            self.entries.get(*key).and_then(Option::as_ref) != Some(*value)
        };
        let new = wanted.iter().filter(differs);
        let new = new.map(|((table, key), value)| Change {
            table: *table,
            key: key.clone(),
            value: Some(value.clone()),
        });
        let mut bytes = 0;
        let fits = |change: &Change| {
            let fits = bytes < PAGE_BYTES;
            bytes += change.key.len() + change.value.as_ref().map_or(0, Bytes::len);
            fits
        };
        gone.chain(new)
            .take(ANNOUNCE_MAX)
            .take_while(fits)
            .collect()
    }

    fn take(&mut self, changes: Vec<Change>) {
        for Change { table, key, value } in changes {
            match value {
                Some(value) => self.entries.insert((table, key), Some(value)),
                None => self.entries.remove(&(table, key)),
            };
        }
    }
}

impl Peers {
    /// Lets the others see `wanted`, and that this process is here.
    pub async fn show(&self, wanted: &Entries) -> Result<(), QueueError> {
        let mut shown = self.shown.lock().await;
        let mut said = shown.last.is_some_and(|last| last.elapsed() < INTERVAL);
        loop {
            let page = shown.page(wanted);
            if page.is_empty() && said {
                return Ok(());
            }
            self.announce(&mut shown, page).await?;
            said = true;
        }
    }

    /// Lets the others see an order, at once.
    pub(super) async fn show_order(&self, order: &Order) -> Result<(), QueueError> {
        let change = Change {
            table: Table::Orders,
            key: order.key(),
            value: Some(order.encode()),
        };
        let mut shown = self.shown.lock().await;
        self.announce(&mut shown, vec![change]).await
    }

    async fn announce(&self, shown: &mut Shown, page: Vec<Change>) -> Result<(), QueueError> {
        let announced = self.queue.announce(self.me.clone(), page.clone());
        if !announced.await? {
            shown.entries.clear();
        }
        shown.take(page);
        shown.last = Some(Instant::now());
        Ok(())
    }

    /// The queue may have lost what was shown: all of it is announced again.
    pub async fn show_again(&self) {
        let mut shown = self.shown.lock().await;
        shown.entries.values_mut().for_each(|value| *value = None);
        shown.last = None;
    }
}

/// All that this process has to show.
pub fn wanted(shared: &Shared, now: Timestamp) -> Entries {
    let mut entries = Entries::new();
    for worker in shared.registry.list() {
        let value = worker.encode_to_vec().into();
        entries.insert((Table::Workers, worker.worker), value);
    }
    for server in shared.registry.mcp_servers() {
        entries.insert((Table::Servers, server), Bytes::new());
    }
    for (id, question) in shared.questions.all(now) {
        // A question is plain text and numbers, which are always written.
        if let Ok(value) = serde_json::to_vec(&question) {
            entries.insert((Table::Questions, id), value.into());
        }
    }
    // Whoever is about to end leaves providers to others.
    if !shared.shutdown.is_draining() {
        let scaler = shared.config.scaler.iter();
        for provider in scaler.flat_map(scaler::keys) {
            entries.insert((Table::Scalers, provider.to_owned()), Bytes::new());
        }
    }
    let drained = shared.registry.drained().into_iter();
    let drained = drained.map(|worker| Order::Drain { worker });
    let answers = shared.questions.answered_here(now).into_iter();
    for order in drained.chain(answers.map(Order::Answer)) {
        entries.insert((Table::Orders, order.key()), order.encode());
    }
    entries
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use espalier_core::id::CoordinatorId;
    use espalier_runtime::clock::{Clock, ManualClock};

    use super::*;
    use crate::queue::{Embedded, EmbeddedConfig, PRESENCE_TTL, Queue};

    fn entries(entries: &[(&str, &str)]) -> Entries {
        let entry = |(key, value): &(&str, &str)| {
            let value = Bytes::from((*value).to_owned());
            ((Table::Workers, (*key).to_owned()), value)
        };
        entries.iter().map(entry).collect()
    }

    struct World {
        _folder: tempfile::TempDir,
        clock: Arc<ManualClock>,
        queue: Arc<dyn Queue>,
        peers: Peers,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let clock = Arc::new(ManualClock::new(Timestamp::from_ms(1_700_000_000_000)));
            let config = EmbeddedConfig::new(
                folder.path().join("queue.redb"),
                Arc::clone(&clock) as Arc<dyn Clock>,
            );
            let queue: Arc<dyn Queue> = Arc::new(Embedded::open(config).unwrap());
            let me = CoordinatorId::new("me").unwrap();
            Self {
                _folder: folder,
                clock,
                peers: Peers::new(me, Arc::clone(&queue)),
                queue,
            }
        }

        async fn keys(&self) -> Vec<String> {
            let shown = self.queue.shown(Table::Workers).await.unwrap();
            shown.into_iter().map(|shown| shown.key).collect()
        }
    }

    #[tokio::test]
    async fn others_see_what_there_is_and_no_more() {
        let world = World::new();
        let many: Vec<String> = (0..2_500).map(|n| format!("w{n:04}")).collect();
        let wanted: Entries = many
            .iter()
            .map(|w| ((Table::Workers, w.clone()), Bytes::new()))
            .collect();
        world.peers.show(&wanted).await.unwrap();
        assert_eq!(world.keys().await, many, "in several pages");
        world.peers.show(&entries(&[("b", "1")])).await.unwrap();
        assert_eq!(world.keys().await, ["b"]);
    }

    #[tokio::test]
    async fn who_was_forgotten_shows_everything_again() {
        let world = World::new();
        let first = entries(&[("a", "1"), ("b", "1")]);
        world.peers.show(&first).await.unwrap();
        world.clock.advance(PRESENCE_TTL);
        assert!(world.keys().await.is_empty());
        let changed = entries(&[("a", "1"), ("b", "2")]);
        world.peers.show(&changed).await.unwrap();
        assert_eq!(world.keys().await, ["a", "b"]);
    }

    #[test]
    fn what_may_be_lost_is_announced_again_or_taken_away() {
        let mut shown = Shown::default();
        let wanted = entries(&[("a", "1"), ("b", "1")]);
        shown.take(shown.page(&wanted));
        assert!(shown.page(&wanted).is_empty());
        shown.entries.values_mut().for_each(|value| *value = None);
        let page = shown.page(&entries(&[("a", "1")]));
        let keys: Vec<_> = page
            .iter()
            .map(|c| (c.key.as_str(), c.value.is_some()))
            .collect();
        assert_eq!(keys, [("b", false), ("a", true)]);
    }

    #[test]
    fn a_page_is_bounded_by_bytes_too() {
        let large = "x".repeat(100 << 10);
        let wanted: Vec<(String, &str)> =
            (0..100).map(|n| (n.to_string(), large.as_str())).collect();
        let wanted: Vec<(&str, &str)> = wanted.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        let page = Shown::default().page(&entries(&wanted));
        assert_eq!(page.len(), 11, "it ends with the entry that fills it");
    }
}
