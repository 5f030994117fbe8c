//! The requests: a file of any size, read range by range, line by line.

use bytes::{Bytes, BytesMut};
use espalier_core::answers::{LINE_BYTES_MAX, LinesDigest};
use espalier_core::id::JobKey;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::{ObjectMeta, Store};
use espalier_runtime::tasks::blocking;
use sha2::{Digest, Sha256};

use super::error::GenerateError;

/// Bytes of one read: hides the latency of a store, and is little beside the longest line.
const RANGE_BYTES: u64 = 4 << 20;
/// Up to this size a line is hashed where it is: a fraction of a millisecond.
const HASH_INLINE_BYTES_MAX: usize = 64 << 10;

/// A file of requests.
pub(super) struct Input {
    store: Store,
    job: JobKey,
    meta: ObjectMeta,
}

/// One line that is not blank.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Its number among those, from 0.
    pub(super) n: u64,
    /// The byte after its end.
    pub(super) end: u64,
    /// SHA-256 of what it says.
    pub(super) digest: [u8; 32],
    /// What it says, or how many bytes of it are too many.
    pub(super) content: Result<Bytes, u64>,
}

impl Input {
    /// Finds the file at `path`. Waits for a store that is away.
    pub(super) async fn open(
        store: &Store,
        job: &JobKey,
        path: String,
    ) -> Result<Self, GenerateError> {
        let find = || async { head(store, &path).await };
        let meta = patiently(job, "requests", find).await?;
        Ok(Self {
            store: store.clone(),
            job: job.clone(),
            meta,
        })
    }

    pub(super) fn path(&self) -> &str {
        &self.meta.path
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.meta.size
    }

    /// What all lines say, as [`lines_sha256`](espalier_core::answers::lines_sha256) has it. Reads the whole file.
    pub(super) async fn lines_sha256(&self) -> Result<String, GenerateError> {
        let (mut lines, mut digest) = (self.lines(0, 0, u64::MAX), LinesDigest::default());
        while let Some(line) = lines.next().await? {
            digest.add(&[line.digest]);
        }
        Ok(digest.sha256())
    }

    /// Proves that the file which lies there says what was read. One that was written again with the same lines does.
    pub(super) async fn check_says(&self, lines_sha256: &str) -> Result<(), GenerateError> {
        let now = Self::open(&self.store, &self.job, self.meta.path.clone()).await?;
        match now.meta == self.meta || now.lines_sha256().await? == lines_sha256 {
            true => Ok(()),
            false => Err(GenerateError::Changed {
                path: self.meta.path.clone(),
            }),
        }
    }

    /// The lines that stand between two bytes, of which the first has the number `n`.
    pub(super) fn lines(&self, n: u64, start: u64, end: u64) -> Lines<'_> {
        Lines {
            input: self,
            read: start,
            end: end.min(self.meta.size),
            buffer: BytesMut::new(),
            searched: 0,
            n,
            at: start,
        }
    }

    async fn range(&self, start: u64, end: u64) -> Result<Bytes, GenerateError> {
        let read = || async {
            let read = self.store.get_range(&self.meta.path, start..end).await;
            read.map_err(|error| missing_or(error, &self.meta.path))
        };
        patiently(&self.job, "requests", read).await
    }
}

async fn head(store: &Store, path: &str) -> Result<ObjectMeta, GenerateError> {
    let found = store.head(path).await;
    found.map_err(|error| missing_or(error, path))
}

fn missing_or(error: espalier_runtime::store::StoreError, path: &str) -> GenerateError {
    match error.is_not_found() {
        true => GenerateError::Missing {
            path: path.to_owned(),
        },
        false => error.into(),
    }
}

/// Reads lines one by one, and holds no more than a range beyond the longest.
pub(super) struct Lines<'a> {
    input: &'a Input,
    /// Up to where the file has been read.
    read: u64,
    end: u64,
    buffer: BytesMut,
    /// Bytes of the buffer that have no line end.
    searched: usize,
    n: u64,
    /// Where the buffer begins in the file.
    at: u64,
}

impl Lines<'_> {
    /// The next line that is not blank.
    pub(super) async fn next(&mut self) -> Result<Option<Line>, GenerateError> {
        while let Some((content, digest)) = self.next_of_any_kind().await? {
            if matches!(&content, Ok(content) if content.iter().all(u8::is_ascii_whitespace)) {
                continue;
            }
            let line = Line {
                n: self.n,
                end: self.at,
                digest,
                content,
            };
            self.n += 1;
            return Ok(Some(line));
        }
        Ok(None)
    }

    async fn next_of_any_kind(
        &mut self,
    ) -> Result<Option<(Result<Bytes, u64>, [u8; 32])>, GenerateError> {
        loop {
            if let Some(length) = self.line_end() {
                let content = self.take(length, 1);
                return Ok(Some(hashed(content).await?));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return self.too_long().await.map(Some);
            }
            if !self.fill().await? {
                let rest = self.buffer.len();
                if rest == 0 {
                    return Ok(None);
                }
                let content = self.take(rest, 0);
                return Ok(Some(hashed(content).await?));
            }
        }
    }

    /// Passes over the rest of a line that is too long to be kept.
    async fn too_long(&mut self) -> Result<(Result<Bytes, u64>, [u8; 32]), GenerateError> {
        let (mut hasher, mut bytes) = (Sha256::new(), 0);
        loop {
            let end = self.line_end();
            let length = end.unwrap_or(self.buffer.len());
            let part = self.take(length, usize::from(end.is_some()));
            bytes += part.len() as u64;
            hasher = blocking("generate.hash", move || hasher.chain_update(&part)).await?;
            if end.is_some() || !self.fill().await? {
                return Ok((Err(bytes), hasher.finalize().into()));
            }
        }
    }

    /// Length of the line at the front of the buffer, where its end is there.
    fn line_end(&mut self) -> Option<usize> {
        let rest = &self.buffer[self.searched..];
        let found = rest.iter().position(|byte| *byte == b'\n');
        let end = found.map(|at| self.searched + at);
        self.searched = end.unwrap_or(self.buffer.len());
        end
    }

    /// Takes the front of the buffer, and drops the line end behind it.
    fn take(&mut self, length: usize, line_end: usize) -> Bytes {
        let content = self.buffer.split_to(length).freeze();
        let _ = self.buffer.split_to(line_end);
        self.at += (length + line_end) as u64;
        self.searched = 0;
        content
    }

    /// Reads on. False: there is nothing more.
    async fn fill(&mut self) -> Result<bool, GenerateError> {
        if self.read >= self.end {
            return Ok(false);
        }
        let end = self.end.min(self.read + RANGE_BYTES);
        let more = self.input.range(self.read, end).await?;
        self.buffer.extend_from_slice(&more);
        self.read = end;
        Ok(true)
    }
}

async fn hashed(content: Bytes) -> Result<(Result<Bytes, u64>, [u8; 32]), GenerateError> {
    if content.len() > LINE_BYTES_MAX {
        let bytes = content.len() as u64;
        let digest = blocking("generate.hash", move || Sha256::digest(&content).into()).await?;
        return Ok((Err(bytes), digest));
    }
    if content.len() <= HASH_INLINE_BYTES_MAX {
        let digest = Sha256::digest(&content).into();
        return Ok((Ok(content), digest));
    }
    let kept = content.clone();
    let digest = blocking("generate.hash", move || Sha256::digest(&content).into()).await?;
    Ok((Ok(kept), digest))
}
