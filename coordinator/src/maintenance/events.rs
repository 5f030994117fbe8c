//! From the queue's events to the workers that they concern: rings those that may take a job which became ready, and
//! tells those whose job was cancelled or whose lease ended. Orders that other coordinators tell are obeyed.
//!
//! Events are hints. When some were missed every worker is rung; cancels and lost leases show at the next renewal.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_core::id::WorkerId;
use espalier_core::queue::{Event, RevokeReason};
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::telemetry::{metrics, names::attribute};
use opentelemetry::KeyValue;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use crate::api::{Shared, view};
use crate::peers::Order;

/// Most events that are passed on together: bounds a message to one worker, and how long the first event waits.
const TOGETHER_MAX: usize = 1_000;

/// What workers are to be told, each in one message: a batch with many running jobs would overflow a worker's outbox
/// with a message a job.
#[derive(Default)]
struct Notices {
    cancelled: BTreeMap<WorkerId, Vec<v1::Lease>>,
    lost: BTreeMap<WorkerId, Vec<v1::Lease>>,
    /// What other coordinators told.
    orders: Vec<Order>,
    /// The queue may have lost what this coordinator shows others.
    missed: bool,
}

/// Follows the events until the process aborts or the queue closes.
pub async fn run(shared: Arc<Shared>) {
    let mut events = shared.queue.events();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = shared.shutdown.aborted() => return,
        };
        let mut notices = Notices::default();
        match event {
            Ok(event) => notices.take(&shared, event),
            Err(RecvError::Lagged(missed)) => ring_all(&shared, missed),
            Err(RecvError::Closed) => return,
        }
        notices.take_waiting(&shared, &mut events);
        if notices.missed {
            shared.peers.show_again().await;
        }
        notices.tell(&shared);
    }
}

fn ring_all(shared: &Shared, missed: u64) {
    tracing::debug!(missed, "events were missed: ringing every worker");
    shared.registry.wake_all();
}

impl Notices {
    /// Takes what has piled up already.
    fn take_waiting(&mut self, shared: &Shared, events: &mut Receiver<Event>) {
        for _ in 0..TOGETHER_MAX {
            match events.try_recv() {
                Ok(event) => self.take(shared, event),
                Err(TryRecvError::Lagged(missed)) => ring_all(shared, missed),
                Err(TryRecvError::Empty | TryRecvError::Closed) => return,
            }
        }
    }

    fn take(&mut self, shared: &Shared, event: Event) {
        match event {
            Event::Missed => {
                shared.registry.wake_all();
                self.missed = true;
            }
            Event::Notice(notice) => self.orders.extend(Order::parse(&notice)),
            Event::Ready { kind, needs } => shared.registry.wake(kind, &needs),
            Event::CancelRequested { worker, key, fence } => {
                let leases = self.cancelled.entry(worker).or_default();
                leases.push(view::lease(&key, fence));
            }
            Event::Revoked {
                worker,
                key,
                fence,
                reason,
            } => {
                shared.questions.forget(&key);
                if let Some(connected) = shared.registry.find(&worker) {
                    connected.stopped(&key, fence);
                }
                if reason == RevokeReason::Expired {
                    tracing::warn!(job = %key, %fence, %worker, "lease expired");
                    let project = KeyValue::new(attribute::PROJECT, key.project.to_string());
                    metrics().lease_expiries.add(1, &[project]);
                } else {
                    tracing::warn!(job = %key, %fence, %worker, "attempt ran too long");
                }
                let leases = self.lost.entry(worker).or_default();
                leases.push(view::lease(&key, fence));
            }
        }
    }

    fn tell(self, shared: &Arc<Shared>) {
        for order in &self.orders {
            super::peers::obey(shared, order);
        }
        for (worker, leases) in self.cancelled {
            if let Some(connected) = shared.registry.find(&worker) {
                connected.hint(Message::Cancels(v1::Cancels { leases }));
            }
        }
        for (worker, lost) in self.lost {
            if let Some(connected) = shared.registry.find(&worker) {
                let acks = Vec::new();
                connected.hint(Message::RenewalAcks(v1::RenewalAcks { acks, lost }));
            }
        }
    }
}
