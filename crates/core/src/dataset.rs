//! The versions of data sets: one record each, which points at the files of the attempt that won.
//!
//! A `curate` job publishes its manifest first and takes a number then, as a training does for its adapter: the record at
//! [`layout::dataset_version`] is created if absent, and the first number that is free is its own. Whoever trains on a
//! data set, shows or pulls it reads this record first; the files that it names are verified by size and digest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::FieldError;
use crate::id::{BatchId, DatasetName, Fence, JobKey};
use crate::layout::{self, UploadName};
use crate::time::Timestamp;
use crate::trace::FileEntry;

/// The version of [`DatasetVersion`] that this code writes, and the only one that it reads.
pub const DATASET_RECORD_VERSION: u32 = 1;

/// How the error of a curation begins of which no conversation is left: whoever asked for it is told so, and nothing is
/// wrong with the system.
pub const NOTHING_LEFT: &str = "no conversation is left to train on";

/// What came of building a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CurateSummary {
    /// Conversations that were looked at.
    pub sources: u64,
    /// Rows that are trained on.
    pub train_rows: u64,
    /// Rows that are held out.
    pub eval_rows: u64,
    /// Tokens of all rows, as long as samples may be.
    pub tokens: u64,
    /// Of these, those that are trained or measured.
    pub supervised_tokens: u64,
    /// Conversations that were dropped, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dropped: BTreeMap<String, u64>,
}

/// What a data set was built from, in the order in which it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetSources {
    /// Batches of the project.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<BatchId>,
    /// Files among its uploads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uploads: Vec<UploadName>,
}

impl DatasetSources {
    /// These, and those of `more` that are not among them.
    pub fn with(mut self, more: &Self) -> Self {
        for batch in &more.batches {
            if !self.batches.contains(batch) {
                self.batches.push(batch.clone());
            }
        }
        for upload in &more.uploads {
            if !self.uploads.contains(upload) {
                self.uploads.push(upload.clone());
            }
        }
        self
    }
}

/// One version of a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetVersion {
    /// [`DATASET_RECORD_VERSION`].
    pub record_version: u32,
    /// Its name.
    pub name: DatasetName,
    /// Its number, from 1.
    pub n: u32,
    /// The job that made it.
    pub job: JobKey,
    /// The attempt whose files these are.
    pub fence: Fence,
    /// When it was published.
    pub created_at_us: Timestamp,
    /// What it was built from.
    pub sources: DatasetSources,
    /// Sums.
    pub summary: CurateSummary,
    /// Rows, manifest and card, each in one folder of the attempt.
    pub files: Vec<FileEntry>,
}

/// The manifest of a data set, among its files.
pub const MANIFEST_FILE: &str = "manifest.json";
/// How long its rows are, among its files.
pub const TALLY_FILE: &str = "tally.json";
/// The tokenizer whose ids are in it, among its files unless it is Qwen3's.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// What people and loaders read first, among its files.
pub const CARD_FILE: &str = "README.md";

impl DatasetVersion {
    /// The files that hold the rows of `split` in one form, in order: `train-00000.parquet` and so on.
    pub fn rows<'a>(&'a self, split: &str, form: &str) -> Vec<&'a FileEntry> {
        let (start, end) = (format!("{split}-"), format!(".{form}"));
        let named = self.files.iter().filter(|file| {
            let name = file_name(file);
            name.starts_with(&start) && name.ends_with(&end)
        });
        named.collect()
    }

    /// The file of this name.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file_name(file) == name)
    }

    /// Reads a record that somebody else may have written: of version `n` of `name`, in the project of its job.
    ///
    /// # Errors
    /// It is broken, of another version, of another data set, or names files outside its attempt.
    pub fn parse(bytes: &[u8], name: &DatasetName, n: u32) -> Result<Self, FieldError> {
        let record: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be the record of a version: {error}");
            FieldError::new("dataset", String::from_utf8_lossy(bytes), rule)
        })?;
        let refuse = |field: &str, value: &dyn std::fmt::Display, rule: String| {
            Err(FieldError::new(format!("dataset.{field}"), value, rule))
        };
        if record.record_version != DATASET_RECORD_VERSION {
            let rule = format!("must be {DATASET_RECORD_VERSION}");
            return refuse("record_version", &record.record_version, rule);
        }
        if record.name != *name {
            return refuse("name", &record.name, format!("must be {name}"));
        }
        if record.n != n {
            return refuse("n", &record.n, format!("must be {n}"));
        }
        let folder = layout::dataset_files(&record.job, record.fence);
        let is_own = |path: &str| {
            let file = path.strip_prefix(&folder);
            file.is_some_and(|file| !file.is_empty() && !file.contains('/') && file != "..")
        };
        match record.files.iter().find(|file| !is_own(&file.path)) {
            Some(file) => refuse("files", &file.path, format!("must lie in {folder}")),
            None if record.file(MANIFEST_FILE).is_none() => refuse(
                "files",
                &record.files.len(),
                format!("must name {MANIFEST_FILE}"),
            ),
            None => Ok(record),
        }
    }
}

/// The name of a file in its folder.
pub fn file_name(file: &FileEntry) -> &str {
    file.path
        .rsplit_once('/')
        .map_or(&*file.path, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_joined_without_repetition() {
        let of = |batches: &[&str], uploads: &[&str]| DatasetSources {
            batches: batches.iter().map(|b| b.parse().unwrap()).collect(),
            uploads: uploads
                .iter()
                .map(|u| UploadName::new(u).unwrap())
                .collect(),
        };
        let joined = of(&["a", "b"], &["x.json"]).with(&of(&["b", "c"], &["x.json", "y.json"]));
        assert_eq!(joined, of(&["a", "b", "c"], &["x.json", "y.json"]));
    }
}
