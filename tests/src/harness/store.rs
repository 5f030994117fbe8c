//! A real S3 server that everybody reaches over a proxy, by which it can be away and crawl.

use std::time::Duration;

use super::proxy::{Direction, Network, Proxy};
use super::s3::S3Server;

/// A crawling store: both directions of each connection.
const CRAWLING: Direction = Direction {
    delay: Duration::from_secs(1),
    stopped: false,
    bytes_per_s: Some(1000),
    breaks_after: None,
};

/// An empty store.
#[derive(Debug)]
pub struct FarStore {
    /// The server itself.
    pub server: S3Server,
    proxy: Proxy,
    url: String,
}

impl FarStore {
    /// Starts one under `prefix`.
    pub async fn start(prefix: &str) -> Self {
        let server = S3Server::start().await;
        let proxy = Proxy::start(server.address()).await;
        Self {
            server,
            proxy,
            url: S3Server::store_url(prefix),
        }
    }

    /// Its URL, for those who have its environment.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What a process needs in its environment to reach it.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        S3Server::environment_at(&format!("http://{}", self.proxy.address()))
    }

    /// Breaks every connection and refuses new ones for `time`.
    pub async fn be_away(&self, time: Duration) {
        self.suffer(Network::refusing(), time).await;
    }

    /// Answers late and slowly for `time`: a second each way, and a thousand bytes a second on each connection.
    pub async fn crawl(&self, time: Duration) {
        self.suffer(Network::of_both(CRAWLING), time).await;
    }

    /// From now on whatever is larger than `bytes` breaks off half way to the store.
    pub fn break_after(&self, bytes: u64) {
        self.proxy.set(Network::breaking_after(bytes));
    }

    /// From now on everything is late by `delay`, each way.
    pub fn be_slow(&self, delay: Duration) {
        self.proxy.set(Network::slow(delay));
    }

    /// How many connections broke so.
    pub fn broken(&self) -> u64 {
        self.proxy.broken()
    }

    /// The network does its work again.
    pub fn heal(&self) {
        self.proxy.heal();
    }

    async fn suffer(&self, network: Network, time: Duration) {
        self.proxy.set(network);
        self.proxy.cut();
        tokio::time::sleep(time).await;
        self.proxy.heal();
        // A connection that was stuck is given up at once.
        self.proxy.cut();
    }
}
