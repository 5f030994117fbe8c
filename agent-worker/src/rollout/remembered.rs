//! Checks of a rollout whose servers are recordings: what asks the world is answered by the verdict of a recording that
//! ended in the same state, and what nobody found out stays open.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use espalier_core::error::ErrorClass;
use espalier_core::spec::Verify;
use espalier_core::trace::Verdict;
use espalier_core::trace::replay::RecordedEnd;
use serde_json::{Map, Value};

use super::probes::Asked;
use crate::verify::{Evidence, ProbeError, Probes, judge};

/// Judges a rollout that ended like the recording of `end`, if there is one; `hooks` asks services on. None where the
/// verdict hangs on a check that was never recorded: it differs between that check holding and not holding.
pub(super) async fn judge_recorded(
    verify: &Verify,
    evidence: &Evidence<'_>,
    end: Option<&RecordedEnd>,
    hooks: Asked<'_>,
) -> Result<Option<Verdict>, ProbeError> {
    let answers = Mutex::default();
    let remembered = |otherwise| Remembered {
        end,
        otherwise,
        hooks,
        answers: &answers,
    };
    let worst = judge(verify, evidence, &remembered(0.0)).await?;
    if verify.leaves().iter().all(|leaf| remembered(0.0).has(leaf)) {
        return Ok(Some(worst));
    }
    let best = judge(verify, evidence, &remembered(1.0)).await?;
    Ok((worst.reward == best.reward).then_some(worst))
}

/// What was found in the same state.
struct Remembered<'a> {
    end: Option<&'a RecordedEnd>,
    /// The score of a check that was never recorded.
    otherwise: f64,
    hooks: Asked<'a>,
    /// What hooks said, by their addresses: each is told the same of the rollout however often it is judged.
    answers: &'a Mutex<Answers>,
}

type Answers = BTreeMap<String, Result<Value, ProbeError>>;

impl Remembered<'_> {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the check can be made: it asks no world, or was made in the same state.
    fn has(&self, check: &Verify) -> bool {
        match check {
            Verify::Url(_) => self.end.is_some(),
            Verify::Page { .. } | Verify::Mcp(_) => {
                self.end.is_some_and(|end| end.found(check).is_some())
            }
            _ => true,
        }
    }
}

impl Probes for Remembered<'_> {
    fn known(&self, check: &Verify) -> Option<(f64, String)> {
        if !self.has(check) {
            let reason = "no recording was judged in this state".to_owned();
            return Some((self.otherwise, reason));
        }
        match check {
            Verify::Page { .. } | Verify::Mcp(_) => {
                let found = self.end?.found(check)?;
                Some((found.score, found.reason.clone()))
            }
            _ => None,
        }
    }

    async fn page(&self, _: &str) -> Result<Value, ProbeError> {
        Err(refuse())
    }

    async fn mcp_tool(
        &self,
        _: &str,
        _: &str,
        _: &Map<String, Value>,
    ) -> Result<String, ProbeError> {
        Err(refuse())
    }

    async fn mcp_resource(&self, _: &str, _: &str) -> Result<String, ProbeError> {
        Err(refuse())
    }

    async fn http(&self, url: &str, body: &Value) -> Result<Value, ProbeError> {
        let known = self.lock().get(url).cloned();
        if let Some(known) = known {
            return known;
        }
        let answer = self.hooks.ask(url, body).await;
        self.lock().insert(url.to_owned(), answer.clone());
        answer
    }
}

/// Pages and servers are known or not known, and never asked.
fn refuse() -> ProbeError {
    ProbeError {
        class: ErrorClass::Invalid,
        message: "a recording cannot be asked".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use axum::http::StatusCode;
    use espalier_core::spec::VerifyDraft;
    use serde_json::json;
    use tokio::time::Instant;

    use super::super::probes::tests::hook;
    use super::*;

    #[tokio::test]
    async fn a_hook_is_asked_once_however_often_is_judged() {
        let (hooks, url, asked) = hook(StatusCode::OK, 0).await;
        let checks = json!({"all": [{"http": {"url": url}}, {"page": {"script": "() => true"}}]});
        let draft: VerifyDraft = serde_json::from_value(checks).unwrap();
        let verify = draft.check().unwrap();
        let evidence = Evidence {
            answer: "5",
            final_url: None,
            tool_calls: &[],
        };
        let hooks = Asked {
            hooks: &hooks,
            until: Instant::now() + Duration::from_secs(20),
        };
        let verdict = judge_recorded(&verify, &evidence, None, hooks).await;
        assert_eq!(verdict, Ok(None), "it hangs on the page");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }
}
