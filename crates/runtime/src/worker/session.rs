//! The session: one task that owns the streams, the book of leases and the job tasks. Everything that happens comes to
//! it as an event; what is due is sent after each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::WorkerId;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message as FromCoordinator;
use espalier_proto::v1::worker_message::Message as ToCoordinator;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::book::{Book, LeaseId};
use super::job::{self, Event};
use super::lease::{Lease, Stop};
use super::link::{Heard, Links};
use super::once::Once;
use super::{Handler, JobOutcome, Serving, WorkerConfig, WorkerDeps};
use crate::health::{Turn, Watched};
use crate::model::Served;
use crate::shutdown::Shutdown;
use crate::tasks::OnFailure;

/// Events that wait for the session; jobs wait in turn.
const EVENTS_MAX: usize = 256;
/// How long the last results may take to be acknowledged when the process ends.
const LAST_ACKS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a draining worker still reads: a grant may have crossed its word on the way, and is handed back.
const CROSSING_GRANTS_TIMEOUT: Duration = Duration::from_millis(300);
/// The session looks after its leases this often at least, should a timer ever be wrong.
const TICK_MAX: Duration = Duration::from_secs(5);

/// Where the worker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Takes jobs.
    Working,
    /// Takes no more; running jobs may go on until then.
    Draining(Instant),
    /// Running jobs were told to stop.
    Stopping,
    /// Nothing runs; results wait for their acknowledgement until then.
    Delivering(Instant),
}

/// Something that woke the session.
enum Woken {
    Event(Event),
    /// What the process serves has changed.
    Serving,
    Heard(Heard),
    Draining,
    Aborted,
    Time,
}

/// A request of a job that waits for the coordinator.
struct Request {
    message: ToCoordinator,
    made_at: Instant,
    reply: oneshot::Sender<bool>,
}

impl Request {
    /// The message as it is said at `now`: the time that is left counts from then.
    fn again(&self, now: Instant) -> ToCoordinator {
        let mut message = self.message.clone();
        if let ToCoordinator::Ask(v1::Ask {
            question: Some(question),
            ..
        }) = &mut message
        {
            let passed = now.saturating_duration_since(self.made_at).as_millis();
            let passed = u64::try_from(passed).unwrap_or(u64::MAX);
            question.time_left_ms = question.time_left_ms.saturating_sub(passed);
        }
        message
    }
}

pub(super) struct Session<H> {
    handler: Arc<H>,
    config: WorkerConfig,
    deps: WorkerDeps,
    shutdown: Shutdown,
    id: WorkerId,
    /// As which a scaler started the process; empty: none did.
    instance: String,
    book: Book,
    events: mpsc::Receiver<Event>,
    events_in: mpsc::Sender<Event>,
    links: Links,
    phase: Phase,
    /// Until when grants may still come in although the worker drains.
    linger_until: Instant,
    /// By question id, or by job and fence for manifests.
    requests: HashMap<String, Request>,
    serving: Option<watch::Receiver<Serving>>,
    once: Option<Once>,
    health: Watched,
}

impl<H: Handler> Session<H> {
    pub(super) fn new(
        handler: Arc<H>,
        config: WorkerConfig,
        deps: WorkerDeps,
        shutdown: Shutdown,
        id: WorkerId,
        instance: String,
    ) -> Self {
        let (events_in, events) = mpsc::channel(EVENTS_MAX);
        let links = Links::new(id.clone(), config.clone());
        let book = Book::new(config.tell_every);
        let kind = handler.kind().as_str_name().trim_start_matches("JOB_KIND_");
        Self {
            serving: handler.serving(),
            once: config.once.map(|wait| Once::new(Instant::now() + wait)),
            health: deps.health.watch(kind.to_lowercase()),
            handler,
            config,
            deps,
            shutdown,
            id,
            instance,
            book,
            events,
            events_in,
            links,
            phase: Phase::Working,
            linger_until: Instant::now(),
            requests: HashMap::new(),
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            let now = Instant::now();
            for id in self.book.expire(now) {
                tracing::warn!(job = %id.job, fence = id.fence.0, "lease not renewed in time: work stopped");
            }
            self.advance_phase(now);
            if self.is_over() {
                break;
            }
            self.end_once(now);
            self.health.turned(self.turn());
            let hello = || v1::Hello {
                instance: self.instance.clone(),
                ..hello(self.handler.kind(), &self.id, &self.config, &self.book)
            };
            self.links.connect_if_due(now, hello);
            self.send_what_is_due(now);
            match self.wait().await {
                Woken::Event(event) => self.on_event(event),
                Woken::Serving => self.tell_serving(),
                Woken::Heard(Heard::Message(message)) => self.on_message(message),
                Woken::Heard(Heard::Late(message)) => self.on_late_message(message),
                Woken::Heard(Heard::Up(welcome)) => self.connected(&welcome),
                Woken::Heard(Heard::Nothing) => {}
                Woken::Draining => self.begin_drain(),
                Woken::Aborted => {
                    self.book.stop_all(Stop::Aborted);
                    break;
                }
                Woken::Time => {}
            }
        }
        tracing::info!(worker = %self.id, unacknowledged = self.book.unacked(), "worker ended");
    }

    async fn wait(&mut self) -> Woken {
        let wake_at = self.wake_at();
        let working = self.phase == Phase::Working;
        tokio::select! {
            biased;
            () = self.shutdown.aborted() => Woken::Aborted,
            () = self.shutdown.draining(), if working => Woken::Draining,
            Some(event) = self.events.recv() => Woken::Event(event),
            () = changed(&mut self.serving) => Woken::Serving,
            heard = self.links.next() => Woken::Heard(heard),
            () = tokio::time::sleep_until(wake_at) => Woken::Time,
        }
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let mut wake_at = now + TICK_MAX;
        if let Some(due) = self.book.next_due(self.links.is_up()) {
            wake_at = wake_at.min(due);
        }
        if let Some(due) = self.links.next_due() {
            wake_at = wake_at.min(due);
        }
        if let Phase::Draining(until) | Phase::Delivering(until) = self.phase {
            wake_at = wake_at.min(until);
        }
        if matches!(self.phase, Phase::Delivering(_)) && now < self.linger_until {
            wake_at = wake_at.min(self.linger_until);
        }
        // When that is past, what it still holds wakes it.
        let until = self.once.as_ref().and_then(Once::waits_until);
        if let Some(until) = until.filter(|until| *until > now) {
            wake_at = wake_at.min(until);
        }
        wake_at
    }

    /// A stream is up, the first one or another: everything is told anew.
    fn connected(&mut self, welcome: &v1::Welcome) {
        let now = Instant::now();
        self.book.reconnected(now);
        for lease in &welcome.lost {
            self.lost(lease);
        }
        if self.phase == Phase::Working {
            self.tell_serving();
        } else {
            self.links.send(ToCoordinator::Drain(v1::Drain {}));
        }
        for request in self.requests.values() {
            self.links.send(request.again(now));
        }
    }

    /// Without a stream nobody hears it: it is told anew when one is up.
    fn tell_serving(&mut self) {
        if let Some(serving) = &mut self.serving {
            let told = serving.borrow_and_update().to_wire();
            self.links.send(ToCoordinator::Serving(told));
        }
    }

    fn turn(&self) -> Turn {
        match (self.phase, self.links.is_up()) {
            (Phase::Working, true) => Turn::Connected,
            (Phase::Working, false) => Turn::Apart,
            _ => Turn::Ending,
        }
    }

    /// A worker that takes one job drains when it has had it, or when none came.
    fn end_once(&mut self, now: Instant) {
        let held = self.book.running() + self.book.unacked();
        let Some(once) = &self.once else { return };
        if self.phase == Phase::Working && once.is_over(now, held) {
            tracing::info!(worker = %self.id, had_a_job = once.took(), "takes no more jobs");
            self.shutdown.drain();
        }
    }

    fn begin_drain(&mut self) {
        tracing::info!(worker = %self.id, running = self.book.running(), "draining");
        let now = Instant::now();
        self.phase = Phase::Draining(now + self.config.grace);
        self.linger_until = now + CROSSING_GRANTS_TIMEOUT;
        self.links.send(ToCoordinator::Drain(v1::Drain {}));
    }

    fn advance_phase(&mut self, now: Instant) {
        if let Phase::Draining(until) = self.phase
            && now >= until
        {
            self.book.stop_all(Stop::Draining);
            self.phase = Phase::Stopping;
        }
        if matches!(self.phase, Phase::Draining(_) | Phase::Stopping) && self.book.running() == 0 {
            self.phase = Phase::Delivering(now + LAST_ACKS_TIMEOUT);
        }
    }

    fn is_over(&self) -> bool {
        let now = Instant::now();
        let lingers = self.links.is_up() && now < self.linger_until;
        match self.phase {
            Phase::Delivering(until) => now >= until || (self.book.unacked() == 0 && !lingers),
            _ => false,
        }
    }

    fn send_what_is_due(&mut self, now: Instant) {
        if !self.links.is_up() {
            return;
        }
        self.requests
            .retain(|_, request| !request.reply.is_closed());
        let results = self.book.results(now);
        if !results.is_empty() {
            self.links
                .send(ToCoordinator::Results(v1::Results { results }));
        }
        let renewals = self.book.renewals(now);
        if !renewals.is_empty() {
            self.links
                .send(ToCoordinator::Renewals(v1::Renewals { renewals }));
        }
        if self.phase == Phase::Working {
            self.send_credit();
        }
    }

    fn send_credit(&mut self) {
        let free = self.book.free(self.config.slots);
        let free = self.once.as_ref().map_or(free, |once| once.limit(free));
        let jobs = self.links.credit_to_give(free);
        if jobs > 0 {
            let kind = self.handler.kind().into();
            self.links
                .send(ToCoordinator::Credit(v1::Credit { kind, jobs }));
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Ended(id, outcome) => {
                let result = job::to_wire(&id, *outcome, self.book.last_progress(&id));
                self.book.ended(&id, result, Instant::now());
            }
            Event::Ask(id, question, reply) => {
                let key = question.id.clone();
                let ask = v1::Ask {
                    lease: Some(id.to_wire()),
                    question: Some(question),
                };
                self.request(key, ToCoordinator::Ask(ask), reply);
            }
            Event::BadManifest(id, reason, reply) => {
                let key = manifest_request(&id);
                let lease = Some(id.to_wire());
                let bad = v1::BadManifest { lease, reason };
                self.request(key, ToCoordinator::BadManifest(bad), reply);
            }
        }
    }

    fn request(&mut self, key: String, message: ToCoordinator, reply: oneshot::Sender<bool>) {
        self.links.send(message.clone());
        let request = Request {
            message,
            made_at: Instant::now(),
            reply,
        };
        self.requests.insert(key, request);
    }

    fn answer(&mut self, key: &str, answer: bool) {
        if let Some(request) = self.requests.remove(key) {
            // Fails where the job has stopped waiting.
            let _ = request.reply.send(answer);
        }
    }

    fn on_message(&mut self, message: v1::CoordinatorMessage) {
        match message.message {
            Some(FromCoordinator::Grants(grants)) => {
                for grant in grants.grants {
                    self.granted(grant);
                }
            }
            Some(FromCoordinator::RenewalAcks(acks)) => {
                for ack in &acks.acks {
                    if let Some(id) = LeaseId::from_wire(ack.lease.as_ref()) {
                        let ttl = Duration::from_millis(ack.lease_ttl_ms);
                        self.book.renewed(&id, ack.number, ttl);
                    }
                }
                for lease in &acks.lost {
                    self.lost(lease);
                }
            }
            Some(FromCoordinator::Cancels(cancels)) => {
                for lease in &cancels.leases {
                    if let Some(id) = LeaseId::from_wire(Some(lease)) {
                        tracing::info!(job = %id.job, fence = id.fence.0, "job cancelled");
                        self.book.stop(&id, Stop::Cancelled);
                    }
                }
            }
            Some(FromCoordinator::ResultAcks(acks)) => {
                for ack in acks.acks {
                    self.acknowledged(&ack);
                }
            }
            Some(FromCoordinator::GoAway(away)) => self.links.leave(&away),
            Some(FromCoordinator::Endpoints(told)) => {
                let told = told.endpoints.into_iter();
                self.handler
                    .endpoints(told.filter_map(Served::from_wire).collect());
            }
            Some(FromCoordinator::Answer(answer)) => self.answer(&answer.id, answer.allow),
            Some(FromCoordinator::ManifestChecked(checked)) => {
                if let Some(id) = LeaseId::from_wire(checked.lease.as_ref()) {
                    self.answer(&manifest_request(&id), checked.moved);
                }
            }
            // A second greeting, or a message of a newer coordinator.
            Some(FromCoordinator::Welcome(_)) | None => {}
        }
    }

    /// A message on the stream that was left. What it says of leases and results still counts; what it says of the
    /// stream itself does not.
    fn on_late_message(&mut self, message: v1::CoordinatorMessage) {
        match message.message {
            Some(FromCoordinator::Grants(grants)) => {
                for grant in grants.grants {
                    self.hand_back(&grant);
                }
            }
            Some(FromCoordinator::GoAway(_) | FromCoordinator::Endpoints(_)) => {}
            _ => self.on_message(message),
        }
    }

    fn granted(&mut self, grant: v1::Grant) {
        let within_credit = self.links.take_credit();
        if self.phase != Phase::Working || !within_credit {
            self.hand_back(&grant);
            return;
        }
        let Some((id, lease)) = self.enter(&grant) else {
            return;
        };
        if let Some(once) = &mut self.once {
            once.take();
        }
        tracing::info!(job = %id.job, fence = id.fence.0, attempt = grant.attempt, "job granted");
        let handler = Arc::clone(&self.handler);
        let (deps, events) = (self.deps.clone(), self.events_in.clone());
        let work = job::run(handler, grant, id, lease, deps, events);
        self.deps.tasks.spawn("worker.job", OnFailure::Log, work);
    }

    /// A grant that is not to be run: the worker stops, or it came beyond what was asked for.
    fn hand_back(&mut self, grant: &v1::Grant) {
        if let Some((id, _)) = self.enter(grant) {
            tracing::info!(job = %id.job, fence = id.fence.0, "grant handed back");
            let reason = "the worker takes no more jobs".to_owned();
            let result = job::to_wire(&id, JobOutcome::Released { reason }, String::new());
            self.book.ended(&id, result, Instant::now());
        }
    }

    /// Takes up a lease. None: it is held already.
    fn enter(&mut self, grant: &v1::Grant) -> Option<(LeaseId, Lease)> {
        let Some(id) = LeaseId::from_wire(grant.lease.as_ref()) else {
            tracing::error!("a grant names no job");
            return None;
        };
        let ttl = Duration::from_millis(grant.lease_ttl_ms);
        let lease = self.book.grant(&id, ttl, Instant::now())?;
        Some((id, lease))
    }

    fn lost(&mut self, lease: &v1::Lease) {
        if let Some(id) = LeaseId::from_wire(Some(lease))
            && self.book.lose(&id, Stop::Lost)
        {
            tracing::warn!(job = %id.job, fence = id.fence.0, "lease lost");
        }
    }

    fn acknowledged(&mut self, ack: &v1::ResultAck) {
        use v1::result_ack::Verdict;
        let Some(id) = LeaseId::from_wire(ack.lease.as_ref()) else {
            return;
        };
        if !self.book.acknowledged(&id) {
            return;
        }
        match ack.verdict() {
            Verdict::Accepted => {
                tracing::debug!(job = %id.job, fence = id.fence.0, "result accepted")
            }
            Verdict::Stale => {
                tracing::warn!(job = %id.job, fence = id.fence.0, "result came under an old lease and does not count");
            }
            Verdict::Refused | Verdict::Unspecified => {
                tracing::error!(job = %id.job, fence = id.fence.0, reason = ack.reason, "result refused");
            }
        }
    }
}

/// Waits for the next change; for ever where there is none to come.
async fn changed(serving: &mut Option<watch::Receiver<Serving>>) {
    if let Some(receiver) = serving
        && receiver.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

fn manifest_request(id: &LeaseId) -> String {
    format!("manifest {}@{}", id.job, id.fence)
}

fn hello(kind: v1::JobKind, id: &WorkerId, config: &WorkerConfig, book: &Book) -> v1::Hello {
    v1::Hello {
        worker: id.to_string(),
        tags: config.tags.clone(),
        kinds: vec![kind.into()],
        capacity: config.slots,
        held: book.leases(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        process: config.process.to_string(),
        ..v1::Hello::default()
    }
}
