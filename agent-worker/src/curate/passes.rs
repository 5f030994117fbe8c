//! The two passes over the sources, each on a thread of its own: which conversations are in, and their rows as files.
//! What comes in and what goes out waits for room, so that memory is bounded.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::JobKey;
use espalier_core::trace::edits::Corrections;
use espalier_core::trace::edits::Judgement;
use espalier_core::trace::{FileEntry, Trace, sha256_hex};
use espalier_dataset::files::{FileError, Format, Records, jsonl_records, parquet_records};
use espalier_dataset::{
    BuildSpec, Builder, Chosen, Renderer, Source, Tally, import, json_records, samples,
};
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::traces::Loaded;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::error::CurateError;
use super::feed::Fed;
use super::shards::Shards;

/// Rows that become samples at once: enough for every core, few enough that long ones fit into memory.
const ROWS_AT_ONCE: usize = 64;
/// Models that a card names.
const MODELS_MAX: usize = 20;

/// What the first pass found.
pub(super) struct FirstPass {
    pub(super) chosen: Chosen,
    /// The sources of each item, by their numbers.
    pub(super) of_item: Vec<Range<usize>>,
}

impl FirstPass {
    /// Which items have a source that is in.
    pub(super) fn wanted(&self) -> Vec<bool> {
        let is_in = |numbers: &Range<usize>| {
            let mut numbers = numbers.clone();
            numbers.any(|n| self.chosen.split(n).is_some())
        };
        self.of_item.iter().map(is_in).collect()
    }
}

/// Looks at every source and decides which are in.
pub(super) fn choose(
    mut from: mpsc::Receiver<Fed>,
    spec: BuildSpec,
    tokenizer: &Tokenizer,
    stop: &CancellationToken,
) -> Result<FirstPass, CurateError> {
    let mut builder = Builder::new(spec, tokenizer)?;
    let (mut of_item, mut n) = (Vec::new(), 0);
    while let Some(fed) = from.blocking_recv() {
        let first = n;
        for (name, source) in sources(fed) {
            if stop.is_cancelled() {
                return Err(CurateError::Stopped);
            }
            match source {
                Ok(source) => builder.offer(&name, &source)?,
                Err(error) => builder.offer_unreadable(&name, &error)?,
            }
            n += 1;
        }
        of_item.push(first..n);
    }
    Ok(FirstPass {
        chosen: builder.choose(),
        of_item,
    })
}

/// What the second pass made, beside the files that it handed over.
pub(super) struct SecondPass {
    pub(super) chosen: Chosen,
    pub(super) tally: Tally,
    /// Who spoke in it.
    pub(super) models: BTreeSet<String>,
}

/// A file that is whole.
pub(super) struct Finished {
    pub(super) entry: FileEntry,
    pub(super) content: Bytes,
}

/// Writes the rows of everything that is in, and hands files over as they become full. `folder` is where they lie.
pub(super) fn write(
    mut from: mpsc::Receiver<Fed>,
    to: mpsc::Sender<Finished>,
    first: FirstPass,
    (max_length, folder): (usize, String),
    tokenizer: &Tokenizer,
    stop: &CancellationToken,
) -> Result<SecondPass, CurateError> {
    let mut writing = Writing {
        chosen: first.chosen,
        renderer: Renderer::new(tokenizer),
        tally: Tally::new(max_length),
        models: BTreeSet::new(),
        rows: Vec::new(),
        shards: Shards::new(folder, to),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
    };
    for mut numbers in first.of_item {
        let Some(fed) = from.blocking_recv() else {
            return Err(CurateError::Stopped);
        };
        let digest = digest(&fed);
        for ((_, source), n) in sources(fed).zip(numbers.by_ref()) {
            if stop.is_cancelled() {
                return Err(CurateError::Stopped);
            }
            if let Some((sha256, corrections)) = digest
                .as_ref()
                .filter(|_| writing.chosen.split(n).is_some())
            {
                let corrections = corrections.as_ref();
                writing.chosen.read_from(n, sha256, corrections);
            }
            writing.take(n, source)?;
        }
        // What is skipped has none that is in; another one lost what it had in the first pass.
        for n in numbers
            .filter(|n| writing.chosen.split(*n).is_some())
            .collect::<Vec<_>>()
        {
            writing
                .chosen
                .unreadable(n, "it was there when it was chosen, and is gone");
        }
    }
    writing.finish()
}

struct Writing {
    chosen: Chosen,
    renderer: Renderer,
    tally: Tally,
    models: BTreeSet<String>,
    /// Rows that wait for others, with the number of their source.
    rows: Vec<(usize, espalier_dataset::Row)>,
    shards: Shards,
    threads: usize,
}

impl Writing {
    fn take(&mut self, n: usize, source: Result<Source, String>) -> Result<(), CurateError> {
        if self.chosen.split(n).is_none() {
            return Ok(());
        }
        let source = match source {
            Ok(source) => source,
            Err(error) => {
                self.chosen.unreadable(n, &error);
                return Ok(());
            }
        };
        let rows = self.chosen.rows(n, &source, &mut self.renderer);
        self.rows.extend(rows.into_iter().map(|row| (n, row)));
        match self.rows.len() >= ROWS_AT_ONCE {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Writes the rows that wait. One that gives no sample is left out.
    fn flush(&mut self) -> Result<(), CurateError> {
        let (numbers, rows): (Vec<_>, Vec<_>) = std::mem::take(&mut self.rows).into_iter().unzip();
        let tokenizer = self.renderer.tokenizer();
        let made = samples(&rows, self.tally.max_length, self.threads, tokenizer);
        for ((n, row), sample) in numbers.into_iter().zip(&rows).zip(made) {
            match sample {
                Ok(sample) => {
                    self.tally.add(&sample, row.split);
                    if self.models.len() < MODELS_MAX && !row.model.is_empty() {
                        self.models.insert(row.model.clone());
                    }
                    self.shards.write(row)?;
                }
                Err(error) => {
                    self.chosen.leave_out(n, &error);
                    self.tally.left_out += 1;
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<SecondPass, CurateError> {
        self.flush()?;
        self.shards.finish()?;
        Ok(SecondPass {
            chosen: self.chosen,
            tally: self.tally,
            models: self.models,
        })
    }
}

/// SHA-256 of the object that conversations come out of, and the corrections of a trace; none where it cannot be read.
fn digest(fed: &Fed) -> Option<(String, Option<Corrections>)> {
    match fed {
        Fed::Trace(_, Ok(loaded)) => {
            let file = loaded.manifest.trace_file()?;
            Some((file.sha256.clone(), Corrections::of(&loaded.log)))
        }
        Fed::File(_, Ok(bytes)) => Some((sha256_hex(bytes), None)),
        Fed::Trace(_, Err(_)) | Fed::File(_, Err(_)) | Fed::Skipped => None,
    }
}

type Named = (String, Result<Source, String>);

/// The conversations of an item, with their names in the manifest.
fn sources(fed: Fed) -> Box<dyn Iterator<Item = Named>> {
    match fed {
        Fed::Skipped => Box::new(std::iter::empty()),
        Fed::Trace(job, loaded) => Box::new(of_trace(&job, loaded).into_iter()),
        Fed::File(name, file) => {
            let path = format!("uploads/{name}");
            match file.and_then(|bytes| records(&path, bytes).map_err(|error| error_chain(&error)))
            {
                Ok(records) => Box::new(of_records(path, records)),
                Err(error) => Box::new(std::iter::once((path, Err(error)))),
            }
        }
    }
}

/// The conversations of a trace, several where it was split, with the corrections that people made.
fn of_trace(job: &JobKey, loaded: Result<Box<Loaded>, String>) -> Vec<Named> {
    let loaded = match loaded {
        Ok(loaded) => loaded,
        Err(error) => return vec![(job.to_string(), Err(error))],
    };
    let standing = &loaded.curated.standing;
    let rejected = standing.dropped || standing.judgement == Some(Judgement::Rejected);
    let traces = loaded.curated.traces(&loaded.trace).into_iter().enumerate();
    let source = |(n, trace): (usize, Trace)| {
        let name = match n {
            0 => job.to_string(),
            n => format!("{job}#{}", n + 1),
        };
        let source = Source::of_trace(&trace).map(|mut source| {
            source.facts.rejected = rejected;
            source.keep_hints = standing.hints;
            source
        });
        (name, source.map_err(|error| error_chain(&error)))
    };
    traces.map(source).collect()
}

fn records(path: &str, bytes: Bytes) -> Result<Records, FileError> {
    match Format::of(path) {
        Some(Format::Parquet) => parquet_records(path, bytes),
        Some(Format::Jsonl) => Ok(jsonl_records(path, std::io::Cursor::new(bytes))),
        Some(Format::Json) => json_records(path, &bytes),
        None => {
            let rule = "must end with .jsonl, .json or .parquet";
            Err(FileError::Row {
                file: path.to_owned(),
                row: 0,
                source: FieldError::new("file", path, rule),
            })
        }
    }
}

/// Each record under its file and number. After one that ends the file nothing comes.
fn of_records(path: String, records: Records) -> impl Iterator<Item = Named> {
    let mut is_over = false;
    let mut numbered = import(path.clone(), records).enumerate();
    std::iter::from_fn(move || {
        if is_over {
            return None;
        }
        let (row, source) = numbered.next()?;
        let source = source.map_err(|error| {
            is_over = !error.goes_on();
            error_chain(&error)
        });
        Some((format!("{path}#{row}"), source))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_record_is_one_source_and_the_next_ones_are_read() {
        let line =
            r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}"#;
        let file = format!("{line}\n{{\"messages\":7}}\nnot JSON\n{line}\n");
        let name = espalier_core::layout::UploadName::new("a/b.jsonl").unwrap();
        let found: Vec<(String, bool)> = sources(Fed::File(name.clone(), Ok(file.into())))
            .map(|(name, source)| (name, source.is_ok()))
            .collect();
        let expected = [(0, true), (1, false), (2, false), (3, true)];
        assert_eq!(
            found,
            expected.map(|(n, ok)| (format!("uploads/a/b.jsonl#{n}"), ok))
        );
        let gone: Vec<Named> = sources(Fed::File(name, Err("it is gone".into()))).collect();
        assert_eq!(
            gone,
            [("uploads/a/b.jsonl".to_owned(), Err("it is gone".to_owned()))]
        );
    }

    #[test]
    fn a_file_that_is_no_parquet_is_one_unreadable_source() {
        let name = espalier_core::layout::UploadName::new("a.parquet").unwrap();
        let found: Vec<Named> = sources(Fed::File(name, Ok("PAR1".into()))).collect();
        let [(name, Err(error))] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(name, "uploads/a.parquet");
        assert!(error.contains("cannot be read at row 0"), "{error}");
    }
}
