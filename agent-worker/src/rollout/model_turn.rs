//! One turn of the model: the request as the model's template wants it, and what is recorded of the answer.

use espalier_core::chat::{Message, on_the_wire};
use espalier_core::trace::{AdapterRef, ModelCall, PromptTokens, StopReason};
use espalier_runtime::model::{ChatRequest, ChatTurn, ModelError, Usage};
use espalier_runtime::tasks;
use espalier_runtime::telemetry::metrics;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::conversation::{Conversation, Seen};
use super::decide::Event;
use super::{Rollout, RolloutError, TurnClock, calls, millis, model_name};

/// Token ids of the last call, from which the next prompt is told as a difference.
#[derive(Default)]
pub(super) struct LastTokens {
    call: usize,
    ids: Vec<u32>,
}

impl<C: Conversation> Rollout<'_, C> {
    /// Calls the model and records its turn.
    pub(super) async fn call_model(&mut self) -> Result<Event, RolloutError> {
        self.turn = TurnClock::new();
        self.began.get_or_insert_with(Instant::now);
        self.conversation.see(Seen::Thinking);
        let started_at_us = self.services.clock.now();
        let messages = on_the_wire(self.recorder.messages());
        let (vllm_extra, affinity) = (self.vllm_extra(), self.recorder.key().to_string());
        let request = ChatRequest {
            model: model_name(self.services, self.order.spec),
            messages: &messages,
            tools: &self.tools,
            sampling: &self.order.spec.sampling,
            extra: &self.services.extra,
            vllm_extra: &vllm_extra,
            affinity: &affinity,
            project: self.recorder.key().project.as_str(),
        };
        let asked = Instant::now();
        let answered = tokio::select! {
            answered = self.services.model.chat(&request, &self.cancel) => answered,
            () = tokio::time::sleep(self.time_left()) => return Ok(Event::TimeUp),
            () = self.conversation.hung_up() => return Ok(Event::UserDone(StopReason::UserExit)),
        };
        self.turn.elsewhere += asked.elapsed();
        let turn = match answered {
            Ok(turn) => turn,
            Err(ModelError::ContextLength { .. }) => return Ok(Event::ContextFull),
            Err(error) => return Err(error.into()),
        };
        let cut = turn.finish_reason == "length";
        let usage = match turn.usage.or_else(|| counted(&turn)) {
            Some(usage) => usage,
            None => self.estimated(messages, &turn).await?,
        };
        let call = self.model_call(&turn, usage, started_at_us);
        self.record_turn(turn, call).await?;
        let calls = self.pending.len();
        if calls == 0 {
            self.end_turn();
        }
        Ok(Event::TurnEnded { calls, cut })
    }

    /// Settings that are no part of OpenAI's API.
    fn vllm_extra(&self) -> Map<String, Value> {
        let thinking = self.order.spec.sampling.thinking;
        let template = json!({"enable_thinking": thinking});
        [
            ("chat_template_kwargs".to_owned(), template),
            ("return_token_ids".to_owned(), Value::Bool(true)),
        ]
        .into_iter()
        .collect()
    }

    /// What a turn cost by our own tokenizer and about the right template, where the endpoint does not say: a limit in
    /// tokens must hold at every endpoint.
    async fn estimated(
        &self,
        messages: Vec<Message>,
        turn: &ChatTurn,
    ) -> Result<Usage, RolloutError> {
        let tools = self.tools.clone();
        let said: Vec<String> = [turn.content.clone()]
            .into_iter()
            .chain(turn.reasoning.clone())
            .chain(
                turn.tool_calls
                    .iter()
                    .map(|call| format!("{}{}", call.name, call.arguments)),
            )
            .collect();
        let tokenizer = self.services.tokenizer.clone();
        let count = move || {
            let prompt = serde_json::to_string(&(messages, tools)).unwrap_or_default();
            Usage {
                prompt_tokens: tokenizer.count(&prompt) as u64,
                completion_tokens: said.iter().map(|text| tokenizer.count(text) as u64).sum(),
            }
        };
        Ok(tasks::blocking("rollout.count", count).await?)
    }

    /// What is recorded of the call; its message is the next one.
    fn model_call(
        &mut self,
        turn: &ChatTurn,
        usage: Usage,
        started_at_us: espalier_core::time::Timestamp,
    ) -> ModelCall {
        ModelCall {
            message: self.recorder.messages().len(),
            model: turn.model.clone(),
            adapter: turn.adapter_sha256.clone().map(|sha256| AdapterRef {
                name: turn.model.clone(),
                sha256: Some(sha256),
            }),
            prompt: self.prompt_tokens(turn),
            completion_ids: turn.token_ids.clone(),
            logprobs: logprobs_of(turn.token_ids.as_deref(), turn.logprobs.as_deref()),
            finish_reason: turn.finish_reason.clone(),
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            started_at_us,
            first_token_ms: turn.first_token.map(millis),
            latency_ms: millis(turn.latency),
            retries: turn.retries,
        }
    }

    fn prompt_tokens(&mut self, turn: &ChatTurn) -> Option<PromptTokens> {
        let ids = turn.prompt_token_ids.as_ref()?;
        let call = self.totals.turns as usize;
        let last = self.last_tokens.as_ref();
        let told = PromptTokens::tell(ids, last.map(|last| (last.call, last.ids.as_slice())));
        let mut all = ids.clone();
        all.extend(turn.token_ids.iter().flatten());
        self.last_tokens = Some(LastTokens { call, ids: all });
        Some(told)
    }

    async fn record_turn(&mut self, turn: ChatTurn, call: ModelCall) -> Result<(), RolloutError> {
        self.pending = calls::prepare(
            turn.tool_calls,
            self.limits().tool_calls_per_turn_max,
            |name| self.world.offers(name),
        );
        let tool_calls = self.pending.iter().map(|(call, _)| call.clone()).collect();
        self.totals.turns += 1;
        // The endpoint's own counts may be anything.
        let totals = &mut self.totals;
        totals.prompt_tokens = totals.prompt_tokens.saturating_add(call.prompt_tokens);
        totals.completion_tokens = totals
            .completion_tokens
            .saturating_add(call.completion_tokens);
        metrics().rollout_turns.add(1, &[]);
        let message = Message::assistant(turn.content, turn.reasoning, tool_calls);
        self.recorder.model_call(message, call).await?;
        self.show_last();
        Ok(())
    }
}

/// What a turn cost by its token ids, where the endpoint gives them but does not count.
fn counted(turn: &ChatTurn) -> Option<Usage> {
    Some(Usage {
        prompt_tokens: turn.prompt_token_ids.as_ref()?.len() as u64,
        completion_tokens: turn.token_ids.as_ref()?.len() as u64,
    })
}

/// The log-probabilities, where there is exactly one for each sampled token: with another number nobody could say which
/// belongs to which.
fn logprobs_of(ids: Option<&[u32]>, logprobs: Option<&[f32]>) -> Option<Vec<f32>> {
    let logprobs = logprobs?;
    let tokens = ids.map_or(logprobs.len(), <[u32]>::len);
    if tokens == logprobs.len() {
        return Some(logprobs.to_vec());
    }
    let count = logprobs.len();
    tracing::warn!(
        tokens,
        count,
        "log-probabilities not recorded: one for each token is needed"
    );
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_belong_to_tokens_or_are_not_kept() {
        let two = [-0.5, -1.0];
        assert_eq!(logprobs_of(Some(&[1, 2]), Some(&two)), Some(two.to_vec()));
        assert_eq!(logprobs_of(None, Some(&two)), Some(two.to_vec()));
        assert_eq!(logprobs_of(Some(&[1]), Some(&two)), None);
        assert_eq!(logprobs_of(Some(&[1]), None), None);
    }
}
