//! What must hold of a machine after every command.

use std::collections::{BTreeMap, BTreeSet};

use super::super::record::RingNumber;
use super::super::{BatchSeq, Change, Counters, JobSeq, JobState, JobView, RecordError};
use super::{Changes, Loading, Machine, MachineConfig};

/// Panics where an index, a counter or a link disagrees with the jobs.
pub(super) fn check(machine: &Machine) {
    let mut counted = BTreeMap::new();
    let mut by_project = BTreeMap::new();
    let mut places = 0;
    for (seq, job) in &machine.jobs {
        let batch = &machine.batches[&job.batch];
        assert_eq!(batch.jobs.get(&job.id), Some(seq));
        let counters: &mut Counters = counted.entry(job.batch).or_default();
        counters.add(job.state.name());
        let of_project: &mut Counters = by_project.entry((batch.project, job.kind)).or_default();
        of_project.add(job.state.name());
        places += usize::from(match &job.state {
            JobState::Delayed { until } => machine.delayed.contains(&(*until, *seq)),
            JobState::Leased(lease) => {
                assert!(lease.fence <= machine.last_fence && lease.fence > job.settled);
                machine.deadlines.contains(&(lease.deadline, *seq))
            }
            JobState::Blocked | JobState::Ready => false,
            ended => {
                let end = ended.end().unwrap();
                assert!(end.seq < machine.next_end);
                batch.ended.get(&end.seq) == Some(seq)
            }
        });
        if !batch.purging {
            check_deps(machine, *seq);
        }
    }
    let ready: BTreeSet<JobSeq> = machine.ready.all().iter().map(|place| place.4).collect();
    assert_eq!(ready.len(), machine.ready.all().len(), "a job waits once");
    for seq in &ready {
        assert!(matches!(machine.jobs[seq].state, JobState::Ready));
    }
    let blocked = machine.jobs.values();
    let blocked = blocked.filter(|job| matches!(job.state, JobState::Blocked));
    assert_eq!(
        machine.jobs.len(),
        places + ready.len() + blocked.count(),
        "each job is in exactly one place"
    );
    let ended: usize = machine.batches.values().map(|b| b.ended.len()).sum();
    let indexed = machine.delayed.len() + machine.deadlines.len() + ended;
    assert_eq!(indexed, places, "no index holds what is not there");
    for batch in machine.batches.values() {
        assert_eq!(
            batch.counters,
            counted.remove(&batch.seq).unwrap_or_default()
        );
        assert_eq!(batch.completed_at.is_some(), batch.is_done());
    }
    let purging = machine.batches.values().filter(|b| b.purging);
    assert!(purging.map(|b| &b.seq).eq(&machine.purging));
    for (seq, project) in &machine.projects {
        let batches: BTreeSet<_> = project.batches.values().copied().collect();
        assert_eq!(batches, project.in_order);
        let open = batches.iter().filter(|b| !machine.batches[b].closed);
        assert_eq!(open.count(), project.open);
        for kind in super::JobKind::ALL {
            let counted = by_project.remove(&(*seq, kind)).unwrap_or_default();
            assert_eq!(project.counters[kind.index()], counted);
        }
    }
    assert!(machine.just_ended.is_empty());
}

fn check_deps(machine: &Machine, seq: JobSeq) {
    let job = &machine.jobs[&seq];
    assert_eq!(job.waits_for, machine.unmet(job.deps()));
    for dep in job.deps() {
        if machine.jobs.contains_key(dep) {
            assert!(machine.dependents[dep].contains(&seq));
        }
    }
    let doomed = job.deps().iter().any(|dep| machine.ended_badly(*dep));
    match &job.state {
        JobState::Blocked => assert!(job.waits_for > 0 && !doomed, "a blocked job can still run"),
        JobState::Ready | JobState::Delayed { .. } | JobState::Leased(_) => {
            assert_eq!(job.waits_for, 0, "nothing runs before what it needs");
        }
        _ => {}
    }
}

/// What a backend has stored.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    pub jobs: BTreeMap<JobSeq, Vec<u8>>,
    pub batches: BTreeMap<BatchSeq, Vec<u8>>,
    pub chunks: BTreeMap<(BatchSeq, u32), Vec<u8>>,
    pub rings: BTreeMap<RingNumber, Vec<u8>>,
    pub meta: Option<Vec<u8>>,
}

/// The machine of stored rows.
pub(crate) fn load(rows: &Rows) -> Result<Machine, RecordError> {
    let mut loading = Loading::new(MachineConfig::default());
    rows.meta.iter().try_for_each(|row| loading.meta(row))?;
    for (seq, row) in &rows.batches {
        loading.batch(*seq, row)?;
    }
    for ((batch, n), row) in &rows.chunks {
        loading.chunk(*batch, *n, row)?;
    }
    for (number, row) in &rows.rings {
        loading.ring(*number, row)?;
    }
    for (seq, row) in &rows.jobs {
        loading.job(*seq, row)?;
    }
    Ok(loading.finish())
}

/// Does to `rows` what a backend does.
pub(super) fn store(rows: &mut Rows, changes: Changes) {
    fn put<K: Ord>(map: &mut BTreeMap<K, Vec<u8>>, rows: Vec<Change<K>>) {
        for (key, row) in rows {
            match row {
                Some(row) => map.insert(key, row),
                None => map.remove(&key),
            };
        }
    }
    put(&mut rows.jobs, changes.jobs);
    put(&mut rows.batches, changes.batches);
    put(&mut rows.chunks, changes.chunks);
    put(&mut rows.rings, changes.rings);
    rows.meta = changes.meta.or(rows.meta.take());
}

/// Panics with the first difference between what is visible of two machines.
pub(super) fn same(left: &[String], right: &[String]) {
    for (left, right) in left.iter().zip(right) {
        assert_eq!(left, right);
    }
    assert_eq!(left.len(), right.len());
}

/// Everything that can be seen of a machine and is stored. Deadlines move without being stored.
pub(super) fn visible(machine: &Machine) -> Vec<String> {
    let mut jobs: Vec<JobView> = machine
        .jobs
        .keys()
        .filter_map(|seq| machine.view_of_job(*seq))
        .filter(|job| !machine.batches[&job.batch_seq].purging)
        .collect();
    jobs.sort_by_key(|job| job.seq);
    for job in &mut jobs {
        if let JobState::Leased(lease) = &mut job.state {
            lease.deadline = lease.granted_at;
            lease.run_until = None;
            lease.progress = None;
        }
    }
    let mut seen: Vec<_> = jobs.iter().map(|job| format!("{job:?}")).collect();
    for batch in machine.batches.values() {
        seen.push(format!("{:?}", machine.view_of_batch(batch)));
        seen.push(format!("{:?} {:?}", batch.ended, batch.chunks));
    }
    // Lanes have other numbers after a restart.
    let ready = machine.ready.all();
    let ready: BTreeSet<_> = ready.iter().map(|r| (r.0, r.1, r.3, r.4)).collect();
    seen.push(format!("{ready:?} {:?}", machine.meta_row()));
    seen.push(format!("{:?}", machine.projects));
    seen
}
