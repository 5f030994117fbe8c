//! The Hugging Face hub, through its own client and in its own cache: what other programs have fetched is found there,
//! and what breaks off is taken up where it stopped.

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::tasks::{blocking, with_deadline};
use espalier_runtime::telemetry::error_chain;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::progress::Progress;
use super::{LoadError, Place};

/// How long the hub may take to say what a repository holds.
const ASK_MAX: Duration = Duration::from_secs(30);
/// How long nothing may come of a file.
const STALL_MAX: Duration = Duration::from_secs(60);
/// How often a download that breaks off is taken up again.
const RETRIES: usize = 5;

/// How the hub is reached, and where its files are kept.
#[derive(Clone)]
pub(super) struct Settings {
    cache: Option<PathBuf>,
    endpoint: Option<String>,
    token: Option<Secret>,
    offline: bool,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Settings");
        out.field("cache", &self.cache)
            .field("offline", &self.offline);
        out.finish_non_exhaustive()
    }
}

impl Settings {
    pub(super) fn new(environment: &Environment, download_dir: Option<&Path>) -> Self {
        let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        let folder = |name: &str, below: &str| get(name).map(|path| Path::new(path).join(below));
        let yes =
            |value: &String| matches!(&*value.to_ascii_lowercase(), "1" | "on" | "yes" | "true");
        Self {
            cache: download_dir
                .map(Path::to_owned)
                .or_else(|| folder("HF_HUB_CACHE", ""))
                .or_else(|| folder("HF_HOME", "hub"))
                .or_else(|| folder("HOME", ".cache/huggingface/hub")),
            endpoint: get("HF_ENDPOINT").cloned(),
            token: get("HF_TOKEN").map(Secret::new),
            offline: get("HF_HUB_OFFLINE").is_some_and(yes),
        }
    }

    fn api(&self) -> Result<(Api, Cache), LoadError> {
        let cache = Cache::new(self.cache.clone().ok_or(LoadError::NoCache)?);
        let mut builder = ApiBuilder::from_cache(cache.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("espalier", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        if let Some(token) = &self.token {
            builder = builder.with_token(Some(token.expose().to_owned()));
        }
        let api = builder
            .build()
            .map_err(|e| LoadError::HubClient(Box::new(e)))?;
        Ok((api, cache))
    }
}

/// One commit of a repository.
pub(super) struct Hub {
    repo: String,
    bytes_max: u64,
    cached: CacheRepo,
    /// None: the hub is not asked, and what is in the cache is all that there is.
    remote: Option<Remote>,
}

struct Remote {
    files: Vec<String>,
    api: Api,
    repo: Arc<ApiRepo>,
}

impl Hub {
    /// Asks which commit `revision` is. Where the hub cannot be asked, what the cache has of it counts.
    pub(super) async fn open(
        settings: &Settings,
        repo: &str,
        revision: &str,
        bytes_max: u64,
    ) -> Result<Self, LoadError> {
        let (api, cache) = settings.api()?;
        let named = |revision: &str| {
            Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned())
        };
        let cached = cache.repo(named(revision));
        let offline = |cached| Self {
            repo: repo.to_owned(),
            bytes_max,
            cached,
            remote: None,
        };
        if settings.offline {
            return Ok(offline(cached));
        }
        let asked = api.repo(named(revision));
        let asked = blocking("load.hub_info", move || asked.info());
        let info = match with_deadline("load.hub_info", ASK_MAX, asked)
            .await
            .map_err(LoadError::from)
        {
            Ok(answer) => answer?.map_err(|source| hub_error(repo, "its list of files", source)),
            Err(late) => Err(late),
        };
        let info = match info {
            Ok(info) => info,
            Err(error)
                if cached
                    .get("config.json")
                    .or(cached.get("adapter_config.json"))
                    .is_some() =>
            {
                tracing::warn!(
                    repo,
                    error = error_chain(&error),
                    "the hub cannot be asked; what was fetched before is used"
                );
                return Ok(offline(cached));
            }
            Err(error) => return Err(error),
        };
        // Whoever asks offline later finds the commit under the name that it had.
        let noted = cached.create_ref(&info.sha);
        noted.map_err(|source| LoadError::File {
            path: cache.path().clone(),
            source,
        })?;
        Ok(Self {
            repo: repo.to_owned(),
            bytes_max,
            cached: cache.repo(named(&info.sha)),
            remote: Some(Remote {
                files: info
                    .siblings
                    .into_iter()
                    .map(|file| file.rfilename)
                    .collect(),
                repo: Arc::new(api.repo(named(&info.sha))),
                api,
            }),
        })
    }

    async fn find(&self, file: &str) -> Result<Option<PathBuf>, LoadError> {
        if let Some(path) = self.cached.get(file) {
            return Ok(Some(path));
        }
        match &self.remote {
            Some(remote) if remote.files.iter().any(|known| known == file) => {
                self.check_size(remote, file).await?;
                self.download(remote, file).await.map(Some)
            }
            _ => Ok(None),
        }
    }

    async fn check_size(&self, remote: &Remote, file: &str) -> Result<(), LoadError> {
        if self.bytes_max == u64::MAX {
            return Ok(());
        }
        let (api, url) = (remote.api.clone(), remote.repo.url(file));
        let asked = blocking("load.hub_size", move || api.metadata(&url));
        let answer = with_deadline("load.hub_size", ASK_MAX, asked).await??;
        let found = answer.map_err(|source| hub_error(&self.repo, file, source))?;
        let bytes = found.size() as u64;
        if bytes > self.bytes_max {
            return Err(LoadError::TooLarge {
                place: self.repo.clone(),
                file: file.to_owned(),
                bytes,
                bytes_max: self.bytes_max,
            });
        }
        Ok(())
    }

    async fn download(&self, remote: &Remote, file: &str) -> Result<PathBuf, LoadError> {
        let come = Arc::new(AtomicU64::new(0));
        let progress = Progress::new(file, Arc::clone(&come));
        let (from, name) = (Arc::clone(&remote.repo), file.to_owned());
        let download = blocking("load.hub_file", move || {
            let path = from.download_with_progress(&name, progress)?;
            let checked = check(&path)?;
            Ok::<_, ApiError>((path, checked))
        });
        let downloaded = tokio::select! {
            done = download => done?,
            () = stalled(&come) => return Err(LoadError::Stalled {
                place: self.repo.clone(),
                file: file.to_owned(),
                after_s: STALL_MAX.as_secs(),
            }),
        };
        let (path, checked) = downloaded.map_err(|source| hub_error(&self.repo, file, source))?;
        checked.map_err(|found| {
            let (expected, found) = found;
            LoadError::Damaged {
                place: self.repo.clone(),
                file: file.to_owned(),
                what: "its SHA-256",
                expected,
                found,
            }
        })?;
        Ok(path)
    }
}

impl Place for Hub {
    fn name(&self) -> String {
        self.repo.clone()
    }

    fn get<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<PathBuf>, LoadError>> {
        self.find(file).boxed()
    }

    /// A commit does not change.
    fn confirm(&self) -> BoxFuture<'_, Result<(), LoadError>> {
        std::future::ready(Ok(())).boxed()
    }
}

fn hub_error(repo: &str, file: &str, source: ApiError) -> LoadError {
    LoadError::Hub {
        repo: repo.to_owned(),
        file: file.to_owned(),
        source: Box::new(source),
    }
}

/// Ends when nothing has come for [`STALL_MAX`].
async fn stalled(come: &AtomicU64) {
    let mut before = u64::MAX;
    loop {
        let now = come.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
        tokio::time::sleep(STALL_MAX).await;
    }
}

/// Large files lie in the cache under the digest that the hub promised: expected and found where they differ, and the
/// file is gone then. Small ones are named by git's digest, which their JSON's parser makes up for.
fn check(path: &Path) -> io::Result<Result<(), (String, String)>> {
    let blob = path.canonicalize()?;
    let name = blob
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let is_digest = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_digest {
        return Ok(Ok(()));
    }
    let found = digest_of(&blob)?;
    if found.eq_ignore_ascii_case(name) {
        return Ok(Ok(()));
    }
    std::fs::remove_file(path)?;
    std::fs::remove_file(&blob)?;
    Ok(Err((name.to_owned(), found)))
}

/// SHA-256 of a file that may be large.
fn digest_of(path: &Path) -> io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let (mut digest, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => digest.update(&piece[..read]),
        }
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
