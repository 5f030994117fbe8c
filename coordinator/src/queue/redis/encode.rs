//! Arguments of the scripts. A job's are those that `take_job` in `insert.lua` takes, in this order.

use bytes::Bytes;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::queue::{Dep, JobKind, NewJob};
use redis::Cmd;

use crate::queue::JobResult;

/// The full name of a batch, under which its number is found.
pub fn batch_name(project: &ProjectId, batch: &BatchId) -> String {
    format!("{project}/{batch}")
}

/// The name of the batch that a job belongs to.
pub fn batch_of(key: &JobKey) -> String {
    batch_name(&key.project, &key.batch)
}

/// The number of a kind.
pub fn kind(kind: JobKind) -> usize {
    JobKind::ALL
        .iter()
        .position(|k| *k == kind)
        .unwrap_or_default()
}

/// A lane's needs, one a line: no tag has a control character in it.
pub fn needs(job: &NewJob) -> String {
    let needs: Vec<&str> = job.needs.iter().map(String::as_str).collect();
    needs.join("\n")
}

fn or_empty<T: ToString>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// Adds the arguments of a new job, which stands at `position` in its chunk.
pub fn push_job(
    cmd: &mut Cmd,
    position: usize,
    job: &NewJob,
    spec: &Bytes,
    deps: &[(JobKey, bool)],
) {
    let budget = |budget: u16, default: u16| or_empty((budget != default).then_some(budget));
    let max_runtime_us = job.max_runtime.map(|max| {
        u64::try_from(max.as_micros())
            .unwrap_or(MOMENT_MAX)
            .clamp(1, MOMENT_MAX)
    });
    let not_before = job.not_before.map(|at| at.0.min(MOMENT_MAX));
    let labels = if job.labels.is_empty() {
        String::new()
    } else {
        serde_json::to_string(&job.labels).unwrap_or_default()
    };
    let form = format!(
        "{} {} {} {} {} {}",
        kind(job.kind),
        job.priority,
        budget(job.max_attempts, NewJob::MAX_ATTEMPTS_DEFAULT),
        budget(job.max_infra, NewJob::MAX_INFRA_DEFAULT),
        or_empty(max_runtime_us),
        needs(job),
    );
    cmd.arg(position)
        .arg(job.id.as_str())
        .arg(job.spec_digest.as_slice())
        .arg(form)
        .arg(or_empty(not_before))
        .arg(labels)
        .arg(job.traceparent.as_deref().unwrap_or_default())
        .arg(spec.as_ref())
        .arg(deps.len());
    for (key, here) in deps {
        cmd.arg(batch_of(key))
            .arg(key.job.as_str())
            .arg(u8::from(*here));
    }
}

/// The largest moment and span in microseconds that a script can tell from its neighbours: it has doubles only.
const MOMENT_MAX: u64 = 1 << 52;

/// The dependencies of a planned job, by name, and whether each is among the new jobs.
pub fn dep_keys(
    project: &ProjectId,
    batch: &BatchId,
    jobs: &[NewJob],
    deps: &[Dep<JobKey>],
) -> Vec<(JobKey, bool)> {
    let key = |dep: &Dep<JobKey>| match dep {
        Dep::Here(n) => {
            let id = jobs[*n].id.clone();
            (JobKey::new(project.clone(), batch.clone(), id), true)
        }
        Dep::There(key) => (key.clone(), false),
    };
    deps.iter().map(key).collect()
}

/// A result as it is stored: the length of the manifest's path in two bytes, the path, the summary. Empty for an
/// empty one.
pub fn result(result: &JobResult) -> Vec<u8> {
    if *result == JobResult::default() {
        return Vec::new();
    }
    let length = u16::try_from(result.manifest.len()).unwrap_or(u16::MAX);
    let mut stored = length.to_le_bytes().to_vec();
    stored.extend_from_slice(result.manifest.as_bytes());
    stored.extend_from_slice(&result.summary);
    stored
}
