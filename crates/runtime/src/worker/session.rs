//! The session: one task that owns the stream, the book of leases and the job tasks. Everything that happens comes to
//! it as an event; what is due is sent after each.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::WorkerId;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message as FromCoordinator;
use espalier_proto::v1::worker_message::Message as ToCoordinator;
use espalier_proto::v1::worker_service_client::WorkerServiceClient;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::book::{Book, LeaseId};
use super::job::{self, Event};
use super::lease::Stop;
use super::{Handler, JobOutcome, WorkerConfig, WorkerDeps};
use crate::backoff::Backoff;
use crate::net::{self, MESSAGE_BYTES_MAX};
use crate::shutdown::Shutdown;
use crate::tasks::{OnFailure, with_deadline};
use crate::telemetry;

/// Between tries to reach a coordinator. Well within the shortest lease, so that a restart of one loses none.
const RECONNECT: Backoff = Backoff {
    first: Duration::from_millis(200),
    max: Duration::from_secs(10),
};
/// How long a stream may take to come up, greeting included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages that wait for the stream. Each holds up to a thousand items, so more means that nobody reads.
const OUTBOX_MAX: usize = 64;
/// Events that wait for the session; jobs wait in turn.
const EVENTS_MAX: usize = 256;
/// How long the last results may take to be acknowledged when the process ends.
const LAST_ACKS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a draining worker still reads: a grant may have crossed its word on the way, and is handed back.
const CROSSING_GRANTS_TIMEOUT: Duration = Duration::from_millis(300);
/// The session looks after its leases this often at least, should a timer ever be wrong.
const TICK_MAX: Duration = Duration::from_secs(5);

/// The two directions of an open stream.
struct Link {
    outbox: mpsc::Sender<v1::WorkerMessage>,
    inbox: Streaming<v1::CoordinatorMessage>,
    /// Grants that the coordinator may still send.
    credit: u32,
}

type Connecting = Pin<Box<dyn Future<Output = Result<(Link, v1::Welcome), Status>> + Send>>;

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
    Message(Result<Option<v1::CoordinatorMessage>, Status>),
    Connected(Result<(Link, v1::Welcome), Status>),
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
    book: Book,
    events: mpsc::Receiver<Event>,
    events_in: mpsc::Sender<Event>,
    link: Option<Link>,
    connecting: Option<Connecting>,
    connect_at: Instant,
    failures: u32,
    phase: Phase,
    /// Until when grants may still come in although the worker drains.
    linger_until: Instant,
    /// By question id, or by job and fence for manifests.
    requests: HashMap<String, Request>,
}

impl<H: Handler> Session<H> {
    pub(super) fn new(
        handler: Arc<H>,
        config: WorkerConfig,
        deps: WorkerDeps,
        shutdown: Shutdown,
        id: WorkerId,
    ) -> Self {
        let (events_in, events) = mpsc::channel(EVENTS_MAX);
        Self {
            handler,
            config,
            deps,
            shutdown,
            id,
            book: Book::default(),
            events,
            events_in,
            link: None,
            connecting: None,
            connect_at: Instant::now(),
            failures: 0,
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
            self.connect_if_due(now);
            self.send_what_is_due(now);
            match self.wait().await {
                Woken::Event(event) => self.on_event(event),
                Woken::Message(Ok(Some(message))) => self.on_message(message),
                Woken::Message(Ok(None)) => self.disconnected("the coordinator ended the stream"),
                Woken::Message(Err(status)) => self.disconnected(&describe(&status)),
                Woken::Connected(Ok((link, welcome))) => self.connected(link, welcome),
                Woken::Connected(Err(status)) => self.disconnected(&describe(&status)),
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
        let (link, connecting) = (&mut self.link, &mut self.connecting);
        tokio::select! {
            biased;
            () = self.shutdown.aborted() => Woken::Aborted,
            () = self.shutdown.draining(), if working => Woken::Draining,
            Some(event) = self.events.recv() => Woken::Event(event),
            message = next_message(link) => Woken::Message(message),
            connected = connected(connecting) => {
                self.connecting = None;
                Woken::Connected(connected)
            }
            () = tokio::time::sleep_until(wake_at) => Woken::Time,
        }
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let mut wake_at = now + TICK_MAX;
        if let Some(due) = self.book.next_due(self.link.is_some()) {
            wake_at = wake_at.min(due);
        }
        if self.link.is_none() && self.connecting.is_none() {
            wake_at = wake_at.min(self.connect_at);
        }
        if let Phase::Draining(until) | Phase::Delivering(until) = self.phase {
            wake_at = wake_at.min(until);
        }
        if matches!(self.phase, Phase::Delivering(_)) && now < self.linger_until {
            wake_at = wake_at.min(self.linger_until);
        }
        wake_at
    }

    fn connect_if_due(&mut self, now: Instant) {
        if self.link.is_some() || self.connecting.is_some() || now < self.connect_at {
            return;
        }
        let hello = v1::Hello {
            worker: self.id.to_string(),
            tags: self.config.tags.clone(),
            kinds: vec![self.handler.kind().into()],
            capacity: self.config.slots,
            held: self.book.leases(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        self.connecting = Some(Box::pin(connect(self.config.clone(), hello)));
    }

    fn connected(&mut self, link: Link, welcome: v1::Welcome) {
        if self.failures > 0 {
            telemetry::metrics().worker_reconnects.add(1, &[]);
        }
        tracing::info!(worker = %self.id, tries = self.failures + 1, "connected to the coordinator");
        self.failures = 0;
        self.link = Some(link);
        self.book.reconnected(Instant::now());
        for lease in &welcome.lost {
            self.lost(Some(lease));
        }
        if self.phase != Phase::Working {
            self.send(ToCoordinator::Drain(v1::Drain {}));
        }
        let now = Instant::now();
        let requests = self.requests.values();
        let waiting: Vec<ToCoordinator> = requests.map(|request| request.again(now)).collect();
        for message in waiting {
            self.send(message);
        }
    }

    /// The stream is no more; leases go on.
    fn disconnected(&mut self, reason: &str) {
        self.link = None;
        self.failures = self.failures.saturating_add(1);
        let wait = RECONNECT.jittered(self.failures);
        self.connect_at = Instant::now() + wait;
        tracing::warn!(
            worker = %self.id,
            failures = self.failures,
            retry_in_ms = wait.as_millis(),
            reason,
            "no connection to the coordinator"
        );
    }

    fn begin_drain(&mut self) {
        tracing::info!(worker = %self.id, running = self.book.running(), "draining");
        let now = Instant::now();
        self.phase = Phase::Draining(now + self.config.grace);
        self.linger_until = now + CROSSING_GRANTS_TIMEOUT;
        self.send(ToCoordinator::Drain(v1::Drain {}));
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
        let lingers = self.link.is_some() && now < self.linger_until;
        match self.phase {
            Phase::Delivering(until) => now >= until || (self.book.unacked() == 0 && !lingers),
            _ => false,
        }
    }

    fn send_what_is_due(&mut self, now: Instant) {
        if self.link.is_none() {
            return;
        }
        self.requests
            .retain(|_, request| !request.reply.is_closed());
        let results = self.book.results(now);
        if !results.is_empty() {
            self.send(ToCoordinator::Results(v1::Results { results }));
        }
        let renewals = self.book.renewals(now);
        if !renewals.is_empty() {
            self.send(ToCoordinator::Renewals(v1::Renewals { renewals }));
        }
        if self.phase == Phase::Working {
            self.send_credit();
        }
    }

    fn send_credit(&mut self) {
        let free = self.book.free(self.config.slots);
        let Some(link) = &mut self.link else { return };
        let jobs = free.saturating_sub(link.credit);
        if jobs == 0 {
            return;
        }
        link.credit += jobs;
        let kind = self.handler.kind().into();
        self.send(ToCoordinator::Credit(v1::Credit { kind, jobs }));
    }

    /// Never waits: a stream whose outbox is full has a coordinator that reads nothing.
    fn send(&mut self, message: ToCoordinator) {
        let Some(link) = &self.link else { return };
        let message = v1::WorkerMessage {
            message: Some(message),
        };
        if link.outbox.try_send(message).is_err() {
            self.disconnected("the stream takes no more messages");
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
        self.send(message.clone());
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
                        self.book
                            .renewed(&id, Duration::from_millis(ack.lease_ttl_ms));
                    }
                }
                for lease in &acks.lost {
                    self.lost(Some(lease));
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
            Some(FromCoordinator::GoAway(away)) => {
                self.disconnected(&format!("asked to go away: {}", away.reason));
                // It is there, and asks for it: no reason to wait.
                self.connect_at = Instant::now();
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

    fn granted(&mut self, grant: v1::Grant) {
        if let Some(link) = &mut self.link {
            link.credit = link.credit.saturating_sub(1);
        }
        let Some(id) = LeaseId::from_wire(grant.lease.as_ref()) else {
            tracing::error!("a grant names no job");
            return;
        };
        let ttl = Duration::from_millis(grant.lease_ttl_ms);
        let Some(lease) = self.book.grant(&id, ttl, Instant::now()) else {
            return;
        };
        if self.phase != Phase::Working {
            let reason = "the worker stops".to_owned();
            let result = job::to_wire(&id, JobOutcome::Released { reason }, String::new());
            self.book.ended(&id, result, Instant::now());
            return;
        }
        tracing::info!(job = %id.job, fence = id.fence.0, attempt = grant.attempt, "job granted");
        let handler = Arc::clone(&self.handler);
        let (deps, events) = (self.deps.clone(), self.events_in.clone());
        let work = job::run(handler, grant, id, lease, deps, events);
        self.deps.tasks.spawn("worker.job", OnFailure::Log, work);
    }

    fn lost(&mut self, lease: Option<&v1::Lease>) {
        if let Some(id) = LeaseId::from_wire(lease) {
            tracing::warn!(job = %id.job, fence = id.fence.0, "lease lost");
            self.book.lose(&id, Stop::Lost);
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

fn manifest_request(id: &LeaseId) -> String {
    format!("manifest {}@{}", id.job, id.fence)
}

async fn next_message(link: &mut Option<Link>) -> Result<Option<v1::CoordinatorMessage>, Status> {
    match link {
        Some(link) => link.inbox.message().await,
        None => std::future::pending().await,
    }
}

async fn connected(connecting: &mut Option<Connecting>) -> Result<(Link, v1::Welcome), Status> {
    match connecting {
        Some(connecting) => connecting.await,
        None => std::future::pending().await,
    }
}

async fn connect(config: WorkerConfig, hello: v1::Hello) -> Result<(Link, v1::Welcome), Status> {
    let greeted = with_deadline("worker.connect", CONNECT_TIMEOUT, greet(config, hello));
    greeted
        .await
        .unwrap_or_else(|timeout| Err(Status::deadline_exceeded(timeout.to_string())))
}

async fn greet(config: WorkerConfig, hello: v1::Hello) -> Result<(Link, v1::Welcome), Status> {
    let channel = net::channel(
        &config.coordinator,
        config.tls.as_ref(),
        config.token.as_ref(),
    )
    .map_err(|error| Status::invalid_argument(telemetry::error_chain(&error)))?;
    let mut client = WorkerServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (outbox, queued) = mpsc::channel(OUTBOX_MAX);
    let hello = v1::WorkerMessage {
        message: Some(ToCoordinator::Hello(hello)),
    };
    // The channel is empty, so there is room.
    let _ = outbox.try_send(hello);
    let mut inbox = client
        .session(ReceiverStream::new(queued))
        .await?
        .into_inner();
    match inbox.message().await?.and_then(|message| message.message) {
        Some(FromCoordinator::Welcome(welcome)) => {
            let link = Link {
                outbox,
                inbox,
                credit: 0,
            };
            Ok((link, welcome))
        }
        _ => Err(Status::internal(
            "the coordinator did not answer the greeting",
        )),
    }
}

/// A status in one line, without its details and metadata.
fn describe(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
