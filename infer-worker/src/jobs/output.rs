//! The answers: pieces of an attempt in the object store, each followed by a record of the lines that it answers.

use std::time::Duration;

use bytes::Bytes;
use espalier_core::answers::{GenerateSummary, InputRange, PIECE_VERSION, Piece, lines_sha256};
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
const PIECE_BYTES: usize = 8 << 20;
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
    pending: Pending,
}

/// Answers that are not stored yet.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    digests: Vec<[u8; 32]>,
    end: u64,
    summary: GenerateSummary,
    since: Option<Instant>,
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

    /// Lines that are answered, and up to which byte of the requests.
    pub(super) fn reached(&self) -> (u64, u64) {
        let lines = self.summary.lines + self.pending.summary.lines;
        (lines, self.end.max(self.pending.end))
    }

    /// Takes the answer to the next line.
    pub(super) fn push(&mut self, answered: Answered) {
        let pending = &mut self.pending;
        pending.bytes.extend_from_slice(&answered.text);
        pending.digests.push(answered.line.digest);
        pending.end = answered.line.end;
        pending.summary = pending.summary.and(answered.summary);
        pending.since.get_or_insert_with(Instant::now);
    }

    /// Whether there is enough for a piece.
    pub(super) fn is_full(&self) -> bool {
        self.pending.bytes.len() >= PIECE_BYTES
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
        if self.pending.since.is_none() {
            return Ok(());
        }
        let content = Bytes::from(std::mem::take(&mut self.pending.bytes));
        let pending = std::mem::take(&mut self.pending);
        let input = InputRange {
            first_line: self.summary.lines,
            start: self.end,
            end: pending.end,
            sha256: lines_sha256(&pending.digests),
        };
        self.store_piece(content, input, pending.summary).await
    }

    /// Stores a piece as the next one of this attempt: the answers, then the record that makes them count.
    pub(super) async fn store_piece(
        &mut self,
        content: Bytes,
        input: InputRange,
        summary: GenerateSummary,
    ) -> Result<(), GenerateError> {
        let n = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        let path = layout::answers(&self.key, self.fence, n);
        let hashed = content.clone();
        let answers = blocking("generate.hash", move || FileEntry::of(path, &hashed)).await?;
        let piece = Piece {
            version: PIECE_VERSION,
            spec_sha256: self.spec.clone(),
            input,
            answers,
            summary,
        };
        let record = serde_json::to_vec_pretty(&piece).map_err(PublishError::Encode)?;
        self.put(&piece.answers.path, content).await?;
        let path = layout::answers_record(&self.key, self.fence, n);
        self.put(&path, record.into()).await?;
        self.summary = self.summary.and(piece.summary);
        self.end = piece.input.end;
        self.files.push(piece.answers);
        Ok(())
    }

    async fn put(&self, path: &str, content: Bytes) -> Result<(), GenerateError> {
        let put = || async { Ok(self.store.put(path, content.clone()).await?) };
        patiently(&self.key, "answers", put).await
    }
}
