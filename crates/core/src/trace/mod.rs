//! The trace of a rollout, schema version 1, and the manifest that publishes it.
//!
//! A rollout is recorded as [`Step`]s while it happens; [`Trace`] is what they add up to. Both are stored, so that a
//! rollout which was killed can still be read up to its last step.

pub mod edits;
mod manifest;
mod prompt;
pub mod replay;
mod steps;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chat::{Message, ToolDef};
use crate::id::{Fence, JobKey};
use crate::spec::{Sampling, Task, VerifyDraft};
use crate::time::Timestamp;

pub(crate) use manifest::hex;
pub use manifest::{FileEntry, Manifest, RolloutSummary, Summary, sha256_hex};
pub use prompt::{PromptError, prompt_ids};
pub use steps::{Step, TraceError};

/// The version that this code writes, and the only one that it reads.
pub const SCHEMA_VERSION: u32 = 1;

/// One rollout, from the first message to the verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// What was run, where, by whom.
    #[serde(flatten)]
    pub header: Header,
    /// The conversation as the model saw it.
    pub messages: Vec<Message>,
    /// One entry a model call, in order.
    pub model_calls: Vec<ModelCall>,
    /// One entry a tool call, in order.
    pub tool_calls: Vec<ToolCallRecord>,
    /// How it ended.
    pub outcome: Outcome,
}

/// What is known before the first model call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `{job key}@{fence}`, or a name of its own for a trace that no job made.
    pub id: String,
    /// The job.
    pub job: JobKey,
    /// Which attempt at the job this was, from 1.
    pub attempt: u32,
    /// The lease under which it ran.
    pub fence: Fence,
    /// When it began, in microseconds since the epoch.
    pub started_at_us: Timestamp,
    /// OpenTelemetry's id of the trace, 32 hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otel_trace_id: Option<String>,
    /// The task that this was a try at.
    pub task: Task,
    /// The job's labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Versions and settings.
    pub provenance: Provenance,
    /// The tools, exactly as they were offered.
    pub tools: Vec<ToolDef>,
    /// How it was to be judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyDraft>,
}

/// Versions and settings that a later reader needs in order to trust or repeat a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of Espalier.
    pub espalier_version: String,
    /// The model that was asked for.
    pub model: String,
    /// How tokens were drawn.
    pub sampling: Sampling,
    /// SHA-256 of the offered tools as JSON.
    pub tools_sha256: String,
    /// The MCP servers behind them.
    pub mcp_servers: Vec<McpServerInfo>,
    /// Build of the browser, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub browser: Option<String>,
    /// SHA-256 of the tokenizer by which observations were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_sha256: Option<String>,
    /// The rollouts whose recorded answers stood in for the servers; empty: the servers answered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replay: Vec<ReplaySource>,
}

/// A rollout whose recorded answers stood in for servers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplaySource {
    /// The job that made it.
    pub job: JobKey,
    /// SHA-256 of its trace's file, in hex.
    pub sha256: String,
}

/// What an MCP server said of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct McpServerInfo {
    /// The name under which the job knows it.
    pub name: String,
    /// Its own name.
    pub implementation: String,
    /// Its version.
    pub version: String,
    /// The protocol version that was agreed on.
    pub protocol: String,
}

/// One call of the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelCall {
    /// Index of the assistant message that it gave.
    pub message: usize,
    /// The model as the server named it.
    pub model: String,
    /// The adapter that answered, where the server says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterRef>,
    /// Token ids of the prompt, as a change to those of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<PromptTokens>,
    /// Token ids that were sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_ids: Option<Vec<u32>>,
    /// Log-probability of each sampled token at temperature 1, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<f32>>,
    /// `stop`, `tool_calls`, `length`, …
    pub finish_reason: String,
    /// Tokens of the prompt, as the server counted.
    pub prompt_tokens: u64,
    /// Tokens that were sampled, as the server counted.
    pub completion_tokens: u64,
    /// When the call began.
    pub started_at_us: Timestamp,
    /// Until the first token; absent without streaming.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<u64>,
    /// Until the last token, retries included.
    pub latency_ms: u64,
    /// Tries that failed before the one that counts.
    #[serde(default)]
    pub retries: u32,
}

/// Weights on top of the model's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRef {
    /// Its name at the server.
    pub name: String,
    /// SHA-256 of its content, as the server gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// A prompt as the first `keep` tokens of an earlier prompt with its completion, and what follows: a trace must not
/// grow with the square of its turns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokens {
    /// The earlier call, by index; none: the prompt stands for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extends: Option<usize>,
    /// Tokens taken from that call's prompt followed by its completion.
    pub keep: usize,
    /// Tokens after them.
    pub append: Vec<u32>,
}

/// One call of a tool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCallRecord {
    /// Index of the tool message that shows its result.
    pub message: usize,
    /// The model's id of the call.
    pub call_id: String,
    /// The offered name.
    pub name: String,
    /// The MCP server, where the name is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The server's own name of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// The arguments as they were sent.
    pub arguments: Map<String, Value>,
    /// What became of the call.
    pub decision: Decision,
    /// Whether the tool, or we in its place, answered with an error.
    pub is_error: bool,
    /// The whole result as the server gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<BlobRef>,
    /// Pictures in the result.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<BlobRef>,
    /// Tokens of what the model was shown.
    pub shown_tokens: u64,
    /// Whether the model was shown less than there was.
    pub truncated: bool,
    /// When the call began.
    pub started_at_us: Timestamp,
    /// How long it took, waiting for an answer to `ask` included.
    pub latency_ms: u64,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Run by policy.
    Allowed,
    /// Run, because somebody said yes.
    Approved,
    /// Not run, because somebody said no or nobody answered in time.
    Rejected,
    /// Not run: no such tool is offered.
    Unknown,
    /// Not run: the arguments were not a JSON object, or did not fit the tool.
    Malformed,
    /// Not run: one call too many in this turn.
    OverLimit,
}

/// A file in the project's `blobs/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRef {
    /// SHA-256 of its bytes, in hex; also its name.
    pub sha256: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

/// How a rollout ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Why the loop stopped.
    pub stop: StopReason,
    /// When, in microseconds since the epoch.
    pub ended_at_us: Timestamp,
    /// Address of the browser's current page at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_url: Option<String>,
    /// What the checks found; absent without checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Sums over the rollout.
    pub totals: Totals,
}

/// Why the loop stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model answered every user turn without a further call.
    Answered,
    /// `limits.turns`.
    TurnLimit,
    /// `limits.tokens`.
    TokenLimit,
    /// `limits.wall_s`.
    TimeLimit,
    /// The conversation no longer fits into the model's context.
    ContextFull,
    /// The last answer was cut at its longest length.
    CutAnswer,
    /// The person at the terminal ended it.
    UserExit,
    /// A call that no recording has, in a rollout whose servers are recordings; or it ended in a state that none of them
    /// was judged in.
    Unrecorded,
}

impl StopReason {
    /// The name in records, tables and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::TurnLimit => "turn_limit",
            Self::TokenLimit => "token_limit",
            Self::TimeLimit => "time_limit",
            Self::ContextFull => "context_full",
            Self::CutAnswer => "cut_answer",
            Self::UserExit => "user_exit",
            Self::Unrecorded => "unrecorded",
        }
    }
}

/// What the checks found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// In [0, 1].
    pub reward: f64,
    /// One entry a check that was run, with its place in the tree.
    pub checks: Vec<CheckResult>,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckResult {
    /// Where it stands, such as `all[1].answer`.
    pub path: String,
    /// In [0, 1].
    pub score: f64,
    /// Why, for a person.
    pub reason: String,
}

/// Sums over a rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Model calls.
    pub turns: u32,
    /// Tool calls, those that were not run included.
    pub tool_calls: u32,
    /// Tool calls that were not run or gave an error.
    pub tool_errors: u32,
    /// Prompt tokens of all calls.
    pub prompt_tokens: u64,
    /// Completion tokens of all calls.
    pub completion_tokens: u64,
    /// From the first model call to the verdict.
    pub wall_ms: u64,
}

/// What the model answered in the end; empty where it was stopped before. What it says beside a call is no answer: it
/// had not seen the result.
pub fn answer_of(messages: &[Message]) -> &str {
    let last = messages.iter().rev().find_map(|message| match message {
        Message::Assistant {
            content,
            tool_calls,
            ..
        } => Some((content.as_str(), tool_calls.is_empty())),
        _ => None,
    });
    last.filter(|(_, is_answer)| *is_answer)
        .map_or("", |(content, _)| content)
}

impl Trace {
    /// What the model answered in the end.
    pub fn answer(&self) -> &str {
        answer_of(&self.messages)
    }

    /// The reward, where the rollout was judged.
    pub fn reward(&self) -> Option<f64> {
        self.outcome.verdict.as_ref().map(|verdict| verdict.reward)
    }

    /// What the queue and tables carry of it.
    pub fn summary(&self) -> RolloutSummary {
        let verdict = self.outcome.verdict.as_ref();
        let worst = verdict.and_then(|v| v.checks.iter().find(|c| c.score < 1.0));
        RolloutSummary {
            reward: self.reward(),
            stop: self.outcome.stop,
            reason: worst
                .map(|check| crate::error::shorten(&check.reason))
                .unwrap_or_default(),
            task_id: self.header.task.task_id.clone().unwrap_or_default(),
            task_kind: self.header.task.task_kind.clone().unwrap_or_default(),
            totals: self.outcome.totals,
        }
    }
}
