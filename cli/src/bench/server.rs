//! A coordinator for one measurement, on a temporary folder and a free port.

use std::sync::Arc;
use std::time::Duration;

use espalier_coordinator::{CoordinatorConfig, Deps, Role, Scope, TokenConfig};
use espalier_runtime::clock::SystemClock;
use espalier_runtime::config::Secret;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_runtime::telemetry::error_chain;
use tokio::net::TcpListener;

use crate::client::{Client, Target};
use crate::exit::Problem;

/// The project of every measurement.
pub const PROJECT: &str = "bench";
/// Tokens of a coordinator that only this process reaches, for a few seconds.
const CLIENT_TOKEN: &str = "bench-client";
const WORKER_TOKEN: &str = "bench-worker";
const ADMIN_TOKEN: &str = "bench-admin";
/// How long the coordinator may take to end.
const END_LIMIT: Duration = Duration::from_secs(20);

/// The coordinator and two ways to it.
pub struct Server {
    /// As one who submits.
    pub client: Client,
    /// As a worker.
    pub worker: Target,
    shutdown: Shutdown,
    tasks: Tasks,
    // Removed with everything in it when the measurement ends.
    _folder: tempfile::TempDir,
}

impl Server {
    /// Starts it and waits until it answers.
    pub async fn start() -> Result<Self, Problem> {
        let folder = tempfile::tempdir()?;
        let project = Scope::Project(PROJECT.parse()?);
        let roles = [Role::Submit, Role::Read];
        let tokens = vec![
            TokenConfig::of("client", CLIENT_TOKEN, project, &roles),
            TokenConfig::of("worker", WORKER_TOKEN, Scope::All, &[Role::Worker]),
            TokenConfig::of("admin", ADMIN_TOKEN, Scope::All, &[Role::Admin]),
        ];
        let config = CoordinatorConfig::new(folder.path(), "memory://", tokens);
        let failed = |error: espalier_coordinator::RunError| Problem::failed(error_chain(&error));
        let store = Store::open("memory://").await?;
        let deps = Deps::with_store(&config, store, Arc::new(SystemClock))
            .await
            .map_err(failed)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let shutdown = Shutdown::new();
        let tasks = Tasks::new(shutdown.clone());
        let running = espalier_coordinator::run(config, listener, deps, shutdown.clone());
        tasks.spawn("bench.coordinator", OnFailure::ShutDown, Box::pin(running));
        let target = |token: &str| Target {
            url: url.clone(),
            token: Some(Secret::new(token)),
            origin: "this process".to_owned(),
        };
        Ok(Self {
            client: Client::connect(&target(CLIENT_TOKEN), None).await?,
            worker: target(WORKER_TOKEN),
            shutdown,
            tasks,
            _folder: folder,
        })
    }

    /// Runs something beside it, until it ends.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Ends it.
    pub async fn end(self) -> Result<(), Problem> {
        self.shutdown.drain();
        let ended = self.tasks.join_all(END_LIMIT).await;
        ended.map_err(|unfinished| Problem::failed(unfinished.to_string()))
    }
}
