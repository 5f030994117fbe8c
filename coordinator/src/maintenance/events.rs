//! From the queue's events to the workers that they concern: rings those that may take a job which became ready, and
//! tells those whose job was cancelled or whose lease ended.
//!
//! Events are hints. When some were missed every worker is rung; cancels and lost leases show at the next renewal.

use std::sync::Arc;

use espalier_core::queue::{Event, RevokeReason};
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::telemetry::{metrics, names::attribute};
use opentelemetry::KeyValue;
use tokio::sync::broadcast::error::RecvError;

use crate::api::{Shared, view};

/// Follows the events until the process aborts or the queue closes.
pub async fn run(shared: Arc<Shared>) {
    let mut events = shared.queue.events();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = shared.shutdown.aborted() => return,
        };
        match event {
            Ok(event) => pass_on(&shared, event),
            Err(RecvError::Lagged(missed)) => {
                tracing::debug!(missed, "events were missed: ringing every worker");
                shared.registry.wake_all();
            }
            Err(RecvError::Closed) => return,
        }
    }
}

fn pass_on(shared: &Shared, event: Event) {
    match event {
        Event::Ready { kind, needs } => shared.registry.wake(kind, &needs),
        Event::CancelRequested { worker, key, fence } => {
            if let Some(connected) = shared.registry.find(&worker) {
                let leases = vec![view::lease(&key, fence)];
                connected.hint(Message::Cancels(v1::Cancels { leases }));
            }
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
                let lost = vec![view::lease(&key, fence)];
                let acks = Vec::new();
                connected.hint(Message::RenewalAcks(v1::RenewalAcks { acks, lost }));
            }
            if reason == RevokeReason::Expired {
                tracing::warn!(job = %key, %fence, %worker, "lease expired");
                let project = KeyValue::new(attribute::PROJECT, key.project.to_string());
                metrics().lease_expiries.add(1, &[project]);
            } else {
                tracing::warn!(job = %key, %fence, %worker, "attempt ran too long");
            }
        }
        // Watchers ask by themselves, and ends are counted where results come in.
        Event::Ended { .. } | Event::BatchCompleted { .. } => {}
    }
}
