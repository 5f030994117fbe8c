//! `--replay recorded`: the rollouts of each task name the recordings of that task, which stand in for its servers.

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::spec::limits;
use espalier_core::trace::StopReason;
use espalier_runtime::store::Store;
use espalier_runtime::traces::{Listed, Traces};
use futures::{StreamExt, TryStreamExt, stream};

use crate::exit::Problem;
use crate::expand::Expanded;
use crate::progress;
use crate::submit::file::Refusal;

/// Manifests read at once: hides the latency of a store.
const READS_MAX: usize = 16;

/// A published rollout.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The job that made it.
    pub job: JobKey,
    /// Its task.
    pub task: String,
    /// Whether it solved it; none where it was not judged.
    pub solved: Option<bool>,
    /// Whether it ended where nothing was recorded: nobody knows how it would have gone on.
    pub unrecorded: bool,
}

impl Recorded {
    /// As jobs name it.
    pub fn name(&self) -> String {
        format!("{}/{}", self.job.batch, self.job.job)
    }
}

/// The published rollouts of `batches`.
pub async fn find(
    store: &Store,
    project: &ProjectId,
    batches: &[BatchId],
) -> Result<Vec<Recorded>, Problem> {
    let traces = Traces::new(store.clone(), project.clone());
    let mut listed: Vec<Listed> = Vec::new();
    for batch in batches {
        listed.extend(traces.list(Some(batch)).await?);
    }
    let bar = progress::things(listed.len() as u64, "reading recordings");
    let one = |listed: Listed| {
        let (traces, bar) = (&traces, &bar);
        async move {
            let manifest = traces.summary(&listed).await?.manifest;
            bar.inc(1);
            let recorded = manifest.summary.rollout().map(|summary| Recorded {
                task: task_of(&summary.task_id, listed.job.job.as_str()),
                solved: summary.solved(),
                unrecorded: summary.stop == StopReason::Unrecorded,
                job: listed.job,
            });
            Ok::<_, Problem>(recorded)
        }
    };
    let found = stream::iter(listed)
        .map(one)
        .buffered(READS_MAX)
        .try_filter_map(|recorded| std::future::ready(Ok(recorded)))
        .try_collect()
        .await?;
    bar.finish_and_clear();
    Ok(found)
}

/// A job that names no task is one by its own id, less the end by which samples are told apart.
fn task_of(task: &str, job: &str) -> String {
    let is_sample = |end: &str| end.parse::<u32>().is_ok();
    match (task, job.rsplit_once(".s")) {
        ("", Some((name, end))) if is_sample(end) => name.to_owned(),
        ("", _) => job.to_owned(),
        (task, _) => task.to_owned(),
    }
}

/// Names them in the rollouts of their tasks. A task that was never recorded is left out and refused by its place. Gives how
/// many tasks have more recordings than a rollout may name: of these the first are named.
pub fn name(tasks: &mut Expanded, recorded: &[Recorded], batches: &[BatchId]) -> usize {
    let mut recordings: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for one in recorded {
        recordings.entry(&one.task).or_default().push(one.name());
    }
    let batches: Vec<String> = batches.iter().map(|batch| format!("`{batch}`")).collect();
    let rule = format!("must have a published rollout in {}", batches.join(" or "));
    let jobs = std::mem::take(&mut tasks.jobs);
    let places = std::mem::take(&mut tasks.places);
    let (mut refused, mut cut) = (BTreeSet::new(), BTreeSet::new());
    for (mut job, place) in jobs.into_iter().zip(places) {
        let id = job.id().to_owned();
        let rollout = job.rollout.get_or_insert_default();
        match recordings.get(rollout.task_id()) {
            Some(names) => {
                if names.len() > limits::LIST_MAX {
                    cut.insert(rollout.task_id().to_owned());
                }
                let most = names.iter().take(limits::LIST_MAX);
                rollout.replay = most.cloned().collect();
                tasks.jobs.push(job);
                tasks.places.push(place);
            }
            None if refused.insert(place) => tasks.refusals.push(Refusal {
                place,
                id,
                error: FieldError::new("task_id", rollout.task_id(), rule.as_str()),
            }),
            None => {}
        }
    }
    tasks.refusals.sort_by_key(|refusal| refusal.place);
    cut.len()
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::parse_line;
    use espalier_proto::convert::draft_to_wire;

    use super::*;

    #[test]
    fn a_job_without_a_task_is_one_by_its_id() {
        for (task, job, expected) in [
            ("t", "j.s1", "t"),
            ("", "price-1.s12", "price-1"),
            ("", "price-1", "price-1"),
            ("", "shop.sale", "shop.sale"),
        ] {
            assert_eq!(task_of(task, job), expected, "{job}");
        }
    }

    #[test]
    fn rollouts_name_the_recordings_of_their_task_and_others_are_refused_once() {
        let job = |line: &str| draft_to_wire(&parse_line(line.as_bytes()).unwrap());
        let mut tasks = Expanded {
            jobs: vec![
                job(r#"{"id":"a.t.s0","task_id":"t","prompt":"x"}"#),
                job(r#"{"id":"a.u.s0","task_id":"u","prompt":"x"}"#),
                job(r#"{"id":"b.u.s0","task_id":"u","prompt":"x"}"#),
            ],
            places: vec![1, 2, 2],
            ..Expanded::default()
        };
        let one = |n: usize| Recorded {
            job: format!("p/r/j{n}").parse().unwrap(),
            task: "t".to_owned(),
            solved: Some(false),
            unrecorded: false,
        };
        let recorded: Vec<Recorded> = (0..100).map(one).collect();
        let cut = name(&mut tasks, &recorded, &["r".parse().unwrap()]);
        assert_eq!(cut, 1, "of 100 recordings 64 are named");
        assert_eq!((tasks.jobs.len(), tasks.places), (1, vec![1]));
        let named = &tasks.jobs[0].rollout.as_ref().unwrap().replay;
        assert_eq!((named.len(), &*named[63]), (limits::LIST_MAX, "r/j63"));
        let [refusal] = &tasks.refusals[..] else {
            panic!("{:?}", tasks.refusals)
        };
        assert_eq!((refusal.place, refusal.id.as_str()), (2, "a.u.s0"));
        assert_eq!(
            refusal.error.to_string(),
            "`task_id` must have a published rollout in `r`, got `u`"
        );
    }
}
