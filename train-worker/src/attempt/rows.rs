//! Samples out of the object store.

use espalier_core::id::JobKey;
use espalier_core::layout::{self, UploadName};
use espalier_core::spec::TrainData;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;

use super::{Tell, Workshop};
use crate::data::{RowLines, Rules, Samples};
use crate::error::TrainError;
use crate::trainer::OfBase;

/// Bytes of one read: hides the latency of a store, and takes some tenths of a second to parse.
const RANGE_BYTES: u64 = 4 << 20;

/// For whom samples are read.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub(super) key: &'a JobKey,
    /// The name of the base model, and its tokenizer.
    pub(super) base: (&'a str, &'a OfBase),
    pub(super) rules: Rules,
    pub(super) tell: Tell<'a>,
}

/// What a job learns from.
pub(super) struct Data {
    /// Object path of it.
    pub(super) path: String,
    pub(super) samples: Samples,
    pub(super) held_out: Option<Samples>,
}

impl Data {
    /// The digest of all of it.
    pub(super) fn sha256(&self) -> String {
        let held_out = self.held_out.as_ref().map(Samples::sha256);
        let both = format!(
            "{}\n{}\n",
            self.samples.sha256(),
            held_out.unwrap_or_default()
        );
        espalier_core::trace::sha256_hex(both.as_bytes())
    }
}

impl Workshop {
    /// Reads all samples of a job.
    pub(super) async fn data(
        &self,
        data: &TrainData,
        reading: Reading<'_>,
    ) -> Result<Data, TrainError> {
        match data {
            TrainData::Dataset(dataset) => self.dataset(dataset, reading).await,
            TrainData::Rows { train, eval } => {
                (reading.tell)("reading the samples");
                let held_out = match eval {
                    Some(eval) => Some(self.rows(eval, reading).await?),
                    None => None,
                };
                Ok(Data {
                    path: layout::upload(&reading.key.project, train),
                    samples: self.rows(train, reading).await?,
                    held_out,
                })
            }
        }
    }

    async fn rows(&self, name: &UploadName, reading: Reading<'_>) -> Result<Samples, TrainError> {
        let Reading { key, rules, .. } = reading;
        let path = layout::upload(&key.project, name);
        let samples = read(&self.store, key, &path, rules).await?;
        log(key, &path, &samples);
        Ok(samples)
    }
}

/// Says what was read of `from`.
pub(super) fn log(key: &JobKey, from: &str, samples: &Samples) {
    tracing::info!(
        job = %key,
        from,
        samples = samples.len(),
        tokens = samples.tokens(),
        supervised_tokens = samples.supervised_tokens(),
        cut = samples.cut(),
        memory_bytes = samples.bytes(),
        "samples were read"
    );
}

/// Reads a file of rows piece by piece.
async fn read(
    store: &Store,
    key: &JobKey,
    path: &str,
    rules: Rules,
) -> Result<Samples, TrainError> {
    let size = || async {
        match store.head(path).await {
            Err(error) if error.is_not_found() => Err(TrainError::Missing {
                what: "file of rows",
                path: path.to_owned(),
            }),
            other => Ok(other?.size),
        }
    };
    let size = patiently(key, "rows", size).await?;
    let mut lines = RowLines::new(path, rules);
    let mut start = 0;
    while start < size {
        let end = size.min(start + RANGE_BYTES);
        let piece = || async { Ok::<_, TrainError>(store.get_range(path, start..end).await?) };
        let piece = patiently(key, "rows", piece).await?;
        let pushed = blocking("train.rows", move || lines.push(&piece).map(|()| lines));
        lines = pushed.await??;
        start = end;
    }
    Ok(blocking("train.rows", move || lines.finish()).await??)
}
