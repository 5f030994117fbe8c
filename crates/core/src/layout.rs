//! Where things lie in object storage. No path is built anywhere else.
//!
//! ```text
//! {project}/batches/{batch}/jobs/{job}/a-{fence}/…    private to an attempt
//! {project}/batches/{batch}/jobs/{job}/manifest.json  published once, names the winning attempt
//! {project}/batches/{batch}/jobs/{job}/patches/{n}.json  corrections, append-only
//! {project}/datasets/{name}/v{n}.json                 a version of a data set: created once, points at an attempt's files
//! {project}/adapters/{name}/v{n}.json                 a version of an adapter, likewise
//! {project}/adapters/{name}/latest/{seq}.json         which version is `latest`: append-only, the highest number counts
//! {project}/pipelines/{name}/steps/{digest}.json      what a step of a pipeline came to: created once
//! {project}/pipelines/{name}/plans/{seq}.json         what is to be done: append-only, the highest number counts
//! {project}/pipelines/{name}/beat.json                that somebody runs it: replaced every few seconds
//! {project}/blobs/{sha256}                            raw tool results, screenshots, large specs
//! {project}/uploads/…                                 what users bring: requests of `generate` jobs
//! {project}/uploads/batches/{batch}/…                 the same for one batch alone: garbage after retention
//! .probe/{id}…                                        deleted as soon as it is created
//! _journal/q-{queue}/{project}/{batch}/…              what a shared queue was given, until the batch has ended
//! _scaler/q-{queue}/{provider}.json                   what instances of a provider have cost today: replaced
//! ```

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::FieldError;
use crate::id::{
    AdapterName, BatchId, DatasetName, Fence, JobId, JobKey, NAME_BYTES_MAX, PipelineName,
    ProjectId,
};
use crate::pipeline::StepDigest;

/// Everything of a project.
pub fn project(project: &ProjectId) -> String {
    format!("{project}/")
}

/// All batches of a project.
pub fn batches(project: &ProjectId) -> String {
    format!("{project}/batches/")
}

/// Everything of a batch.
pub fn batch(project: &ProjectId, batch: &BatchId) -> String {
    format!("{project}/batches/{batch}/")
}

/// Everything of a job.
pub fn job(key: &JobKey) -> String {
    format!("{}/batches/{}/jobs/{}/", key.project, key.batch, key.job)
}

/// What one attempt wrote; of no worth unless the manifest names it.
pub fn attempt(key: &JobKey, fence: Fence) -> String {
    format!("{}a-{fence}/", job(key))
}

/// The steps of a rollout as they happened, the `n`th piece.
pub fn segment(key: &JobKey, fence: Fence, n: u32) -> String {
    format!("{}steps-{n:05}.jsonl.zst", attempt(key, fence))
}

/// The whole trace of one attempt.
pub fn trace(key: &JobKey, fence: Fence) -> String {
    format!("{}trace.json.zst", attempt(key, fence))
}

/// Answers of a `generate` job, the `n`th piece: one a line.
pub fn answers(key: &JobKey, fence: Fence, n: u32) -> String {
    format!("{}answers-{n:05}.jsonl", attempt(key, fence))
}

/// What the `n`th piece of answers holds, written after it: a piece without is not whole.
pub fn answers_record(key: &JobKey, fence: Fence, n: u32) -> String {
    format!("{}answers-{n:05}.json", attempt(key, fence))
}

/// The job, the attempt and the number of the piece whose record lies at `path`; none where it is another object.
pub fn job_of_answers_record(path: &str) -> Option<(JobKey, Fence, u32)> {
    let (key, fence) = attempt_of(path)?;
    let (_, name) = path.rsplit_once('/')?;
    let n = name.strip_prefix("answers-")?.strip_suffix(".json")?;
    let n = n.parse().ok()?;
    (answers_record(&key, fence, n) == path).then_some((key, fence, n))
}

/// What a user brought under `name`. Every project has a folder of its own for that, and a name leads nowhere else.
pub fn upload(project: &ProjectId, name: &UploadName) -> String {
    format!("{project}/uploads/{name}")
}

/// What was brought for the jobs of one batch alone, and goes with it.
pub fn batch_uploads(project: &ProjectId, batch: &BatchId) -> String {
    format!("{project}/uploads/{}/", UploadName::folder_of(batch))
}

/// What one attempt of a `train` job made: the files of an adapter, or of a model, beside each other.
pub fn adapter_files(key: &JobKey, fence: Fence) -> String {
    format!("{}adapter/", attempt(key, fence))
}

/// A checkpoint of a training after `step` steps: a folder of the attempt that took it.
pub fn checkpoint(key: &JobKey, fence: Fence, step: u64) -> String {
    format!("{}step-{step:010}/", attempt(key, fence))
}

/// The record of a checkpoint, written after its files: one without is not whole.
pub fn checkpoint_record(key: &JobKey, fence: Fence, step: u64) -> String {
    format!("{}checkpoint.json", checkpoint(key, fence, step))
}

/// Tensors of a checkpoint, the `n`th file.
pub fn checkpoint_tensors(key: &JobKey, fence: Fence, step: u64, n: usize) -> String {
    format!("{}state-{n:05}.safetensors", checkpoint(key, fence, step))
}

/// The steps up to a checkpoint, one a line.
pub fn checkpoint_steps(key: &JobKey, fence: Fence, step: u64) -> String {
    format!("{}steps.jsonl", checkpoint(key, fence, step))
}

/// The attempt and the step of the checkpoint whose record lies at `path`; none where it is another object.
pub fn checkpoint_of_record(path: &str) -> Option<(JobKey, Fence, u64)> {
    let (key, fence) = attempt_of(path)?;
    let folder = path.strip_suffix("/checkpoint.json")?;
    let (_, name) = folder.rsplit_once('/')?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (checkpoint_record(&key, fence, step) == path).then_some((key, fence, step))
}

/// Every step of a training, one a line.
pub fn training_steps(key: &JobKey, fence: Fence) -> String {
    format!("{}metrics.jsonl", attempt(key, fence))
}

/// The loss over steps, as a picture.
pub fn training_plot(key: &JobKey, fence: Fence) -> String {
    format!("{}loss.svg", attempt(key, fence))
}

/// The same numbers as TensorBoard reads them, from a folder that holds nothing else.
pub fn training_events(key: &JobKey, fence: Fence) -> String {
    format!("{}tensorboard/events.out.tfevents", attempt(key, fence))
}

/// What one attempt of an `export` job says of where it brought what.
pub fn export_record(key: &JobKey, fence: Fence) -> String {
    format!("{}export.json", attempt(key, fence))
}

/// What one attempt of a `compare` job made: numbers, text and page beside each other.
pub fn report_files(key: &JobKey, fence: Fence) -> String {
    format!("{}report/", attempt(key, fence))
}

/// What one attempt of a `score` job found.
pub fn scores(key: &JobKey, fence: Fence) -> String {
    format!("{}scores.json", attempt(key, fence))
}

/// All adapters of a project.
pub fn adapters(project: &ProjectId) -> String {
    format!("{project}/adapters/")
}

/// All versions of an adapter.
pub fn adapter_versions(project: &ProjectId, name: &AdapterName) -> String {
    format!("{}{name}/", adapters(project))
}

/// Version `n` of an adapter, from 1: created if absent, so that the number is taken once.
pub fn adapter_version(project: &ProjectId, name: &AdapterName, n: u32) -> String {
    format!("{}v{n}.json", adapter_versions(project, name))
}

/// The name and the number of the version of an adapter that lies at `path`; none where it is another object.
pub fn adapter_version_of(project: &ProjectId, path: &str) -> Option<(AdapterName, u32)> {
    let (name, file) = path.strip_prefix(&adapters(project))?.split_once('/')?;
    let name = name.parse().ok()?;
    let n = file
        .strip_prefix('v')?
        .strip_suffix(".json")?
        .parse()
        .ok()?;
    (n > 0 && adapter_version(project, &name, n) == path).then_some((name, n))
}

/// All entries that say which version of an adapter is `latest`.
pub fn adapter_latest_entries(project: &ProjectId, name: &AdapterName) -> String {
    format!("{}latest/", adapter_versions(project, name))
}

/// The `seq`th of them, from 1: created if absent. Numbers have as many digits as fit, so that listings are in order.
pub fn adapter_latest(project: &ProjectId, name: &AdapterName, seq: u64) -> String {
    format!("{}{seq:020}.json", adapter_latest_entries(project, name))
}

/// The name of the adapter and the number of the entry that lies at `path`; none where it is another object.
pub fn adapter_latest_of(project: &ProjectId, path: &str) -> Option<(AdapterName, u64)> {
    let (name, file) = path
        .strip_prefix(&adapters(project))?
        .split_once("/latest/")?;
    let name = name.parse().ok()?;
    let seq = file.strip_suffix(".json")?.parse().ok()?;
    (seq > 0 && adapter_latest(project, &name, seq) == path).then_some((name, seq))
}

/// What one attempt of a `curate` job made: rows, manifest and card beside each other.
pub fn dataset_files(key: &JobKey, fence: Fence) -> String {
    format!("{}dataset/", attempt(key, fence))
}

/// All data sets of a project.
pub fn datasets(project: &ProjectId) -> String {
    format!("{project}/datasets/")
}

/// All versions of a data set.
pub fn dataset_versions(project: &ProjectId, name: &DatasetName) -> String {
    format!("{}{name}/", datasets(project))
}

/// Version `n` of a data set, from 1: created if absent, so that the number is taken once.
pub fn dataset_version(project: &ProjectId, name: &DatasetName, n: u32) -> String {
    format!("{}v{n}.json", dataset_versions(project, name))
}

/// The name and the number of the version of a data set that lies at `path`; none where it is another object.
pub fn dataset_version_of(project: &ProjectId, path: &str) -> Option<(DatasetName, u32)> {
    let (name, file) = path.strip_prefix(&datasets(project))?.split_once('/')?;
    let name = name.parse().ok()?;
    let n = file
        .strip_prefix('v')?
        .strip_suffix(".json")?
        .parse()
        .ok()?;
    (n > 0 && dataset_version(project, &name, n) == path).then_some((name, n))
}

/// Everything of a pipeline, but for what its jobs made.
pub fn pipeline(project: &ProjectId, name: &PipelineName) -> String {
    format!("{project}/pipelines/{name}/")
}

/// The records of a pipeline's steps.
pub fn pipeline_steps(project: &ProjectId, name: &PipelineName) -> String {
    format!("{}steps/", pipeline(project, name))
}

/// What the step with this digest came to; created if absent, so that a step ends once.
pub fn pipeline_step(project: &ProjectId, name: &PipelineName, digest: &StepDigest) -> String {
    format!("{}{digest}.json", pipeline_steps(project, name))
}

/// The digest of the step whose record lies at `path`; none where it is another object.
pub fn pipeline_step_of(
    project: &ProjectId,
    name: &PipelineName,
    path: &str,
) -> Option<StepDigest> {
    let file = path.strip_prefix(&pipeline_steps(project, name))?;
    file.strip_suffix(".json")?.parse().ok()
}

/// The plans of a pipeline, each written when a run began that had another one than the run before.
pub fn pipeline_plans(project: &ProjectId, name: &PipelineName) -> String {
    format!("{}plans/", pipeline(project, name))
}

/// The `seq`th of them, from 1: created if absent. Numbers have as many digits as fit, so that listings are in order.
pub fn pipeline_plan(project: &ProjectId, name: &PipelineName, seq: u64) -> String {
    format!("{}{seq:020}.json", pipeline_plans(project, name))
}

/// The number of the plan that lies at `path`; none where it is another object.
pub fn pipeline_plan_of(project: &ProjectId, name: &PipelineName, path: &str) -> Option<u64> {
    let file = path.strip_prefix(&pipeline_plans(project, name))?;
    let seq = file.strip_suffix(".json")?.parse().ok()?;
    (seq > 0 && pipeline_plan(project, name, seq) == path).then_some(seq)
}

/// What whoever runs a pipeline writes again and again, so that others see that somebody does.
pub fn pipeline_beat(project: &ProjectId, name: &PipelineName) -> String {
    format!("{}beat.json", pipeline(project, name))
}

/// The manifest, created once and written last.
pub fn manifest(key: &JobKey) -> String {
    format!("{}manifest.json", job(key))
}

/// Where the coordinator moves a manifest whose files do not verify.
pub fn manifest_aside(key: &JobKey, fence: Fence) -> String {
    format!("{}manifest.invalid-{fence}.json", job(key))
}

/// The corrections of a trace.
pub fn patches(key: &JobKey) -> String {
    format!("{}patches/", job(key))
}

/// The `n`th correction of a trace; created if absent, so that two editors cannot take one number.
pub fn patch(key: &JobKey, n: u32) -> String {
    format!("{}{n:06}.json", patches(key))
}

/// A file named by what it holds.
pub fn blob(project: &ProjectId, sha256_hex: &str) -> String {
    format!("{project}/blobs/{sha256_hex}")
}

/// An object that a process creates and deletes at its start, to see how the store behaves. No project begins with a
/// dot.
pub fn probe(id: &str) -> String {
    format!(".probe/{id}")
}

/// Two more of them, in the order of their paths. A store that walks folders lists the second one first.
pub fn probe_order(id: &str) -> [String; 2] {
    [
        format!(".probe/{id}-order/a-b"),
        format!(".probe/{id}-order/a/b"),
    ]
}

/// The folder of both.
pub fn probe_order_folder(id: &str) -> String {
    format!(".probe/{id}-order/")
}

/// The name of something that a user brought: parts with `/` between them, each by the rule of identifiers, so that
/// none leads out of its folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UploadName(Box<str>);

impl UploadName {
    /// Longest name, in bytes.
    pub const BYTES_MAX: usize = 512;

    /// Checks `name`.
    pub fn new(name: &str) -> Result<Self, FieldError> {
        let is_part = |part: &str| JobId::new(part).is_ok();
        if name.len() <= Self::BYTES_MAX && name.split('/').all(is_part) {
            return Ok(Self(name.into()));
        }
        let rule = format!(
            "must be at most {} bytes of parts with `/` between them, each 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ - \
             and beginning with a letter or a digit",
            Self::BYTES_MAX
        );
        Err(FieldError::new("name", name, rule))
    }

    /// The name of requests that are brought for the jobs of `batch` alone: `sha256_hex` is that of their bytes.
    pub fn of_batch(batch: &BatchId, sha256_hex: &str) -> Result<Self, FieldError> {
        Self::new(&format!("{}/{sha256_hex}.jsonl", Self::folder_of(batch)))
    }

    fn folder_of(batch: &BatchId) -> String {
        format!("batches/{batch}")
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for UploadName {
    type Error = FieldError;

    fn try_from(name: String) -> Result<Self, FieldError> {
        Self::new(&name)
    }
}

impl From<UploadName> for String {
    fn from(name: UploadName) -> Self {
        name.0.into()
    }
}

impl fmt::Display for UploadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What coordinators keep of a batch, so that a queue which lost it can be given it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JournalEntry {
    /// It was opened.
    Open,
    /// Chunks of it were taken.
    Chunks(ChunkRange),
    /// It was closed.
    Closed,
    /// It was cancelled as a whole.
    Cancelled,
}

/// Chunks of a batch that are kept in one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkRange {
    /// Number of the first.
    pub first: u32,
    /// Number of the last; less than [`ChunkRange::LEN_MAX`] beyond the first.
    pub last: u32,
}

impl ChunkRange {
    /// Most chunks in one object: bounds what a name can ask for.
    pub const LEN_MAX: u32 = 4096;

    /// The range of one chunk.
    pub fn of(n: u32) -> Self {
        Self { first: n, last: n }
    }

    /// The numbers in it, in their order.
    pub fn numbers(self) -> RangeInclusive<u32> {
        self.first..=self.last
    }
}

impl fmt::Display for ChunkRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:010}-{:010}", self.first, self.last)
    }
}

impl FromStr for ChunkRange {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (first, last) = text.split_once('-').ok_or(())?;
        let number = |text: &str| text.parse().map_err(|_| ());
        let (first, last) = (number(first)?, number(last)?);
        let is_valid = u32::checked_sub(last, first).is_some_and(|more| more < Self::LEN_MAX);
        is_valid.then_some(Self { first, last }).ok_or(())
    }
}

/// All that coordinators of the queue with this name keep. No project begins with an underscore; queues that share a
/// store are told apart by their names.
pub fn journal(queue: &str) -> String {
    format!("_journal/q-{queue}/")
}

/// What instances of `provider` have cost that coordinators of the queue with this name made.
pub fn scaler_ledger(queue: &str, provider: &str) -> String {
    format!("_scaler/q-{queue}/{provider}.json")
}

/// All that they keep of one batch.
pub fn journal_batch(queue: &str, project: &ProjectId, batch: &BatchId) -> String {
    format!("{}{project}/{batch}/", journal(queue))
}

/// The entry of a batch in the journal of a queue.
pub fn journal_entry(
    queue: &str,
    project: &ProjectId,
    batch: &BatchId,
    entry: JournalEntry,
) -> String {
    let folder = journal_batch(queue, project, batch);
    match entry {
        JournalEntry::Open => format!("{folder}open"),
        JournalEntry::Chunks(range) => format!("{folder}chunks-{range}"),
        JournalEntry::Closed => format!("{folder}closed"),
        JournalEntry::Cancelled => format!("{folder}cancelled"),
    }
}

/// Where a listing goes on that is to begin with the objects whose first chunk is `first`.
pub fn journal_chunks_from(
    queue: &str,
    project: &ProjectId,
    batch: &BatchId,
    first: u32,
) -> String {
    format!(
        "{}chunks-{first:010}-",
        journal_batch(queue, project, batch)
    )
}

/// The batch and the entry that lie at `path` in the journal of a queue; none where it is another object.
pub fn journal_entry_of(queue: &str, path: &str) -> Option<(ProjectId, BatchId, JournalEntry)> {
    let parts: Vec<&str> = path.strip_prefix(&journal(queue))?.split('/').collect();
    let [project, batch, name] = parts[..] else {
        return None;
    };
    let entry = match name {
        "open" => JournalEntry::Open,
        "closed" => JournalEntry::Closed,
        "cancelled" => JournalEntry::Cancelled,
        chunks => JournalEntry::Chunks(chunks.strip_prefix("chunks-")?.parse().ok()?),
    };
    let (project, batch) = (project.parse().ok()?, batch.parse().ok()?);
    (journal_entry(queue, &project, &batch, entry) == path).then_some((project, batch, entry))
}

/// The job whose manifest lies at `path`, or the rule that the path breaks.
pub fn job_of_manifest(path: &str) -> Result<JobKey, FieldError> {
    let parts: Vec<&str> = path.split('/').collect();
    match parts[..] {
        [project, "batches", batch, "jobs", job, "manifest.json"] => {
            Ok(JobKey::new(project.parse()?, batch.parse()?, job.parse()?))
        }
        _ => Err(FieldError::new(
            "path",
            path,
            "must be {project}/batches/{batch}/jobs/{job}/manifest.json",
        )),
    }
}

/// The job and the number of the correction that lies at `path`; none where it is another object.
pub fn job_of_patch(path: &str) -> Option<(JobKey, u32)> {
    let parts: Vec<&str> = path.split('/').collect();
    let [project, "batches", batch, "jobs", job, "patches", file] = parts[..] else {
        return None;
    };
    let n = file.strip_suffix(".json")?.parse().ok()?;
    let key = JobKey::new(
        project.parse().ok()?,
        batch.parse().ok()?,
        job.parse().ok()?,
    );
    (patch(&key, n) == path).then_some((key, n))
}

/// The job and the fence of the attempt that the object at `path` is private to; none where it is another object.
pub fn attempt_of(path: &str) -> Option<(JobKey, Fence)> {
    let parts: Vec<&str> = path.splitn(7, '/').collect();
    let [project, "batches", batch, "jobs", job, attempt, _] = parts[..] else {
        return None;
    };
    let fence = attempt.strip_prefix("a-")?.parse().ok()?;
    let key = JobKey::new(
        project.parse().ok()?,
        batch.parse().ok()?,
        job.parse().ok()?,
    );
    Some((key, Fence(fence)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_paths() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        assert_eq!(manifest(&key), "shop/batches/b1/jobs/j1/manifest.json");
        assert_eq!(
            segment(&key, Fence(7), 2),
            "shop/batches/b1/jobs/j1/a-7/steps-00002.jsonl.zst"
        );
        assert_eq!(
            trace(&key, Fence(7)),
            "shop/batches/b1/jobs/j1/a-7/trace.json.zst"
        );
        assert_eq!(
            patch(&key, 3),
            "shop/batches/b1/jobs/j1/patches/000003.json"
        );
        assert_eq!(blob(&key.project, "ab"), "shop/blobs/ab");
    }

    #[test]
    fn a_record_of_answers_names_its_piece() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        let path = answers_record(&key, Fence(7), 12);
        assert_eq!(path, "shop/batches/b1/jobs/j1/a-7/answers-00012.json");
        assert_eq!(
            job_of_answers_record(&path),
            Some((key.clone(), Fence(7), 12))
        );
        for other in [
            answers(&key, Fence(7), 12),
            path.replace("00012", "12"),
            segment(&key, Fence(7), 0),
        ] {
            assert_eq!(job_of_answers_record(&other), None, "{other}");
        }
    }

    #[test]
    fn a_name_leads_nowhere_but_into_its_projects_uploads() {
        let project = "shop".parse().unwrap();
        let name = UploadName::new("nightly/requests-1.jsonl").unwrap();
        assert_eq!(
            upload(&project, &name),
            "shop/uploads/nightly/requests-1.jsonl"
        );
        let batch = "b1".parse().unwrap();
        let of_batch = upload(&project, &UploadName::of_batch(&batch, "ab").unwrap());
        assert_eq!(of_batch, "shop/uploads/batches/b1/ab.jsonl");
        assert!(of_batch.starts_with(&batch_uploads(&project, &batch)));
        let long = ["a"; 300].join("/");
        for bad in [
            "", "/", "a/", "/a", "..", "a/../b", ".", "a//b", "a b", "ä", ".a", "a#1", &long,
        ] {
            assert!(UploadName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_version_of_an_adapter_names_it() {
        let project: ProjectId = "shop".parse().unwrap();
        let name: AdapterName = "v2".parse().unwrap();
        let path = adapter_version(&project, &name, 12);
        assert_eq!(path, "shop/adapters/v2/v12.json");
        assert_eq!(
            adapter_version_of(&project, &path),
            Some((name.clone(), 12))
        );
        for other in ["v0.json", "v012.json", "v1", "latest/1.json", "v-1.json"] {
            let path = format!("shop/adapters/v2/{other}");
            assert_eq!(adapter_version_of(&project, &path), None, "{path}");
        }
        assert_eq!(adapter_version_of(&"shop2".parse().unwrap(), &path), None);
        let latest = adapter_latest(&project, &name, 12);
        assert_eq!(latest, "shop/adapters/v2/latest/00000000000000000012.json");
        assert_eq!(
            adapter_latest_of(&project, &latest),
            Some((name.clone(), 12))
        );
        assert_eq!(adapter_version_of(&project, &latest), None);
        assert!(
            adapter_latest(&project, &name, 9) < latest,
            "listings are in order"
        );
        for other in [
            "latest/12.json",
            "latest/00000000000000000000.json",
            "v12.json",
        ] {
            let path = format!("shop/adapters/v2/{other}");
            assert_eq!(adapter_latest_of(&project, &path), None, "{path}");
        }
        let data: DatasetName = "clicks".parse().unwrap();
        assert_eq!(
            dataset_version(&project, &data, 3),
            "shop/datasets/clicks/v3.json"
        );
        let path = "shop/datasets/clicks/v3.json";
        assert_eq!(dataset_version_of(&project, path), Some((data, 3)));
        for other in ["shop/datasets/clicks/v03.json", "shop/datasets/v3.json"] {
            assert_eq!(dataset_version_of(&project, other), None, "{other}");
        }
    }

    #[test]
    fn a_record_of_a_pipeline_names_its_step_and_a_plan_its_number() {
        let project: ProjectId = "shop".parse().unwrap();
        let name: PipelineName = "steps".parse().unwrap();
        let digest: StepDigest = "0123456789ab".parse().unwrap();
        let step = pipeline_step(&project, &name, &digest);
        assert_eq!(step, "shop/pipelines/steps/steps/0123456789ab.json");
        assert_eq!(pipeline_step_of(&project, &name, &step), Some(digest));
        let plan = pipeline_plan(&project, &name, 12);
        assert_eq!(plan, "shop/pipelines/steps/plans/00000000000000000012.json");
        assert_eq!(pipeline_plan_of(&project, &name, &plan), Some(12));
        assert_eq!(pipeline_plan_of(&project, &name, &step), None);
        for other in ["0123456789AB", "0123456789abc", "../plans/1"] {
            let path = format!("shop/pipelines/steps/steps/{other}.json");
            assert_eq!(pipeline_step_of(&project, &name, &path), None, "{path}");
        }
    }

    #[test]
    fn a_record_of_a_checkpoint_names_its_attempt_and_step() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        let path = checkpoint_record(&key, Fence(7), 150);
        assert_eq!(
            path,
            "shop/batches/b1/jobs/j1/a-7/step-0000000150/checkpoint.json"
        );
        assert_eq!(
            checkpoint_of_record(&path),
            Some((key.clone(), Fence(7), 150))
        );
        for other in [
            checkpoint_tensors(&key, Fence(7), 150, 0),
            checkpoint_steps(&key, Fence(7), 150),
            path.replace("0000000150", "150"),
            training_steps(&key, Fence(7)),
        ] {
            assert_eq!(checkpoint_of_record(&other), None, "{other}");
        }
    }

    #[test]
    fn a_manifest_path_names_its_job() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        assert_eq!(job_of_manifest(&manifest(&key)).unwrap(), key);
        assert!(job_of_manifest("shop/batches/b1/jobs/j1/a-7/trace.json.zst").is_err());
    }

    #[test]
    fn a_patch_path_names_its_job_and_number() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        assert_eq!(job_of_patch(&patch(&key, 7)), Some((key.clone(), 7)));
        assert_eq!(job_of_patch(&manifest(&key)), None);
        assert_eq!(job_of_patch("shop/batches/b1/jobs/j1/patches/7.json"), None);
    }

    #[test]
    fn an_object_of_an_attempt_names_it() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        let found = attempt_of(&segment(&key, Fence(7), 2));
        assert_eq!(found, Some((key.clone(), Fence(7))));
        assert_eq!(attempt_of(&manifest(&key)), None);
        assert_eq!(attempt_of(&patch(&key, 7)), None);
    }

    #[test]
    fn an_entry_of_the_journal_names_its_batch_and_no_project_lies_there() {
        let (project, batch): (ProjectId, BatchId) =
            ("shop".parse().unwrap(), "b1".parse().unwrap());
        let (first, last) = (7, 12);
        let chunks = JournalEntry::Chunks(ChunkRange { first, last });
        let path = journal_entry("main", &project, &batch, chunks);
        assert_eq!(path, "_journal/q-main/shop/b1/chunks-0000000007-0000000012");
        let from = |first| journal_chunks_from("main", &project, &batch, first);
        assert!(from(7) < path && from(8) > path);
        for entry in [
            JournalEntry::Open,
            chunks,
            JournalEntry::Chunks(ChunkRange::of(0)),
            JournalEntry::Chunks(ChunkRange::of(u32::MAX)),
            JournalEntry::Closed,
            JournalEntry::Cancelled,
        ] {
            let path = journal_entry("main", &project, &batch, entry);
            let found = journal_entry_of("main", &path);
            assert_eq!(found, Some((project.clone(), batch.clone(), entry)));
            assert_eq!(journal_entry_of("mai", &path), None, "another queue's");
        }
        let backwards = "chunks-0000000002-0000000001";
        let wide = "chunks-0000000000-0000004096";
        for other in [
            "chunks-7-7",
            "chunks-x",
            backwards,
            wide,
            "opened",
            "open/x",
        ] {
            let path = format!("_journal/q-main/shop/b1/{other}");
            assert_eq!(journal_entry_of("main", &path), None, "{path}");
        }
        assert!("_journal".parse::<ProjectId>().is_err());
        let ledger = scaler_ledger("main", "runpod");
        assert_eq!(ledger, "_scaler/q-main/runpod.json");
        assert!("_scaler".parse::<ProjectId>().is_err());
    }
}
