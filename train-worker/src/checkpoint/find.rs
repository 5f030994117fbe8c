//! Going on where earlier attempts were stopped: the newest of their checkpoints that is whole and of the same training.

use espalier_core::id::Fence;
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::FileEntry;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::{LIST_MAX, StoreError};
use espalier_runtime::tasks::blocking;

use super::Place;
use super::format::{Assembler, FormatError, Record};
use crate::engine::State;
use crate::error::TrainError;
use crate::report::History;

/// What a checkpoint must be of.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// What the job asks for.
    pub spec: &'a SpecDigest,
    /// What it begins with.
    pub base_sha256: &'a str,
    /// What it learns from.
    pub data_sha256: &'a str,
}

/// A checkpoint that was read whole.
#[derive(Clone, Debug)]
pub struct Resumed {
    /// What it says of itself.
    pub record: Record,
    /// What training changed up to it.
    pub state: State,
    /// The steps up to it.
    pub history: History,
}

/// Why a checkpoint is passed over.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it is of {what}")]
    Other { what: &'static str },
    #[error("`{path}` is missing, or not what the record says")]
    File { path: String },
    #[error("it is broken")]
    Format(#[from] FormatError),
    #[error("its steps do not count up to {0}")]
    Steps(u64),
}

/// The newest checkpoint of an earlier attempt that is whole. Those that are broken, or of another training, are reported
/// and passed over.
///
/// # Errors
/// The store does not answer.
pub async fn newest(place: &Place, expected: Expected<'_>) -> Result<Option<Resumed>, TrainError> {
    for (step, fence) in earlier(place).await?.into_iter().rev() {
        match load(place, fence, step, expected).await? {
            Some(resumed) => {
                tracing::info!(job = %place.key, step, of = fence.0, "goes on from a checkpoint");
                return Ok(Some(resumed));
            }
            None => continue,
        }
    }
    Ok(None)
}

/// The checkpoint of `step` that the attempt `fence` took; none where it cannot be used, which is reported.
///
/// # Errors
/// The store does not answer.
pub async fn load(
    place: &Place,
    fence: Fence,
    step: u64,
    expected: Expected<'_>,
) -> Result<Option<Resumed>, TrainError> {
    match read(place, fence, step, expected).await? {
        Ok(resumed) => Ok(Some(resumed)),
        Err(error) => {
            let error = espalier_runtime::telemetry::error_chain(&error);
            tracing::warn!(job = %place.key, step, of = fence.0, error, "a checkpoint is passed over");
            Ok(None)
        }
    }
}

/// Checkpoints that have a record: the last is the newest.
async fn earlier(place: &Place) -> Result<Vec<(u64, Fence)>, TrainError> {
    let prefix = layout::job(&place.key);
    let prefix = prefix.trim_end_matches('/');
    let (mut found, mut after) = (Vec::new(), None::<String>);
    loop {
        let list = || async { place.store.list(prefix, after.as_deref(), LIST_MAX).await };
        let page: Result<_, StoreError> = patiently(&place.key, "checkpoints", list).await;
        let page = page?;
        let records = page
            .iter()
            .filter_map(|object| layout::checkpoint_of_record(&object.path));
        let records = records.filter(|(_, fence, _)| *fence < place.fence);
        found.extend(records.map(|(_, fence, step)| (step, fence)));
        if page.len() < LIST_MAX {
            found.sort_unstable();
            return Ok(found);
        }
        after = page.last().map(|last| last.path.clone());
    }
}

async fn read(
    place: &Place,
    fence: Fence,
    step: u64,
    expected: Expected<'_>,
) -> Result<Result<Resumed, Unusable>, TrainError> {
    let path = layout::checkpoint_record(&place.key, fence, step);
    let Some(bytes) = get(place, &path).await? else {
        return Ok(Err(Unusable::File { path }));
    };
    let record = match Record::parse(&bytes) {
        Ok(record) => record,
        Err(error) => return Ok(Err(error.into())),
    };
    if let Some(what) = other(&record, step, expected) {
        return Ok(Err(Unusable::Other { what }));
    }
    let mut assembler = Assembler::new(&record.tensors);
    for file in &record.files {
        let Some(bytes) = whole(place, file).await? else {
            let path = file.path.clone();
            return Ok(Err(Unusable::File { path }));
        };
        let pushed = blocking("train.decode", move || {
            let pushed = assembler.push(&bytes);
            (assembler, pushed)
        });
        let (given_back, pushed) = pushed.await?;
        assembler = given_back;
        if let Err(error) = pushed {
            return Ok(Err(error.into()));
        }
    }
    let tensors = match assembler.finish() {
        Ok(tensors) => tensors,
        Err(error) => return Ok(Err(error.into())),
    };
    let Some(lines) = whole(place, &record.steps).await? else {
        let path = record.steps.path.clone();
        return Ok(Err(Unusable::File { path }));
    };
    let Some(history) = History::parse(&lines, step) else {
        return Ok(Err(Unusable::Steps(step)));
    };
    Ok(Ok(Resumed {
        state: State { step, tensors },
        history,
        record,
    }))
}

/// What a record is of, where it is not of this training.
fn other(record: &Record, step: u64, expected: Expected<'_>) -> Option<&'static str> {
    if record.spec_sha256 != *expected.spec {
        return Some("another job, or other settings");
    }
    if record.base_sha256 != expected.base_sha256 {
        return Some("another base model");
    }
    if record.data_sha256 != expected.data_sha256 {
        return Some("another data set");
    }
    (record.step != step).then_some("another step")
}

/// A file, if it is what `entry` says.
async fn whole(place: &Place, entry: &FileEntry) -> Result<Option<bytes::Bytes>, TrainError> {
    let Some(bytes) = get(place, &entry.path).await? else {
        return Ok(None);
    };
    let (entry, hashed) = (entry.clone(), bytes.clone());
    let holds = blocking("train.verify", move || entry.holds(&hashed)).await?;
    Ok(holds.then_some(bytes))
}

async fn get(place: &Place, path: &str) -> Result<Option<bytes::Bytes>, TrainError> {
    let get = || async {
        match place.store.get(path).await {
            Err(error) if error.is_not_found() => Ok(None),
            other => other.map(Some),
        }
    };
    let got: Result<_, StoreError> = patiently(&place.key, "checkpoint", get).await;
    Ok(got?)
}
