//! Grants, renewals, and what time does: delayed jobs come due, leases run out.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::super::job::{self, Next};
use super::super::{
    AttemptError, DeadReason, Event, Grant, JobSeq, JobState, LEASE_REPEAT, Lease, LeaseRequest,
    ON_THE_WAY_MAX, PROGRESS_BYTES_MAX, Refusal, RenewReply, RevokeReason, Ticked,
};
use super::Machine;
use crate::error::ErrorClass;
use crate::id::{Fence, JobKey, WorkerId};
use crate::time::Timestamp;

/// Most lease requests that are remembered; the oldest go first. Half a minute of 1,600 requests a second.
const REPEATS_MAX: usize = 50_000;

/// What was granted to recent requests, in case a reply was lost. In memory only: after a restart a grant whose
/// reply was lost ends by its deadline.
#[derive(Clone, Debug, Default)]
pub(super) struct Repeats {
    granted: HashMap<(WorkerId, u64), Vec<(JobSeq, Fence)>>,
    /// Oldest first.
    forget_at: VecDeque<(Timestamp, WorkerId, u64)>,
}

impl Repeats {
    fn forget_old(&mut self, now: Timestamp) {
        while let Some((at, _, _)) = self.forget_at.front()
            && (*at <= now || self.forget_at.len() > REPEATS_MAX)
        {
            if let Some((_, worker, request)) = self.forget_at.pop_front() {
                self.granted.remove(&(worker, request));
            }
        }
    }

    fn remember(&mut self, now: Timestamp, request: &LeaseRequest, grants: &[Grant]) {
        if request.request == 0 || grants.is_empty() {
            return;
        }
        let granted = grants.iter().map(|g| (g.seq, g.fence)).collect();
        let key = (request.worker.clone(), request.request);
        self.granted.insert(key, granted);
        self.forget_at
            .push_back((now + LEASE_REPEAT, request.worker.clone(), request.request));
    }
}

impl Machine {
    /// Grants up to `n` ready jobs of one kind to a worker, with a new fence each.
    pub fn lease(&mut self, now: Timestamp, request: &LeaseRequest) -> Result<Vec<Grant>, Refusal> {
        let now = self.advance(now);
        let ttl = request.check()?;
        self.repeats.forget_old(now);
        let asked_before = (request.worker.clone(), request.request);
        if let Some(granted) = self.repeats.granted.get(&asked_before) {
            let still = granted.iter();
            return Ok(still.filter_map(|(j, f)| self.grant_view(*j, *f)).collect());
        }
        self.reap(ON_THE_WAY_MAX);
        self.promote(ON_THE_WAY_MAX);
        let lanes = self.lanes.open_to(request.kind, &request.offers);
        let mut grants = Vec::new();
        while grants.len() < request.n as usize {
            let Some((project, seq)) = self.ready.next(request.kind, &lanes) else {
                break;
            };
            let weight = self.weight(project);
            self.ready.charge(request.kind, project, weight);
            let fence = self.grant(seq, &request.worker, ttl);
            grants.extend(self.grant_view(seq, fence));
        }
        self.repeats.remember(now, request, &grants);
        Ok(grants)
    }

    /// Prolongs a lease. `progress` replaces what the worker last said, if it says something.
    pub fn renew(
        &mut self,
        now: Timestamp,
        key: &JobKey,
        fence: Fence,
        progress: Option<&str>,
    ) -> RenewReply {
        let now = self.advance(now);
        let Some(seq) = self.find_job(key) else {
            return RenewReply::Lost;
        };
        let Some(job) = self.jobs.get_mut(&seq) else {
            return RenewReply::Lost;
        };
        let JobState::Leased(lease) = &mut job.state else {
            return RenewReply::Lost;
        };
        if lease.fence != fence || lease.deadline <= now {
            return RenewReply::Lost;
        }
        if let Some(text) = progress {
            let end = text.floor_char_boundary(PROGRESS_BYTES_MAX);
            lease.progress = Some(text[..end].into());
        }
        self.deadlines.remove(&(lease.deadline, seq));
        lease.deadline = lease.renewed(now).max(lease.deadline);
        self.deadlines.insert((lease.deadline, seq));
        RenewReply::Held {
            deadline: lease.deadline,
            cancel_requested: lease.cancel_requested,
        }
    }

    /// Promotes due jobs and ends expired leases, at most `limit` of each.
    pub fn tick(&mut self, now: Timestamp, limit: usize) -> Ticked {
        self.advance(now);
        let reaped = self.reap(limit);
        let promoted = self.promote(limit);
        Ticked {
            promoted: promoted as u64,
            reaped: reaped as u64,
            more: reaped == limit || promoted == limit,
        }
    }

    /// The next moment at which [`Machine::tick`] has something to do.
    pub fn next_due(&self) -> Option<Timestamp> {
        let delayed = self.delayed.first().map(|(at, _)| *at);
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        delayed.into_iter().chain(deadline).min()
    }

    /// Prolongs every lease by the length of an outage during which nobody could renew.
    pub fn extend_leases(&mut self, by: Duration) {
        self.move_deadlines(|lease| {
            lease.run_until = lease.run_until.map(|end| end + by);
            lease.deadline = lease.deadline + by;
        });
    }

    /// Gives every lease a full term from `now`: after a restart nobody knows how long nobody could renew.
    pub fn refresh_leases(&mut self, now: Timestamp) {
        let now = self.advance(now);
        self.move_deadlines(|lease| {
            let full = now + Duration::from_micros(lease.ttl_us);
            lease.run_until = lease.run_until.map(|end| end.max(full));
            lease.deadline = lease.deadline.max(full);
        });
    }

    fn move_deadlines(&mut self, change: impl Fn(&mut Lease)) {
        let leased: Vec<_> = std::mem::take(&mut self.deadlines).into_iter().collect();
        for (_, seq) in leased {
            if let Some(job) = self.jobs.get_mut(&seq)
                && let JobState::Leased(lease) = &mut job.state
            {
                change(lease);
                self.deadlines.insert((lease.deadline, seq));
            }
        }
    }

    fn grant(&mut self, seq: JobSeq, worker: &WorkerId, ttl: Duration) -> Fence {
        let now = self.now;
        let fence = Fence((self.last_fence.0 + 1).max(now.0));
        self.last_fence = fence;
        self.dirty.meta = true;
        let Some(job) = self.jobs.get_mut(&seq) else {
            return fence;
        };
        job.starts += 1;
        let max_runtime = Duration::from_micros(job.max_runtime_us);
        let mut lease = Lease {
            worker: worker.clone(),
            fence,
            granted_at: now,
            deadline: now,
            ttl_us: ttl.as_micros() as u64,
            run_until: (job.max_runtime_us > 0).then(|| now + max_runtime),
            ready_since: job.changed_at,
            cancel_requested: false,
            progress: None,
        };
        lease.deadline = lease.renewed(now);
        self.set_state(seq, JobState::Leased(Box::new(lease)));
        fence
    }

    /// The grant of `fence`, if that is the job's lease.
    fn grant_view(&self, seq: JobSeq, fence: Fence) -> Option<Grant> {
        let job = self.jobs.get(&seq)?;
        let lease = job.lease().filter(|lease| lease.fence == fence)?;
        let rare = job.rare.as_ref();
        Some(Grant {
            key: self.key_of(job),
            seq,
            batch_seq: job.batch,
            kind: job.kind,
            fence,
            attempt: job.starts,
            deadline: lease.deadline,
            run_until: lease.run_until,
            submitted_at: job.submitted_at,
            ready_since: lease.ready_since,
            labels: rare.map(|rare| rare.labels.clone()).unwrap_or_default(),
            traceparent: rare.and_then(|rare| rare.traceparent.clone()),
        })
    }

    fn promote(&mut self, limit: usize) -> usize {
        let mut promoted = 0;
        while promoted < limit
            && let Some((until, seq)) = self.delayed.first().copied()
            && until <= self.now
        {
            self.set_state(seq, JobState::Ready);
            promoted += 1;
        }
        promoted
    }

    fn reap(&mut self, limit: usize) -> usize {
        let mut reaped = 0;
        while reaped < limit
            && let Some((deadline, seq)) = self.deadlines.first().copied()
            && deadline <= self.now
        {
            self.revoke(seq);
            reaped += 1;
        }
        self.settle_dependents();
        reaped
    }

    /// Ends the lease of `seq`, whose deadline has passed.
    fn revoke(&mut self, seq: JobSeq) {
        let now = self.now;
        let Some((job, lease)) = self
            .jobs
            .get(&seq)
            .and_then(|job| Some((job, job.lease()?)))
        else {
            return;
        };
        let (fence, worker) = (lease.fence, lease.worker.clone());
        let too_long = lease.run_until.is_some_and(|end| end <= now);
        let (class, reason, message) = if too_long {
            let ran_ms = job.max_runtime_us / 1_000;
            let message = format!("ran longer than `max_runtime`, {ran_ms} ms");
            (ErrorClass::Handler, RevokeReason::RanTooLong, message)
        } else {
            self.expired_leases += 1;
            let message = format!("lease of worker {worker} expired");
            (ErrorClass::Infra, RevokeReason::Expired, message)
        };
        let key = self.key_of(job);
        self.events.push(Event::Revoked {
            worker,
            key,
            fence,
            reason,
        });
        self.fail(seq, fence, AttemptError::new(class, &message, ""), None);
    }

    /// What a failed attempt makes of its job. The caller settles dependents.
    pub(super) fn fail(
        &mut self,
        seq: JobSeq,
        fence: Fence,
        error: AttemptError,
        retry_after: Option<Duration>,
    ) {
        let now = self.now;
        let Some(job) = self.jobs.get_mut(&seq) else {
            return;
        };
        let cancel_requested = job.lease().is_some_and(|lease| lease.cancel_requested);
        let next = if cancel_requested {
            Next::Cancelled
        } else {
            // The fence is unlike any other's, so that jobs which failed together do not return together.
            job::after_failure(&mut job.budgets, error.class, retry_after, fence.0)
        };
        if !matches!(error.class, ErrorClass::Preempted) {
            job.set_error(error);
        }
        match next {
            Next::Ready => self.set_state(seq, JobState::Ready),
            Next::RetryAfter(wait) => self.set_state(seq, JobState::Delayed { until: now + wait }),
            Next::Dead(reason) => self.end(seq, |end| JobState::Dead { end, reason }),
            Next::Cancelled => self.end(seq, JobState::Cancelled),
        }
    }

    /// Whether a job is dead only because of what it depends on.
    pub(super) fn died_of_dependency(&self, seq: JobSeq) -> bool {
        matches!(
            self.jobs.get(&seq).map(|job| &job.state),
            Some(JobState::Dead {
                reason: DeadReason::Dependency,
                ..
            })
        )
    }
}
