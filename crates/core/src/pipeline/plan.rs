//! What a pipeline is about to do: which steps a round has and what each of them does, as digests.

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
