//! The end of a curation: what tells of the rows, the manifest, and the version by which people name them.

use bytes::Bytes;
use espalier_core::dataset::{
    CARD_FILE, CurateSummary, DATASET_RECORD_VERSION, DatasetVersion, MANIFEST_FILE, TALLY_FILE,
    TOKENIZER_FILE,
};
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::trace::{FileEntry, Manifest, SCHEMA_VERSION, Summary};
use espalier_dataset::files::{CardFacts, card};
use espalier_dataset::{Counts, Split, Tally};
use espalier_runtime::publish::{self, ByLease, Claim, Gate, PublishError, Published, patiently};
use espalier_runtime::store::{OBJECT_BYTES_MAX, StoreError};
use espalier_runtime::tasks::blocking;
use espalier_runtime::worker::JobContext;

use super::error::CurateError;
use super::{CurateHandler, Made, Order};

impl CurateHandler {
    /// Publishes what was made, and gives it a number.
    pub(super) async fn publish(
        &self,
        order: &Order<'_>,
        made: Made,
        claim: Claim<'_>,
        context: &JobContext,
    ) -> Result<Published, CurateError> {
        let grant = order.grant;
        let (counts, tally) = (made.second.chosen.counts(), made.second.tally.clone());
        if tally.rows(Split::Train) == 0 {
            return Err(CurateError::Empty {
                sources: counts.sources,
                dropped: dropped_words(&counts),
            });
        }
        let mut files = made.files.clone();
        for (name, content) in self.beside(order, made).await? {
            let path = format!("{}{name}", layout::dataset_files(&grant.key, grant.fence));
            files.push(self.store_bytes(&grant.key, path, content).await?);
        }
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            job: grant.key.clone(),
            attempt: grant.attempt,
            fence: grant.fence,
            spec_sha256: claim.spec.cloned(),
            created_at_us: self.clock.now(),
            files,
            parents: parents(order),
            summary: Summary::Curate(summary(&counts, &tally)),
        };
        let published = publish::create(&self.store, claim, &manifest, &ByLease(context)).await?;
        self.version_of_published(order, context).await?;
        Ok(published)
    }

    /// Manifest, sums and card of the data set, and its tokenizer.
    async fn beside(
        &self,
        order: &Order<'_>,
        made: Made,
    ) -> Result<Vec<(&'static str, Bytes)>, CurateError> {
        let Made {
            second,
            files,
            tokenizer,
        } = made;
        let (name, sources) = (order.curate.dataset.clone(), order.sources.clone());
        let now = self.clock.now();
        let write = blocking("curate.manifest", move || {
            let models = second.models.into_iter().collect();
            let manifest = second.chosen.manifest(files, models, now);
            let text = card(&CardFacts {
                name: name.as_str(),
                license: None,
                sources: &sources,
                manifest: &manifest,
                tally: &second.tally,
            });
            let tally = serde_json::to_vec_pretty(&second.tally)?;
            let manifest = serde_json::to_vec_pretty(&manifest)?;
            let mut files = vec![
                (MANIFEST_FILE, Bytes::from(manifest)),
                (TALLY_FILE, Bytes::from(tally)),
                (CARD_FILE, Bytes::from(text)),
            ];
            files.extend(tokenizer.map(|file| (TOKENIZER_FILE, file)));
            Ok::<_, serde_json::Error>(files)
        });
        write.await?.map_err(CurateError::Encode)
    }

    /// Sees to it that the result which is published has a version. The lease is asked once more, so that whoever lost
    /// it takes no number beside the one that its successor takes.
    pub(super) async fn version_of_published(
        &self,
        order: &Order<'_>,
        context: &JobContext,
    ) -> Result<(), CurateError> {
        let key = &order.grant.key;
        let path = layout::manifest(key);
        let get = || async { self.store.get(&path).await };
        let read: Result<Bytes, StoreError> = patiently(key, "manifest", get).await;
        let manifest = Manifest::parse(&read?, key)?;
        let summary = manifest.summary.curate().ok_or(CurateError::NoCuration)?;
        let mut record = DatasetVersion {
            record_version: DATASET_RECORD_VERSION,
            name: order.curate.dataset.clone(),
            n: 0,
            job: manifest.job.clone(),
            fence: manifest.fence,
            created_at_us: manifest.created_at_us,
            sources: order.sources.clone(),
            summary: summary.clone(),
            files: manifest.files.clone(),
        };
        let datasets = self.datasets(order.grant);
        let reserve = || async {
            match ByLease(context).may_publish() {
                true => Ok::<_, CurateError>(datasets.reserve(&record).await?),
                false => Err(PublishError::Stopped.into()),
            }
        };
        record.n = patiently(key, "version", reserve).await?;
        let (dataset, n) = (&record.name, record.n);
        tracing::info!(job = %key, %dataset, n, "a version of a data set is published");
        Ok(())
    }

    async fn store_bytes(
        &self,
        key: &JobKey,
        path: String,
        content: Bytes,
    ) -> Result<FileEntry, CurateError> {
        let hashed = content.clone();
        let entry = blocking("curate.hash", move || FileEntry::of(path, &hashed)).await?;
        self.store_file(key, &entry, content).await?;
        Ok(entry)
    }

    pub(super) async fn store_file(
        &self,
        key: &JobKey,
        entry: &FileEntry,
        content: Bytes,
    ) -> Result<(), CurateError> {
        if entry.size > OBJECT_BYTES_MAX {
            return Err(CurateError::TooLarge {
                file: entry.path.clone(),
                bytes: entry.size,
                bytes_max: OBJECT_BYTES_MAX,
            });
        }
        let put =
            || async { Ok::<_, CurateError>(self.store.put(&entry.path, content.clone()).await?) };
        patiently(key, "dataset", put).await
    }
}

/// What the job was made from: the manifest among the files names each conversation.
fn parents(order: &Order<'_>) -> Vec<String> {
    let project = &order.grant.key.project;
    let extended = order.curate.extends.iter();
    let extended = extended.map(|of| layout::dataset_version(project, &of.name, of.version));
    let batches = order.sources.batches.iter();
    let batches = batches.map(|batch| layout::batch(project, batch));
    let uploads = order.sources.uploads.iter();
    let uploads = uploads.map(|name| layout::upload(project, name));
    extended.chain(batches).chain(uploads).collect()
}

fn summary(counts: &Counts, tally: &Tally) -> CurateSummary {
    let dropped = counts.dropped.iter();
    CurateSummary {
        sources: counts.sources as u64,
        train_rows: tally.rows(Split::Train),
        eval_rows: tally.rows(Split::Eval),
        tokens: tally.tokens,
        supervised_tokens: tally.supervised_tokens,
        dropped: dropped
            .map(|(reason, count)| (reason.as_str().to_owned(), *count as u64))
            .collect(),
    }
}

fn dropped_words(counts: &Counts) -> String {
    if counts.dropped.is_empty() {
        return "none was dropped".to_owned();
    }
    let dropped = counts.dropped.iter();
    let words: Vec<String> = dropped
        .map(|(reason, count)| format!("{count} {}", reason.as_str()))
        .collect();
    format!("dropped were {}", words.join(", "))
}
