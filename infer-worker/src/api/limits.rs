//! How large and how slow a request may be.

use std::time::Duration;

/// Largest body of a completion: the longest context is some hundred kilobytes, and tools have schemas.
pub(super) const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest answer that is sent whole, in bytes: many answers with all log-probabilities that a request may ask for.
pub(super) const ANSWER_BYTES_MAX: usize = 1 << 30;
/// The same of a batch: what a piece of answers is made of must fit into an object, and many are there at once.
pub(super) const ANSWER_OFFLINE_BYTES_MAX: usize = 64 << 20;
/// Most log-probabilities of a request that is answered whole. All of them are kept until the last one is there.
pub(super) const LOGPROBS_MAX: usize = 4 << 20;
/// The same of a batch: what is told of a usual token takes some hundred bytes, and an answer that is too long is refused
/// before it is made.
pub(super) const LOGPROBS_OFFLINE_MAX: usize = ANSWER_OFFLINE_BYTES_MAX / 128;
/// Largest body that names an adapter.
pub(super) const ADAPTER_BODY_BYTES_MAX: usize = 64 << 10;
/// Longest wait for the headers of a connection's first request: who connects has something to say.
pub(super) const FIRST_HEADER_READ_MAX: Duration = Duration::from_secs(10);
/// Longest wait for a request's headers, also for the next request on a connection that is kept.
pub(super) const HEADER_READ_MAX: Duration = Duration::from_secs(75);
/// Longest wait for a whole body.
pub(super) const BODY_READ_MAX: Duration = Duration::from_secs(60);
/// Longest time in which a client takes nothing of an answer that is ready for it.
pub(super) const WRITE_STALL_MAX: Duration = Duration::from_secs(60);
/// Silence of a stream after which a comment tells proxies and clients that it lives.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Most connections at a time. One more takes the place of one that is silent.
pub(super) const CONNECTIONS_MAX: usize = 4_096;
/// Connections beside those, for asking how the server does when all of those are at work. One more waits in the
/// listener's backlog.
pub(super) const SPARE_CONNECTIONS_MAX: usize = 64;
/// Most bytes of a connection that are read before they are looked at, and so of a request's headers.
pub(super) const CONNECTION_BUFFER_BYTES: usize = 64 << 10;
/// Most requests that are rendered and encoded at a time: each takes a core.
pub(super) const PREPARING_MAX: usize = 4;
/// The same of requests of batches, which have places of their own: they keep no client waiting.
pub(super) const PREPARING_OFFLINE_MAX: usize = 2;
/// Longest wait for a place among those.
pub(super) const PREPARE_WAIT_MAX: Duration = Duration::from_secs(30);
