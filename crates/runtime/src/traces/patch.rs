//! Corrections of a trace: what was published stays, and each correction lies beside it under a number of its own.

use espalier_core::time::Timestamp;
use espalier_core::trace::{Outcome, RolloutSummary, SCHEMA_VERSION, Verdict};
use serde::{Deserialize, Serialize};

/// One correction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Patch {
    /// The trace schema that it speaks of.
    pub schema_version: u32,
    /// What is different.
    #[serde(flatten)]
    pub change: Change,
    /// When it was made.
    pub at_us: Timestamp,
    /// Who or what made it, such as `espalier traces reverify`.
    pub by: String,
}

/// What a correction changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Change {
    /// Another verdict in place of the recorded one.
    Verdict {
        /// The verdict that counts.
        verdict: Verdict,
    },
}

impl Patch {
    /// A new verdict.
    pub fn verdict(verdict: Verdict, by: impl Into<String>, at_us: Timestamp) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            change: Change::Verdict { verdict },
            at_us,
            by: by.into(),
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let patch: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if patch.schema_version != SCHEMA_VERSION {
            let found = patch.schema_version;
            return Err(format!(
                "`schema_version` must be {SCHEMA_VERSION}, got `{found}`"
            ));
        }
        Ok(patch)
    }

    pub(super) fn correct_outcome(&self, outcome: &mut Outcome) {
        match &self.change {
            Change::Verdict { verdict } => outcome.verdict = Some(verdict.clone()),
        }
    }

    pub(super) fn correct_summary(&self, summary: &mut RolloutSummary) {
        match &self.change {
            Change::Verdict { verdict } => {
                let unmet = verdict.checks.iter().find(|check| check.score < 1.0);
                summary.reward = Some(verdict.reward);
                summary.reason = unmet.map(|c| c.reason.clone()).unwrap_or_default();
            }
        }
    }
}
