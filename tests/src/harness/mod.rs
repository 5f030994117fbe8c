//! What scenarios are made of: real processes, a client, an OTLP receiver, and waits that say what they waited for.
//!
//! Nothing here judges; the scenarios in `tests/tests` do.

pub mod client;
pub mod cluster;
pub mod disk;
pub mod model;
pub mod otlp;
pub mod process;
pub mod up;

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

/// How often a condition is looked at. Short against every deadline that a test has.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `look` gives a value. Without one after `deadline`, panics with what it saw last.
pub async fn wait_for<T, S, F>(what: &str, deadline: Duration, mut look: impl FnMut() -> F) -> T
where
    S: Debug,
    F: Future<Output = Result<T, S>>,
{
    let started = Instant::now();
    loop {
        match look().await {
            Ok(value) => return value,
            Err(seen) if started.elapsed() > deadline => {
                panic!("waited {deadline:?} for {what}; last seen: {seen:?}")
            }
            Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}
