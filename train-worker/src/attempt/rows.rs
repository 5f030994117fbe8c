//! Samples out of the object store.

use espalier_core::error::FieldError;
use espalier_core::id::JobKey;
use espalier_core::layout::{self, UploadName};
use espalier_core::spec::TrainData;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;

use super::Workshop;
use crate::data::{RowLines, Rules, Samples};
use crate::error::TrainError;

/// Bytes of one read: hides the latency of a store, and takes some tenths of a second to parse.
const RANGE_BYTES: u64 = 4 << 20;

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
        key: &JobKey,
        data: &TrainData,
        rules: Rules,
    ) -> Result<Data, TrainError> {
        match data {
            TrainData::Dataset(dataset) => {
                let rule = "must be `rows`: this worker reads no data sets yet";
                Err(FieldError::new("train.dataset", dataset, rule).into())
            }
            TrainData::Rows { train, eval } => {
                let held_out = match eval {
                    Some(eval) => Some(self.rows(key, eval, rules).await?),
                    None => None,
                };
                Ok(Data {
                    path: layout::upload(&key.project, train),
                    samples: self.rows(key, train, rules).await?,
                    held_out,
                })
            }
        }
    }

    async fn rows(
        &self,
        key: &JobKey,
        name: &UploadName,
        rules: Rules,
    ) -> Result<Samples, TrainError> {
        let path = layout::upload(&key.project, name);
        let samples = read(&self.store, key, &path, rules).await?;
        let (count, tokens, cut) = (samples.len(), samples.tokens(), samples.cut());
        tracing::info!(job = %key, path, samples = count, tokens, cut, "samples were read");
        Ok(samples)
    }
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
