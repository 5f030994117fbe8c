//! The streams to the coordinators: one that is used, for a moment a second one that it takes the place of, and the next
//! one while it comes up. It decides where to connect and when; what is said over the streams is the session's.
//!
//! A coordinator that asks a worker to move is left in good order: the old stream is used until the new one is up, and
//! then read to its end, so that nothing that was said on it is lost.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use espalier_core::id::WorkerId;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message as FromCoordinator;
use espalier_proto::v1::worker_message::Message as ToCoordinator;
use espalier_proto::v1::worker_service_client::WorkerServiceClient;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::WorkerConfig;
use crate::backoff::Backoff;
use crate::net::{self, MESSAGE_BYTES_MAX, NetError, Place};
use crate::tasks::with_deadline;
use crate::telemetry;

/// Between tries to reach a coordinator. Well within the shortest lease, so that a restart of one loses none.
const RECONNECT: Backoff = Backoff {
    first: Duration::from_millis(200),
    max: Duration::from_secs(10),
};
/// How long a stream may take to come up, looking up names and greeting included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages that wait for the stream. Each holds up to a thousand items, so more means that nobody reads.
const OUTBOX_MAX: usize = 64;
/// Longest that a coordinator may put off the move that it asks for; no lease is as short as that.
const MOVE_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long a stream that was left is read to its end: the coordinator answers what was said on it.
const LEFT_TIMEOUT: Duration = Duration::from_secs(10);

/// The two directions of an open stream.
pub(super) struct Link {
    outbox: mpsc::Sender<v1::WorkerMessage>,
    inbox: Streaming<v1::CoordinatorMessage>,
    place: Place,
    /// Grants that the coordinator may still send.
    credit: u32,
    /// Whether the coordinator asked for the move to another stream.
    is_leaving: bool,
}

/// A stream that another took the place of.
struct Left {
    inbox: Streaming<v1::CoordinatorMessage>,
    until: Instant,
}

/// A stream that comes up. The place is told of a failure as well, where one was found.
type Opening = Pin<Box<dyn Future<Output = (Option<Place>, Result<Opened, Status>)> + Send>>;
type Opened = (Link, v1::Welcome);

/// What the streams have to say.
pub(super) enum Heard {
    /// A message of the coordinator.
    Message(v1::CoordinatorMessage),
    /// A message on the stream that was left.
    Late(v1::CoordinatorMessage),
    /// A new stream is up and in use.
    Up(v1::Welcome),
    /// Something ended that nobody has to act on.
    Nothing,
}

/// All streams of a worker.
pub(super) struct Links {
    worker: WorkerId,
    config: WorkerConfig,
    current: Option<Link>,
    left: Option<Left>,
    opening: Option<Opening>,
    open_at: Instant,
    /// Since the last stream that came up.
    failures: u32,
    /// Where no stream came up since then, or which asked us to move.
    tried: Vec<Place>,
    has_been_up: bool,
}

impl Links {
    pub(super) fn new(worker: WorkerId, config: WorkerConfig) -> Self {
        Self {
            worker,
            config,
            current: None,
            left: None,
            opening: None,
            open_at: Instant::now(),
            failures: 0,
            tried: Vec::new(),
            has_been_up: false,
        }
    }

    /// Whether anything can be sent.
    pub(super) fn is_up(&self) -> bool {
        self.current.is_some()
    }

    /// How many more grants the worker may ask for, who has room for `free`. None while it moves: what it would be
    /// given on the old stream and on the new one could be more than it has room for.
    pub(super) fn credit_to_give(&mut self, free: u32) -> u32 {
        match &mut self.current {
            Some(link) if !link.is_leaving => {
                let more = free.saturating_sub(link.credit);
                link.credit += more;
                more
            }
            _ => 0,
        }
    }

    /// Notes that a grant came. False: there was no credit for it.
    pub(super) fn take_credit(&mut self) -> bool {
        let Some(link) = &mut self.current else {
            return false;
        };
        let had = link.credit > 0;
        link.credit = link.credit.saturating_sub(1);
        had
    }

    /// Never waits: a stream whose outbox is full has a coordinator that reads nothing.
    pub(super) fn send(&mut self, message: ToCoordinator) {
        let Some(link) = &self.current else { return };
        let message = v1::WorkerMessage {
            message: Some(message),
        };
        if link.outbox.try_send(message).is_err() {
            self.broken("the stream takes no more messages");
        }
    }

    /// The coordinator asks us to move.
    pub(super) fn leave(&mut self, away: &v1::GoAway) {
        let Some(link) = &mut self.current else {
            return;
        };
        if link.is_leaving {
            return;
        }
        let wait = Duration::from_millis(away.reconnect_after_ms).min(MOVE_WAIT_MAX);
        tracing::info!(worker = %self.worker, reason = away.reason, wait_ms = wait.as_millis(), "asked to move");
        link.is_leaving = true;
        // No grants follow this message.
        link.credit = 0;
        self.tried = vec![link.place.clone()];
        self.open_at = Instant::now() + wait;
    }

    /// When [`connect_if_due`](Self::connect_if_due) or [`next`](Self::next) has something to do by the clock.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let left = self.left.as_ref().map(|left| left.until);
        let open = self.wants_another().then_some(self.open_at);
        left.into_iter().chain(open).min()
    }

    fn wants_another(&self) -> bool {
        let stays = self.current.as_ref().is_some_and(|link| !link.is_leaving);
        !stays && self.opening.is_none()
    }

    /// Begins to open a stream where one is needed. `hello` is what it begins with.
    pub(super) fn connect_if_due(&mut self, now: Instant, hello: impl FnOnce() -> v1::Hello) {
        if self.left.as_ref().is_some_and(|left| now >= left.until) {
            self.left = None;
        }
        if self.wants_another() && now >= self.open_at {
            let opening = open(self.config.clone(), self.tried.clone(), hello());
            self.opening = Some(Box::pin(opening));
        }
    }

    /// Waits for the next thing that a stream has to say. For ever, where there is no stream. Cancel-safe.
    pub(super) async fn next(&mut self) -> Heard {
        let current = self.current.as_mut().map(|link| &mut link.inbox);
        let left = self.left.as_mut().map(|left| &mut left.inbox);
        tokio::select! {
            message = next_message(current) => match message {
                Ok(Some(message)) => Heard::Message(message),
                Ok(None) => self.broken("the coordinator ended the stream"),
                Err(status) => self.broken(&describe(&status)),
            },
            message = next_message(left) => match message {
                Ok(Some(message)) => Heard::Late(message),
                Ok(None) | Err(_) => {
                    self.left = None;
                    Heard::Nothing
                }
            },
            (place, opened) = opened(&mut self.opening) => {
                self.opening = None;
                match opened {
                    Ok((link, welcome)) => self.up(link, welcome),
                    Err(status) => self.not_opened(place, &describe(&status)),
                }
            }
        }
    }

    fn up(&mut self, link: Link, welcome: v1::Welcome) -> Heard {
        if self.has_been_up {
            telemetry::metrics().worker_reconnects.add(1, &[]);
        }
        tracing::info!(worker = %self.worker, coordinator = %link.place, tries = self.failures + 1, "connected to a coordinator");
        self.has_been_up = true;
        self.failures = 0;
        self.tried.clear();
        let until = Instant::now() + LEFT_TIMEOUT;
        // Dropping its outbox tells the old coordinator that nothing follows.
        self.left = self.current.replace(link).map(|old| Left {
            inbox: old.inbox,
            until,
        });
        Heard::Up(welcome)
    }

    /// The stream in use is no more; leases go on.
    fn broken(&mut self, reason: &str) -> Heard {
        if let Some(link) = self.current.take() {
            self.note_failure(Some(link.place), reason);
        }
        Heard::Nothing
    }

    fn not_opened(&mut self, place: Option<Place>, reason: &str) -> Heard {
        self.note_failure(place, reason);
        Heard::Nothing
    }

    fn note_failure(&mut self, place: Option<Place>, reason: &str) {
        self.failures = self.failures.saturating_add(1);
        let wait = RECONNECT.jittered(self.failures);
        self.open_at = Instant::now() + wait;
        let coordinator = place.as_ref().map(ToString::to_string);
        if let Some(place) = place {
            // One that was tried before was taken because all were: a new round begins.
            if self.tried.contains(&place) {
                self.tried.clear();
            }
            self.tried.push(place);
        }
        tracing::warn!(
            worker = %self.worker,
            coordinator,
            failures = self.failures,
            retry_in_ms = wait.as_millis(),
            reason,
            "no connection to a coordinator"
        );
    }
}

async fn next_message(
    inbox: Option<&mut Streaming<v1::CoordinatorMessage>>,
) -> Result<Option<v1::CoordinatorMessage>, Status> {
    match inbox {
        Some(inbox) => inbox.message().await,
        None => std::future::pending().await,
    }
}

async fn opened(opening: &mut Option<Opening>) -> (Option<Place>, Result<Opened, Status>) {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

async fn open(
    config: WorkerConfig,
    tried: Vec<Place>,
    hello: v1::Hello,
) -> (Option<Place>, Result<Opened, Status>) {
    let mut chosen = None;
    let greeted = greet(&config, &tried, hello, &mut chosen);
    let greeted = with_deadline("worker.connect", CONNECT_TIMEOUT, greeted).await;
    let late = |timeout: crate::tasks::DeadlineExceeded| {
        Err(Status::deadline_exceeded(timeout.to_string()))
    };
    let opened = greeted.unwrap_or_else(late);
    (chosen, opened)
}

async fn greet(
    config: &WorkerConfig,
    tried: &[Place],
    hello: v1::Hello,
    chosen: &mut Option<Place>,
) -> Result<Opened, Status> {
    let refused = |error: NetError| Status::failed_precondition(telemetry::error_chain(&error));
    let places = config.coordinators.resolve().await.map_err(refused)?;
    let place = net::choose(&places, tried, rand::random());
    let place = place.ok_or_else(|| Status::unavailable("the name stands for no address"))?;
    *chosen = Some(place.clone());
    let channel = net::channel_to(place, config.tls.as_ref(), config.token.as_ref());
    let mut client = WorkerServiceClient::new(channel.map_err(refused)?)
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
                place: place.clone(),
                credit: 0,
                is_leaving: false,
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
