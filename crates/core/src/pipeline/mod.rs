//! Pipelines: what whoever runs one writes down, so that it may be killed at any moment and another one goes on.
//!
//! A pipeline is expanded into batches of ordinary jobs, one a step, and no coordinator knows of it. A step is named by its
//! content: by a digest of what it does and of the records of the steps that it takes as input. What it came to is a
//! [`StepRecord`], created once under that digest; the queue, whose memory of ended jobs expires, is not asked again. What
//! is to come is a [`PipelinePlan`], from which, with the records, every digest follows, so that who only looks on knows it.

mod plan;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::adapter::Agreement;
use crate::compare::Estimate;
use crate::error::FieldError;
use crate::id::{BatchId, PipelineName};
use crate::spec::{AdapterRef, DatasetRef};
use crate::time::Timestamp;
use crate::trace::sha256_hex;

pub use plan::{PIPELINE_PLAN_VERSION, PipelinePlan, PlannedStep};

/// The version of [`StepRecord`] that this code writes, and the only one that it reads.
pub const STEP_RECORD_VERSION: u32 = 1;
/// Longest name of a pipeline, in bytes: the ids of its batches end with a step, a digest and a number.
pub const PIPELINE_NAME_BYTES_MAX: usize = 64;
/// Hex digits of a digest: enough that two steps of one pipeline never share one, short enough for the id of a batch.
const DIGEST_LEN: usize = 12;

/// A step of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The model before tries the held-out tasks.
    Baseline,
    /// It tries the training tasks some times without hints, to tell how hard they are.
    Probe,
    /// It tries the training tasks to make traces.
    Rollouts,
    /// The good traces become a data set.
    Dataset,
    /// The data set becomes a version of an adapter.
    Train,
    /// Somebody serves that version. A wait without a record: what is served now may be gone later.
    Serve,
    /// The version tries the held-out tasks.
    Evaluation,
    /// Both are compared.
    Comparison,
    /// The version becomes `latest`, or does not.
    Publish,
}

impl Step {
    /// All, in their order.
    pub const ALL: [Self; 9] = [
        Self::Baseline,
        Self::Probe,
        Self::Rollouts,
        Self::Dataset,
        Self::Train,
        Self::Serve,
        Self::Evaluation,
        Self::Comparison,
        Self::Publish,
    ];

    /// The name in records, ids of batches and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Probe => "probe",
            Self::Rollouts => "rollouts",
            Self::Dataset => "dataset",
            Self::Train => "train",
            Self::Serve => "serve",
            Self::Evaluation => "evaluation",
            Self::Comparison => "comparison",
            Self::Publish => "publish",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a step is called: the beginning of a SHA-256 of its content, in lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StepDigest(Box<str>);

impl StepDigest {
    /// The digest of a step that does `work`, itself a digest, by `model`, with the records whose SHA-256 are `inputs`.
    ///
    /// The canonical form is JSON without white space, keys sorted.
    pub fn of(step: Step, work: &str, model: Option<&str>, inputs: &[&str]) -> Self {
        let mut content = serde_json::json!({
            "step": step, "work": work, "model": model, "inputs": inputs,
        });
        content.sort_all_objects();
        let sha256 = sha256_hex(content.to_string().as_bytes());
        Self(sha256[..DIGEST_LEN].into())
    }

    /// The `tries`th batch of the step, from 1: one that was cancelled takes no more jobs, so that another one follows it.
    pub fn batch(
        &self,
        pipeline: &PipelineName,
        step: Step,
        tries: u32,
    ) -> Result<BatchId, FieldError> {
        match tries {
            0 | 1 => BatchId::new(format!("{pipeline}.{step}.{self}")),
            more => BatchId::new(format!("{pipeline}.{step}.{self}.{more}")),
        }
    }
}

/// The pipeline and the step whose batch this is, by how [`StepDigest::batch`] names it; none where it is another's.
pub fn step_of_batch(batch: &str) -> Option<(PipelineName, Step)> {
    let named = |name: &str| {
        let (rest, digest) = name.rsplit_once('.')?;
        digest.parse::<StepDigest>().ok()?;
        let (pipeline, step) = rest.rsplit_once('.')?;
        let step = Step::ALL.into_iter().find(|known| known.as_str() == step)?;
        Some((PipelineName::new(pipeline).ok()?, step))
    };
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (first, tries) = batch.rsplit_once('.')?;
    named(batch).or_else(|| named(first).filter(|_| is_number(tries)))
}

impl fmt::Display for StepDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for StepDigest {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == DIGEST_LEN && text.bytes().all(is_hex) {
            return Ok(Self(text.into()));
        }
        let rule = format!("must be {DIGEST_LEN} lower-case hex digits");
        Err(FieldError::new("digest", text, rule))
    }
}

impl TryFrom<String> for StepDigest {
    type Error = FieldError;

    fn try_from(text: String) -> Result<Self, FieldError> {
        text.parse()
    }
}

impl From<StepDigest> for String {
    fn from(digest: StepDigest) -> Self {
        digest.0.into()
    }
}

/// What the jobs of a step came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepCounts {
    /// Jobs.
    pub jobs: u64,
    /// Jobs that ended well.
    pub succeeded: u64,
    /// Jobs that ended badly.
    pub dead: u64,
    /// Rollouts whose every check held.
    pub solved: u64,
    /// Rollouts that a check judged.
    pub judged: u64,
    /// Prompt tokens of rollouts.
    pub prompt_tokens: u64,
    /// Completion tokens of rollouts.
    pub completion_tokens: u64,
}

/// How often the training tasks were solved when they were probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeBuckets {
    /// Tasks that every sample solved.
    pub always: u64,
    /// Tasks that some of them solved.
    pub sometimes: u64,
    /// Tasks that none of them solved.
    pub never: u64,
    /// Tasks of which no sample was judged.
    pub unjudged: u64,
}

/// What a step leaves to the steps after it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StepOutput {
    /// The traces of its batch.
    Rollouts,
    /// How hard tasks are.
    Probe {
        /// In numbers.
        tasks: ProbeBuckets,
        /// Tasks that are always solved, which teach nothing.
        dropped: Vec<String>,
    },
    /// A version of a data set.
    Dataset {
        /// The version.
        dataset: DatasetRef,
        /// SHA-256 of the version's record, in hex.
        sha256: String,
        /// Rows that are trained on.
        train_rows: u64,
        /// Rows that are held out.
        eval_rows: u64,
        /// Tokens of all rows.
        tokens: u64,
    },
    /// A version of an adapter.
    Adapter {
        /// The version.
        adapter: AdapterRef,
        /// SHA-256 of the version's record, in hex.
        sha256: String,
        /// Optimizer steps.
        steps: u64,
        /// Tokens that went through the model.
        tokens: u64,
        /// Loss of the last step.
        loss: f64,
        /// Loss of the held-out rows, where there are any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        eval_loss: Option<f64>,
        /// How near the training was to serving; absent in records from before it was compared.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        agreement: Option<Agreement>,
    },
    /// A report.
    Comparison {
        /// Object path of the report.
        report: String,
        /// SHA-256 of it, in hex.
        sha256: String,
        /// Tasks that both models tried.
        tasks: u64,
        /// The share that the model before solves.
        before: Estimate,
        /// The share that the model after solves.
        after: Estimate,
        /// Second less first.
        difference: Estimate,
        /// Whether the gate lets the model after pass.
        passed: bool,
        /// Why, in words.
        verdict: String,
    },
    /// The version is `latest`, or has a share beside the one that is.
    Published {
        /// The version.
        adapter: AdapterRef,
        /// Its share of conversations; none: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        canary: Option<f64>,
        /// The number of the entry that says so.
        seq: u64,
    },
    /// It is not.
    Unpublished {
        /// Why.
        why: String,
    },
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// [`STEP_RECORD_VERSION`].
    pub record_version: u32,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// What the step is called.
    pub digest: StepDigest,
    /// Which step it is.
    pub step: Step,
    /// Of which round, from 1.
    pub round: u32,
    /// The batch of its jobs, where it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchId>,
    /// SHA-256 of the records that it took as input, in hex.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<String>,
    /// When its batch was opened.
    pub started_at_us: Timestamp,
    /// When its last job had ended.
    pub ended_at_us: Timestamp,
    /// What its jobs came to.
    pub counts: StepCounts,
    /// What it leaves.
    pub output: StepOutput,
}

impl StepRecord {
    /// Reads a record that somebody else may have written: that of the step `digest` of `pipeline`.
    ///
    /// # Errors
    /// It is broken, of another version, or of another step or pipeline.
    pub fn parse(
        bytes: &[u8],
        pipeline: &PipelineName,
        digest: &StepDigest,
    ) -> Result<Self, FieldError> {
        let record: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be the record of a step: {error}");
            FieldError::new("step", String::from_utf8_lossy(bytes), rule)
        })?;
        let refuse = |field: &str, value: &dyn fmt::Display, rule: String| {
            Err(FieldError::new(format!("step.{field}"), value, rule))
        };
        if record.record_version != STEP_RECORD_VERSION {
            let rule = format!("must be {STEP_RECORD_VERSION}");
            return refuse("record_version", &record.record_version, rule);
        }
        if record.pipeline != *pipeline {
            return refuse("pipeline", &record.pipeline, format!("must be {pipeline}"));
        }
        if record.digest != *digest {
            return refuse("digest", &record.digest, format!("must be {digest}"));
        }
        match record.is_of_its_step() {
            true => Ok(record),
            false => refuse("output", &record.step, "must be of its step".to_owned()),
        }
    }

    /// How long it took, in milliseconds.
    pub fn took_ms(&self) -> u64 {
        let took = self.ended_at_us.since(self.started_at_us);
        u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
    }

    /// The version that it trained, where it did.
    pub fn adapter(&self) -> Option<&AdapterRef> {
        match &self.output {
            StepOutput::Adapter { adapter, .. } => Some(adapter),
            _ => None,
        }
    }

    fn is_of_its_step(&self) -> bool {
        match (&self.step, &self.output) {
            (Step::Baseline | Step::Rollouts | Step::Evaluation, StepOutput::Rollouts)
            | (Step::Probe, StepOutput::Probe { .. })
            | (Step::Dataset, StepOutput::Dataset { .. })
            | (Step::Train, StepOutput::Adapter { .. })
            | (Step::Comparison, StepOutput::Comparison { .. }) => self.batch.is_some(),
            (Step::Publish, StepOutput::Published { .. } | StepOutput::Unpublished { .. }) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_content_has_another_digest_and_the_same_the_same() {
        let of =
            |step, work: &str, model, inputs: &[&str]| StepDigest::of(step, work, model, inputs);
        let one = of(Step::Rollouts, "w", Some("m"), &["a", "b"]);
        // Batches lie under it: another form of the content would begin every pipeline anew.
        assert_eq!(one.to_string(), "2f6f7d5c6ccc");
        assert_eq!(one, of(Step::Rollouts, "w", Some("m"), &["a", "b"]));
        for other in [
            of(Step::Probe, "w", Some("m"), &["a", "b"]),
            of(Step::Rollouts, "v", Some("m"), &["a", "b"]),
            of(Step::Rollouts, "w", Some("n"), &["a", "b"]),
            of(Step::Rollouts, "w", None, &["a", "b"]),
            of(Step::Rollouts, "w", Some("m"), &["b", "a"]),
            of(Step::Rollouts, "w", Some("m"), &["a"]),
        ] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn a_batch_is_named_by_pipeline_step_and_digest() {
        let digest: StepDigest = "0123456789ab".parse().unwrap();
        let name: PipelineName = "shop".parse().unwrap();
        let batch = |tries| digest.batch(&name, Step::Train, tries).unwrap().to_string();
        assert_eq!(batch(1), "shop.train.0123456789ab");
        assert_eq!(batch(3), "shop.train.0123456789ab.3");
        for tries in [1, 3] {
            let found = step_of_batch(&batch(tries));
            assert_eq!(found, Some((name.clone(), Step::Train)));
        }
        for other in [
            "shop",
            "shop.train",
            "shop.trane.0123456789ab",
            "a.train.0123456789ab.x",
        ] {
            assert_eq!(step_of_batch(other), None, "{other}");
        }
        let longest = PipelineName::new("x".repeat(PIPELINE_NAME_BYTES_MAX)).unwrap();
        for step in Step::ALL {
            assert!(digest.batch(&longest, step, u32::MAX).is_ok());
        }
        for bad in ["", "0123456789a", "0123456789abc", "0123456789aB"] {
            assert!(bad.parse::<StepDigest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_the_stored_ones() {
        for step in Step::ALL {
            let stored = serde_json::to_string(&step).unwrap();
            assert_eq!(stored, format!("\"{step}\""));
        }
    }
}
