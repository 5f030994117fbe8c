//! What a rollout acts on: MCP servers, or what they answered to earlier rollouts. The loop and the checks see no other
//! difference than a call that was never recorded.

use std::time::Duration;

use espalier_core::chat::ToolDef;
use espalier_core::trace::{McpServerInfo, ReplaySource};
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use super::recorded::Recorded;
use super::{CLOSE_TIMEOUT, Order, RolloutError, Services, URL_TIMEOUT};
use crate::mcp::{McpError, ServerInfo, ToolOutcome, Toolbox};
use crate::record::Recorder;

/// Servers, or recordings of them.
pub(super) enum World {
    /// They run.
    Live(Box<Toolbox>),
    /// What they answered is in the store.
    Recorded(Box<Recorded>),
}

impl World {
    /// Connects the servers of a rollout, or reads the recordings that it names in their place.
    pub(super) async fn open(
        services: &Services,
        order: Order<'_>,
        recorder: &Recorder,
        name: &str,
        cancel: CancellationToken,
    ) -> Result<Self, RolloutError> {
        let (key, spec) = (recorder.key(), order.spec);
        if !spec.replay.is_empty() {
            let recorded = Recorded::read(&services.store, key, &spec.replay).await?;
            return Ok(Self::Recorded(Box::new(recorded)));
        }
        let connected = services
            .mcp
            .connect(&key.project, name, &spec.mcp, &spec.tools, cancel);
        Ok(Self::Live(Box::new(connected.await?)))
    }

    /// The tools as they are offered.
    pub(super) fn tools(&self) -> Vec<ToolDef> {
        match self {
            Self::Live(toolbox) => toolbox.tools().iter().map(|t| t.def.clone()).collect(),
            Self::Recorded(recorded) => recorded.tools.clone(),
        }
    }

    /// SHA-256 over the tool list as it is sent.
    pub(super) fn tools_sha256(&self) -> String {
        match self {
            Self::Live(toolbox) => toolbox.tool_list_digest(),
            Self::Recorded(recorded) => recorded.tools_sha256.clone(),
        }
    }

    /// The servers, and the build of the browser among them.
    pub(super) fn servers(&self) -> (Vec<McpServerInfo>, Option<String>) {
        match self {
            Self::Live(toolbox) => {
                let servers = toolbox.servers();
                let browser = servers.iter().find_map(|server| server.browser.clone());
                (servers.into_iter().map(server_info).collect(), browser)
            }
            Self::Recorded(recorded) => (recorded.servers.clone(), recorded.browser.clone()),
        }
    }

    /// The recordings that stand in for servers.
    pub(super) fn sources(&self) -> Vec<ReplaySource> {
        match self {
            Self::Live(_) => Vec::new(),
            Self::Recorded(recorded) => recorded.sources.clone(),
        }
    }

    /// Whether there is a tool of that name.
    pub(super) fn offers(&self, name: &str) -> bool {
        match self {
            Self::Live(toolbox) => toolbox.tool(name).is_some(),
            Self::Recorded(recorded) => recorded.offers(name),
        }
    }

    /// Whether somebody must say yes to a call. Nothing happens where a recording answers.
    pub(super) fn needs_approval(&self, name: &str) -> bool {
        match self {
            Self::Live(toolbox) => toolbox.tool(name).is_some_and(|tool| tool.needs_approval),
            Self::Recorded(_) => false,
        }
    }

    /// The server of a tool and the server's own name for it, where they are known.
    pub(super) fn origin(&self, name: &str) -> (Option<String>, Option<String>) {
        match self {
            Self::Live(toolbox) => {
                let tool = toolbox.tool(name);
                let tool = tool.map(|tool| (tool.server.clone(), tool.raw_name.clone()));
                tool.unzip()
            }
            Self::Recorded(recorded) => recorded.origin(name),
        }
    }

    /// Calls an offered tool; none: the call was never recorded.
    pub(super) async fn call(
        &mut self,
        name: &str,
        arguments: Map<String, Value>,
        limit: Duration,
    ) -> Result<Option<ToolOutcome>, RolloutError> {
        match self {
            Self::Live(toolbox) => Ok(Some(toolbox.call(name, arguments, limit).await?)),
            Self::Recorded(recorded) => Ok(recorded.call(name, &arguments).await?),
        }
    }

    /// Address of the current page. None without a browser, and where the page does not tell: it may stand in a dialog.
    pub(super) async fn final_url(&self) -> Result<Option<String>, RolloutError> {
        let url = match self {
            Self::Live(toolbox) => match toolbox.current_url(URL_TIMEOUT).await {
                Ok(url) => Some(url),
                Err(McpError::Invalid(_)) => None,
                Err(error) => return Err(error.into()),
            },
            Self::Recorded(recorded) => recorded.final_url(),
        };
        Ok(url.filter(|url| !url.is_empty()))
    }

    /// Gives back the servers. One that does not close in time is cleaned up by the host.
    pub(super) async fn close(self) {
        if let Self::Live(toolbox) = self {
            let closed = toolbox.close();
            let _ =
                espalier_runtime::tasks::with_deadline("mcp_close", CLOSE_TIMEOUT, closed).await;
        }
    }
}

fn server_info(server: ServerInfo) -> McpServerInfo {
    McpServerInfo {
        name: server.name,
        implementation: server.title,
        version: server.package_version.unwrap_or(server.version),
        protocol: server.protocol,
    }
}
