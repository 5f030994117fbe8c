//! Lanes: the distinct pairs of kind and needs among the jobs. A worker may draw from every lane of a kind whose
//! needs it offers. Many jobs share few lanes, so that a job holds a number instead of a set of tags.

use std::collections::{BTreeMap, BTreeSet};

use super::JobKind;

/// One lane.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lane {
    pub kind: JobKind,
    pub needs: BTreeSet<String>,
}

/// The lanes in use. A lane goes when its last job goes, and its number is used again.
#[derive(Clone, Debug, Default)]
pub(super) struct Lanes {
    by_value: BTreeMap<Lane, u32>,
    slots: Vec<Option<(Lane, u64)>>,
    free: Vec<u32>,
}

impl Lanes {
    /// Lanes in use.
    pub fn len(&self) -> usize {
        self.by_value.len()
    }

    /// Whether `lane` is in use.
    pub fn contains(&self, lane: &Lane) -> bool {
        self.by_value.contains_key(lane)
    }

    /// The number of `lane`, with one more job in it.
    pub fn enter(&mut self, lane: Lane) -> u32 {
        if let Some(&ix) = self.by_value.get(&lane) {
            if let Some((_, jobs)) = &mut self.slots[ix as usize] {
                *jobs += 1;
            }
            return ix;
        }
        let slot = Some((lane.clone(), 1));
        let ix = match self.free.pop() {
            Some(ix) => {
                self.slots[ix as usize] = slot;
                ix
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.by_value.insert(lane, ix);
        ix
    }

    /// One job fewer in lane `ix`.
    pub fn leave(&mut self, ix: u32) {
        let slot = &mut self.slots[ix as usize];
        let Some((_, jobs)) = slot else { return };
        *jobs -= 1;
        if *jobs > 0 {
            return;
        }
        if let Some((lane, _)) = slot.take() {
            self.by_value.remove(&lane);
            self.free.push(ix);
        }
    }

    /// The needs of lane `ix`.
    pub fn needs(&self, ix: u32) -> Option<&BTreeSet<String>> {
        let slot = self.slots.get(ix as usize)?;
        slot.as_ref().map(|(lane, _)| &lane.needs)
    }

    /// The lanes of `kind` that a worker which offers `offers` may draw from.
    pub fn open_to(&self, kind: JobKind, offers: &BTreeSet<String>) -> Vec<u32> {
        let first = Lane {
            kind,
            needs: BTreeSet::new(),
        };
        self.by_value
            .range(first..)
            .take_while(|(lane, _)| lane.kind == kind)
            .filter(|(lane, _)| lane.needs.is_subset(offers))
            .map(|(_, ix)| *ix)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(kind: JobKind, needs: &[&str]) -> Lane {
        let needs = needs.iter().map(|tag| (*tag).to_owned()).collect();
        Lane { kind, needs }
    }

    #[test]
    fn a_worker_draws_from_lanes_whose_needs_it_offers() {
        let mut lanes = Lanes::default();
        let plain = lanes.enter(lane(JobKind::Rollout, &[]));
        let browser = lanes.enter(lane(JobKind::Rollout, &["mcp:browser"]));
        let both = lanes.enter(lane(JobKind::Rollout, &["gpu", "mcp:browser"]));
        lanes.enter(lane(JobKind::Generate, &[]));
        let offers = |tags: &[&str]| lane(JobKind::Rollout, tags).needs;
        let open = |tags: &[&str]| lanes.open_to(JobKind::Rollout, &offers(tags));
        assert_eq!(open(&[]), [plain]);
        assert_eq!(open(&["mcp:browser"]), [plain, browser]);
        let mut all = open(&["gpu", "mcp:browser", "x"]);
        all.sort_unstable();
        assert_eq!(all, [plain, browser, both]);
    }

    #[test]
    fn a_lane_without_jobs_is_forgotten() {
        let mut lanes = Lanes::default();
        let first = lanes.enter(lane(JobKind::Rollout, &["a"]));
        lanes.enter(lane(JobKind::Rollout, &["a"]));
        lanes.leave(first);
        assert!(lanes.needs(first).is_some());
        lanes.leave(first);
        assert!(lanes.needs(first).is_none());
        assert_eq!(lanes.enter(lane(JobKind::Train, &[])), first);
    }
}
