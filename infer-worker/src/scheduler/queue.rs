//! Who is next of those that wait.

use std::collections::BTreeSet;

use super::{Priority, RequestId};

/// So many online requests may be admitted while a batch request waits; then the oldest batch request ranks as an
/// online one, by its arrival. Under any load at least one of 17 requests that are admitted is a batch request.
pub const ONLINE_PER_BATCH: u32 = 16;

/// Where a request stands: online before batch, then in the order of arrival. The least is served first and preempted
/// last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// The class that it is served in.
    pub class: Priority,
    /// When it arrived.
    pub id: RequestId,
}

/// The requests that wait for a place.
#[derive(Debug, Default)]
pub struct Waiting {
    ranks: BTreeSet<Rank>,
    online_since_batch: u32,
}

impl Waiting {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Waits from now on.
    pub fn insert(&mut self, rank: Rank) {
        self.ranks.insert(rank);
    }

    /// Waits no more, without having been admitted. False if it did not wait.
    pub fn remove(&mut self, rank: Rank) -> bool {
        self.ranks.remove(&rank)
    }

    /// The first one after `after`.
    pub fn next(&self, after: Option<Rank>) -> Option<Rank> {
        use std::ops::Bound::{Excluded, Unbounded};
        match after {
            None => self.ranks.first().copied(),
            Some(after) => self
                .ranks
                .range((Excluded(after), Unbounded))
                .next()
                .copied(),
        }
    }

    /// Takes one out because it was admitted.
    pub fn admit(&mut self, rank: Rank) {
        self.ranks.remove(&rank);
        match (rank.class, self.first_batch()) {
            (Priority::Online, Some(_)) => self.online_since_batch += 1,
            _ => self.online_since_batch = 0,
        }
    }

    /// The batch request whose turn has come: it waits as an online one from now on.
    pub fn promote(&mut self) -> Option<RequestId> {
        if self.online_since_batch < ONLINE_PER_BATCH {
            return None;
        }
        self.online_since_batch = 0;
        let rank = self.first_batch()?;
        self.ranks.remove(&rank);
        self.ranks.insert(Rank {
            class: Priority::Online,
            ..rank
        });
        Some(rank.id)
    }

    fn first_batch(&self) -> Option<Rank> {
        let first = Rank {
            class: Priority::Batch,
            id: RequestId(0),
        };
        self.ranks.range(first..).next().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(class: Priority, id: u64) -> Rank {
        let id = RequestId(id);
        Rank { class, id }
    }

    #[test]
    fn online_goes_first_and_batch_gets_its_turn() {
        let mut waiting = Waiting::default();
        waiting.insert(rank(Priority::Batch, 0));
        waiting.insert(rank(Priority::Batch, 1));
        for id in 2..100 {
            waiting.insert(rank(Priority::Online, id));
        }
        let mut admitted = vec![];
        for _ in 0..40 {
            waiting.promote();
            let next = waiting.next(None).unwrap();
            waiting.admit(next);
            admitted.push(next.id.0);
        }
        let batch: Vec<usize> = (0..admitted.len()).filter(|i| admitted[*i] < 2).collect();
        assert_eq!(batch, [16, 32]);
        assert_eq!(admitted[..3], [2, 3, 4]);
    }

    #[test]
    fn a_turn_is_counted_from_when_a_batch_request_waits() {
        let mut waiting = Waiting::default();
        for id in 0..50 {
            waiting.insert(rank(Priority::Online, id));
        }
        for id in 0..30 {
            waiting.admit(rank(Priority::Online, id));
        }
        waiting.insert(rank(Priority::Batch, 60));
        assert_eq!(waiting.promote(), None);
        assert_eq!(waiting.len(), 21);
    }
}
