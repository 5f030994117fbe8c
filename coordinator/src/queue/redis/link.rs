//! The connection to the server: made when it is needed, made anew after it broke, with a deadline on every answer.
//!
//! All share one connection, but for writes that wait until they have reached more than the server: each has one to
//! itself meanwhile. `WAIT` counts what its own connection wrote, and holds up whatever comes behind it there.
//!
//! An answer that did not come leaves open whether the command took effect; all commands may be repeated as they
//! were, so that the caller is told [`QueueError::Unavailable`] and asks again.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use espalier_runtime::tasks::with_deadline;
use redis::aio::ConnectionLike;
use redis::{Cmd, ErrorKind, Pipeline, RedisError, ServerErrorKind, Value};
use tokio::sync::{Mutex, Semaphore};

use super::address::{Address, Connection};
use super::script::SCRIPTS;
use crate::queue::QueueError;

/// How long connecting may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long after a try that failed the next one is made.
const CONNECT_PAUSE: Duration = Duration::from_millis(200);
/// How long an answer may take: a script runs for milliseconds, a server that saves or swaps takes longer.
pub const RESPONSE_LIMIT: Duration = Duration::from_secs(5);
/// When to try again after an answer that did not come.
const PAUSE: Duration = Duration::from_millis(500);
/// When to try again where the server has no room.
const FULL_PAUSE: Duration = Duration::from_secs(5);
/// How long a write may take to reach as many replicas as were asked for, and before that to get a connection.
const REPLICATION_LIMIT: Duration = Duration::from_secs(2);
/// Writes that wait at once, each on a connection of its own: enough to hide the way to a replica and back.
const WAITING_MAX: usize = 4;

/// What must have happened to a write before it is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Acknowledge {
    /// The server has it. It survives a kill of the server, and with `appendfsync everysec` all but the last second
    /// survives a power cut or a failover.
    #[default]
    Fast,
    /// A replica has it too.
    Replicated,
    /// It is on the server's disk; needs an append-only file, and `appendfsync always` or Redis 7.2.
    Durable,
}

/// The way to the server. Shared by everybody in the process.
pub struct Link {
    address: Address,
    acknowledge: Acknowledge,
    /// The server answers when a write is on its disk, so that nobody has to wait for that.
    synced: AtomicBool,
    present: Mutex<Present>,
    /// Places of writes that wait, and the connections of those that are done.
    waiting: Semaphore,
    /// Each with the generation that it was made in.
    idle: std::sync::Mutex<Vec<(u64, Connection)>>,
    /// How often it was connected, and more: tells a broken connection from the one that replaced it.
    made: AtomicU64,
}

/// What there is of a connection.
#[derive(Default)]
enum Present {
    /// None yet, or it broke.
    #[default]
    No,
    /// With the number that tells it from others.
    Connected(u64, Connection),
    /// When none could be made, and why.
    Failed(Instant, QueueError),
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("made", &self.made)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// Not connected yet.
    pub fn new(address: Address, acknowledge: Acknowledge) -> Self {
        Self {
            address,
            acknowledge,
            synced: AtomicBool::new(false),
            present: Mutex::default(),
            waiting: Semaphore::new(WAITING_MAX),
            idle: std::sync::Mutex::default(),
            made: AtomicU64::new(0),
        }
    }

    /// Where it leads.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Changes whenever what is asked next may be answered by another server, or by one that has lost something: what is
    /// remembered of the one before means nothing any more.
    pub fn generation(&self) -> u64 {
        self.made.load(Ordering::Acquire)
    }

    /// Begins another generation: the server was restarted or replaced behind a connection that knows how to find it.
    pub fn begin_generation(&self) -> u64 {
        self.made.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// An answer that was put together in one generation; names of one and numbers of another do not belong together.
    pub fn unless_since<T>(&self, generation: u64, answer: T) -> Result<T, QueueError> {
        if self.generation() == generation {
            return Ok(answer);
        }
        Err(QueueError::Unavailable {
            reason: "the connection to Redis was replaced meanwhile".to_owned(),
            retry_after: PAUSE,
        })
    }

    /// Notes whether the server answers only when a write is on its disk.
    pub fn set_synced(&self, synced: bool) {
        self.synced.store(synced, Ordering::Relaxed);
    }

    /// Runs a command that reads, or whose loss would be noticed.
    pub async fn run(&self, cmd: &Cmd) -> Result<Value, QueueError> {
        let (number, mut connection) = self.connection().await?;
        let mut answer = connection.ask(cmd).await;
        if answer.as_ref().is_err_and(is_script_missing) {
            answer = match load_scripts(&mut connection).await {
                Ok(()) => connection.ask(cmd).await,
                Err(error) => Err(error),
            };
        }
        match answer {
            Ok(value) => Ok(value),
            Err(error) => Err(self.give_up(number, &error).await),
        }
    }

    /// Runs a command that changes something, and waits until the change is as safe as it was asked to be.
    pub async fn write(&self, cmd: &Cmd) -> Result<Value, QueueError> {
        let limit_ms = REPLICATION_LIMIT.as_millis() as u64;
        match self.acknowledge {
            Acknowledge::Fast => self.run(cmd).await,
            Acknowledge::Durable if self.synced.load(Ordering::Relaxed) => self.run(cmd).await,
            Acknowledge::Replicated => {
                let wait = redis::cmd("WAIT").arg(1).arg(limit_ms).take();
                self.write_and_wait(cmd, wait, "a replica").await
            }
            Acknowledge::Durable => {
                let wait = redis::cmd("WAITAOF").arg(1).arg(0).arg(limit_ms).take();
                self.write_and_wait(cmd, wait, "the disk of the server")
                    .await
            }
        }
    }

    /// The write and what waits for it, together on a connection that nobody else uses meanwhile. It is kept for the
    /// next one where all went well; else the next one may have to go to another server.
    async fn write_and_wait(
        &self,
        cmd: &Cmd,
        wait: Cmd,
        wanted: &'static str,
    ) -> Result<Value, QueueError> {
        let turn = self.waiting.acquire();
        let turn = with_deadline("queue.write_turn", REPLICATION_LIMIT, turn).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(not_reached(wanted));
        };
        let (generation, mut connection) = self.waiting_connection().await?;
        let mut both = Pipeline::with_capacity(2);
        both.add_command(cmd.clone()).add_command(wait);
        match connection.ask_both(&both).await {
            Ok((answer, reached)) if has_reached(&reached) => {
                self.idle().push((generation, connection));
                Ok(answer)
            }
            Ok(_) => Err(not_reached(wanted)),
            Err(error) => {
                self.idle().clear();
                Err(unavailable(&error))
            }
        }
    }

    /// One to the same server as the connection that everybody shares: what waits on another server's disk or replica
    /// says nothing of this one.
    async fn waiting_connection(&self) -> Result<(u64, Connection), QueueError> {
        let known = self.generation();
        {
            let mut idle = self.idle();
            idle.retain(|(generation, _)| *generation == known);
            if let Some(found) = idle.pop() {
                return Ok(found);
            }
        }
        // Where there is no server, one try to connect answers all; where there is another one, its generation begins.
        let whoami = redis::cmd("INFO").arg("server").take();
        let shared = run_id(&self.run(&whoami).await?);
        let generation = self.generation();
        let connecting = async {
            let mut connection = self.address.connect().await?;
            let own = run_id(&connection.ask(&whoami).await?);
            Ok::<_, RedisError>((own, connection))
        };
        let (own, connection) = connecting.await.map_err(|error| unavailable(&error))?;
        if own == shared {
            return Ok((generation, connection));
        }
        *self.present.lock().await = Present::No;
        Err(QueueError::Unavailable {
            reason: "another Redis has become the primary".to_owned(),
            retry_after: PAUSE,
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(u64, Connection)>> {
        // No code that may panic runs under the lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self) -> Result<(u64, Connection), QueueError> {
        let mut present = self.present.lock().await;
        match &*present {
            Present::Connected(number, connection) => return Ok((*number, connection.clone())),
            // Whoever waited for this try is told how it ended, and does not begin one of their own behind it.
            Present::Failed(at, error) if at.elapsed() < CONNECT_PAUSE => {
                return Err(error.clone());
            }
            Present::Failed(..) | Present::No => {}
        }
        match self.connect().await {
            Ok(connection) => {
                let number = self.begin_generation();
                *present = Present::Connected(number, connection.clone());
                Ok((number, connection))
            }
            Err(error) => {
                let error = unavailable(&error);
                *present = Present::Failed(Instant::now(), error.clone());
                Err(error)
            }
        }
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        let mut connection = self.address.connect().await?;
        load_scripts(&mut connection).await?;
        Ok(connection)
    }

    /// What the caller is told. A connection that may be broken, or leads to a server that is no primary any more, is
    /// let go, so that the next command makes a new one.
    async fn give_up(&self, number: u64, error: &RedisError) -> QueueError {
        let demoted = error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly);
        if error.is_io_error() || error.is_connection_dropped() || error.is_timeout() || demoted {
            let mut present = self.present.lock().await;
            if matches!(*present, Present::Connected(known, _) if known == number) {
                *present = Present::No;
            }
        }
        unavailable(error)
    }
}

impl Connection {
    async fn ask(&mut self, cmd: &Cmd) -> redis::RedisResult<Value> {
        let answer = match self {
            Self::One(connection) => connection.req_packed_command(cmd).await,
            Self::Cluster(connection) => connection.req_packed_command(cmd).await,
        };
        answer.and_then(Value::extract_error)
    }

    /// The answers to a script and to what waits for it. A script that the server does not know wrote nothing, so that
    /// both are asked again.
    async fn ask_both(&mut self, both: &Pipeline) -> redis::RedisResult<(Value, Value)> {
        match self.try_both(both).await {
            Err(error) if is_script_missing(&error) => {
                load_scripts(self).await?;
                self.try_both(both).await
            }
            answers => answers,
        }
    }

    async fn try_both(&mut self, both: &Pipeline) -> redis::RedisResult<(Value, Value)> {
        let answers = match self {
            Self::One(connection) => connection.req_packed_commands(both, 0, 2).await?,
            // No start gets here: a Cluster is refused where writes wait.
            Self::Cluster(connection) => connection.req_packed_commands(both, 0, 2).await?,
        };
        let mut answers = answers.into_iter();
        let mut next = || answers.next().unwrap_or(Value::Nil).extract_error();
        Ok((next()?, next()?))
    }
}

/// Which process the server is, of what it says of itself.
fn run_id(info: &Value) -> Option<String> {
    let Value::BulkString(info) = info else {
        return None;
    };
    let info = String::from_utf8_lossy(info);
    let line = info.lines().find_map(|line| line.strip_prefix("run_id:"));
    line.map(|id| id.trim().to_owned())
}

/// Whether what waited counts a replica, or the disk of the server.
fn has_reached(answer: &Value) -> bool {
    match answer {
        Value::Int(replicas) => *replicas >= 1,
        Value::Array(counts) => counts.first() == Some(&Value::Int(1)),
        _ => false,
    }
}

fn not_reached(wanted: &str) -> QueueError {
    QueueError::Unavailable {
        reason: format!(
            "the write did not reach {wanted} within {} ms",
            REPLICATION_LIMIT.as_millis()
        ),
        retry_after: PAUSE,
    }
}

fn is_script_missing(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

async fn load_scripts(connection: &mut Connection) -> redis::RedisResult<()> {
    for script in SCRIPTS.all() {
        match connection {
            Connection::One(connection) => script.load_async(connection).await?,
            Connection::Cluster(connection) => script.load_async(connection).await?,
        };
    }
    Ok(())
}

/// What a failure of the server means for whoever asked.
pub fn unavailable(error: &RedisError) -> QueueError {
    let full = error.code() == Some("OOM");
    let reason = if full {
        "Redis has no memory left: raise its `maxmemory`, or let jobs end and batches be purged"
            .to_owned()
    } else {
        format!("Redis: {error}")
    };
    QueueError::Unavailable {
        reason,
        retry_after: if full { FULL_PAUSE } else { PAUSE },
    }
}
