//! Tools without their servers: what recorded rollouts answer to a call. Pure; the worker reads traces and answers.
//!
//! The rule: the state of a rollout is the list of calls that were run in it so far, by offered name and arguments. The
//! recordings that made just these calls in this order, and then the one that is asked for, can answer it. Of several the
//! one answers whose own answers have been those of this rollout for longest, and of those that are alike in this the first
//! in the order in which they were named: so a rollout stays in the world of one recording for as long as that goes. A call
//! that none of them made in this state was never recorded.
//!
//! Arguments are compared as JSON: the order of keys does not count, nor whether a whole number is written as 1 or 1.0.
//! Calls that were not run, because there is no such tool or somebody said no, change no world and do not count. What a
//! check asks of the world at the end is known where a recording with servers made just the calls of this rollout and no
//! more: its verdict was found in the same state.

use std::cmp::Reverse;

use serde_json::{Map, Number, Value};

use super::{BlobRef, CheckResult, Decision, Trace, Verdict};
use crate::spec::{Verify, VerifyDraft};

/// Whole numbers up to this are exact as `f64`.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// A call as it was recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedCall {
    /// The offered name.
    pub name: String,
    /// The whole result.
    pub answer: BlobRef,
    /// In the form in which they are compared.
    arguments: Box<str>,
}

/// What is kept of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    calls: Vec<RecordedCall>,
    end: Option<RecordedEnd>,
}

/// The state in which a recording was judged.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedEnd {
    /// Address of the browser's page.
    pub final_url: Option<String>,
    checks: Vec<(Verify, CheckResult)>,
}

impl Recording {
    /// The calls of a trace up to the first one whose result was not kept, and how it was judged after the last. A trace
    /// that was itself replayed tells no end: its verdict may take what nobody found out for what was found.
    pub fn of(trace: &Trace) -> Self {
        let was_run = |decision| matches!(decision, Decision::Allowed | Decision::Approved);
        let ran = trace
            .tool_calls
            .iter()
            .filter(|call| was_run(call.decision));
        let mut calls = Vec::new();
        let mut is_end = trace.header.provenance.replay.is_empty();
        for call in ran {
            let Some(answer) = call.raw.clone() else {
                is_end = false;
                break;
            };
            calls.push(RecordedCall {
                name: call.name.clone(),
                answer,
                arguments: canonical(&call.arguments),
            });
        }
        let checks = checks(trace.header.verify.as_ref(), trace.outcome.verdict.as_ref());
        let end = RecordedEnd {
            final_url: trace.outcome.final_url.clone(),
            checks,
        };
        Self {
            calls,
            end: is_end.then_some(end),
        }
    }

    /// The memory that its calls take, in bytes.
    pub fn bytes(&self) -> usize {
        let each = self.calls.iter().map(|call| {
            let answer = call.answer.sha256.len() + call.answer.media_type.len();
            size_of::<RecordedCall>() + call.name.len() + call.arguments.len() + answer
        });
        each.sum()
    }
}

/// The checks of a verdict with what they found: a tree is judged leaf by leaf, each leaf once.
fn checks(draft: Option<&VerifyDraft>, verdict: Option<&Verdict>) -> Vec<(Verify, CheckResult)> {
    let Some((Ok(verify), verdict)) = draft.map(VerifyDraft::check).zip(verdict) else {
        return Vec::new();
    };
    let leaves = verify.leaves();
    if leaves.len() != verdict.checks.len() {
        return Vec::new();
    }
    let leaves = leaves.into_iter().cloned();
    leaves.zip(verdict.checks.iter().cloned()).collect()
}

impl RecordedEnd {
    /// What the same check found here.
    pub fn found(&self, check: &Verify) -> Option<&CheckResult> {
        let found = self.checks.iter().find(|(known, _)| known == check);
        found.map(|(_, result)| result)
    }
}

/// Recordings, and how far a rollout has come in them.
#[derive(Clone, Debug)]
pub struct Replay {
    recordings: Vec<Recording>,
    /// Those that made the calls of the rollout so far, in order.
    followed: Vec<Followed>,
    /// Calls so far.
    made: usize,
}

/// A recording that made the same calls so far.
#[derive(Clone, Copy, Debug)]
struct Followed {
    recording: usize,
    /// How many of its answers, from the first on, are those that the rollout was given.
    alike: usize,
}

impl Replay {
    /// At the beginning of all `recordings`.
    pub fn new(recordings: Vec<Recording>) -> Self {
        let followed = (0..recordings.len()).map(|recording| Followed {
            recording,
            alike: 0,
        });
        Self {
            followed: followed.collect(),
            recordings,
            made: 0,
        }
    }

    /// What answers the next call; none where it was never recorded, and then nothing follows.
    pub fn call(&mut self, name: &str, arguments: &Map<String, Value>) -> Option<&RecordedCall> {
        let arguments = canonical(arguments);
        let (recordings, made) = (&self.recordings, self.made);
        let next = |followed: &Followed| {
            let next = recordings[followed.recording].calls.get(made);
            next.filter(|call| call.name == name && call.arguments == arguments)
        };
        self.followed.retain(|followed| next(followed).is_some());
        self.made += 1;
        let answer = closest(&self.followed).and_then(next)?;
        for followed in &mut self.followed {
            let is_same = next(followed).is_some_and(|call| call.answer == answer.answer);
            if followed.alike == made && is_same {
                followed.alike += 1;
            }
        }
        Some(answer)
    }

    /// The state that the rollout is in, where a recording was judged in it.
    pub fn end(&self) -> Option<&RecordedEnd> {
        let ended = |followed: &&Followed| {
            let recording = &self.recordings[followed.recording];
            recording.calls.len() == self.made && recording.end.is_some()
        };
        let followed: Vec<Followed> = self.followed.iter().filter(ended).copied().collect();
        let closest = closest(&followed)?;
        self.recordings[closest.recording].end.as_ref()
    }
}

/// The one that answered as the rollout was answered for longest; of several the first.
fn closest(followed: &[Followed]) -> Option<&Followed> {
    followed.iter().min_by_key(|one| Reverse(one.alike))
}

/// Whether a tool is called with the same arguments.
pub fn same_arguments(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    canonical(one) == canonical(other)
}

/// The same arguments as the same text: keys are sorted, and whole numbers are written as such.
fn canonical(arguments: &Map<String, Value>) -> Box<str> {
    sorted(arguments).to_string().into()
}

fn sorted(fields: &Map<String, Value>) -> Value {
    let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
    fields.sort_by_key(|(name, _)| *name);
    let fields = fields.into_iter();
    let fields = fields.map(|(name, value)| (name.clone(), in_one_form(value)));
    Value::Object(fields.collect())
}

fn in_one_form(value: &Value) -> Value {
    match value {
        Value::Number(number) => Value::Number(whole(number)),
        Value::Array(items) => items.iter().map(in_one_form).collect(),
        Value::Object(fields) => sorted(fields),
        other => other.clone(),
    }
}

fn whole(number: &Number) -> Number {
    match number.as_f64() {
        Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < EXACT_MAX => {
            Number::from(float as i64)
        }
        _ => number.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::ReplaySource;
    use super::*;

    const TRACE: &str = include_str!("../../tests/golden/trace-v1.json");

    /// A recording of calls with their answers, which ended at a page of its name.
    fn recording(name: &str, calls: &[(&str, Value, &str)]) -> Recording {
        let call = |(tool, arguments, answer): &(&str, Value, &str)| RecordedCall {
            name: (*tool).to_owned(),
            answer: BlobRef {
                sha256: (*answer).to_owned(),
                size: 1,
                media_type: "application/json".to_owned(),
            },
            arguments: canonical(arguments.as_object().unwrap()),
        };
        Recording {
            calls: calls.iter().map(call).collect(),
            end: Some(RecordedEnd {
                final_url: Some(name.to_owned()),
                checks: Vec::new(),
            }),
        }
    }

    fn ask(replay: &mut Replay, name: &str, arguments: &Value) -> Option<String> {
        let answer = replay.call(name, arguments.as_object().unwrap())?;
        Some(answer.answer.sha256.clone())
    }

    fn end(replay: &Replay) -> Option<&str> {
        replay.end()?.final_url.as_deref()
    }

    #[test]
    fn the_same_call_is_answered_by_the_state_that_it_is_made_in() {
        let (read, write) = (json!({}), json!({"n": 1}));
        let calls = [
            ("read", read.clone(), "empty"),
            ("write", write.clone(), "ok"),
            ("read", read.clone(), "one"),
        ];
        let mut replay = Replay::new(vec![recording("a", &calls)]);
        assert_eq!(
            end(&replay),
            None,
            "nobody was judged before the first call"
        );
        assert_eq!(ask(&mut replay, "read", &read).as_deref(), Some("empty"));
        assert_eq!(ask(&mut replay, "write", &write).as_deref(), Some("ok"));
        assert_eq!(end(&replay), None);
        assert_eq!(ask(&mut replay, "read", &read).as_deref(), Some("one"));
        assert_eq!(end(&replay), Some("a"));
        assert_eq!(
            ask(&mut replay, "read", &read),
            None,
            "it was never read a third time"
        );
        assert_eq!(end(&replay), None);

        let mut replay = Replay::new(vec![recording("a", &calls)]);
        assert_eq!(
            ask(&mut replay, "write", &write),
            None,
            "it was never written first"
        );
        assert_eq!(ask(&mut replay, "read", &read), None, "nothing follows");
    }

    #[test]
    fn recordings_branch_where_their_calls_differ() {
        let open = |page: &str| ("open", json!({"page": page}), "home");
        let worlds = vec![
            recording(
                "a",
                &[open("home"), ("open", json!({"page": "shop"}), "shop")],
            ),
            recording(
                "b",
                &[open("home"), ("open", json!({"page": "cart"}), "cart")],
            ),
            recording("c", &[]),
        ];
        let mut replay = Replay::new(worlds);
        assert_eq!(end(&replay), Some("c"));
        assert_eq!(
            ask(&mut replay, "open", &json!({"page": "home"})).as_deref(),
            Some("home")
        );
        assert_eq!(
            ask(&mut replay, "open", &json!({"page": "cart"})).as_deref(),
            Some("cart")
        );
        assert_eq!(end(&replay), Some("b"));
    }

    #[test]
    fn a_rollout_stays_in_one_world_while_it_can() {
        let (look, go, back) = (json!({}), json!({"to": 1}), json!({"to": 0}));
        let worlds = || {
            vec![
                recording(
                    "a",
                    &[("look", look.clone(), "at nine"), ("go", go.clone(), "a1")],
                ),
                recording(
                    "b",
                    &[
                        ("look", look.clone(), "at ten"),
                        ("go", go.clone(), "b1"),
                        ("go", back.clone(), "b0"),
                    ],
                ),
                recording(
                    "c",
                    &[("look", look.clone(), "at nine"), ("go", go.clone(), "c1")],
                ),
            ]
        };
        let mut replay = Replay::new(worlds());
        assert_eq!(ask(&mut replay, "look", &look).as_deref(), Some("at nine"));
        assert_eq!(ask(&mut replay, "go", &go).as_deref(), Some("a1"));
        assert_eq!(end(&replay), Some("a"));
        assert_eq!(
            ask(&mut replay, "go", &back).as_deref(),
            Some("b0"),
            "that one alone went back"
        );
        let mut other = worlds();
        other.swap(0, 1);
        let mut replay = Replay::new(other);
        assert_eq!(ask(&mut replay, "look", &look).as_deref(), Some("at ten"));
        assert_eq!(ask(&mut replay, "go", &go).as_deref(), Some("b1"));
    }

    #[test]
    fn arguments_are_compared_as_json() {
        let recorded = json!({"a": 1.0, "b": {"c": [1, 2.5], "d": null}});
        let answer = |arguments: &Value| {
            let calls = [("t", recorded.clone(), "yes")];
            ask(
                &mut Replay::new(vec![recording("a", &calls)]),
                "t",
                arguments,
            )
        };
        assert!(answer(&json!({"b": {"d": null, "c": [1.0, 2.5]}, "a": 1})).is_some());
        for other in [
            json!({"a": 1, "b": {"c": [2.5, 1], "d": null}}),
            json!({"a": "1", "b": {"c": [1, 2.5], "d": null}}),
            json!({"a": 1, "b": {"c": [1, 2.5]}}),
            json!({"a": 1, "b": {"c": [1, 2.5], "d": null}, "e": 1}),
        ] {
            assert_eq!(answer(&other), None, "{other}");
        }
        let mut replay = Replay::new(vec![recording("a", &[("t", recorded.clone(), "yes")])]);
        assert_eq!(ask(&mut replay, "u", &recorded), None, "another tool");
    }

    #[test]
    fn calls_that_were_not_run_do_not_count_and_a_lost_answer_ends_a_recording() {
        let mut trace = Trace::from_json(TRACE.as_bytes()).unwrap();
        let first = trace.tool_calls.iter().find(|call| call.raw.is_some());
        let ran = first.unwrap().clone();
        let with = |decision| {
            let mut call = ran.clone();
            call.decision = decision;
            call
        };
        trace.tool_calls = vec![
            with(Decision::Unknown),
            with(Decision::Allowed),
            with(Decision::Rejected),
        ];
        let whole = Recording::of(&trace);
        assert_eq!(
            (whole.calls.len(), whole.calls[0].name.as_str()),
            (1, &*ran.name)
        );
        let verify = trace.header.verify.as_ref().unwrap().check().unwrap();
        let verdict = trace.outcome.verdict.clone().unwrap();
        let end = whole.end.unwrap();
        for (leaf, result) in verify.leaves().into_iter().zip(&verdict.checks) {
            assert_eq!(end.found(leaf), Some(result));
        }
        assert!(!verdict.checks.is_empty());
        trace.tool_calls.push(with(Decision::Approved));
        trace.tool_calls[3].raw = None;
        trace.tool_calls.push(with(Decision::Approved));
        let cut = Recording::of(&trace);
        assert_eq!((cut.calls.len(), cut.end), (1, None));
    }

    #[test]
    fn a_replayed_rollout_tells_what_was_answered_and_not_how_it_ended() {
        let mut trace = Trace::from_json(TRACE.as_bytes()).unwrap();
        trace.tool_calls.retain(|call| call.raw.is_some());
        let first = Recording::of(&trace);
        assert!(first.end.is_some());
        trace.header.provenance.replay = vec![ReplaySource {
            job: trace.header.job.clone(),
            sha256: String::new(),
        }];
        let second = Recording::of(&trace);
        assert_eq!((second.calls, second.end), (first.calls, None));
    }
}
