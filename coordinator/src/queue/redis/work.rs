//! What workers ask for: grants, renewals, ends of attempts.

use std::collections::BTreeSet;

use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::id::{Fence, JobId, JobKey};
use espalier_core::queue::{
    AttemptError, BatchSeq, Grant, ItemResult, JobSeq, LeaseRequest, NewJob, PROGRESS_BYTES_MAX,
    Plan, RenewReply, SPAWN_MAX,
};
use espalier_core::time::Timestamp;
use redis::Cmd;

use super::core::Core;
use super::decode::{self, Reader};
use super::encode;
use super::script::SCRIPTS;
use super::submit::refusal_of;
use crate::queue::limits::{check_result, parted};
use crate::queue::{
    Finish, FinishAck, Granted, JobResult, Outcome, QueueError, Renewal, Submission,
};

/// How often a lease request meets lanes that have changed since they were read, before it is left to the next one.
const LANES_TRIES_MAX: usize = 5;

impl Core {
    pub async fn lease(&self, request: &LeaseRequest) -> Result<Vec<Granted>, QueueError> {
        let ttl = request.check()?;
        let generation = self.link.generation();
        for _ in 0..LANES_TRIES_MAX {
            let lanes = self.lanes();
            let open = lanes.open_to(request.kind, &request.offers);
            let mut cmd = self.cmd(&SCRIPTS.lease);
            cmd.arg(request.worker.as_str());
            match request.request {
                0 => cmd.arg(""),
                n => cmd.arg(n),
            };
            cmd.arg(encode::kind(request.kind))
                .arg(request.n)
                .arg(ttl.as_micros() as u64);
            cmd.arg(&lanes.version).arg(open.len()).arg(open);
            let mut answer = Reader::of(self.link.write(&cmd).await?)?;
            if answer.text()? == lanes.version {
                let granted = self.granted(answer.list()?).await?;
                return self.link.unless_since(generation, granted);
            }
            self.read_lanes().await?;
        }
        Ok(Vec::new())
    }

    async fn granted(&self, mut list: Reader) -> Result<Vec<Granted>, QueueError> {
        let mut rows = Vec::with_capacity(list.len());
        let mut numbers = BTreeSet::new();
        while !list.is_empty() {
            let mut row = list.list()?;
            let b: u32 = row.number()?;
            numbers.insert(b);
            rows.push((b, row));
        }
        let batches = self.known_batches(numbers).await?;
        let mut granted = Vec::with_capacity(rows.len());
        for (b, mut row) in rows {
            // A batch is not purged while one of its jobs is leased.
            let batch = batches
                .get(&b)
                .ok_or_else(|| decode::unreadable("a grant of a batch that is gone"))?;
            let kind = decode::kind(row.number()?)?;
            let id =
                JobId::new(row.text()?).map_err(|_| decode::unreadable("the name of a job"))?;
            let grant = Grant {
                key: JobKey::new(batch.project.clone(), batch.batch.clone(), id),
                batch_seq: BatchSeq(b),
                kind,
                seq: JobSeq(row.number()?),
                fence: Fence(row.number()?),
                attempt: row.number()?,
                deadline: row.moment()?,
                run_until: row.moment_or_none()?,
                submitted_at: row.moment()?,
                ready_since: row.moment()?,
                labels: decode::labels(&row.text()?)?,
                traceparent: Some(row.text()?).filter(|text| !text.is_empty()),
            };
            granted.push(Granted {
                grant,
                spec: row.bytes()?,
                defaults: batch.defaults.clone(),
            });
        }
        Ok(granted)
    }

    pub async fn renew(&self, renewals: Vec<Renewal>) -> Result<Vec<RenewReply>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.renew);
        cmd.arg(renewals.len());
        for renewal in &renewals {
            let progress = renewal.progress.as_deref().unwrap_or_default();
            let end = progress.floor_char_boundary(PROGRESS_BYTES_MAX);
            push_lease(&mut cmd, &renewal.key, renewal.fence);
            cmd.arg(&progress[..end]);
        }
        let mut answer = Reader::of(self.link.run(&cmd).await?)?;
        let mut replies = Vec::with_capacity(renewals.len());
        while !answer.is_empty() {
            let mut reply = answer.list()?;
            replies.push(match reply.is_empty() {
                true => RenewReply::Lost,
                false => RenewReply::Held {
                    deadline: Timestamp(reply.number()?),
                    cancel_requested: reply.number::<u8>()? == 1,
                },
            });
        }
        Ok(replies)
    }

    pub async fn finish(&self, finishes: Vec<Finish>) -> Result<Vec<FinishAck>, QueueError> {
        let mut cmd = self.cmd(&SCRIPTS.finish);
        let mut endings = Vec::with_capacity(finishes.len());
        for finish in finishes {
            endings.push(self.prepared(finish).await?);
        }
        cmd.arg(endings.len());
        for ending in &endings {
            ending.push(&mut cmd);
        }
        let mut answer = Reader::of(self.link.write(&cmd).await?)?;
        let acks = endings
            .into_iter()
            .map(|ending| ending.ack(answer.value()?));
        acks.collect()
    }

    /// Checks what can be checked here. What is refused goes to the server all the same: whether the lease holds is
    /// said first.
    async fn prepared(&self, finish: Finish) -> Result<Ending, QueueError> {
        let mut ending = Ending {
            key: finish.key,
            fence: finish.fence,
            how: "released",
            failure: Vec::new(),
            wait_us: 0,
            result: Vec::new(),
            spawn: None,
            refused: None,
        };
        match finish.outcome {
            Outcome::Released => {}
            Outcome::Failed {
                class,
                message,
                log_tail,
                retry_after,
            } => {
                let error = AttemptError::new(class, &message, &log_tail);
                ending.how = ErrorClass::as_str(class);
                ending.failure = serde_json::to_vec(&error).unwrap_or_default();
                let wait_us = retry_after.unwrap_or_default().as_micros();
                ending.wait_us = u64::try_from(wait_us).unwrap_or(u64::MAX).min(WAIT_US_MAX);
            }
            Outcome::Succeeded { result, spawn } => {
                ending.how = "ok";
                let succeeding = self.succeeding(&ending.key, &result, spawn).await?;
                match succeeding {
                    Ok(spawn) => {
                        ending.spawn = spawn;
                        ending.result = encode::result(&result);
                    }
                    Err(error) => {
                        ending.how = "refused";
                        ending.refused = Some(error);
                    }
                }
            }
        }
        Ok(ending)
    }

    /// The inner error is the outcome's own.
    async fn succeeding(
        &self,
        parent: &JobKey,
        result: &JobResult,
        spawn: Vec<Submission>,
    ) -> Result<Result<Option<Spawn>, FieldError>, QueueError> {
        if let Err(error) = check_result(result) {
            return Ok(Err(error));
        }
        if spawn.is_empty() {
            return Ok(Ok(None));
        }
        Ok(self.spawning(parent, spawn).await?.map(Some))
    }

    async fn spawning(
        &self,
        parent: &JobKey,
        spawn: Vec<Submission>,
    ) -> Result<Result<Spawn, FieldError>, QueueError> {
        let (jobs, specs) = match parted("spawn", spawn) {
            Ok(parted) => parted,
            Err(error) => return Ok(Err(error)),
        };
        if jobs.len() > SPAWN_MAX {
            let rule = format!("must be at most {SPAWN_MAX} jobs");
            return Ok(Err(FieldError::new("spawn", jobs.len(), rule)));
        }
        let plan = self.plan(&parent.project, &parent.batch, &jobs).await?;
        let refused = plan
            .verdicts
            .iter()
            .enumerate()
            .find_map(|(n, verdict)| match verdict {
                ItemResult::Rejected(error) => Some(error.clone().under(&format!("spawn[{n}]"))),
                _ => None,
            });
        Ok(match refused {
            Some(error) => Err(error),
            None => Ok(Spawn { jobs, specs, plan }),
        })
    }
}

/// The longest wait that a script is told; it believes an hour at most.
const WAIT_US_MAX: u64 = 1 << 40;

/// Jobs that come with a finish.
struct Spawn {
    jobs: Vec<NewJob>,
    specs: Vec<bytes::Bytes>,
    plan: Plan<JobKey>,
}

/// The end of an attempt as the script takes it.
struct Ending {
    key: JobKey,
    fence: Fence,
    how: &'static str,
    failure: Vec<u8>,
    wait_us: u64,
    result: Vec<u8>,
    spawn: Option<Spawn>,
    /// Why it cannot be accepted, if the lease holds.
    refused: Option<FieldError>,
}

impl Ending {
    fn push(&self, cmd: &mut Cmd) {
        push_lease(cmd, &self.key, self.fence);
        cmd.arg(self.how)
            .arg(&self.failure)
            .arg(self.wait_us)
            .arg(&self.result);
        let Some(spawn) = &self.spawn else {
            cmd.arg(0);
            return;
        };
        cmd.arg(spawn.plan.order.len());
        for n in &spawn.plan.order {
            let deps = encode::dep_keys(
                &self.key.project,
                &self.key.batch,
                &spawn.jobs,
                &spawn.plan.deps[*n],
            );
            encode::push_job(cmd, *n, &spawn.jobs[*n], &spawn.specs[*n], &deps);
        }
    }

    fn ack(self, answer: redis::Value) -> Result<FinishAck, QueueError> {
        if let redis::Value::Array(_) = answer {
            let mut refused = Reader::of(answer)?;
            let (verdict, at) = (refused.number()?, refused.number::<usize>()?);
            let spawn = self
                .spawn
                .as_ref()
                .ok_or_else(|| decode::unreadable("a verdict on no job"))?;
            let n = at.checked_sub(1).and_then(|at| spawn.plan.order.get(at));
            let n = *n.ok_or_else(|| decode::unreadable("a verdict on no job"))?;
            let error = refusal_of(
                verdict,
                &self.key.project,
                &self.key.batch,
                &spawn.jobs,
                &spawn.plan,
                n,
            );
            return Ok(FinishAck::Refused(error.under(&format!("spawn[{n}]"))));
        }
        Ok(match decode::number::<i64>(answer)? {
            1 => FinishAck::Accepted,
            0 => FinishAck::AlreadyFinished,
            -2 => {
                let reason = self.refused;
                FinishAck::Refused(reason.ok_or_else(|| decode::unreadable("a verdict on no job"))?)
            }
            _ => FinishAck::Stale,
        })
    }
}

fn push_lease(cmd: &mut Cmd, key: &JobKey, fence: Fence) {
    cmd.arg(encode::batch_of(key))
        .arg(key.job.as_str())
        .arg(fence.0);
}
