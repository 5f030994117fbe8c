//! The conformance suite on a real server that is killed, and what only this backend can get wrong.

use std::sync::Arc;

use espalier_core::queue::MachineConfig;
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, ManualClock};
use espalier_runtime::config::Secret;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::Tasks;
use espalier_testbed::redis::RedisServer;
use futures::FutureExt;
use tokio::sync::Mutex;

use super::super::Queue;
use super::super::conformance::{Ending, Fixture, conformance_tests};
use super::{Acknowledge, ConnectError, Redis, RedisConfig};

pub const START: Timestamp = Timestamp(1_700_000_000_000_000);

/// A coordinator of the queue `test`.
pub async fn open(url: &str, clock: Option<Arc<ManualClock>>, shards: u16) -> Arc<Redis> {
    Arc::new(try_open(url, clock, shards).await.unwrap())
}

pub async fn try_open(
    url: &str,
    clock: Option<Arc<ManualClock>>,
    shards: u16,
) -> Result<Redis, ConnectError> {
    let config = RedisConfig {
        clock: clock.map(|clock| clock as Arc<dyn Clock>),
        shards,
        ..config(url, Acknowledge::Fast)
    };
    Redis::open(config, &Tasks::new(Shutdown::new())).await
}

/// A coordinator of the queue `test` that acknowledges in another way, on the server's clock.
pub async fn try_open_as(url: &str, acknowledge: Acknowledge) -> Result<Redis, ConnectError> {
    Redis::open(config(url, acknowledge), &Tasks::new(Shutdown::new())).await
}

fn config(url: &str, acknowledge: Acknowledge) -> RedisConfig {
    RedisConfig {
        url: Secret::new(url),
        name: "test".to_owned(),
        shards: 1,
        acknowledge,
        machine: MachineConfig::default(),
        clock: None,
    }
}

/// A queue whose coordinator is killed together with the server. The server syncs each write: with `everysec` it holds
/// writes back while a sync is under way, and loses them when it is killed then.
async fn fixture() -> Fixture {
    let server = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let (url, clock) = (server.url(), Arc::new(ManualClock::new(START)));
    let queue = open(&url, Some(clock.clone()), 1).await;
    let (server, same_clock) = (Arc::new(Mutex::new(server)), clock.clone());
    let reopen = move |old: Arc<dyn Queue>, how| {
        let (server, clock, url) = (server.clone(), same_clock.clone(), url.clone());
        async move {
            drop(old);
            if how == Ending::Killed {
                server.lock().await.restart().await;
            }
            open(&url, Some(clock), 1).await as Arc<dyn Queue>
        }
        .boxed()
    };
    Fixture {
        queue,
        clock,
        reopen: Box::new(reopen),
    }
}

conformance_tests!(fixture);
