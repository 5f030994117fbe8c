//! Granting: as many ready jobs as the worker has credit for, as soon as both are there.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::id::{Fence, JobKey};
use espalier_core::queue::{GRANTS_MAX, JobKind, LeaseRequest};
use espalier_core::time::Timestamp;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::telemetry::{self, names::attribute};
use opentelemetry::KeyValue;
use prost::Message as _;

use super::{QUEUE_BACKOFF, Session, lock};
use crate::api::stored::StoredSpec;
use crate::api::view;
use crate::queue::{Finish, Granted, Outcome};

/// Bytes of grants in one message: a quarter of what a client takes, so that one more grant always fits.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// A worker with credit looks again after this long even if nobody rang: the bell is a hint, and no wait is endless.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// A grant on its way, and the lease that it is about.
struct Outbound {
    key: JobKey,
    fence: Fence,
    wire: v1::Grant,
}

impl Session {
    /// Grants until the stream ends. What was leased is delivered or given back before this returns.
    pub async fn grant(&self) {
        let ended = &self.connected.ended;
        loop {
            tokio::select! {
                () = self.connected.wake.notified() => {}
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = ended.cancelled() => return,
            }
            for kind in self.connected.kinds.iter().copied() {
                while let Some(n) = self.room(kind) {
                    let granted = self.lease(kind, n).await;
                    if granted.is_empty() {
                        break;
                    }
                    self.deliver(kind, granted).await;
                }
            }
        }
    }

    /// How many jobs of `kind` may be granted now.
    fn room(&self, kind: JobKind) -> Option<u32> {
        if self.connected.draining.load(Ordering::Relaxed) || self.connected.ended.is_cancelled() {
            return None;
        }
        let credit = lock(&self.credit).get(&kind).copied().unwrap_or(0);
        (credit > 0).then_some(credit.min(GRANTS_MAX))
    }

    /// Asks the queue until it answers or the stream ends; a repetition of the same request finds the same grants.
    async fn lease(&self, kind: JobKind, n: u32) -> Vec<Granted> {
        let request = LeaseRequest {
            worker: self.connected.worker.clone(),
            request: self.shared.registry.next_number(),
            kind,
            offers: self.connected.tags.clone(),
            n,
            ttl: self.shared.config.lease_ttl(),
        };
        let mut failures = 0;
        loop {
            match self.shared.queue.lease(request.clone()).await {
                Ok(granted) => return granted,
                Err(error) => tracing::warn!(error = %error, "jobs cannot be leased now"),
            }
            failures += 1;
            tokio::select! {
                () = tokio::time::sleep(QUEUE_BACKOFF.jittered(failures)) => {}
                () = self.connected.ended.cancelled() => return Vec::new(),
            }
        }
    }

    async fn deliver(&self, kind: JobKind, granted: Vec<Granted>) {
        {
            let mut credit = lock(&self.credit);
            let left = credit.entry(kind).or_default();
            *left = left.saturating_sub(u32::try_from(granted.len()).unwrap_or(u32::MAX));
        }
        count(kind, &granted);
        let now = self.shared.now();
        let mut unreadable = Vec::new();
        let mut waiting = Vec::new();
        for granted in granted {
            let (key, fence) = (granted.grant.key.clone(), granted.grant.fence);
            match to_wire(granted, now) {
                Some(wire) => waiting.push(Outbound { key, fence, wire }),
                None => unreadable.push(Finish {
                    key,
                    fence,
                    outcome: Outcome::Failed {
                        class: ErrorClass::Invalid,
                        message: "the stored spec cannot be read by this version".to_owned(),
                        log_tail: String::new(),
                        retry_after: None,
                    },
                }),
            }
        }
        if !unreadable.is_empty()
            && let Err(error) = self.shared.queue.finish(unreadable).await
        {
            tracing::error!(error = %error, "jobs with unreadable specs could not be ended");
        }
        self.send_grants(waiting).await;
    }

    /// Sends grants in messages of bounded size; those that could not be sent go back.
    async fn send_grants(&self, waiting: Vec<Outbound>) {
        let mut waiting = waiting.into_iter().peekable();
        while waiting.peek().is_some() {
            let (mut leases, mut grants, mut bytes) = (Vec::new(), Vec::new(), 0);
            while bytes < MESSAGE_BYTES_MAX
                && let Some(next) = waiting.next()
            {
                bytes += next.wire.encoded_len();
                self.connected.started(next.key.clone(), next.fence);
                leases.push((next.key, next.fence));
                grants.push(next.wire);
            }
            if !self.send(Message::Grants(v1::Grants { grants })).await {
                leases.extend(waiting.by_ref().map(|next| (next.key, next.fence)));
                self.give_back(leases).await;
            }
        }
    }
}

/// The grant as the worker reads it; none where the stored spec is of another version.
fn to_wire(granted: Granted, now: Timestamp) -> Option<v1::Grant> {
    let grant = granted.grant;
    let (spec, spec_path) = match StoredSpec::decode(&granted.spec)? {
        StoredSpec::Inline(own) if granted.defaults.is_empty() => (own, String::new()),
        StoredSpec::Inline(own) => ([granted.defaults, own].concat().into(), String::new()),
        StoredSpec::Blob(path) => (bytes::Bytes::new(), path),
    };
    let left = grant.deadline.since(now).as_millis();
    Some(v1::Grant {
        lease: Some(view::lease(&grant.key, grant.fence)),
        attempt: grant.attempt,
        spec,
        spec_path,
        lease_ttl_ms: u64::try_from(left).unwrap_or(u64::MAX),
        earlier_fences: Vec::new(),
        traceparent: grant.traceparent.unwrap_or_default(),
    })
}

fn count(kind: JobKind, granted: &[Granted]) {
    let mut by_project: BTreeMap<&str, u64> = BTreeMap::new();
    for granted in granted {
        *by_project
            .entry(granted.grant.key.project.as_str())
            .or_default() += 1;
    }
    for (project, grants) in by_project {
        let labels = [
            KeyValue::new(attribute::PROJECT, project.to_owned()),
            KeyValue::new(attribute::JOB_KIND, kind.as_str()),
        ];
        telemetry::metrics().lease_grants.add(grants, &labels);
    }
}
