//! Why a rollout came to no end of its own, and what that means for the attempt.

use espalier_core::error::ErrorClass;
use espalier_runtime::model::ModelError;
use espalier_runtime::tasks::{BlockingFailed, DeadlineExceeded};

use super::recorded::ReplayError;
use crate::mcp::McpError;
use crate::record::RecordError;
use crate::verify::ProbeError;

/// A rollout that failed. What the model did wrong is no such failure: it is told so and goes on.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// The tools.
    #[error("the rollout's tools failed")]
    Mcp(#[from] McpError),
    /// The recordings in place of tools.
    #[error("the rollout's recorded tools cannot be used")]
    Replay(#[from] ReplayError),
    /// The model's endpoint.
    #[error("the model did not answer")]
    Model(#[from] ModelError),
    /// The recorder.
    #[error("the rollout could not be recorded")]
    Record(#[from] RecordError),
    /// A check whose question was not answered.
    #[error("the rollout could not be judged")]
    Verify(#[from] ProbeError),
    /// A wait that came to its end.
    #[error(transparent)]
    Deadline(#[from] DeadlineExceeded),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl RolloutError {
    /// What the queue has to know.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Mcp(error) => error.class(),
            Self::Replay(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Record(error) => error.class(),
            Self::Verify(error) => error.class,
            Self::Deadline(_) | Self::Blocking(_) => ErrorClass::Infra,
        }
    }

    /// What a server said last that took the rollout down. Not for logs: it may quote what was said.
    pub fn last_words(&self) -> Option<&str> {
        match self {
            Self::Mcp(error) => error.last_words(),
            _ => None,
        }
    }
}
