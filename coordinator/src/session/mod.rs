//! `WorkerService`: one bidirectional stream a worker.
//!
//! A session is loops that run side by side: one reads what the worker says, one tells it where models are served, one
//! grants jobs against its credit, one finishes results, one renews leases. Each of the last three calls the queue with whatever has piled up
//! while its last call was under way, so that a busy worker costs few calls and an idle one waits for nobody.
//!
//! Fences are the queue's business: a session reports what the queue said. A stream that ends revokes nothing; what
//! it was granted and provably never sent goes back at once.

mod counts;
mod finish;
mod grant;
mod hello;
mod history;
mod manifest;
mod outgoing;
mod read;
mod renew;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::{Fence, JobKey, WorkerId};
use espalier_core::queue::JobKind;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::tasks::{OnFailure, with_deadline};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::api::Shared;
use crate::auth::Call;
use crate::queue::{Finish, Outcome};
use crate::registry::{Connected, Outbox};

pub use counts::tell_counters;

pub use outgoing::Outgoing;

/// Messages to a worker that wait for it to read: a few rounds of grants and answers.
const OUTBOX_MAX: usize = 32;
/// How long a message may wait for room; a worker that reads nothing for so long cannot keep its leases anyway.
pub const SEND_LIMIT: Duration = Duration::from_secs(10);
/// How long a stream may stay silent before its Hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long a worker that was asked to move may take to find another coordinator; then the stream ends.
const MOVE_LIMIT: Duration = Duration::from_secs(60);
/// Most entries of one message of the worker, as its proto says.
const ENTRIES_MAX: usize = 1_000;
/// Waits between tries at a queue that is away.
const QUEUE_BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(50),
    max: Duration::from_secs(2),
};

/// The service.
#[derive(Clone)]
pub struct WorkerApi(pub Arc<Shared>);

#[tonic::async_trait]
impl v1::worker_service_server::WorkerService for WorkerApi {
    type SessionStream = Outgoing;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Outgoing>, Status> {
        self.0.auth.admit(request.metadata(), Call::Session)?;
        if self.0.shutdown.is_draining() {
            let rule = "the coordinator is shutting down; reconnect";
            return Err(ApiError::Unavailable(rule.to_owned()).into());
        }
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let ended = CancellationToken::new();
        let unsent = Unsent::default();
        let gone = CancellationToken::new();
        let outgoing = Outgoing::new(messages, Arc::clone(&unsent), ended.clone(), gone.clone());
        let stream = Stream {
            incoming: request.into_inner(),
            outbox,
            ended,
            gone,
            unsent,
            endpoints: self.0.endpoints.subscribe(),
        };
        let served = serve(Arc::clone(&self.0), stream);
        self.0.tasks.spawn("session", OnFailure::Log, served);
        Ok(Response::new(outgoing))
    }
}

/// Leases whose grants were taken out of the outbox unsent.
type Unsent = Arc<Mutex<Vec<(JobKey, Fence)>>>;

/// Both directions of a stream.
struct Stream {
    incoming: Streaming<v1::WorkerMessage>,
    outbox: Outbox,
    ended: CancellationToken,
    /// Nothing more can be sent, and what was not is in `unsent`.
    gone: CancellationToken,
    unsent: Unsent,
    /// Where models are served, as far as the worker was not told yet.
    endpoints: watch::Receiver<v1::Endpoints>,
}

/// One greeted worker.
struct Session {
    shared: Arc<Shared>,
    connected: Arc<Connected>,
    /// Jobs that the worker has room for, by kind.
    credit: Mutex<BTreeMap<JobKind, u32>>,
    /// Held from a lease to its delivery, so that no grant follows the message that ends the stream.
    granting: tokio::sync::Mutex<()>,
}

/// Wraps a message.
pub fn message(message: Message) -> v1::CoordinatorMessage {
    v1::CoordinatorMessage {
        message: Some(message),
    }
}

async fn serve(shared: Arc<Shared>, mut stream: Stream) {
    let ended = stream.ended.clone();
    let greeted = tokio::select! {
        greeted = hello::greet(&shared, &mut stream) => greeted,
        () = ended.cancelled() => return,
        () = shared.shutdown.aborted() => return,
    };
    let connected = match greeted {
        Ok(connected) => connected,
        Err(error) => {
            let _ = stream.outbox.try_send(Err(error.into()));
            return;
        }
    };
    tracing::info!(worker = %connected.worker, capacity = connected.capacity, "worker connected");
    let Stream {
        incoming,
        outbox,
        gone,
        unsent,
        endpoints,
        ..
    } = stream;
    drop(outbox);
    let worker = connected.worker.clone();
    let session = Session {
        shared: Arc::clone(&shared),
        connected,
        credit: Mutex::default(),
        granting: tokio::sync::Mutex::default(),
    };
    // Boxed: the loops' states together would make every task of a session carry tens of kilobytes twice.
    Box::pin(session.run(incoming, endpoints)).await;
    shared.registry.leave(&session.connected);
    drop(session);
    // Without senders the stream ends, and says what it could not send.
    let _ = with_deadline("session.flush", SEND_LIMIT, gone.cancelled()).await;
    let unsent = std::mem::take(&mut *lock(&unsent));
    give_back(&shared, &worker, unsent).await;
    tracing::info!(%worker, "worker disconnected");
}

/// Puts back jobs whose grants never left this process: they spend nothing and are ready at once.
async fn give_back(shared: &Shared, worker: &WorkerId, unsent: Vec<(JobKey, Fence)>) {
    if unsent.is_empty() {
        return;
    }
    tracing::info!(leases = unsent.len(), "undelivered leases go back");
    let finishes: Vec<Finish> = unsent
        .into_iter()
        .map(|(key, fence)| Finish {
            key,
            fence,
            outcome: Outcome::Released,
        })
        .collect();
    match shared.queue.finish(finishes.clone()).await {
        Ok(acks) => history::finished(worker, &finishes, &acks),
        Err(error) => {
            tracing::warn!(error = %error, "undelivered leases could not go back; they end by their deadline");
        }
    }
}

impl Session {
    /// Runs the loops until the stream ends. The loops that call the queue complete what they have begun.
    async fn run(
        &self,
        incoming: Streaming<v1::WorkerMessage>,
        endpoints: watch::Receiver<v1::Endpoints>,
    ) {
        let (renewals, renewals_waiting) = mpsc::channel(ENTRIES_MAX);
        let (results, results_waiting) = mpsc::channel(ENTRIES_MAX);
        let (reports, reports_waiting) = mpsc::channel(manifest::REPORTS_MAX);
        let inboxes = read::Inboxes {
            renewals,
            results,
            reports,
        };
        tokio::join!(
            self.read(incoming, inboxes),
            self.grant(),
            self.finish(results_waiting),
            self.renew(renewals_waiting),
            self.check_manifests(reports_waiting),
            self.tell_endpoints(endpoints),
            self.end_in_time(),
        );
    }

    /// Tells where models are served whenever that changes.
    async fn tell_endpoints(&self, mut endpoints: watch::Receiver<v1::Endpoints>) {
        loop {
            tokio::select! {
                changed = endpoints.changed() => if changed.is_err() { return },
                () = self.connected.ended.cancelled() => return,
            }
            let told = endpoints.borrow_and_update().clone();
            if !self.send(Message::Endpoints(told)).await {
                return;
            }
        }
    }

    /// Asks the worker to move when this coordinator drains or the stream is old, and ends the stream when it does not.
    async fn end_in_time(&self) {
        let ended = &self.connected.ended;
        let shutdown = &self.shared.shutdown;
        tokio::select! {
            () = ended.cancelled() => return,
            () = shutdown.draining() => {}
            () = tokio::time::sleep(self.max_age()) => {}
        }
        self.ask_to_move(shutdown.is_draining()).await;
        // Until the worker has moved, its renewals and results are taken here; leases stand in any case.
        tokio::select! {
            () = ended.cancelled() => return,
            () = shutdown.aborted() => {}
            () = tokio::time::sleep(MOVE_LIMIT) => {}
            () = self.drained() => {}
        }
        ended.cancel();
    }

    async fn ask_to_move(&self, drains: bool) {
        self.connected.moving.store(true, Ordering::Relaxed);
        // What was leased before is sent before, so that no grant follows this message.
        let granting = self.granting.lock().await;
        let (reason, wait) = match drains {
            // All workers are asked at once, and come at others together unless they are spread.
            true => (
                "the coordinator is shutting down",
                (self.shared.config.drain_limit() / 10).mul_f64(self.spread()),
            ),
            false => (
                "the stream is old; coordinators that are new get load this way",
                Duration::ZERO,
            ),
        };
        let go_away = v1::GoAway {
            reason: reason.to_owned(),
            reconnect_after_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        };
        self.send(Message::GoAway(go_away)).await;
        drop(granting);
    }

    /// Half of a drain's time is for the workers, so that there is some left for what they said last.
    async fn drained(&self) {
        self.shared.shutdown.draining().await;
        tokio::time::sleep(self.shared.config.drain_limit() / 2).await;
    }

    /// The age at which the stream ends, spread so that workers which came together do not leave together.
    fn max_age(&self) -> Duration {
        let max_age = Duration::from_secs(self.shared.config.session_max_age_s);
        max_age.mul_f64(0.8 + 0.4 * self.spread())
    }

    /// A number in [0, 1) that differs from stream to stream.
    fn spread(&self) -> f64 {
        f64::from((self.connected.number % 1_000) as u32) / 1_000.0
    }

    /// Sends `what`; false: the worker has gone or does not read, and the stream ends.
    async fn send(&self, what: Message) -> bool {
        let sent = self.connected.outbox().send(Ok(message(what)));
        if let Ok(Ok(())) = with_deadline("session.send", SEND_LIMIT, sent).await {
            return true;
        }
        self.connected.ended.cancel();
        false
    }
}

/// The lease that a worker names.
fn lease_from_wire(lease: Option<&v1::Lease>) -> Result<(JobKey, Fence), FieldError> {
    let lease = lease.ok_or_else(|| FieldError::new("lease", "nothing", "must be given"))?;
    Ok((lease.job.parse()?, Fence(lease.fence)))
}

/// No code that may panic runs under these locks, and the state is valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Counts a renewal or a result under a lease that is no more.
fn count_stale(key: &JobKey) {
    use espalier_runtime::telemetry::{metrics, names::attribute};
    let project = opentelemetry::KeyValue::new(attribute::PROJECT, key.project.to_string());
    metrics().lease_stale_fences.add(1, &[project]);
}
