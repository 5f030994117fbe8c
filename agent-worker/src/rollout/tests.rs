//! The loop against a real MCP server and a model endpoint that plays a script.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use espalier_core::chat::Message;
use espalier_core::error::ErrorClass;
use espalier_core::id::{Fence, JobKey};
use espalier_core::spec::JobSpec;
use espalier_core::trace::{Decision, Outcome, StopReason};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::record::Recorder;
use crate::testing::{World, calls, is_cut, job, says};

/// Answers every question alike and keeps them.
struct Answers(bool, Mutex<Vec<String>>);

impl Approver for &Answers {
    async fn approve(&self, question: Question<'_>) -> bool {
        self.1.lock().unwrap().push(question.tool.to_owned());
        self.0
    }
}

/// What a rollout left behind.
pub(super) struct Ran {
    pub(super) outcome: Result<Outcome, RolloutError>,
    pub(super) recorder: Recorder,
}

impl Ran {
    pub(super) fn outcome(&self) -> &Outcome {
        self.outcome.as_ref().unwrap()
    }

    pub(super) fn shown(&self) -> Vec<&str> {
        let messages = self.recorder.messages().iter();
        let tools = messages.filter(|message| matches!(message, Message::Tool { .. }));
        tools.map(Message::content).collect()
    }
}

async fn recorder(world: &World, key: &str) -> Recorder {
    // No two attempts at a job have the same fence, and the folder of one is removed when its last task ends.
    static FENCES: AtomicU64 = AtomicU64::new(1);
    let fence = Fence(FENCES.fetch_add(1, Ordering::Relaxed));
    let key: JobKey = key.parse().unwrap();
    Recorder::open(world.record.clone(), key, 1, fence, None)
        .await
        .unwrap()
}

fn order<'a>(spec: &'a JobSpec, verify: Option<&'a VerifyDraft>) -> Order<'a> {
    Order {
        spec: spec.rollout().unwrap(),
        verify,
        labels: &spec.labels,
    }
}

async fn roll(world: &World, fields: Value) -> Ran {
    roll_with(world, fields, &Answers(true, Mutex::default())).await
}

async fn roll_with(world: &World, fields: Value, answers: &Answers) -> Ran {
    roll_in(recorder(world, "p/b/j").await, world, fields, answers).await
}

/// A rollout of a job of that name.
pub(super) async fn roll_as(world: &World, key: &str, fields: Value) -> Ran {
    let answers = Answers(true, Mutex::default());
    roll_in(recorder(world, key).await, world, fields, &answers).await
}

async fn roll_in(mut recorder: Recorder, world: &World, fields: Value, answers: &Answers) -> Ran {
    let (draft, spec) = job(fields);
    let order = order(&spec, draft.verify.as_ref());
    let mut conversation = Scripted::new(spec.rollout().unwrap().prompts.clone(), answers);
    let cancel = CancellationToken::new();
    let outcome = run(
        &world.services,
        order,
        &mut recorder,
        &mut conversation,
        cancel,
    )
    .await;
    Ran { outcome, recorder }
}

#[tokio::test]
async fn a_rollout_over_two_user_turns_is_judged() {
    let world = World::new().await;
    world.model.will([
        calls(&[("add", r#"{"a": 2, "b": 3}"#), ("echo", r#"{"text": "x"}"#)]),
        says("it is 5"),
        says("bye 5"),
    ]);
    let ran = roll(
        &world,
        json!({"prompt": ["add", "thanks"], "system": "be brief", "hints": "use add",
            "verify": {"all": [{"answer": {"contains": "5"}}, {"tool_called": {"name": "add"}}]}}),
    )
    .await;
    let outcome = ran.outcome();
    assert_eq!(outcome.stop, StopReason::Answered);
    assert_eq!(outcome.verdict.as_ref().unwrap().reward, 1.0);
    assert_eq!(outcome.final_url, None);
    let totals = outcome.totals;
    assert_eq!(
        (totals.turns, totals.tool_calls, totals.tool_errors),
        (3, 2, 0)
    );
    assert_eq!((totals.prompt_tokens, totals.completion_tokens), (300, 30));
    let roles: Vec<&str> = ran.recorder.messages().iter().map(Message::role).collect();
    assert_eq!(
        roles,
        [
            "system",
            "system",
            "user",
            "assistant",
            "tool",
            "tool",
            "assistant",
            "user",
            "assistant"
        ]
    );
    assert_eq!(ran.shown(), ["5", "x"]);
    assert_eq!(ran.recorder.tool_calls()[0].server.as_deref(), Some("toy"));

    let asked = world.model.asked();
    assert_eq!(asked[0]["messages"][0]["content"], "be brief\n\nuse add");
    assert_eq!(asked[0]["tool_choice"], "auto");
    assert_eq!(asked[0]["chat_template_kwargs"]["enable_thinking"], true);
    assert_eq!(asked[1]["messages"][2]["reasoning_content"], "hm");
    assert_eq!(
        asked[1]["messages"][2]["content"], "",
        "whitespace alone is no content"
    );
    assert_eq!(asked[1]["messages"][3]["tool_call_id"], "c0-add");
}

#[tokio::test]
async fn what_the_model_does_wrong_is_told_to_it() {
    let world = World::new().await;
    world.model.will([
        calls(&[
            ("subtract", "{}"),
            ("add", "{\"a\": 1,"),
            ("fail", "{}"),
            ("empty", "{}"),
            ("long", "{}"),
            ("echo", "{}"),
        ]),
        says("sorry"),
    ]);
    let ran = roll(
        &world,
        json!({"limits": {"tool_calls_per_turn": 5}, "observation": {"max_tokens": 100}}),
    )
    .await;
    assert_eq!(ran.outcome().stop, StopReason::Answered);
    let shown = ran.shown();
    assert_eq!(shown[0], "Tool subtract not found");
    assert!(shown[1].contains("not valid JSON"), "{}", shown[1]);
    assert_eq!(shown[2..4], ["no such page", "(empty tool result)"]);
    assert!(
        shown[4].len() < 700 && shown[4].contains("more characters"),
        "{}",
        shown[4]
    );
    assert!(shown[5].contains("at most 5 tool calls"));
    let records = ran.recorder.tool_calls();
    let decisions: Vec<Decision> = records.iter().map(|record| record.decision).collect();
    use Decision::{Allowed, Malformed, OverLimit, Unknown};
    assert_eq!(
        decisions,
        [Unknown, Malformed, Allowed, Allowed, Allowed, OverLimit]
    );
    let errors: Vec<bool> = records.iter().map(|record| record.is_error).collect();
    assert_eq!(errors, [true, true, true, false, false, true]);
    assert!(records[4].truncated && records[4].raw.as_ref().unwrap().size > 25_000);
    assert_eq!(ran.outcome().totals.tool_errors, 4);
}

#[tokio::test]
async fn questions_are_asked_and_a_no_is_told_to_the_model() {
    let world = World::new().await;
    let asks = json!({"tools": {"ask": ["add"]}});
    for (yes, shown, decision) in [
        (true, "5", Decision::Approved),
        (false, "User rejected tool call.", Decision::Rejected),
    ] {
        world
            .model
            .will([calls(&[("add", r#"{"a": 2, "b": 3}"#)]), says("ok")]);
        let answers = Answers(yes, Mutex::default());
        let ran = roll_with(&world, asks.clone(), &answers).await;
        assert_eq!(ran.shown(), [shown]);
        assert_eq!(ran.recorder.tool_calls()[0].decision, decision);
        assert_eq!(*answers.1.lock().unwrap(), ["add"]);
    }
}

#[tokio::test]
async fn each_limit_stops_the_rollout_with_its_reason() {
    let world = World::new().await;
    let adds = || calls(&[("add", r#"{"a": 1, "b": 1}"#)]);
    world.model.will([adds(), adds()]);
    let ran = roll(&world, json!({"limits": {"turns": 2}})).await;
    assert_eq!(ran.outcome().stop, StopReason::TurnLimit);
    assert_eq!(ran.shown(), ["2", "2"], "the last turn's calls still run");

    world.model.will([adds()]);
    let ran = roll(&world, json!({"limits": {"tokens": 110}})).await;
    assert_eq!(ran.outcome().stop, StopReason::TokenLimit);

    world.model.will([is_cut("and so on and")]);
    let ran = roll(&world, json!({})).await;
    assert_eq!(ran.outcome().stop, StopReason::CutAnswer);

    world.model.hang();
    let ran = roll(
        &world,
        json!({"limits": {"wall_s": 1}, "verify": {"answer": {"contains": "x"}}}),
    )
    .await;
    assert_eq!(ran.outcome().stop, StopReason::TimeLimit);
    assert_eq!(ran.outcome().verdict.as_ref().unwrap().reward, 0.0);
}

#[tokio::test]
async fn a_slow_tool_is_an_error_for_the_model_and_a_dead_server_one_of_the_attempt() {
    let world = World::new().await;
    world.model.will([calls(&[("sleep", "{}")]), says("slow")]);
    let ran = roll(&world, json!({"limits": {"tool_call_s": 1}})).await;
    assert_eq!(ran.outcome().stop, StopReason::Answered);
    assert!(
        ran.shown()[0].contains("sleep did not end within"),
        "{:?}",
        ran.shown()
    );
    assert!(ran.recorder.tool_calls()[0].is_error);

    world.model.will([calls(&[("die", "{}")])]);
    let ran = roll(&world, json!({})).await;
    let error = ran.outcome.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(matches!(error, RolloutError::Mcp(_)), "{error:?}");
}

#[tokio::test]
async fn a_model_that_fails_for_good_is_an_error_of_the_attempt() {
    let world = World::new().await;
    world.model.will([json!(503), json!(503)]);
    let ran = roll(&world, json!({})).await;
    assert_eq!(ran.outcome.unwrap_err().class(), ErrorClass::Infra);

    let unknown = roll(&world, json!({"mcp": ["nowhere"]})).await;
    assert_eq!(unknown.outcome.unwrap_err().class(), ErrorClass::Invalid);
}

#[tokio::test]
async fn cancelling_ends_a_rollout_at_once() {
    let world = World::new().await;
    world.model.hang();
    let (_, spec) = job(json!({}));
    let mut recorder = recorder(&world, "p/b/j").await;
    let order = order(&spec, None);
    let answers = Answers(true, Mutex::default());
    let mut conversation = Scripted::new(spec.rollout().unwrap().prompts.clone(), &answers);
    let cancel = CancellationToken::new();
    let running = run(
        &world.services,
        order,
        &mut recorder,
        &mut conversation,
        cancel.clone(),
    );
    let asked = async {
        while world.model.asked().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
        std::time::Instant::now()
    };
    let (outcome, cancelled) = futures::join!(running, asked);
    assert_eq!(outcome.unwrap_err().class(), ErrorClass::Cancelled);
    assert!(
        cancelled.elapsed() < Duration::from_secs(2),
        "{:?}",
        cancelled.elapsed()
    );
    assert_eq!(
        world.services.mcp.process_ids(),
        Vec::<i32>::new(),
        "its server is gone"
    );
}

/// A person who says one thing and leaves as soon as a tool runs.
struct Leaver {
    said: bool,
    left: CancellationToken,
}

impl Conversation for Leaver {
    async fn next_turn(&mut self) -> UserTurn {
        match std::mem::replace(&mut self.said, true) {
            false => UserTurn::Say("wait for it".to_owned()),
            true => UserTurn::Done(StopReason::UserExit),
        }
    }

    async fn approve(&mut self, _: Question<'_>) -> bool {
        true
    }

    async fn hung_up(&self) {
        self.left.cancelled().await;
    }

    fn see(&mut self, seen: Seen<'_>) {
        if let Seen::ToolCalled { .. } = seen {
            self.left.cancel();
        }
    }
}

#[tokio::test]
async fn a_person_who_leaves_in_the_middle_leaves_a_whole_trace() {
    let world = World::new().await;
    world
        .model
        .will([calls(&[("sleep", "{}"), ("echo", "{}")])]);
    let (_, spec) = job(json!({}));
    let mut recorder = recorder(&world, "local/chat/1").await;
    let order = order(&spec, None);
    let mut person = Leaver {
        said: false,
        left: CancellationToken::new(),
    };
    let cancel = CancellationToken::new();
    let outcome = run(&world.services, order, &mut recorder, &mut person, cancel).await;
    let outcome = outcome.unwrap();
    assert_eq!(outcome.stop, StopReason::UserExit);
    assert_eq!(outcome.totals.tool_calls, 1);
    let published = recorder
        .publish(outcome, &espalier_runtime::publish::NoLease)
        .await;
    assert_eq!(
        published.unwrap().summary.rollout().unwrap().stop,
        StopReason::UserExit
    );
}

#[tokio::test]
async fn a_server_that_stands_still_when_the_time_is_up_is_no_failure_of_the_attempt() {
    let world = World::new().await;
    world
        .model
        .will([calls(&[("block", "{}"), ("echo", "{}")])]);
    let ran = roll(&world, json!({"limits": {"wall_s": 1}})).await;
    assert_eq!(ran.outcome().stop, StopReason::TimeLimit);
    assert_eq!(ran.shown().len(), 1, "{:?}", ran.shown());
    assert!(ran.recorder.tool_calls()[0].is_error);
}

#[tokio::test]
async fn checks_that_can_never_be_answered_are_refused_before_the_model_is_called() {
    let world = World::new().await;
    for verify in [
        json!({"http": {"url": "http://judge.example/"}}),
        json!({"any": [{"answer": {"contains": "x"}}, {"page": {"script": "() => true"}}]}),
    ] {
        let ran = roll(&world, json!({"verify": verify})).await;
        assert_eq!(ran.outcome.unwrap_err().class(), ErrorClass::Invalid);
    }
    assert_eq!(world.model.asked().len(), 0);
}

#[tokio::test]
async fn an_endpoint_that_counts_wrongly_or_not_at_all_is_no_way_around_the_limit() {
    let world = World::new().await;
    let mut huge = calls(&[("add", r#"{"a": 1, "b": 1}"#)]);
    huge["usage"] = json!({"prompt_tokens": u64::MAX, "completion_tokens": u64::MAX});
    world.model.will([huge]);
    let ran = roll(&world, json!({})).await;
    assert_eq!(ran.outcome().stop, StopReason::TokenLimit);

    let mut uncounted = calls(&[("add", r#"{"a": 1, "b": 1}"#)]);
    uncounted["usage"] = Value::Null;
    uncounted["prompt_token_ids"] = json!([1, 2, 3]);
    uncounted["choices"][0]["token_ids"] = json!([4, 5]);
    world.model.will([uncounted]);
    let ran = roll(&world, json!({"limits": {"tokens": 5}})).await;
    assert_eq!(ran.outcome().stop, StopReason::TokenLimit);
    assert_eq!(ran.outcome().totals.completion_tokens, 2);

    let mut silent = calls(&[("add", r#"{"a": 1, "b": 1}"#)]);
    silent["usage"] = Value::Null;
    world.model.will([silent]);
    let ran = roll(&world, json!({"limits": {"tokens": 5}})).await;
    assert_eq!(ran.outcome().stop, StopReason::TokenLimit);
    let totals = ran.outcome().totals;
    assert!(
        totals.prompt_tokens > 5 && totals.completion_tokens > 5,
        "{totals:?}"
    );
}
