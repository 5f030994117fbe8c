//! Connections: how many, how slow, and how they end. axum's own server has no deadline for headers, nor for a client
//! that takes nothing of its answer, so hyper is driven here.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Request};
use axum::response::{IntoResponse as _, Response};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks, Unfinished};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

use super::error::ApiError;
use super::limits;
use super::places::{Answered, Place, Places};

/// Wait after an accept that failed: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What connections are held to.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub(super) connections: usize,
    pub(super) spare: usize,
    pub(super) first_header: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: limits::CONNECTIONS_MAX,
            spare: limits::SPARE_CONNECTIONS_MAX,
            first_header: limits::FIRST_HEADER_READ_MAX,
        }
    }
}

/// Serves `router` until `shutdown` drains, then finishes the answers that run, for at most `drain_limit`.
///
/// # Errors
/// Names what was still running at the end.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: Shutdown,
    drain_limit: Duration,
) -> Result<(), Unfinished> {
    serve_within(listener, router, shutdown, drain_limit, Bounds::default()).await
}

pub(super) async fn serve_within(
    listener: TcpListener,
    router: Router,
    shutdown: Shutdown,
    drain_limit: Duration,
    bounds: Bounds,
) -> Result<(), Unfinished> {
    let tasks = Tasks::new(shutdown.clone());
    let places = Places::new(bounds.connections, bounds.spare);
    while let Some((stream, place)) = accept(&listener, &places, &shutdown).await {
        let (router, shutdown) = (router.clone(), shutdown.clone());
        tasks.spawn_apart("api.connection", OnFailure::Ignore, async move {
            connection(stream, router, &shutdown, place, bounds.first_header).await
        });
    }
    drop(listener);
    tokio::select! {
        ended = tasks.join_all(drain_limit) => ended,
        () = shutdown.aborted() => tasks.join_all(Duration::ZERO).await,
    }
}

/// The next connection, once there is a place for it; none when draining began.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Places>,
    shutdown: &Shutdown,
) -> Option<(TcpStream, Place)> {
    let accepted = async {
        loop {
            match listener.accept().await {
                // A place is taken from another one only for a connection that is there.
                Ok((stream, _)) => return (stream, places.take().await),
                Err(error) => {
                    tracing::warn!(error = %error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = shutdown.draining() => None,
        accepted = accepted => Some(accepted),
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    shutdown: &Shutdown,
    place: Place,
    first_header: Duration,
) -> Result<(), hyper::Error> {
    // A token is a small write that must not wait for the next.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Stalling::new(stream, limits::WRITE_STALL_MAX));
    let router = TowerToHyperService::new(router);
    let place = Arc::new(place);
    let asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        answer(&router, request, &place)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits::HEADER_READ_MAX)
        .max_buf_size(limits::CONNECTION_BUFFER_BYTES);
    let mut connection = std::pin::pin!(http.serve_connection(io, service));
    let silent = async {
        tokio::time::sleep(first_header).await;
        if asked.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = shutdown.draining() => {}
        () = place.given_away() => {}
        () = silent => {}
    }
    // hyper would wait for the first request of a connection that has had none.
    if !asked.load(Ordering::Relaxed) {
        return Ok(());
    }
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// The answer to one request. A spare place has only answers that tell how the server does, and one of them.
fn answer(
    router: &TowerToHyperService<Router>,
    request: Request<Incoming>,
    place: &Arc<Place>,
) -> impl Future<Output = Result<Response<Answered>, Infallible>> + use<> {
    let at_work = place.work();
    let spare = place.is_spare();
    let served = !spare || ["/health", "/metrics"].contains(&request.uri().path());
    let answer = served.then(|| router.call(request));
    async move {
        let mut response = match answer {
            Some(answer) => answer.await?,
            None => ApiError::connections_full().into_response(),
        };
        if spare {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        Ok(response.map(|body| at_work.on(body)))
    }
}

/// A stream whose writes fail when the other side takes nothing for too long.
struct Stalling {
    stream: TcpStream,
    stall_max: Duration,
    /// Runs while a write waits.
    waits: Option<Pin<Box<Sleep>>>,
}

impl Stalling {
    fn new(stream: TcpStream, stall_max: Duration) -> Self {
        Self {
            stream,
            stall_max,
            waits: None,
        }
    }

    fn poll_timed<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(done) = write(Pin::new(&mut self.stream), cx) {
            self.waits = None;
            return Poll::Ready(done);
        }
        let until = Instant::now() + self.stall_max;
        let waits = self
            .waits
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        ready!(waits.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_timed(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_timed(cx, |stream, cx| stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_timed(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_timed(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (idle, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let mut stream = Stalling::new(accepted.unwrap().0, Duration::from_millis(50));
        let page = vec![0; 1 << 20];
        let stalled = loop {
            if let Err(error) = stream.write_all(&page).await {
                break error;
            }
        };
        assert_eq!(stalled.kind(), io::ErrorKind::TimedOut);
        drop(idle);
    }
}
