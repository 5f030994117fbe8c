//! One recorded turn: what the model says in its place, and how likely it finds what was said.
//!
//! The prompt is that of a rollout: the same messages on the wire, the same tools, the recording's own setting of thoughts.
//! The most likely token is drawn each time, so that an answer is the model's and not a seed's.

use std::sync::atomic::{AtomicBool, Ordering};

use espalier_core::chat::{Message, ToolCall, on_the_wire};
use espalier_core::compare::turns::{Said, TurnScore};
use espalier_core::spec::{Sampling, Verify};
use espalier_core::trace::Trace;
use espalier_core::trace::replay::same_arguments;
use espalier_runtime::model::{ChatRequest, ChatTurn, ModelError, RawToolCall};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::ScoreError;
use crate::rollout::{Services, parse_arguments};
use crate::verify::{ProbeError, answer_score};

/// Asks for the turns of one recorded rollout.
pub(super) struct Asked<'a> {
    services: &'a Services,
    trace: &'a Trace,
    hints: bool,
    model: &'a str,
    cancel: &'a CancellationToken,
    sampling: Sampling,
    /// The rollout's own checks of an answer.
    checks: Vec<Verify>,
    affinity: String,
    /// Whether the endpoint reads given turns, as far as it was asked.
    tells: AtomicBool,
}

impl<'a> Asked<'a> {
    /// With or without the hints of `trace`.
    pub(super) fn new(
        services: &'a Services,
        trace: &'a Trace,
        hints: bool,
        model: &'a str,
        cancel: &'a CancellationToken,
    ) -> Self {
        let verify = trace.header.verify.as_ref();
        let verify = verify.and_then(|draft| draft.check().ok());
        let leaves = verify.iter().flat_map(Verify::leaves);
        let checks = leaves.filter(|leaf| matches!(leaf, Verify::Answer(_)));
        Self {
            services,
            trace,
            hints,
            model,
            cancel,
            sampling: Sampling {
                temperature: 0.0,
                seed: None,
                ..trace.header.provenance.sampling.clone()
            },
            checks: checks.cloned().collect(),
            affinity: trace.header.job.to_string(),
            tells: AtomicBool::new(true),
        }
    }

    /// Indexes of the assistant's messages.
    pub(super) fn turns(&self) -> Vec<usize> {
        let messages = self.trace.messages.iter().enumerate();
        let turns = messages.filter(|(_, message)| message.role() == "assistant");
        turns.map(|(message, _)| message).collect()
    }

    /// What the model says in the place of the turn at `message`.
    pub(super) async fn score(&self, message: usize) -> Result<TurnScore, ScoreError> {
        let header = &self.trace.header;
        let task = header.task.task_id.clone();
        let task = task.unwrap_or_else(|| format!("{}/{}", header.job.batch, header.job.job));
        let mut score = TurnScore {
            trace: header.job.clone(),
            message,
            task,
            kind: header.task.task_kind.clone().unwrap_or_default(),
            said: None,
            logprob: None,
            tokens: (0, 0),
        };
        let before = self.before(message);
        let turn = match self.ask(&before, None).await {
            Err(ModelError::ContextLength { .. }) => return Ok(score),
            turn => turn?,
        };
        let usage = |turn: &ChatTurn| {
            turn.usage
                .map(|it| (it.prompt_tokens, it.completion_tokens))
        };
        score.tokens = usage(&turn).unwrap_or_default();
        let recorded = &self.trace.messages[message];
        score.said = Some(self.compare(recorded, &turn, message).await?);
        if self.tells.load(Ordering::Relaxed) {
            score.logprob = self.likelihood(&before, recorded, &turn).await?;
        }
        Ok(score)
    }

    /// What was recorded before a message, as the model is sent it.
    fn before(&self, message: usize) -> Vec<Message> {
        let is_shown = |message: &&Message| match message {
            Message::System { hint, .. } => self.hints || !hint,
            _ => true,
        };
        let before = self.trace.messages[..message].iter().filter(is_shown);
        on_the_wire(&before.cloned().collect::<Vec<_>>())
    }

    /// Asks for the turn after `messages`; with `forced`, for how likely that one is.
    async fn ask(
        &self,
        messages: &[Message],
        forced: Option<Value>,
    ) -> Result<ChatTurn, ModelError> {
        let mut extra = self.services.extra.clone();
        if let Some(turn) = forced {
            extra.insert("forced_message".to_owned(), turn);
            extra.insert("logprobs".to_owned(), Value::Bool(true));
        }
        let template = json!({"enable_thinking": self.sampling.thinking});
        let request = ChatRequest {
            model: self.model,
            messages,
            tools: &self.trace.header.tools,
            sampling: &self.sampling,
            extra: &extra,
            vllm_extra: &Map::from_iter([
                ("chat_template_kwargs".to_owned(), template),
                ("return_token_ids".to_owned(), Value::Bool(true)),
            ]),
            affinity: &self.affinity,
            project: self.trace.header.job.project.as_str(),
        };
        self.services.model.chat(&request, self.cancel).await
    }

    /// The mean log-probability of the recorded turn; none where it is not told. An endpoint that knows nothing of given
    /// turns says again what it `said` by itself, and is not asked again for this rollout. Whatever else goes wrong with one
    /// turn says nothing of the next.
    async fn likelihood(
        &self,
        before: &[Message],
        recorded: &Message,
        said: &ChatTurn,
    ) -> Result<Option<f64>, ScoreError> {
        let Some(turn) = as_forced(recorded, self.sampling.thinking) else {
            return Ok(None);
        };
        let told = match self.ask(before, Some(turn)).await {
            Ok(told) => told,
            Err(ModelError::ContextLength { .. } | ModelError::BadRequest { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let (content, calls) = parts(recorded);
        if told.content.trim() != content.trim() || calls_agree(calls, &told.tool_calls) != ALL {
            if says_again(said, &told) {
                self.tells.store(false, Ordering::Relaxed);
            }
            return Ok(None);
        }
        let logprobs = told.logprobs.filter(|logprobs| {
            let tokens = told.token_ids.as_ref().map(Vec::len);
            !logprobs.is_empty() && tokens.is_none_or(|tokens| tokens == logprobs.len())
        });
        Ok(logprobs.map(|logprobs| {
            let sum: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
            sum / logprobs.len() as f64
        }))
    }

    async fn compare(
        &self,
        recorded: &Message,
        turn: &ChatTurn,
        message: usize,
    ) -> Result<Said, ProbeError> {
        let (content, calls) = parts(recorded);
        if !calls.is_empty() {
            let (tools, arguments) = calls_agree(calls, &turn.tool_calls);
            return Ok(Said::Calls { tools, arguments });
        }
        let is_answer = turn.tool_calls.is_empty();
        let is_last = message + 1 == self.trace.messages.len();
        let same = is_answer
            && (turn.content.trim() == content.trim()
                || (is_last && self.same_to_checks(content, &turn.content).await?));
        Ok(Said::Answer { same })
    }

    /// Whether the rollout's checks find the same in both answers; not where it has none.
    async fn same_to_checks(&self, recorded: &str, said: &str) -> Result<bool, ProbeError> {
        for check in &self.checks {
            let Verify::Answer(rule) = check else {
                continue;
            };
            if answer_score(rule, recorded).await? != answer_score(rule, said).await? {
                return Ok(false);
            }
        }
        Ok(!self.checks.is_empty())
    }
}

/// Text and calls of an assistant's message.
fn parts(message: &Message) -> (&str, &[ToolCall]) {
    match message {
        Message::Assistant {
            content,
            tool_calls,
            ..
        } => (content, tool_calls),
        other => (other.content(), &[]),
    }
}

/// All is the same.
const ALL: (bool, bool) = (true, true);

/// Whether the same tools are called in the same order, and whether with the same arguments.
fn calls_agree(recorded: &[ToolCall], said: &[RawToolCall]) -> (bool, bool) {
    let names = recorded.iter().map(|call| &call.function.name);
    let tools = names.eq(said.iter().map(|call| &call.name));
    let same = |(recorded, said): (&ToolCall, &RawToolCall)| match &recorded.function.malformed {
        Some(text) => *text == said.arguments,
        None => parse_arguments(&said.arguments)
            .is_ok_and(|said| same_arguments(&recorded.function.arguments, &said)),
    };
    (tools, tools && recorded.iter().zip(said).all(same))
}

/// Whether an answer is the same as one before it, but for the ids of its calls.
fn says_again(before: &ChatTurn, answer: &ChatTurn) -> bool {
    let calls = |turn: &ChatTurn| -> Vec<(String, String)> {
        let calls = turn.tool_calls.iter().cloned();
        calls.map(|call| (call.name, call.arguments)).collect()
    };
    before.content == answer.content && calls(before) == calls(answer)
}

/// The turn as a server is given it. None where it cannot be told: arguments that were no JSON are written by no template.
fn as_forced(message: &Message, thinking: bool) -> Option<Value> {
    let (_, calls) = parts(message);
    if calls.iter().any(|call| call.function.malformed.is_some()) {
        return None;
    }
    let mut turn = serde_json::to_value(message).ok()?;
    if !thinking {
        // The prompt says that nothing is thought.
        turn.as_object_mut()?.remove("reasoning_content");
    }
    Some(turn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, arguments: &str) -> RawToolCall {
        RawToolCall {
            id: "x".to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        }
    }

    fn recorded(name: &str, arguments: &Value) -> ToolCall {
        ToolCall::new("c", name, arguments.as_object().cloned().unwrap())
    }

    #[test]
    fn calls_agree_by_tools_and_then_by_arguments() {
        let calls = [recorded("open", &json!({"url": "x", "n": 1}))];
        for (answer, expected) in [
            (
                vec![said("open", r#"{"n": 1.0, "url": "x"}"#)],
                (true, true),
            ),
            (vec![said("open", r#"{"n": 2, "url": "x"}"#)], (true, false)),
            (vec![said("open", "{\"n\"")], (true, false)),
            (
                vec![said("close", r#"{"n": 1, "url": "x"}"#)],
                (false, false),
            ),
            (vec![], (false, false)),
            (vec![said("open", "{}"), said("open", "{}")], (false, false)),
        ] {
            assert_eq!(calls_agree(&calls, &answer), expected, "{answer:?}");
        }
        let mut broken = recorded("open", &json!({}));
        broken.function.malformed = Some("{\"n\"".to_owned());
        assert_eq!(
            calls_agree(&[broken.clone()], &[said("open", "{\"n\"")]),
            ALL
        );
        assert_eq!(
            calls_agree(&[broken.clone()], &[said("open", "{}")]),
            (true, false)
        );
        let turn = Message::assistant(String::new(), None, vec![broken]);
        assert_eq!(as_forced(&turn, true), None);
    }

    #[test]
    fn who_reads_no_given_turn_says_the_same_again() {
        let turn = |content: &str, id: &str, arguments: &str| ChatTurn {
            content: content.to_owned(),
            tool_calls: vec![RawToolCall {
                id: id.to_owned(),
                ..said("open", arguments)
            }],
            ..ChatTurn::default()
        };
        let before = turn("x", "1", "{}");
        assert!(says_again(&before, &turn("x", "2", "{}")));
        assert!(!says_again(&before, &turn("y", "1", "{}")));
        assert!(!says_again(&before, &turn("x", "1", "{ }")));
    }

    #[test]
    fn a_turn_is_given_without_thoughts_where_the_prompt_has_none() {
        let turn = Message::assistant("five".to_owned(), Some("hm".to_owned()), vec![]);
        let given = as_forced(&turn, true).unwrap();
        assert_eq!(
            given,
            json!({"role": "assistant", "content": "five", "reasoning_content": "hm"})
        );
        assert_eq!(
            as_forced(&turn, false).unwrap(),
            json!({"role": "assistant", "content": "five"})
        );
    }
}
