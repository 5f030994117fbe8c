//! A file of jobs, JSONL or TOML, as chunks that are ready to send. What breaks a rule of form is refused with its
//! place in the file, and the rest goes on; the rules of fields are the coordinator's.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use espalier_core::error::FieldError;
use espalier_core::spec::{JobDraft, limits, parse_line};
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use prost::Message;
use serde_json::Value;

use super::lines::{self, Line};
use super::suggest;
use super::vars::{self, Vars};

/// Most jobs of a chunk: the API's limit.
pub const CHUNK_JOBS_MAX: usize = 2_000;
/// Most bytes of a chunk's jobs: the API's limit, with room for what is around them.
pub const CHUNK_BYTES_MAX: usize = 7 << 20;
/// Longest line that is read, in bytes: the largest spec, with room for JSON's escapes.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Largest TOML file, in bytes: it is read whole. Large batches are JSONL.
const TOML_BYTES_MAX: u64 = 64 << 20;

/// What the command line adds to each job.
#[derive(Clone, Debug, Default)]
pub struct Additions {
    /// What `${name}` stands for.
    pub vars: Vars,
    /// Samples of each task; none: jobs stay as they are.
    pub samples: Option<u32>,
    /// Labels on top of the jobs' own.
    pub labels: BTreeMap<String, String>,
}

/// A job that was refused before it was sent, or by the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Line of a JSONL file, or number of the `[[jobs]]` entry, from 1.
    pub place: u64,
    /// The job's id, where it is known.
    pub id: String,
    /// What is wrong.
    pub error: FieldError,
}

/// Jobs that are sent together, each with its place in the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// Its number, from 0. The same file with the same options gives the same chunks.
    pub number: u32,
    /// The jobs.
    pub jobs: Vec<v1::JobSpec>,
    /// For each job, its place.
    pub places: Vec<u64>,
}

/// What comes out of a file, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Jobs to send.
    Chunk(Chunk),
    /// A job that is not sent.
    Refused(Refusal),
    /// Bytes of the file that have been read so far.
    Progress(u64),
}

/// Where jobs come from.
enum Source {
    Jsonl(Box<BufReader<File>>),
    Toml(std::vec::IntoIter<Value>),
}

/// A file of jobs.
pub struct JobFile {
    source: Source,
    /// What the jobs have in common.
    pub defaults: JobDraft,
    /// Size of the file.
    pub bytes: u64,
    place: u64,
    read: u64,
    additions: Additions,
    seen: HashMap<String, u64>,
    pending: Chunk,
    pending_bytes: usize,
    next_number: u32,
}

impl JobFile {
    /// Opens a file; `.toml` has `[defaults]` and `[[jobs]]`, every other name is one JSON object a line.
    ///
    /// # Errors
    /// Says why the file as a whole cannot be read.
    pub fn open(path: &Path, additions: Additions) -> Result<Self, FieldError> {
        let fail = |rule: String| FieldError::new("file", path.display(), rule);
        let cannot = |error: io::Error| fail(format!("cannot be read: {error}"));
        let file = File::open(path).map_err(cannot)?;
        let bytes = file.metadata().map_err(cannot)?.len();
        let is_toml = path.extension().is_some_and(|ext| ext == "toml");
        let mut defaults = JobDraft::default();
        let source = if is_toml {
            let mut text = String::new();
            file.take(TOML_BYTES_MAX + 1)
                .read_to_string(&mut text)
                .map_err(cannot)?;
            if text.len() as u64 > TOML_BYTES_MAX {
                let rule = format!(
                    "must have at most {TOML_BYTES_MAX} bytes; use JSONL for large batches"
                );
                return Err(fail(rule));
            }
            let (found, jobs) = read_toml(&text, &additions.vars)?;
            defaults = found;
            Source::Toml(jobs.into_iter())
        } else {
            Source::Jsonl(Box::new(BufReader::with_capacity(1 << 16, file)))
        };
        Ok(Self {
            source,
            defaults,
            bytes,
            place: 0,
            read: 0,
            additions,
            seen: HashMap::new(),
            pending: Chunk::default(),
            pending_bytes: 0,
            next_number: 0,
        })
    }

    /// Hands everything to `sink`, which says whether to go on. Blocking.
    pub fn read_all(mut self, mut sink: impl FnMut(Piece) -> bool) -> io::Result<()> {
        while let Some(found) = self.next_value()? {
            let jobs = found.and_then(|value| self.prepare(value));
            let go_on = match jobs {
                Ok(jobs) => jobs.into_iter().all(|job| self.add(job, &mut sink)),
                Err((id, error)) => sink(Piece::Refused(Refusal {
                    place: self.place,
                    id,
                    error: suggest::improve(error),
                })),
            };
            if !go_on {
                return Ok(());
            }
        }
        self.flush(&mut sink);
        Ok(())
    }

    /// The next entry as JSON; empty lines are passed over.
    fn next_value(&mut self) -> io::Result<Option<Result<Value, (String, FieldError)>>> {
        loop {
            let line = match &mut self.source {
                Source::Toml(jobs) => {
                    self.place += 1;
                    return Ok(jobs.next().map(Ok));
                }
                Source::Jsonl(reader) => lines::next(reader, LINE_BYTES_MAX)?,
            };
            let Some(line) = line else { return Ok(None) };
            self.place += 1;
            match line {
                Line::Bytes(bytes) => {
                    self.read += bytes.len() as u64 + 1;
                    if !bytes.iter().all(u8::is_ascii_whitespace) {
                        return Ok(Some(parse_json(&bytes).map_err(|e| (String::new(), e))));
                    }
                }
                Line::TooLong(size, start) => {
                    self.read += size + 1;
                    let rule = format!("must have at most {LINE_BYTES_MAX} bytes, has {size}");
                    let error = FieldError::new("line", String::from_utf8_lossy(&start), rule);
                    return Ok(Some(Err((String::new(), error))));
                }
            }
        }
    }

    /// The jobs that one entry stands for.
    fn prepare(&mut self, mut value: Value) -> Result<Vec<v1::JobSpec>, (String, FieldError)> {
        let id = value
            .get("id")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        let fail = |error| (id.clone(), error);
        vars::replace(&mut value, &self.additions.vars).map_err(fail)?;
        let mut draft = parse_line(value.to_string().as_bytes()).map_err(fail)?;
        draft.labels.extend(self.additions.labels.clone());
        let drafts = match self.additions.samples {
            None => vec![draft],
            Some(samples) => sample(&draft, samples, self.place),
        };
        let mut specs = Vec::with_capacity(drafts.len());
        for draft in &drafts {
            let spec = draft_to_wire(draft);
            self.check_id(&spec).map_err(fail)?;
            check_size(&spec).map_err(fail)?;
            specs.push(spec);
        }
        Ok(specs)
    }

    /// Two jobs with one id in one file are a mistake, even where sending one twice would be harmless.
    fn check_id(&mut self, spec: &v1::JobSpec) -> Result<(), FieldError> {
        let Some(id) = &spec.id else { return Ok(()) };
        match self.seen.insert(id.clone(), self.place) {
            None => Ok(()),
            Some(first) => {
                self.seen.insert(id.clone(), first);
                let rule = format!("must be unique in the file, and entry {first} has it too");
                Err(FieldError::new("id", id, rule))
            }
        }
    }

    /// Puts a job into the pending chunk; sends that one first where the job does not fit.
    fn add(&mut self, job: v1::JobSpec, sink: &mut impl FnMut(Piece) -> bool) -> bool {
        let bytes = job.encoded_len() + 8;
        let full = self.pending.jobs.len() >= CHUNK_JOBS_MAX
            || self.pending_bytes + bytes > CHUNK_BYTES_MAX;
        if full && !self.flush(sink) {
            return false;
        }
        self.pending_bytes += bytes;
        self.pending.jobs.push(job);
        self.pending.places.push(self.place);
        true
    }

    fn flush(&mut self, sink: &mut impl FnMut(Piece) -> bool) -> bool {
        let mut chunk = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        if !chunk.jobs.is_empty() {
            chunk.number = self.next_number;
            self.next_number += 1;
            if !sink(Piece::Chunk(chunk)) {
                return false;
            }
        }
        sink(Piece::Progress(self.read))
    }
}

fn parse_json(line: &[u8]) -> Result<Value, FieldError> {
    let text = std::str::from_utf8(line).map_err(|error| {
        let rule = format!("must be UTF-8: {error}");
        FieldError::new("line", String::from_utf8_lossy(line), rule)
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(Value::Object(object)),
        Ok(_) => Err(FieldError::new("line", text, "must be a JSON object")),
        Err(error) => Err(FieldError::new(
            "line",
            text,
            format!("must be a JSON object: {error}"),
        )),
    }
}

/// The defaults and the jobs of a TOML file, the jobs not yet checked, so that one bad job does not refuse the file.
fn read_toml(text: &str, vars: &Vars) -> Result<(JobDraft, Vec<Value>), FieldError> {
    let table: toml::Table = toml::from_str(text).map_err(|error| {
        FieldError::new(
            "file",
            "",
            format!("must be TOML: {}", error.to_string().trim()),
        )
    })?;
    let (mut defaults, mut jobs) = (JobDraft::default(), Vec::new());
    for (key, value) in table {
        let mut value = serde_json::to_value(value).map_err(|error| {
            FieldError::new(key.as_str(), "", format!("must be plain values: {error}"))
        })?;
        match (key.as_str(), value) {
            ("defaults", found) => {
                value = found;
                vars::replace(&mut value, vars).map_err(|e| e.under("defaults"))?;
                defaults = parse_line(value.to_string().as_bytes())
                    .map_err(|error| suggest::improve(error).under("defaults"))?;
            }
            ("jobs", Value::Array(found)) => jobs = found,
            (other, found) => {
                return Err(FieldError::new(
                    other,
                    found,
                    "must be a `[defaults]` table or `[[jobs]]` entries",
                ));
            }
        }
    }
    Ok((defaults, jobs))
}

/// `samples` rollouts of one task: same group, counted, ids that end in `.s{i}`.
fn sample(draft: &JobDraft, samples: u32, place: u64) -> Vec<JobDraft> {
    let group = draft
        .group
        .clone()
        .or_else(|| draft.task_id.clone())
        .or_else(|| draft.id.clone());
    let group = group.unwrap_or_else(|| format!("entry-{place:06}"));
    let one = |i: u32| JobDraft {
        id: draft.id.as_ref().map(|id| format!("{id}.s{i}")),
        group: Some(group.clone()),
        sample_index: Some(i.into()),
        ..draft.clone()
    };
    (0..samples).map(one).collect()
}

fn check_size(spec: &v1::JobSpec) -> Result<(), FieldError> {
    let bytes = spec.encoded_len();
    if bytes <= limits::SPEC_BYTES_MAX {
        return Ok(());
    }
    let rule = format!(
        "must have at most {} bytes as a spec",
        limits::SPEC_BYTES_MAX
    );
    Err(FieldError::new("job", format!("{bytes} bytes"), rule))
}

#[cfg(test)]
mod tests;
