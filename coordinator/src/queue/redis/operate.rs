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
        loop {
            let mut some_are_left = false;
            let mut pages = Pages::of(which);
            while let Some(jobs) = pages.next(self, |state| state == StateName::Dead).await? {
                let mut answer = self.for_each(&SCRIPTS.requeue, &jobs).await?;
                back += answer.number::<u64>()?;
                pages.check_known(answer.number()?)?;
                some_are_left |= answer.number::<u8>()? == 1;
            }
            if !some_are_left {
                return Ok(back);
            }
        }
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

    /// Looks at all open batches, some in each call.
    pub async fn close_idle(
        &self,
        idle_for: Duration,
        limit: usize,
    ) -> Result<Vec<(ProjectId, BatchId)>, QueueError> {
        let idle_us = u64::try_from(idle_for.as_micros()).unwrap_or(u64::MAX);
        let before = self.now().await?.0.saturating_sub(idle_us);
        let mut closed = Vec::new();
        let mut after = "-inf".to_owned();
        loop {
            let many = (limit - closed.len()).min(CALL_JOBS_MAX);
            if many == 0 {
                return Ok(closed);
            }
            let mut cmd = self.cmd(&SCRIPTS.close_idle);
            cmd.arg(before).arg(&after).arg(many);
            let mut answer = Reader::of(self.link.write(&cmd).await?)?;
            after = answer.text()?;
            let mut names = answer.list()?;
            while !names.is_empty() {
                closed.push(decode::batch_name(&names.text()?)?);
            }
            if after.is_empty() {
                return Ok(closed);
            }
        }
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

/// The jobs that a selector means, [`CALL_JOBS_MAX`] at a time.
enum Pages {
    /// One job, which must be known.
    One(Option<JobKey>, JobKey),
    /// Of some batches of a project.
    Many {
        project: ProjectId,
        filter: JobFilter,
        at: At,
    },
}

/// How far the pages have come.
enum At {
    /// One batch, behind the job of that name.
    Only(BatchId, Option<JobId>),
    /// All batches by name; of the present one, behind the job of that name.
    Each(BatchId, Option<JobId>),
    /// Before the batch that follows in the order of names.
    Behind(Option<BatchId>),
    End,
}

impl Pages {
    fn of(which: &Selector) -> Self {
        match which {
            Selector::Job(key) => Self::One(Some(key.clone()), key.clone()),
            Selector::Batch(project, batch) => Self::Many {
                project: project.clone(),
                filter: JobFilter::default(),
                at: At::Only(batch.clone(), None),
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
                at: At::Behind(None),
            },
        }
    }

    /// The next jobs in a state that `wanted` lets through, as many as one call takes; none: that was all.
    async fn next(
        &mut self,
        core: &Core,
        wanted: impl Fn(StateName) -> bool,
    ) -> Result<Option<Vec<JobKey>>, QueueError> {
        let (project, filter, at) = match self {
            Self::One(job, _) => return Ok(job.take().map(|job| vec![job])),
            Self::Many {
                project,
                filter,
                at,
            } => (project, filter, at),
        };
        let states = StateName::ALL.into_iter().filter(|state| wanted(*state));
        filter.states = states.collect();
        let mut page = Vec::new();
        while page.len() < CALL_JOBS_MAX {
            let (batch, after) = match at {
                At::Only(batch, after) | At::Each(batch, after) => (batch, after),
                At::Behind(last) => {
                    let mut next = core.batches(project, last.as_ref(), 1).await?;
                    *at = next
                        .pop()
                        .map_or(At::End, |next| At::Each(next.batch, None));
                    continue;
                }
                At::End => break,
            };
            let room = CALL_JOBS_MAX - page.len();
            let jobs = core.jobs(project, batch, filter, after.as_ref(), room);
            let jobs = jobs.await?;
            *after = jobs.last().map(|last| last.job.key.job.clone());
            if jobs.len() < room {
                *at = match at {
                    At::Each(batch, _) => At::Behind(Some(batch.clone())),
                    _ => At::End,
                };
            }
            page.extend(jobs.into_iter().map(|detail| detail.job.key));
        }
        Ok((!page.is_empty()).then_some(page))
    }

    /// A job that was named must be there.
    fn check_known(&self, known: u64) -> Result<(), QueueError> {
        match self {
            Self::One(_, key) if known == 0 => Err(Refusal::UnknownJob(key.clone()).into()),
            _ => Ok(()),
        }
    }
}
