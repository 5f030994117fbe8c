//! One rollout: model and tools in turns, over one or several turns of the user, until an answer or a limit; then the
//! verdict. The worker's handler and `espalier chat` call [`run`].
//!
//! What happens next is decided by `decide` and `calls`, which are pure; this module and `tools` do what they say and
//! record it. What the model does wrong (an unknown tool, broken JSON, a tool that fails) is told to the model. What
//! the rollout stands on (the endpoint, a browser, the disk) ends the attempt with an error.
//!
//! A rollout is stopped by dropping its future: connections and browser contexts go with it.

mod calls;
mod conversation;
mod decide;
mod error;
mod model_turn;
mod probes;
mod recorded;
mod remembered;
#[cfg(test)]
mod tests;
mod tools;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::chat::{Message, ToolCall, ToolDef};
use espalier_core::spec::{Limits, RolloutSpec, Verify, VerifyDraft};
use espalier_core::trace::{
    Header, Outcome, Provenance, SCHEMA_VERSION, StopReason, Totals, Verdict, answer_of,
};
use espalier_qwen3_text::{TOKENIZER_SHA256, Tokenizer};
use espalier_runtime::clock::Clock;
use espalier_runtime::model::ModelClient;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::names::{attribute, metric, operation, span};
use espalier_runtime::telemetry::{Metrics, inject_traceparent, metrics};
use opentelemetry::KeyValue;
use serde_json::{Map, Value};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::mcp::McpHost;
use crate::record::Recorder;
use crate::verify::{Evidence, judge};

pub(crate) use calls::parse_arguments;
pub use conversation::{Approver, Conversation, Question, Scripted, Seen, UserTurn};
pub use error::RolloutError;
pub use probes::Hooks;
pub use recorded::ReplayError;
pub(crate) use recorded::load as load_recording;

use calls::Fate;
use decide::{Action, Event, Progress, decide};
use model_turn::LastTokens;
use probes::{Asked, Live};
use remembered::judge_recorded;
use world::World;

/// Longest that all checks of a rollout may take together: a few probes at their own limit. Checks that come after it
/// score 0.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(120);
/// How much longer the last check may take to find out whether its server still lives. A judgement that is not over
/// then hangs for a reason that is not the checks'.
const VERIFY_SLACK: Duration = Duration::from_secs(60);
/// Longest that the browser may take to tell its address.
const URL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that giving back the servers may take; they are taken back anyway.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What rollouts share.
#[derive(Clone)]
pub struct Services {
    /// The MCP servers.
    pub mcp: McpHost,
    /// The endpoints of models.
    pub model: ModelClient,
    /// The model of jobs that name none.
    pub model_name: String,
    /// More fields of every request.
    pub extra: Map<String, Value>,
    /// Measures what the model is shown.
    pub tokenizer: Tokenizer,
    /// HTTP hooks of verifiers.
    pub hooks: Hooks,
    /// Where recordings are.
    pub store: Store,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
}

/// What is to be rolled out.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// The rollout.
    pub spec: &'a RolloutSpec,
    /// How it was asked to be judged, for the trace.
    pub verify: Option<&'a VerifyDraft>,
    /// The job's labels.
    pub labels: &'a BTreeMap<String, String>,
}

/// Runs a rollout up to its verdict. The steps are in `recorder` when it returns; publishing them is the caller's.
///
/// # Errors
/// The attempt cannot go on. A rollout that merely did badly is an [`Outcome`].
pub async fn run<C: Conversation>(
    services: &Services,
    order: Order<'_>,
    recorder: &mut Recorder,
    conversation: &mut C,
    cancel: CancellationToken,
) -> Result<Outcome, RolloutError> {
    let span = agent_span(services, order, recorder);
    let began = Instant::now();
    let ran = Box::pin(connect_and_run(
        services,
        order,
        recorder,
        conversation,
        cancel,
    ));
    let outcome = ran.instrument(span.clone()).await;
    let ended = match &outcome {
        Ok(outcome) => outcome.stop.as_str(),
        Err(error) => error.class().as_str(),
    };
    let labels = [KeyValue::new(attribute::OUTCOME, ended)];
    Metrics::record(&metrics().invoke_agent_duration, began.elapsed(), &labels);
    match &outcome {
        Ok(outcome) => {
            span.record(attribute::OUTCOME, outcome.stop.as_str());
            span.record(
                attribute::GEN_AI_USAGE_INPUT_TOKENS,
                outcome.totals.prompt_tokens,
            );
            span.record(
                attribute::GEN_AI_USAGE_OUTPUT_TOKENS,
                outcome.totals.completion_tokens,
            );
            if let Some(verdict) = &outcome.verdict {
                span.record(attribute::REWARD, verdict.reward);
            }
        }
        Err(error) => {
            span.record(attribute::ERROR_TYPE, error.class().as_str());
        }
    }
    outcome
}

fn agent_span(services: &Services, order: Order<'_>, recorder: &Recorder) -> tracing::Span {
    let task = &order.spec.task;
    let agent = task.task_kind.as_deref().unwrap_or("rollout");
    tracing::info_span!(
        span::INVOKE_AGENT,
        "otel.name" = format!("{} {agent}", span::INVOKE_AGENT),
        { attribute::GEN_AI_OPERATION_NAME } = operation::INVOKE_AGENT,
        { attribute::GEN_AI_PROVIDER_NAME } = "openai",
        { attribute::GEN_AI_AGENT_NAME } = agent,
        { attribute::GEN_AI_CONVERSATION_ID } = trace_id(recorder),
        { attribute::GEN_AI_REQUEST_MODEL } = model_name(services, order.spec),
        { attribute::PROJECT } = %recorder.key().project,
        { attribute::BATCH } = %recorder.key().batch,
        { attribute::JOB } = %recorder.key().job,
        { attribute::TASK } = task.task_id.as_deref(),
        { attribute::TASK_KIND } = task.task_kind.as_deref(),
        { attribute::GEN_AI_USAGE_INPUT_TOKENS } = tracing::field::Empty,
        { attribute::GEN_AI_USAGE_OUTPUT_TOKENS } = tracing::field::Empty,
        { attribute::OUTCOME } = tracing::field::Empty,
        { attribute::REWARD } = tracing::field::Empty,
        { attribute::ERROR_TYPE } = tracing::field::Empty,
    )
}

async fn connect_and_run<C: Conversation>(
    services: &Services,
    order: Order<'_>,
    recorder: &mut Recorder,
    conversation: &mut C,
    cancel: CancellationToken,
) -> Result<Outcome, RolloutError> {
    let name = trace_id(recorder);
    let mut world = World::open(services, order, recorder, &name, cancel.clone()).await?;
    let rollout = Rollout {
        services,
        order,
        tools: world.tools(),
        world: &mut world,
        recorder,
        conversation,
        cancel,
        totals: Totals::default(),
        began: None,
        turn: TurnClock::new(),
        pending: Vec::new(),
        last_tokens: None,
        hung_up: false,
    };
    let outcome = Box::pin(rollout.run()).await;
    world.close().await;
    outcome
}

/// The name of the trace.
fn trace_id(recorder: &Recorder) -> String {
    format!("{}@{}", recorder.key(), recorder.fence())
}

fn model_name<'a>(services: &'a Services, spec: &'a RolloutSpec) -> &'a str {
    spec.model.as_deref().unwrap_or(&services.model_name)
}

/// A rollout under way.
struct Rollout<'a, C> {
    services: &'a Services,
    order: Order<'a>,
    world: &'a mut World,
    recorder: &'a mut Recorder,
    conversation: &'a mut C,
    /// The tools as they are offered.
    tools: Vec<ToolDef>,
    cancel: CancellationToken,
    totals: Totals,
    /// When the first model call began.
    began: Option<Instant>,
    turn: TurnClock,
    /// Calls of the last turn that are not answered yet.
    pending: Vec<(ToolCall, Fate)>,
    last_tokens: Option<LastTokens>,
    /// Whether the user has gone in the middle of a turn.
    hung_up: bool,
}

/// How a turn's time was spent.
struct TurnClock {
    began: Instant,
    /// Spent waiting for the model, the tools, or an answer to a question.
    elsewhere: Duration,
    result_chars: usize,
}

impl TurnClock {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            elsewhere: Duration::ZERO,
            result_chars: 0,
        }
    }
}

impl<C: Conversation> Rollout<'_, C> {
    async fn run(mut self) -> Result<Outcome, RolloutError> {
        if let Some(verify) = &self.order.spec.verify {
            probes::check(verify, self.world, &self.services.hooks)?;
        }
        self.begin().await?;
        let stop = self.converse().await?;
        self.conclude(stop).await
    }

    /// Header and system texts.
    async fn begin(&mut self) -> Result<(), RolloutError> {
        let header = self.header();
        self.recorder.header(header).await?;
        let spec = self.order.spec;
        for (text, hint) in [(&spec.system, false), (&spec.hints, true)] {
            if let Some(content) = text.clone() {
                self.say(Message::System { content, hint }).await?;
            }
        }
        Ok(())
    }

    fn header(&self) -> Header {
        let spec = self.order.spec;
        let (mcp_servers, browser) = self.world.servers();
        Header {
            schema_version: SCHEMA_VERSION,
            id: trace_id(self.recorder),
            job: self.recorder.key().clone(),
            attempt: self.recorder.attempt(),
            fence: self.recorder.fence(),
            started_at_us: self.services.clock.now(),
            otel_trace_id: inject_traceparent().map(|parent| parent.trace_id()),
            task: spec.task.clone(),
            labels: self.order.labels.clone(),
            provenance: Provenance {
                espalier_version: env!("CARGO_PKG_VERSION").to_owned(),
                model: model_name(self.services, spec).to_owned(),
                sampling: spec.sampling.clone(),
                tools_sha256: self.world.tools_sha256(),
                mcp_servers,
                browser,
                tokenizer_sha256: Some(TOKENIZER_SHA256.to_owned()),
                replay: self.world.sources(),
            },
            tools: self.tools.clone(),
            verify: self.order.verify.cloned().map(probes::without_queries),
        }
    }

    async fn converse(&mut self) -> Result<StopReason, RolloutError> {
        let mut action = Action::AskUser;
        loop {
            let event = match action {
                Action::AskUser => self.ask_user().await?,
                Action::CallModel => self.call_model().await?,
                Action::AnswerCalls => self.answer_calls().await?,
                Action::Stop(reason) => return Ok(reason),
            };
            let progress = Progress {
                totals: &self.totals,
                elapsed: self.elapsed(),
            };
            action = decide(progress, self.limits(), event);
        }
    }

    async fn ask_user(&mut self) -> Result<Event, RolloutError> {
        match self.conversation.next_turn().await {
            UserTurn::Done(reason) => Ok(Event::UserDone(reason)),
            UserTurn::Say(content) => {
                self.say(Message::User { content }).await?;
                Ok(Event::UserSpoke)
            }
        }
    }

    /// Adds a message and returns its index.
    async fn say(&mut self, message: Message) -> Result<usize, RolloutError> {
        let index = self.recorder.message(message).await?;
        self.show_last();
        Ok(index)
    }

    /// Shows the last message to whoever looks on.
    fn show_last(&mut self) {
        if let Some(message) = self.recorder.messages().last() {
            self.conversation.see(Seen::Said(message));
        }
    }

    /// Final address, verdict and sums.
    async fn conclude(&mut self, stop: StopReason) -> Result<Outcome, RolloutError> {
        let final_url = self.world.final_url().await?;
        let verdict = match &self.order.spec.verify {
            // It ended where nobody knows how it would have gone on.
            Some(_) if stop == StopReason::Unrecorded => None,
            Some(verify) => self.judge(verify, final_url.as_deref()).await?,
            None => None,
        };
        let is_unknown = verdict.is_none() && self.order.spec.verify.is_some();
        self.totals.wall_ms = millis(self.elapsed());
        Ok(Outcome {
            stop: if is_unknown {
                StopReason::Unrecorded
            } else {
                stop
            },
            ended_at_us: self.services.clock.now(),
            final_url,
            verdict,
            totals: self.totals,
        })
    }

    /// None where the checks ask for what was never recorded.
    async fn judge(
        &self,
        verify: &Verify,
        final_url: Option<&str>,
    ) -> Result<Option<Verdict>, RolloutError> {
        let evidence = Evidence {
            answer: answer_of(self.recorder.messages()),
            final_url,
            tool_calls: self.recorder.tool_calls(),
        };
        let hooks = Asked {
            hooks: &self.services.hooks,
            until: Instant::now() + VERIFY_TIMEOUT,
        };
        let span = tracing::info_span!(span::VERIFY, { attribute::REWARD } = tracing::field::Empty);
        let judged = async {
            match &*self.world {
                World::Live(toolbox) => {
                    let live = Live { toolbox, hooks };
                    judge(verify, &evidence, &live).await.map(Some)
                }
                World::Recorded(recorded) => {
                    judge_recorded(verify, &evidence, recorded.end(), hooks).await
                }
            }
        };
        let judged = judged.instrument(span.clone());
        let verdict =
            with_deadline("rollout.verify", VERIFY_TIMEOUT + VERIFY_SLACK, judged).await??;
        if let Some(verdict) = &verdict {
            span.record(attribute::REWARD, verdict.reward);
        }
        Ok(verdict)
    }

    /// The turn is over: tells what it cost beside model and tools.
    fn end_turn(&mut self) {
        let turn = std::mem::replace(&mut self.turn, TurnClock::new());
        let overhead = turn.began.elapsed().saturating_sub(turn.elsewhere);
        Metrics::record(&metrics().rollout_turn_overhead, overhead, &[]);
        tracing::debug!(
            turn = self.totals.turns,
            overhead_us = u64::try_from(overhead.as_micros()).unwrap_or(u64::MAX),
            result_chars = turn.result_chars,
            metric = metric::ROLLOUT_TURN_OVERHEAD,
            "turn ended"
        );
        self.conversation.see(Seen::TurnCost {
            turn: self.totals.turns,
            overhead,
            result_chars: turn.result_chars,
        });
    }

    fn limits(&self) -> &Limits {
        &self.order.spec.limits
    }

    fn elapsed(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    /// What is left of the rollout's time.
    fn time_left(&self) -> Duration {
        decide::wall(self.limits()).saturating_sub(self.elapsed())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
