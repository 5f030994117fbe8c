//! The connection to the server: made when it is needed, made anew after it broke, with a deadline on every answer.
//!
//! An answer that did not come leaves open whether the command took effect; all commands may be repeated as they
//! were, so that the caller is told [`QueueError::Unavailable`] and asks again.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::aio::ConnectionLike;
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::sync::Mutex;

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
/// How long a write may take to reach as many replicas as were asked for.
const REPLICATION_LIMIT: Duration = Duration::from_secs(2);

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
    /// How often it was connected: tells a broken connection from the one that replaced it.
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
            made: AtomicU64::new(0),
        }
    }

    /// Where it leads.
    pub fn address(&self) -> &Address {
        &self.address
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
        let answer = self.run(cmd).await?;
        let limit_ms = REPLICATION_LIMIT.as_millis() as u64;
        let (waiting, wanted) = match self.acknowledge {
            Acknowledge::Fast => return Ok(answer),
            Acknowledge::Replicated => {
                (redis::cmd("WAIT").arg(1).arg(limit_ms).take(), "a replica")
            }
            Acknowledge::Durable if self.synced.load(Ordering::Relaxed) => return Ok(answer),
            Acknowledge::Durable => {
                let local = redis::cmd("WAITAOF").arg(1).arg(0).arg(limit_ms).take();
                (local, "the disk of the server")
            }
        };
        let reached = match self.run(&waiting).await? {
            Value::Int(replicas) => replicas,
            Value::Array(counts) => counts.first().map_or(0, |n| i64::from(*n == Value::Int(1))),
            _ => 0,
        };
        if reached >= 1 {
            return Ok(answer);
        }
        Err(QueueError::Unavailable {
            reason: format!("the write did not reach {wanted} within {limit_ms} ms"),
            retry_after: PAUSE,
        })
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
                let number = self.made.fetch_add(1, Ordering::Relaxed) + 1;
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
