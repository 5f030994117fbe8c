//! Renewing: signs of life of many jobs in one call, and what the queue says to them.

use espalier_core::queue::RenewReply;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use tokio::sync::mpsc;

use super::{ENTRIES_MAX, QUEUE_BACKOFF, Session};
use crate::api::view;
use crate::queue::Renewal;

/// A sign of life, and the worker's number of it, which goes back with the answer.
pub struct Numbered {
    pub renewal: Renewal,
    pub number: u64,
}

impl Session {
    /// Renews until the inbox is closed and empty, or the stream ends.
    pub async fn renew(&self, mut inbox: mpsc::Receiver<Numbered>) {
        let mut waiting = Vec::new();
        while inbox.recv_many(&mut waiting, ENTRIES_MAX).await > 0 {
            let renewals = std::mem::take(&mut waiting);
            let Some(replies) = self.ask_to_renew(&renewals).await else {
                return;
            };
            if !self.tell(renewals, replies).await {
                return;
            }
        }
    }

    /// Asks until the queue answers; none: the stream has ended, and with it the need.
    async fn ask_to_renew(&self, renewals: &[Numbered]) -> Option<Vec<RenewReply>> {
        let asked: Vec<Renewal> = renewals.iter().map(|one| one.renewal.clone()).collect();
        let mut failures = 0;
        loop {
            match self.shared.queue.renew(asked.clone()).await {
                Ok(replies) => return Some(replies),
                Err(error) => tracing::warn!(error = %error, "leases cannot be renewed now"),
            }
            failures += 1;
            tokio::select! {
                () = tokio::time::sleep(QUEUE_BACKOFF.jittered(failures)) => {}
                () = self.connected.ended.cancelled() => return None,
            }
        }
    }

    async fn tell(&self, renewals: Vec<Numbered>, replies: Vec<RenewReply>) -> bool {
        let now = self.shared.now();
        let mut answer = v1::RenewalAcks::default();
        let mut cancelled = Vec::new();
        for (Numbered { renewal, number }, reply) in renewals.into_iter().zip(replies) {
            let lease = view::lease(&renewal.key, renewal.fence);
            match reply {
                RenewReply::Held {
                    deadline,
                    cancel_requested,
                } => {
                    if cancel_requested {
                        cancelled.push(lease.clone());
                    }
                    let left = deadline.since(now).as_millis();
                    answer.acks.push(v1::RenewalAck {
                        lease: Some(lease),
                        lease_ttl_ms: u64::try_from(left).unwrap_or(u64::MAX),
                        number,
                    });
                }
                RenewReply::Lost => {
                    super::count_stale(&renewal.key);
                    self.connected.stopped(&renewal.key, renewal.fence);
                    answer.lost.push(lease);
                }
            }
        }
        if !cancelled.is_empty() {
            let cancels = v1::Cancels { leases: cancelled };
            self.send(Message::Cancels(cancels)).await;
        }
        self.send(Message::RenewalAcks(answer)).await
    }
}
