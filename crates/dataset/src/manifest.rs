//! What a data set says of itself: settings, files, counts, and what became of every source.

use std::collections::BTreeMap;

use espalier_core::error::{FieldError, shorten};
use espalier_core::time::Timestamp;
use espalier_core::trace::FileEntry;
use espalier_core::trace::edits::Corrections;
use espalier_qwen3_text::CHAT_TEMPLATE_SHA256;
use serde::{Deserialize, Serialize};

use crate::build::{BuildSpec, Chosen};
use crate::row::Split;

/// The version that this code writes, and the only one that it reads.
pub const SCHEMA_VERSION: u32 = 1;

/// The manifest of a data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetManifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// When it was built.
    pub created_at_us: Timestamp,
    /// How it was built.
    pub settings: BuildSpec,
    /// SHA-256 of the chat template that renders its rows.
    pub template_sha256: String,
    /// SHA-256 of the tokenizer whose ids are in it. Unless it is Qwen3's, its file is beside the rows.
    pub tokenizer_sha256: String,
    /// Sums.
    pub counts: Counts,
    /// Models that spoke in it, the first of them where there are many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Its files.
    pub files: Vec<FileEntry>,
    /// Every source that was offered, in order.
    pub sources: Vec<SourceEntry>,
}

/// Sums over a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Sources that were offered.
    pub sources: usize,
    /// Sources that have rows, of either split.
    pub train_sources: usize,
    /// Likewise, held out.
    pub eval_sources: usize,
    /// Rows that are trained on.
    pub train_rows: usize,
    /// Rows that are held out.
    pub eval_rows: usize,
    /// Groups of tasks that are trained on; tasks whose conversations are alike are one group.
    pub train_tasks: usize,
    /// Groups of tasks that are held out.
    pub eval_tasks: usize,
    /// Sources that were dropped, by reason.
    pub dropped: BTreeMap<DropReason, usize>,
    /// Rows that begin anew because a prompt did not continue what was sampled before it.
    pub drift_breaks: usize,
    /// Recorded calls whose token ids do not spell their message; they are rendered from text.
    pub misspelt_calls: usize,
}

/// What became of a source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceEntry {
    /// Its name: the object of a trace, or file and row.
    pub source: String,
    /// SHA-256, in hex, of the object that its rows were made from: the file of a trace, or a whole upload. Absent where
    /// it was dropped, and in manifests of builds that did not write it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What people and checks had changed of the trace that its rows were made from. Absent where they had changed nothing, and in
    /// manifests of builds that did not write it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrections: Option<Corrections>,
    /// Its side; absent where it was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// The rows that it gave.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rows: usize,
    /// Why it was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<DropReason>,
    /// More of why: of what it is a duplicate, which rule it breaks.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// Why a source is not in a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// It cannot be read.
    Unreadable,
    /// Somebody rejected it.
    Rejected,
    /// It has no turn of the assistant that could be trained.
    NothingTrained,
    /// The filter does not admit it.
    Filtered,
    /// It says what an earlier one says.
    Duplicate,
    /// It says nearly what an earlier one says.
    NearDuplicate,
    /// There are enough of its task kind.
    OverKind,
    /// The chat template cannot render it.
    Unrenderable,
    /// None of its rows gives a sample: the first trained turn ends beyond the longest length.
    NoSample,
}

impl DropReason {
    /// The name in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Rejected => "rejected",
            Self::NothingTrained => "nothing_trained",
            Self::Filtered => "filtered",
            Self::Duplicate => "duplicate",
            Self::NearDuplicate => "near_duplicate",
            Self::OverKind => "over_kind",
            Self::Unrenderable => "unrenderable",
            Self::NoSample => "no_sample",
        }
    }
}

fn is_zero(rows: &usize) -> bool {
    *rows == 0
}

impl SourceEntry {
    pub(crate) fn new(source: &str) -> Self {
        Self {
            source: source.to_owned(),
            sha256: None,
            corrections: None,
            split: None,
            rows: 0,
            dropped: None,
            detail: String::new(),
        }
    }

    pub(crate) fn drop(&mut self, reason: DropReason, detail: String) {
        self.split = None;
        self.rows = 0;
        self.dropped = Some(reason);
        self.detail = shorten(&detail);
    }
}

impl Chosen {
    /// The manifest, once all rows are in `files`, in which `models` spoke.
    pub fn manifest(
        self,
        files: Vec<FileEntry>,
        models: Vec<String>,
        created_at_us: Timestamp,
    ) -> DatasetManifest {
        let counts = self.counts();
        DatasetManifest {
            schema_version: SCHEMA_VERSION,
            created_at_us,
            settings: self.spec,
            template_sha256: CHAT_TEMPLATE_SHA256.to_owned(),
            tokenizer_sha256: self.tokenizer_sha256,
            counts,
            models,
            files,
            sources: self.entries,
        }
    }

    /// Sums over what was built so far.
    pub fn counts(&self) -> Counts {
        let [train_tasks, eval_tasks] = self.tasks;
        let mut counts = Counts {
            sources: self.entries.len(),
            train_tasks,
            eval_tasks,
            drift_breaks: self.drift.breaks,
            misspelt_calls: self.drift.misspelt,
            ..Counts::default()
        };
        for entry in &self.entries {
            let (sources, rows) = match (entry.split, entry.dropped) {
                (Some(Split::Train), _) => (&mut counts.train_sources, &mut counts.train_rows),
                (Some(Split::Eval), _) => (&mut counts.eval_sources, &mut counts.eval_rows),
                (None, Some(reason)) => {
                    *counts.dropped.entry(reason).or_default() += 1;
                    continue;
                }
                (None, None) => continue,
            };
            *sources += 1;
            *rows += entry.rows;
        }
        counts
    }
}

impl DatasetManifest {
    /// Reads a manifest that somebody else may have written.
    ///
    /// # Errors
    /// It is none, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FieldError> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be the manifest of a data set: {error}");
            FieldError::new("manifest", String::from_utf8_lossy(bytes), rule)
        })?;
        if manifest.schema_version != SCHEMA_VERSION {
            let rule = format!("must be {SCHEMA_VERSION}");
            return Err(FieldError::new(
                "schema_version",
                manifest.schema_version,
                rule,
            ));
        }
        Ok(manifest)
    }
}
