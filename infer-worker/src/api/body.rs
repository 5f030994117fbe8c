//! Bodies on their way in: each within bounds of size and time, and all of them together within one of memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use bytes::{Bytes, BytesMut};
use espalier_runtime::tasks::with_deadline;
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::limits::BODY_READ_MAX;

/// So much of each body takes no room, because the number of connections bounds it: small requests come through
/// whatever large ones do.
const FREE_BYTES: usize = 64 << 10;
/// Room for the rest of all bodies that are read, or were and are not parsed yet.
const ROOM_BYTES: usize = 256 << 20;
/// Longest wait for room.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(10);
/// A body over its limit is read on for so much and thrown away: a client that is cut off while it sends may never see
/// the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// Room for bodies.
#[derive(Clone)]
pub(super) struct Bodies(Arc<Semaphore>);

/// A body with the room that it takes, until its last user drops it.
struct Held {
    bytes: BytesMut,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Default for Bodies {
    fn default() -> Self {
        Self::new(ROOM_BYTES)
    }
}

impl Bodies {
    fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// The whole body.
    pub(super) async fn read(&self, body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
        let announced = body.size_hint().exact().and_then(|n| n.try_into().ok());
        let room = match announced.filter(|bytes| *bytes <= bytes_max) {
            // It holds nothing yet, so that it may wait.
            Some(bytes) => self.wait_for(bytes).await?,
            None => None,
        };
        let whole = self.read_into(room, body, bytes_max);
        let read = with_deadline("api.body", BODY_READ_MAX, whole).await;
        read.unwrap_or(Err(ApiError::too_slow(BODY_READ_MAX)))
    }

    async fn read_into(
        &self,
        mut room: Option<OwnedSemaphorePermit>,
        body: Body,
        bytes_max: usize,
    ) -> Result<Bytes, ApiError> {
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
                self.grow(&mut room, bytes)?;
                whole.extend_from_slice(&piece);
            } else {
                (whole, room) = (BytesMut::new(), None);
            }
        }
        match bytes > bytes_max {
            true => Err(ApiError::body_too_large(bytes_max)),
            false => Ok(Bytes::from_owner(Held {
                bytes: whole,
                _room: room,
            })),
        }
    }

    /// Room for a body of so many bytes.
    async fn wait_for(&self, bytes: usize) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        let more = bytes.saturating_sub(FREE_BYTES);
        if more == 0 {
            return Ok(None);
        }
        let count = u32::try_from(more).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.0).acquire_many_owned(count);
        match with_deadline("api.body_room", ROOM_WAIT_MAX, room).await {
            Ok(Ok(room)) => Ok(Some(room)),
            _ => Err(ApiError::no_room()),
        }
    }

    /// More room for a body that has grown to so many bytes. If all that are half read waited for more, none would end.
    fn grow(&self, room: &mut Option<OwnedSemaphorePermit>, bytes: usize) -> Result<(), ApiError> {
        let has = room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = bytes.saturating_sub(FREE_BYTES + has);
        if more == 0 {
            return Ok(());
        }
        let count = u32::try_from(more).unwrap_or(u32::MAX);
        let more = Arc::clone(&self.0).try_acquire_many_owned(count);
        let more = more.map_err(|_| ApiError::no_room())?;
        match room {
            Some(room) => room.merge(more),
            None => *room = Some(more),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1 << 20;

    fn announced(bytes: usize) -> Body {
        Body::from(vec![b'x'; bytes])
    }

    /// In two pieces, without a length.
    fn in_pieces(bytes: usize) -> Body {
        let half = || Ok::<_, std::convert::Infallible>(vec![b'x'; bytes / 2]);
        Body::from_stream(futures::stream::iter([half(), half()]))
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_wait_for_room_and_give_it_back() {
        let bodies = Bodies::new(FREE_BYTES);
        for body in [announced, in_pieces] {
            let first = bodies.read(body(2 * FREE_BYTES), MAX).await.unwrap();
            assert_eq!(first.len(), 2 * FREE_BYTES);
            for second in [announced, in_pieces] {
                let refused = bodies.read(second(2 * FREE_BYTES), MAX).await.unwrap_err();
                assert_eq!(refused, ApiError::no_room());
            }
            let small = bodies.read(announced(FREE_BYTES), MAX).await;
            assert!(small.is_ok(), "small bodies take none");
            let later = async {
                tokio::time::sleep(ROOM_WAIT_MAX / 2).await;
                drop(first);
            };
            let second = bodies.read(announced(2 * FREE_BYTES), MAX);
            let (second, ()) = tokio::join!(second, later);
            assert_eq!(second.unwrap().len(), 2 * FREE_BYTES);
        }
    }

    #[tokio::test]
    async fn what_is_too_large_takes_no_room() {
        let bodies = Bodies::new(0);
        for body in [announced, in_pieces] {
            let refused = bodies.read(body(FREE_BYTES), FREE_BYTES / 2 - 1).await;
            assert_eq!(refused, Err(ApiError::body_too_large(FREE_BYTES / 2 - 1)));
        }
    }
}
