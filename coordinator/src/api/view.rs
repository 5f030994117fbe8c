//! What the queue knows, as clients see it.

use espalier_core::error::FieldError;
use espalier_core::id::JobKey;
use espalier_core::queue::{BatchView, Counters, JobKind, JobState, StateName};
use espalier_proto::convert::{error_to_wire, summary_from_wire};
use espalier_proto::v1;
use prost::Message;

use crate::queue::{JobDetail, SUMMARY_BYTES_MAX};

/// Longest reason of a summary that the queue keeps, in bytes; the manifest has all of it.
const REASON_BYTES_MAX: usize = 1_024;

/// A batch.
pub fn batch(view: &BatchView) -> v1::Batch {
    v1::Batch {
        batch: view.batch.to_string(),
        project: view.project.to_string(),
        closed: view.closed,
        complete: view.completed_at.is_some(),
        counts: Some(counts(&view.counters)),
        created_at_us: view.opened_at.0,
        completed_at_us: view.completed_at.map_or(0, |at| at.0),
        cancelled: view.cancelled,
    }
}

fn counts(counters: &Counters) -> v1::Counts {
    v1::Counts {
        blocked: counters.get(StateName::Blocked),
        delayed: counters.get(StateName::Delayed),
        ready: counters.get(StateName::Ready),
        leased: counters.get(StateName::Leased),
        succeeded: counters.get(StateName::Succeeded),
        dead: counters.get(StateName::Dead),
        cancelled: counters.get(StateName::Cancelled),
    }
}

/// A job.
pub fn job(detail: JobDetail) -> v1::Job {
    let JobDetail { job, result } = detail;
    let ended_at_us = job.state.end().map_or(0, |end| end.at.0);
    let (fence, worker, progress) = match &job.state {
        JobState::Leased(lease) => (
            lease.fence.0,
            lease.worker.to_string(),
            lease.progress.as_deref().unwrap_or_default().to_owned(),
        ),
        _ => <_>::default(),
    };
    let summary = result
        .as_ref()
        .and_then(|result| v1::RolloutSummary::decode(result.summary.clone()).ok());
    v1::Job {
        batch: job.key.batch.to_string(),
        id: job.key.job.to_string(),
        state: state(job.state.name()).into(),
        attempts: job.attempts,
        handler_failures: job.budgets.failures.into(),
        infra_failures: job.budgets.infra.into(),
        fence,
        worker,
        labels: job.labels,
        last_error: job
            .error
            .map(|error| error_to_wire(error.class, error.message, error.log_tail)),
        manifest: result.map(|result| result.manifest).unwrap_or_default(),
        summary,
        created_at_us: job.submitted_at.0,
        ended_at_us,
        progress,
        kind: kind(job.kind).into(),
        priority: job.priority.into(),
        needs: job.needs.into_iter().collect(),
    }
}

/// A state.
pub fn state(name: StateName) -> v1::JobState {
    match name {
        StateName::Blocked => v1::JobState::Blocked,
        StateName::Delayed => v1::JobState::Delayed,
        StateName::Ready => v1::JobState::Ready,
        StateName::Leased => v1::JobState::Leased,
        StateName::Succeeded => v1::JobState::Succeeded,
        StateName::Dead => v1::JobState::Dead,
        StateName::Cancelled => v1::JobState::Cancelled,
    }
}

/// The states of a filter.
pub fn states_from_wire(states: &[i32]) -> Result<Vec<StateName>, FieldError> {
    let one = |(i, wire): (usize, &i32)| {
        StateName::ALL
            .into_iter()
            .find(|name| state(*name) as i32 == *wire)
            .ok_or_else(|| FieldError::new(format!("states[{i}]"), wire, "must be a known state"))
    };
    states.iter().enumerate().map(one).collect()
}

/// The kind of a job.
pub fn kind(kind: JobKind) -> v1::JobKind {
    match kind {
        JobKind::Rollout => v1::JobKind::Rollout,
        JobKind::Generate => v1::JobKind::Generate,
        JobKind::Train => v1::JobKind::Train,
        JobKind::Curate => v1::JobKind::Curate,
        JobKind::Compare => v1::JobKind::Compare,
        JobKind::Export => v1::JobKind::Export,
    }
}

/// The kind of job that a worker names.
pub fn kind_from_wire(kind: i32) -> Result<JobKind, FieldError> {
    match v1::JobKind::try_from(kind) {
        Ok(v1::JobKind::Rollout) => Ok(JobKind::Rollout),
        Ok(v1::JobKind::Generate) => Ok(JobKind::Generate),
        Ok(v1::JobKind::Train) => Ok(JobKind::Train),
        Ok(v1::JobKind::Curate) => Ok(JobKind::Curate),
        Ok(v1::JobKind::Compare) => Ok(JobKind::Compare),
        Ok(v1::JobKind::Export) => Ok(JobKind::Export),
        _ => Err(FieldError::new("kind", kind, "must be a known kind of job")),
    }
}

/// A lease.
pub fn lease(key: &JobKey, fence: espalier_core::id::Fence) -> v1::Lease {
    v1::Lease {
        job: key.to_string(),
        fence: fence.0,
    }
}

/// What the queue keeps of a summary, once it was checked.
pub fn stored_summary(mut wire: v1::RolloutSummary) -> Result<bytes::Bytes, FieldError> {
    summary_from_wire(wire.clone()).map(drop)?;
    wire.reason
        .truncate(wire.reason.floor_char_boundary(REASON_BYTES_MAX));
    let bytes = wire.encode_to_vec();
    if bytes.len() > SUMMARY_BYTES_MAX {
        let rule = format!("must have at most {SUMMARY_BYTES_MAX} bytes");
        return Err(FieldError::new("summary", bytes.len(), rule));
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::page;
    use espalier_core::queue::{JobFilter, LABELS_MAX, Machine, MachineConfig, NewBatch, NewJob};
    use espalier_core::time::Timestamp;

    #[test]
    fn every_state_has_its_own_number() {
        let numbers: Vec<i32> = StateName::ALL
            .into_iter()
            .map(|n| state(n) as i32)
            .collect();
        assert_eq!(states_from_wire(&numbers).unwrap(), StateName::ALL);
        for unknown in [0, 8, -1] {
            assert_eq!(
                states_from_wire(&[1, unknown]).unwrap_err().field,
                "states[1]"
            );
        }
    }

    #[test]
    fn an_answer_holds_as_many_jobs_as_clients_take_by_default() {
        let mut machine = Machine::new(MachineConfig::default());
        let (project, batch) = ("p".parse().unwrap(), "b".parse().unwrap());
        let new = NewBatch {
            project,
            batch,
            params_digest: [0; 32],
        };
        machine.open_batch(Timestamp(1), &new).unwrap();
        let label = |n: usize| (format!("{n:0256}"), "x".repeat(256));
        let large = |n: usize| NewJob {
            labels: (0..LABELS_MAX).map(label).collect(),
            ..NewJob::new(
                format!("j{n:03}").parse().unwrap(),
                JobKind::Rollout,
                [0; 32],
            )
        };
        let jobs = (0..300).map(large).collect();
        let added = machine.submit(Timestamp(1), &new.project, &new.batch, 0, [0; 32], jobs);
        assert_eq!(added.unwrap().added.len(), 300);
        let filter = JobFilter::default();
        let found = machine.jobs(&new.project, &new.batch, &filter, None, 300);
        let details = found
            .unwrap()
            .into_iter()
            .map(|job| JobDetail { job, result: None });
        let fitting = page::fitting(details.map(job));
        assert!((50..150).contains(&fitting.len()), "{}", fitting.len());
        let answer = v1::ListJobsResponse {
            jobs: fitting,
            next_page_token: String::new(),
        };
        assert!(answer.encoded_len() < 4 << 20, "{}", answer.encoded_len());
    }

    #[test]
    fn a_summary_is_checked_and_cut() {
        let long = v1::RolloutSummary {
            stop: "answered".to_owned(),
            reason: "é".repeat(5_000),
            ..v1::RolloutSummary::default()
        };
        let bytes = stored_summary(long).unwrap();
        assert!(bytes.len() < SUMMARY_BYTES_MAX);
        let unknown = v1::RolloutSummary::default();
        assert_eq!(stored_summary(unknown).unwrap_err().field, "summary.stop");
    }
}
