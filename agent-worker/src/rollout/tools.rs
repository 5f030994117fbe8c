//! Answers the calls of one turn, one after the other in their order, and records each.

use std::time::Duration;

use espalier_core::chat::{Message, ToolCall};
use espalier_core::spec::Observation;
use espalier_core::time::Timestamp;
use espalier_core::trace::{BlobRef, Decision, StopReason, ToolCallRecord};
use espalier_runtime::tasks;
use espalier_runtime::telemetry::names::{attribute, operation, span};
use espalier_runtime::telemetry::{Metrics, metrics};
use opentelemetry::KeyValue;
use tokio::time::Instant;
use tracing::Instrument;

use super::calls::Fate;
use super::conversation::{Conversation, Question, Seen};
use super::decide::Event;
use super::{Rollout, RolloutError, millis};
use crate::mcp::{McpError, ToolOutcome};
use crate::observe::shape;

/// What the model is told of a call that was refused: the workshop's words.
const REJECTED: &str = "User rejected tool call.";

/// What stands in place of a result that nobody waited for.
const HUNG_UP: &str = "The user ended the conversation.";

/// What came of one call.
struct Answer {
    decision: Decision,
    text: String,
    is_error: bool,
    raw: Option<BlobRef>,
    images: Vec<BlobRef>,
    tokens: u64,
    truncated: bool,
}

impl<C: Conversation> Rollout<'_, C> {
    /// Answers the turn's calls until the time is up.
    pub(super) async fn answer_calls(&mut self) -> Result<Event, RolloutError> {
        for (call, fate) in std::mem::take(&mut self.pending) {
            if self.time_left().is_zero() {
                return Ok(Event::TimeUp);
            }
            if !self.answer_call(call, fate).await? {
                return Ok(Event::Unrecorded);
            }
            if self.hung_up {
                return Ok(Event::UserDone(StopReason::UserExit));
            }
        }
        self.end_turn();
        Ok(Event::CallsAnswered)
    }

    /// Whether the call has an answer: where recordings answer, they may have none.
    async fn answer_call(&mut self, call: ToolCall, fate: Fate) -> Result<bool, RolloutError> {
        let started_at_us = self.services.clock.now();
        let waited_before = self.turn.elsewhere;
        let answer = match fate {
            Fate::Refuse { decision, text } => Some(self.explain(decision, text).await?),
            Fate::Run => self.run_tool(&call).await?,
        };
        let Some(answer) = answer else {
            return Ok(false);
        };
        let latency = self.turn.elsewhere - waited_before;
        self.record(call, answer, started_at_us, latency).await?;
        Ok(true)
    }

    /// Runs an offered tool, after a yes where one is needed; none: the call was never recorded.
    async fn run_tool(&mut self, call: &ToolCall) -> Result<Option<Answer>, RolloutError> {
        let (name, arguments) = (&call.function.name, &call.function.arguments);
        let mut decision = Decision::Allowed;
        if self.world.needs_approval(name) {
            if !self.is_approved(call).await {
                let answer = self
                    .explain(Decision::Rejected, REJECTED.to_owned())
                    .await?;
                return Ok(Some(answer));
            }
            decision = Decision::Approved;
        }
        self.conversation.see(Seen::ToolCalled { name, arguments });
        let limit = Duration::from_secs(self.limits().tool_call_s.into()).min(self.time_left());
        let began = Instant::now();
        let span = tool_span(self.world.origin(name).0.as_deref(), call);
        let called = self.world.call(name, arguments.clone(), limit);
        let ran = tokio::select! {
            ran = called.instrument(span.clone()) => ran,
            () = self.conversation.hung_up() => {
                self.hung_up = true;
                return Ok(Some(self.explain(decision, HUNG_UP.to_owned()).await?));
            }
        };
        self.turn.elsewhere += began.elapsed();
        count(name, &ran, began.elapsed());
        match ran {
            Ok(None) => Ok(None),
            Ok(Some(outcome)) => {
                if outcome.is_error {
                    span.record(attribute::ERROR_TYPE, "tool_error");
                }
                Ok(Some(self.show(decision, outcome).await?))
            }
            Err(RolloutError::Mcp(McpError::UnknownTool { name })) => {
                let text = format!("Tool {name} not found");
                Ok(Some(self.explain(Decision::Unknown, text).await?))
            }
            // A server that does one thing at a time cannot say that it is well: the time is up, and that is the outcome.
            Err(RolloutError::Mcp(error @ McpError::Deadline { .. }))
                if self.time_left().is_zero() =>
            {
                span.record(attribute::ERROR_TYPE, error.class().as_str());
                Ok(Some(
                    self.explain(decision, format!("Error: {error}")).await?,
                ))
            }
            // A slow tool of a server that is well is an outcome; a deadline here means that the server is not.
            Err(error) => {
                span.record(attribute::ERROR_TYPE, error.class().as_str());
                Err(error)
            }
        }
    }

    async fn is_approved(&mut self, call: &ToolCall) -> bool {
        let timeout = Duration::from_secs(self.limits().ask_s.into()).min(self.time_left());
        let question = Question {
            tool: &call.function.name,
            arguments: &call.function.arguments,
            timeout,
        };
        let began = Instant::now();
        let answered = self.conversation.approve(question);
        let answer = tasks::with_deadline("rollout.ask", timeout, answered).await;
        self.turn.elsewhere += began.elapsed();
        answer.unwrap_or(false)
    }

    /// Keeps the whole result and shapes what the model is shown of it.
    async fn show(
        &mut self,
        decision: Decision,
        outcome: ToolOutcome,
    ) -> Result<Answer, RolloutError> {
        let raw = self.recorder.blob(outcome.raw, "application/json").await?;
        let mut images = Vec::new();
        for (media_type, image) in outcome.images {
            images.extend(self.recorder.blob(image, &media_type).await?);
        }
        let (answer, chars) = self.shape(decision, outcome.text, outcome.is_error).await?;
        self.turn.result_chars += chars;
        Ok(Answer {
            raw,
            images,
            ..answer
        })
    }

    /// An error of ours in place of a result.
    async fn explain(&self, decision: Decision, text: String) -> Result<Answer, RolloutError> {
        let (answer, _) = self.shape(decision, text, true).await?;
        Ok(answer)
    }

    /// What the model is shown of `text`, and how many characters that has as a whole.
    async fn shape(
        &self,
        decision: Decision,
        text: String,
        is_error: bool,
    ) -> Result<(Answer, usize), RolloutError> {
        let rule: Observation = self.order.spec.observation;
        let tokenizer = self.services.tokenizer.clone();
        let shape = move || (shape(&text, rule, &tokenizer), text.chars().count());
        let (shaped, chars) = tasks::blocking("rollout.shape", shape).await?;
        let answer = Answer {
            decision,
            text: shaped.text,
            is_error,
            raw: None,
            images: Vec::new(),
            tokens: shaped.tokens as u64,
            truncated: shaped.truncated,
        };
        Ok((answer, chars))
    }

    async fn record(
        &mut self,
        call: ToolCall,
        answer: Answer,
        started_at_us: Timestamp,
        latency: Duration,
    ) -> Result<(), RolloutError> {
        let (server, tool) = self.world.origin(&call.function.name);
        let message = Message::Tool {
            tool_call_id: call.id.clone(),
            content: answer.text,
        };
        let record = ToolCallRecord {
            message: self.recorder.messages().len(),
            call_id: call.id,
            server,
            tool,
            name: call.function.name,
            arguments: call.function.arguments,
            decision: answer.decision,
            is_error: answer.is_error,
            raw: answer.raw,
            images: answer.images,
            shown_tokens: answer.tokens,
            truncated: answer.truncated,
            started_at_us,
            latency_ms: millis(latency),
        };
        self.totals.tool_calls += 1;
        self.totals.tool_errors += u32::from(record.is_error);
        self.recorder.tool_call(message, record).await?;
        if let (Some(message), Some(record)) = (
            self.recorder.messages().last(),
            self.recorder.tool_calls().last(),
        ) {
            let shown = message.content();
            self.conversation.see(Seen::ToolAnswered { record, shown });
        }
        Ok(())
    }
}

fn tool_span(server: Option<&str>, call: &ToolCall) -> tracing::Span {
    let name = call.function.name.as_str();
    tracing::info_span!(
        span::EXECUTE_TOOL,
        "otel.name" = format!("{} {name}", span::EXECUTE_TOOL),
        { attribute::GEN_AI_OPERATION_NAME } = operation::EXECUTE_TOOL,
        { attribute::GEN_AI_TOOL_NAME } = name,
        { attribute::GEN_AI_TOOL_CALL_ID } = call.id,
        { attribute::GEN_AI_TOOL_TYPE } = "extension",
        { attribute::MCP_METHOD_NAME } = "tools/call",
        { attribute::MCP_SERVER } = server,
        { attribute::ERROR_TYPE } = tracing::field::Empty,
    )
}

/// Measures a call, unless it was never recorded: nothing ran.
fn count(name: &str, ran: &Result<Option<ToolOutcome>, RolloutError>, took: Duration) {
    let mut labels = vec![KeyValue::new(attribute::GEN_AI_TOOL_NAME, name.to_owned())];
    match ran {
        Ok(Some(outcome)) if outcome.is_error => {
            labels.push(KeyValue::new(attribute::ERROR_TYPE, "tool_error"));
        }
        Ok(Some(_)) => {}
        Ok(None) => return,
        Err(error) => labels.push(KeyValue::new(attribute::ERROR_TYPE, error.class().as_str())),
    }
    Metrics::record(&metrics().execute_tool_duration, took, &labels);
}
