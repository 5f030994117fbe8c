//! Finishing: results become ends of attempts, many in one call, and each is acknowledged with the queue's verdict.

use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_proto::convert::class_from_wire;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_proto::v1::result::Outcome as Said;
use espalier_proto::v1::result_ack::Verdict;
use espalier_runtime::tasks;
use prost::Message as _;
use std::time::Duration;
use tokio::sync::mpsc;

use super::{ENTRIES_MAX, QUEUE_BACKOFF, Session, counts, history, lease_from_wire};
use crate::api::door::{Admitted, Door, in_clients_terms};
use crate::api::{queue_error, view};
use crate::queue::{Finish, FinishAck, JobResult, Outcome, Submission};

/// Most jobs that one result may spawn, as the queue has it.
const SPAWN_MAX: usize = 1_000;

/// A result that is about to be finished.
struct Ending {
    finish: Finish,
    /// Why the worker's own outcome was not taken; the attempt fails instead.
    refused: Option<String>,
}

impl Session {
    /// Finishes until the inbox is closed and empty: what a worker said before it went still counts.
    pub async fn finish(&self, mut inbox: mpsc::Receiver<v1::Result>) {
        let mut waiting = Vec::new();
        while inbox.recv_many(&mut waiting, ENTRIES_MAX).await > 0 {
            let Some(acks) = self.finish_all(std::mem::take(&mut waiting)).await else {
                return;
            };
            // A worker that has gone hears the same when it sends the results again.
            self.send(Message::ResultAcks(v1::ResultAcks { acks }))
                .await;
        }
    }

    /// One acknowledgement for each result; none: the queue is away and the stream has ended.
    async fn finish_all(&self, results: Vec<v1::Result>) -> Option<Vec<v1::ResultAck>> {
        let mut acks = Vec::with_capacity(results.len());
        let mut endings = Vec::with_capacity(results.len());
        for result in results {
            match self.ending(result.clone()).await? {
                Ok(ending) => endings.push(ending),
                // Without a lease that can be read there is no attempt to end.
                Err(error) => acks.push(ack(
                    result.lease.unwrap_or_default(),
                    Verdict::Refused,
                    error.to_string(),
                )),
            }
        }
        let finishes = endings.iter().map(|ending| ending.finish.clone()).collect();
        let replies = self.ask_to_finish(finishes).await?;
        let mut refused = Vec::new();
        for (ending, reply) in endings.into_iter().zip(replies) {
            match reply {
                FinishAck::Refused(error) => {
                    refused.push(ending.fail(&in_clients_terms(error).to_string()));
                }
                reply => acks.push(self.acknowledge(ending, &reply)),
            }
        }
        if !refused.is_empty() {
            let finishes = refused.iter().map(|ending| ending.finish.clone()).collect();
            let replies = self.ask_to_finish(finishes).await?;
            let both = refused.into_iter().zip(replies);
            acks.extend(both.map(|(ending, reply)| self.acknowledge(ending, &reply)));
        }
        Some(acks)
    }

    /// Asks until the queue answers; none: the stream has ended, and the worker will say it again.
    async fn ask_to_finish(&self, finishes: Vec<Finish>) -> Option<Vec<FinishAck>> {
        if finishes.is_empty() {
            return Some(Vec::new());
        }
        let mut failures = 0;
        loop {
            match self.shared.queue.finish(finishes.clone()).await {
                Ok(acks) => {
                    history::finished(&self.connected.worker, &finishes, &acks);
                    return Some(acks);
                }
                Err(error) => tracing::warn!(error = %error, "results cannot be stored now"),
            }
            failures += 1;
            self.pause(failures).await?;
        }
    }

    /// Waits before the next try; none: the stream has ended.
    async fn pause(&self, failures: u32) -> Option<()> {
        tokio::select! {
            () = tokio::time::sleep(QUEUE_BACKOFF.jittered(failures)) => Some(()),
            () = self.connected.ended.cancelled() => None,
        }
    }

    /// What is to be stored of a result. The outer none: the stream has ended.
    async fn ending(&self, result: v1::Result) -> Option<Result<Ending, FieldError>> {
        let (key, fence) = match lease_from_wire(result.lease.as_ref()) {
            Ok(lease) => lease,
            Err(error) => return Some(Err(error)),
        };
        let outcome = match result.outcome {
            Some(Said::Success(success)) => self.success(&key, fence, success).await?,
            Some(Said::Failure(failure)) => Ok(failed(failure)),
            Some(Said::Released(released)) => {
                tracing::debug!(job = %key, reason = released.reason, "lease released");
                Ok(Outcome::Released)
            }
            None => Err(FieldError::new("outcome", "nothing", "must be given")),
        };
        let ending = |outcome| Ending {
            finish: Finish {
                key,
                fence,
                outcome,
            },
            refused: None,
        };
        Some(Ok(match outcome {
            Ok(outcome) => ending(outcome),
            Err(error) => ending(Outcome::Released).fail(&error.to_string()),
        }))
    }

    async fn success(
        &self,
        key: &JobKey,
        fence: Fence,
        success: v1::Success,
    ) -> Option<Result<Outcome, FieldError>> {
        let manifest = layout::manifest(key);
        if success.manifest != manifest {
            let rule = format!("must be {manifest}");
            return Some(Err(FieldError::new("manifest", success.manifest, rule)));
        }
        let summary = match view::stored_summary(success.summary.unwrap_or_default()) {
            Ok(summary) => summary,
            Err(error) => return Some(Err(error)),
        };
        let spawn = if success.spawn.is_empty() {
            Ok(Vec::new())
        } else {
            self.spawned(key, fence, success.spawn).await?
        };
        Some(spawn.map(|spawn| Outcome::Succeeded {
            result: JobResult { summary, manifest },
            spawn,
        }))
    }

    /// Spawned jobs come through the same door as submitted ones. Tries until the queue and the store answer.
    async fn spawned(
        &self,
        key: &JobKey,
        fence: Fence,
        specs: Vec<bytes::Bytes>,
    ) -> Option<Result<Vec<Submission>, FieldError>> {
        let mut failures = 0;
        loop {
            match self.try_spawn(key, fence, specs.clone()).await {
                Ok(spawned) => return Some(spawned),
                Err(error) => {
                    tracing::warn!(job = %key, error = %error, "spawned jobs cannot be taken now")
                }
            }
            failures += 1;
            self.pause(failures).await?;
        }
    }

    async fn try_spawn(
        &self,
        key: &JobKey,
        fence: Fence,
        specs: Vec<bytes::Bytes>,
    ) -> Result<Result<Vec<Submission>, FieldError>, ApiError> {
        let (project, batch) = (key.project.clone(), key.batch.clone());
        let found = self.shared.queue.defaults(project.clone(), batch.clone());
        let Some(defaults) = found.await.map_err(queue_error)? else {
            // The batch was forgotten: the finish will find the same.
            return Ok(Ok(Vec::new()));
        };
        let door = Door::open(&self.shared, project, batch, defaults, None).await?;
        let work = move || {
            let checked = check_spawned(&door, fence, &specs);
            (door, checked)
        };
        let checked = tasks::blocking("session.spawn", work).await;
        let (door, checked) = checked.map_err(crate::api::blocking_error)?;
        let mut admitted = match checked {
            Ok(admitted) => admitted,
            Err(error) => return Ok(Err(error)),
        };
        let stored = door.store_blobs(&self.shared.store, &mut admitted).await;
        stored.map_err(|error| ApiError::Unavailable(error.to_string()))?;
        Ok(Ok(admitted.into_iter().map(|a| a.submission).collect()))
    }

    fn acknowledge(&self, ending: Ending, reply: &FinishAck) -> v1::ResultAck {
        let Finish {
            key,
            fence,
            outcome,
        } = ending.finish;
        self.connected.stopped(&key, fence);
        self.shared.questions.forget(&key);
        let lease = view::lease(&key, fence);
        match (reply, ending.refused) {
            (FinishAck::Stale, _) => {
                super::count_stale(&key);
                ack(lease, Verdict::Stale, String::new())
            }
            (FinishAck::Refused(error), _) => ack(lease, Verdict::Refused, error.to_string()),
            (FinishAck::Accepted | FinishAck::AlreadyFinished, refused) => {
                if *reply == FinishAck::Accepted {
                    self.count_finish(&key, &outcome);
                }
                match refused {
                    Some(reason) => ack(lease, Verdict::Refused, reason),
                    None => ack(lease, Verdict::Accepted, String::new()),
                }
            }
        }
    }
}

impl Ending {
    /// The same attempt as a failure: what the worker said can never be accepted.
    fn fail(mut self, reason: &str) -> Self {
        self.finish.outcome = Outcome::Failed {
            class: ErrorClass::Handler,
            message: format!("the result was refused: {reason}"),
            log_tail: String::new(),
            retry_after: None,
        };
        self.refused = Some(reason.to_owned());
        self
    }
}

/// Every spawned job, or the first rule that one of them breaks. Ids derive from the fence, which no other attempt
/// has, so that the same result names the same jobs.
fn check_spawned(
    door: &Door,
    fence: Fence,
    specs: &[bytes::Bytes],
) -> Result<Vec<Admitted>, FieldError> {
    if specs.len() > SPAWN_MAX {
        let rule = format!("must have at most {SPAWN_MAX} entries");
        return Err(FieldError::new("spawn", specs.len(), rule));
    }
    let one = |(i, bytes): (usize, &bytes::Bytes)| {
        let place = format!("spawn[{i}]");
        let spec = v1::JobSpec::decode(bytes.clone()).map_err(|error| {
            FieldError::new(&place, "", format!("must be an encoded JobSpec: {error}"))
        })?;
        door.check(&spec, &format!("s{fence}-{i:04}"))
            .map_err(|errors| {
                let first = errors.into_iter().next();
                first.map_or_else(
                    || FieldError::new(&place, "", "must be a valid job"),
                    |error| error.under(&place),
                )
            })
    };
    specs.iter().enumerate().map(one).collect()
}

fn failed(failure: v1::Failure) -> Outcome {
    let error = failure.error.unwrap_or_default();
    let class = class_from_wire(error.class());
    let retry_after =
        (failure.retry_after_ms > 0).then(|| Duration::from_millis(failure.retry_after_ms));
    Outcome::Failed {
        class,
        message: error.message,
        log_tail: error.log_tail,
        retry_after,
    }
}

fn ack(lease: v1::Lease, verdict: Verdict, reason: String) -> v1::ResultAck {
    v1::ResultAck {
        lease: Some(lease),
        verdict: verdict.into(),
        reason,
    }
}

impl Session {
    fn count_finish(&self, key: &JobKey, outcome: &Outcome) {
        // Our own workers have a session for each kind of job. Of one that takes several here, none is told.
        let kinds = &self.connected.kinds;
        let kind = kinds.first().filter(|_| kinds.len() == 1);
        counts::finished(key, kind.map_or("", |kind| kind.as_str()), outcome);
    }
}
