//! The order of ready jobs: stride fairness between projects, then priority within a project, then submission.
//!
//! Fairness comes first because priorities are the client's own word: were they compared between projects, the one
//! that calls all of its jobs urgent would starve the others (`docs/decisions/fairness.md`).
//!
//! One [`Level`] holds the ready jobs of one kind. Every project has a virtual time there; the project
//! with the least goes first, and a grant moves it on by a stride that is smaller the greater its weight. A project
//! that comes back after a pause enters at the virtual time of the last grant, so that a pause earns nothing.
//! (Stride scheduling: Waldspurger and Weihl 1995; the entry rule is that of start-time fair queueing, Goyal 1996.)

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{JobKind, JobSeq, PRIORITY_MAX, ProjectSeq};

/// The stride of a project of weight 1.
const STRIDE: u64 = 1 << 20;

/// Where a level's virtual times are stored: kind, and the project or, for the level's own clock, none.
pub(super) type RingKey = (JobKind, Option<ProjectSeq>);

/// The order of a project's jobs: urgent ones first, then as they were submitted.
type Turn = (Reverse<u8>, JobSeq);

/// The ready jobs of one kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Level {
    /// The virtual time of the last grant; never goes back.
    pub clock: u64,
    tenants: HashMap<ProjectSeq, Tenant>,
    /// For each lane the projects that have ready jobs in it, by virtual time.
    lanes: BTreeMap<u32, BTreeSet<(u64, ProjectSeq)>>,
}

#[derive(Clone, Debug, Default)]
struct Tenant {
    vtime: u64,
    queues: BTreeMap<u32, BTreeSet<Turn>>,
}

impl Level {
    fn push(&mut self, lane: u32, project: ProjectSeq, turn: Turn) -> bool {
        let clock = self.clock;
        let tenant = self.tenants.entry(project).or_default();
        if let Some(queue) = tenant.queues.get_mut(&lane) {
            queue.insert(turn);
            return false;
        }
        tenant.queues.insert(lane, BTreeSet::from([turn]));
        let entered = tenant.vtime.max(clock);
        let moved = entered != tenant.vtime;
        let from = std::mem::replace(&mut tenant.vtime, entered);
        self.lanes
            .entry(lane)
            .or_default()
            .insert((entered, project));
        if moved {
            self.reposition(project, from);
        }
        moved
    }

    fn remove(&mut self, lane: u32, project: ProjectSeq, turn: Turn) {
        let Some(tenant) = self.tenants.get_mut(&project) else {
            return;
        };
        let Some(queue) = tenant.queues.get_mut(&lane) else {
            return;
        };
        queue.remove(&turn);
        if !queue.is_empty() {
            return;
        }
        tenant.queues.remove(&lane);
        if let Some(ring) = self.lanes.get_mut(&lane) {
            ring.remove(&(tenant.vtime, project));
            if ring.is_empty() {
                self.lanes.remove(&lane);
            }
        }
    }

    /// Brings `project`, which stood at `from`, to its present virtual time in the order of each of its lanes.
    fn reposition(&mut self, project: ProjectSeq, from: u64) {
        let Some(tenant) = self.tenants.get(&project) else {
            return;
        };
        for lane in tenant.queues.keys() {
            if let Some(ring) = self.lanes.get_mut(lane) {
                ring.remove(&(from, project));
                ring.insert((tenant.vtime, project));
            }
        }
    }

    /// The job that goes next among `lanes`: the project with the least virtual time, then the first of its turns.
    fn next(&self, lanes: &[u32]) -> Option<(ProjectSeq, JobSeq)> {
        let heads = lanes.iter().filter_map(|lane| {
            let &(vtime, project) = self.lanes.get(lane)?.first()?;
            let turn = *self.tenants.get(&project)?.queues.get(lane)?.first()?;
            Some((vtime, project, turn))
        });
        heads.min().map(|(_, project, (_, job))| (project, job))
    }

    /// Moves `project` on by one grant. A project may lag behind the clock, where no worker drew from its lanes; it
    /// catches up by one stride at most, lest it take a long turn alone.
    fn charge(&mut self, project: ProjectSeq, weight: u32) {
        let stride = STRIDE / u64::from(weight.clamp(1, WEIGHT_MAX));
        let Some(tenant) = self.tenants.get_mut(&project) else {
            return;
        };
        let from = tenant.vtime;
        let start = from.max(self.clock.saturating_sub(stride));
        tenant.vtime = start + stride;
        self.clock = self.clock.max(start);
        self.reposition(project, from);
    }
}

/// The greatest weight of a project.
pub(super) const WEIGHT_MAX: u32 = 1_000;

/// All ready jobs.
#[derive(Clone, Debug)]
pub(super) struct Ready {
    levels: Vec<Level>,
    dirty: BTreeSet<RingKey>,
}

impl Default for Ready {
    fn default() -> Self {
        Self {
            levels: vec![Level::default(); JobKind::ALL.len()],
            dirty: BTreeSet::new(),
        }
    }
}

/// Where a ready job stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub kind: JobKind,
    pub priority: u8,
    pub lane: u32,
    pub project: ProjectSeq,
}

impl Place {
    fn turn(self, job: JobSeq) -> Turn {
        (Reverse(self.priority), job)
    }
}

impl Ready {
    pub fn push(&mut self, place: Place, job: JobSeq) {
        let level = &mut self.levels[place.kind.index()];
        if level.push(place.lane, place.project, place.turn(job)) {
            self.dirty.insert((place.kind, Some(place.project)));
        }
    }

    pub fn remove(&mut self, place: Place, job: JobSeq) {
        self.levels[place.kind.index()].remove(place.lane, place.project, place.turn(job));
    }

    /// The next job of `kind` among `lanes`. It stays where it is.
    pub fn next(&self, kind: JobKind, lanes: &[u32]) -> Option<(ProjectSeq, JobSeq)> {
        self.levels[kind.index()].next(lanes)
    }

    /// Charges a grant to `project`.
    pub fn charge(&mut self, kind: JobKind, project: ProjectSeq, weight: u32) {
        self.levels[kind.index()].charge(project, weight);
        self.dirty.insert((kind, None));
        self.dirty.insert((kind, Some(project)));
    }

    /// Forgets the virtual times of a project that has no batch any more.
    pub fn forget(&mut self, project: ProjectSeq) {
        for kind in JobKind::ALL {
            let level = &mut self.levels[kind.index()];
            if level.tenants.remove(&project).is_some() {
                self.dirty.insert((kind, Some(project)));
            }
        }
    }

    /// The stored value under `key`; none if the project is forgotten.
    pub fn vtime(&self, (kind, project): RingKey) -> Option<u64> {
        let level = &self.levels[kind.index()];
        match project {
            None => Some(level.clock),
            Some(project) => level.tenants.get(&project).map(|tenant| tenant.vtime),
        }
    }

    /// Puts a stored virtual time back, before any job is pushed.
    pub fn restore(&mut self, (kind, project): RingKey, vtime: u64) {
        let level = &mut self.levels[kind.index()];
        match project {
            None => level.clock = vtime,
            Some(project) => level.tenants.entry(project).or_default().vtime = vtime,
        }
    }

    /// Puts a job back that was ready when it was stored: its project enters nowhere, it never left.
    pub fn restore_job(&mut self, place: Place, job: JobSeq) {
        let level = &mut self.levels[place.kind.index()];
        let tenant = level.tenants.entry(place.project).or_default();
        let queue = tenant.queues.entry(place.lane).or_default();
        queue.insert(place.turn(job));
        let vtime = tenant.vtime;
        level
            .lanes
            .entry(place.lane)
            .or_default()
            .insert((vtime, place.project));
    }

    pub fn take_dirty(&mut self) -> BTreeSet<RingKey> {
        std::mem::take(&mut self.dirty)
    }

    /// The oldest of each line of `project` among the jobs of `kind`: of each lane and priority.
    pub fn heads(&self, kind: JobKind, project: ProjectSeq) -> impl Iterator<Item = JobSeq> + '_ {
        let tenant = self.levels[kind.index()].tenants.get(&project);
        let queues = tenant.into_iter().flat_map(|tenant| tenant.queues.values());
        queues.flat_map(|queue| {
            (0..=PRIORITY_MAX).filter_map(move |priority| {
                let line = (Reverse(priority), JobSeq(0))..=(Reverse(priority), JobSeq(u64::MAX));
                queue.range(line).next().map(|(_, job)| *job)
            })
        })
    }

    /// Every ready job with its place, for checks.
    #[cfg(test)]
    pub fn all(&self) -> Vec<(JobKind, u8, u32, ProjectSeq, JobSeq)> {
        let mut all = Vec::new();
        for kind in JobKind::ALL {
            let level = &self.levels[kind.index()];
            for (project, tenant) in &level.tenants {
                for (lane, queue) in &tenant.queues {
                    assert!(level.lanes[lane].contains(&(tenant.vtime, *project)));
                    let jobs = queue.iter();
                    all.extend(jobs.map(|(Reverse(p), job)| (kind, *p, *lane, *project, *job)));
                }
            }
            let in_lanes: usize = level.lanes.values().map(BTreeSet::len).sum();
            let in_tenants: usize = level.tenants.values().map(|t| t.queues.len()).sum();
            assert_eq!(in_lanes, in_tenants, "no empty line is kept");
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: JobKind = JobKind::Rollout;

    fn place(project: u32, lane: u32, priority: u8) -> Place {
        Place {
            kind: KIND,
            priority,
            lane,
            project: ProjectSeq(project),
        }
    }

    fn take(ready: &mut Ready, lanes: &[u32], weight: impl Fn(u32) -> u32) -> Option<(u32, u64)> {
        let (project, job) = ready.next(KIND, lanes)?;
        ready.charge(KIND, project, weight(project.0));
        for (lane, priority) in lanes
            .iter()
            .flat_map(|lane| (0..=9).map(move |p| (lane, p)))
        {
            ready.remove(place(project.0, *lane, priority), job);
        }
        Some((project.0, job.0))
    }

    #[test]
    fn shares_follow_weights() {
        let mut ready = Ready::default();
        for n in 0..400 {
            ready.push(place(1, 0, 5), JobSeq(n));
            ready.push(place(2, 0, 5), JobSeq(1_000 + n));
        }
        let mut got = [0; 3];
        for _ in 0..400 {
            let (project, _) = take(&mut ready, &[0], |p| if p == 1 { 100 } else { 300 }).unwrap();
            got[project as usize] += 1;
        }
        assert!((99..=101).contains(&got[1]), "{got:?}");
    }

    #[test]
    fn a_project_that_comes_back_gets_its_share_and_no_more() {
        let mut ready = Ready::default();
        for n in 0..1_000 {
            ready.push(place(1, 0, 5), JobSeq(n));
        }
        for _ in 0..500 {
            take(&mut ready, &[0], |_| 100).unwrap();
        }
        for n in 0..100 {
            ready.push(place(2, 0, 5), JobSeq(2_000 + n));
        }
        let first: Vec<_> = (0..20)
            .map(|_| take(&mut ready, &[0], |_| 100).unwrap().0)
            .collect();
        let of_two = first.iter().filter(|p| **p == 2).count();
        assert!((9..=11).contains(&of_two), "{first:?}");
    }

    #[test]
    fn a_lane_nobody_drew_from_earns_no_long_turn() {
        let mut ready = Ready::default();
        ready.push(place(1, 7, 5), JobSeq(0));
        for n in 1..200 {
            ready.push(place(1, 0, 5), JobSeq(n));
            ready.push(place(2, 0, 5), JobSeq(1_000 + n));
            ready.push(place(3, 7, 5), JobSeq(2_000 + n));
        }
        for _ in 0..300 {
            take(&mut ready, &[0], |_| 100).unwrap();
        }
        // Project 3 waited in lane 7 at virtual time 0 while lane 0 moved on.
        let first: Vec<_> = (0..20)
            .map(|_| take(&mut ready, &[0, 7], |_| 100).unwrap().0)
            .collect();
        let of_three = first.iter().filter(|p| **p == 3).count();
        assert!((6..=9).contains(&of_three), "{first:?}");
    }

    #[test]
    fn priority_goes_first_and_submission_last() {
        let mut ready = Ready::default();
        for (n, priority) in [(3, 5), (1, 5), (2, 0), (4, 9)] {
            ready.push(place(1, 0, priority), JobSeq(n));
        }
        let order: Vec<_> = std::iter::from_fn(|| take(&mut ready, &[0], |_| 100)).collect();
        assert_eq!(order, [(1, 4), (1, 1), (1, 3), (1, 2)]);
    }

    #[test]
    fn a_project_that_calls_everything_urgent_gets_its_share_and_no_more() {
        let mut ready = Ready::default();
        for n in 0..1_000 {
            ready.push(place(1, 0, 9), JobSeq(n));
        }
        for n in 0..50 {
            ready.push(place(2, 0, 5), JobSeq(2_000 + n));
        }
        let first: Vec<_> = (0..100)
            .map(|_| take(&mut ready, &[0], |_| 100).unwrap().0)
            .collect();
        let of_two = first.iter().filter(|p| **p == 2).count();
        assert!((49..=50).contains(&of_two), "{first:?}");
    }

    #[test]
    fn a_project_s_urgent_job_goes_first_from_whatever_lane() {
        let mut ready = Ready::default();
        ready.push(place(1, 0, 5), JobSeq(1));
        ready.push(place(1, 7, 9), JobSeq(2));
        assert_eq!(take(&mut ready, &[0, 7], |_| 100), Some((1, 2)));
        assert_eq!(take(&mut ready, &[0, 7], |_| 100), Some((1, 1)));
    }
}
