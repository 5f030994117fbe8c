//! Shared browser servers: started when a rollout needs one, given out as `pool` decides, stopped when they are spent,
//! doubted or unused.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_core::id::ProjectId;
use espalier_runtime::tasks::{OnFailure, with_deadline};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::child::ServerProcess;
use super::config::{PlaywrightOptions, ServerOptions};
use super::error::McpError;
use super::launcher::{Launcher, PrivateDir};
use super::playwright::{self, Installation};
use super::pool::{SlotId, Slots, Then};

/// How often a starting server is tried.
const READY_POLL: Duration = Duration::from_millis(20);

/// What rollouts have to agree in to share a server.
pub(super) type Key = (ProjectId, [u8; 32]);

/// The shared servers of one host.
pub(super) struct SharedServers {
    launcher: Arc<Launcher>,
    closing: CancellationToken,
    state: Mutex<State>,
}

struct State {
    slots: Slots<Key>,
    servers: HashMap<SlotId, Arc<SharedServer>>,
}

/// One server, started by whichever rollout comes first.
#[derive(Default)]
struct SharedServer {
    running: OnceCell<Running>,
}

struct Running {
    process: Arc<ServerProcess>,
    dir: Mutex<Option<PrivateDir>>,
    socket: std::path::PathBuf,
}

/// The place of one rollout on a shared server. Dropping it gives the place back.
pub(super) struct Lease {
    servers: Arc<SharedServers>,
    key: Key,
    id: SlotId,
    server: Arc<SharedServer>,
    idle_stop: Duration,
    doubted: AtomicBool,
}

impl SharedServers {
    /// None yet.
    pub(super) fn new(launcher: Arc<Launcher>, closing: CancellationToken) -> Self {
        let state = State {
            slots: Slots::new(),
            servers: HashMap::new(),
        };
        Self {
            launcher,
            closing,
            state: Mutex::new(state),
        }
    }

    /// A place on a running server.
    pub(super) async fn lease(
        self: &Arc<Self>,
        name: &str,
        key: Key,
        installation: &Installation,
        browser: &PlaywrightOptions,
        options: &ServerOptions,
    ) -> Result<Lease, McpError> {
        let lease = {
            let mut state = self.state();
            let id = state
                .slots
                .take(&key, options.contexts_max, options.recycle_after);
            let server = Arc::clone(state.servers.entry(id).or_default());
            Lease {
                servers: Arc::clone(self),
                key,
                id,
                server,
                idle_stop: options.idle_stop,
                doubted: AtomicBool::new(false),
            }
        };
        let start = lease.server.running.get_or_try_init(|| async {
            let start = self.start(name, installation, browser);
            match with_deadline("mcp_server_start", options.start_timeout, start).await {
                Ok(started) => started,
                Err(_) => Err(McpError::Deadline {
                    server: name.to_owned(),
                    what: "start".to_owned(),
                    after: options.start_timeout,
                }),
            }
        });
        if let Err(error) = start.await {
            lease.doubt();
            return Err(error);
        }
        Ok(lease)
    }

    async fn start(
        &self,
        name: &str,
        installation: &Installation,
        browser: &PlaywrightOptions,
    ) -> Result<Running, McpError> {
        let failed = |reason: String, stderr: String| McpError::Start {
            server: name.to_owned(),
            reason,
            stderr,
        };
        let begun = || {
            let dir = self.launcher.private_dir()?;
            let launch = installation.prepare(browser, dir.path(), true, &self.launcher.env)?;
            let (process, _) = self.launcher.start(&launch, false)?;
            Ok::<_, std::io::Error>((dir, process))
        };
        let (dir, process) = begun().map_err(|error| failed(error.to_string(), String::new()))?;
        let socket = playwright::socket(dir.path());
        while UnixStream::connect(&socket).await.is_err() {
            if let Some(status) = process.exit_status() {
                return Err(failed(status, process.last_words()));
            }
            tokio::time::sleep(READY_POLL).await;
        }
        info!(
            server = name,
            process = process.group(),
            "browser server started"
        );
        Ok(Running {
            process,
            dir: Mutex::new(Some(dir)),
            socket,
        })
    }

    fn give_back(self: &Arc<Self>, lease: &Lease) {
        let doubted = lease.doubted.load(Ordering::Relaxed);
        let then = self.state().slots.put_back(&lease.key, lease.id, doubted);
        match then {
            Then::Keep => {}
            Then::Stop => self.stop(lease.id),
            Then::Rest { served } => {
                let (servers, key, id) = (Arc::clone(self), lease.key.clone(), lease.id);
                let rest = lease.idle_stop;
                self.launcher
                    .tasks()
                    .spawn_apart("mcp_server_rest", OnFailure::Log, async move {
                        tokio::select! {
                            () = tokio::time::sleep(rest) => {}
                            () = servers.closing.cancelled() => return,
                        }
                        if servers.state().slots.rested(&key, id, served) {
                            servers.stop(id);
                        }
                    });
            }
        }
    }

    /// Ends a server that is off the list. During a shutdown the launcher ends them all.
    fn stop(&self, id: SlotId) {
        let Some(server) = self.state().servers.remove(&id) else {
            return;
        };
        self.launcher
            .tasks()
            .spawn_apart("mcp_server_stop", OnFailure::Log, async move {
                let Some(running) = server.running.get() else {
                    return;
                };
                if !running.process.stop().await {
                    warn!(
                        process = running.process.group(),
                        "browser server did not end"
                    );
                }
                let dir = running
                    .dir
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                if let Some(dir) = dir {
                    dir.remove().await;
                }
            });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// The socket and the process of the server.
    pub(super) fn server(&self) -> Option<(&std::path::Path, Arc<ServerProcess>)> {
        let running = self.server.running.get()?;
        Some((&running.socket, Arc::clone(&running.process)))
    }

    /// The server failed this rollout: from now on nobody joins it.
    pub(super) fn doubt(&self) {
        self.doubted.store(true, Ordering::Relaxed);
        self.servers.state().slots.retire(&self.key, self.id);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let servers = Arc::clone(&self.servers);
        servers.give_back(self);
    }
}
