//! How a server is reached: over pipes, a Unix socket or the network, up to the end of the handshake. What it may send
//! is bounded here.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use espalier_core::error::FieldError;
use http::{HeaderName, HeaderValue};
use rmcp::ServiceExt;
use rmcp::service::{ClientInitializeError, RoleClient, RunningService};
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::transport::{StreamableHttpClientTransport, UnixSocketHttpClient};
use tokio::io::{AsyncRead, ReadBuf};

use super::client::Client;
use super::start_error;
use crate::mcp::child::Pipes;
use crate::mcp::config::HttpServer;
use crate::mcp::error::McpError;
use crate::mcp::redact::Secrets;

/// Largest message from a server. A page of 5 MB is an answer; more than this is a flood.
pub(super) const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Most that a server may write to its pipe between two calls: one answer, and room for notifications beside it.
const PIPE_BYTES_MAX: u64 = 24 * 1024 * 1024;

/// How the server is reached.
pub(in crate::mcp) enum Reach<'a> {
    /// Over the pipes of its process.
    Pipes(Pipes),
    /// Over a Unix socket, for streamable HTTP.
    Socket(&'a Path),
    /// Over the network, for streamable HTTP.
    Http(&'a HttpServer),
}

impl Reach<'_> {
    /// Counts what the server writes, where it has a pipe.
    pub(super) fn meter(&self) -> Option<Meter> {
        matches!(self, Self::Pipes(_)).then(Meter::default)
    }

    /// What of the address and headers must not show in an error.
    pub(super) fn secrets(&self) -> Secrets {
        match self {
            Self::Http(http) => Secrets::new(http.headers.values().chain([&http.url])),
            Self::Pipes(_) | Self::Socket(_) => Secrets::default(),
        }
    }

    /// Connects and shakes hands.
    pub(super) async fn serve(
        self,
        server: &str,
        client: Client,
        meter: Option<Meter>,
    ) -> Result<RunningService<RoleClient, Client>, McpError> {
        let running = match self {
            Self::Pipes(pipes) => {
                let stdout = Metered {
                    inner: pipes.stdout,
                    meter: meter.unwrap_or_default(),
                };
                let transport = AsyncRwTransport::new_client(stdout, pipes.stdin)
                    .with_max_line_length(ANSWER_BYTES_MAX);
                client.serve(transport).await
            }
            Self::Socket(path) => {
                // Origin form: with an absolute address the server would misread the path. Its host check wants the
                // port that the preloaded script reports.
                let socket =
                    UnixSocketHttpClient::new(&path.to_string_lossy(), "http://localhost:1");
                let transport =
                    StreamableHttpClientTransport::with_client(socket, http_config("/mcp"));
                client.serve(transport).await
            }
            Self::Http(http) => {
                let config = http_config(&http.url).custom_headers(headers(server, http)?);
                client
                    .serve(StreamableHttpClientTransport::from_config(config))
                    .await
            }
        };
        // The error of a failed handshake may quote headers: only its kind is kept.
        running.map_err(|error| start_error(server, handshake_reason(&error), None))
    }
}

fn handshake_reason(error: &ClientInitializeError) -> &'static str {
    use ClientInitializeError as E;
    match error {
        E::ConnectionClosed(_) => "the connection ended during the handshake",
        E::TransportError { .. } => "it could not be reached",
        E::JsonRpcError(_) => "it refused the handshake",
        _ => "the handshake failed",
    }
}

fn http_config(uri: &str) -> StreamableHttpClientTransportConfig {
    StreamableHttpClientTransportConfig::with_uri(uri)
        .reinit_on_expired_session(false)
        .max_sse_event_size(ANSWER_BYTES_MAX)
        .max_json_response_size(ANSWER_BYTES_MAX)
}

fn headers(server: &str, http: &HttpServer) -> Result<HashMap<HeaderName, HeaderValue>, McpError> {
    let header = |(name, value): (&String, &String)| {
        let refuse =
            |rule: &str| FieldError::new(format!("mcpServers.{server}.headers.{name}"), "…", rule);
        let key = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| refuse("must be the name of a header"))?;
        let mut value =
            HeaderValue::from_str(value).map_err(|_| refuse("must be visible ASCII"))?;
        value.set_sensitive(true);
        Ok((key, value))
    };
    let headers: Result<_, FieldError> = http.headers.iter().map(header).collect();
    Ok(headers?)
}

/// The bytes that a server has written to its pipe since the last call began. Clones share the count.
#[derive(Clone, Default)]
pub(super) struct Meter(Arc<AtomicU64>);

impl Meter {
    /// A call begins: the pipe may carry one more answer.
    pub(super) fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Whether the server has written more than one call may bring.
    pub(super) fn is_flooded(&self) -> bool {
        self.0.load(Ordering::Relaxed) > PIPE_BYTES_MAX
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Fails when a server writes too much for one call: rmcp bounds a line, but skips endless garbage without an end.
struct Metered<R> {
    inner: R,
    meter: Meter,
}

impl<R: AsyncRead + Unpin> AsyncRead for Metered<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let poll = Pin::new(&mut self.inner).poll_read(context, buffer);
        self.meter.add(buffer.filled().len() - before);
        if self.meter.is_flooded() {
            return Poll::Ready(Err(std::io::Error::other("the server floods its output")));
        }
        poll
    }
}
