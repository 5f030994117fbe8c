//! Granting: as many ready jobs as the worker has credit for, as soon as both are there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::queue::{GRANTS_MAX, JobKind, LeaseRequest};
use espalier_core::time::Timestamp;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::{self, names::attribute};
use futures::StreamExt;
use opentelemetry::KeyValue;
use prost::Message as _;

use super::{QUEUE_BACKOFF, Session, give_back, history, lock};
use crate::api::stored::StoredSpec;
use crate::api::view;
use crate::queue::{Finish, Granted, Outcome};

/// Bytes of grants in one message: a worker begins while the rest is on its way, and when a stream breaks, little is
/// half sent and therefore in doubt.
const MESSAGE_BYTES_MAX: usize = 512 << 10;
/// A worker with credit looks again after this long even if nobody rang: the bell is a hint, and no wait is endless.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// Fences of earlier attempts that a grant names.
const EARLIER_MAX: usize = 8;
/// How long a grant waits for them: its lease runs meanwhile.
const EARLIER_LIMIT: Duration = Duration::from_secs(2);
/// Objects of one job that are looked at for them: a dozen attempts of the longest rollout.
const OBJECTS_MAX: usize = 2_000;
/// Jobs that are looked at together.
const LISTS_MAX: usize = 16;

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
                while self.grant_some(kind).await {}
            }
        }
    }

    /// Grants once; false: there is no room or no job.
    async fn grant_some(&self, kind: JobKind) -> bool {
        let _granting = self.granting.lock().await;
        self.connected.grants(true);
        let some = self.grant_room(kind).await;
        self.connected.grants(false);
        some
    }

    async fn grant_room(&self, kind: JobKind) -> bool {
        let Some(n) = self.room(kind) else {
            return false;
        };
        let granted = self.lease(kind, n).await;
        let some = !granted.is_empty();
        if some {
            self.deliver(kind, granted).await;
        }
        some
    }

    /// How many jobs of `kind` may be granted now.
    fn room(&self, kind: JobKind) -> Option<u32> {
        if self.connected.takes_no_more() || self.connected.ended.is_cancelled() {
            return None;
        }
        let credit = lock(&self.credit).get(&kind).copied().unwrap_or(0);
        (credit > 0).then_some(credit.min(GRANTS_MAX))
    }

    /// Asks the queue until it answers or no more grants are wanted; a repetition of the same request finds the same grants.
    async fn lease(&self, kind: JobKind, n: u32) -> Vec<Granted> {
        let request = LeaseRequest {
            worker: self.connected.worker.clone(),
            request: self.shared.registry.next_number(),
            kind,
            offers: self.connected.offers(),
            n,
            ttl: self.shared.config.lease_ttl(),
        };
        let mut failures = 0;
        loop {
            match self.shared.queue.lease(request.clone()).await {
                Ok(granted) => {
                    history::granted(&self.connected.worker, &granted);
                    return granted;
                }
                Err(error) => tracing::warn!(error = %error, "jobs cannot be leased now"),
            }
            failures += 1;
            if self.connected.takes_no_more() {
                return Vec::new();
            }
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
        let mut earlier = earlier_fences(&self.shared.store, &granted).await;
        let now = self.shared.now();
        let mut unreadable = Vec::new();
        let mut waiting = Vec::new();
        for granted in granted {
            let (key, fence) = (granted.grant.key.clone(), granted.grant.fence);
            match to_wire(granted, now) {
                Some(mut wire) => {
                    wire.earlier_fences = earlier.remove(&fence).unwrap_or_default();
                    waiting.push(Outbound { key, fence, wire });
                }
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
        // The worker has not heard of these, and cannot offer their places again.
        let unheard = u32::try_from(unreadable.len()).unwrap_or(u32::MAX);
        if let Some(left) = lock(&self.credit).get_mut(&kind) {
            *left = left.saturating_add(unheard);
        }
        if !unreadable.is_empty() {
            match self.shared.queue.finish(unreadable.clone()).await {
                Ok(acks) => history::finished(&self.connected.worker, &unreadable, &acks),
                Err(error) => {
                    tracing::error!(error = %error, "jobs with unreadable specs could not be ended")
                }
            }
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
                self.connected.granted(next.key.clone(), next.fence);
                leases.push((next.key, next.fence));
                grants.push(next.wire);
            }
            if !self.send(Message::Grants(v1::Grants { grants })).await {
                leases.extend(waiting.by_ref().map(|next| (next.key, next.fence)));
                for (key, fence) in &leases {
                    self.connected.stopped(key, *fence);
                }
                give_back(&self.shared, &self.connected.worker, leases).await;
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

/// What earlier attempts left in the store, for grants that are not a job's first. A store that does not answer costs
/// the worker a hint: it finds the same when it looks for itself.
async fn earlier_fences(store: &Store, granted: &[Granted]) -> BTreeMap<Fence, Vec<u64>> {
    let repeated = granted.iter().filter(|granted| granted.grant.attempt > 1);
    let lists = repeated.map(|granted| async {
        let grant = &granted.grant;
        let listed = store
            .list(&layout::job(&grant.key), None, OBJECTS_MAX)
            .await;
        let attempts = listed.unwrap_or_default();
        let found = attempts.iter().filter_map(|o| layout::attempt_of(&o.path));
        let earlier = found.map(|(_, fence)| fence).filter(|f| *f < grant.fence);
        let earlier: BTreeSet<Fence> = earlier.collect();
        let newest = earlier.into_iter().rev().take(EARLIER_MAX);
        (grant.fence, newest.map(|fence| fence.0).collect())
    });
    let found = futures::stream::iter(lists.collect::<Vec<_>>())
        .buffer_unordered(LISTS_MAX)
        .collect();
    let found = with_deadline("session.earlier", EARLIER_LIMIT, found).await;
    found.unwrap_or_default()
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
