//! Files of one commit, in the cache that the hub's own clients share: what other programs have fetched is found there, and
//! what breaks off is taken up where it stopped.
//!
//! ```text
//! {cache}/models--{owner}--{name}/refs/{revision}            the commit that it was when it was asked last
//! {cache}/models--{owner}--{name}/snapshots/{commit}/{file}  a link to
//! {cache}/models--{owner}--{name}/blobs/{etag}               the content, named by its digest
//! {cache}/models--{owner}--{name}/blobs/{etag}.part          as much of it as has come, locked by whoever fetches it
//! ```

use std::fs::TryLockError;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, ETAG, RANGE};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use super::error::HubError;
use super::http::{Failed, STALL_MAX, To, answered, unreachable};
use super::upload::hex;
use super::{Hub, Repo, encoded, is_plain_name};
use crate::progress::Progress;
use crate::tasks::{blocking, with_deadline};
use crate::telemetry::error_chain;

/// How long somebody else's download of the same file is waited for.
const LOCK_MAX: Duration = Duration::from_secs(6 * 3_600);
/// Time between two looks at whether it is done.
const LOCK_EVERY: Duration = Duration::from_millis(500);

/// A commit of a repository.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) sha: String,
    pub(super) files: Vec<String>,
    pub(super) private: bool,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    #[serde(default)]
    private: bool,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The files of one commit.
#[derive(Debug)]
pub struct Snapshot {
    hub: Hub,
    repo: Repo,
    /// Of the repository, in the cache.
    folder: PathBuf,
    sha: String,
    bytes_max: u64,
    /// None: the hub is not asked, and what is in the cache is all that there is.
    files: Option<Vec<String>>,
}

/// What the hub says of a file without giving it.
struct Told {
    etag: String,
    size: u64,
}

impl Hub {
    /// What `revision` is now.
    pub(super) async fn head(&self, repo: &Repo, revision: &str) -> Result<Head, HubError> {
        let what = format!("the files of {repo}");
        let url = self.url(&format!("{}/revision/{}", repo.api(), encoded(revision)));
        let request = || self.http.request(To::Hub, Method::GET, &url);
        let info: Info = self.http.ask(&what, request).await?;
        if !is_plain_name(&info.sha) {
            let rule = "must name a commit".to_owned();
            return Err(HubError::Malformed { what, rule });
        }
        Ok(Head {
            sha: info.sha,
            files: info
                .siblings
                .into_iter()
                .map(|file| file.rfilename)
                .collect(),
            private: info.private,
        })
    }

    /// Asks which commit `revision` is. Where the hub cannot be asked, what the cache has of it counts, if it has one of
    /// the files that `any_of` names. No file may have more than `bytes_max` bytes.
    ///
    /// # Errors
    /// It is not there, or cannot be asked and the cache has nothing of it.
    pub async fn snapshot(
        &self,
        repo: &Repo,
        revision: &str,
        any_of: &[&str],
        bytes_max: u64,
    ) -> Result<Snapshot, HubError> {
        let cache = self.settings.cache.clone().ok_or(HubError::NoCache)?;
        let folder = cache.join(repo.folder());
        let snapshot = |sha: String, files| Snapshot {
            hub: self.clone(),
            repo: repo.clone(),
            folder: folder.clone(),
            sha,
            bytes_max,
            files,
        };
        let noted = folder.join("refs").join(revision);
        let known = tokio::fs::read_to_string(&noted).await.ok();
        let known = known
            .map(|sha| sha.trim().to_owned())
            .filter(|sha| is_plain_name(sha));
        let cached = snapshot(known.unwrap_or_else(|| revision.replace('/', "-")), None);
        if self.settings.offline {
            return Ok(cached);
        }
        let head = match self.head(repo, revision).await {
            Ok(head) => head,
            Err(error) if any_of.iter().any(|file| cached.cached(file).is_some()) => {
                let error = error_chain(&error);
                let repo = repo.name();
                tracing::warn!(
                    repo,
                    error,
                    "the hub cannot be asked; what was fetched before is used"
                );
                return Ok(cached);
            }
            Err(error) => return Err(error),
        };
        // Whoever asks offline later finds the commit under the name that it had.
        write(&noted, head.sha.as_bytes()).await?;
        Ok(snapshot(head.sha, Some(head.files)))
    }
}

impl Snapshot {
    /// The repository.
    #[must_use]
    pub fn repo(&self) -> &Repo {
        &self.repo
    }

    /// The commit.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.sha
    }

    /// A file of it, fetched if need be; none if there is no such file.
    ///
    /// # Errors
    /// It is too large, damaged, or cannot be had.
    pub async fn get(&self, file: &str) -> Result<Option<PathBuf>, HubError> {
        if !is_plain_name(file) {
            let name = espalier_core::error::shorten(file);
            return Err(HubError::Name { name });
        }
        if let Some(path) = self.cached(file) {
            return Ok(Some(path));
        }
        match &self.files {
            Some(files) if files.iter().any(|known| known == file) => {
                self.download(file).await.map(Some)
            }
            _ => Ok(None),
        }
    }

    fn at(&self, file: &str) -> PathBuf {
        self.folder.join("snapshots").join(&self.sha).join(file)
    }

    fn cached(&self, file: &str) -> Option<PathBuf> {
        let path = self.at(file);
        path.exists().then_some(path)
    }

    fn url(&self, file: &str) -> String {
        let path = format!("{}/resolve/{}/{file}", self.repo.path(), self.sha);
        self.hub.url(&path)
    }

    async fn download(&self, file: &str) -> Result<PathBuf, HubError> {
        let told = self.ask(file).await?;
        if told.size > self.bytes_max {
            return Err(HubError::TooMuch {
                what: format!("bytes of {file} of {}", self.repo),
                max: self.bytes_max,
                found: told.size,
            });
        }
        let blob = self.folder.join("blobs").join(&told.etag);
        let part = self
            .folder
            .join("blobs")
            .join(format!("{}.part", told.etag));
        let lock = lock(&part).await?;
        // Whoever had the lock before may have fetched it.
        if !blob.exists() {
            self.fetch(file, &part, &told).await?;
            self.check(file, &part, &told).await?;
            let renamed = tokio::fs::rename(&part, &blob).await;
            renamed.map_err(at(&blob))?;
        }
        drop(lock);
        let path = self.at(file);
        link(&told.etag, &path).await.map_err(at(&path))?;
        Ok(path)
    }

    /// Digest and size, as the hub itself says them: its storage does not know the digest.
    async fn ask(&self, file: &str) -> Result<Told, HubError> {
        let what = format!("{file} of {}", self.repo);
        let url = self.url(file);
        let http = &self.hub.http;
        let request = || http.request(To::HubItself, Method::HEAD, &url);
        let answer = http.send(&what, request).await?;
        let text = |name: &str| answer.headers().get(name)?.to_str().ok();
        let etag = text("x-linked-etag").or_else(|| text(ETAG.as_str()));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let size = text("x-linked-size").or_else(|| text(CONTENT_LENGTH.as_str()));
        match (etag, size.and_then(|size| size.parse().ok())) {
            (Some(etag), Some(size)) if is_plain_name(etag) => Ok(Told {
                etag: etag.to_owned(),
                size,
            }),
            _ => Err(HubError::Malformed {
                what,
                rule: "must give its digest and its size".to_owned(),
            }),
        }
    }

    /// Fetches what is not there yet, and goes on where the connection breaks.
    async fn fetch(&self, file: &str, part: &Path, told: &Told) -> Result<(), HubError> {
        let progress = tokio::sync::Mutex::new(Progress::new(file, told.size));
        let what = format!("{file} of {}", self.repo);
        let (http, url) = (&self.hub.http, self.url(file));
        let once = || async {
            let file_error = |source| Failed::for_good(at(part)(source));
            let start = tokio::fs::metadata(part).await.map_err(file_error)?.len();
            if start >= told.size {
                return Ok(());
            }
            let request = http.request(To::Hub, Method::GET, &url);
            let request = request.header(RANGE, format!("bytes={start}-"));
            let sent = with_deadline("hub.ask", STALL_MAX, request.send()).await?;
            let answer = answered(&what, sent).await?;
            let mut progress = progress.lock().await;
            append(&what, answer, part, start, &mut progress).await
        };
        http.again(&what, once).await?;
        progress.lock().await.end();
        Ok(())
    }

    /// Large files have the digest that the hub promised for a name. Small ones are named by git's digest, which their
    /// JSON's parser makes up for.
    async fn check(&self, file: &str, part: &Path, told: &Told) -> Result<(), HubError> {
        let is_digest = told.etag.len() == 64 && told.etag.bytes().all(|b| b.is_ascii_hexdigit());
        let path = part.to_owned();
        let read = blocking("hub.verify", move || digest_of(&path)).await?;
        let (size, digest) = read.map_err(at(part))?;
        let (what, expected, found) = match told {
            Told { size: told, .. } if *told != size => {
                ("its size", told.to_string(), size.to_string())
            }
            Told { etag, .. } if is_digest && !etag.eq_ignore_ascii_case(&digest) => {
                ("its SHA-256", etag.clone(), digest)
            }
            _ => return Ok(()),
        };
        tokio::fs::remove_file(part).await.map_err(at(part))?;
        Err(HubError::Damaged {
            repo: self.repo.to_string(),
            file: file.to_owned(),
            what,
            expected,
            found,
        })
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> HubError {
    move |source| HubError::File {
        path: path.to_owned(),
        source,
    }
}

/// Writes what comes behind what is there.
async fn append(
    what: &str,
    mut answer: Response,
    part: &Path,
    mut start: u64,
    progress: &mut Progress,
) -> Result<(), Failed> {
    let file_error = |source| Failed::for_good(at(part)(source));
    // All of it comes from a server that gives no pieces.
    if answer.status() != StatusCode::PARTIAL_CONTENT {
        start = 0;
    }
    let opened = tokio::fs::OpenOptions::new().write(true).open(part).await;
    let mut to = opened.map_err(file_error)?;
    to.set_len(start).await.map_err(file_error)?;
    to.seek(io::SeekFrom::Start(start))
        .await
        .map_err(file_error)?;
    progress.at(start);
    let came = loop {
        let chunk = with_deadline("hub.file", STALL_MAX, answer.chunk()).await;
        match chunk {
            Ok(Ok(Some(chunk))) => {
                to.write_all(&chunk).await.map_err(file_error)?;
                progress.more(chunk.len() as u64);
            }
            Ok(Ok(None)) => break Ok(()),
            Ok(Err(source)) => break Err(Failed::passing(unreachable(what, source))),
            Err(_) => {
                break Err(Failed::passing(HubError::Stalled {
                    what: what.to_owned(),
                    after_s: STALL_MAX.as_secs(),
                }));
            }
        }
    };
    to.flush().await.map_err(file_error)?;
    if came.is_ok() {
        to.sync_all().await.map_err(file_error)?;
    }
    came
}

/// Makes the file, and takes it for this process. Held until the file is closed.
async fn lock(part: &Path) -> Result<std::fs::File, HubError> {
    let folder = part.parent().unwrap_or(part);
    tokio::fs::create_dir_all(folder)
        .await
        .map_err(at(folder))?;
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        options.create(true).truncate(false).write(true).open(part)
    };
    let take = async {
        loop {
            let file = open().map_err(at(part))?;
            match file.try_lock() {
                // It may have been moved to its name while it was waited for.
                Ok(()) if part.exists() => return Ok(file),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_EVERY).await,
                Err(TryLockError::Error(source)) => return Err(at(part)(source)),
            }
        }
    };
    with_deadline("hub.lock", LOCK_MAX, take).await?
}

async fn write(path: &Path, content: &[u8]) -> Result<(), HubError> {
    let folder = path.parent().unwrap_or(path);
    tokio::fs::create_dir_all(folder)
        .await
        .map_err(at(folder))?;
    tokio::fs::write(path, content).await.map_err(at(path))
}

/// A link to a blob from a file of a snapshot, in place of one that leads nowhere.
async fn link(etag: &str, path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        tokio::fs::create_dir_all(folder).await?;
    }
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let linked = tokio::fs::symlink(Path::new("../../blobs").join(etag), path).await;
    match linked {
        // Another process was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Size and SHA-256 of a file that may be large.
fn digest_of(path: &Path) -> io::Result<(u64, String)> {
    let mut file = std::fs::File::open(path)?;
    let (mut digest, mut piece, mut size) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok((size, hex(&digest.finalize()))),
            read => {
                digest.update(&piece[..read]);
                size += read as u64;
            }
        }
    }
}
