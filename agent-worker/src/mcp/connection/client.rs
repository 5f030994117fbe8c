//! This side of the protocol: it has no capability but telling its root, and counts how often it was asked.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rmcp::model::{ClientCapabilities, ClientConfig, Implementation, RootsCapabilities};
#[expect(deprecated, reason = "see the implementation of `ClientHandler`")]
use rmcp::model::{ListRootsResult, Root};
use rmcp::service::{RequestContext, RoleClient};
use rmcp::{ClientHandler, ErrorData};

/// The client of one connection. Clones share the count.
#[derive(Clone)]
pub(super) struct Client {
    root: Option<String>,
    asked: Arc<AtomicU32>,
}

impl Client {
    /// `root`: the folder that it tells a server which asks.
    pub(super) fn new(root: Option<&Path>) -> Self {
        Self {
            root: root.map(|path| format!("file://{}", path.display())),
            asked: Arc::default(),
        }
    }

    /// How often the server has asked for roots.
    pub(super) fn times_asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
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
