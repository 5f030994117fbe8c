//! Going on where earlier attempts were stopped: their pieces are verified and become this attempt's own, from the first
//! line on for as long as they follow each other.
//!
//! They are copied, because a manifest names files of its own attempt alone, and those of others are removed one day.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use espalier_core::answers::{Piece, lines_sha256};
use espalier_core::id::Fence;
use espalier_core::layout;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::{LIST_MAX, ObjectMeta, StoreError};
use espalier_runtime::tasks::blocking;

use super::error::GenerateError;
use super::input::Input;
use super::output::Output;

impl Output {
    /// Takes over what earlier attempts have answered of `input`, the newest attempt first.
    pub(super) async fn take_over(&mut self, input: &Input) -> Result<(), GenerateError> {
        let earlier = self.earlier_pieces().await?;
        for (fence, numbers) in earlier.into_iter().rev() {
            for n in numbers {
                let Some((piece, content)) = self.usable(fence, n, input).await? else {
                    continue;
                };
                self.store_piece(content, piece.input, piece.summary)
                    .await?;
            }
        }
        let lines = self.summary().lines;
        if lines > 0 {
            tracing::info!(job = %self.key, lines, "took over what earlier attempts have answered");
        }
        Ok(())
    }

    /// The numbers of the pieces of each earlier attempt.
    async fn earlier_pieces(&self) -> Result<BTreeMap<Fence, BTreeSet<u32>>, GenerateError> {
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
            for (_, fence, n) in records.filter(|(_, fence, _)| *fence < self.fence) {
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

    /// A piece, if it is whole, answers the same requests for the same job, and begins where this attempt is.
    async fn usable(
        &self,
        fence: Fence,
        n: u32,
        input: &Input,
    ) -> Result<Option<(Piece, Bytes)>, GenerateError> {
        let record = layout::answers_record(&self.key, fence, n);
        let Some(record) = self.get(&record).await? else {
            return Ok(None);
        };
        let Some(piece) = Piece::parse(&record) else {
            return Ok(None);
        };
        let follows = piece.input.first_line == self.summary().lines
            && piece.input.start == self.end()
            && piece.spec_sha256 == self.spec
            && piece.answers.path == layout::answers(&self.key, fence, n);
        if !follows || !says_the_same(&piece, input).await? {
            return Ok(None);
        }
        let Some(content) = self.get(&piece.answers.path).await? else {
            return Ok(None);
        };
        let (file, hashed) = (piece.answers.clone(), content.clone());
        let holds = blocking("generate.verify", move || file.holds(&hashed)).await?;
        Ok(holds.then_some((piece, content)))
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

/// Whether the requests are those that the piece answers.
async fn says_the_same(piece: &Piece, input: &Input) -> Result<bool, GenerateError> {
    let range = &piece.input;
    if range.end > input.size() {
        return Ok(false);
    }
    let mut lines = input.lines(range.first_line, range.start, range.end);
    let (mut digests, mut end) = (Vec::new(), range.start);
    while let Some(line) = lines.next().await? {
        digests.push(line.digest);
        end = line.end;
    }
    Ok(end == range.end
        && digests.len() as u64 == piece.summary.lines
        && lines_sha256(&digests) == range.sha256)
}
