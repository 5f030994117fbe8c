//! The tools of one rollout: its connections, what they offer, and calls on them.

use std::collections::BTreeSet;
use std::time::Duration;

use espalier_core::chat::ToolDef;
use espalier_core::error::FieldError;
use rmcp::model::{CallToolResult, ErrorData};
use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::browser;
use super::child::ServerProcess;
use super::connection::Connection;
use super::convert::OfferedTool;
use super::error::McpError;
use super::inline::{SNAPSHOT_TOOL, has_link};
use super::launcher::PrivateDir;
use super::outcome::ToolOutcome;
use super::shared::Lease;

/// More tools than this confuse models.
const TOOLS_WARNING: usize = 50;

/// A server of a rollout, for the trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerInfo {
    /// The name in configuration and job.
    pub name: String,
    /// The server's own name.
    pub title: String,
    /// The server's own version.
    pub version: String,
    /// The negotiated protocol.
    pub protocol: String,
    /// Version of the package that the worker started, where it knows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package_version: Option<String>,
    /// Build of the browser behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub browser: Option<String>,
}

/// Something about the tools that the user should know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// More tools than models handle well.
    #[error("{count} tools are offered; models choose badly among more than {TOOLS_WARNING}")]
    ManyTools {
        /// How many.
        count: usize,
    },
    /// The policy names a tool that is never offered.
    #[error("`{name}` is never offered: it would end the state of the rollout")]
    NeverOffered {
        /// The tool.
        name: String,
    },
    /// A browser whose end the worker cannot see.
    #[error(
        "`{server}` is a browser behind an address: a context that it loses is not noticed; use the preset `playwright`"
    )]
    UnwatchedBrowser {
        /// The server.
        server: String,
    },
}

/// One server of a rollout, with everything that goes when the rollout does. Fields drop in this order.
pub(super) struct Link {
    pub connection: Connection,
    pub lease: Option<Lease>,
    /// The server's process where this rollout alone uses it.
    pub process: Option<std::sync::Arc<ServerProcess>>,
    pub dirs: Vec<PrivateDir>,
    pub call_timeout: Duration,
    pub info: ServerInfo,
}

impl Link {
    /// Draws the consequence for the server of what a rollout met.
    fn note(&self, error: &McpError) {
        if let Some(lease) = &self.lease
            && error.doubts_server()
        {
            lease.doubt();
        }
        let is_hopeless = matches!(error, McpError::TooLarge { .. });
        if let Some(process) = &self.process
            && is_hopeless
        {
            process.kill();
        }
    }

    async fn close(self) {
        self.connection.close().await;
        drop(self.lease);
        if let Some(process) = &self.process {
            process.stop().await;
        }
        for dir in self.dirs {
            dir.remove().await;
        }
    }
}

/// The tools of one rollout. Dropping it frees everything too, only less politely than [`Toolbox::close`].
pub struct Toolbox {
    pub(super) links: Vec<Link>,
    pub(super) tools: Vec<OfferedTool>,
    pub(super) warnings: Vec<Warning>,
    /// Servers whose links to a page's snapshot are replaced by the snapshot.
    pub(super) inlined: BTreeSet<String>,
    pub(super) cancel: CancellationToken,
    pub(super) closing: CancellationToken,
}

impl Toolbox {
    /// What the model is offered. Fixed for the life of the rollout.
    pub fn tools(&self) -> &[OfferedTool] {
        &self.tools
    }

    /// The offered tool of that name.
    pub fn tool(&self, name: &str) -> Option<&OfferedTool> {
        self.tools.iter().find(|tool| tool.name() == name)
    }

    /// SHA-256 over the tool list as it is sent, in hexadecimal.
    pub fn tool_list_digest(&self) -> String {
        let defs: Vec<&ToolDef> = self.tools.iter().map(|tool| &tool.def).collect();
        let text = serde_json::to_vec(&defs).unwrap_or_default();
        Sha256::digest(&text)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// The servers, for the trace.
    pub fn servers(&self) -> Vec<ServerInfo> {
        self.links.iter().map(|link| link.info.clone()).collect()
    }

    /// What the user should know about the tools.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Calls an offered tool for the model. A tool that fails is an outcome; an error ends the attempt, save
    /// [`McpError::UnknownTool`].
    pub async fn call(
        &self,
        name: &str,
        arguments: Map<String, Value>,
        deadline: Duration,
    ) -> Result<ToolOutcome, McpError> {
        let Some(tool) = self.tool(name) else {
            return Err(McpError::UnknownTool {
                name: name.to_owned(),
            });
        };
        let link = self.link(&tool.server)?;
        let arguments = tool.raw_arguments(arguments);
        if link.connection.is_browser()
            && let Some(refusal) = browser::refusal(&arguments)
        {
            return Ok(ToolOutcome::failure(refusal, Duration::ZERO));
        }
        if !self.inlined.contains(&tool.server) || tool.raw_name == SNAPSHOT_TOOL {
            return self.run(link, &tool.raw_name, arguments, deadline).await;
        }
        self.run_with_page(link, &tool.raw_name, arguments, deadline)
            .await
    }

    /// As [`Toolbox::run`], with the page's snapshot in place of a link to it. Both calls have one deadline; where the
    /// second one fails, the result of the first stands, and whatever is behind that shows in the next call.
    async fn run_with_page(
        &self,
        link: &Link,
        tool: &str,
        arguments: Map<String, Value>,
        deadline: Duration,
    ) -> Result<ToolOutcome, McpError> {
        let started = Instant::now();
        let answer = self.ask(link, tool, arguments, deadline).await?;
        let result = match answer {
            Ok(result) if ToolOutcome::is_small(&result) && has_link(&result) => result,
            answer => return outcome(answer, started.elapsed()).await,
        };
        let deadline = deadline.min(link.call_timeout);
        let time_left = deadline.saturating_sub(started.elapsed());
        let page = match time_left.is_zero() {
            true => None,
            false => self
                .ask(link, SNAPSHOT_TOOL, Map::new(), time_left)
                .await
                .ok(),
        };
        let latency = started.elapsed();
        match page {
            Some(Ok(page)) if page.is_error != Some(true) => {
                Ok(ToolOutcome::of_call_with_page(result, page, latency).await?)
            }
            _ => outcome(Ok(result), latency).await,
        }
    }

    /// Calls any tool of a server by its own name, for a verifier. The policy is about the model and does not apply.
    pub async fn call_server(
        &self,
        server: &str,
        tool: &str,
        arguments: Map<String, Value>,
        deadline: Duration,
    ) -> Result<ToolOutcome, McpError> {
        self.run(self.link(server)?, tool, arguments, deadline)
            .await
    }

    /// Reads a resource of a server, for a verifier.
    pub async fn read_resource(
        &self,
        server: &str,
        uri: &str,
        deadline: Duration,
    ) -> Result<ToolOutcome, McpError> {
        let link = self.link(server)?;
        let started = Instant::now();
        let timeout = deadline.min(link.call_timeout);
        // Boxed: the futures of rmcp are large.
        let read = Box::pin(link.connection.read_resource(uri, timeout));
        let answer = self
            .unless_stopped(read)
            .await
            .inspect_err(|error| link.note(error))?;
        Ok(match answer {
            Ok(result) => ToolOutcome::of_resource(result, started.elapsed()).await?,
            Err(error) => ToolOutcome::failure(error.message.to_string(), started.elapsed()),
        })
    }

    /// Evaluates a JavaScript expression in the rollout's current page, for a verifier; it may be a promise. The inner
    /// error is the page's own.
    pub async fn evaluate_page(
        &self,
        script: &str,
        deadline: Duration,
    ) -> Result<Result<Value, String>, McpError> {
        let link = self.browser()?;
        let arguments = browser::evaluate(script);
        let outcome = self
            .run(link, browser::EVALUATE_TOOL, arguments, deadline)
            .await?;
        Ok(match browser::evaluated(&outcome.text) {
            Some(value) if !outcome.is_error => Ok(value),
            _ => Err(outcome.text),
        })
    }

    /// Refuses what [`Toolbox::evaluate_page`] would refuse for want of a browser.
    pub fn check_browser(&self) -> Result<(), McpError> {
        self.browser().map(drop)
    }

    fn browser(&self) -> Result<&Link, McpError> {
        let browser = self.links.iter().find(|link| link.connection.is_browser());
        browser.ok_or_else(|| {
            let rule = "needs a server with the preset `playwright` among `mcp`";
            FieldError::new("verify.page", "…", rule).into()
        })
    }

    /// The address of the rollout's current page.
    pub async fn current_url(&self, deadline: Duration) -> Result<String, McpError> {
        let value = self.evaluate_page("location.href", deadline).await?;
        Ok(match value {
            Ok(Value::String(url)) => url,
            _ => String::new(),
        })
    }

    /// Frees everything and waits for it.
    pub async fn close(self) {
        futures::future::join_all(self.links.into_iter().map(Link::close)).await;
    }

    async fn run(
        &self,
        link: &Link,
        tool: &str,
        arguments: Map<String, Value>,
        deadline: Duration,
    ) -> Result<ToolOutcome, McpError> {
        let started = Instant::now();
        let answer = self.ask(link, tool, arguments, deadline).await?;
        outcome(answer, started.elapsed()).await
    }

    /// What the server answers to a call.
    async fn ask(
        &self,
        link: &Link,
        tool: &str,
        arguments: Map<String, Value>,
        deadline: Duration,
    ) -> Result<Result<CallToolResult, ErrorData>, McpError> {
        let timeout = deadline.min(link.call_timeout);
        // Boxed: the futures of rmcp are large.
        let call = Box::pin(link.connection.call(tool, arguments, timeout));
        self.unless_stopped(call)
            .await
            .inspect_err(|error| link.note(error))
    }

    async fn unless_stopped<T>(
        &self,
        work: impl Future<Output = Result<T, McpError>>,
    ) -> Result<T, McpError> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(McpError::Cancelled),
            () = self.closing.cancelled() => Err(McpError::ShuttingDown),
            done = work => done,
        }
    }

    fn link(&self, server: &str) -> Result<&Link, McpError> {
        let found = self
            .links
            .iter()
            .find(|link| link.connection.server() == server);
        found.ok_or_else(|| {
            let rule = "must be one of the servers that the job uses";
            FieldError::new("server", server, rule).into()
        })
    }
}

async fn outcome(
    answer: Result<CallToolResult, ErrorData>,
    latency: Duration,
) -> Result<ToolOutcome, McpError> {
    Ok(match answer {
        Ok(result) => ToolOutcome::of_call(result, latency).await?,
        Err(error) => ToolOutcome::failure(error.message.to_string(), latency),
    })
}

/// What is worth a warning about a finished list.
pub(super) fn warnings(tools: &[OfferedTool], named_in_vain: Vec<String>) -> Vec<Warning> {
    let mut warnings: Vec<Warning> = named_in_vain
        .into_iter()
        .map(|name| Warning::NeverOffered { name })
        .collect();
    if tools.len() > TOOLS_WARNING {
        warnings.push(Warning::ManyTools { count: tools.len() });
    }
    warnings
}
