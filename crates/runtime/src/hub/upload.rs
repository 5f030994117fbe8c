//! Commits: a repository is made, and files get into it in one step or not at all.
//!
//! The hub says which files it wants in the body of the commit and which in its storage, and what it has of them already;
//! what it has is not sent again, and where it has all of it no commit is made. So a push that was killed after its commit
//! is repeated without a second one.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::error::{HubError, Refusal};
use super::http::{Failed, To, answered, unreachable};
use super::{Hub, MAIN, Meter, Repo, encoded, is_plain_name};
use crate::tasks::{blocking, with_deadline};

/// Most files of one commit.
const FILES_MAX: usize = 1_000;
/// As many files the hub is asked about at once.
const FILES_A_QUESTION: usize = 256;
/// What the hub is shown of a file to tell what it is, in bytes.
const SAMPLE_BYTES: usize = 512;
/// Most bytes of files in the body of a commit: it is held in memory. The hub wants larger files in its storage.
const INLINE_BYTES_MAX: u64 = 64 << 20;
/// How long the hub may take over a commit.
const COMMIT_MAX: Duration = Duration::from_secs(120);

/// What is in a file.
#[derive(Clone, Debug)]
pub enum Content {
    /// In memory.
    Bytes(Bytes),
    /// A file of this machine.
    File(PathBuf),
}

/// A file that is to be in a repository.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Where, below the repository.
    pub path: String,
    /// What is in it.
    pub content: Content,
}

/// What a commit does.
#[derive(Clone, Debug)]
pub struct Change {
    /// What is in the repository afterwards. What is there under other paths stays.
    pub files: Vec<Upload>,
    /// But for this folder: of what is below it only `files` stay.
    pub folder: Option<&'static str>,
    /// The first line is its title.
    pub message: String,
}

/// A state of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its id.
    pub id: String,
    /// Whether it was made just now; otherwise the repository had everything already.
    pub made: bool,
}

/// What is known of a repository that is to be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepoState {
    /// It was made just now.
    pub is_new: bool,
    /// Others cannot see it.
    pub is_private: bool,
}

/// A file and what names its content.
pub(super) struct Prepared {
    pub(super) path: String,
    pub(super) content: Content,
    pub(super) size: u64,
    pub(super) sha256: String,
    /// As git names it; none for a file that is too large for the body of a commit.
    git: Option<String>,
    sample: Vec<u8>,
}

/// What the hub says of a file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mode {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
    /// What it has under the path.
    #[serde(default)]
    oid: Option<String>,
}

#[derive(Deserialize)]
struct Modes {
    files: Vec<Mode>,
}

/// What is to be done: files that are to be sent, by the way they go, and paths that are to go.
#[derive(Default)]
struct Missing<'a> {
    inline: Vec<&'a Prepared>,
    large: Vec<&'a Prepared>,
    gone: Vec<String>,
}

impl Missing<'_> {
    fn is_empty(&self) -> bool {
        self.inline.is_empty() && self.large.is_empty() && self.gone.is_empty()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_oid: String,
}

impl Hub {
    /// Makes the repository, unless it is there; one that is there stays as visible as it is.
    ///
    /// # Errors
    /// The token may not, or the hub cannot be reached.
    pub async fn create_repo(&self, repo: &Repo, private: bool) -> Result<RepoState, HubError> {
        let what = format!("make repository {repo}");
        let (owner, name) = repo.owner_and_name();
        let body = json!({"organization": owner, "name": name, "type": repo.kind_name(), "private": private});
        let url = self.url("api/repos/create");
        let request = || self.http.request(To::Hub, Method::POST, &url).json(&body);
        let refused = match self.http.send(&what, request).await {
            Ok(_) => {
                return Ok(RepoState {
                    is_new: true,
                    is_private: private,
                });
            }
            Err(error) => error,
        };
        // Who may write to a repository may not always make one.
        let may_be_there =
            refused.refused_as(Refusal::Conflict) || refused.refused_as(Refusal::Forbidden);
        if !may_be_there {
            return Err(refused);
        }
        match self.head(repo, MAIN).await {
            Ok(head) => Ok(RepoState {
                is_new: false,
                is_private: head.private,
            }),
            Err(error) if error.is_missing() => Err(refused),
            Err(error) => Err(error),
        }
    }

    /// Does all of a change to the branch with one commit.
    ///
    /// # Errors
    /// A file cannot be read, the hub refuses, or it cannot be reached. Then nothing of the repository has changed.
    pub async fn commit(
        &self,
        repo: &Repo,
        branch: &str,
        change: Change,
        meter: &Arc<Meter>,
    ) -> Result<Commit, HubError> {
        let Change {
            files,
            folder,
            message,
        } = change;
        check_names(&files)?;
        let prepared = blocking("hub.digest", move || prepare(files)).await??;
        let what = format!("commit to {repo}");
        // Whether a commit was sent whose answer may have been lost.
        let sent = AtomicBool::new(false);
        let once = || async {
            let files = self.missing(repo, branch, &prepared, folder).await;
            let files = files.map_err(Failed::for_good)?;
            if files.is_empty() {
                let head = self.head(repo, branch).await.map_err(Failed::for_good)?;
                return Ok(Commit {
                    id: head.sha,
                    made: sent.load(Ordering::Relaxed),
                });
            }
            let stored = self.send_large(repo, branch, &files.large, meter).await;
            stored.map_err(Failed::for_good)?;
            sent.store(true, Ordering::Relaxed);
            self.send_commit(repo, branch, &message, &files).await
        };
        // Never the same commit blindly again: the one whose answer was lost is found.
        self.http.again(&what, once).await
    }

    async fn send_commit(
        &self,
        repo: &Repo,
        branch: &str,
        message: &str,
        files: &Missing<'_>,
    ) -> Result<Commit, Failed> {
        let body = body(message, files).await;
        let body = body.map_err(Failed::for_good)?;
        let what = format!("commit to {repo}");
        let url = self.url(&format!("{}/commit/{}", repo.api(), encoded(branch)));
        let request = self
            .http
            .request(To::Hub, Method::POST, &url)
            .header(reqwest::header::CONTENT_TYPE, "application/x-ndjson")
            .body(body);
        let sent = with_deadline("hub.commit", COMMIT_MAX, request.send()).await?;
        let answer = match answered(&what, sent).await {
            // Another commit came between: what is to be sent is asked anew.
            Err(failed) if failed.error.refused_as(Refusal::Conflict) => {
                return Err(Failed::passing(failed.error));
            }
            other => other?,
        };
        let committed = answer.json::<Committed>().await;
        let committed = committed.map_err(|source| Failed::passing(unreachable(&what, source)))?;
        Ok(Commit {
            id: committed.commit_oid,
            made: true,
        })
    }

    /// What the repository has not, and what of `folder` it has too much.
    async fn missing<'a>(
        &self,
        repo: &Repo,
        branch: &str,
        files: &'a [Prepared],
        folder: Option<&str>,
    ) -> Result<Missing<'a>, HubError> {
        let modes = self.modes(repo, branch, files).await?;
        let mut missing = Missing::default();
        for file in files {
            let mode = modes.get(&file.path).ok_or_else(|| HubError::Malformed {
                what: format!("how {} is to be sent to {repo}", file.path),
                rule: "must say so".to_owned(),
            })?;
            let is_large = mode.upload_mode == "lfs" && file.size > 0;
            let own = match is_large {
                true => Some(&file.sha256),
                false => file.git.as_ref(),
            };
            if mode.should_ignore || (own.is_some() && mode.oid.as_ref() == own) {
                continue;
            }
            match is_large {
                true => missing.large.push(file),
                false => missing.inline.push(file),
            }
        }
        if let Some(folder) = folder {
            let head = self.head(repo, branch).await?;
            let is_ours = |path: &str| files.iter().any(|file| file.path == path);
            let below = |path: &str| {
                let rest = path.strip_prefix(folder);
                rest.is_some_and(|rest| rest.starts_with('/'))
            };
            let gone = head.files.into_iter();
            missing.gone = gone.filter(|path| below(path) && !is_ours(path)).collect();
        }
        Ok(missing)
    }

    /// What the hub says of each file, by path.
    async fn modes(
        &self,
        repo: &Repo,
        branch: &str,
        files: &[Prepared],
    ) -> Result<HashMap<String, Mode>, HubError> {
        let what = format!("what {repo} has");
        let url = self.url(&format!("{}/preupload/{}", repo.api(), encoded(branch)));
        let mut modes = HashMap::new();
        for some in files.chunks(FILES_A_QUESTION) {
            let about = |file: &Prepared| json!({"path": file.path, "size": file.size, "sample": BASE64.encode(&file.sample)});
            let body = json!({"files": some.iter().map(about).collect::<Vec<_>>()});
            let request = || self.http.request(To::Hub, Method::POST, &url).json(&body);
            let answer: Modes = self.http.ask(&what, request).await?;
            modes.extend(
                answer
                    .files
                    .into_iter()
                    .map(|mode| (mode.path.clone(), mode)),
            );
        }
        Ok(modes)
    }
}

fn check_names(files: &[Upload]) -> Result<(), HubError> {
    if files.len() > FILES_MAX {
        return Err(HubError::TooMuch {
            what: "files of one commit".to_owned(),
            max: FILES_MAX as u64,
            found: files.len() as u64,
        });
    }
    let bad = |file: &&Upload| file.path.len() > 1_024 || !file.path.split('/').all(is_plain_name);
    match files.iter().find(bad) {
        Some(file) => Err(HubError::Name {
            name: espalier_core::error::shorten(&file.path),
        }),
        None => Ok(()),
    }
}

fn prepare(files: Vec<Upload>) -> Result<Vec<Prepared>, HubError> {
    files
        .into_iter()
        .map(|file| match &file.content {
            Content::Bytes(bytes) => digests(&file, bytes.len() as u64, &mut &bytes[..])
                .map_err(|source| (PathBuf::from(&file.path), source)),
            Content::File(path) => std::fs::File::open(path)
                .and_then(|mut open| {
                    let size = open.metadata()?.len();
                    digests(&file, size, &mut open)
                })
                .map_err(|source| (path.clone(), source)),
        })
        .map(|done| done.map_err(|(path, source)| HubError::File { path, source }))
        .collect()
}

/// Reads `size` bytes once, for all the names of a content.
fn digests(file: &Upload, size: u64, from: &mut dyn std::io::Read) -> std::io::Result<Prepared> {
    let mut git = (size <= INLINE_BYTES_MAX).then(|| {
        let mut git = sha1_smol::Sha1::new();
        git.update(format!("blob {size}\0").as_bytes());
        git
    });
    let (mut sha256, mut sample) = (Sha256::new(), Vec::with_capacity(SAMPLE_BYTES));
    let (mut piece, mut from) = (vec![0; 1 << 20], from.take(size));
    loop {
        let piece = match from.read(&mut piece)? {
            0 => break,
            read => &piece[..read],
        };
        sha256.update(piece);
        if let Some(git) = &mut git {
            git.update(piece);
        }
        let more = piece.len().min(SAMPLE_BYTES - sample.len());
        sample.extend_from_slice(&piece[..more]);
    }
    Ok(Prepared {
        path: file.path.clone(),
        content: file.content.clone(),
        size,
        sha256: hex(&sha256.finalize()),
        git: git.map(|git| git.digest().to_string()),
        sample,
    })
}

/// In lower-case hex.
pub(super) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a commit says, one JSON a line.
async fn body(message: &str, files: &Missing<'_>) -> Result<Bytes, HubError> {
    let bytes: u64 = files.inline.iter().map(|file| file.size).sum();
    if bytes > INLINE_BYTES_MAX {
        return Err(HubError::TooMuch {
            what: "bytes of files that the hub wants in the commit itself".to_owned(),
            max: INLINE_BYTES_MAX,
            found: bytes,
        });
    }
    let (summary, description) = message.split_once('\n').unwrap_or((message, ""));
    let header = json!({"summary": summary, "description": description.trim_start()});
    let mut lines = vec![json!({"key": "header", "value": header})];
    for file in &files.inline {
        let content = match &file.content {
            Content::Bytes(bytes) => bytes.clone(),
            Content::File(path) => read_whole(path, file.size).await?,
        };
        let value =
            json!({"path": file.path, "encoding": "base64", "content": BASE64.encode(&content)});
        lines.push(json!({"key": "file", "value": value}));
    }
    lines.extend(files.large.iter().map(|file| {
        let value =
            json!({"path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.size});
        json!({"key": "lfsFile", "value": value})
    }));
    let gone = files.gone.iter();
    lines.extend(gone.map(|path| json!({"key": "deletedFile", "value": {"path": path}})));
    let text: String = lines
        .iter()
        .map(|line: &Value| format!("{line}\n"))
        .collect();
    Ok(text.into())
}

async fn read_whole(path: &Path, size: u64) -> Result<Bytes, HubError> {
    let read = tokio::fs::read(path).await;
    let content = read.map_err(|source| HubError::File {
        path: path.to_owned(),
        source,
    })?;
    if content.len() as u64 != size {
        return Err(HubError::Changed {
            path: path.to_owned(),
        });
    }
    Ok(content.into())
}
