//! `--replay recorded`: the rollouts of each task name the recordings of that task, which stand in for its servers.

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::spec::limits;
use espalier_runtime::store::Store;
use espalier_runtime::traces::{Listed, Traces};
use futures::{StreamExt, TryStreamExt, stream};

use crate::exit::Problem;
use crate::expand::Expanded;
use crate::progress;
use crate::submit::file::Refusal;

/// Manifests read at once: hides the latency of a store.
const READS_MAX: usize = 16;

/// Published rollouts of a task, as `batch/job`, in the order in which they are asked.
pub type Recordings = BTreeMap<String, Vec<String>>;

/// The rollouts of `batches`, by their tasks.
pub async fn find(
    store: &Store,
    project: &ProjectId,
    batches: &[BatchId],
) -> Result<Recordings, Problem> {
    let traces = Traces::new(store.clone(), project.clone());
    let mut listed: Vec<Listed> = Vec::new();
    for batch in batches {
        listed.extend(traces.list(Some(batch)).await?);
    }
    let bar = progress::things(listed.len() as u64, "reading recordings");
    let task = |listed: Listed| {
        let (traces, bar) = (&traces, &bar);
        async move {
            let manifest = traces.summary(&listed).await?.manifest;
            bar.inc(1);
            let task = manifest.summary.rollout().map(|it| it.task_id.clone());
            Ok::<_, Problem>((task.unwrap_or_default(), listed.job))
        }
    };
    let tasks: Vec<(String, JobKey)> = stream::iter(listed)
        .map(task)
        .buffered(READS_MAX)
        .try_collect()
        .await?;
    bar.finish_and_clear();
    let mut found = Recordings::new();
    for (task, job) in tasks {
        if !task.is_empty() {
            let name = format!("{}/{}", job.batch, job.job);
            found.entry(task).or_default().push(name);
        }
    }
    Ok(found)
}

/// Names them in the rollouts of their tasks. A task that was never recorded is left out and refused by its place.
pub fn name(tasks: &mut Expanded, recordings: &Recordings, batches: &[BatchId]) {
    let batches: Vec<String> = batches.iter().map(|batch| format!("`{batch}`")).collect();
    let rule = format!("must have a published rollout in {}", batches.join(" or "));
    let jobs = std::mem::take(&mut tasks.jobs);
    let places = std::mem::take(&mut tasks.places);
    let mut refused = BTreeSet::new();
    for (mut job, place) in jobs.into_iter().zip(places) {
        let id = job.id().to_owned();
        let rollout = job.rollout.get_or_insert_default();
        match recordings.get(rollout.task_id()) {
            Some(names) => {
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
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::parse_line;
    use espalier_proto::convert::draft_to_wire;

    use super::*;

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
        let many = (0..100).map(|n| format!("r/j{n}")).collect();
        let recordings = Recordings::from([("t".to_owned(), many)]);
        name(&mut tasks, &recordings, &["r".parse().unwrap()]);
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
