//! Samples of a version of a data set: its record and manifest say whether they are for this model, its rows are read file by
//! file and made into samples some at a time, and what is read is verified.

use std::sync::Arc;

use bytes::Bytes;
use espalier_core::dataset::{DatasetVersion, MANIFEST_FILE, file_name};
use espalier_core::error::FieldError;
use espalier_core::layout;
use espalier_core::spec::DatasetRef;
use espalier_core::trace::FileEntry;
use espalier_dataset::files::{parquet_records, read_rows};
use espalier_dataset::{DatasetManifest, Row, Split, samples};
use espalier_qwen3_text::{CHAT_TEMPLATE_SHA256, Tokenizer};
use espalier_runtime::datasets::{Datasets, DatasetsError};
use espalier_runtime::publish::patiently;
use espalier_runtime::tasks::blocking;

use super::Workshop;
use super::rows::{Data, Reading, log};
use crate::data::{self, DataError, NAME_BYTES_MAX, Rules, Samples};
use crate::error::TrainError;

/// Rows that are made into samples at once: work for some threads, and at most some tens of MiB.
const ROWS_AT_ONCE: usize = 64;

impl Workshop {
    /// Reads all samples of a version, those that are held out as well.
    pub(super) async fn dataset(
        &self,
        of: &DatasetRef,
        reading: Reading<'_>,
    ) -> Result<Data, TrainError> {
        let version = Version::open(self, of, reading).await?;
        version.check_tokens().await?;
        let samples = version.samples(Split::Train).await?;
        if samples.is_empty() {
            let path = of.to_string();
            return Err(DataError::Empty { path }.into());
        }
        let held_out = version.samples(Split::Eval).await?;
        Ok(Data {
            path: layout::dataset_version(&reading.key.project, &of.name, of.version),
            samples,
            held_out: (!held_out.is_empty()).then_some(held_out),
        })
    }
}

/// A version that is read.
struct Version<'a> {
    of: &'a DatasetRef,
    datasets: Datasets,
    record: DatasetVersion,
    reading: Reading<'a>,
}

impl<'a> Version<'a> {
    async fn open(
        workshop: &Workshop,
        of: &'a DatasetRef,
        reading: Reading<'a>,
    ) -> Result<Self, TrainError> {
        (reading.tell)(&format!("reading {of}"));
        let project = reading.key.project.clone();
        let datasets = Datasets::new(workshop.store.clone(), project);
        let get = || async { datasets.version(&of.name, Some(of.version)).await };
        let record = patiently(reading.key, "data set", get).await;
        Ok(Self {
            of,
            record: record.map_err(|source| refused(of, source))?,
            datasets,
            reading,
        })
    }

    async fn file(&self, entry: &FileEntry) -> Result<Bytes, TrainError> {
        let get = || async { self.datasets.file(entry).await };
        let got = patiently(self.reading.key, "data set", get).await;
        got.map_err(|source| refused(self.of, source))
    }

    /// Whether its tokens mean to the base model what they meant when it was built.
    async fn check_tokens(&self) -> Result<(), TrainError> {
        let missing = || {
            let rule = format!("must name {MANIFEST_FILE}");
            let error = FieldError::new("dataset.files", self.record.files.len(), rule);
            refused(self.of, error.into())
        };
        let entry = self.record.file(MANIFEST_FILE).ok_or_else(missing)?;
        let manifest = DatasetManifest::parse(&self.file(entry).await?);
        let manifest = manifest.map_err(|error| refused(self.of, error.into()))?;
        let (base, tokenizer) = (self.reading.base.0, self.tokenizer()?);
        let options = match tokenizer.is_qwen3() {
            true => String::new(),
            false => format!(" --tokenizer {base}"),
        };
        for (what, whose, own, found) in [
            (
                "tokenizer",
                "the base model's",
                tokenizer.sha256(),
                manifest.tokenizer_sha256,
            ),
            (
                "chat template",
                "this worker's",
                CHAT_TEMPLATE_SHA256,
                manifest.template_sha256,
            ),
        ] {
            if found != own {
                return Err(TrainError::DatasetOfOther {
                    dataset: Box::new(self.of.clone()),
                    what,
                    own: own.into(),
                    whose,
                    found: found.into(),
                    options: options.into(),
                });
            }
        }
        let (vocabulary, needed) = (self.reading.rules.vocabulary, tokenizer.vocabulary());
        if vocabulary < needed as usize {
            let of = self.of;
            let rule = format!(
                "must have a vocabulary of at least {needed} tokens, which is that of data set {of}; it has {vocabulary}"
            );
            return Err(FieldError::new("train.base", base, rule).into());
        }
        Ok(())
    }

    /// The base model's.
    fn tokenizer(&self) -> Result<&'a Tokenizer, TrainError> {
        let tokenizer = self.reading.base.1.as_ref();
        tokenizer.map_err(|error| TrainError::Tokenizer(Arc::clone(error)))
    }

    /// The samples of one split.
    async fn samples(&self, split: Split) -> Result<Samples, TrainError> {
        let files = self.record.rows(split.as_str(), "parquet");
        let mut read = Samples::default();
        for (n, entry) in files.iter().enumerate() {
            (self.reading.tell)(&format!(
                "reading {}: file {} of {} of `{}`, {} samples in {} MiB so far",
                self.of,
                n + 1,
                files.len(),
                split.as_str(),
                read.len(),
                read.bytes() >> 20,
            ));
            let bytes = self.file(entry).await?;
            let file = File {
                of: self.of.clone(),
                name: file_name(entry).to_owned(),
                rules: self.reading.rules,
                tokenizer: self.tokenizer()?.clone(),
            };
            let add = move || file.add(bytes, &mut read).map(|()| read);
            read = blocking("train.dataset", add).await??;
        }
        let summary = &self.record.summary;
        let expected = match split {
            Split::Train => summary.train_rows,
            Split::Eval => summary.eval_rows,
        };
        if expected != read.len() as u64 {
            return Err(TrainError::DatasetRows {
                dataset: self.of.clone(),
                split: split.as_str(),
                expected,
                found: read.len() as u64,
            });
        }
        log(
            self.reading.key,
            &format!("{}, {}", self.of, split.as_str()),
            &read,
        );
        Ok(read)
    }
}

fn refused(of: &DatasetRef, source: DatasetsError) -> TrainError {
    TrainError::Dataset {
        dataset: of.clone(),
        source,
    }
}

/// A file of rows.
struct File {
    of: DatasetRef,
    name: String,
    rules: Rules,
    tokenizer: Tokenizer,
}

impl File {
    /// Adds its rows to `samples`. Blocks.
    fn add(&self, bytes: Bytes, samples: &mut Samples) -> Result<(), TrainError> {
        let failed = |source| TrainError::DatasetFile {
            dataset: self.of.clone(),
            source: Box::new(source),
        };
        let records = parquet_records(self.name.as_str(), bytes).map_err(failed)?;
        let mut rows = read_rows(self.name.as_str(), records);
        let mut first = 0;
        loop {
            let some: Result<Vec<Row>, _> = rows.by_ref().take(ROWS_AT_ONCE).collect();
            let some = some.map_err(failed)?;
            if some.is_empty() {
                return Ok(());
            }
            self.add_rows(first, &some, samples)?;
            first += some.len();
        }
    }

    /// Adds rows of which the first is the `first` of the file, from 0.
    fn add_rows(&self, first: usize, rows: &[Row], to: &mut Samples) -> Result<(), TrainError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // They are cut when they are added, as those of files of rows are.
        let made = samples(rows, usize::MAX, threads, &self.tokenizer);
        for (n, sample) in made.into_iter().enumerate() {
            let row = first + n;
            let place = format_args!("row {row} of `{}` of data set {}", self.name, self.of);
            let sample = sample.map_err(|source| TrainError::DatasetRow {
                place: place.to_string(),
                source,
            })?;
            let pair = |range: std::ops::Range<u32>| [range.start, range.end];
            let row = data::Row {
                id: name(sample.id, row),
                ids: sample.ids,
                supervised: sample.supervised.into_iter().map(pair).collect(),
            };
            to.push(row, self.rules, place)?;
        }
        Ok(())
    }
}

/// A row's id, which others may have chosen, as a name for messages.
fn name(id: String, row: usize) -> String {
    match id.len() {
        0 => format!("row {row}"),
        _ => id[..id.floor_char_boundary(NAME_BYTES_MAX)].to_owned(),
    }
}
