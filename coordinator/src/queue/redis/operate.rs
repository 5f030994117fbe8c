//! What operators and the coordinator's own tasks ask for. What concerns a whole batch goes page by page, so that no
//! script holds the server for long.

use std::time::Duration;

use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::queue::{Cancelled, JobFilter, Refusal, Selector, StateName, Ticked};
use espalier_core::time::Timestamp;
use redis::{Cmd, Script};

use super::core::Core;
use super::decode::{self, Reader};
use super::encode;
use super::script::SCRIPTS;
use crate::queue::{PAGE_MAX, QueueError};

/// Jobs of one call.
const CALL_JOBS_MAX: usize = 500;

impl Core {
    pub async fn cancel(&self, which: &Selector) -> Result<Cancelled, QueueError> {
        if let Selector::Batch(project, batch) = which {
            // First of all, so that what arrives from now on is cancelled on arrival.
            self.close_batch(project, batch, true).await?;
        }
        let open = |state: StateName| !state.is_terminal();
        let mut done = Cancelled::default();
        let mut pages = Pages::of(which);
        while let Some(jobs) = pages.next(self, open).await? {
            let mut answer = self.for_each(&SCRIPTS.cancel, &jobs).await?;
            done.cancelled += answer.number::<u64>()?;
            done.requested += answer.number::<u64>()?;
            pages.check_known(answer.number()?)?;
        }
        Ok(done)
    }

    pub async fn requeue_dead(&self, which: &Selector) -> Result<u64, QueueError> {
        let mut back = 0;
        let mut pages = Pages::of(which);
        while let Some(jobs) = pages.next(self, |state| state == StateName::Dead).await? {
            let mut answer = self.for_each(&SCRIPTS.requeue, &jobs).await?;
            back += answer.number::<u64>()?;
            pages.check_known(answer.number()?)?;
        }
        Ok(back)
    }

    async fn for_each(&self, script: &Script, jobs: &[JobKey]) -> Result<Reader, QueueError> {
        let mut cmd = self.cmd(script);
        cmd.arg(jobs.len());
        for key in jobs {
            cmd.arg(encode::batch_of(key)).arg(key.job.as_str());
        }
        Reader::of(self.link.write(&cmd).await?)
    }

    pub async fn tick(&self, limit: usize) -> Result<Ticked, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.tick);
        cmd.arg(limit.min(PAGE_MAX));
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        Ok(Ticked {
            promoted: answer.number()?,
            reaped: answer.number()?,
            more: answer.number::<u8>()? == 1,
        })
    }

    pub async fn extend_leases(&self, by: Duration) -> Result<(), QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.extend_leases);
        cmd.arg(u64::try_from(by.as_micros()).unwrap_or(u64::MAX));
        self.link.write(&cmd).await.map(drop)
    }

    /// Takes the names of old batches away, then empties them. One whose emptying was broken off is found again.
    pub async fn purge(
        &self,
        older_than: Duration,
        limit: usize,
    ) -> Result<Vec<(ProjectId, BatchId)>, QueueError> {
        let age_us = u64::try_from(older_than.as_micros()).unwrap_or(u64::MAX);
        let before = Timestamp(self.now().await?.0.saturating_sub(age_us));
        let mut names = Reader::of(
            self.link
                .write(&self.purge_step("name", before, limit))
                .await?,
        )?;
        let mut gone = Vec::with_capacity(names.len());
        while !names.is_empty() {
            gone.push(decode::batch_name(&names.text()?)?);
        }
        let empty = self.purge_step("empty", before, CALL_JOBS_MAX);
        while !Reader::of(self.link.write(&empty).await?)?.is_empty() {}
        Ok(gone)
    }

    fn purge_step(&self, step: &str, before: Timestamp, limit: usize) -> Cmd {
        let mut cmd = self.cmd(&SCRIPTS.purge);
        cmd.arg(step).arg(before.0).arg(limit.min(PAGE_MAX));
        cmd
    }

    /// The server's time.
    async fn now(&self) -> Result<Timestamp, QueueError> {
        if let Some(clock) = &self.clock {
            return Ok(clock.now());
        }
        let mut parts = Reader::of(self.link.run(&redis::cmd("TIME")).await?)?;
        let (seconds, micros): (u64, u64) = (parts.number()?, parts.number()?);
        Ok(Timestamp(seconds * 1_000_000 + micros))
    }
}

/// The jobs that a selector means, some at a time.
enum Pages {
    /// One job, which must be known.
    One(Option<JobKey>, JobKey),
    /// The rest of some batches of a project: the present one with the job to go on after, then those behind it.
    Many {
        project: ProjectId,
        filter: JobFilter,
        batch: Option<BatchId>,
        after: Option<JobId>,
        /// Whether other batches follow.
        all: bool,
    },
}

impl Pages {
    fn of(which: &Selector) -> Self {
        match which {
            Selector::Job(key) => Self::One(Some(key.clone()), key.clone()),
            Selector::Batch(project, batch) => Self::Many {
                project: project.clone(),
                filter: JobFilter::default(),
                batch: Some(batch.clone()),
                after: None,
                all: false,
            },
            Selector::Label {
                project,
                key,
                value,
            } => Self::Many {
                project: project.clone(),
                filter: JobFilter {
                    labels: [(key.clone(), value.clone())].into(),
                    ..JobFilter::default()
                },
                batch: None,
                after: None,
                all: true,
            },
        }
    }

    /// The next jobs in a state that `wanted` lets through; none: that was all.
    async fn next(
        &mut self,
        core: &Core,
        wanted: impl Fn(StateName) -> bool,
    ) -> Result<Option<Vec<JobKey>>, QueueError> {
        let (project, filter, batch, after, all) = match self {
            Self::One(job, _) => return Ok(job.take().map(|job| vec![job])),
            Self::Many {
                project,
                filter,
                batch,
                after,
                all,
            } => (project, filter, batch, after, all),
        };
        filter.states = StateName::ALL
            .into_iter()
            .filter(|state| wanted(*state))
            .collect();
        loop {
            let Some(present) = batch.clone() else {
                if !*all {
                    return Ok(None);
                }
                *batch = core
                    .batches(project, None, 1)
                    .await?
                    .pop()
                    .map(|first| first.batch);
                if batch.is_none() {
                    return Ok(None);
                }
                continue;
            };
            let jobs = core
                .jobs(project, &present, filter, after.as_ref(), CALL_JOBS_MAX)
                .await?;
            if let Some(last) = jobs.last() {
                *after = Some(last.job.key.job.clone());
                return Ok(Some(
                    jobs.into_iter().map(|detail| detail.job.key).collect(),
                ));
            }
            *after = None;
            *batch = match *all {
                true => core
                    .batches(project, Some(&present), 1)
                    .await?
                    .pop()
                    .map(|next| next.batch),
                false => None,
            };
            if batch.is_none() {
                *all = false;
            }
        }
    }

    /// A job that was named must be there.
    fn check_known(&self, known: u64) -> Result<(), QueueError> {
        match self {
            Self::One(_, key) if known == 0 => Err(Refusal::UnknownJob(key.clone()).into()),
            _ => Ok(()),
        }
    }
}
