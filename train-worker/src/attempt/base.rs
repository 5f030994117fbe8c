//! The base model of a job: fetched, looked at, and named by what its files hold.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use espalier_core::adapter::BaseModel;
use espalier_core::error::FieldError;
use espalier_core::spec::TrainSpec;
use espalier_core::trace::sha256_hex;
use espalier_qwen3::Config;
use espalier_runtime::fetch::{Source, Wanted};
use espalier_runtime::tasks::blocking;
use sha2::{Digest, Sha256};

use super::Workshop;
use crate::error::TrainError;
use crate::trainer::{OfBase, config};

/// Bytes that are hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// The base model of a job.
pub(super) struct Base {
    /// Where it lies.
    pub(super) folder: PathBuf,
    pub(super) config: Config,
    pub(super) tokenizer: OfBase,
    /// Its name, and what its files hold.
    pub(super) model: BaseModel,
}

impl Workshop {
    /// Fetches the base model of a job and looks at it.
    pub(super) async fn base_model(&self, train: &TrainSpec) -> Result<Base, TrainError> {
        let source = Source::parse(&train.base, train.revision.as_deref()).await?;
        if matches!(source, Source::Folder(_)) && !self.allow_local_models {
            let rule = "must be a repository of the hub or s3://…: this worker reads no folders \
                (--allow-local-models)";
            return Err(FieldError::new("train.base", &train.base, rule).into());
        }
        let folder = self.fetcher.fetch(&source, Wanted::Model).await?;
        let read = folder.clone();
        let (config, tokenizer, sha256) = blocking("train.base", move || examine(&read)).await??;
        Ok(Base {
            folder,
            config,
            tokenizer,
            model: BaseModel {
                name: train.base.clone(),
                revision: train.revision.clone(),
                sha256,
            },
        })
    }
}

fn examine(folder: &Path) -> Result<(Config, OfBase, String), TrainError> {
    let (config, tokenizer) = config(folder)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| TrainError::Read { path, source }
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed(folder))? {
        let name = entry.map_err(failed(folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        if name == "config.json" || name.ends_with(".safetensors") {
            files.push(name.to_owned());
        }
    }
    files.sort_unstable();
    let mut lines = String::new();
    for name in files {
        let path = folder.join(&name);
        let sha256 = hash(&path).map_err(failed(&path))?;
        lines.push_str(&format!("{sha256}  {name}\n"));
    }
    Ok((config, tokenizer, sha256_hex(lines.as_bytes())))
}

fn hash(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            count => digest.update(&chunk[..count]),
        }
    }
    let hash = digest.finalize();
    Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}
