//! One MCP connection of one rollout: handshake, calls with deadlines, and knowing when the state behind it is gone.
//!
//! **How the loss of a browser context is seen.** Playwright MCP opens a new, blank context without a word when the old
//! one is gone. But whenever it opens a context it asks the client for its *roots*. So the client counts: the first
//! time is the beginning of the rollout, which `Connection::open_context` waits for; a second time is a loss, whatever
//! the answer of the call looks like. A session that the server has forgotten is never opened again
//! (`reinit_on_expired_session(false)`).

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_runtime::tasks::with_deadline;
use http::{HeaderName, HeaderValue};
use rmcp::model::{
    CallToolRequest, CallToolRequestParams, CallToolResult, ClientCapabilities, ClientConfig,
    ClientRequest, Implementation, PingRequest, ReadResourceRequestParams, ReadResourceResult,
    RootsCapabilities, ServerPeerInfo, ServerResult, Tool,
};
#[expect(deprecated, reason = "see the implementation of `ClientHandler`")]
use rmcp::model::{ListRootsResult, Root};
use rmcp::service::{
    Peer, PeerRequestOptions, RequestContext, RoleClient, RunningService, ServiceError,
};
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::transport::{StreamableHttpClientTransport, UnixSocketHttpClient};
use rmcp::{ClientHandler, ErrorData, ServiceExt};
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, ReadBuf};

use super::browser;
use super::child::{Pipes, ServerProcess};
use super::config::HttpServer;
use super::error::McpError;
use super::redact::Secrets;

/// Largest message from a server. A page of 5 MB is an answer; more than this is a flood.
pub(super) const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Most that a server may write to its pipe between two calls: one answer, and room for notifications beside it.
const PIPE_BYTES_MAX: u64 = 24 * 1024 * 1024;
/// Most tools of one server: models cannot choose from more, and an endless list must end.
const TOOLS_MAX: usize = 512;
/// How long a server may take to say that it is alive.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often, and how far apart, a server is asked about a context that may be gone: the news of a crash travels from
/// browser to server in the meantime.
const LOSS_PROBES: u32 = 10;
const LOSS_PROBE_PAUSE: Duration = Duration::from_millis(100);
/// How long saying goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end of a process may come after the end of its pipe.
const EXIT_GRACE: Duration = Duration::from_secs(1);
/// What rmcp adds to a call's own time-out before this side gives up on rmcp as well.
const CALL_SLACK: Duration = Duration::from_secs(2);

/// This side of the protocol: it has no capability but telling its root, and counts how often it was asked.
#[derive(Clone)]
struct Client {
    root: Option<String>,
    asked: Arc<AtomicU32>,
}

#[expect(
    deprecated,
    reason = "roots leave the protocol after 2026-07-28; the pinned Playwright MCP speaks an older one"
)]
impl ClientHandler for Client {
    fn get_info(&self) -> ClientConfig {
        let mut capabilities = ClientCapabilities::default();
        if self.root.is_some() {
            capabilities.roots = Some(RootsCapabilities::default());
        }
        ClientConfig::new(
            capabilities,
            Implementation::new("espalier", env!("CARGO_PKG_VERSION")),
        )
    }

    async fn list_roots(
        &self,
        _context: RequestContext<RoleClient>,
    ) -> Result<ListRootsResult, ErrorData> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Ok(ListRootsResult::new(
            self.root.iter().map(Root::new).collect(),
        ))
    }
}

/// How the server is reached.
pub(super) enum Reach<'a> {
    /// Over the pipes of its process.
    Pipes(Pipes),
    /// Over a Unix socket, for streamable HTTP.
    Socket(&'a Path),
    /// Over the network, for streamable HTTP.
    Http(&'a HttpServer),
}

/// A connection after its handshake.
pub(super) struct Connection {
    server: String,
    peer: Peer<RoleClient>,
    running: Mutex<Option<RunningService<RoleClient, Client>>>,
    asked: Arc<AtomicU32>,
    /// Whether a browser context is behind it.
    is_browser: bool,
    /// Whether the server's questions for roots tell about its context.
    is_watched: bool,
    /// The server's process, where it is ours.
    process: Option<Arc<ServerProcess>>,
    meter: Option<Arc<AtomicU64>>,
    /// What its address and headers must not show in an error.
    secrets: Secrets,
}

impl Connection {
    /// Connects and shakes hands. `root`: a browser server, and the rollout's own folder for its files.
    pub(super) async fn open(
        server: &str,
        reach: Reach<'_>,
        root: Option<&Path>,
        process: Option<Arc<ServerProcess>>,
        timeout: Duration,
    ) -> Result<Self, McpError> {
        let client = Client {
            root: root.map(|path| format!("file://{}", path.display())),
            asked: Arc::default(),
        };
        let (asked, is_browser) = (Arc::clone(&client.asked), root.is_some());
        let meter = matches!(reach, Reach::Pipes(_)).then(Arc::<AtomicU64>::default);
        let secrets = secrets(&reach);
        let handshake = serve(server, client, reach, meter.clone());
        let running = tokio::select! {
            done = with_deadline("mcp_handshake", timeout, handshake) => match done {
                Ok(Ok(running)) => Ok(running),
                Ok(Err(error)) => Err(with_last_words(error, process.as_deref()).await),
                Err(_) => Err(start_error(server, "no handshake in time", process.as_deref())),
            },
            status = exited(process.as_deref()) => Err(start_error(server, &status, process.as_deref())),
        }?;
        Ok(Self {
            server: server.to_owned(),
            peer: running.peer().clone(),
            running: Mutex::new(Some(running)),
            asked,
            is_browser,
            is_watched: is_browser,
            process,
            meter,
            secrets,
        })
    }

    /// Makes a browser server open its context, so that the rollout does not wait for the browser in its first call
    /// and so that a loss can be told from the beginning. `pinned`: a server that does not ask for roots as the pinned
    /// one does is refused; another version is used without the watch.
    pub(super) async fn open_context(
        &mut self,
        pinned: bool,
        timeout: Duration,
    ) -> Result<(), McpError> {
        let answer = self
            .call_once(browser::TABS_TOOL, browser::list_tabs(), timeout)
            .await?;
        let asked = self.asked.load(Ordering::SeqCst);
        let reason = match answer {
            Ok(result) if result.is_error == Some(true) => text_of(&result),
            Err(error) => error.message.to_string(),
            Ok(_) if asked == 1 => return Ok(()),
            Ok(_) if !pinned => {
                self.is_watched = false;
                return Ok(());
            }
            Ok(_) => format!(
                "it asked for roots {asked} times and not once, so that a lost context could not be seen"
            ),
        };
        Err(start_error(
            &self.server,
            reason.trim(),
            self.process.as_deref(),
        ))
    }

    /// Name of the server.
    pub(super) fn server(&self) -> &str {
        &self.server
    }

    /// Whether a browser context is behind it.
    pub(super) fn is_browser(&self) -> bool {
        self.is_browser
    }

    /// What the server said about itself.
    pub(super) fn peer_info(&self) -> Option<Arc<ServerPeerInfo>> {
        self.peer.peer_info()
    }

    /// Every tool of the server.
    pub(super) async fn list_tools(&self, timeout: Duration) -> Result<Vec<Tool>, McpError> {
        let listed = with_deadline("mcp_list_tools", timeout, self.peer.list_all_tools()).await;
        let tools = match listed {
            Ok(Ok(tools)) => tools,
            Ok(Err(error)) => return Err(self.gone(&error).await),
            Err(_) => return Err(self.late("tools/list", timeout)),
        };
        if tools.len() > TOOLS_MAX {
            let reason = format!("it offers {} tools; the most is {TOOLS_MAX}", tools.len());
            return Err(start_error(&self.server, &reason, self.process.as_deref()));
        }
        Ok(tools)
    }

    /// Calls a tool. The inner error is one that the model may read: what the server reports by the protocol, or that
    /// the tool ran out of time while its server is well. A page can bring that about (an endless script, a frame that
    /// never loads), and it must not cost the attempt.
    pub(super) async fn call(
        &self,
        tool: &str,
        arguments: Map<String, Value>,
        timeout: Duration,
    ) -> Result<Result<CallToolResult, ErrorData>, McpError> {
        let mut answer = self.call_once(tool, arguments, timeout).await;
        if let Err(McpError::Deadline { .. }) = &answer
            && self.is_alive().await
        {
            answer = Ok(Err(given_up(tool, timeout)));
        }
        if !self.is_watched {
            return answer;
        }
        if let Ok(Ok(result)) = &answer
            && result.is_error == Some(true)
            && browser::may_mean_loss(&text_of(result))
        {
            self.look_for_loss().await?;
        }
        match self.asked.load(Ordering::SeqCst) {
            0 | 1 => answer,
            _ => Err(McpError::ContextLost {
                server: self.server.clone(),
                reason: "the browser context ended and another was opened".to_owned(),
            }),
        }
    }

    /// Reads a resource.
    pub(super) async fn read_resource(
        &self,
        uri: &str,
        timeout: Duration,
    ) -> Result<Result<ReadResourceResult, ErrorData>, McpError> {
        self.refill();
        let read = self.peer.read_resource(ReadResourceRequestParams::new(uri));
        let wait = with_deadline("mcp_read_resource", timeout, read);
        let answer = tokio::select! {
            answer = wait => answer,
            status = exited(self.process.as_deref()) => return Err(self.crashed(&status)),
        };
        match answer {
            Ok(Ok(result)) => Ok(Ok(result)),
            Ok(Err(ServiceError::McpError(error))) if !self.peer.is_transport_closed() => {
                Ok(Err(error))
            }
            Ok(Err(error)) => Err(self.gone(&error).await),
            Err(_) if self.is_alive().await => Ok(Err(given_up(uri, timeout))),
            Err(_) => Err(self.late("resources/read", timeout)),
        }
    }

    /// Says goodbye, which frees the context of a shared server and ends one on pipes.
    pub(super) async fn close(&self) {
        let running = self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(mut running) = running {
            // A server that does not part in time is ended by its owner.
            let _ = running.close_with_timeout(CLOSE_TIMEOUT).await;
        }
    }

    async fn call_once(
        &self,
        tool: &str,
        arguments: Map<String, Value>,
        timeout: Duration,
    ) -> Result<Result<CallToolResult, ErrorData>, McpError> {
        self.refill();
        let params = CallToolRequestParams::new(tool.to_owned()).with_arguments(arguments);
        let request = ClientRequest::CallToolRequest(CallToolRequest::new(params));
        let options = PeerRequestOptions::with_timeout(timeout);
        let call = async {
            self.peer
                .send_cancellable_request(request, options)
                .await?
                .await_response()
                .await
        };
        let wait = with_deadline("mcp_call", timeout + CALL_SLACK, call);
        let answer = tokio::select! {
            answer = wait => answer,
            status = exited(self.process.as_deref()) => return Err(self.crashed(&status)),
        };
        match answer {
            Ok(Ok(ServerResult::CallToolResult(result))) => Ok(Ok(result)),
            Ok(Ok(_)) => Err(self.crashed("it answered a call with something else")),
            Ok(Err(ServiceError::McpError(error))) if !self.peer.is_transport_closed() => {
                Ok(Err(error))
            }
            Ok(Err(ServiceError::Timeout { .. })) | Err(_) => Err(self.late(tool, timeout)),
            Ok(Err(error)) => Err(self.gone(&error).await),
        }
    }

    /// Makes the server use its context, for as long as the news of its end may take. Harmless where the context is
    /// there; otherwise the server opens a new one, which is counted.
    async fn look_for_loss(&self) -> Result<(), McpError> {
        for _ in 0..LOSS_PROBES {
            let tabs = self.call_once(browser::TABS_TOOL, browser::list_tabs(), PING_TIMEOUT);
            match tabs.await {
                // A page can keep the answer back, and that is no loss.
                Err(McpError::Deadline { .. }) if self.is_alive().await => break,
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            if self.asked.load(Ordering::SeqCst) > 1 {
                break;
            }
            tokio::time::sleep(LOSS_PROBE_PAUSE).await;
        }
        Ok(())
    }

    async fn is_alive(&self) -> bool {
        let ping = self
            .peer
            .send_request(ClientRequest::PingRequest(PingRequest::default()));
        matches!(
            with_deadline("mcp_ping", PING_TIMEOUT, ping).await,
            Ok(Ok(_))
        )
    }

    /// A call begins: the pipe may carry one more answer.
    fn refill(&self) {
        if let Some(meter) = &self.meter {
            meter.store(0, Ordering::Relaxed);
        }
    }

    fn late(&self, what: &str, after: Duration) -> McpError {
        McpError::Deadline {
            server: self.server.clone(),
            what: what.to_owned(),
            after,
        }
    }

    fn crashed(&self, reason: &str) -> McpError {
        McpError::Crashed {
            server: self.server.clone(),
            reason: reason.to_owned(),
            stderr: self
                .process
                .as_ref()
                .map(|process| process.last_words())
                .unwrap_or_default(),
        }
    }

    /// What the end of the connection means.
    async fn gone(&self, error: &ServiceError) -> McpError {
        let server = self.server.clone();
        let flooded = |meter: &Arc<AtomicU64>| meter.load(Ordering::Relaxed) > PIPE_BYTES_MAX;
        if self.meter.as_ref().is_some_and(flooded) {
            return McpError::TooLarge {
                server,
                bytes_max: ANSWER_BYTES_MAX,
            };
        }
        // Debug names the variant wherever it is in the chain.
        if format!("{error:?}").contains("SessionExpired") {
            let reason = "the server no longer knows the session".to_owned();
            return McpError::ContextLost { server, reason };
        }
        let end = exited(self.process.as_deref());
        if let Ok(status) = with_deadline("mcp_server_end", EXIT_GRACE, end).await {
            return self.crashed(&status);
        }
        // The error of a request names its whole address.
        let reason = format!("the connection ended: {error}");
        let reason = self.secrets.redact(&reason);
        if self.meter.is_some() {
            return self.crashed(&reason);
        }
        McpError::ContextLost { server, reason }
    }
}

/// What is told of a call that ran out of time while its server is well.
fn given_up(what: &str, after: Duration) -> ErrorData {
    let text = format!("### Error\n{what} did not end within {after:?} and was given up.");
    ErrorData::internal_error(text, None)
}

async fn serve(
    server: &str,
    client: Client,
    reach: Reach<'_>,
    meter: Option<Arc<AtomicU64>>,
) -> Result<RunningService<RoleClient, Client>, McpError> {
    let running = match reach {
        Reach::Pipes(pipes) => {
            let stdout = Metered {
                inner: pipes.stdout,
                read: meter.unwrap_or_default(),
            };
            let transport = AsyncRwTransport::new_client(stdout, pipes.stdin)
                .with_max_line_length(ANSWER_BYTES_MAX);
            client.serve(transport).await
        }
        Reach::Socket(path) => {
            // Origin form: with an absolute address the server would misread the path. Its host check wants the port
            // that the preloaded script reports.
            let socket = UnixSocketHttpClient::new(&path.to_string_lossy(), "http://localhost:1");
            let transport = StreamableHttpClientTransport::with_client(socket, http_config("/mcp"));
            client.serve(transport).await
        }
        Reach::Http(http) => {
            let config = http_config(&http.url).custom_headers(headers(server, http)?);
            client
                .serve(StreamableHttpClientTransport::from_config(config))
                .await
        }
    };
    // The error of a failed handshake may quote headers: only its kind is kept.
    running.map_err(|error| start_error(server, handshake_reason(&error), None))
}

fn handshake_reason(error: &rmcp::service::ClientInitializeError) -> &'static str {
    use rmcp::service::ClientInitializeError as E;
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

fn secrets(reach: &Reach<'_>) -> Secrets {
    let Reach::Http(http) = reach else {
        return Secrets::default();
    };
    let address = reqwest::Url::parse(&http.url).ok();
    let query = address.and_then(|address| address.query().map(str::to_owned));
    Secrets::new(http.headers.values().chain(&query))
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

fn start_error(server: &str, reason: &str, process: Option<&ServerProcess>) -> McpError {
    McpError::Start {
        server: server.to_owned(),
        reason: reason.to_owned(),
        stderr: process.map(ServerProcess::last_words).unwrap_or_default(),
    }
}

/// A handshake that failed because the server ended: adds how, and what it said.
async fn with_last_words(error: McpError, process: Option<&ServerProcess>) -> McpError {
    let (McpError::Start { server, .. }, Some(process)) = (&error, process) else {
        return error;
    };
    match with_deadline("mcp_failed_start", EXIT_GRACE, process.exited()).await {
        Ok(status) => start_error(server, &status, Some(process)),
        Err(_) => error,
    }
}

/// Waits for the end of a process; for ever where there is none.
async fn exited(process: Option<&ServerProcess>) -> String {
    match process {
        Some(process) => process.exited().await,
        None => std::future::pending().await,
    }
}

fn text_of(result: &CallToolResult) -> String {
    let texts = result.content.iter().filter_map(|block| block.as_text());
    texts
        .map(|part| part.text.as_str())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Counts what a server writes, and fails when it is too much for one call: rmcp bounds a line, but skips endless
/// garbage without an end.
struct Metered<R> {
    inner: R,
    read: Arc<AtomicU64>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Metered<R> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let poll = std::pin::Pin::new(&mut self.inner).poll_read(context, buffer);
        let count = (buffer.filled().len() - before) as u64;
        if self.read.fetch_add(count, Ordering::Relaxed) + count > PIPE_BYTES_MAX {
            return Poll::Ready(Err(std::io::Error::other("the server floods its output")));
        }
        poll
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Answers the handshake and then hangs up on everything.
    async fn shake_hands_and_leave(listener: TcpListener) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 8192];
            let mut count = 0;
            while !String::from_utf8_lossy(&request[..count]).contains('}') {
                match stream.read(&mut request[count..]).await.unwrap() {
                    0 => break,
                    more => count += more,
                }
            }
            let request = String::from_utf8_lossy(&request[..count]).into_owned();
            let body = match request.contains("\"initialize\"") {
                true => {
                    r#"{"jsonrpc":"2.0","id":0,"result":{"protocolVersion":"2025-06-18","capabilities":{"tools":{}},"serverInfo":{"name":"s","version":"1"}}}"#
                }
                false if request.contains("notifications/initialized") => "",
                false => return,
            };
            let status = if body.is_empty() {
                "202 Accepted"
            } else {
                "200 OK"
            };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + body).as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_error_of_a_lost_server_shows_no_secret_of_its_address() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = HttpServer {
            url: format!(
                "http://{}/mcp?api_key=hunter2-secret",
                listener.local_addr().unwrap()
            ),
            headers: BTreeMap::new(),
        };
        let timeout = Duration::from_secs(20);
        let talk = async {
            let connection = Connection::open("s", Reach::Http(&http), None, None, timeout).await?;
            connection.list_tools(timeout).await
        };
        let (talked, ()) = tokio::join!(talk, shake_hands_and_leave(listener));
        let error = talked.unwrap_err();
        assert!(matches!(error, McpError::ContextLost { .. }), "{error}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}
