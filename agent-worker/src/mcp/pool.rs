//! Which shared server a rollout gets, and when a server ends. `Slots` decides, purely; `host` starts and stops.

use std::collections::HashMap;
use std::hash::Hash;

/// Names one server of a pool.
pub(super) type SlotId = u64;

/// The servers of one host, by what they share.
#[derive(Debug)]
pub(super) struct Slots<K> {
    next_id: SlotId,
    by_key: HashMap<K, Vec<Slot>>,
}

#[derive(Debug)]
struct Slot {
    id: SlotId,
    /// Rollouts on it now.
    active: u32,
    /// Rollouts that it has begun.
    served: u32,
    /// No further rollouts: it leaves with its last one.
    retired: bool,
}

/// What has to happen to a server after a rollout left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Others are on it.
    Keep,
    /// Nobody is on it: stop it if this is so after a while and it has still served this many.
    Rest {
        /// Rollouts that it has begun.
        served: u32,
    },
    /// It is off the list: stop it.
    Stop,
}

impl<K: Eq + Hash + Clone> Slots<K> {
    /// No servers.
    pub(super) fn new() -> Self {
        Self {
            next_id: 0,
            by_key: HashMap::new(),
        }
    }

    /// A place for a rollout: on the first server with room, else on a new one.
    pub(super) fn take(&mut self, key: &K, contexts_max: u32, recycle_after: u32) -> SlotId {
        let slots = self.by_key.entry(key.clone()).or_default();
        let has_room = |slot: &&mut Slot| !slot.retired && slot.active < contexts_max;
        match slots.iter_mut().find(has_room) {
            Some(slot) => {
                slot.active += 1;
                slot.served += 1;
                slot.retired = slot.served >= recycle_after;
                slot.id
            }
            None => {
                self.next_id += 1;
                slots.push(Slot {
                    id: self.next_id,
                    active: 1,
                    served: 1,
                    retired: recycle_after <= 1,
                });
                self.next_id
            }
        }
    }

    /// A rollout left. `doubted`: it saw the server fail, so no other may join.
    pub(super) fn put_back(&mut self, key: &K, id: SlotId, doubted: bool) -> Then {
        let Some(slot) = self.slot(key, id) else {
            return Then::Keep;
        };
        slot.active = slot.active.saturating_sub(1);
        slot.retired |= doubted;
        match (slot.active, slot.retired) {
            (1.., _) => Then::Keep,
            (0, false) => Then::Rest {
                served: slot.served,
            },
            (0, true) => {
                self.remove(key, id);
                Then::Stop
            }
        }
    }

    /// No further rollouts on this server.
    pub(super) fn retire(&mut self, key: &K, id: SlotId) {
        if let Some(slot) = self.slot(key, id) {
            slot.retired = true;
        }
    }

    /// The rest that began at `served` is over. `true`: the server is off the list, stop it.
    pub(super) fn rested(&mut self, key: &K, id: SlotId, served: u32) -> bool {
        let over = self
            .slot(key, id)
            .is_some_and(|slot| slot.active == 0 && slot.served == served);
        if over {
            self.remove(key, id);
        }
        over
    }

    fn slot(&mut self, key: &K, id: SlotId) -> Option<&mut Slot> {
        self.by_key
            .get_mut(key)?
            .iter_mut()
            .find(|slot| slot.id == id)
    }

    fn remove(&mut self, key: &K, id: SlotId) {
        if let Some(slots) = self.by_key.get_mut(key) {
            slots.retain(|slot| slot.id != id);
            if slots.is_empty() {
                self.by_key.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_fill_up_and_projects_do_not_mix() {
        let mut slots = Slots::new();
        let ids: Vec<_> = (0..5).map(|_| slots.take(&"a", 2, 100)).collect();
        assert_eq!(ids, [1, 1, 2, 2, 3]);
        assert_eq!(slots.take(&"b", 2, 100), 4);
        assert_eq!(slots.put_back(&"a", 1, false), Then::Keep);
        assert_eq!(slots.take(&"a", 2, 100), 1);
    }

    #[test]
    fn a_server_leaves_after_its_share_of_rollouts() {
        let mut slots = Slots::new();
        assert_eq!([slots.take(&"a", 8, 2), slots.take(&"a", 8, 2)], [1, 1]);
        assert_eq!(slots.take(&"a", 8, 2), 2);
        assert_eq!(slots.put_back(&"a", 1, false), Then::Keep);
        assert_eq!(slots.put_back(&"a", 1, false), Then::Stop);
        assert_eq!(slots.put_back(&"a", 2, false), Then::Rest { served: 1 });
    }

    #[test]
    fn a_doubted_server_gets_no_further_rollouts() {
        let mut slots = Slots::new();
        assert_eq!([slots.take(&"a", 8, 100), slots.take(&"a", 8, 100)], [1, 1]);
        assert_eq!(slots.put_back(&"a", 1, true), Then::Keep);
        assert_eq!(slots.take(&"a", 8, 100), 2);
        assert_eq!(slots.put_back(&"a", 1, false), Then::Stop);
        slots.retire(&"a", 2);
        assert_eq!(slots.put_back(&"a", 2, false), Then::Stop);
        assert!(slots.by_key.is_empty());
    }

    #[test]
    fn a_rest_ends_only_if_nobody_came() {
        let mut slots = Slots::new();
        slots.take(&"a", 8, 100);
        assert_eq!(slots.put_back(&"a", 1, false), Then::Rest { served: 1 });
        assert_eq!(slots.take(&"a", 8, 100), 1);
        assert!(!slots.rested(&"a", 1, 1), "somebody is on it");
        assert_eq!(slots.put_back(&"a", 1, false), Then::Rest { served: 2 });
        assert!(!slots.rested(&"a", 1, 1), "that rest was interrupted");
        assert!(slots.rested(&"a", 1, 2));
        assert_eq!(slots.take(&"a", 8, 100), 2);
    }
}
