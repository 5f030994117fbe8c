//! What a client asks for, checked once.
//!
//! A [`JobDraft`] is what a client wrote, as JSON, TOML or protobuf: every field is optional and nothing is trusted.
//! [`JobDraft::check`] turns it into a [`JobSpec`], in which every value is present and obeys its rule, or names every
//! field that does not. Only a `JobSpec` goes further in.

mod check;
mod compare;
pub mod curate;
mod digest;
mod draft;
mod export;
mod mcp;
pub mod pattern;
mod score;
mod train;
mod verify;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{BatchId, JobId, JobKey};
use crate::layout::UploadName;
use crate::queue::JobKind;

pub use check::{Range, limits};
pub use compare::{CompareArm, CompareArmDraft, CompareDraft, CompareSpec};
pub use curate::{CurateDraft, CurateSpec};
pub use digest::SpecDigest;
pub use draft::{
    GenerateDraft, JobDraft, LimitsDraft, McpUseDraft, ObservationDraft, PromptDraft, RolloutFile,
    SamplingDraft, from_value, parse_line, parse_toml,
};
pub use export::{AdapterRef, ExportDraft, ExportSpec, ExportSummary, ExportTarget, is_hub_repo};
pub use mcp::{McpServer, McpTransport, McpUse, ToolPolicy};
pub use score::{ScoreDraft, ScoreSpec};
pub use train::{
    DatasetRef, LoraTarget, Optimizer, Schedule, TrainData, TrainDraft, TrainLength, TrainMethod,
    TrainSettings, TrainSettingsDraft, TrainSpec,
};
pub use verify::{
    AnswerDraft, AnswerRule, HttpHook, McpCheck, TextRule, ToolCalled, Verify, VerifyDraft,
    WeightedDraft,
};

/// A job, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct JobSpec {
    /// The id that the client chose, if it chose one.
    pub id: Option<JobId>,
    /// 0 (last) to 9 (first).
    pub priority: u8,
    /// Free-form names for filters and cancels.
    pub labels: BTreeMap<String, String>,
    /// Jobs that must have succeeded before this one is ready.
    pub after: Vec<Dependency>,
    /// Tags that a worker must offer, beyond those that the MCP servers imply.
    pub needs: Vec<String>,
    /// How long to wait after submission.
    pub delay: Duration,
    /// How often the handler may fail.
    pub max_attempts: u32,
    /// How often what the handler stands on may fail.
    pub max_infra: u32,
    /// How long one attempt may hold the job.
    pub max_runtime: Duration,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
    /// What is to be done.
    pub work: Work,
}

/// What a job does.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// A try of a model at a task, through tools.
    Rollout(Box<RolloutSpec>),
    /// A file of requests is answered.
    Generate(GenerateSpec),
    /// A model is trained.
    Train(Box<TrainSpec>),
    /// A version of an adapter goes out.
    Export(ExportSpec),
    /// A data set is built.
    Curate(Box<CurateSpec>),
    /// Rollouts, or scores of turns, are compared.
    Compare(Box<CompareSpec>),
    /// A model is asked for the turns of recorded rollouts. It takes the slot of a rollout: it asks a model, and waits.
    Score(Box<ScoreSpec>),
}

impl Work {
    /// The sort of slot that it takes.
    pub fn kind(&self) -> JobKind {
        match self {
            Self::Rollout(_) | Self::Score(_) => JobKind::Rollout,
            Self::Generate(_) => JobKind::Generate,
            Self::Train(_) => JobKind::Train,
            Self::Export(_) => JobKind::Export,
            Self::Curate(_) => JobKind::Curate,
            Self::Compare(_) => JobKind::Compare,
        }
    }
}

impl JobSpec {
    /// The rollout, if it is one.
    pub fn rollout(&self) -> Option<&RolloutSpec> {
        match &self.work {
            Work::Rollout(rollout) => Some(rollout),
            _ => None,
        }
    }

    /// The batch of requests, if it is one.
    pub fn generate(&self) -> Option<&GenerateSpec> {
        match &self.work {
            Work::Generate(generate) => Some(generate),
            _ => None,
        }
    }

    /// The training, if it is one.
    pub fn train(&self) -> Option<&TrainSpec> {
        match &self.work {
            Work::Train(train) => Some(train),
            _ => None,
        }
    }

    /// The export, if it is one.
    pub fn export(&self) -> Option<&ExportSpec> {
        match &self.work {
            Work::Export(export) => Some(export),
            _ => None,
        }
    }

    /// The curation, if it is one.
    pub fn curate(&self) -> Option<&CurateSpec> {
        match &self.work {
            Work::Curate(curate) => Some(curate),
            _ => None,
        }
    }

    /// The turns that a model is asked for, if it is that.
    pub fn score(&self) -> Option<&ScoreSpec> {
        match &self.work {
            Work::Score(score) => Some(score),
            _ => None,
        }
    }

    /// The comparison, if it is one.
    pub fn compare(&self) -> Option<&CompareSpec> {
        match &self.work {
            Work::Compare(compare) => Some(compare),
            _ => None,
        }
    }
}

/// A file of requests that are to be answered, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateSpec {
    /// The requests, one a line, by their name among the project's uploads.
    pub requests: UploadName,
    /// The model of lines that name none; absent: the base model of whoever answers.
    pub model: Option<String>,
}

/// The tag of workers that serve the model of this name.
pub fn model_tag(name: &str) -> String {
    format!("model:{name}")
}

/// A job that another one waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dependency {
    /// A job of the same batch.
    SameBatch(JobId),
    /// A job of another batch of the same project, as `batch/job`.
    Elsewhere(BatchId, JobId),
}

impl Dependency {
    /// The full name, seen from a job of `project/batch`.
    pub fn resolve(&self, project: &crate::id::ProjectId, batch: &BatchId) -> JobKey {
        match self {
            Self::SameBatch(job) => JobKey::new(project.clone(), batch.clone(), job.clone()),
            Self::Elsewhere(batch, job) => JobKey::new(project.clone(), batch.clone(), job.clone()),
        }
    }
}

/// A rollout, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutSpec {
    /// Which task this is a try at, for splits and pairs.
    pub task: Task,
    /// What the user says: one turn or several.
    pub prompts: Vec<String>,
    /// A system text that is part of the task.
    pub system: Option<String>,
    /// A system text that helps the rollout and that training leaves out.
    pub hints: Option<String>,
    /// The model's name at its endpoint; empty: whatever the worker serves by default.
    pub model: Option<String>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The servers whose tools are offered.
    pub mcp: Vec<McpUse>,
    /// Rollouts of the project whose recorded answers stand in for the servers, in the order in which they are asked;
    /// empty: the servers answer themselves. What is offered is then what those were offered.
    pub replay: Vec<(BatchId, JobId)>,
    /// Which of their tools.
    pub tools: ToolPolicy,
    /// Where the rollout is stopped.
    pub limits: Limits,
    /// What the model is shown of a tool's result.
    pub observation: Observation,
    /// How the rollout is judged; without, it has no reward.
    pub verify: Option<Verify>,
}

/// Identity of the task behind a rollout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The task; the samples of one task share it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<String>,
    /// The family of tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_kind: Option<String>,
    /// `train`, `eval` or a name of the user's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Rollouts that are compared with each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Which sample of the task this is, from 0.
    #[serde(default)]
    pub sample_index: u32,
}

/// How tokens are drawn. Without a word from the user these are Qwen3's recommended values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Whether the model may think first.
    pub thinking: bool,
    /// Softmax temperature.
    pub temperature: f64,
    /// Nucleus: the smallest set of tokens with at least this share.
    pub top_p: f64,
    /// At most this many candidates; 0: all.
    pub top_k: u32,
    /// Candidates below this share of the best one are dropped.
    pub min_p: f64,
    /// Penalty on tokens that were used already.
    pub presence_penalty: f64,
    /// Seed of the random numbers; without, the server chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Longest single answer, in tokens.
    pub completion_tokens_max: u32,
}

/// Where a rollout is stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Model calls in all.
    pub turns_max: u32,
    /// Prompt and completion tokens of all calls together.
    pub tokens_max: u64,
    /// Seconds from the first model call to the verdict.
    pub wall_s: u32,
    /// Calls in one assistant turn; those beyond are answered with an error.
    pub tool_calls_per_turn_max: u32,
    /// Seconds that one call of a tool may take.
    pub tool_call_s: u32,
    /// Seconds that a question about a tool under `ask` stays open before it counts as refused.
    pub ask_s: u32,
}

/// What the model is shown of a tool's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Observation {
    /// At most this many tokens, cut at a node of the accessibility tree.
    MaxTokens(u32),
    /// The workshop's way: the first so many characters, and a sentence.
    CompatChars(u32),
    /// As `MaxTokens`, of what is left of a page without what does not help to operate it.
    CompactTokens(u32),
}
