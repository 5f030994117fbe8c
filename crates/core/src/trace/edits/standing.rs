//! What a log says of a trace as a whole. Needs the log alone, so that lists read no traces.

use std::collections::BTreeMap;

use super::patch::{Change, Judgement, Patch};
use crate::error::shorten;
use crate::trace::{CheckResult, RolloutSummary, Verdict};

/// Where the check of a person's own reward is said to stand.
const LABEL_PATH: &str = "label";

/// What patches say of a trace as a whole; of each kind, the newest that counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// Labels over those of the job; a removed one is none.
    pub labels: BTreeMap<String, Option<String>>,
    /// Accepted or rejected.
    pub judgement: Option<Judgement>,
    /// The verdict in place of the recorded one.
    pub verdict: Option<Verdict>,
    /// Whether it is left out of data sets.
    pub dropped: bool,
    /// Whether hints are kept; none: as the data set does.
    pub hints: Option<bool>,
}

impl Standing {
    /// What `log` says.
    pub fn of(log: &[Patch]) -> Self {
        let mut standing = Self::default();
        for (patch, _) in log.iter().zip(live(log)).filter(|(_, live)| *live) {
            standing.take(patch);
        }
        standing
    }

    /// Takes over what one patch says.
    pub(super) fn take(&mut self, patch: &Patch) {
        match &patch.change {
            Change::Verdict { verdict } => self.verdict = Some(verdict.clone()),
            Change::Hints { keep } => self.hints = Some(*keep),
            Change::Drop => self.dropped = true,
            Change::Undrop => self.dropped = false,
            Change::Label {
                labels,
                judgement,
                reward,
            } => {
                self.labels
                    .extend(labels.iter().map(|(k, v)| (k.clone(), v.clone())));
                self.judgement = judgement.or(self.judgement);
                if let Some(reward) = *reward {
                    self.verdict = Some(by_hand(patch, reward));
                }
            }
            Change::Edit { .. } | Change::Join { .. } | Change::Undo { .. } => {}
        }
    }

    /// `recorded` with the labels of the log over them.
    pub fn labels_over(&self, recorded: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut labels = recorded.clone();
        for (key, value) in &self.labels {
            match value {
                Some(value) => labels.insert(key.clone(), value.clone()),
                None => labels.remove(key),
            };
        }
        labels
    }

    /// Whether it may stand in a data set: neither dropped nor rejected.
    pub fn is_wanted(&self) -> bool {
        !self.dropped && self.judgement != Some(Judgement::Rejected)
    }

    /// Corrects what tables show of the trace.
    pub fn correct(&self, summary: &mut RolloutSummary) {
        let Some(verdict) = &self.verdict else {
            return;
        };
        let unmet = verdict.checks.iter().find(|check| check.score < 1.0);
        summary.reward = Some(verdict.reward);
        summary.reason = unmet.map(|c| shorten(&c.reason)).unwrap_or_default();
    }
}

/// A reward that a person gave, as the verdict of one check.
fn by_hand(patch: &Patch, reward: f64) -> Verdict {
    let reason = match patch.why.as_str() {
        "" => format!("labelled by {}", patch.by),
        why => why.to_owned(),
    };
    let path = LABEL_PATH.to_owned();
    let score = reward;
    Verdict {
        reward,
        checks: vec![CheckResult {
            path,
            score,
            reason,
        }],
    }
}

/// Which patches count, one entry a patch: those that no later patch which counts takes back.
pub fn live(log: &[Patch]) -> Vec<bool> {
    live_of(&log.iter().collect::<Vec<_>>())
}

pub(super) fn live_of(log: &[&Patch]) -> Vec<bool> {
    let mut live = vec![true; log.len()];
    for (n, patch) in log.iter().enumerate().rev() {
        if let (true, Change::Undo { patch }) = (live[n], &patch.change)
            && let Ok(earlier) = usize::try_from(*patch)
            && earlier < n
        {
            live[earlier] = false;
        }
    }
    live
}
