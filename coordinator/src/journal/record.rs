//! What the entries of the journal hold, as protobuf with a version in each: what the queue was asked, after the door
//! had judged it, so that a job is not judged again by rules that have changed.
//!
//! A field that a later version adds is ignored here; one that changes what the others mean raises [`VERSION`].

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::queue::{ItemResult, JobKind, NewBatch, NewJob};
use espalier_core::time::Timestamp;
use prost::Message;

use crate::queue::{Chunk, OpenBatch, Submission};

/// The version of chunks that this code writes.
const VERSION: u32 = 2;
/// That of batches that were opened.
const OPEN_VERSION: u32 = 1;

/// An entry that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an entry of the journal cannot be read: {0}")]
pub struct Unreadable(String);

impl Unreadable {
    /// Work on it failed.
    pub fn because(error: &dyn std::error::Error) -> Self {
        Self(error.to_string())
    }
}

#[derive(Clone, PartialEq, Message)]
struct OpenRow {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// When the queue opened it, which says in which order batches were opened.
    #[prost(uint64, tag = "2")]
    opened_us: u64,
    #[prost(bytes = "bytes", tag = "3")]
    params_digest: Bytes,
    #[prost(bytes = "bytes", tag = "4")]
    defaults: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct ChunksRow {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(message, repeated, tag = "2")]
    chunks: Vec<ChunkRow>,
}

#[derive(Clone, PartialEq, Message)]
struct ChunkRow {
    #[prost(uint32, tag = "1")]
    n: u32,
    #[prost(bytes = "bytes", tag = "2")]
    digest: Bytes,
    #[prost(message, repeated, tag = "3")]
    jobs: Vec<JobRow>,
}

#[derive(Clone, PartialEq, Message)]
struct JobRow {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    kind: String,
    #[prost(uint32, tag = "3")]
    priority: u32,
    #[prost(string, repeated, tag = "4")]
    needs: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    deps: Vec<String>,
    #[prost(uint64, optional, tag = "6")]
    not_before_us: Option<u64>,
    #[prost(uint32, tag = "7")]
    max_attempts: u32,
    #[prost(uint32, tag = "8")]
    max_infra: u32,
    #[prost(uint64, optional, tag = "9")]
    max_runtime_us: Option<u64>,
    #[prost(btree_map = "string, string", tag = "10")]
    labels: std::collections::BTreeMap<String, String>,
    #[prost(bytes = "bytes", tag = "11")]
    spec_digest: Bytes,
    #[prost(string, optional, tag = "12")]
    traceparent: Option<String>,
    #[prost(bytes = "bytes", tag = "13")]
    spec: Bytes,
}

/// The bytes of a batch that was opened.
pub fn encode_open(request: &OpenBatch, opened_at: Timestamp) -> Bytes {
    let row = OpenRow {
        version: OPEN_VERSION,
        opened_us: opened_at.0,
        params_digest: Bytes::copy_from_slice(&request.batch.params_digest),
        defaults: request.defaults.clone(),
    };
    row.encode_to_vec().into()
}

/// Reads them back.
pub fn decode_open(
    project: &ProjectId,
    batch: &BatchId,
    bytes: Bytes,
) -> Result<(OpenBatch, Timestamp), Unreadable> {
    let row = OpenRow::decode(bytes).map_err(unreadable)?;
    check_version(row.version, OPEN_VERSION)?;
    let batch = NewBatch {
        project: project.clone(),
        batch: batch.clone(),
        params_digest: digest(&row.params_digest)?,
    };
    let defaults = row.defaults;
    Ok((OpenBatch { batch, defaults }, Timestamp(row.opened_us)))
}

/// The bytes of a chunk. Those of several chunks, one after the other, are the bytes of all of them: so protobuf reads
/// a message that comes in parts.
pub fn encode_chunk(chunk: &Chunk) -> Bytes {
    let row = ChunkRow {
        n: chunk.n,
        digest: Bytes::copy_from_slice(&chunk.digest),
        jobs: chunk.jobs.iter().map(job_row).collect(),
    };
    encode_rows(vec![row])
}

fn encode_rows(chunks: Vec<ChunkRow>) -> Bytes {
    let version = VERSION;
    ChunksRow { version, chunks }.encode_to_vec().into()
}

/// Chunks by number, each as far as it can be used.
pub type Chunks = Vec<(u32, Result<Chunk, Unreadable>)>;

/// Reads chunks back, in the order of their numbers. One that cannot be used says so, and takes no other with it.
pub fn decode_chunks(
    project: &ProjectId,
    batch: &BatchId,
    bytes: Bytes,
) -> Result<Chunks, Unreadable> {
    let rows = decode_rows(bytes)?.into_iter();
    let read = rows.map(|(n, row)| (n, chunk(project, batch, row)));
    Ok(read.collect())
}

fn chunk(project: &ProjectId, batch: &BatchId, row: ChunkRow) -> Result<Chunk, Unreadable> {
    let jobs = row.jobs.into_iter().map(submission);
    Ok(Chunk {
        project: project.clone(),
        batch: batch.clone(),
        n: row.n,
        digest: digest(&row.digest)?,
        jobs: jobs.collect::<Result<_, _>>()?,
    })
}

/// By number. Of one that is there more than once, the later ones were taken later.
fn decode_rows(bytes: Bytes) -> Result<BTreeMap<u32, ChunkRow>, Unreadable> {
    let read = ChunksRow::decode(bytes).map_err(unreadable)?;
    check_version(read.version, VERSION)?;
    let mut rows: BTreeMap<u32, ChunkRow> = BTreeMap::new();
    for newer in read.chunks {
        match rows.get_mut(&newer.n) {
            Some(row) => merge(row, newer),
            None => {
                rows.insert(newer.n, newer);
            }
        }
    }
    Ok(rows)
}

/// The bytes of a chunk without the jobs that the queue did not take, by what it said of each; none where it took none.
pub fn taken(bytes: Bytes, items: &[ItemResult]) -> Result<Option<Bytes>, Unreadable> {
    let mut read = ChunksRow::decode(bytes).map_err(unreadable)?;
    let mut items = items.iter();
    for chunk in &mut read.chunks {
        let mut is_taken = |_: &JobRow| !matches!(items.next(), Some(ItemResult::Rejected(_)));
        chunk.jobs.retain(&mut is_taken);
    }
    let is_empty = read.chunks.iter().all(|chunk| chunk.jobs.is_empty());
    Ok((!is_empty).then(|| encode_rows(read.chunks)))
}

/// What is kept of chunks together with what the queue took when they came again; none where that adds nothing. What
/// this version cannot read gives way to the newer.
pub fn merged(kept: Bytes, newer: Bytes) -> Result<Option<Bytes>, Unreadable> {
    let Ok(rows) = decode_rows(kept.clone()) else {
        return Ok(Some(newer));
    };
    let both = decode_rows([kept, newer].concat().into())?;
    Ok((both != rows).then(|| encode_rows(both.into_values().collect())))
}

/// Adds to a chunk what the queue took of it later. Of two jobs with one id the newer is in the queue; another chunk
/// gives way to the newer.
fn merge(row: &mut ChunkRow, newer: ChunkRow) {
    if row.digest != newer.digest {
        *row = newer;
        return;
    }
    let ids = row.jobs.iter().enumerate();
    let places: HashMap<String, usize> = ids.map(|(n, job)| (job.id.clone(), n)).collect();
    for job in newer.jobs {
        match places.get(&job.id) {
            // The very job: how it was asked for at first stays.
            Some(n) if row.jobs[*n].spec_digest == job.spec_digest => {}
            Some(n) => row.jobs[*n] = job,
            None => row.jobs.push(job),
        }
    }
}

/// The digest of each chunk as it was sent, by number.
pub fn digests(bytes: Bytes) -> Result<BTreeMap<u32, [u8; 32]>, Unreadable> {
    let rows = decode_rows(bytes)?.into_iter();
    rows.map(|(n, row)| Ok((n, digest(&row.digest)?))).collect()
}

fn job_row(submission: &Submission) -> JobRow {
    let job = &submission.job;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    JobRow {
        id: job.id.to_string(),
        kind: job.kind.as_str().to_owned(),
        priority: job.priority.into(),
        needs: job.needs.iter().cloned().collect(),
        deps: job.deps.iter().map(JobKey::to_string).collect(),
        not_before_us: job.not_before.map(|at| at.0),
        max_attempts: job.max_attempts.into(),
        max_infra: job.max_infra.into(),
        max_runtime_us: job.max_runtime.map(micros),
        labels: job.labels.clone(),
        spec_digest: Bytes::copy_from_slice(&job.spec_digest),
        traceparent: job.traceparent.clone(),
        spec: submission.spec.clone(),
    }
}

fn submission(row: JobRow) -> Result<Submission, Unreadable> {
    let kind = JobKind::ALL
        .into_iter()
        .find(|kind| kind.as_str() == row.kind);
    let deps = row.deps.iter().map(|dep| dep.parse::<JobKey>());
    let job = NewJob {
        id: JobId::new(&row.id).map_err(unreadable)?,
        kind: kind.ok_or_else(|| unreadable(format!("a job of kind `{}`", row.kind)))?,
        priority: row.priority.try_into().map_err(unreadable)?,
        needs: row.needs.into_iter().collect(),
        deps: deps.collect::<Result<_, _>>().map_err(unreadable)?,
        not_before: row.not_before_us.map(Timestamp),
        max_attempts: row.max_attempts.try_into().map_err(unreadable)?,
        max_infra: row.max_infra.try_into().map_err(unreadable)?,
        max_runtime: row.max_runtime_us.map(Duration::from_micros),
        labels: row.labels,
        spec_digest: digest(&row.spec_digest)?,
        traceparent: row.traceparent,
    };
    let spec = row.spec;
    Ok(Submission { job, spec })
}

fn check_version(version: u32, known: u32) -> Result<(), Unreadable> {
    if version == known {
        return Ok(());
    }
    Err(unreadable(format!(
        "it has version {version}; this program reads {known}"
    )))
}

fn digest(bytes: &[u8]) -> Result<[u8; 32], Unreadable> {
    let wrong = |_| unreadable(format!("a digest of {} bytes", bytes.len()));
    bytes.try_into().map_err(wrong)
}

fn unreadable(reason: impl ToString) -> Unreadable {
    Unreadable(reason.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::error::FieldError;

    fn full() -> Submission {
        let mut job = NewJob::new("a".parse().unwrap(), JobKind::Rollout, [7; 32]);
        job.priority = 9;
        job.needs = ["gpu".to_owned(), "mcp:browser".to_owned()].into();
        job.deps = vec!["p/b/root".parse().unwrap()];
        job.not_before = Some(Timestamp(1_700_000_000_000_000));
        job.max_attempts = 5;
        job.max_infra = 6;
        job.max_runtime = Some(Duration::from_secs(600));
        job.labels = [("split".to_owned(), "train".to_owned())].into();
        job.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
        let spec = Bytes::from_static(b"\x00spec");
        Submission { job, spec }
    }

    fn chunk() -> Chunk {
        let plain = NewJob::new("root".parse().unwrap(), JobKind::Rollout, [1; 32]);
        let spec = Bytes::new();
        Chunk {
            project: "p".parse().unwrap(),
            batch: "b".parse().unwrap(),
            n: 3,
            digest: [9; 32],
            jobs: vec![Submission { job: plain, spec }, full()],
        }
    }

    fn same(read: &Chunk, written: &Chunk) {
        assert_eq!((read.n, read.digest), (written.n, written.digest));
        let parts = |chunk: &Chunk| -> Vec<(NewJob, Bytes)> {
            let jobs = chunk.jobs.iter();
            jobs.map(|one| (one.job.clone(), one.spec.clone()))
                .collect()
        };
        assert_eq!(parts(read), parts(written));
    }

    #[test]
    fn what_was_written_reads_back() {
        let written = chunk();
        same(&read(encode_chunk(&written)), &written);
        let next = Chunk { n: 4, ..chunk() };
        let both = [encode_chunk(&next), encode_chunk(&written)].concat();
        let both = decode_chunks(&written.project, &written.batch, both.into()).unwrap();
        assert_eq!(both.len(), 2);
        same(both[0].1.as_ref().unwrap(), &written);
        same(both[1].1.as_ref().unwrap(), &next);

        let open = OpenBatch {
            batch: NewBatch {
                project: written.project.clone(),
                batch: written.batch.clone(),
                params_digest: [4; 32],
            },
            defaults: Bytes::from_static(b"defaults"),
        };
        let bytes = encode_open(&open, Timestamp(5));
        let (back, at) = decode_open(&written.project, &written.batch, bytes).unwrap();
        assert_eq!(
            (back.batch, back.defaults, at),
            (open.batch, open.defaults, Timestamp(5))
        );
    }

    #[test]
    fn golden_bytes() {
        let jobs = vec![full()];
        let bytes = encode_chunk(&Chunk { jobs, ..chunk() });
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/chunks-v2.txt").trim());
    }

    fn read(bytes: Bytes) -> Chunk {
        let of = chunk();
        let mut chunks = decode_chunks(&of.project, &of.batch, bytes).unwrap();
        assert_eq!(chunks.len(), 1);
        chunks.remove(0).1.unwrap()
    }

    #[test]
    fn what_the_queue_rejected_is_left_out() {
        let rejected = ItemResult::Rejected(FieldError::new("id", "root", "is taken"));
        let items = [rejected.clone(), ItemResult::Accepted];
        let bytes = taken(encode_chunk(&chunk()), &items).unwrap();
        let jobs = vec![full()];
        same(&read(bytes.unwrap()), &Chunk { jobs, ..chunk() });
        let none = [rejected.clone(), rejected];
        assert_eq!(taken(encode_chunk(&chunk()), &none).unwrap(), None);
    }

    #[test]
    fn a_chunk_that_comes_again_takes_nothing_away() {
        let kept = encode_chunk(&chunk());
        let of = |jobs: Vec<Submission>| encode_chunk(&Chunk { jobs, ..chunk() });
        let mut asked_again = full();
        asked_again.job.traceparent = None;
        let again = of(vec![asked_again]);
        assert_eq!(merged(kept.clone(), again).unwrap(), None);

        let (mut other, mut more) = (full(), full());
        other.job.spec_digest = [8; 32];
        more.job.id = "more".parse().unwrap();
        let all = merged(kept.clone(), of(vec![more, other])).unwrap();
        let all = read(all.unwrap());
        let ids: Vec<_> = all.jobs.iter().map(|job| job.job.id.as_str()).collect();
        assert_eq!(ids, ["root", "a", "more"]);
        assert_eq!(all.jobs[1].job.spec_digest, [8; 32]);

        let another = Chunk {
            digest: [1; 32],
            ..chunk()
        };
        let another = encode_chunk(&another);
        let instead = merged(kept.clone(), another.clone()).unwrap();
        assert_eq!(instead, Some(another));

        let next = encode_chunk(&Chunk { n: 4, ..chunk() });
        let both = merged(kept, next).unwrap().unwrap();
        let numbers: Vec<u32> = digests(both).unwrap().into_keys().collect();
        assert_eq!(numbers, [3, 4]);
    }

    #[test]
    fn a_chunk_that_cannot_be_used_takes_no_other_with_it() {
        let row = |n: u32, digest: &'static [u8]| ChunkRow {
            n,
            digest: Bytes::from_static(digest),
            jobs: Vec::new(),
        };
        let bytes = encode_rows(vec![row(1, &[1; 32]), row(2, b"short"), row(3, &[3; 32])]);
        let of = chunk();
        let read = decode_chunks(&of.project, &of.batch, bytes).unwrap();
        let shown: Vec<_> = read.iter().map(|(n, chunk)| (*n, chunk.is_ok())).collect();
        assert_eq!(shown, [(1, true), (2, false), (3, true)]);
    }

    #[test]
    fn a_later_version_is_refused() {
        let row = ChunksRow {
            version: VERSION + 1,
            ..ChunksRow::default()
        };
        let bytes = row.encode_to_vec().into();
        let of = chunk();
        let error = decode_chunks(&of.project, &of.batch, bytes).unwrap_err();
        assert!(error.to_string().contains("version 3"), "{error}");
    }
}
