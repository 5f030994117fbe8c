//! Starts server processes in private folders, and knows all that run, so that a shutdown can end them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use espalier_runtime::tasks::{Tasks, blocking, with_deadline};

use super::child::{Launch, Pipes, ServerProcess};
use super::guardian::Guardian;

/// How long the guardian may take to remove the folders; it goes on without us.
const GUARDIAN_GRACE: Duration = Duration::from_secs(5);

/// The start of every server of one host.
#[derive(Debug)]
pub(super) struct Launcher {
    guardian: Arc<Guardian>,
    tasks: Tasks,
    next_dir: AtomicU64,
    live: Mutex<Vec<Weak<ServerProcess>>>,
    /// The worker's environment.
    pub env: BTreeMap<String, String>,
}

impl Launcher {
    /// Makes the host's private folder within `temp_dir`.
    pub(super) fn new(
        temp_dir: &Path,
        env: BTreeMap<String, String>,
        tasks: Tasks,
    ) -> io::Result<Self> {
        // Its name is short, because the paths of Unix sockets are.
        let guardian = Arc::new(Guardian::start(temp_dir)?);
        Ok(Self {
            guardian,
            tasks,
            next_dir: AtomicU64::new(0),
            live: Mutex::default(),
            env,
        })
    }

    /// The set that tasks of the host belong to.
    pub(super) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// A new folder.
    pub(super) fn private_dir(&self) -> io::Result<PrivateDir> {
        let n = self.next_dir.fetch_add(1, Ordering::Relaxed);
        let path = self.guardian.dir().join(n.to_string());
        std::fs::create_dir(&path)?;
        Ok(PrivateDir { path })
    }

    /// Starts a server.
    pub(super) fn start(
        &self,
        launch: &Launch,
        piped: bool,
    ) -> io::Result<(Arc<ServerProcess>, Option<Pipes>)> {
        let guardian = Arc::clone(&self.guardian);
        let (process, pipes) = ServerProcess::start(launch, piped, guardian, &self.tasks)?;
        let process = Arc::new(process);
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.retain(|process| process.strong_count() > 0);
        live.push(Arc::downgrade(&process));
        Ok((process, pipes))
    }

    /// Ids of the processes that run.
    pub(super) fn process_ids(&self) -> Vec<i32> {
        let live = self.live().into_iter();
        live.filter(|process| process.exit_status().is_none())
            .map(|process| process.group())
            .collect()
    }

    /// Ends every server, and then the guardian, which removes the folders. `false`: something did not end in time.
    pub(super) async fn shut_down(&self, deadline: Duration) -> bool {
        let live = self.live();
        let stops = futures::future::join_all(live.iter().map(|process| process.stop()));
        let stopped = match with_deadline("mcp_shutdown", deadline, stops).await {
            Ok(stopped) => stopped.into_iter().all(|stopped| stopped),
            Err(_) => false,
        };
        for process in live {
            process.kill();
        }
        let guardian = Arc::clone(&self.guardian);
        let finish = blocking("mcp_guardian", move || guardian.finish());
        let finished = with_deadline("mcp_guardian", GUARDIAN_GRACE, finish).await;
        stopped && matches!(finished, Ok(Ok(Ok(()))))
    }

    fn live(&self) -> Vec<Arc<ServerProcess>> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.iter().filter_map(Weak::upgrade).collect()
    }
}

/// A folder that goes when it is dropped.
#[derive(Debug)]
pub(super) struct PrivateDir {
    path: PathBuf,
}

impl PrivateDir {
    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it off the async threads.
    pub(super) async fn remove(self) {
        // What cannot be removed now goes with the whole folder of the host.
        let _ = blocking("mcp_remove_dir", move || drop(self)).await;
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
