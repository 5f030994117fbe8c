//! Sources as they come out of the store: traces by their manifests, uploads as files, in one order that both passes
//! keep. A few are read ahead; what is handed over and what is read is all that is in memory.

use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::dataset::DatasetSources;
use espalier_core::id::JobKey;
use espalier_core::layout::{self, UploadName};
use espalier_runtime::publish::patiently;
use espalier_runtime::store::{OBJECT_BYTES_MAX, Store};
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::traces::{Listed, Loaded, Traces, TracesError};
use espalier_runtime::worker::JobContext;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;

use super::error::CurateError;

/// Traces read at once: hides the latency of a store, and bounds memory by as many traces.
const READS_MAX: usize = 4;
/// How often people are told how far a job is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What conversations come out of.
#[derive(Clone, Debug)]
pub(super) enum Item {
    Trace(Listed),
    Upload(UploadName),
}

/// What an item holds, on its way to where it is looked at. What cannot be read says why.
pub(super) enum Fed {
    /// The trace of a job.
    Trace(JobKey, Result<Box<Loaded>, String>),
    /// A file of conversations.
    File(UploadName, Result<Bytes, String>),
    /// Nothing of the item is wanted.
    Skipped,
}

/// Reads for one attempt.
pub(super) struct Feed<'a> {
    pub(super) key: &'a JobKey,
    pub(super) store: &'a Store,
    pub(super) context: &'a JobContext,
}

impl Feed<'_> {
    /// Everything that conversations come out of: the traces of each batch by name, then the files.
    pub(super) async fn items(&self, sources: &DatasetSources) -> Result<Vec<Item>, CurateError> {
        let traces = self.traces();
        let mut items = Vec::new();
        for batch in &sources.batches {
            let list = || async { Ok::<_, CurateError>(traces.list(Some(batch)).await?) };
            let listed = patiently(self.key, "traces", list).await?;
            items.extend(listed.into_iter().map(Item::Trace));
        }
        items.extend(sources.uploads.iter().cloned().map(Item::Upload));
        Ok(items)
    }

    /// Reads every item that is wanted and hands it over, in order. `doing` is what people are told. Ends early where
    /// nobody takes any more: whoever does not knows why.
    pub(super) async fn hand_over(
        &self,
        items: &[Item],
        wanted: &[bool],
        to: mpsc::Sender<Fed>,
        doing: &str,
    ) -> Result<(), CurateError> {
        let read = |n: usize| self.read(&items[n], wanted.get(n) == Some(&true));
        let first_upload = items.partition_point(|item| matches!(item, Item::Trace(_)));
        let mut told = Told::new(self.context, doing, items.len());
        let mut reads = stream::iter(0..first_upload).map(read).buffered(READS_MAX);
        while let Some(fed) = reads.try_next().await? {
            if to.send(fed).await.is_err() {
                return Ok(());
            }
            told.one_more();
        }
        for n in first_upload..items.len() {
            // Room first: files are large.
            let Ok(room) = to.reserve().await else {
                return Ok(());
            };
            room.send(read(n).await?);
            told.one_more();
        }
        Ok(())
    }

    async fn read(&self, item: &Item, is_wanted: bool) -> Result<Fed, CurateError> {
        match item {
            _ if !is_wanted => Ok(Fed::Skipped),
            Item::Trace(listed) => {
                let traces = self.traces();
                let load = || async { Ok::<_, CurateError>(traces.load(listed).await?) };
                let loaded = patiently(self.key, "traces", load).await;
                let loaded = or_unreadable(loaded)?;
                Ok(Fed::Trace(listed.job.clone(), loaded.map(Box::new)))
            }
            Item::Upload(name) => {
                let path = layout::upload(&self.key.project, name);
                let get = || async { self.upload(&path).await };
                let file = patiently(self.key, "upload", get).await;
                Ok(Fed::File(name.clone(), or_unreadable(file)?))
            }
        }
    }

    async fn upload(&self, path: &str) -> Result<Bytes, CurateError> {
        let bytes = self.store.head(path).await?.size;
        if bytes > OBJECT_BYTES_MAX {
            return Err(CurateError::TooLarge {
                file: path.to_owned(),
                bytes,
                bytes_max: OBJECT_BYTES_MAX,
            });
        }
        Ok(self.store.get(path).await?)
    }

    fn traces(&self) -> Traces {
        Traces::new(self.store.clone(), self.key.project.clone())
    }
}

/// What is wrong with one source is said in the manifest; what is wrong with the store or the process ends the attempt.
fn or_unreadable<T>(read: Result<T, CurateError>) -> Result<Result<T, String>, CurateError> {
    let error = match read {
        Ok(read) => return Ok(Ok(read)),
        Err(error) => error,
    };
    let is_its_own = match &error {
        CurateError::Traces(TracesError::Store(error)) | CurateError::Store(error) => {
            error.is_not_found()
        }
        CurateError::Traces(TracesError::Work(_)) => false,
        CurateError::Traces(_) | CurateError::TooLarge { .. } => true,
        _ => false,
    };
    match is_its_own {
        true => Ok(Err(error_chain(&error))),
        false => Err(error),
    }
}

/// Tells people now and then how far a pass is.
struct Told<'a> {
    context: &'a JobContext,
    doing: &'a str,
    done: usize,
    of: usize,
    last: Instant,
}

impl<'a> Told<'a> {
    fn new(context: &'a JobContext, doing: &'a str, of: usize) -> Self {
        let told = Self {
            context,
            doing,
            done: 0,
            of,
            last: Instant::now(),
        };
        told.tell();
        told
    }

    fn one_more(&mut self) {
        self.done += 1;
        if self.last.elapsed() >= PROGRESS_EVERY {
            self.last = Instant::now();
            self.tell();
        }
    }

    fn tell(&self) {
        let Self {
            doing, done, of, ..
        } = self;
        self.context
            .lease()
            .progress(&format!("{doing} {done}/{of}"));
    }
}
