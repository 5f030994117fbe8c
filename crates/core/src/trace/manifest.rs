//! The manifest: written last, created once, and the only thing that makes an attempt visible.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{SCHEMA_VERSION, StopReason, Totals};
use crate::adapter::TrainSummary;
use crate::answers::GenerateSummary;
use crate::compare::CompareSummary;
use crate::compare::turns::ScoreSummary;
use crate::dataset::CurateSummary;
use crate::error::FieldError;
use crate::id::{Fence, JobKey};
use crate::layout;
use crate::spec::{ExportSummary, SpecDigest};
use crate::time::Timestamp;

/// The published result of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The job.
    pub job: JobKey,
    /// The attempt that won, from 1.
    pub attempt: u32,
    /// Its lease.
    pub fence: Fence,
    /// What the job asked for; of a batch of requests [with what they said](SpecDigest::with_input), as
    /// [`lines_sha256`](crate::answers::lines_sha256) has it. Only an attempt at a job that asks for the same takes the
    /// result over. Absent where no job asked for it: a trace that was imported, a conversation in a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_sha256: Option<SpecDigest>,
    /// When it was published.
    pub created_at_us: Timestamp,
    /// Every file that belongs to the result.
    pub files: Vec<FileEntry>,
    /// What it was made from, as object paths.
    pub parents: Vec<String>,
    /// What tables show of it.
    pub summary: Summary,
}

/// What tables show of a result, by what the job did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Summary {
    /// A rollout, whose trace is among the files.
    Rollout(RolloutSummary),
    /// A batch of requests: the files are its answers, piece by piece.
    Generate(GenerateSummary),
    /// A training: the files are the adapter's, and what tells how it went.
    Train(TrainSummary),
    /// An export: what went out is elsewhere.
    Export(ExportSummary),
    /// A data set: the files are its rows, its own manifest and its card.
    Curate(CurateSummary),
    /// A comparison: the files are its report.
    Compare(CompareSummary),
    /// Turns that a model was asked for: the file has each.
    Score(ScoreSummary),
}

impl Summary {
    /// That of a rollout.
    pub fn rollout(&self) -> Option<&RolloutSummary> {
        match self {
            Self::Rollout(summary) => Some(summary),
            _ => None,
        }
    }

    /// That of a batch of requests.
    pub fn generate(&self) -> Option<&GenerateSummary> {
        match self {
            Self::Generate(summary) => Some(summary),
            _ => None,
        }
    }

    /// That of a training.
    pub fn train(&self) -> Option<&TrainSummary> {
        match self {
            Self::Train(summary) => Some(summary),
            _ => None,
        }
    }

    /// That of an export.
    pub fn export(&self) -> Option<&ExportSummary> {
        match self {
            Self::Export(summary) => Some(summary),
            _ => None,
        }
    }

    /// That of a data set.
    pub fn curate(&self) -> Option<&CurateSummary> {
        match self {
            Self::Curate(summary) => Some(summary),
            _ => None,
        }
    }

    /// That of a comparison.
    pub fn compare(&self) -> Option<&CompareSummary> {
        match self {
            Self::Compare(summary) => Some(summary),
            _ => None,
        }
    }
}

impl From<RolloutSummary> for Summary {
    fn from(summary: RolloutSummary) -> Self {
        Self::Rollout(summary)
    }
}

/// A file and the proof that it is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Object path.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of the bytes, in hex.
    pub sha256: String,
}

impl FileEntry {
    /// The entry of `bytes` at `path`.
    pub fn of(path: impl Into<String>, bytes: &[u8]) -> Self {
        Self {
            path: path.into(),
            size: bytes.len() as u64,
            sha256: sha256_hex(bytes),
        }
    }

    /// Whether `bytes` are the ones that the entry names.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        self.size == bytes.len() as u64 && self.sha256 == sha256_hex(bytes)
    }
}

/// What the queue and tables carry of a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutSummary {
    /// In [0, 1]; absent without checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<f64>,
    /// Why the loop stopped.
    pub stop: StopReason,
    /// The first check that did not hold, in words; empty where all held.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The task; empty where the job named none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub task_id: String,
    /// The family of tasks; empty where the job named none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub task_kind: String,
    /// Sums over the rollout.
    pub totals: Totals,
}

impl RolloutSummary {
    /// Whether every check held; a rollout without checks is neither solved nor failed.
    pub fn solved(&self) -> Option<bool> {
        self.reward.map(|reward| reward >= 1.0)
    }
}

impl Manifest {
    /// Reads a manifest that somebody else may have written, and checks that it is about `job` and names files of its
    /// own attempt or shared blobs only.
    pub fn parse(bytes: &[u8], job: &JobKey) -> Result<Self, FieldError> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| {
            FieldError::new(
                "manifest",
                String::from_utf8_lossy(bytes),
                format!("must be a manifest: {e}"),
            )
        })?;
        if manifest.schema_version != SCHEMA_VERSION {
            let rule = format!("must be {SCHEMA_VERSION}");
            return Err(FieldError::new(
                "manifest.schema_version",
                manifest.schema_version,
                rule,
            ));
        }
        if manifest.job != *job {
            return Err(FieldError::new(
                "manifest.job",
                &manifest.job,
                format!("must be {job}"),
            ));
        }
        let own = layout::attempt(job, manifest.fence);
        let blobs = layout::blob(&job.project, "");
        for file in &manifest.files {
            let inside = file.path.starts_with(&own) || file.path.starts_with(&blobs);
            if !inside || file.path.split('/').any(|part| part == "..") {
                return Err(FieldError::new(
                    "manifest.files",
                    &file.path,
                    format!("must lie under {own} or {blobs}"),
                ));
            }
        }
        match &manifest.summary {
            Summary::Rollout(_) if manifest.trace_file().is_none() => Err(FieldError::new(
                "manifest.files",
                manifest.files.len(),
                "must name the trace",
            )),
            Summary::Generate(_) => manifest.check_answers().map(|()| manifest),
            _ => Ok(manifest),
        }
    }

    /// Pieces of answers are read in the order in which they are named, so that it must be theirs.
    fn check_answers(&self) -> Result<(), FieldError> {
        for (n, file) in (0..).zip(&self.files) {
            let path = layout::answers(&self.job, self.fence, n);
            if file.path != path {
                let rule = format!("must be {path} at its place");
                return Err(FieldError::new("manifest.files", &file.path, rule));
            }
        }
        Ok(())
    }

    /// The trace's entry.
    pub fn trace_file(&self) -> Option<&FileEntry> {
        let path = layout::trace(&self.job, self.fence);
        self.files.iter().find(|file| file.path == path)
    }
}

/// SHA-256 of `bytes` in lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// `bytes` in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing into a `String` cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}
