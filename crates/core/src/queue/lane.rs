//! Lanes: the distinct pairs of kind and needs among the jobs. A worker may draw from every lane of a kind whose
//! needs it offers. Many jobs share few lanes, so that a job holds a number instead of a set of tags.

use std::collections::{BTreeMap, BTreeSet};

use super::{JobKind, ProjectSeq};

/// One lane.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lane {
    pub kind: JobKind,
    pub needs: BTreeSet<String>,
}

/// A lane in use: its value, and how many jobs each project has in it.
type Slot = (Lane, BTreeMap<ProjectSeq, u64>);

/// The lanes in use. A lane goes when its last job goes, and its number is used again.
#[derive(Clone, Debug, Default)]
pub(super) struct Lanes {
    by_value: BTreeMap<Lane, u32>,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// How many lanes with needs each project has jobs in.
    with_needs: BTreeMap<ProjectSeq, usize>,
}

impl Lanes {
    /// Lanes in use.
    pub fn len(&self) -> usize {
        self.by_value.len()
    }

    /// Lanes with needs in which `project` has jobs.
    pub fn with_needs(&self, project: ProjectSeq) -> usize {
        self.with_needs.get(&project).copied().unwrap_or(0)
    }

    /// Whether `lane` is in use.
    pub fn contains(&self, lane: &Lane) -> bool {
        self.by_value.contains_key(lane)
    }

    /// Whether `project` has jobs in `lane`.
    pub fn has(&self, project: ProjectSeq, lane: &Lane) -> bool {
        let slot = self.by_value.get(lane).map(|ix| &self.slots[*ix as usize]);
        matches!(slot, Some(Some((_, jobs))) if jobs.contains_key(&project))
    }

    /// The number of `lane`, with one more job of `project` in it.
    pub fn enter(&mut self, lane: Lane, project: ProjectSeq) -> u32 {
        let has_needs = !lane.needs.is_empty();
        let ix = match self.by_value.get(&lane) {
            Some(ix) => *ix,
            None => self.add(lane),
        };
        if let Some((_, jobs)) = &mut self.slots[ix as usize] {
            let of_project = jobs.entry(project).or_insert(0);
            *of_project += 1;
            if *of_project == 1 && has_needs {
                *self.with_needs.entry(project).or_insert(0) += 1;
            }
        }
        ix
    }

    fn add(&mut self, lane: Lane) -> u32 {
        let slot = Some((lane.clone(), BTreeMap::new()));
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

    /// One job of `project` fewer in lane `ix`.
    pub fn leave(&mut self, ix: u32, project: ProjectSeq) {
        let slot = &mut self.slots[ix as usize];
        let Some((lane, jobs)) = slot else { return };
        let Some(of_project) = jobs.get_mut(&project) else {
            return;
        };
        *of_project -= 1;
        if *of_project > 0 {
            return;
        }
        jobs.remove(&project);
        if !lane.needs.is_empty()
            && let Some(lanes) = self.with_needs.get_mut(&project)
        {
            *lanes -= 1;
            if *lanes == 0 {
                self.with_needs.remove(&project);
            }
        }
        if jobs.is_empty()
            && let Some((lane, _)) = slot.take()
        {
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

    const A: ProjectSeq = ProjectSeq(1);
    const B: ProjectSeq = ProjectSeq(2);

    fn lane(kind: JobKind, needs: &[&str]) -> Lane {
        let needs = needs.iter().map(|tag| (*tag).to_owned()).collect();
        Lane { kind, needs }
    }

    #[test]
    fn a_worker_draws_from_lanes_whose_needs_it_offers() {
        let mut lanes = Lanes::default();
        let plain = lanes.enter(lane(JobKind::Rollout, &[]), A);
        let browser = lanes.enter(lane(JobKind::Rollout, &["mcp:browser"]), A);
        let both = lanes.enter(lane(JobKind::Rollout, &["gpu", "mcp:browser"]), A);
        lanes.enter(lane(JobKind::Generate, &[]), A);
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
        let first = lanes.enter(lane(JobKind::Rollout, &["a"]), A);
        lanes.enter(lane(JobKind::Rollout, &["a"]), A);
        lanes.leave(first, A);
        assert!(lanes.needs(first).is_some());
        lanes.leave(first, A);
        assert!(lanes.needs(first).is_none());
        assert_eq!(lanes.enter(lane(JobKind::Train, &[]), A), first);
    }

    #[test]
    fn a_project_is_counted_for_each_lane_with_needs_until_its_last_job_leaves() {
        let mut lanes = Lanes::default();
        lanes.enter(lane(JobKind::Rollout, &[]), A);
        let shared = lanes.enter(lane(JobKind::Rollout, &["a"]), A);
        lanes.enter(lane(JobKind::Rollout, &["a"]), A);
        assert_eq!(lanes.enter(lane(JobKind::Rollout, &["a"]), B), shared);
        assert_eq!((lanes.with_needs(A), lanes.with_needs(B)), (1, 1));
        lanes.leave(shared, A);
        assert!(lanes.has(A, &lane(JobKind::Rollout, &["a"])));
        lanes.leave(shared, A);
        assert!(!lanes.has(A, &lane(JobKind::Rollout, &["a"])));
        assert_eq!((lanes.with_needs(A), lanes.with_needs(B)), (0, 1));
        assert!(lanes.needs(shared).is_some());
    }
}
