//! The end of an attempt.

use super::super::{
    AttemptError, FinishReply, ItemResult, JobSeq, JobState, NewJob, Outcome, SPAWN_MAX,
};
use super::Machine;
use crate::error::{ErrorClass, FieldError};
use crate::id::{Fence, JobKey};
use crate::time::Timestamp;

impl Machine {
    /// Ends the attempt of `fence`. Accepted at most once, and only while that lease is the job's present one:
    /// a deadline that has passed costs nothing as long as nobody reaped the lease.
    pub fn finish(
        &mut self,
        now: Timestamp,
        key: &JobKey,
        fence: Fence,
        outcome: Outcome,
    ) -> FinishReply {
        self.advance(now);
        let Some(seq) = self.find_job(key) else {
            self.stale_fences += 1;
            return FinishReply::Stale;
        };
        let job = &self.jobs[&seq];
        if job.lease().is_none_or(|lease| lease.fence != fence) {
            if job.settled == fence && fence != Fence(0) {
                return FinishReply::AlreadyFinished;
            }
            self.stale_fences += 1;
            return FinishReply::Stale;
        }
        let spawned = match outcome {
            Outcome::Succeeded { spawn } => match self.succeed(seq, spawn) {
                Ok(spawned) => spawned,
                Err(error) => return FinishReply::SpawnRefused(error),
            },
            Outcome::Failed {
                class,
                message,
                log_tail,
                retry_after,
            } => {
                let error = AttemptError::new(class, &message, &log_tail);
                self.fail(seq, fence, error, retry_after);
                Vec::new()
            }
            Outcome::Released => {
                let error = AttemptError::new(ErrorClass::Preempted, "", "");
                self.fail(seq, fence, error, None);
                Vec::new()
            }
        };
        if let Some(job) = self.jobs.get_mut(&seq) {
            job.settled = fence;
        }
        self.settle_dependents();
        FinishReply::Accepted { seq, spawned }
    }

    /// The spawned jobs enter before their parent ends, so that the batch is not complete in between.
    fn succeed(
        &mut self,
        seq: JobSeq,
        spawn: Vec<NewJob>,
    ) -> Result<Vec<(usize, JobSeq)>, FieldError> {
        let mut spawned = Vec::new();
        if !spawn.is_empty() {
            spawned = self.spawn(seq, spawn)?;
        }
        self.end(seq, JobState::Succeeded);
        Ok(spawned)
    }

    fn spawn(
        &mut self,
        parent: JobSeq,
        spawn: Vec<NewJob>,
    ) -> Result<Vec<(usize, JobSeq)>, FieldError> {
        if spawn.len() > SPAWN_MAX {
            let rule = format!("must be at most {SPAWN_MAX} jobs");
            return Err(FieldError::new("spawn", spawn.len(), rule));
        }
        let batch = self.jobs[&parent].batch;
        let plan = self.plan(batch, &spawn);
        let refused = plan.verdicts.iter().enumerate().find_map(|(n, v)| match v {
            ItemResult::Rejected(error) => Some(error.clone().under(&format!("spawn[{n}]"))),
            _ => None,
        });
        match refused {
            Some(error) => Err(error),
            None => Ok(self.insert(batch, spawn, &plan)),
        }
    }
}
