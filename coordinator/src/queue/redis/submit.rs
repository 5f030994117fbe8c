//! Batches are opened and closed, and jobs enter them.
//!
//! Verdicts that depend on several jobs of a chunk are reached here, by the rules that every backend shares; the
//! script decides what it alone can know: which names are taken, and whether the batch is open.

use std::collections::HashMap;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::queue::{
    BatchView, CHUNK_JOBS_MAX, ItemResult, Known, NewJob, Plan, Refusal, name_taken, plan,
    too_many_lanes, unknown_dep,
};
use redis::Value;

use super::core::Core;
use super::decode::{Reader, digest, number};
use super::encode;
use super::gather::ITEMS_MAX;
use super::script::SCRIPTS;
use crate::queue::limits::{check_defaults, parted};
use crate::queue::{Chunk, ChunkReply, OpenBatch, QueueError};

/// Jobs of one call: some milliseconds of the server's time.
const CALL_JOBS_MAX: usize = 500;

/// The jobs of a shard that a chunk or a spawn is about, as they were a moment ago.
#[derive(Default)]
pub struct Facts {
    project: Option<(ProjectId, BatchId)>,
    digests: HashMap<JobKey, [u8; 32]>,
}

impl Known for Facts {
    type Job = JobKey;

    fn digest(&self, id: &JobId) -> Option<[u8; 32]> {
        let (project, batch) = self.project.clone()?;
        self.digests
            .get(&JobKey::new(project, batch, id.clone()))
            .copied()
    }

    fn find(&self, key: &JobKey) -> Option<JobKey> {
        self.digests.contains_key(key).then(|| key.clone())
    }

    fn enter_lane(&mut self, _: &NewJob) -> bool {
        true
    }
}

impl Core {
    pub async fn open_batch(
        &self,
        request: OpenBatch,
        open_max: usize,
    ) -> Result<BatchView, QueueError> {
        check_defaults(&request.defaults)?;
        let batch = &request.batch;
        let mut cmd = self.cmd(&SCRIPTS.open_batch);
        cmd.arg(batch.project.as_str())
            .arg(batch.batch.as_str())
            .arg(batch.params_digest.as_slice())
            .arg(request.defaults.as_ref())
            .arg(open_max);
        match number::<i64>(self.link.write(&cmd).await?)? {
            -1 => {
                let rule = "is open already with other parameters";
                return Err(FieldError::new("batch", &batch.batch, rule).into());
            }
            -2 => {
                let project = batch.project.clone();
                let max = open_max;
                return Err(Refusal::TooManyOpenBatches { project, max }.into());
            }
            _ => {}
        }
        self.batch_or_unknown(&batch.project, &batch.batch).await
    }

    pub async fn close_batch(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        cancel: bool,
    ) -> Result<BatchView, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.close_batch);
        cmd.arg(encode::batch_name(project, batch))
            .arg(u8::from(cancel));
        self.link.write(&cmd).await?;
        self.batch_or_unknown(project, batch).await
    }

    async fn batch_or_unknown(
        &self,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<BatchView, QueueError> {
        let found = self.batch(project, batch).await?;
        found.ok_or_else(|| unknown(project, batch).into())
    }

    pub async fn submit(&self, chunk: Chunk) -> Result<ChunkReply, QueueError> {
        if chunk.jobs.len() > CHUNK_JOBS_MAX {
            let rule = format!("must be at most {CHUNK_JOBS_MAX} in one chunk");
            return Err(FieldError::new("jobs", chunk.jobs.len(), rule).into());
        }
        let (jobs, specs) = parted("jobs", chunk.jobs)?;
        let (project, batch) = (&chunk.project, &chunk.batch);
        let plan = self.plan(project, batch, &jobs).await?;
        let mut items = plan.verdicts.clone();
        let there = (0..jobs.len()).filter(|n| items[*n] == ItemResult::AlreadyThere);
        let positions: Vec<usize> = there.chain(plan.order.iter().copied()).collect();
        let mut call = ChunkCall {
            name: encode::batch_name(project, batch),
            n: chunk.n,
            digest: chunk.digest,
            base: None,
            size: jobs.len(),
        };
        let mut repeated = false;
        let parts = positions.chunks(CALL_JOBS_MAX);
        let none: &[usize] = &[];
        for (i, part) in parts
            .chain(positions.is_empty().then_some(none))
            .enumerate()
        {
            let mut cmd = self.cmd(&SCRIPTS.submit);
            call.begin(&mut cmd, part.len());
            for n in part {
                let deps = encode::dep_keys(project, batch, &jobs, &plan.deps[*n]);
                encode::push_job(&mut cmd, *n, &jobs[*n], &specs[*n], &deps);
            }
            let (known, verdicts) = call.read(self.link.write(&cmd).await?, project, batch)?;
            repeated |= i == 0 && known;
            for (n, verdict) in part.iter().zip(verdicts) {
                items[*n] = verdict_of(verdict, batch, &jobs, &plan, *n, project);
            }
        }
        Ok(ChunkReply { items, repeated })
    }

    /// The verdicts on new jobs as far as they can be reached outside the server. What they depend on, and their
    /// twins where some of them depend on others, are looked up first.
    pub async fn plan(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        jobs: &[NewJob],
    ) -> Result<Plan<JobKey>, QueueError> {
        if jobs.iter().all(|job| job.deps.is_empty()) {
            let plan = plan(&mut Facts::default(), project, batch, jobs);
            // What breaks a rule may have a twin in the queue, which is looked at first.
            if plan.order.len() == jobs.len() {
                return Ok(plan);
            }
        }
        let own = |job: &NewJob| JobKey::new(project.clone(), batch.clone(), job.id.clone());
        let deps = jobs
            .iter()
            .flat_map(|job| &job.deps)
            .filter(|key| key.project == *project);
        let mut keys: Vec<JobKey> = jobs.iter().map(own).chain(deps.cloned()).collect();
        keys.sort_unstable();
        keys.dedup();
        let mut facts = self.facts(project, batch, keys).await?;
        Ok(plan(&mut facts, project, batch, jobs))
    }

    async fn facts(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        keys: Vec<JobKey>,
    ) -> Result<Facts, QueueError> {
        let mut digests = HashMap::new();
        for part in keys.chunks(ITEMS_MAX) {
            let mut cmd = self.cmd(&SCRIPTS.read_digests);
            cmd.arg(part.len());
            for key in part {
                cmd.arg(encode::batch_of(key)).arg(key.job.as_str());
            }
            let mut found = Reader::of(self.link.run(&cmd).await?)?;
            for key in part {
                match found.value()? {
                    Value::Nil => {}
                    value => drop(digests.insert(key.clone(), digest(value)?)),
                }
            }
        }
        let project = Some((project.clone(), batch.clone()));
        Ok(Facts { project, digests })
    }
}

/// The calls that bring one chunk.
struct ChunkCall {
    name: String,
    n: u32,
    digest: [u8; 32],
    /// The number of the chunk's first job, once the first call has drawn it.
    base: Option<u64>,
    size: usize,
}

impl ChunkCall {
    fn begin(&self, cmd: &mut redis::Cmd, jobs: usize) {
        let base = self.base.map(|base| base.to_string()).unwrap_or_default();
        cmd.arg(&self.name)
            .arg(self.n)
            .arg(self.digest.as_slice())
            .arg(base)
            .arg(self.size)
            .arg(jobs);
    }

    /// Whether the chunk was known, and the verdicts.
    fn read(
        &mut self,
        answer: Value,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<(bool, Vec<i64>), QueueError> {
        let mut answer = Reader::of(answer)?;
        match answer.text()?.as_str() {
            "ok" => {}
            "unknown" => return Err(unknown(project, batch).into()),
            "other" => {
                let rule = "was submitted before with other jobs; give new jobs a new number";
                return Err(FieldError::new("chunk", self.n, rule).into());
            }
            _ => {
                let (project, batch) = (project.clone(), batch.clone());
                return Err(Refusal::BatchClosed { project, batch }.into());
            }
        }
        let known = answer.number::<u8>()? == 1;
        self.base = Some(answer.number()?);
        let mut list = answer.list()?;
        let mut verdicts = Vec::with_capacity(list.len());
        while !list.is_empty() {
            verdicts.push(list.number()?);
        }
        Ok((known, verdicts))
    }
}

fn unknown(project: &ProjectId, batch: &BatchId) -> Refusal {
    let (project, batch) = (project.clone(), batch.clone());
    Refusal::UnknownBatch { project, batch }
}

fn verdict_of(
    verdict: i64,
    batch: &BatchId,
    jobs: &[NewJob],
    plan: &Plan<JobKey>,
    n: usize,
    project: &ProjectId,
) -> ItemResult {
    match verdict {
        1 => ItemResult::Accepted,
        0 => ItemResult::AlreadyThere,
        -3 => ItemResult::Rejected(FieldError::new(
            "batch",
            batch,
            "is closed and takes no new jobs",
        )),
        other => ItemResult::Rejected(refusal_of(other, project, batch, jobs, plan, n)),
    }
}

/// Why the script did not let job `n` in, in the words of [`espalier_core::queue::plan`].
pub fn refusal_of(
    verdict: i64,
    project: &ProjectId,
    batch: &BatchId,
    jobs: &[NewJob],
    plan: &Plan<JobKey>,
    n: usize,
) -> FieldError {
    let job = &jobs[n];
    let missing = usize::try_from(-11 - verdict).ok();
    let deps = encode::dep_keys(project, batch, jobs, &plan.deps[n]);
    match (verdict, missing.and_then(|at| deps.get(at))) {
        (-2, _) => too_many_lanes(job),
        (_, Some((key, _))) => {
            let position = job
                .deps
                .iter()
                .position(|dep| dep == key)
                .unwrap_or_default();
            unknown_dep(position, key)
        }
        _ => name_taken(job),
    }
}
