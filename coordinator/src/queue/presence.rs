//! What coordinators show each other, in memory: all that the embedded queue needs, whose only coordinator is this
//! process, and what the scripts of Redis do in the server.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use espalier_core::id::CoordinatorId;
use espalier_core::time::Timestamp;

use super::{Change, PRESENCE_TTL, Shown, Table};

/// Who is here, and what they show.
#[derive(Debug, Default)]
pub struct Presence(Mutex<BTreeMap<CoordinatorId, Here>>);

#[derive(Debug)]
struct Here {
    last: Timestamp,
    entries: BTreeMap<(Table, String), Bytes>,
}

impl Presence {
    /// As [`super::Queue::announce`], of changes that were checked.
    pub fn announce(&self, by: CoordinatorId, changes: Vec<Change>, now: Timestamp) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, here| here.last + PRESENCE_TTL > now);
        let was_here = all.contains_key(&by);
        let here = all.entry(by).or_insert_with(|| Here {
            last: now,
            entries: BTreeMap::new(),
        });
        here.last = now;
        for Change { table, key, value } in changes {
            match value {
                Some(value) => here.entries.insert((table, key), value),
                None => here.entries.remove(&(table, key)),
            };
        }
        was_here
    }

    /// As [`super::Queue::shown`].
    pub fn shown(&self, table: Table, now: Timestamp) -> Vec<Shown> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let present = all
            .iter()
            .filter(|(_, here)| here.last + PRESENCE_TTL > now);
        let shown = present.flat_map(|(by, here)| {
            let of_table = here.entries.iter().filter(|((of, _), _)| *of == table);
            of_table.map(|((_, key), value)| Shown {
                by: by.clone(),
                key: key.clone(),
                value: value.clone(),
            })
        });
        shown.collect()
    }
}
