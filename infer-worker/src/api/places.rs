//! Places for connections: how many there are, and who gives one up when all are taken.
//!
//! A connection between two requests, or before its first, gives its place to one that comes: the one that has been
//! silent for longest. Where all are at work there are a few places beside, for asking how the server does.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::Notify;

/// All places.
pub(super) struct Places {
    ordinary: usize,
    spare: usize,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Default)]
struct State {
    connections: HashMap<u64, Connection>,
    spare_taken: usize,
    /// Counts on with each connection, and with each that falls silent.
    turn: u64,
}

struct Connection {
    /// The turn in which it fell silent; none while it is at work.
    silent_since: Option<u64>,
    close: Arc<Notify>,
}

impl Places {
    /// `spare` ones are taken only when all `ordinary` ones are at work.
    pub(super) fn new(ordinary: usize, spare: usize) -> Arc<Self> {
        Arc::new(Self {
            ordinary,
            spare,
            state: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// A place, as soon as there is one.
    pub(super) async fn take(self: &Arc<Self>) -> Place {
        loop {
            if let Some(place) = self.try_take() {
                return place;
            }
            self.freed.notified().await;
        }
    }

    fn try_take(self: &Arc<Self>) -> Option<Place> {
        let mut state = self.state();
        if state.connections.len() >= self.ordinary && !state.close_one() {
            if state.spare_taken >= self.spare {
                return None;
            }
            state.spare_taken += 1;
            return Some(Place {
                places: Arc::clone(self),
                id: None,
                close: Arc::default(),
            });
        }
        state.turn += 1;
        let (id, close) = (state.turn, Arc::<Notify>::default());
        let connection = Connection {
            silent_since: Some(id),
            close: Arc::clone(&close),
        };
        state.connections.insert(id, connection);
        Some(Place {
            places: Arc::clone(self),
            id: Some(id),
            close,
        })
    }

    /// No code that may panic runs under the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes the place of the connection that has been silent for longest. False: all are at work.
    fn close_one(&mut self) -> bool {
        let silent = self.connections.iter();
        let silent = silent.filter_map(|(id, connection)| Some((connection.silent_since?, *id)));
        let Some((_, id)) = silent.min() else {
            return false;
        };
        if let Some(closed) = self.connections.remove(&id) {
            closed.close.notify_one();
        }
        true
    }
}

/// The place of one connection.
pub(super) struct Place {
    places: Arc<Places>,
    /// None: a spare one.
    id: Option<u64>,
    close: Arc<Notify>,
}

impl Place {
    /// Whether it is there only for asking how the server does.
    pub(super) fn is_spare(&self) -> bool {
        self.id.is_none()
    }

    /// When the connection is to end because another one has its place.
    pub(super) async fn given_away(&self) {
        self.close.notified().await;
    }

    /// A request came. Its answer keeps the connection at work until it has been sent or dropped.
    pub(super) fn work(self: &Arc<Self>) -> AtWork {
        self.set_silent(false);
        AtWork(Arc::clone(self))
    }

    fn set_silent(&self, silent: bool) {
        let mut state = self.places.state();
        state.turn += 1;
        let turn = state.turn;
        let connection = self.id.and_then(|id| state.connections.get_mut(&id));
        if let Some(connection) = connection {
            connection.silent_since = silent.then_some(turn);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.state();
        match self.id {
            Some(id) => drop(state.connections.remove(&id)),
            None => state.spare_taken -= 1,
        }
        self.places.freed.notify_one();
    }
}

/// While it lives a connection is not silent.
pub(super) struct AtWork(Arc<Place>);

impl AtWork {
    /// The body of the answer that is worked on.
    pub(super) fn on(self, body: Body) -> Answered {
        Answered {
            body,
            _at_work: self,
        }
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.set_silent(true);
        // Whoever waits for a place may have this one now.
        self.0.places.freed.notify_one();
    }
}

/// The body of an answer.
pub(super) struct Answered {
    body: Body,
    _at_work: AtWork,
}

impl HttpBody for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[test]
    fn who_has_been_silent_for_longest_gives_way() {
        let places = Places::new(3, 1);
        let take = || places.try_take().map(Arc::new);
        let [a, b, c] = [(); 3].map(|()| take().unwrap());
        drop(a.work());
        let busy = b.work();
        let given_away = |place: &Place| place.given_away().now_or_never().is_some();
        let d = take().unwrap();
        assert!(given_away(&c) && !given_away(&a), "c never spoke");
        let at_work = d.work();
        let e = take().unwrap();
        assert!(given_away(&a) && !given_away(&b));
        // Those that gave their place away leave nothing when they go.
        drop((a, c));
        let also = e.work();
        let spare = take().unwrap();
        assert!(spare.is_spare() && !e.is_spare());
        assert!(take().is_none(), "all are at work");
        drop(busy);
        assert!(!take().unwrap().is_spare());
        assert!(given_away(&b));
        drop((at_work, also, spare));
    }

    #[tokio::test]
    async fn who_comes_waits_for_a_place() {
        let places = Places::new(1, 0);
        let first = Arc::new(places.take().await);
        let work = first.work();
        let waits = places.take();
        let mut waits = std::pin::pin!(waits);
        assert!(waits.as_mut().now_or_never().is_none());
        drop(work);
        waits.await;
    }
}
