//! Two models over the same tasks: rollouts in pairs, what differs between them, and whether that is enough to publish.
//!
//! Pure: a `compare` job reads rollouts and hands them over as [`Tried`], and what comes back is its [`Comparison`], which
//! is stored as `report.json`. A pair is one sample of one task, tried by both arms; how much the arms differ is told with
//! [intervals over tasks](stats). The first arm is the one before, the second the one after.

mod gate;
pub mod markup;
mod pairs;
pub mod stats;
mod tally;
pub mod turns;
pub mod words;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::FieldError;
use crate::id::JobKey;
use crate::time::Timestamp;

pub use gate::{GateReason, GateSettings, GateVerdict, judge};
pub use pairs::{Alone, Pair, Pairs, pair};
pub use stats::Estimate;
pub use tally::{compare, order_for_reading};

/// The version of [`Report`] that this code writes, and the only one that it reads.
pub const REPORT_VERSION: u32 = 1;
/// The numbers, among the files of a comparison.
pub const REPORT_FILE: &str = "report.json";
/// The same for people, as Markdown.
pub const MARKDOWN_FILE: &str = "report.md";
/// The same with plots, as one page.
pub const PAGE_FILE: &str = "report.html";
/// How the intervals are made, in a sentence for reports.
pub const METHOD: &str = "Each task counts with the mean over its samples; 95 % intervals are Student's over tasks (Miller 2024, \
    arXiv:2411.00640), of shares with tasks added that nobody has seen: two solved and two not for one arm (Agresti and Coull 1998), \
    a half of each of the four outcomes for the paired difference (Agresti and Min 2005).";

/// One rollout, as far as a comparison looks at it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    /// The job that made it.
    pub job: JobKey,
    /// The task.
    pub task: String,
    /// The family of tasks; empty where the job named none.
    pub kind: String,
    /// Which sample of the task, from 0.
    pub sample: u32,
    /// Whether every check held; none where it was not judged.
    pub solved: Option<bool>,
    /// Why the loop stopped.
    pub stop: String,
    /// The first check that did not hold; empty where all held.
    pub reason: String,
    /// What it took.
    pub used: Used,
}

/// What a rollout took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Model calls.
    pub turns: u32,
    /// Tool calls that were not run: of no such tool, with arguments that do not fit, or one too many.
    pub invalid_calls: u32,
    /// Prompt tokens of all calls.
    pub prompt_tokens: u64,
    /// Completion tokens of all calls.
    pub completion_tokens: u64,
    /// From the first model call to the verdict.
    pub wall_ms: u64,
}

/// What tokens cost, in one currency.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// Of a million prompt tokens.
    pub prompt: f64,
    /// Of a million completion tokens.
    pub completion: f64,
}

impl Prices {
    /// What a rollout cost.
    pub fn of(&self, used: &Used) -> f64 {
        (self.prompt * used.prompt_tokens as f64 + self.completion * used.completion_tokens as f64)
            / 1e6
    }
}

/// Two numbers: before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Both<T> {
    /// Of the first arm.
    pub before: T,
    /// Of the second arm.
    pub after: T,
}

impl<T> Both<T> {
    /// The same of both arms.
    pub fn of(make: impl Fn(Side) -> T) -> Self {
        Self {
            before: make(Side::Before),
            after: make(Side::After),
        }
    }

    /// That of one arm.
    pub fn at(&self, side: Side) -> &T {
        match side {
            Side::Before => &self.before,
            Side::After => &self.after,
        }
    }
}

/// Which arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    Before,
    /// The second.
    After,
}

impl Side {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::Before, Self::After];
}

/// A mean over tasks of both arms, and of the differences of their pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean of the first arm.
    pub before: f64,
    /// Mean of the second arm.
    pub after: f64,
    /// Second less first, by task.
    pub difference: Estimate,
}

/// Some tasks, compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Tasks with a pair.
    pub tasks: u64,
    /// Pairs.
    pub pairs: u64,
    /// The share of rollouts that solved their task, by task.
    pub success: Both<Estimate>,
    /// Second less first, by task.
    pub difference: Estimate,
    /// Tasks that the second arm solves more often.
    pub tasks_better: u64,
    /// Tasks that it solves less often.
    pub tasks_worse: u64,
    /// Pairs that only the second arm solved.
    pub gained: u64,
    /// Pairs that only the first arm solved.
    pub lost: u64,
    /// Model calls of a rollout.
    pub turns: Measured,
    /// Prompt and completion tokens of a rollout.
    pub tokens: Measured,
    /// Calls of a rollout that were not run.
    pub invalid_calls: Measured,
    /// Seconds of a rollout.
    pub seconds: Measured,
    /// What all rollouts cost, by solved ones; absent without prices, or where none is solved.
    pub cost_per_solved: Both<Option<f64>>,
}

/// How often an arm solves a task over its samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bucket {
    /// Never.
    Never,
    /// Some of them.
    Mixed,
    /// Every time.
    Always,
}

impl Bucket {
    /// All, hardest first.
    pub const ALL: [Self; 3] = [Self::Never, Self::Mixed, Self::Always];

    /// The bucket of a task with so many solved of so many samples.
    pub fn of(solved: usize, samples: usize) -> Self {
        match solved {
            0 => Self::Never,
            all if all == samples => Self::Always,
            _ => Self::Mixed,
        }
    }

    /// The name in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Mixed => "mixed",
            Self::Always => "always",
        }
    }
}

/// How many tasks are in which bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difficulty {
    /// Most samples of a task.
    pub samples: u64,
    /// Row: before, column: after; each never, mixed, always.
    pub tasks: [[u64; 3]; 3],
}

impl Difficulty {
    /// How many tasks an arm has in a bucket.
    pub fn count(&self, side: Side, bucket: Bucket) -> u64 {
        let n = bucket as usize;
        match side {
            Side::Before => self.tasks[n].iter().sum(),
            Side::After => self.tasks.iter().map(|row| row[n]).sum(),
        }
    }
}

/// Rollouts that are in no pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Their job named no task.
    pub without_task: Both<u64>,
    /// There is nothing to judge them by.
    pub unjudged: Both<u64>,
    /// They went where no recording went, and stopped there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unrecorded: Both<u64>,
    /// The same sample of the same task came before.
    pub repeated: Both<u64>,
    /// The other arm has no such sample of the task.
    pub unpaired: Both<u64>,
    /// Their trace cannot be read.
    pub unreadable: Both<u64>,
}

/// What is compared with what, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// All tasks.
    pub pooled: Group,
    /// By family of tasks.
    pub kinds: BTreeMap<String, Group>,
    /// How hard the tasks are.
    pub difficulty: Difficulty,
    /// Whether every verdict of both arms is the same.
    pub no_signal: bool,
    /// The pooled difference where samples on which one arm alone has a verdict speak against the second arm; absent where
    /// there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_difference: Option<Estimate>,
    /// What is in no pair.
    pub left_out: LeftOut,
}

/// An arm, as a report names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportArm {
    /// What it is called.
    pub label: String,
    /// The models that its rollouts asked for.
    pub models: Vec<String>,
    /// The adapters that answered, as their servers named them: `name` or `name#sha256:digest`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
    /// The version of an adapter that it stands for, as the job named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// The batches that its rollouts are of.
    pub batches: Vec<String>,
    /// Rollouts that were found.
    pub rollouts: u64,
    /// Those whose servers were recordings.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub replayed: u64,
    /// What its tokens cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prices: Option<Prices>,
}

/// A pair that a report shows side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShownPair {
    /// The task.
    pub task: String,
    /// Its family.
    pub kind: String,
    /// Which sample.
    pub sample: u32,
    /// Whether each arm solved it.
    pub solved: Both<bool>,
    /// The jobs.
    pub jobs: Both<String>,
}

/// An object that a report was made from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Source {
    /// Object path.
    pub path: String,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// Corrections of people that counted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub patches: u32,
}

fn is_zero<N: Default + PartialEq>(n: &N) -> bool {
    *n == N::default()
}

/// The loss of a training, step by step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LossCurve {
    /// The job.
    pub job: String,
    /// Step and mean loss of its supervised tokens.
    pub train: Vec<(u64, f64)>,
    /// Step and mean loss of held-out samples.
    pub eval: Vec<(u64, f64)>,
}

/// All numbers of a comparison, as they are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub report_version: u32,
    /// The job.
    pub job: String,
    /// When it was made, in microseconds since the epoch.
    pub created_at_us: Timestamp,
    /// The arms.
    pub arms: Both<ReportArm>,
    /// What came of it.
    pub comparison: Comparison,
    /// How intervals are made.
    pub method: String,
    /// Whether it is enough to publish.
    pub gate: GateVerdict,
    /// What prices are in.
    pub currency: String,
    /// Pairs that are shown side by side.
    pub shown: Vec<ShownPair>,
    /// How a model was trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub losses: Vec<LossCurve>,
    /// What it was made from: the trace of each rollout that was found, of both arms.
    pub sources: Vec<Source>,
    /// SHA-256 of the lines `{sha256}  {path}\n` of all sources, as `sha256sum` writes them.
    pub sources_sha256: String,
}

impl Report {
    /// Reads a report that somebody else may have written.
    ///
    /// # Errors
    /// It is broken, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FieldError> {
        let report: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be a report: {error}");
            FieldError::new("report", String::from_utf8_lossy(bytes), rule)
        })?;
        match report.report_version {
            REPORT_VERSION => Ok(report),
            other => {
                let rule = format!("must be {REPORT_VERSION}");
                Err(FieldError::new("report.report_version", other, rule))
            }
        }
    }

    /// What tables show of it.
    pub fn summary(&self) -> CompareSummary {
        let group = &self.comparison.pooled;
        CompareSummary {
            tasks: group.tasks,
            pairs: group.pairs,
            before: group.success.before.value,
            after: group.success.after.value,
            difference: group.difference,
            passed: self.gate.passed,
            verdict: self.gate.words.clone(),
        }
    }
}

/// What tables show of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompareSummary {
    /// Tasks that both arms tried.
    pub tasks: u64,
    /// Pairs of rollouts.
    pub pairs: u64,
    /// Share that the first arm solved.
    pub before: f64,
    /// Share that the second arm solved.
    pub after: f64,
    /// Second less first.
    pub difference: Estimate,
    /// Whether the gate lets the second arm pass.
    pub passed: bool,
    /// Why, in words.
    pub verdict: String,
}
