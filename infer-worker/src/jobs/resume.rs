//! Going on where earlier attempts were stopped: their pieces are verified and become this attempt's own, from the first
//! line on for as long as they follow each other.
//!
//! They are copied, because a manifest names files of its own attempt alone, and those of others are removed one day.
//! Copies are joined, and many small pieces are read at once: else an attempt that is stopped often would do nothing but
//! take over what others did.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use espalier_core::answers::{Piece, lines_sha256};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::{LIST_MAX, ObjectMeta, Store, StoreError};
use espalier_runtime::tasks::blocking;
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::error::GenerateError;
use super::input::{Input, Lines};
use super::output::{Output, PIECE_BYTES, Part};

/// Objects of one kind that are read at once: hides the latency of a store.
const READS_MAX: usize = 32;

impl Output {
    /// Takes over what earlier attempts have answered of `input`, the newest attempt first.
    pub(super) async fn take_over(&mut self, input: &Input) -> Result<(), GenerateError> {
        let earlier = self.earlier().of_this(self.fence).await?;
        for (fence, numbers) in earlier.into_iter().rev() {
            self.take_over_of(fence, numbers, input).await?;
        }
        let lines = self.summary().lines;
        if lines > 0 {
            tracing::info!(job = %self.key, lines, "took over what earlier attempts have answered");
        }
        Ok(())
    }

    /// Takes over what one attempt has answered beyond what this one has, up to the first piece that is not what it says.
    async fn take_over_of(
        &mut self,
        fence: Fence,
        numbers: BTreeSet<u32>,
        input: &Input,
    ) -> Result<(), GenerateError> {
        let earlier = self.earlier();
        let pieces = self.following(&earlier, fence, numbers, input).await?;
        let mut lines = input.lines(self.summary().lines, self.end(), u64::MAX);
        let mut groups = joined(pieces).into_iter();
        let mut contents = earlier.contents(groups.next()).await?;
        while !contents.is_empty() {
            let (copy, is_whole) = joined_contents(contents, &mut lines).await?;
            let next = groups.next().filter(|_| is_whole);
            // One copy is stored while the pieces of the next one are read.
            ((), contents) = tokio::try_join!(self.store(copy), earlier.contents(next))?;
        }
        Ok(())
    }

    /// The pieces of an attempt, by their records, that go on where this attempt is.
    async fn following(
        &self,
        earlier: &Earlier,
        fence: Fence,
        numbers: BTreeSet<u32>,
        input: &Input,
    ) -> Result<Vec<Piece>, GenerateError> {
        // Attempts take over what is before them, so that an older one rarely has more.
        if let Some(last) = numbers.last()
            && let Some(last) = earlier.record(fence, *last).await?
            && last.input.end <= self.end()
        {
            return Ok(Vec::new());
        }
        let mut records = stream::iter(numbers)
            .map(|n| earlier.record(fence, n))
            .buffered(READS_MAX);
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut line, mut end) = (self.summary().lines, self.end());
        while let Some(record) = records.try_next().await? {
            let follows = |piece: &Piece| {
                piece.input.first_line == line
                    && piece.input.start == end
                    && piece.input.end <= input.size()
                    && piece.spec_sha256 == self.spec
            };
            if let Some(piece) = record.filter(follows) {
                (line, end) = (line.saturating_add(piece.summary.lines), piece.input.end);
                pieces.push(piece);
            }
        }
        Ok(pieces)
    }

    fn earlier(&self) -> Earlier {
        Earlier {
            store: self.store.clone(),
            key: self.key.clone(),
        }
    }
}

/// The pieces of earlier attempts at a job.
struct Earlier {
    store: Store,
    key: JobKey,
}

impl Earlier {
    /// The numbers of the pieces of each attempt before `this`.
    async fn of_this(&self, this: Fence) -> Result<BTreeMap<Fence, BTreeSet<u32>>, GenerateError> {
        let prefix = layout::job(&self.key);
        let prefix = prefix.trim_end_matches('/');
        let mut earlier: BTreeMap<Fence, BTreeSet<u32>> = BTreeMap::new();
        let mut after: Option<String> = None;
        loop {
            let list = || async { self.list(prefix, after.as_deref()).await };
            let page = patiently(&self.key, "attempts", list).await?;
            let records = page
                .iter()
                .filter_map(|object| layout::job_of_answers_record(&object.path));
            for (_, fence, n) in records.filter(|(_, fence, _)| *fence < this) {
                earlier.entry(fence).or_default().insert(n);
            }
            if page.len() < LIST_MAX {
                return Ok(earlier);
            }
            after = page.last().map(|last| last.path.clone());
        }
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> Result<Vec<ObjectMeta>, GenerateError> {
        Ok(self.store.list(prefix, after, LIST_MAX).await?)
    }

    /// The record of a piece; none: it is broken, or about another one.
    async fn record(&self, fence: Fence, n: u32) -> Result<Option<Piece>, GenerateError> {
        let path = layout::answers_record(&self.key, fence, n);
        let record = self.get(&path).await?;
        let piece = record.and_then(|record| Piece::parse(&record));
        let answers = layout::answers(&self.key, fence, n);
        Ok(piece.filter(|piece| piece.answers.path == answers))
    }

    /// What the pieces hold; none of one that is not whole.
    async fn contents(
        &self,
        pieces: Option<Vec<Piece>>,
    ) -> Result<Vec<(Piece, Option<Bytes>)>, GenerateError> {
        let contents = stream::iter(pieces.into_iter().flatten()).map(|piece| async {
            let content = self.content(&piece).await?;
            Ok((piece, content))
        });
        contents.buffered(READS_MAX).try_collect().await
    }

    async fn content(&self, piece: &Piece) -> Result<Option<Bytes>, GenerateError> {
        let Some(content) = self.get(&piece.answers.path).await? else {
            return Ok(None);
        };
        let (file, hashed) = (piece.answers.clone(), content.clone());
        let holds = blocking("generate.verify", move || file.holds(&hashed)).await?;
        Ok(holds.then_some(content))
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>, GenerateError> {
        let get = || async {
            match self.store.get(path).await {
                Err(error) if error.is_not_found() => Ok(None),
                other => other.map(Some),
            }
        };
        let got: Result<_, StoreError> = patiently(&self.key, "pieces", get).await;
        Ok(got?)
    }
}

/// The pieces in groups that become one each: of a piece's size, or one larger piece.
fn joined(pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
    let mut groups: Vec<Vec<Piece>> = Vec::new();
    let mut bytes: u64 = 0;
    for piece in pieces {
        bytes = bytes.saturating_add(piece.answers.size);
        match groups.last_mut() {
            Some(group) if bytes <= PIECE_BYTES as u64 => group.push(piece),
            _ => {
                bytes = piece.answers.size;
                groups.push(vec![piece]);
            }
        }
    }
    groups
}

/// What the pieces hold together, up to the first that is not whole or answers other lines than those that come next; and
/// whether there is none such.
async fn joined_contents(
    contents: Vec<(Piece, Option<Bytes>)>,
    lines: &mut Lines<'_>,
) -> Result<(Part, bool), GenerateError> {
    let mut part = Part::default();
    for (piece, content) in contents {
        let digests = digests_of(lines, &piece).await?;
        let (Some(content), Some(digests)) = (content, digests) else {
            return Ok((part, false));
        };
        part.bytes.extend_from_slice(&content);
        part.digests.extend(digests);
        part.end = piece.input.end;
        part.summary = part.summary.and(piece.summary);
    }
    Ok((part, true))
}

/// The digests of the next lines, if they are those that the piece answers.
async fn digests_of(
    lines: &mut Lines<'_>,
    piece: &Piece,
) -> Result<Option<Vec<[u8; 32]>>, GenerateError> {
    let (mut digests, mut end) = (Vec::new(), piece.input.start);
    while (digests.len() as u64) < piece.summary.lines
        && let Some(line) = lines.next().await?
    {
        digests.push(line.digest);
        end = line.end;
    }
    let same = end == piece.input.end
        && digests.len() as u64 == piece.summary.lines
        && lines_sha256(&digests) == piece.input.sha256;
    Ok(same.then_some(digests))
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::answers::{GenerateSummary, InputRange, PIECE_VERSION};
    use espalier_core::spec::SpecDigest;
    use espalier_core::trace::FileEntry;

    #[test]
    fn what_is_joined_is_no_larger_than_a_piece_gets() {
        let piece = |bytes: usize| Piece {
            version: PIECE_VERSION,
            spec_sha256: SpecDigest::try_from("0".repeat(64)).unwrap(),
            input: InputRange {
                first_line: 0,
                start: 0,
                end: 0,
                sha256: String::new(),
            },
            answers: FileEntry {
                path: String::new(),
                size: bytes as u64,
                sha256: String::new(),
            },
            summary: GenerateSummary::default(),
        };
        let (half, more) = (PIECE_BYTES / 2, 2 * PIECE_BYTES);
        let sizes = [half, half, 1, half, half, more, 1, 1];
        let groups = joined(sizes.map(piece).into());
        let counts: Vec<usize> = groups.iter().map(Vec::len).collect();
        assert_eq!(counts, [2, 2, 1, 1, 2]);
        assert!(joined(Vec::new()).is_empty());
    }
}
