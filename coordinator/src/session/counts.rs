//! What an end that the queue took is counted as. The queue knows nothing of results; what a worker said of one is read
//! here once more, for numbers alone.

use espalier_core::id::JobKey;
use espalier_core::trace::Summary;
use espalier_proto::convert::summary_from_wire;
use espalier_proto::v1;
use espalier_runtime::telemetry::{self, names::attribute};
use opentelemetry::KeyValue;
use prost::Message as _;

use super::history;
use crate::queue::Outcome;

/// An attempt of a job of `kind` has ended, as the first result of it that was taken says. `kind` is empty where a worker
/// takes several on one stream.
pub fn finished(key: &JobKey, kind: &'static str, outcome: &Outcome) {
    let project = KeyValue::new(attribute::PROJECT, key.project.to_string());
    let labels = [
        project,
        KeyValue::new(attribute::JOB_KIND, kind),
        KeyValue::new(attribute::OUTCOME, history::outcome_name(outcome)),
    ];
    let metrics = telemetry::metrics();
    metrics.job_finishes.add(1, &labels);
    let Outcome::Succeeded { result, .. } = outcome else {
        return;
    };
    let wire = v1::RolloutSummary::decode(result.summary.clone());
    let Some(summary) = wire.ok().and_then(|wire| summary_from_wire(wire).ok()) else {
        return;
    };
    count(&key.project.to_string(), came_to(&summary));
}

/// Tells the counters of a project from the start, so that what is counted first is an increase of them.
pub fn tell_counters(project: &str) {
    let rollouts = [SOLVED, FAILED, UNJUDGED].map(|verdict| Came::Rollouts(verdict, 0));
    let conversations = [ACCEPTED, DROPPED].map(|verdict| Came::Conversations(verdict, 0));
    count(project, rollouts.into_iter().chain(conversations));
}

fn count(project: &str, what: impl IntoIterator<Item = Came>) {
    let metrics = telemetry::metrics();
    for came in what {
        let (counter, verdict, count) = match came {
            Came::Rollouts(verdict, n) => (&metrics.rollout_verdicts, verdict, n),
            Came::Conversations(verdict, n) => (&metrics.dataset_conversations, verdict, n),
        };
        let project = KeyValue::new(attribute::PROJECT, project.to_owned());
        counter.add(
            count,
            &[project, KeyValue::new(attribute::VERDICT, verdict)],
        );
    }
}

const SOLVED: &str = "solved";
const FAILED: &str = "failed";
const UNJUDGED: &str = "unjudged";
const ACCEPTED: &str = "accepted";
const DROPPED: &str = "dropped";

/// What is counted of a result.
#[derive(Debug, PartialEq)]
enum Came {
    /// So many rollouts with this verdict.
    Rollouts(&'static str, u64),
    /// So many conversations that a data set took or did not.
    Conversations(&'static str, u64),
}

fn came_to(summary: &Summary) -> Vec<Came> {
    match summary {
        Summary::Rollout(rollout) => {
            let verdict = match rollout.solved() {
                Some(true) => SOLVED,
                Some(false) => FAILED,
                None => UNJUDGED,
            };
            vec![Came::Rollouts(verdict, 1)]
        }
        Summary::Curate(curate) => {
            let dropped: u64 = curate.dropped.values().sum();
            let accepted = curate.sources.saturating_sub(dropped);
            vec![
                Came::Conversations(ACCEPTED, accepted),
                Came::Conversations(DROPPED, dropped),
            ]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::dataset::CurateSummary;
    use espalier_core::trace::{RolloutSummary, StopReason, Totals};

    use super::*;

    #[test]
    fn verdicts_and_data_sets_are_told_apart() {
        let rollout = |reward| {
            Summary::Rollout(RolloutSummary {
                reward,
                stop: StopReason::Answered,
                reason: String::new(),
                task_id: String::new(),
                task_kind: String::new(),
                totals: Totals::default(),
            })
        };
        for (reward, verdict) in [
            (Some(1.0), "solved"),
            (Some(0.5), "failed"),
            (None, "unjudged"),
        ] {
            assert_eq!(came_to(&rollout(reward)), [Came::Rollouts(verdict, 1)]);
        }
        let curate = CurateSummary {
            sources: 10,
            dropped: [("too_long".to_owned(), 3), ("failed".to_owned(), 1)].into(),
            ..CurateSummary::default()
        };
        let expected = [
            Came::Conversations("accepted", 6),
            Came::Conversations("dropped", 4),
        ];
        assert_eq!(came_to(&Summary::Curate(curate)), expected);
    }
}
