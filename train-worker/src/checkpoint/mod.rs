//! Checkpoints in the object store: written beside training, kept in a small number, found again by the next attempt.
//!
//! A checkpoint belongs to the attempt that took it and counts once its record is there, which is written last. Files are
//! verified when they are read: one that is broken is passed over for the one before it.

mod find;
mod format;

use bytes::Bytes;
use espalier_core::adapter::Agreement;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::FileEntry;
use espalier_runtime::publish::{PublishError, patiently};
use espalier_runtime::store::{LIST_MAX, Store};
use espalier_runtime::tasks::blocking;

use crate::data::Cursor;
use crate::engine::State;
use crate::error::TrainError;
use crate::report::History;

pub use find::{Expected, load, newest};
pub use format::{Best, Record, Totals};

use format::{FILE_BYTES, RECORD_VERSION, TensorEntry, encode, lay_out};

/// Whose checkpoints these are.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where they lie.
    pub store: Store,
    /// The job.
    pub key: JobKey,
    /// The attempt.
    pub fence: Fence,
}

/// A training between two steps.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What the job asked for.
    pub spec: SpecDigest,
    /// What it began with.
    pub base_sha256: String,
    /// What it learns from.
    pub data_sha256: String,
    /// Where the next step begins.
    pub cursor: Cursor,
    /// Sums over all steps.
    pub totals: Totals,
    /// The best measurement so far.
    pub best: Option<Best>,
    /// How near training was to serving, before its first step.
    pub agreement: Option<Agreement>,
    /// Everything that training changes, with the count of steps.
    pub state: State,
    /// The steps.
    pub history: History,
}

/// Stores `snapshot`: its files, then the record that makes them count. Waits for a store that is away.
///
/// # Errors
/// The store refuses.
pub async fn save(place: &Place, snapshot: Snapshot) -> Result<(), TrainError> {
    let step = snapshot.state.step;
    let tensors: Vec<TensorEntry> = snapshot.state.tensors.iter().map(TensorEntry::of).collect();
    let mut state = snapshot.state.tensors;
    let mut files = Vec::new();
    for (n, pieces) in lay_out(&state, FILE_BYTES).into_iter().enumerate() {
        let path = layout::checkpoint_tensors(&place.key, place.fence, step, n);
        let encoded = blocking("train.encode", move || {
            let encoded = encode(&state, &pieces);
            let file = encoded.map(|bytes| (FileEntry::of(path, &bytes), Bytes::from(bytes)));
            (state, file)
        });
        let (given_back, file) = encoded.await?;
        state = given_back;
        let (file, bytes) = file?;
        place.put(&file.path, bytes).await?;
        files.push(file);
    }
    drop(state);
    let lines = Bytes::copy_from_slice(snapshot.history.to_lines());
    let path = layout::checkpoint_steps(&place.key, place.fence, step);
    let steps = FileEntry::of(path, &lines);
    place.put(&steps.path, lines).await?;
    let record = Record {
        version: RECORD_VERSION,
        spec_sha256: snapshot.spec,
        base_sha256: snapshot.base_sha256,
        data_sha256: snapshot.data_sha256,
        step,
        cursor: snapshot.cursor,
        totals: snapshot.totals,
        best: snapshot.best,
        agreement: snapshot.agreement,
        tensors,
        files,
        steps,
    };
    let path = layout::checkpoint_record(&place.key, place.fence, step);
    let record = serde_json::to_vec_pretty(&record).map_err(PublishError::Encode)?;
    place.put(&path, record.into()).await
}

impl Place {
    async fn put(&self, path: &str, content: Bytes) -> Result<(), TrainError> {
        let put = || async { Ok(self.store.put(path, content.clone()).await?) };
        patiently(&self.key, "checkpoint", put).await
    }

    /// Removes the checkpoint of `step` of this attempt. Its record goes first: it is whole or none.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn remove(&self, step: u64) -> Result<(), TrainError> {
        let record = layout::checkpoint_record(&self.key, self.fence, step);
        self.store.delete(&record).await?;
        let folder = layout::checkpoint(&self.key, self.fence, step);
        let folder = folder.trim_end_matches('/');
        for object in self.store.list(folder, None, LIST_MAX).await? {
            self.store.delete(&object.path).await?;
        }
        Ok(())
    }
}

/// The steps whose checkpoints this attempt has stored, and which of them go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept(Vec<u64>);

impl Kept {
    /// Notes that the checkpoint of `step` is stored, and names those that are no more wanted: all but the newest
    /// `keep` and the `best`.
    pub fn stored(&mut self, step: u64, keep: usize, best: Option<u64>) -> Vec<u64> {
        self.0.push(step);
        let old = self.0.len().saturating_sub(keep);
        let (gone, kept): (Vec<_>, Vec<_>) = self
            .0
            .iter()
            .enumerate()
            .partition(|(n, step)| *n < old && Some(**step) != best);
        let steps = |some: Vec<(usize, &u64)>| some.into_iter().map(|(_, step)| *step).collect();
        let gone = steps(gone);
        self.0 = steps(kept);
        gone
    }
}

#[cfg(test)]
mod tests;
