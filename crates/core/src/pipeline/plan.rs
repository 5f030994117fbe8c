//! What a pipeline is about to do: which steps a round has and what each of them does, as digests.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Step;
use crate::compare::Prices;
use crate::error::FieldError;
use crate::id::PipelineName;
use crate::time::Timestamp;

/// The version of [`PipelinePlan`] that this code writes, and the only one that it reads.
pub const PIPELINE_PLAN_VERSION: u32 = 1;
/// Most rounds of a pipeline.
const ROUNDS_MAX: u32 = 100;

/// A step of every round, but the baseline, which only the first round has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// Which.
    pub step: Step,
    /// SHA-256 of what it does, in hex: of its jobs without the model and without what other steps leave.
    pub work: String,
    /// How many tasks its rollouts try; 0: it has no rollouts.
    pub tasks: u64,
    /// How many jobs it has at most.
    pub jobs: u64,
    /// How often somebody asked that it be done anew.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub again: u32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

fn is_none_asked(share: &f64) -> bool {
    *share == 0.0
}

impl PlannedStep {
    /// What the step's digest is of: what it does, and which time it is done.
    pub fn content(&self) -> String {
        match self.again {
            0 => self.work.clone(),
            again => format!("{}, again {again}", self.work),
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PipelinePlan {
    /// [`PIPELINE_PLAN_VERSION`].
    pub plan_version: u32,
    /// The pipeline, its adapter and its data set.
    pub pipeline: PipelineName,
    /// What is trained.
    pub base: String,
    /// What endpoints call the model before.
    pub model: String,
    /// How often it goes round.
    pub rounds: u32,
    /// The steps of a round, in their order; waits are none.
    pub steps: Vec<PlannedStep>,
    /// What tokens cost, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prices: Option<Prices>,
    /// What prices are in.
    pub currency: String,
    /// The share of a step's rollouts that must come to an end, solved or not.
    #[serde(default, skip_serializing_if = "is_none_asked")]
    pub min_share: f64,
    /// When it was written.
    pub created_at_us: Timestamp,
}

impl PipelinePlan {
    /// Reads a plan that somebody else may have written, of `pipeline`.
    ///
    /// # Errors
    /// It is broken, of another version, or of another pipeline.
    pub fn parse(bytes: &[u8], pipeline: &PipelineName) -> Result<Self, FieldError> {
        let plan: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be the plan of a pipeline: {error}");
            FieldError::new("plan", String::from_utf8_lossy(bytes), rule)
        })?;
        let refuse = |field: &str, value: &dyn fmt::Display, rule: String| {
            Err(FieldError::new(format!("plan.{field}"), value, rule))
        };
        if plan.plan_version != PIPELINE_PLAN_VERSION {
            let rule = format!("must be {PIPELINE_PLAN_VERSION}");
            return refuse("plan_version", &plan.plan_version, rule);
        }
        if plan.pipeline != *pipeline {
            return refuse("pipeline", &plan.pipeline, format!("must be {pipeline}"));
        }
        if !(1..=ROUNDS_MAX).contains(&plan.rounds) {
            return refuse(
                "rounds",
                &plan.rounds,
                format!("must be in 1..={ROUNDS_MAX}"),
            );
        }
        Ok(plan)
    }

    /// What a step does, where the pipeline has it.
    pub fn step(&self, step: Step) -> Option<&PlannedStep> {
        self.steps.iter().find(|planned| planned.step == step)
    }

    /// Takes over from the plan `before` what was asked to be done anew, so that it stays done.
    pub fn go_on_from(&mut self, before: &Self) {
        for planned in &mut self.steps {
            let before = before.step(planned.step);
            planned.again = before.map_or(0, |before| before.again);
        }
    }

    /// Asks that `steps` be done anew, where they have `ended`: what has not is done anyway, so that the same command goes on
    /// with what it began.
    ///
    /// # Errors
    /// The pipeline has no such step.
    pub fn do_anew(&mut self, steps: &[Step], ended: &BTreeSet<Step>) -> Result<(), FieldError> {
        if let Some(step) = steps.iter().find(|step| self.step(**step).is_none()) {
            let rule = format!("must be a step of pipeline `{}`", self.pipeline);
            return Err(FieldError::new("again", step, rule));
        }
        for planned in &mut self.steps {
            let is_asked = steps.contains(&planned.step) && ended.contains(&planned.step);
            planned.again += u32::from(is_asked);
        }
        Ok(())
    }

    /// Whether both are to do the same.
    pub fn is_like(&self, other: &Self) -> bool {
        let created_at_us = other.created_at_us;
        let same = Self {
            created_at_us,
            ..self.clone()
        };
        same == *other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> PipelinePlan {
        let planned = |step| PlannedStep {
            step,
            work: "w".to_owned(),
            tasks: 0,
            jobs: 1,
            again: 0,
        };
        PipelinePlan {
            plan_version: PIPELINE_PLAN_VERSION,
            pipeline: PipelineName::new("shop").unwrap(),
            base: "b".to_owned(),
            model: "m".to_owned(),
            rounds: 1,
            steps: [Step::Rollouts, Step::Train].map(planned).to_vec(),
            prices: None,
            currency: "USD".to_owned(),
            min_share: 0.0,
            created_at_us: Timestamp(1),
        }
    }

    #[test]
    fn what_was_done_anew_stays_so_and_what_never_was_is_named_as_before() {
        let first = plan();
        let stored = serde_json::to_string(&first).unwrap();
        assert!(!stored.contains("again"), "{stored}");
        assert_eq!(
            PipelinePlan::parse(stored.as_bytes(), &first.pipeline),
            Ok(first.clone())
        );
        let ended = BTreeSet::from([Step::Train]);
        let mut begun = first.clone();
        begun.do_anew(&[Step::Train], &BTreeSet::new()).unwrap();
        assert_eq!(begun, first, "what has not ended is done anyway");
        let mut second = plan();
        second.go_on_from(&first);
        second.do_anew(&[Step::Train], &ended).unwrap();
        let mut third = plan();
        third.go_on_from(&second);
        assert_eq!(second, third);
        let content = |plan: &PipelinePlan, step| plan.step(step).unwrap().content();
        assert_eq!(content(&third, Step::Rollouts), "w");
        assert_ne!(content(&third, Step::Train), "w");
        let mut fourth = third.clone();
        fourth.do_anew(&[Step::Train], &ended).unwrap();
        assert_ne!(content(&fourth, Step::Train), content(&third, Step::Train));
        let error = plan().do_anew(&[Step::Probe], &ended).unwrap_err();
        assert_eq!((&*error.field, &*error.value), ("again", "probe"));
    }
}
