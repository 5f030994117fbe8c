//! Where the server is: one Redis, a primary that Sentinels know, or a Cluster; with or without TLS.
//!
//! ```text
//! redis://[user:password@]host[:port][/db]          rediss:// with TLS
//! redis+sentinel://[user:password@]host:port[,host:port…]/primary[/db]
//! redis+cluster://[user:password@]host:port[,host:port…]
//! ```

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType};
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo, RedisResult, TlsMode};
use tokio::sync::Mutex;

use super::link::{CONNECT_LIMIT, RESPONSE_LIMIT};
use espalier_core::error::FieldError;
use espalier_runtime::config::Secret;

/// A parsed address. Holds the password; shows it to nobody.
pub enum Address {
    /// One server.
    Single(Client),
    /// Whichever server the Sentinels call the primary.
    Sentinel(Box<Mutex<SentinelClient>>),
    /// The nodes of a Cluster, and the first of them by itself.
    Cluster(Box<ClusterClient>, Client),
}

/// A connection that many may use at once.
#[derive(Clone)]
pub enum Connection {
    /// To one server.
    One(MultiplexedConnection),
    /// To the nodes of a Cluster.
    Cluster(ClusterConnection),
}

const FORMS: &str = "must be redis://host:port/db, redis+sentinel://host:port,host:port/primary or \
                     redis+cluster://host:port,host:port, with rediss in place of redis for TLS";

impl Address {
    /// Parses an address. The error names the rule and not the address, which may hold a password.
    pub fn parse(url: &Secret) -> Result<Self, FieldError> {
        let refused = || FieldError::new("queue", "the address", FORMS);
        let (scheme, rest) = url.expose().split_once("://").ok_or_else(refused)?;
        let (plain, topology) = scheme.split_once('+').unwrap_or((scheme, "single"));
        if !matches!(plain, "redis" | "rediss") {
            return Err(refused());
        }
        let parsed = match topology {
            "single" => Client::open(url.expose())
                .and_then(without_delay)
                .map(Self::Single),
            "sentinel" => sentinel(plain, rest),
            "cluster" => cluster(plain, rest),
            _ => return Err(refused()),
        };
        parsed.map_err(|_| refused())
    }

    /// Connects, to the primary of the moment where there are several servers.
    pub async fn connect(&self) -> RedisResult<Connection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_LIMIT))
            .set_response_timeout(Some(RESPONSE_LIMIT));
        if let Self::Cluster(client, _) = self {
            return Ok(Connection::Cluster(client.get_async_connection().await?));
        }
        let client = self.client().await?;
        let connecting = client.get_multiplexed_async_connection_with_config(&config);
        Ok(Connection::One(connecting.await?))
    }

    /// A client of one server: the primary, or of a Cluster any node, since each tells of every event.
    pub async fn client(&self) -> RedisResult<Client> {
        match self {
            Self::Single(client) | Self::Cluster(_, client) => Ok(client.clone()),
            Self::Sentinel(sentinel) => {
                let client = sentinel.lock().await.async_get_client().await?;
                without_delay(client)
            }
        }
    }
}

/// Small commands must not wait for the answer to earlier ones.
fn without_delay(client: Client) -> RedisResult<Client> {
    let info = client.get_connection_info().clone();
    Client::open(info.set_tcp_settings(TcpSettings::default().set_nodelay(true)))
}

/// `user:password@` and the hosts of what follows the scheme, and the path behind them.
fn parts(rest: &str) -> (&str, Vec<&str>, &str) {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let hosts_from = authority.rfind('@').map_or(0, |at| at + 1);
    let (login, hosts) = authority.split_at(hosts_from);
    (login, hosts.split(',').collect(), path)
}

/// An address without user and password.
pub fn shown(url: &Secret) -> String {
    let (scheme, rest) = url.expose().split_once("://").unwrap_or_default();
    let from = rest.rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}://{}", &rest[from..])
}

/// Whether an address asks for TLS.
pub fn is_encrypted(url: &Secret) -> bool {
    url.expose().starts_with("rediss")
}

/// Whether an address leads to this machine only.
pub fn is_local(url: &Secret) -> bool {
    let address = shown(url);
    let (_, rest) = address.split_once("://").unwrap_or_default();
    let local = |host: &&str| {
        ["127.", "localhost", "[::1]"]
            .iter()
            .any(|start| host.starts_with(start))
    };
    parts(rest).1.iter().all(local)
}

fn sentinel(scheme: &str, rest: &str) -> RedisResult<Address> {
    let (login, hosts, path) = parts(rest);
    let (primary, db) = path.split_once('/').unwrap_or((path, "0"));
    let sentinels: Vec<String> = hosts
        .iter()
        .map(|host| format!("{scheme}://{host}"))
        .collect();
    let first = hosts.first().copied().unwrap_or_default();
    let server = format!("{scheme}://{login}{first}/{db}").into_connection_info()?;
    let mut servers = SentinelNodeConnectionInfo::default()
        .set_redis_connection_info(server.redis_settings().clone())
        .set_tcp_settings(TcpSettings::default().set_nodelay(true));
    if scheme == "rediss" {
        servers = servers.set_tls_mode(TlsMode::Secure);
    }
    let master = SentinelServerType::Master;
    let client = SentinelClient::build(sentinels, primary, Some(servers), master)?;
    Ok(Address::Sentinel(Box::new(Mutex::new(client))))
}

fn cluster(scheme: &str, rest: &str) -> RedisResult<Address> {
    let (login, hosts, _) = parts(rest);
    let nodes: Vec<String> = hosts
        .iter()
        .map(|host| format!("{scheme}://{login}{host}"))
        .collect();
    let first = Client::open(nodes.first().cloned().unwrap_or_default())?;
    let client = ClusterClientBuilder::new(nodes)
        .connection_timeout(CONNECT_LIMIT)
        .response_timeout(RESPONSE_LIMIT)
        .tcp_settings(TcpSettings::default().set_nodelay(true))
        .build()?;
    Ok(Address::Cluster(Box::new(client), first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_its_login() {
        for (url, expected, local) in [
            ("redis://127.0.0.1:1/2", "redis://127.0.0.1:1/2", true),
            ("rediss://u:p/w@h@cache:2", "rediss://cache:2", false),
            (
                "redis+cluster://:pw@localhost:1,h:2",
                "redis+cluster://localhost:1,h:2",
                false,
            ),
        ] {
            let url = Secret::new(url);
            assert_eq!(shown(&url), expected);
            assert_eq!(is_local(&url), local);
            assert_eq!(is_encrypted(&url), expected.starts_with("rediss"));
        }
    }

    #[test]
    fn every_form_is_understood_and_no_error_shows_the_password() {
        let parse = |url: &str| Address::parse(&Secret::new(url));
        for url in [
            "redis://127.0.0.1:6379/2",
            "rediss://user:secret@cache.example:6380",
            "redis+sentinel://:secret@a:26379,b:26379/primary/1",
            "redis+cluster://a:7000,b:7001",
        ] {
            assert!(parse(url).is_ok(), "{url}");
        }
        for url in [
            "redis:/x",
            "http://:secret@x",
            "redis+ring://:secret@x",
            "redis://:secret@x:port",
        ] {
            let error = parse(url).err().unwrap().to_string();
            assert!(
                error.contains("must be redis://") && !error.contains("secret"),
                "{error}"
            );
        }
    }
}
