//! How large and how slow a request may be.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use espalier_runtime::tasks::with_deadline;
use futures::StreamExt as _;

use super::error::ApiError;

/// Largest body of a completion: the longest context is some hundred kilobytes, and tools have schemas.
pub(super) const BODY_BYTES_MAX: usize = 16 << 20;
/// Largest body that names an adapter.
pub(super) const ADAPTER_BODY_BYTES_MAX: usize = 64 << 10;
/// Longest wait for a request's headers, also for the next request on a connection that is kept.
pub(super) const HEADER_READ_MAX: Duration = Duration::from_secs(75);
/// Longest wait for a whole body.
const BODY_READ_MAX: Duration = Duration::from_secs(60);
/// Longest time in which a client takes nothing of an answer that is ready for it.
pub(super) const WRITE_STALL_MAX: Duration = Duration::from_secs(60);
/// Silence of a stream after which a comment tells proxies and clients that it lives.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Most connections at a time. One more waits in the listener's backlog.
pub(super) const CONNECTIONS_MAX: usize = 4_096;
/// Most requests that are rendered and encoded at a time: each takes a core.
pub(super) const PREPARING_MAX: usize = 4;
/// The same of requests of batches, which have places of their own: they keep no client waiting.
pub(super) const PREPARING_OFFLINE_MAX: usize = 2;
/// Longest wait for a place among those.
pub(super) const PREPARE_WAIT_MAX: Duration = Duration::from_secs(30);

/// A body over its limit is read on for so much and thrown away: a client that is cut off while it sends may never see
/// the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// The whole body, within bounds of size and time.
pub(super) async fn read(body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let whole = async {
        let mut pieces = body.into_data_stream();
        let mut whole = BytesMut::new();
        let mut bytes = 0;
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|_| ApiError::body("the body was cut"))?;
            bytes += piece.len();
            if bytes > bytes_max + DISCARDED_BYTES_MAX {
                break;
            }
            if bytes <= bytes_max {
                whole.extend_from_slice(&piece);
            } else {
                whole = BytesMut::new();
            }
        }
        match bytes > bytes_max {
            true => Err(ApiError::body_too_large(bytes_max)),
            false => Ok(whole.freeze()),
        }
    };
    let read = with_deadline("api.body", BODY_READ_MAX, whole).await;
    read.unwrap_or(Err(ApiError::too_slow(BODY_READ_MAX)))
}
