//! The answers: pieces of an attempt in the object store, each followed by a record of the lines that it answers.

use std::time::Duration;

use bytes::Bytes;
use espalier_core::answers::{
    GenerateSummary, InputRange, LinesDigest, PIECE_VERSION, Piece, lines_sha256,
};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::FileEntry;
use espalier_runtime::publish::{PublishError, patiently};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;
use tokio::time::Instant;

use super::error::GenerateError;
use super::window::Answered;

/// A piece is stored when it has so many bytes, or
pub(super) const PIECE_BYTES: usize = 8 << 20;
/// when its first line has waited for so long: what a kill costs at most. The first pieces wait less,
const PIECE_AGE_MAX: Duration = Duration::from_secs(10);
/// since all of a short job is worth as much: each waits twice as long as the one before.
const PIECE_AGE_FIRST: Duration = Duration::from_secs(1);

/// What one attempt has answered.
pub(super) struct Output {
    pub(super) store: Store,
    pub(super) key: JobKey,
    pub(super) fence: Fence,
    pub(super) spec: SpecDigest,
    /// The pieces that are stored, in order.
    files: Vec<FileEntry>,
    /// What came of their lines.
    summary: GenerateSummary,
    /// After the last of them.
    end: u64,
    /// What they say.
    lines: LinesDigest,
    pending: Pending,
}

/// Answers that are not stored yet.
#[derive(Default)]
struct Pending {
    part: Part,
    since: Option<Instant>,
}

/// Answers to lines that follow each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    /// The answers, one a line.
    pub(super) bytes: Vec<u8>,
    /// Of the lines that they answer.
    pub(super) digests: Vec<[u8; 32]>,
    /// The byte after the last of these.
    pub(super) end: u64,
    /// What came of them.
    pub(super) summary: GenerateSummary,
}

impl Output {
    /// Nothing yet.
    pub(super) fn new(store: Store, key: JobKey, fence: Fence, spec: SpecDigest) -> Self {
        Self {
            store,
            key,
            fence,
            spec,
            files: Vec::new(),
            summary: GenerateSummary::default(),
            end: 0,
            lines: LinesDigest::default(),
            pending: Pending::default(),
        }
    }

    /// The pieces that are stored, in order.
    pub(super) fn files(&self) -> &[FileEntry] {
        &self.files
    }

    /// What came of the lines that are stored.
    pub(super) fn summary(&self) -> GenerateSummary {
        self.summary
    }

    /// The byte of the requests after the last line that is stored.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// What the lines say that are stored.
    pub(super) fn lines_sha256(&self) -> String {
        self.lines.clone().sha256()
    }

    /// Lines that are answered, and up to which byte of the requests.
    pub(super) fn reached(&self) -> (u64, u64) {
        let pending = &self.pending.part;
        let lines = self.summary.lines + pending.summary.lines;
        (lines, self.end.max(pending.end))
    }

    /// Takes the answer to the next line.
    pub(super) fn push(&mut self, answered: Answered) {
        self.pending.since.get_or_insert_with(Instant::now);
        let part = &mut self.pending.part;
        part.bytes.extend_from_slice(&answered.text);
        part.digests.push(answered.line.digest);
        part.end = answered.line.end;
        part.summary = part.summary.and(answered.summary);
    }

    /// Whether there is enough for a piece.
    pub(super) fn is_full(&self) -> bool {
        self.pending.part.bytes.len() >= PIECE_BYTES
    }

    /// When what is pending is to be stored; none: nothing is.
    pub(super) fn due_at(&self) -> Option<Instant> {
        let before = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        let longer = 2_u32.saturating_pow(before);
        let age = PIECE_AGE_FIRST.saturating_mul(longer).min(PIECE_AGE_MAX);
        self.pending.since.map(|since| since + age)
    }

    /// Stores what is pending. Waits for a store that is away; a call that is dropped has stored nothing that counts.
    pub(super) async fn store_pending(&mut self) -> Result<(), GenerateError> {
        let pending = std::mem::take(&mut self.pending);
        self.store(pending.part).await
    }

    /// Stores a part as the next piece of this attempt: the answers, then the record that makes them count.
    pub(super) async fn store(&mut self, part: Part) -> Result<(), GenerateError> {
        if part.digests.is_empty() {
            return Ok(());
        }
        let n = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        let path = layout::answers(&self.key, self.fence, n);
        let content = Bytes::from(part.bytes);
        let hashed = content.clone();
        let answers = blocking("generate.hash", move || FileEntry::of(path, &hashed)).await?;
        let piece = Piece {
            version: PIECE_VERSION,
            spec_sha256: self.spec.clone(),
            input: InputRange {
                first_line: self.summary.lines,
                start: self.end,
                end: part.end,
                sha256: lines_sha256(&part.digests),
            },
            answers,
            summary: part.summary,
        };
        let record = serde_json::to_vec_pretty(&piece).map_err(PublishError::Encode)?;
        self.put(&piece.answers.path, content).await?;
        let path = layout::answers_record(&self.key, self.fence, n);
        self.put(&path, record.into()).await?;
        self.summary = self.summary.and(piece.summary);
        self.end = piece.input.end;
        self.lines.add(&part.digests);
        self.files.push(piece.answers);
        Ok(())
    }

    async fn put(&self, path: &str, content: Bytes) -> Result<(), GenerateError> {
        let put = || async { Ok(self.store.put(path, content.clone()).await?) };
        patiently(&self.key, "answers", put).await
    }
}
