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
        project.clone(),
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
    for came in came_to(&summary) {
        let (counter, verdict, count) = match came {
            Came::Rollout(verdict) => (&metrics.rollout_verdicts, verdict, 1),
            Came::Conversations(verdict, n) => (&metrics.dataset_conversations, verdict, n),
        };
        let verdict = KeyValue::new(attribute::VERDICT, verdict);
        counter.add(count, &[project.clone(), verdict]);
    }
}

/// What is counted of a result.
#[derive(Debug, PartialEq)]
enum Came {
    /// A rollout with this verdict.
    Rollout(&'static str),
    /// So many conversations that a data set took or did not.
    Conversations(&'static str, u64),
}

fn came_to(summary: &Summary) -> Vec<Came> {
    match summary {
        Summary::Rollout(rollout) => vec![Came::Rollout(match rollout.solved() {
            Some(true) => "solved",
            Some(false) => "failed",
            None => "unjudged",
        })],
        Summary::Curate(curate) => {
            let dropped: u64 = curate.dropped.values().sum();
            let accepted = curate.sources.saturating_sub(dropped);
            vec![
                Came::Conversations("accepted", accepted),
                Came::Conversations("dropped", dropped),
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
            assert_eq!(came_to(&rollout(reward)), [Came::Rollout(verdict)]);
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
