//! Workers as processes beside the coordinator, for one machine.
//!
//! They live no longer than the coordinator, however it ends: each has a keeper, a shell that holds the other end of a pipe and
//! tells the worker to end when our end is closed, which the kernel does with this process. (Its own means,
//! `PR_SET_PDEATHSIG`, is tied to the thread that started the child, and threads come and go.) Until the last keeper of an
//! earlier coordinator has gone, nothing is started: keepers hold a lock on a file in the data folder.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_core::time::Timestamp;
use espalier_runtime::clock::Clock;
use espalier_runtime::config::Environment;
use espalier_runtime::ids::{IdSource, UuidIds};
use espalier_runtime::process::INHERITED;
use espalier_runtime::tasks::{self, BlockingFailed};
use futures::FutureExt;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::time::Instant;

use super::config::{LocalConfig, LocalPool};
use super::provider::{
    Answer, INSTANCE_VARIABLE, Instance, InstanceState, Provider, ProviderError,
};

/// Tells the worker to end when its input ends, kills it some seconds later, and ends as the worker did. Its output is the lock
/// and goes to nobody else; what the worker prints goes where the coordinator's errors go.
const KEEPER: &str = r#"
trap '' HUP INT PIPE TERM
grace=$1
shift
exec 3<&0 </dev/null
(trap - HUP INT PIPE TERM; exec "$@") 3<&- >&2 &
worker=$!
(
  read -r _ <&3
  kill -s TERM "$worker"
  while [ "$grace" -gt 0 ] && kill -s 0 "$worker"; do
    sleep 1
    grace=$((grace - 1))
  done
  kill -s KILL "$worker"
) >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait "$worker"
status=$?
kill -s KILL "$watcher"
exit "$status"
"#;
/// The file that keepers lock.
const LOCK_FILE: &str = "scaler-local.lock";
/// What a worker inherits on top of what any child does.
const INHERITED_TOO: [&str; 3] = ["TMPDIR", "LD_LIBRARY_PATH", "ESPALIER_LOG"];
/// How long a process that was told to end is waited for, so that most are gone at the next look.
const END_WAIT: Duration = Duration::from_secs(5);
/// How often it is looked at meanwhile.
const END_LOOK: Duration = Duration::from_millis(20);

/// See the module.
pub struct Local {
    pools: BTreeMap<String, LocalPool>,
    environment: Environment,
    lock_file: PathBuf,
    clock: Arc<dyn Clock>,
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    /// Held from the first look on.
    lock: Option<File>,
    /// By id.
    kept: BTreeMap<String, Kept>,
    /// Nothing is started any more.
    closed: bool,
}

struct Kept {
    keeper: Child,
    /// None: it was told to end.
    input: Option<ChildStdin>,
    /// How the keeper ended, once it has.
    status: Option<ExitStatus>,
    pool: String,
    name: String,
    created_at: Timestamp,
}

impl Local {
    /// Starts nothing yet. `environment` is this process's.
    pub fn new(
        config: &LocalConfig,
        data_dir: &Path,
        environment: Environment,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let pools = config.pools.iter();
        Self {
            pools: pools
                .map(|pool| (pool.name.clone(), pool.clone()))
                .collect(),
            environment,
            lock_file: data_dir.join(LOCK_FILE),
            clock,
            state: Arc::default(),
        }
    }

    fn command(&self, pool: &LocalPool, name: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", KEEPER, "espalier-keeper"])
            .arg(pool.grace_s.to_string())
            .args(pool.command.iter().map(|word| named(word, name)))
            .env_clear();
        let inherited = [&INHERITED[..], &INHERITED_TOO].concat();
        for (variable, value) in &self.environment {
            if inherited.contains(&&**variable) || pool.pass_env.contains(variable) {
                command.env(variable, value);
            }
        }
        for (variable, value) in &pool.env {
            command.env(variable, named(value.expose(), name));
        }
        command
            .env(INSTANCE_VARIABLE, name)
            .stdin(Stdio::piped())
            .process_group(0);
        command
    }

    async fn start(&self, pool: &str, name: &str) -> Result<(), ProviderError> {
        let Some(settings) = self.pools.get(pool) else {
            return Err(ProviderError::Refused(format!("there is no pool `{pool}`")));
        };
        let mut command = self.command(settings, name);
        let (state, lock_file) = (Arc::clone(&self.state), self.lock_file.clone());
        let (pool, name) = (pool.to_owned(), name.to_owned());
        let created_at = self.clock.now();
        let started = tasks::blocking("scaler.local.start", move || {
            let mut state = locked(&state);
            if state.closed {
                let ends = "the coordinator is shutting down".to_owned();
                return Err(ProviderError::Unavailable(ends));
            }
            let lock = take_lock(&mut state, &lock_file)?;
            let cannot = |error: io::Error| {
                ProviderError::Unavailable(format!("no process can be started: {error}"))
            };
            command.stdout(lock.try_clone().map_err(cannot)?);
            let mut keeper = command.spawn().map_err(cannot)?;
            let kept = Kept {
                input: keeper.stdin.take(),
                keeper,
                status: None,
                pool,
                name,
                created_at,
            };
            state.kept.insert(UuidIds.fresh(), kept);
            Ok(())
        });
        started.await.map_err(broken)?
    }

    async fn look(&self) -> Result<Vec<Instance>, ProviderError> {
        let (state, lock_file) = (Arc::clone(&self.state), self.lock_file.clone());
        let looked = tasks::blocking("scaler.local.look", move || {
            let mut state = locked(&state);
            take_lock(&mut state, &lock_file)?;
            state.kept.retain(|_, kept| !kept.is_gone());
            let kept = state.kept.iter_mut();
            Ok(kept.map(|(id, kept)| kept.instance(id)).collect())
        });
        looked.await.map_err(broken)?
    }

    async fn end(&self, id: &str) -> Result<(), ProviderError> {
        let until = Instant::now() + END_WAIT;
        if let Some(kept) = locked(&self.state).kept.get_mut(id) {
            kept.input = None;
        }
        loop {
            {
                let mut state = locked(&self.state);
                match state.kept.get_mut(id).map(Kept::ended) {
                    None => return Ok(()),
                    Some(Some(_)) => {
                        state.kept.remove(id);
                        return Ok(());
                    }
                    Some(None) => {}
                }
            }
            // Its keeper goes on; it is listed until it is gone.
            if Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(END_LOOK).await;
        }
    }
}

impl Provider for Local {
    fn list(&self) -> Answer<'_, Vec<Instance>> {
        self.look().boxed()
    }

    fn create<'a>(&'a self, pool: &'a str, name: &'a str) -> Answer<'a, ()> {
        self.start(pool, name).boxed()
    }

    fn delete<'a>(&'a self, instance: &'a Instance) -> Answer<'a, ()> {
        self.end(&instance.id).boxed()
    }

    fn close(&self) {
        let mut state = locked(&self.state);
        state.closed = true;
        // Their keepers have the rest of it.
        state.kept.clear();
    }
}

impl Kept {
    fn instance(&mut self, id: &str) -> Instance {
        Instance {
            id: id.to_owned(),
            pool: self.pool.clone(),
            name: self.name.clone(),
            state: match self.ended() {
                Some(status) => InstanceState::Failed(in_words(status)),
                None => InstanceState::Running,
            },
            created_at: self.created_at,
            price_per_hour: 0.0,
        }
    }

    /// Whether it ended as it should.
    fn is_gone(&mut self) -> bool {
        let was_told = self.input.is_none();
        self.ended()
            .is_some_and(|status| was_told || status.success())
    }

    /// How it ended, if it has. A worker whose keeper was killed has nobody who would end it but us.
    fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.keeper.try_wait().ok().flatten();
            if self.status.is_some_and(|status| status.signal().is_some()) {
                let _ = kill_process_group(Pid::from_child(&self.keeper), Signal::KILL);
            }
        }
        self.status
    }
}

/// `text` with the name of the instance where it is asked for.
fn named(text: &str, name: &str) -> String {
    text.replace("{instance}", name)
}

fn in_words(status: ExitStatus) -> String {
    match status.code() {
        Some(127) => "the program does not exist (exit code 127)".to_owned(),
        Some(126) => "the program cannot be run (exit code 126)".to_owned(),
        Some(64) => "it refused its configuration (exit code 64); its log says why".to_owned(),
        Some(code @ 129..=192) => format!("it was ended by signal {}", code - 128),
        _ => format!("it ended by itself ({status}); its log says why"),
    }
}

/// The lock, taken where it is not held yet.
fn take_lock<'a>(state: &'a mut State, path: &Path) -> Result<&'a File, ProviderError> {
    if state.lock.is_none() {
        let cannot = |error: io::Error| {
            let reason = format!("file {} cannot be locked: {error}", path.display());
            ProviderError::Unavailable(reason)
        };
        let mut options = File::options();
        let file = options
            .create(true)
            .append(true)
            .open(path)
            .map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let reason = "processes of an earlier coordinator have not ended yet";
                return Err(ProviderError::Unavailable(reason.to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
        }
        state.lock = Some(file);
    }
    let none = || ProviderError::Unavailable("there is no lock".to_owned());
    state.lock.as_ref().ok_or_else(none)
}

fn broken(error: BlockingFailed) -> ProviderError {
    ProviderError::Unavailable(error.to_string())
}

/// No code that may panic runs under the lock, and the state is valid after every statement.
fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
