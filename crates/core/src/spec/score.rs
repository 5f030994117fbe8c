//! Teacher-forced scores: recorded rollouts whose turns a model is asked for, each after what was recorded before it.

use serde::{Deserialize, Serialize};

use super::check::{Faults, check_recordings};
use crate::id::{BatchId, JobId};

/// See [`ScoreSpec`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `ScoreSpec`")]
pub struct ScoreDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub traces: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<bool>,
}

/// Turns that a model is to be asked for, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreSpec {
    /// The model's name at its endpoint; none: the worker's.
    pub model: Option<String>,
    /// Rollouts of the project, at least one.
    pub traces: Vec<(BatchId, JobId)>,
    /// Whether hints are in the prompts. Default false.
    pub hints: bool,
}

impl ScoreDraft {
    /// The job, or every rule that the draft breaks.
    pub(super) fn check(&self) -> Result<ScoreSpec, Vec<crate::error::FieldError>> {
        let mut faults = Faults::default();
        faults.name("model", self.model.as_deref());
        let traces = check_recordings(&mut faults, "traces", &self.traces);
        if self.traces.is_empty() {
            faults.add("traces", "", "must name a rollout");
        }
        faults.or(ScoreSpec {
            model: self.model.clone(),
            traces,
            hints: self.hints.unwrap_or(false),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::parse_line;

    #[test]
    fn recordings_are_scored_without_hints_unless_they_are_asked_for() {
        let job = parse_line(br#"{"score":{"model":"m","traces":["b/j","b/k"]}}"#).unwrap();
        let job = job.check().unwrap();
        let spec = job.score().unwrap();
        assert_eq!((spec.model.as_deref(), spec.traces.len()), (Some("m"), 2));
        assert!(!spec.hints && job.rollout().is_none());
        for (line, fields) in [
            (r#"{"score":{}}"#, &["score.traces"][..]),
            (
                r#"{"score":{"traces":["j"],"model":" "},"prompt":"x"}"#,
                &["prompt", "score.model", "score.traces[0]"],
            ),
        ] {
            let errors = parse_line(line.as_bytes()).unwrap().check().unwrap_err();
            let found: Vec<&str> = errors.iter().map(|e| e.field.as_str()).collect();
            assert_eq!(found, fields, "{line}");
        }
    }
}
