//! The versions of what was trained: one record each, which points at the files of the attempt that won.
//!
//! A `train` job publishes its manifest first and takes a number then: the record at
//! [`layout::adapter_version`] is created if absent, and the first number that is free is its own. A job that is adopted
//! finds its number by its manifest, so that a repetition takes none. Whoever pulls, serves or pushes an adapter reads
//! this record alone; the files that it names are verified by size and digest.

mod agreement;
mod latest;

use serde::{Deserialize, Serialize};

use crate::error::FieldError;
use crate::id::{AdapterName, Fence, JobKey};
use crate::layout;
use crate::time::Timestamp;
use crate::trace::FileEntry;

pub use agreement::{Agreement, Difference};
pub use latest::{Canary, LATEST_RECORD_VERSION, LatestEntry, Why, rollback_to};

/// The version of [`AdapterVersion`] that this code writes, and the only one that it reads.
pub const ADAPTER_RECORD_VERSION: u32 = 1;

/// What was trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// A LoRA adapter: `adapter_model.safetensors` and `adapter_config.json`, as PEFT has them.
    Lora,
    /// All weights: a model's folder, with `config.json` and `*.safetensors`.
    Full,
}

/// The model that training began with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseModel {
    /// As the job named it: a repository of the hub, a bucket, or a folder.
    pub name: String,
    /// Branch, tag or commit of the hub's repository, where the job named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// SHA-256, in hex, of `config.json` and of each file of weights, in the order of their names: the digest of the
    /// lines `{sha256}  {name}\n`, as `sha256sum` writes them.
    pub sha256: String,
}

impl BaseModel {
    /// How a manifest names it among its parents, which are object paths otherwise.
    pub fn parent(&self) -> String {
        let revision = self
            .revision
            .as_deref()
            .map(|revision| format!("@{revision}"));
        let revision = revision.unwrap_or_default();
        format!("model:{}{revision}#sha256:{}", self.name, self.sha256)
    }

    /// The digest of the model that a parent names; none: it is another sort of parent.
    pub fn sha256_of_parent(parent: &str) -> Option<&str> {
        let (_, sha256) = parent.strip_prefix("model:")?.rsplit_once("#sha256:")?;
        Some(sha256)
    }
}

/// How training went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSummary {
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens that went through the model, over all steps.
    pub tokens: u64,
    /// Of these, those that it was trained to predict.
    pub supervised_tokens: u64,
    /// Mean of the last step's loss over its supervised tokens.
    pub loss: f64,
    /// The same over the held-out samples, of the weights that are published; absent: there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// After how many steps the published weights were taken.
    pub best_step: u64,
    /// Milliseconds of computing, over all attempts whose steps count.
    pub wall_ms: u64,
    /// How near it was to serving before its first step; absent: it was told of no rollouts to be held against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Agreement>,
}

/// One version of an adapter, or of a model that was trained as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterVersion {
    /// [`ADAPTER_RECORD_VERSION`].
    pub record_version: u32,
    /// Its name.
    pub name: AdapterName,
    /// Its number, from 1.
    pub n: u32,
    /// What it is.
    pub kind: AdapterKind,
    /// The job that made it; its manifest names what it was made from.
    pub job: JobKey,
    /// The attempt whose files these are.
    pub fence: Fence,
    /// When it was published.
    pub created_at_us: Timestamp,
    /// What it changes.
    pub base: BaseModel,
    /// Object path of what it was trained on: a version of a data set, or an upload.
    pub dataset: String,
    /// How training went.
    pub training: TrainSummary,
    /// The files of the adapter or model, each in one folder of the attempt: what follows the last `/` is its name
    /// there.
    pub files: Vec<FileEntry>,
}

impl AdapterVersion {
    /// Reads a record that somebody else may have written: of version `n` of `name`, in the project of its job.
    ///
    /// # Errors
    /// It is broken, of another version, of another adapter, or names files outside its attempt.
    pub fn parse(bytes: &[u8], name: &AdapterName, n: u32) -> Result<Self, FieldError> {
        let record: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be the record of a version: {error}");
            FieldError::new("adapter", String::from_utf8_lossy(bytes), rule)
        })?;
        let refuse = |field: &str, value: &dyn std::fmt::Display, rule: String| {
            Err(FieldError::new(format!("adapter.{field}"), value, rule))
        };
        if record.record_version != ADAPTER_RECORD_VERSION {
            let rule = format!("must be {ADAPTER_RECORD_VERSION}");
            return refuse("record_version", &record.record_version, rule);
        }
        if record.name != *name {
            return refuse("name", &record.name, format!("must be {name}"));
        }
        if record.n != n {
            return refuse("n", &record.n, format!("must be {n}"));
        }
        let folder = layout::adapter_files(&record.job, record.fence);
        let is_own = |path: &str| {
            let file = path.strip_prefix(&folder);
            file.is_some_and(|file| !file.is_empty() && !file.contains('/') && file != "..")
        };
        match record.files.iter().find(|file| !is_own(&file.path)) {
            Some(file) => refuse("files", &file.path, format!("must lie in {folder}")),
            None if record.files.is_empty() => {
                refuse("files", &0, "must name at least one file".to_owned())
            }
            None => Ok(record),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_names_the_model_and_its_digest() {
        let base = BaseModel {
            name: "Qwen/Qwen3-4B".to_owned(),
            revision: Some("main".to_owned()),
            sha256: "9f86".to_owned(),
        };
        assert_eq!(base.parent(), "model:Qwen/Qwen3-4B@main#sha256:9f86");
        assert_eq!(BaseModel::sha256_of_parent(&base.parent()), Some("9f86"));
        assert_eq!(BaseModel::sha256_of_parent("shop/datasets/a/v1.json"), None);
    }
}
