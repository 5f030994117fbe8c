//! `/health` and `/ready` over plain HTTP: 200 where all is well, 503 and why where it is not. No token is asked for, and
//! nothing is told but that.
//!
//! A connection has one request and a few seconds; of many at once, some wait.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;

use super::Health;
use crate::tasks::{OnFailure, TaskHandle, Tasks};

/// Connections at once. Whoever looks after processes has one or two.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may take, from its begin to the end of its answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait after an accept that failed: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Memory of a connection: a request is a line and a few headers.
const CONNECTION_BUFFER_BYTES: usize = 8 << 10;

/// The port cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("`health_listen`: cannot listen on {address}")]
pub struct ListenError {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub source: io::Error,
}

/// Health that is served until this is dropped.
#[derive(Debug)]
pub struct Served {
    /// Where, with the port that was taken in place of 0.
    pub address: SocketAddr,
    task: TaskHandle,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves how `health` is at `address`, as one of `tasks`.
///
/// # Errors
/// The port cannot be had.
pub async fn serve(
    address: SocketAddr,
    health: Health,
    tasks: &Tasks,
) -> Result<Served, ListenError> {
    let refused = |source| ListenError { address, source };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    tracing::info!(%address, "health is served");
    let answering =
        TcpListenerStream::new(listener).for_each_concurrent(CONNECTIONS_MAX, move |stream| {
            let health = health.clone();
            async move {
                match stream {
                    Ok(stream) => connection(stream, &health).await,
                    Err(error) => {
                        tracing::debug!(error = %error, "connection not accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
    let task = tasks.spawn_apart("health.serve", OnFailure::Log, answering);
    Ok(Served { address, task })
}

async fn connection(stream: TcpStream, health: &Health) {
    let service =
        service_fn(|request| async move { Ok::<_, Infallible>(answer(&request, health)) });
    let mut http = http1::Builder::new();
    http.keep_alive(false).max_buf_size(CONNECTION_BUFFER_BYTES);
    let serving = http.serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, serving).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!(error = %error, "a look at the health broke off"),
    }
}

fn answer(request: &Request<Incoming>, health: &Health) -> Response<String> {
    let judged = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/health") => health.live(),
        (&Method::GET | &Method::HEAD, "/ready") => health.ready(),
        (&Method::GET | &Method::HEAD, _) => {
            return text(StatusCode::NOT_FOUND, "there are /health and /ready");
        }
        _ => return text(StatusCode::METHOD_NOT_ALLOWED, "there is GET"),
    };
    match judged {
        Ok(()) => text(StatusCode::OK, "ok"),
        Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

fn text(status: StatusCode, text: &str) -> Response<String> {
    let mut response = Response::new(format!("{text}\n"));
    *response.status_mut() = status;
    let form = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, form);
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::health::Turn;
    use crate::shutdown::Shutdown;
    use crate::tasks::with_deadline;

    const SOON: Duration = Duration::from_secs(10);

    async fn served(health: &Health) -> (Served, Tasks) {
        let tasks = Tasks::new(Shutdown::new());
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let served = serve(address, health.clone(), &tasks).await.unwrap();
        (served, tasks)
    }

    /// What `request` is answered, until the other side closes.
    async fn say(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        with_deadline("test.answer", SOON, read)
            .await
            .unwrap()
            .unwrap();
        answer
    }

    async fn get(address: SocketAddr, path: &str) -> (String, String) {
        let answer = say(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].to_owned(), body.trim().to_owned())
    }

    #[tokio::test]
    async fn it_says_how_the_loops_do_and_nothing_else() {
        let health = Health::default();
        let (served, tasks) = served(&health).await;
        let at = served.address;
        let both = |code: &str, words: &str| (code.to_owned(), words.to_owned());
        assert_eq!(get(at, "/health").await, both("200", "ok"));
        let (code, words) = get(at, "/ready").await;
        assert!(code == "503" && words.contains("no loop runs"), "{words}");
        let watched = health.watch("train");
        watched.turned(Turn::Connected);
        assert_eq!(get(at, "/ready").await, both("200", "ok"));
        assert_eq!(get(at, "/").await.0, "404");
        let posted = say(
            at,
            "POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
        assert!(posted.starts_with("HTTP/1.1 405"), "{posted}");
        let head = say(at, "HEAD /health HTTP/1.0\r\n\r\n").await;
        assert!(
            head.starts_with("HTTP/1.0 200") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        drop(served);
        let ended = tasks.join_all(SOON).await;
        assert_eq!(ended, Ok(()));
        assert!(TcpStream::connect(at).await.is_err(), "the port is free");
    }

    #[tokio::test]
    async fn silent_connections_give_way() {
        let health = Health::default();
        let (served, _tasks) = served(&health).await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(served.address).await.unwrap());
        }
        assert_eq!(get(served.address, "/health").await.0, "200");
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_named() {
        let (served, tasks) = served(&Health::default()).await;
        let refused = serve(served.address, Health::default(), &tasks).await;
        let said = refused.unwrap_err().to_string();
        assert!(
            said.starts_with("`health_listen`: cannot listen on 127.0.0.1:"),
            "{said}"
        );
    }
}
