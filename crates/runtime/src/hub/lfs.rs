//! Large files, by the protocol of git-lfs: the hub names the addresses of its storage, whole or for parts of a file, and is
//! told when all of it is there. What the storage has under the same digest is not sent again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::header::{CONTENT_LENGTH, ETAG, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Method, Response};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::error::{HubError, Refusal};
use super::http::{Failed, STALL_MAX, To, answered, stalled};
use super::upload::{Content, Prepared};
use super::{Hub, Meter, Repo};

/// Files, and parts of each, on their way at once: enough to fill a link.
const FILES_AT_ONCE: usize = 3;
const PARTS_AT_ONCE: usize = 3;
/// Most parts of a file, which is what storage takes.
const PARTS_MAX: usize = 10_000;
/// As many files the hub is asked about at once.
const FILES_A_QUESTION: usize = 256;
/// What is read of a file at once, in bytes.
const PIECE_BYTES: u64 = 256 << 10;
const MEDIA_TYPE: &str = "application/vnd.git-lfs+json";

#[derive(Deserialize)]
struct Batch {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<ObjectError>,
}

#[derive(Deserialize)]
struct ObjectError {
    code: u16,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    #[serde(default)]
    upload: Option<Action>,
    #[serde(default)]
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    /// Headers of the request; for an upload in parts, their size and their addresses by number.
    #[serde(default)]
    header: BTreeMap<String, String>,
}

impl Hub {
    /// Sends what the storage has not.
    pub(super) async fn send_large(
        &self,
        repo: &Repo,
        branch: &str,
        files: &[&Prepared],
        meter: &Arc<Meter>,
    ) -> Result<(), HubError> {
        // Files of one content are one object there.
        let mut known = BTreeSet::new();
        let files = files.iter().copied();
        let files: Vec<&Prepared> = files.filter(|file| known.insert(&file.sha256)).collect();
        let mut wanted = Vec::new();
        for some in files.chunks(FILES_A_QUESTION) {
            let mut objects = self.ask_storage(repo, branch, some).await?;
            for file in some {
                let object = objects.remove(&file.sha256);
                let object = object.ok_or_else(|| malformed(file, "must name it"))?;
                if let Some(error) = object.error {
                    return Err(HubError::Refused {
                        what: format!("take {} for {repo}", file.path),
                        status: error.code,
                        refusal: Refusal::of(error.code),
                        says: espalier_core::error::shorten(&error.message),
                    });
                }
                if let Some(actions) = object.actions {
                    meter.expect(file.size);
                    wanted.push((*file, actions));
                }
            }
        }
        stream::iter(0..wanted.len())
            .map(|i| self.send_file(wanted[i].0, &wanted[i].1, meter))
            .buffer_unordered(FILES_AT_ONCE)
            .try_collect()
            .await
    }

    async fn ask_storage(
        &self,
        repo: &Repo,
        branch: &str,
        files: &[&Prepared],
    ) -> Result<BTreeMap<String, Object>, HubError> {
        let objects = files
            .iter()
            .map(|file| json!({"oid": file.sha256, "size": file.size}));
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": objects.collect::<Vec<_>>(),
            "hash_algo": "sha256",
            "ref": {"name": branch},
        });
        let what = format!("where large files of {repo} go");
        let url = self.url(&format!("{}.git/info/lfs/objects/batch", repo.path()));
        let batch: Batch = self
            .http
            .ask(&what, || self.lfs_request(&url).body(body.to_string()))
            .await?;
        let objects = batch.objects.into_iter();
        Ok(objects.map(|object| (object.oid.clone(), object)).collect())
    }

    /// A question in the protocol's own words. The token is shown to the hub alone.
    fn lfs_request(&self, url: &str) -> reqwest::RequestBuilder {
        let origin = |url: &str| reqwest::Url::parse(url).ok().map(|url| url.origin());
        let to = match origin(url) == origin(&self.settings.endpoint) {
            true => To::Hub,
            false => To::Storage,
        };
        self.http
            .request(to, Method::POST, url)
            .header(reqwest::header::ACCEPT, MEDIA_TYPE)
            .header(reqwest::header::CONTENT_TYPE, MEDIA_TYPE)
    }

    async fn send_file(
        &self,
        file: &Prepared,
        actions: &Actions,
        meter: &Arc<Meter>,
    ) -> Result<(), HubError> {
        if let Some(upload) = &actions.upload {
            match upload.header.get("chunk_size") {
                Some(size) => self.send_parts(file, upload, size, meter).await?,
                None => {
                    let headers = headers_of(file, &upload.header)?;
                    let whole = 0..file.size;
                    self.put(file, &upload.href, &headers, whole, meter).await?;
                }
            }
        }
        let Some(verify) = &actions.verify else {
            return Ok(());
        };
        let what = format!("check of {}", file.path);
        let headers = headers_of(file, &verify.header)?;
        let body = json!({"oid": file.sha256, "size": file.size}).to_string();
        let request = || {
            let request = self.lfs_request(&verify.href).headers(headers.clone());
            request.body(body.clone())
        };
        self.http.send(&what, request).await.map(drop)
    }

    async fn send_parts(
        &self,
        file: &Prepared,
        upload: &Action,
        chunk_size: &str,
        meter: &Arc<Meter>,
    ) -> Result<(), HubError> {
        let size: u64 = chunk_size.parse().unwrap_or(0);
        let addresses = part_addresses(&upload.header);
        let parts = if size == 0 {
            0
        } else {
            file.size.div_ceil(size)
        };
        if parts == 0 || parts as usize != addresses.len() || addresses.len() > PARTS_MAX {
            return Err(malformed(file, "must have an address for each part"));
        }
        let sent: Vec<_> = stream::iter(0..addresses.len())
            .map(|i| self.send_part(file, addresses[i], i as u64 * size, size, meter))
            .buffered(PARTS_AT_ONCE)
            .try_collect()
            .await?;
        let what = format!("end of {}", file.path);
        let body = json!({"oid": file.sha256, "parts": sent}).to_string();
        let request = || self.lfs_request(&upload.href).body(body.clone());
        self.http.send(&what, request).await.map(drop)
    }

    /// Sends a part, and gives what the storage calls it.
    async fn send_part(
        &self,
        file: &Prepared,
        (number, url): (u32, &str),
        start: u64,
        size: u64,
        meter: &Arc<Meter>,
    ) -> Result<serde_json::Value, HubError> {
        let (none, range) = (HeaderMap::new(), start..file.size.min(start + size));
        let answer = self.put(file, url, &none, range, meter).await?;
        let etag = answer.headers().get(ETAG);
        let etag = etag.and_then(|etag| etag.to_str().ok());
        let etag = etag.ok_or_else(|| malformed(file, "must name each part"))?;
        Ok(json!({"partNumber": number, "etag": etag}))
    }

    /// Sends a range of a file, again from its start where the connection breaks.
    async fn put(
        &self,
        file: &Prepared,
        url: &str,
        headers: &HeaderMap,
        range: Range<u64>,
        meter: &Arc<Meter>,
    ) -> Result<Response, HubError> {
        let what = format!("upload of {}", file.path);
        let once = || async {
            let moved = Arc::new(AtomicU64::new(0));
            let body = body(&file.content, range.clone(), meter, &moved).await?;
            let request = self
                .http
                .request(To::Storage, Method::PUT, url)
                .headers(headers.clone())
                .header(CONTENT_LENGTH, range.end - range.start)
                .body(body);
            let done = tokio::select! {
                sent = request.send() => answered(&what, sent).await,
                () = stalled(meter) => Err(Failed::passing(HubError::Stalled {
                    what: what.clone(),
                    after_s: STALL_MAX.as_secs(),
                })),
            };
            if done.is_err() {
                meter.take_back(moved.load(Ordering::Relaxed));
                check_size(file).await?;
            }
            done
        };
        self.http.again(&what, once).await
    }
}

/// A file that became shorter ends its body early, which looks like a broken connection.
async fn check_size(file: &Prepared) -> Result<(), Failed> {
    let Content::File(path) = &file.content else {
        return Ok(());
    };
    match tokio::fs::metadata(path).await {
        Ok(meta) if meta.len() == file.size => Ok(()),
        _ => Err(Failed::for_good(HubError::Changed { path: path.clone() })),
    }
}

fn malformed(file: &Prepared, rule: &str) -> HubError {
    HubError::Malformed {
        what: format!("where {} goes", file.path),
        rule: rule.to_owned(),
    }
}

fn headers_of(file: &Prepared, given: &BTreeMap<String, String>) -> Result<HeaderMap, HubError> {
    let headers = given.iter().map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        let mut value = HeaderValue::from_str(value).ok()?;
        value.set_sensitive(true);
        Some((name, value))
    });
    let headers: Option<HeaderMap> = headers.collect();
    headers.ok_or_else(|| malformed(file, "must have headers that can be sent"))
}

/// The addresses of parts, in the order of their numbers, which need not all be written alike.
fn part_addresses(header: &BTreeMap<String, String>) -> Vec<(u32, &str)> {
    let parts = header.iter();
    let mut parts: Vec<(u32, &str)> = parts
        .filter_map(|(name, url)| Some((name.parse().ok()?, url.as_str())))
        .collect();
    parts.sort_unstable();
    parts
}

/// A body of a range of the content, which counts what is taken of it.
async fn body(
    content: &Content,
    range: Range<u64>,
    meter: &Arc<Meter>,
    moved: &Arc<AtomicU64>,
) -> Result<Body, Failed> {
    let (meter, moved) = (Arc::clone(meter), Arc::clone(moved));
    let count = move |piece: &Bytes| {
        meter.add(piece.len() as u64);
        moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
    };
    match content {
        Content::Bytes(bytes) => {
            let bytes = bytes.slice(range.start as usize..range.end as usize);
            let starts = (0..bytes.len()).step_by(PIECE_BYTES as usize);
            let pieces: Vec<Bytes> = starts
                .map(|start| bytes.slice(start..bytes.len().min(start + PIECE_BYTES as usize)))
                .collect();
            let pieces = stream::iter(pieces).inspect(count);
            Ok(Body::wrap_stream(pieces.map(Ok::<_, std::io::Error>)))
        }
        Content::File(path) => {
            let file = open_at(path, range.start).await.map_err(|source| {
                let path = path.clone();
                Failed::for_good(HubError::File { path, source })
            })?;
            let pieces = stream::try_unfold((file, range.end - range.start), next_piece);
            Ok(Body::wrap_stream(pieces.inspect_ok(count)))
        }
    }
}

async fn open_at(path: &Path, start: u64) -> std::io::Result<tokio::fs::File> {
    let mut file = tokio::fs::File::open(path).await?;
    file.seek(std::io::SeekFrom::Start(start)).await?;
    Ok(file)
}

async fn next_piece(
    (mut file, left): (tokio::fs::File, u64),
) -> std::io::Result<Option<(Bytes, (tokio::fs::File, u64))>> {
    if left == 0 {
        return Ok(None);
    }
    let mut piece = vec![0; left.min(PIECE_BYTES) as usize];
    let read = file.read(&mut piece).await?;
    if read == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    piece.truncate(read);
    Ok(Some((piece.into(), (file, left - read as u64))))
}
