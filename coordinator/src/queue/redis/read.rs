//! Reading: jobs, batches, and the whole in numbers.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::queue::{
    BatchSeq, BatchView, JobFilter, JobKind, QueueStats, Refusal, StatLine,
};
use espalier_core::time::Timestamp;
use redis::{Cmd, Value};

use super::core::Core;
use super::decode::{self, JobReader, Reader};
use super::encode;
use super::script::SCRIPTS;
use crate::queue::{DUE_LOOK_MAX, EndedPage, Intake, JobDetail, JobSpec, PAGE_MAX, QueueError};

/// Jobs with their end numbers, and their batch.
type Jobs = (BatchView, Vec<(u64, JobDetail)>);

impl Core {
    fn read_jobs(&self, project: &ProjectId, batch: &BatchId, how: &str) -> Cmd {
        let mut cmd = self.cmd(&SCRIPTS.read_jobs);
        cmd.arg(encode::batch_name(project, batch)).arg(how);
        cmd
    }

    /// None: there is no such batch.
    async fn jobs_of(&self, cmd: &Cmd) -> Result<Option<Jobs>, QueueError> {
        let mut answer = Reader::of(self.link.run(cmd).await?)?;
        if answer.is_empty() {
            return Ok(None);
        }
        let outage_us = answer.number()?;
        let batch = decode::batch(answer.list()?)?;
        let reader = JobReader {
            batch: &batch,
            outage_us,
        };
        let mut list = answer.list()?;
        let mut jobs = Vec::with_capacity(list.len());
        while !list.is_empty() {
            jobs.push(reader.job(list.list()?)?);
        }
        Ok(Some((batch, jobs)))
    }

    pub async fn job(&self, key: &JobKey) -> Result<Option<JobDetail>, QueueError> {
        let mut cmd = self.read_jobs(&key.project, &key.batch, "named");
        cmd.arg(key.job.as_str());
        let found = self.jobs_of(&cmd).await?;
        Ok(found
            .and_then(|(_, mut jobs)| jobs.pop())
            .map(|(_, job)| job))
    }

    pub async fn batch(
        &self,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<Option<BatchView>, QueueError> {
        let found = self
            .jobs_of(&self.read_jobs(project, batch, "named"))
            .await?;
        Ok(found.map(|(batch, _)| batch))
    }

    pub async fn batches(
        &self,
        project: &ProjectId,
        after: Option<&BatchId>,
        limit: usize,
    ) -> Result<Vec<BatchView>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.read_batches);
        cmd.arg(project.as_str());
        cmd.arg(after.map_or("", BatchId::as_str))
            .arg(limit.min(PAGE_MAX));
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        let mut batches = Vec::with_capacity(answer.len());
        while !answer.is_empty() {
            batches.push(decode::batch(answer.list()?)?);
        }
        Ok(batches)
    }

    pub async fn batches_newest(
        &self,
        project: &ProjectId,
        before: Option<BatchSeq>,
        limit: usize,
    ) -> Result<Vec<BatchView>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.read_newest);
        cmd.arg(project.as_str())
            .arg(before.map_or("+inf".to_owned(), |before| format!("({}", before.0)))
            .arg(limit.min(PAGE_MAX));
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        let mut batches = Vec::with_capacity(answer.len());
        while !answer.is_empty() {
            batches.push(decode::batch(answer.list()?)?);
        }
        Ok(batches)
    }

    /// Reads on until the page is full or the batch at its end: a filter may let few jobs through.
    pub async fn jobs(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        filter: &JobFilter,
        after: Option<&JobId>,
        limit: usize,
    ) -> Result<Vec<JobDetail>, QueueError> {
        let limit = limit.min(PAGE_MAX);
        let mut after = after.cloned();
        let mut found = Vec::new();
        loop {
            let mut cmd = self.read_jobs(project, batch, "listed");
            let rows_max = limit.max(100);
            cmd.arg(after.as_ref().map_or("", JobId::as_str))
                .arg(rows_max);
            let (_, jobs) = self
                .jobs_of(&cmd)
                .await?
                .ok_or_else(|| Refusal::UnknownBatch {
                    project: project.clone(),
                    batch: batch.clone(),
                })?;
            let is_last = jobs.len() < rows_max;
            after = jobs.last().map(|(_, detail)| detail.job.key.job.clone());
            let passed = jobs.into_iter().map(|(_, detail)| detail);
            found.extend(passed.filter(|detail| passes(detail, filter)));
            if found.len() >= limit || is_last {
                found.truncate(limit);
                return Ok(found);
            }
        }
    }

    pub async fn ended_after(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        after: u64,
        limit: usize,
    ) -> Result<EndedPage, QueueError> {
        let mut cmd = self.read_jobs(project, batch, "ended");
        cmd.arg(after).arg(limit.min(PAGE_MAX));
        let (batch, jobs) = self
            .jobs_of(&cmd)
            .await?
            .ok_or_else(|| Refusal::UnknownBatch {
                project: project.clone(),
                batch: batch.clone(),
            })?;
        Ok(EndedPage { jobs, batch })
    }

    /// The defaults of a batch, and the specs of those of its jobs that are there.
    async fn specs(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        jobs: &[&JobId],
    ) -> Result<Option<(Bytes, Vec<Option<Bytes>>)>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.read_specs);
        cmd.arg(encode::batch_name(project, batch));
        for job in jobs {
            cmd.arg(job.as_str());
        }
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        if answer.is_empty() {
            return Ok(None);
        }
        let defaults = answer.bytes()?;
        let mut list = answer.list()?;
        let mut specs = Vec::with_capacity(list.len());
        while !list.is_empty() {
            specs.push(match list.value()? {
                Value::Nil => None,
                value => Some(decode::bytes(value)?),
            });
        }
        Ok(Some((defaults, specs)))
    }

    pub async fn spec(&self, key: &JobKey) -> Result<Option<JobSpec>, QueueError> {
        let found = self.specs(&key.project, &key.batch, &[&key.job]).await?;
        Ok(found.and_then(|(defaults, mut specs)| {
            let spec = specs.pop().flatten()?;
            Some(JobSpec { spec, defaults })
        }))
    }

    pub async fn defaults(
        &self,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<Option<Bytes>, QueueError> {
        let found = self.specs(project, batch, &[]).await?;
        Ok(found.map(|(defaults, _)| defaults))
    }

    /// What the chunks of these batches with these numbers have to know.
    pub async fn intakes(
        &self,
        chunks: Vec<(ProjectId, BatchId, u32)>,
    ) -> Result<Vec<Option<Intake>>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.read_intakes);
        cmd.arg(chunks.len());
        for (project, batch, chunk) in &chunks {
            cmd.arg(encode::batch_name(project, batch)).arg(*chunk);
        }
        let generation = self.link.generation();
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        let mut rows = Vec::with_capacity(chunks.len());
        while !answer.is_empty() {
            let mut row = answer.list()?;
            rows.push(match row.is_empty() {
                true => None,
                false => Some((row.number()?, row.value()?, row.number()?)),
            });
        }
        let numbers = rows.iter().flatten().map(|(b, ..)| *b).collect();
        let batches = self.known_batches(numbers).await?;
        let intake = |row: Option<(u32, Value, u64)>| {
            let Some((b, digest, waiting)) = row else {
                return Ok(None);
            };
            // One that was purged in between is not there either.
            let Some(batch) = batches.get(&b) else {
                return Ok(None);
            };
            let is_known = digest != Value::BulkString(Vec::new());
            Ok(Some(Intake {
                defaults: batch.defaults.clone(),
                digest: is_known.then(|| decode::digest(digest)).transpose()?,
                waiting,
            }))
        };
        let intakes = rows.into_iter().map(intake);
        let intakes = intakes.collect::<Result<_, QueueError>>()?;
        self.link.unless_since(generation, intakes)
    }

    pub async fn chunk_digest(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        n: u32,
    ) -> Result<Option<[u8; 32]>, QueueError> {
        let name = encode::batch_name(project, batch);
        let number = redis::cmd("HGET").arg(self.key("bn")).arg(name).take();
        let Value::BulkString(b) = self.link.run(&number).await? else {
            return Ok(None);
        };
        let key = [self.key("bc:").into_bytes(), b].concat();
        match self.link.run(redis::cmd("HGET").arg(key).arg(n)).await? {
            Value::Nil => Ok(None),
            value => decode::digest(value).map(Some),
        }
    }

    pub async fn due_soon(&self, within: Duration) -> Result<BTreeMap<JobKind, u64>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.read_due);
        cmd.arg(u64::try_from(within.as_micros()).unwrap_or(u64::MAX))
            .arg(DUE_LOOK_MAX);
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        let mut due = BTreeMap::new();
        for kind in JobKind::ALL {
            match answer.number()? {
                0 => {}
                jobs => drop(due.insert(kind, jobs)),
            }
        }
        Ok(due)
    }

    pub async fn stats(&self) -> Result<QueueStats, QueueError> {
        let mut answer = Reader::of(self.link.run(&self.cmd(&SCRIPTS.read_stats)).await?)?;
        let now = answer.moment()?;
        let mut stats = QueueStats {
            lines: Vec::new(),
            batches_open: answer.number()?,
            stale_fences: answer.number()?,
            expired_leases: answer.number()?,
        };
        let mut lines = answer.list()?;
        let mut oldest: BTreeMap<usize, Timestamp> = BTreeMap::new();
        while !lines.is_empty() {
            let mut line = lines.list()?;
            let project = line.text()?;
            if line.len() == 2 {
                let kind = line.number()?;
                oldest.extend(line.moment_or_none()?.map(|since| (kind, since)));
                continue;
            }
            let project =
                ProjectId::new(project).map_err(|_| decode::unreadable("the name of a project"))?;
            stats.lines.extend(project_lines(
                &project,
                line.list()?,
                &std::mem::take(&mut oldest),
                now,
            )?);
        }
        stats
            .lines
            .sort_by(|a, b| (&a.project, a.kind).cmp(&(&b.project, b.kind)));
        Ok(stats)
    }
}

fn project_lines(
    project: &ProjectId,
    mut fields: Reader,
    oldest: &BTreeMap<usize, Timestamp>,
    now: Timestamp,
) -> Result<Vec<StatLine>, QueueError> {
    let mut counts = std::collections::HashMap::new();
    while !fields.is_empty() {
        counts.insert(fields.text()?, fields.value()?);
    }
    let mut lines = Vec::new();
    for (n, kind) in JobKind::ALL.into_iter().enumerate() {
        let counters = decode::counters(&mut counts, &n.to_string())?;
        if counters.total() > 0 {
            lines.push(StatLine {
                project: project.clone(),
                kind,
                counters,
                oldest_ready: oldest.get(&n).map(|since| now.since(*since)),
            });
        }
    }
    Ok(lines)
}

fn passes(detail: &JobDetail, filter: &JobFilter) -> bool {
    let job = &detail.job;
    (filter.states.is_empty() || filter.states.contains(&job.state.name()))
        && (filter.kinds.is_empty() || filter.kinds.contains(&job.kind))
        && filter
            .labels
            .iter()
            .all(|(key, value)| job.labels.get(key) == Some(value))
}
