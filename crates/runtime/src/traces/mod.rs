//! Published traces: listing, reading with proof of wholeness, correcting, and writing ones that came from elsewhere.
//!
//! A trace is visible once its manifest is; of what an attempt left without one only its [`steps`](Traces::steps) can be
//! read, by whoever asks for them. Corrections are patches beside the manifest, a log whose meaning
//! `espalier_core::trace::edits` holds. The worker that records a trace publishes it itself: nothing here knows of
//! leases. Read by the command line and by whatever makes data sets.

mod log;
mod steps;
pub mod workshop;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, Fence, JobKey, ProjectId};
use espalier_core::layout;
use espalier_core::time::Timestamp;
use espalier_core::trace::edits::{Curated, Patch, Standing, apply};
use espalier_core::trace::{self, FileEntry, Header, Manifest, SCHEMA_VERSION, Trace, TraceError};

use crate::publish::OfStore;
use crate::store::{Created, LIST_MAX, Store, StoreError};
use crate::tasks::{BlockingFailed, blocking};

pub use steps::{Steps, read_steps};

/// Largest trace as text, in bytes: a zstd frame of a few kilobytes can claim to hold terabytes.
pub const TRACE_BYTES_MAX: u64 = 512 << 20;
/// Most traces that one listing holds in memory, at a few hundred bytes each.
pub const LISTED_MAX: usize = 1_000_000;
/// The level at which traces are packed: above it, zstd gains little on JSON and takes much longer.
const ZSTD_LEVEL: i32 = 3;
/// Tries to find a free number for a patch or a file, while others add theirs to the same job.
const NUMBER_TRIES_MAX: u32 = 16;

/// Why a trace could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The store failed.
    #[error("the trace's objects cannot be reached")]
    Store(#[from] StoreError),
    /// Nothing is published under the job's name.
    #[error("no trace of `{0}` is published")]
    NotPublished(JobKey),
    /// The manifest is not one.
    #[error("the manifest of `{job}` is refused")]
    Manifest {
        /// The job.
        job: JobKey,
        /// Which field, and why.
        source: FieldError,
    },
    /// A file is not the one that the manifest names.
    #[error("`{path}` must have the size and sha256 of its manifest, got {bytes} other bytes")]
    Altered {
        /// The file.
        path: String,
        /// Its size.
        bytes: usize,
    },
    /// The file cannot be unpacked, or unpacks to too much.
    #[error("`{path}` {rule}")]
    Packed {
        /// The file.
        path: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// The text is not a trace of this schema.
    #[error("the trace of `{job}` cannot be read")]
    Trace {
        /// The job.
        job: JobKey,
        /// Why.
        source: TraceError,
    },
    /// A correction cannot be read.
    #[error("`{path}` is not a correction: {reason}")]
    Patch {
        /// The object.
        path: String,
        /// What the parser said.
        reason: String,
    },
    /// More than a listing holds.
    #[error("a listing must hold at most {LISTED_MAX} traces, and there are more: name a batch")]
    TooMany,
    /// A correction does not fit the trace as it is now.
    #[error("the correction of `{job}` is refused")]
    Refused {
        /// The job.
        job: JobKey,
        /// Which field, and why.
        source: FieldError,
    },
    /// Somebody else took every number that was tried.
    #[error("no free number for an object of `{0}` was found in {NUMBER_TRIES_MAX} tries")]
    Contended(JobKey),
    /// Packing failed.
    #[error("packing failed")]
    Work(#[from] BlockingFailed),
}

impl OfStore for TracesError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            _ => None,
        }
    }
}

/// A published trace, as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The job that made it.
    pub job: JobKey,
    /// How many corrections it has.
    pub patches: u32,
}

/// The manifest of a trace with its corrections.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// As it was published, its summary corrected.
    pub manifest: Manifest,
    /// What the corrections say of it as a whole.
    pub standing: Standing,
    /// The corrections, in order.
    pub log: Vec<Patch>,
}

/// A trace with its corrections.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What proves it, its summary corrected.
    pub manifest: Manifest,
    /// The trace as it was published.
    pub trace: Trace,
    /// The corrections, in order.
    pub log: Vec<Patch>,
    /// What the trace and its corrections come to.
    pub curated: Curated,
}

/// The traces of one project.
#[derive(Clone, Debug)]
pub struct Traces {
    store: Store,
    project: ProjectId,
}

impl Traces {
    /// The traces of `project` in `store`.
    pub fn new(store: Store, project: ProjectId) -> Self {
        Self { store, project }
    }

    /// The project.
    pub fn project(&self) -> &ProjectId {
        &self.project
    }

    /// The jobs of `batch` with a published result, of the whole project, ordered by batch and job. Walks the store.
    /// Which of them are rollouts only their [manifests](Self::summary) tell.
    pub async fn list(&self, batch: Option<&BatchId>) -> Result<Vec<Listed>, TracesError> {
        let prefix = match batch {
            Some(batch) => layout::batch(&self.project, batch),
            None => layout::batches(&self.project),
        };
        let prefix = prefix.trim_end_matches('/');
        let mut found: BTreeMap<JobKey, (bool, u32)> = BTreeMap::new();
        let mut after: Option<String> = None;
        loop {
            let page = self.store.list(prefix, after.as_deref(), LIST_MAX).await?;
            for object in &page {
                note(&mut found, &object.path);
            }
            if found.len() > LISTED_MAX {
                return Err(TracesError::TooMany);
            }
            match page.last() {
                Some(last) if page.len() == LIST_MAX => after = Some(last.path.clone()),
                _ => break,
            }
        }
        let published = found.into_iter().filter(|(_, (published, _))| *published);
        Ok(published
            .map(|(job, (_, patches))| Listed { job, patches })
            .collect())
    }

    /// The steps of one attempt, as far as they reached the store.
    pub async fn steps(&self, job: &JobKey, fence: Fence) -> Result<Steps, TracesError> {
        read_steps(&self.store, job, fence).await
    }

    /// The fences of the attempts at `job` that left anything in the store, as far as one listing tells.
    pub async fn attempts(&self, job: &JobKey) -> Result<BTreeSet<Fence>, TracesError> {
        let prefix = layout::job(job);
        let prefix = prefix.trim_end_matches('/');
        let objects = self.store.list(prefix, None, LIST_MAX).await?;
        let owners = objects
            .iter()
            .filter_map(|object| layout::attempt_of(&object.path));
        Ok(owners.map(|(_, fence)| fence).collect())
    }

    /// What tables show of a trace, without reading the trace.
    pub async fn summary(&self, listed: &Listed) -> Result<Summary, TracesError> {
        let mut manifest = self.manifest(&listed.job).await?;
        let log = self.log(listed).await?;
        let standing = Standing::of(&log);
        if let trace::Summary::Rollout(summary) = &mut manifest.summary {
            standing.correct(summary);
        }
        Ok(Summary {
            manifest,
            standing,
            log,
        })
    }

    /// Reads a trace: whole, unaltered, of a schema that this build knows, and with its corrections.
    pub async fn load(&self, listed: &Listed) -> Result<Loaded, TracesError> {
        let Summary { manifest, log, .. } = self.summary(listed).await?;
        let job = &listed.job;
        let missing = || TracesError::NotPublished(job.clone());
        let file = manifest.trace_file().ok_or_else(missing)?.clone();
        let bytes = self.store.get(&file.path).await?;
        let owner = job.clone();
        let reading = blocking("traces.unpack", move || {
            let trace = read_trace(&owner, &file, &bytes)?;
            let curated = apply(&trace, &log);
            Ok::<_, TracesError>((trace, log, curated))
        });
        let (trace, log, curated) = reading.await??;
        Ok(Loaded {
            manifest,
            trace,
            log,
            curated,
        })
    }

    /// Publishes a trace that no attempt of ours made: its file first, its manifest last. [`Created::Exists`] where
    /// the job has one already, which stays as it is, also where several publish at once.
    pub async fn publish(
        &self,
        trace: Trace,
        parents: Vec<String>,
        now: Timestamp,
    ) -> Result<Created, TracesError> {
        let manifest_path = layout::manifest(&trace.header.job);
        // Spares a repeated import its files; what decides is the creation of the manifest below.
        if self.is_there(&manifest_path).await? {
            return Ok(Created::Exists);
        }
        let (trace, file) = self.create_file(trace).await?;
        let summary = trace.summary().into();
        let Header {
            job,
            attempt,
            fence,
            ..
        } = trace.header;
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            attempt,
            fence,
            // No job asked for it, so that none may take it for its own result.
            spec_sha256: None,
            created_at_us: now,
            files: vec![file],
            parents,
            summary,
            job,
        };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| TracesError::Packed {
            path: manifest_path.clone(),
            rule: format!("cannot be written: {error}"),
        })?;
        Ok(self.store.create(&manifest_path, text.into()).await?)
    }

    /// Writes the file of a trace under its fence. A file of somebody else stays as it is, since a manifest may name
    /// it at any moment; the trace then gets the next fence that is free.
    async fn create_file(&self, mut trace: Trace) -> Result<(Trace, FileEntry), TracesError> {
        for _ in 0..NUMBER_TRIES_MAX {
            let path = layout::trace(&trace.header.job, trace.header.fence);
            let at = path.clone();
            let packing = blocking("traces.pack", move || (pack(&at, &trace), trace));
            let (packed, back) = packing.await?;
            trace = back;
            let bytes = packed?;
            let file = FileEntry::of(path.as_str(), &bytes);
            if self.store.create(&path, bytes.into()).await? == Created::New
                || file.holds(&self.store.get(&path).await?)
            {
                return Ok((trace, file));
            }
            trace.header.fence = Fence(trace.header.fence.0 + 1);
        }
        Err(TracesError::Contended(trace.header.job))
    }

    async fn is_there(&self, path: &str) -> Result<bool, TracesError> {
        match self.store.head(path).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn manifest(&self, job: &JobKey) -> Result<Manifest, TracesError> {
        let bytes = match self.store.get(&layout::manifest(job)).await {
            Err(error) if error.is_not_found() => {
                return Err(TracesError::NotPublished(job.clone()));
            }
            other => other?,
        };
        Manifest::parse(&bytes, job).map_err(|source| TracesError::Manifest {
            job: job.clone(),
            source,
        })
    }
}

/// Takes note of what an object says of its job.
fn note(found: &mut BTreeMap<JobKey, (bool, u32)>, path: &str) {
    if let Ok(job) = layout::job_of_manifest(path) {
        found.entry(job).or_default().0 = true;
    } else if let Some((job, n)) = layout::job_of_patch(path) {
        let patches = &mut found.entry(job).or_default().1;
        *patches = (*patches).max(n.saturating_add(1));
    }
}

fn read_trace(job: &JobKey, file: &FileEntry, bytes: &[u8]) -> Result<Trace, TracesError> {
    if !file.holds(bytes) {
        return Err(TracesError::Altered {
            path: file.path.clone(),
            bytes: bytes.len(),
        });
    }
    let text = unpack(&file.path, bytes)?;
    Trace::from_json(&text).map_err(|source| TracesError::Trace {
        job: job.clone(),
        source,
    })
}

fn pack(path: &str, trace: &Trace) -> Result<Vec<u8>, TracesError> {
    let fail = |reason: String| TracesError::Packed {
        path: path.to_owned(),
        rule: format!("cannot be packed: {reason}"),
    };
    let text = serde_json::to_vec(trace).map_err(|error| fail(error.to_string()))?;
    compress(&text).map_err(|error| fail(error.to_string()))
}

/// The text of a trace or of its steps, packed as all of them are. Takes milliseconds: keep it off async threads.
///
/// # Errors
/// zstd has no memory for it.
pub fn compress(text: &[u8]) -> std::io::Result<Vec<u8>> {
    zstd::encode_all(text, ZSTD_LEVEL)
}

fn unpack(path: &str, bytes: &[u8]) -> Result<Vec<u8>, TracesError> {
    let fail = |rule: String| TracesError::Packed {
        path: path.to_owned(),
        rule,
    };
    let mut text = Vec::new();
    zstd::Decoder::new(bytes)
        .and_then(|decoder| decoder.take(TRACE_BYTES_MAX + 1).read_to_end(&mut text))
        .map_err(|error| fail(format!("must be a zstd frame: {error}")))?;
    if text.len() as u64 > TRACE_BYTES_MAX {
        return Err(fail(format!(
            "must unpack to at most {TRACE_BYTES_MAX} bytes"
        )));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
