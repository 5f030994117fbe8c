//! Where models and adapters come from: a folder, a repository of the Hugging Face hub, or an object store.
//!
//! Whatever the place, what comes out is a folder with the few files that are wanted; nothing else of a repository is
//! fetched. What this is not: it reads no weights, which is the business of `crates/qwen3`.

mod bucket;

use std::path::{Path, PathBuf};

use espalier_core::error::{ErrorClass, shorten};
use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::config::Environment;
use crate::hub::{Hub, HubError, HubSettings, Repo, Snapshot, is_plain_name, is_revision};
use crate::store::StoreError;
use crate::tasks::DeadlineExceeded;
use bucket::Bucket;

const INDEX: &str = "model.safetensors.index.json";
/// Most shards of a model: the largest Qwen3 has some hundred.
const SHARDS_MAX: usize = 1_000;
/// Largest index, in bytes: some tens of thousands of tensors.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Why files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
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
    /// The hub did not give what was asked for.
    #[error(transparent)]
    Hub(#[from] HubError),
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
    /// It took longer than anybody waits.
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
}

impl FetchError {
    /// What it means for a job.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Hub(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::File { .. } | Self::Late(_) => ErrorClass::Infra,
            Self::Damaged { .. } | Self::Changed { .. } => ErrorClass::Handler,
            Self::Source { .. }
            | Self::Missing { .. }
            | Self::Index { .. }
            | Self::TooLarge { .. }
            | Self::NoCache => ErrorClass::Invalid,
        }
    }
}

/// Where files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of this machine.
    Folder(PathBuf),
    /// A repository of the hub.
    Hub {
        /// A model's.
        repo: Repo,
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
    /// [`FetchError::Source`].
    pub async fn parse(name: &str, revision: Option<&str>) -> Result<Self, FetchError> {
        if name.starts_with("s3://") {
            let url = name.trim_end_matches('/').to_owned();
            return Ok(Self::Bucket { url });
        }
        let found = tokio::fs::metadata(name).await;
        if found.is_ok_and(|found| found.is_dir()) {
            return Ok(Self::Folder(PathBuf::from(name)));
        }
        let revision = revision.unwrap_or("main");
        match name.parse() {
            Ok(repo) if is_revision(revision) => Ok(Self::Hub {
                repo,
                revision: revision.to_owned(),
            }),
            _ => Err(FetchError::Source {
                name: shorten(name),
            }),
        }
    }
}

/// Which files are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Configuration, tokenizer, template and all weights.
    Model,
    /// The configuration of a model alone.
    Config,
    /// The tokenizer of a model alone, which has at most so many bytes: jobs name it.
    Tokenizer {
        /// Largest size.
        bytes_max: u64,
    },
    /// The same as a model, and what else belongs to a copy of the model.
    ModelToCopy,
    /// A PEFT adapter, whose files have at most so many bytes: adapters are named also by those who use a process.
    Adapter {
        /// Largest file of it.
        bytes_max: u64,
    },
}

/// Files that a model may have beside its configuration and weights.
const OPTIONAL: [&str; 4] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
/// Files that go along with a copy of a model.
pub const COPIED: [&str; 10] = [
    OPTIONAL[0],
    OPTIONAL[1],
    OPTIONAL[2],
    OPTIONAL[3],
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "LICENSE",
    "NOTICE",
];

impl Wanted {
    /// Largest file of it, in bytes. Models are named by whoever starts the process.
    fn file_bytes_max(self) -> u64 {
        match self {
            Self::Model | Self::ModelToCopy | Self::Config => u64::MAX,
            Self::Adapter { bytes_max } | Self::Tokenizer { bytes_max } => bytes_max,
        }
    }

    /// The file that must be there, and those that may.
    fn small_files(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Model => ("config.json", &OPTIONAL),
            Self::ModelToCopy => ("config.json", &COPIED),
            Self::Config => ("config.json", &[]),
            Self::Tokenizer { .. } => (OPTIONAL[1], &[]),
            Self::Adapter { .. } => ("adapter_config.json", &[]),
        }
    }
}

/// Gives files of one place, by plain names.
trait Place: Send + Sync {
    /// What messages call it.
    fn name(&self) -> String;

    /// A file, fetched if need be; none if there is no such file.
    fn get<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<PathBuf>, FetchError>>;

    /// Finds that all files that were given are of one version, as far as can be told.
    fn confirm(&self) -> BoxFuture<'_, Result<(), FetchError>>;
}

/// Fetches files into the folders that hold what was fetched before.
#[derive(Clone, Debug)]
pub struct Fetcher {
    hub: HubSettings,
    /// For what comes from buckets.
    cache: Option<PathBuf>,
}

impl Fetcher {
    /// `download_dir` takes the place of the hub's usual folder. How the hub is reached stands in the environment, as
    /// [`HubSettings::new`] reads it.
    #[must_use]
    pub fn new(environment: &Environment, download_dir: Option<&Path>) -> Self {
        let home = environment.get("HOME").filter(|home| !home.is_empty());
        let own = home.map(|home| Path::new(home).join(".cache/espalier/objects"));
        Self {
            hub: HubSettings::new(environment).with_cache(download_dir),
            cache: download_dir.map(|folder| folder.join("objects")).or(own),
        }
    }

    /// The same with a hub that is reached in another way.
    #[must_use]
    pub fn with_hub(mut self, hub: HubSettings) -> Self {
        self.hub = hub;
        self
    }

    /// The folder that holds what is wanted of `source`.
    ///
    /// # Errors
    /// A file is missing, damaged, or cannot be had.
    pub async fn fetch(&self, source: &Source, wanted: Wanted) -> Result<PathBuf, FetchError> {
        match source {
            Source::Folder(folder) => Ok(folder.clone()),
            Source::Hub { repo, revision } => {
                let hub = Hub::new(self.hub.clone())?;
                let (first, _) = wanted.small_files();
                let bytes_max = wanted.file_bytes_max();
                let snapshot = hub.snapshot(repo, revision, &[first], bytes_max).await?;
                fetch_all(&snapshot, wanted).await
            }
            Source::Bucket { url } => {
                let cache = self.cache.as_deref().ok_or(FetchError::NoCache)?;
                let bucket = Bucket::open(url, cache, wanted.file_bytes_max()).await?;
                fetch_all(&bucket, wanted).await
            }
        }
    }
}

impl Place for Snapshot {
    fn name(&self) -> String {
        self.repo().to_string()
    }

    fn get<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<PathBuf>, FetchError>> {
        Snapshot::get(self, file)
            .map(|got| got.map_err(FetchError::from))
            .boxed()
    }

    /// A commit does not change.
    fn confirm(&self) -> BoxFuture<'_, Result<(), FetchError>> {
        std::future::ready(Ok(())).boxed()
    }
}

async fn fetch_all(place: &dyn Place, wanted: Wanted) -> Result<PathBuf, FetchError> {
    let (first, others) = wanted.small_files();
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

async fn required(place: &dyn Place, file: &str) -> Result<PathBuf, FetchError> {
    let found = place.get(file).await?;
    found.ok_or_else(|| FetchError::Missing {
        place: place.name(),
        file: file.to_owned(),
    })
}

async fn weights(place: &dyn Place, wanted: Wanted) -> Result<Vec<String>, FetchError> {
    let single = match wanted {
        Wanted::Config | Wanted::Tokenizer { .. } => return Ok(Vec::new()),
        Wanted::Adapter { .. } => return Ok(vec!["adapter_model.safetensors".to_owned()]),
        Wanted::Model | Wanted::ModelToCopy => "model.safetensors".to_owned(),
    };
    let Some(index) = place.get(INDEX).await? else {
        return Ok(vec![single]);
    };
    let text = read_text(&index, INDEX_BYTES_MAX).await?;
    shards(&text).map_err(|rule| FetchError::Index {
        place: place.name(),
        rule,
    })
}

/// The files of weights of a model's folder, by name.
///
/// # Errors
/// Its index cannot be followed.
pub async fn weight_files(folder: &Path) -> Result<Vec<String>, FetchError> {
    let index = folder.join(INDEX);
    match tokio::fs::try_exists(&index).await {
        Ok(true) => {}
        _ => return Ok(vec!["model.safetensors".to_owned()]),
    }
    let text = read_text(&index, INDEX_BYTES_MAX).await?;
    shards(&text).map_err(|rule| FetchError::Index {
        place: folder.display().to_string(),
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
async fn read_text(path: &Path, bytes_max: u64) -> Result<String, FetchError> {
    let read = async {
        let bytes = tokio::fs::metadata(path).await?.len();
        if bytes > bytes_max {
            let rule = format!("must have at most {bytes_max} bytes, has {bytes}");
            return Err(std::io::Error::other(rule));
        }
        tokio::fs::read_to_string(path).await
    };
    read.await.map_err(|source| FetchError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
