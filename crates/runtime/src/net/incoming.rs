//! The connections of a server: at most so many at once, and none that says nothing. Who may call is not decided here,
//! so this bounds what somebody without a token can hold.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// Most connections at once. A worker has one and a client one or two, whatever they do, so this is beyond what one
/// process can serve; each may hold some MiB of half-read frames.
const CONNECTIONS_MAX: usize = 4_096;

/// How long a new connection may take to begin to speak.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// Bytes with which every HTTP/2 connection begins. A TLS handshake begins with more.
const PREFACE_BYTES: usize = 24;

/// What [`super::incoming`] gives.
#[derive(Debug)]
pub struct Incoming {
    accepted: TcpIncoming,
    places: Arc<Semaphore>,
    /// Whether the last connection found no place: a flood is one line in the log.
    full: bool,
}

impl Incoming {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self::with_places(listener, CONNECTIONS_MAX)
    }

    fn with_places(listener: TcpListener, places: usize) -> Self {
        Self {
            accepted: TcpIncoming::from(listener).with_nodelay(Some(true)),
            places: Arc::new(Semaphore::new(places)),
            full: false,
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    /// A connection without a place is closed at once: one that waited would look like a server that hangs.
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let stream = match ready!(Pin::new(&mut self.accepted).poll_next(cx)) {
                Some(Ok(stream)) => stream,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            };
            match Arc::clone(&self.places).try_acquire_owned() {
                Ok(place) => {
                    self.full = false;
                    return Poll::Ready(Some(Ok(Connection::new(stream, place))));
                }
                Err(_) if self.full => {}
                Err(_) => {
                    self.full = true;
                    tracing::warn!(
                        connections_max = CONNECTIONS_MAX,
                        "connections are refused: there are too many"
                    );
                }
            }
        }
    }
}

/// An accepted connection, in its place.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Bytes of the preface that are still to come, and until when; none once it has begun to speak.
    silent: Option<(usize, Pin<Box<Sleep>>)>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit) -> Self {
        let until = Box::pin(tokio::time::sleep(SILENCE_LIMIT));
        Self {
            stream,
            silent: Some((PREFACE_BYTES, until)),
            _place: place,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some((missing, until)) = &mut self.silent else {
            return read;
        };
        let came = buf.filled().len() - before;
        if came >= *missing {
            self.silent = None;
            return read;
        }
        *missing -= came;
        if read.is_pending() && until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn start(places: usize) -> (Incoming, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (Incoming::with_places(listener, places), address)
    }

    #[tokio::test]
    async fn a_connection_without_a_place_is_closed_and_a_place_is_given_back() {
        let (mut incoming, address) = start(1).await;
        let _first = TcpStream::connect(address).await.unwrap();
        let held = incoming.next().await.unwrap().unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        let mut byte = [0];
        let closed = tokio::select! {
            read = second.read(&mut byte) => read,
            _ = incoming.next() => panic!("there is no second place"),
        };
        assert_eq!(closed.unwrap(), 0);
        drop(held);
        let _third = TcpStream::connect(address).await.unwrap();
        assert!(incoming.next().await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_begin_to_speak_is_let_go_and_who_does_may_be_quiet() {
        let (mut incoming, address) = start(2).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        let mut connection = incoming.next().await.unwrap().unwrap();
        client.write_all(&[0; PREFACE_BYTES - 1]).await.unwrap();
        let mut bytes = [0; PREFACE_BYTES];
        let error = connection.read_exact(&mut bytes).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let mut client = TcpStream::connect(address).await.unwrap();
        let mut connection = incoming.next().await.unwrap().unwrap();
        client.write_all(&[0; PREFACE_BYTES]).await.unwrap();
        connection.read_exact(&mut bytes).await.unwrap();
        let long = tokio::time::timeout(100 * SILENCE_LIMIT, connection.read(&mut bytes));
        assert!(long.await.is_err(), "nothing ends it");
    }
}
