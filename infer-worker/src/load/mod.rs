//! Where models and adapters come from: a folder, a repository of the Hugging Face hub, or an object store.
//!
//! Whatever the place, what comes out is a folder with the few files that are read here; nothing else of a repository
//! is fetched. [`model`] reads such a folder. What this is not: it reads no weights, which is the business of
//! `crates/qwen3`.

mod bucket;
mod hub;
pub mod model;
mod progress;

use std::path::{Path, PathBuf};

use espalier_core::error::shorten;
use espalier_qwen3::Lora;
use espalier_runtime::config::Environment;
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::{BlockingFailed, DeadlineExceeded};
use futures::future::BoxFuture;

use bucket::Bucket;
use hub::Hub;

const INDEX: &str = "model.safetensors.index.json";
/// Most shards of a model: the largest Qwen3 has some hundred.
const SHARDS_MAX: usize = 1_000;
/// Largest index, in bytes: some tens of thousands of tensors.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Why files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// What was named is nothing that files come from.
    #[error(
        "`{name}` is no folder, no repository of the hub such as Qwen/Qwen3-0.6B, and no s3://bucket/prefix"
    )]
    Source {
        /// What was named.
        name: String,
    },
    /// A place that has not what it must have.
    #[error("{place} has no {file}")]
    Missing {
        /// Folder, repository or URL.
        place: String,
        /// The file.
        file: String,
    },
    /// An index that cannot be followed.
    #[error("{INDEX} of {place} {rule}")]
    Index {
        /// Folder, repository or URL.
        place: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// The hub did not give a file.
    #[error("the hub did not give {file} of {repo}")]
    Hub {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: Box<hf_hub::api::sync::ApiError>,
    },
    /// The hub's client cannot be made.
    #[error("the client of the hub cannot be made")]
    HubClient(#[source] Box<hf_hub::api::sync::ApiError>),
    /// What came is not what was promised.
    #[error("{file} of {place} is damaged: {what} must be {expected}, is {found}; it was removed")]
    Damaged {
        /// Folder, repository or URL.
        place: String,
        /// The file.
        file: String,
        /// Size or digest.
        what: &'static str,
        /// As promised.
        expected: String,
        /// As it came.
        found: String,
    },
    /// Its files are not of one version.
    #[error("{file} of {place} was replaced while files were fetched: ask for it again")]
    Changed {
        /// URL.
        place: String,
        /// The file.
        file: String,
    },
    /// It is larger than it may be.
    #[error("{file} of {place} must have at most {bytes_max} bytes, has {bytes}")]
    TooLarge {
        /// Repository or URL.
        place: String,
        /// The file.
        file: String,
        /// How many it has.
        bytes: u64,
        /// How many it may have.
        bytes_max: u64,
    },
    /// Nothing came for a while.
    #[error("{file} of {place} stopped coming: nothing for {after_s} s")]
    Stalled {
        /// Folder, repository or URL.
        place: String,
        /// The file.
        file: String,
        /// For how long.
        after_s: u64,
    },
    /// The object store did not give it.
    #[error("the object store did not give what was asked for")]
    Store(#[from] StoreError),
    /// A file of the cache, or of a folder, cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A folder for what is fetched is needed.
    #[error("no folder for what is fetched: set `--download-dir`, HF_HOME or HOME")]
    NoCache,
    /// A question that was not answered in time.
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

/// Where files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of this machine.
    Folder(PathBuf),
    /// A repository of the hub.
    Hub {
        /// `owner/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// A bucket and a prefix: `s3://…`.
    Bucket {
        /// The URL.
        url: String,
    },
}

impl Source {
    /// What `name` means. A folder that is there comes before a repository of the same name, as with transformers.
    ///
    /// # Errors
    /// [`LoadError::Source`].
    pub async fn parse(name: &str, revision: Option<&str>) -> Result<Self, LoadError> {
        if name.starts_with("s3://") {
            let url = name.trim_end_matches('/').to_owned();
            return Ok(Self::Bucket { url });
        }
        let found = tokio::fs::metadata(name).await;
        if found.is_ok_and(|found| found.is_dir()) {
            return Ok(Self::Folder(PathBuf::from(name)));
        }
        let revision = revision.unwrap_or("main");
        if is_repository(name) && is_revision(revision) {
            return Ok(Self::Hub {
                repo: name.to_owned(),
                revision: revision.to_owned(),
            });
        }
        Err(LoadError::Source {
            name: shorten(name),
        })
    }
}

/// `owner/name`, of the characters that the hub allows.
fn is_repository(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    parts.len() == 2 && parts.iter().all(|part| is_plain_name(part))
}

/// Branches may have slashes, but lead nowhere else.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 256 && revision.split('/').all(is_plain_name)
}

/// A name that is one step of a path and leads down.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=255).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.')
}

/// Which files are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Configuration, tokenizer, template and all weights.
    Model,
    /// A PEFT adapter.
    Adapter,
}

impl Wanted {
    /// Largest file of it, in bytes. Models are named by whoever starts the process, adapters also by those who use it.
    fn file_bytes_max(self) -> u64 {
        match self {
            Self::Model => u64::MAX,
            Self::Adapter => Lora::FILE_BYTES_MAX,
        }
    }
}

/// Gives files of one place, by plain names.
trait Place: Send + Sync {
    /// What messages call it.
    fn name(&self) -> String;

    /// A file, fetched if need be; none if there is no such file.
    fn get<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<PathBuf>, LoadError>>;

    /// Finds that all files that were given are of one version, as far as can be told.
    fn confirm(&self) -> BoxFuture<'_, Result<(), LoadError>>;
}

/// Fetches files into the folders that hold what was fetched before.
#[derive(Clone, Debug)]
pub struct Fetcher {
    hub: hub::Settings,
    /// For what comes from buckets.
    cache: Option<PathBuf>,
}

impl Fetcher {
    /// `download_dir` takes the place of the hub's usual folder. From the environment: `HF_HOME`, `HF_HUB_CACHE`,
    /// `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, as the hub's own clients read them.
    pub fn new(environment: &Environment, download_dir: Option<&Path>) -> Self {
        let home = environment.get("HOME").filter(|home| !home.is_empty());
        let own = home.map(|home| Path::new(home).join(".cache/espalier/objects"));
        Self {
            hub: hub::Settings::new(environment, download_dir),
            cache: download_dir.map(|folder| folder.join("objects")).or(own),
        }
    }

    /// The folder that holds what is wanted of `source`.
    ///
    /// # Errors
    /// A file is missing, damaged, or cannot be had.
    pub async fn fetch(&self, source: &Source, wanted: Wanted) -> Result<PathBuf, LoadError> {
        match source {
            Source::Folder(folder) => Ok(folder.clone()),
            Source::Hub { repo, revision } => {
                let hub = Hub::open(&self.hub, repo, revision, wanted.file_bytes_max()).await?;
                fetch_all(&hub, wanted).await
            }
            Source::Bucket { url } => {
                let cache = self.cache.as_deref().ok_or(LoadError::NoCache)?;
                let bucket = Bucket::open(url, cache, wanted.file_bytes_max()).await?;
                fetch_all(&bucket, wanted).await
            }
        }
    }
}

async fn fetch_all(place: &dyn Place, wanted: Wanted) -> Result<PathBuf, LoadError> {
    let (first, others): (_, &[&str]) = match wanted {
        Wanted::Model => ("config.json", &model::OPTIONAL),
        Wanted::Adapter => ("adapter_config.json", &[]),
    };
    let first = required(place, first).await?;
    for file in others {
        place.get(file).await?;
    }
    for file in weights(place, wanted).await? {
        required(place, &file).await?;
    }
    place.confirm().await?;
    Ok(first.parent().map(Path::to_owned).unwrap_or_default())
}

async fn required(place: &dyn Place, file: &str) -> Result<PathBuf, LoadError> {
    let found = place.get(file).await?;
    found.ok_or_else(|| LoadError::Missing {
        place: place.name(),
        file: file.to_owned(),
    })
}

async fn weights(place: &dyn Place, wanted: Wanted) -> Result<Vec<String>, LoadError> {
    let single = match wanted {
        Wanted::Adapter => return Ok(vec!["adapter_model.safetensors".to_owned()]),
        Wanted::Model => "model.safetensors".to_owned(),
    };
    let Some(index) = place.get(INDEX).await? else {
        return Ok(vec![single]);
    };
    let text = read_text(&index, INDEX_BYTES_MAX).await?;
    shards(&text).map_err(|rule| LoadError::Index {
        place: place.name(),
        rule,
    })
}

/// The files that an index names, each once.
fn shards(index: &str) -> Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(index).map_err(|e| format!("is no index: {e}"))?;
    let mut files: Vec<String> = index.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    let plain = |file: &String| is_plain_name(file) && file.ends_with(".safetensors");
    if let Some(file) = files.iter().find(|file| !plain(file)) {
        let file = shorten(file);
        return Err(format!(
            "must name files of its own folder that end in .safetensors, got `{file}`"
        ));
    }
    if files.is_empty() || files.len() > SHARDS_MAX {
        return Err(format!(
            "must name 1 to {SHARDS_MAX} files, got {}",
            files.len()
        ));
    }
    Ok(files)
}

/// The text of a file that has at most `bytes_max` bytes.
async fn read_text(path: &Path, bytes_max: u64) -> Result<String, LoadError> {
    let read = async {
        let bytes = tokio::fs::metadata(path).await?.len();
        if bytes > bytes_max {
            let rule = format!("must have at most {bytes_max} bytes, has {bytes}");
            return Err(std::io::Error::other(rule));
        }
        tokio::fs::read_to_string(path).await
    };
    read.await.map_err(|source| LoadError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
