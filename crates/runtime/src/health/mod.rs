//! How the loops of a process do: whether each still goes round, and whether each can work. [`serve`] tells it over plain
//! HTTP to whoever looks after processes.
//!
//! The loops tell, this module remembers and judges; it acts on nothing. A process that lives may well not be ready: to
//! restart it while its coordinators are away would help nobody.

mod http;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

pub use http::{ListenError, Served, serve};

/// A loop goes round every few seconds; one that did not for so long is stuck.
const STILL_MAX: Duration = Duration::from_secs(30);
/// How long a loop may be without what it works with before it is not ready: longer than a restart of that takes.
const APART_MAX: Duration = Duration::from_secs(60);

/// What a loop says of itself each time that it goes round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has what it works with.
    Connected,
    /// It looks for it.
    Apart,
    /// It takes no more work.
    Ending,
}

/// The loops of a process. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Health {
    loops: Arc<Mutex<Loops>>,
}

#[derive(Debug, Default)]
struct Loops {
    last: u64,
    watched: BTreeMap<u64, Loop>,
}

#[derive(Debug)]
struct Loop {
    name: String,
    turn: Turn,
    turned_at: Instant,
    /// When it was connected last; of one that never was, when it began.
    connected_at: Instant,
    has_been_connected: bool,
}

/// A loop that is watched until this is dropped.
#[derive(Debug)]
pub struct Watched {
    loops: Arc<Mutex<Loops>>,
    number: u64,
}

impl Health {
    /// Watches a loop from now on, which people know as `name`.
    pub fn watch(&self, name: impl Into<String>) -> Watched {
        let now = Instant::now();
        let mut loops = lock(&self.loops);
        loops.last += 1;
        let number = loops.last;
        let begun = Loop {
            name: name.into(),
            turn: Turn::Apart,
            turned_at: now,
            connected_at: now,
            has_been_connected: false,
        };
        loops.watched.insert(number, begun);
        Watched {
            loops: Arc::clone(&self.loops),
            number,
        }
    }

    /// Whether the process lives.
    ///
    /// # Errors
    /// Which loop stands still, in words.
    pub fn live(&self) -> Result<(), String> {
        let now = Instant::now();
        for one in lock(&self.loops).watched.values() {
            let still = now.saturating_duration_since(one.turned_at);
            if still > STILL_MAX {
                let (name, still) = (&one.name, still.as_secs());
                return Err(format!("{name}: the loop has stood still for {still} s"));
            }
        }
        Ok(())
    }

    /// Whether the process lives and can work.
    ///
    /// # Errors
    /// What keeps it from that, in words.
    pub fn ready(&self) -> Result<(), String> {
        self.live()?;
        let now = Instant::now();
        let loops = lock(&self.loops);
        if loops.watched.is_empty() {
            return Err("no loop runs: the process begins or ends".to_owned());
        }
        for one in loops.watched.values() {
            let apart = now.saturating_duration_since(one.connected_at);
            let (name, seconds) = (&one.name, apart.as_secs());
            match one.turn {
                Turn::Connected => {}
                Turn::Ending => return Err(format!("{name}: takes no more work")),
                Turn::Apart if !one.has_been_connected => {
                    return Err(format!("{name}: not connected yet, after {seconds} s"));
                }
                Turn::Apart if apart > APART_MAX => {
                    return Err(format!("{name}: not connected for {seconds} s"));
                }
                Turn::Apart => {}
            }
        }
        Ok(())
    }
}

impl Watched {
    /// The loop went round.
    pub fn turned(&self, turn: Turn) {
        let now = Instant::now();
        if let Some(one) = lock(&self.loops).watched.get_mut(&self.number) {
            (one.turn, one.turned_at) = (turn, now);
            if turn == Turn::Connected {
                (one.connected_at, one.has_been_connected) = (now, true);
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        lock(&self.loops).watched.remove(&self.number);
    }
}

/// No code that may panic runs under the lock, and the state is valid after every statement.
fn lock(loops: &Mutex<Loops>) -> MutexGuard<'_, Loops> {
    loops.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_stands_still_is_named() {
        let health = Health::default();
        let (still, goes) = (health.watch("train"), health.watch("rollout"));
        for _ in 0..6 {
            pass(5).await;
            goes.turned(Turn::Connected);
        }
        assert_eq!(health.live(), Ok(()), "30 s are within the limit");
        pass(1).await;
        let said = "train: the loop has stood still for 31 s".to_owned();
        assert_eq!(health.live(), Err(said.clone()));
        assert_eq!(health.ready(), Err(said));
        still.turned(Turn::Connected);
        assert_eq!(health.ready(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn ready_is_who_is_connected_or_was_a_minute_ago() {
        let health = Health::default();
        let said = |health: &Health| health.ready().unwrap_err();
        assert!(said(&health).contains("no loop runs"));
        let train = health.watch("train");
        assert_eq!(said(&health), "train: not connected yet, after 0 s");
        train.turned(Turn::Connected);
        assert_eq!(health.ready(), Ok(()));
        for _ in 0..3 {
            pass(20).await;
            train.turned(Turn::Apart);
        }
        assert_eq!(health.ready(), Ok(()), "a restart of a coordinator");
        pass(1).await;
        assert_eq!(said(&health), "train: not connected for 61 s");
        assert_eq!(health.live(), Ok(()), "a restart would help nobody");
        train.turned(Turn::Connected);
        train.turned(Turn::Ending);
        assert_eq!(said(&health), "train: takes no more work");
        drop(train);
        assert_eq!(health.live(), Ok(()));
        assert!(said(&health).contains("no loop runs"));
    }
}
