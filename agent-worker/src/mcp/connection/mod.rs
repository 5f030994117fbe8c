//! One MCP connection of one rollout: handshake, calls with deadlines, and knowing when the state behind it is gone.
//! `reach` is the transport, `client` is what the server may ask of this side.
//!
//! **How the loss of a browser context is seen.** Playwright MCP opens a new, blank context without a word when the old
//! one is gone. But whenever it opens a context it asks the client for its *roots*. So the client counts: the first
//! time is the beginning of the rollout, which `Connection::open_context` waits for; a second time is a loss, whatever
//! the answer of the call looks like. A session that the server has forgotten is never opened again
//! (`reinit_on_expired_session(false)`).

mod client;
mod reach;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use espalier_runtime::tasks::{self, with_deadline};
use espalier_runtime::telemetry::names::attribute;
use espalier_runtime::telemetry::{Metrics, metrics};
use opentelemetry::KeyValue;
use rmcp::ErrorData;
use rmcp::model::{
    CallToolRequest, CallToolRequestParams, CallToolResult, ClientRequest, PaginatedRequestParams,
    PingRequest, ReadResourceRequestParams, ReadResourceResult, ServerPeerInfo, ServerResult, Tool,
};
use rmcp::service::{Peer, PeerRequestOptions, RoleClient, RunningService, ServiceError};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::browser;
use super::child::ServerProcess;
use super::error::McpError;
use super::redact::Secrets;
use client::Client;
pub(super) use reach::Reach;
use reach::{ANSWER_BYTES_MAX, Meter};

/// Most tools of one server: models cannot choose from more, and an endless list must end.
const TOOLS_MAX: usize = 512;
/// Most pages in which a server may list them; some list one tool a page, and some never end.
const TOOL_PAGES_MAX: usize = TOOLS_MAX;
/// Most bytes of all pages together, as JSON: as much as one answer may hold.
const TOOL_LIST_BYTES_MAX: usize = ANSWER_BYTES_MAX;
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

/// A connection after its handshake.
pub(super) struct Connection {
    server: String,
    peer: Peer<RoleClient>,
    running: Mutex<Option<RunningService<RoleClient, Client>>>,
    client: Client,
    /// Whether a browser context is behind it.
    is_browser: bool,
    /// Whether the server's questions for roots tell about its context.
    is_watched: bool,
    /// The server's process, where it is ours.
    process: Option<Arc<ServerProcess>>,
    meter: Option<Meter>,
    /// What its address, headers, arguments and environment must not show in an error.
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
        let (client, is_browser) = (Client::new(root), root.is_some());
        let meter = reach.meter();
        let secrets = match &process {
            Some(process) => process.secrets().clone(),
            None => reach.secrets(),
        };
        let handshake = reach.serve(server, client.clone(), meter.clone());
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
            client,
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
        let asked = self.client.times_asked();
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
        Err(self.refused(reason.trim()))
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
        let began = Instant::now();
        let listed = with_deadline("mcp_list_tools", timeout, self.list_pages()).await;
        let listed = listed.unwrap_or_else(|_| Err(self.late("tools/list", timeout)));
        measure("tools/list", began, listed.as_ref().err());
        listed
    }

    /// Follows the pages of the list, as far as a list may go.
    async fn list_pages(&self) -> Result<Vec<Tool>, McpError> {
        let (mut tools, mut bytes, mut cursor) = (Vec::new(), 0, None);
        for _ in 0..TOOL_PAGES_MAX {
            if let Some(meter) = &self.meter {
                meter.reset();
            }
            let next = PaginatedRequestParams::default().with_cursor(cursor.take());
            let asked = self.peer.list_tools(Some(next)).await;
            let page = match asked {
                Ok(page) => page,
                Err(error) => return Err(self.gone(&error).await),
            };
            let measured = tasks::blocking("mcp.tool_list", move || {
                let size = serde_json::to_vec(&page.tools).map_or(usize::MAX, |json| json.len());
                (page, size)
            });
            let (page, size) = measured.await?;
            bytes = size.saturating_add(bytes);
            tools.extend(page.tools);
            if bytes > TOOL_LIST_BYTES_MAX {
                let what = format!("its list of tools has more than {TOOL_LIST_BYTES_MAX} bytes");
                return Err(self.refused(&what));
            }
            if tools.len() > TOOLS_MAX {
                return Err(self.refused(&format!("it offers more than {TOOLS_MAX} tools")));
            }
            cursor = page.next_cursor;
            if cursor.is_none() {
                return Ok(tools);
            }
        }
        Err(self.refused(&format!(
            "its list of tools has more than {TOOL_PAGES_MAX} pages"
        )))
    }

    fn refused(&self, reason: &str) -> McpError {
        let reason = self.secrets.redact(reason);
        start_error(&self.server, &reason, self.process.as_deref())
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
        match self.client.times_asked() {
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
        let began = Instant::now();
        let read = self.read_once(uri, timeout).await;
        measure("resources/read", began, read.as_ref().err());
        read
    }

    async fn read_once(
        &self,
        uri: &str,
        timeout: Duration,
    ) -> Result<Result<ReadResourceResult, ErrorData>, McpError> {
        if let Some(meter) = &self.meter {
            meter.reset();
        }
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
        let began = Instant::now();
        let answer = self.request_call(tool, arguments, timeout).await;
        measure("tools/call", began, answer.as_ref().err());
        answer
    }

    async fn request_call(
        &self,
        tool: &str,
        arguments: Map<String, Value>,
        timeout: Duration,
    ) -> Result<Result<CallToolResult, ErrorData>, McpError> {
        if let Some(meter) = &self.meter {
            meter.reset();
        }
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
            if self.client.times_asked() > 1 {
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
        if self.meter.as_ref().is_some_and(Meter::is_flooded) {
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
        let reason = format!("the connection ended: {}", kind_of(error));
        if self.meter.is_some() {
            return self.crashed(&reason);
        }
        McpError::ContextLost { server, reason }
    }
}

/// Counts one request by its method, with the class of the error that ended the connection or the wait.
fn measure(method: &'static str, began: Instant, error: Option<&McpError>) {
    let mut labels = vec![KeyValue::new(attribute::MCP_METHOD_NAME, method)];
    let class = error.map(|error| error.class().as_str());
    labels.extend(class.map(|class| KeyValue::new(attribute::ERROR_TYPE, class)));
    Metrics::record(&metrics().mcp_operation_duration, began.elapsed(), &labels);
}

/// Errors of a transport quote whole addresses, headers and answers: only their kind is kept.
fn kind_of(error: &ServiceError) -> String {
    match error {
        ServiceError::McpError(error) => format!("it answered with the error {}", error.code.0),
        ServiceError::TransportSend(_) => "a request was not answered as the protocol says".into(),
        ServiceError::TransportClosed => "it was closed".into(),
        ServiceError::UnexpectedResponse => "it answered something else than was asked".into(),
        ServiceError::Timeout { .. } => "it did not answer in time".into(),
        _ => "a request was given up".into(),
    }
}

/// What is told of a call that ran out of time while its server is well.
fn given_up(what: &str, after: Duration) -> ErrorData {
    let text = format!("### Error\n{what} did not end within {after:?} and was given up.");
    ErrorData::internal_error(text, None)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mcp::config::HttpServer;
    use std::collections::BTreeMap;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    const INITIALIZED: &str = r#"{"jsonrpc":"2.0","id":0,"result":{"protocolVersion":"2025-06-18","capabilities":{"tools":{}},"serverInfo":{"name":"s","version":"1"}}}"#;

    /// The id of a request, as it stands in its text.
    fn id_of(request: &str) -> Option<&str> {
        let (_, rest) = request.split_once("\"id\":")?;
        rest.split([',', '}']).next()
    }

    /// Answers the handshake, and each list of tools with `page`, in which `ID` is the request's; hangs up where there
    /// is none, and when the client has gone.
    async fn serve(listener: TcpListener, page: Option<&str>) {
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
            let body = match (page, id_of(&request)) {
                (_, None) if request.contains("notifications/initialized") => String::new(),
                (_, Some(_)) if request.contains("\"initialize\"") => INITIALIZED.to_owned(),
                (Some(page), Some(id)) if request.contains("tools/list") => page.replace("ID", id),
                _ => return,
            };
            let status = match body.is_empty() {
                true => "202 Accepted",
                false => "200 OK",
            };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).await.unwrap();
        }
    }

    async fn list(path: &str, page: Option<&str>) -> Result<Vec<Tool>, McpError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = HttpServer {
            url: format!("http://{}{path}", listener.local_addr().unwrap()),
            headers: BTreeMap::new(),
        };
        let timeout = Duration::from_secs(20);
        let talk = async {
            let connection = Connection::open("s", Reach::Http(&http), None, None, timeout).await?;
            connection.list_tools(timeout).await
        };
        tokio::select! {
            listed = talk => listed,
            () = async { serve(listener, page).await; std::future::pending().await } => unreachable!(),
        }
    }

    #[tokio::test]
    async fn the_error_of_a_lost_server_shows_no_secret_of_its_address() {
        let error = list("/s/hunter2/mcp?api_key=hunter2-secret", None).await;
        let error = error.unwrap_err();
        assert!(matches!(error, McpError::ContextLost { .. }), "{error}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }

    #[tokio::test]
    async fn a_list_of_tools_without_an_end_is_refused() {
        for (tools, reason) in [
            ("", "more than 512 pages"),
            (
                r#"{"name":"t","inputSchema":{}},{"name":"u","inputSchema":{}}"#,
                "more than 512 tools",
            ),
        ] {
            let page = format!(
                r#"{{"jsonrpc":"2.0","id":ID,"result":{{"tools":[{tools}],"nextCursor":"again"}}}}"#
            );
            let error = list("/mcp", Some(&page)).await.unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
