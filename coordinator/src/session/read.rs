//! What a worker says, sorted into the inboxes of the loops that act on it.

use espalier_core::error::FieldError;
use espalier_core::id::{Fence, JobKey};
use espalier_core::queue::JobState;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_proto::v1::worker_message::Message as Said;
use espalier_runtime::worker::Serving;
use tokio::sync::mpsc;
use tonic::Streaming;

use super::renew::Numbered;
use super::{ENTRIES_MAX, Session, lease_from_wire, lock, manifest};
use crate::api::{queue_error, view};
use crate::endpoints;
use crate::questions::Asked;
use crate::queue::Renewal;

/// Most credit that a worker may pile up: more would be jobs that it cannot start for a long time.
const CREDIT_MAX: u32 = 100_000;

/// The ways to the other loops. Dropping them lets those end when they have done what is in them.
pub struct Inboxes {
    pub renewals: mpsc::Sender<Numbered>,
    pub results: mpsc::Sender<v1::Result>,
    pub reports: mpsc::Sender<manifest::Report>,
}

impl Session {
    /// Reads until the worker closes its side, the connection breaks or the stream is ended, and ends the stream.
    pub async fn read(&self, mut incoming: Streaming<v1::WorkerMessage>, inboxes: Inboxes) {
        let ended = &self.connected.ended;
        loop {
            let said = tokio::select! {
                said = incoming.message() => said,
                () = ended.cancelled() => break,
            };
            let taken = match said {
                Ok(Some(said)) => {
                    self.connected.heard(self.shared.now());
                    self.take(said, &inboxes).await
                }
                Ok(None) => break,
                Err(status) => {
                    tracing::info!(worker = %self.connected.worker, reason = status.message(), "stream broke");
                    break;
                }
            };
            if let Err(error) = taken {
                tracing::warn!(worker = %self.connected.worker, error = %error, "worker broke the protocol");
                let _ = self.connected.outbox().try_send(Err(error.into()));
                break;
            }
        }
        ended.cancel();
    }

    async fn take(&self, said: v1::WorkerMessage, inboxes: &Inboxes) -> Result<(), ApiError> {
        // A send into an inbox fails only when its loop has ended, and then the stream ends as well.
        match said.message {
            Some(Said::Credit(credit)) => self.add_credit(&credit)?,
            Some(Said::Renewals(renewals)) => {
                check_entries("renewals", renewals.renewals.len())?;
                for renewal in renewals.renewals {
                    let _ = inboxes.renewals.send(renewal_from_wire(renewal)?).await;
                }
            }
            Some(Said::Results(results)) => {
                check_entries("results", results.results.len())?;
                for result in results.results {
                    let _ = inboxes.results.send(result).await;
                }
            }
            Some(Said::Drain(v1::Drain {})) => self.shared.registry.drains(&self.connected),
            Some(Said::Ask(ask)) => self.ask(ask).await?,
            Some(Said::BadManifest(report)) => {
                let _ = inboxes
                    .reports
                    .send(manifest::Report::from_wire(&report)?)
                    .await;
            }
            Some(Said::Serving(serving)) => {
                let checked = Serving::from_wire(serving.clone()).check();
                checked.map_err(|error| error.under("serving"))?;
                self.serves(serving);
            }
            Some(Said::Hello(_)) => {
                let rule = "must come once, at the beginning";
                return Err(FieldError::new("hello", "a second one", rule).into());
            }
            // A message of a later version: what it asks for is not known here.
            None => {}
        }
        Ok(())
    }

    fn serves(&self, serving: v1::Serving) {
        if !endpoints::is_told(&serving, &self.shared.config.worker_key_names) {
            tracing::warn!(
                worker = %self.connected.worker,
                api_key_name = serving.api_key_name,
                "a worker serves models under a key that is not among `worker_key_names`: nobody is told of it"
            );
        }
        self.shared.registry.serves(&self.connected, serving);
    }

    fn add_credit(&self, credit: &v1::Credit) -> Result<(), FieldError> {
        let kind = view::kind_from_wire(credit.kind).map_err(|e| e.under("credit"))?;
        if !self.connected.kinds.contains(&kind) {
            let rule = "must be a kind that Hello named";
            return Err(FieldError::new("credit.kind", kind, rule));
        }
        let mut all = lock(&self.credit);
        let left = all.entry(kind).or_default();
        *left = left.saturating_add(credit.jobs).min(CREDIT_MAX);
        self.connected.wake.notify_one();
        Ok(())
    }

    /// Keeps a question of the lease's holder; an answer that is known already goes back at once.
    async fn ask(&self, ask: v1::Ask) -> Result<(), ApiError> {
        let (key, fence) = lease_from_wire(ask.lease.as_ref()).map_err(|e| e.under("ask"))?;
        let question = ask.question.unwrap_or_default();
        let id = question.id.clone();
        let asked = if self.holds(&key, fence).await? {
            let worker = self.connected.worker.clone();
            let now = self.shared.now();
            self.shared.questions.ask(key, fence, worker, question, now)
        } else {
            Asked::Answered(false)
        };
        if let Asked::Answered(allow) = asked {
            self.send(Message::Answer(v1::Answer { id, allow })).await;
        }
        Ok(())
    }

    /// Whether the queue says that this worker holds the lease.
    pub async fn holds(&self, key: &JobKey, fence: Fence) -> Result<bool, ApiError> {
        let found = self.shared.queue.job(key.clone()).await;
        let found = found.map_err(queue_error)?;
        Ok(found.is_some_and(|detail| match &detail.job.state {
            JobState::Leased(lease) => {
                lease.fence == fence && lease.worker == self.connected.worker
            }
            _ => false,
        }))
    }
}

fn check_entries(field: &str, entries: usize) -> Result<(), FieldError> {
    if entries <= ENTRIES_MAX {
        return Ok(());
    }
    let rule = format!("must have at most {ENTRIES_MAX} entries");
    Err(FieldError::new(field, entries, rule))
}

fn renewal_from_wire(renewal: v1::Renewal) -> Result<Numbered, FieldError> {
    let (key, fence) = lease_from_wire(renewal.lease.as_ref()).map_err(|e| e.under("renewals"))?;
    Ok(Numbered {
        renewal: Renewal {
            key,
            fence,
            progress: (!renewal.progress.is_empty()).then_some(renewal.progress),
        },
        number: renewal.number,
    })
}
