//! What the server says of itself, and whether a queue may lie on it. Pure, but for [`ask`] and [`examine()`].
//!
//! A Cluster answers with one text for each node; what holds for the queue is the worst of its primaries.

mod examine;

use espalier_core::time::Timestamp;
use redis::Value;

use super::decode;
use super::link::{Acknowledge, Link};
use crate::queue::QueueError;

pub use examine::{Aspect, Grade, examine};

/// The oldest version whose scripts say what they may do.
const VERSION_MIN: Version = Version(7, 0);
/// The oldest version that waits until a write is on its disk (`WAITAOF`).
const VERSION_WAITS: Version = Version(7, 2);
/// Percentage of `maxmemory` above which no new work is taken: the rest is for bringing what is there to its end.
pub const FULL_PERCENT: u64 = 80;
const MIB: u64 = 1 << 20;

/// Why a queue must not lie on this server. Each says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Scripts need a later version.
    #[error("Redis {found} is too old: the queue needs {VERSION_MIN} or later")]
    Old {
        /// What it is.
        found: Version,
    },
    /// It throws away keys when its memory is full.
    #[error(
        "this Redis throws keys away when its memory is full, and with them jobs: set `maxmemory-policy` to \
         `noeviction`, got `{policy}`"
    )]
    Evicts {
        /// Its policy.
        policy: String,
    },
    /// It takes no writes.
    #[error(
        "this Redis is a replica and takes no writes: set `queue` to the address of its primary, or to that of its \
         Sentinels (redis+sentinel://…)"
    )]
    Replica,
    /// It keeps nothing on its disk.
    #[error(
        "`queue_acknowledge = durable` needs an append-only file: set `appendonly yes` in Redis"
    )]
    NoFile,
    /// It neither syncs each write nor can be asked to wait.
    #[error(
        "`queue_acknowledge = durable` needs `appendfsync always` in Redis, or Redis {VERSION_WAITS} or later; this is \
         Redis {found} with `appendfsync {appendfsync}`"
    )]
    SyncsLate {
        /// What it is.
        found: Version,
        /// When it syncs.
        appendfsync: String,
    },
    /// It is a Cluster, and writes would have to wait.
    #[error(
        "`queue_acknowledge = {setting}` cannot be used with a Redis Cluster: what waits for a write would have to wait \
         at the node that has it; set `queue_acknowledge` to `fast`, or to `durable` with `appendfsync always` in Redis, \
         or use a primary with replicas behind Sentinels"
    )]
    Cluster {
        /// What was asked for.
        setting: &'static str,
    },
}

/// What works and should be otherwise. Each says what to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// Nothing bounds its memory.
    #[error(
        "Redis has no `maxmemory`: it grows until the machine kills it; set one, so that new work is refused in time"
    )]
    NoLimit,
    /// It keeps nothing on its disk.
    #[error(
        "Redis keeps no append-only file: a restart of it loses acknowledged jobs; set `appendonly yes`"
    )]
    NoFile,
    /// It writes to its disk when the system likes to.
    #[error(
        "Redis never syncs its append-only file by itself: a power cut loses what the system had not written, half a \
         minute or more; set `appendfsync everysec`"
    )]
    NeverSyncs,
    /// Nothing can be acknowledged.
    #[error(
        "Redis has no replica now: with `queue_acknowledge = replicated` nothing is taken until it has one"
    )]
    NoReplica,
}

/// Major and minor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The primaries that hold the queue, or what was found in their place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    nodes: Vec<Node>,
    appendfsync: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    version: Version,
    run_id: String,
    replid: String,
    time_us: u64,
    used_bytes: u64,
    max_bytes: u64,
    policy: String,
    has_file: bool,
    is_replica: bool,
    is_cluster: bool,
    replicas: u32,
}

impl Node {
    fn parse(info: &str) -> Self {
        let mut node = Self::default();
        for line in info.lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let number = || value.parse().unwrap_or(0);
            match name {
                "redis_version" => node.version = version(value),
                "run_id" => node.run_id = value.to_owned(),
                "master_replid" => node.replid = value.to_owned(),
                "server_time_usec" => node.time_us = number(),
                "used_memory" => node.used_bytes = number(),
                "maxmemory" => node.max_bytes = number(),
                "maxmemory_policy" => node.policy = value.to_owned(),
                "aof_enabled" => node.has_file = value == "1",
                "redis_mode" => node.is_cluster = value == "cluster",
                "role" => node.is_replica = value == "slave",
                "connected_slaves" => node.replicas = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        node
    }

    fn is_full(&self) -> bool {
        self.max_bytes > 0 && self.used_bytes.saturating_mul(100) > self.max_bytes * FULL_PERCENT
    }
}

fn version(text: &str) -> Version {
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    Version(parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

impl Server {
    fn parse<'a>(infos: impl IntoIterator<Item = &'a str>, appendfsync: &str) -> Self {
        let all: Vec<Node> = infos.into_iter().map(Node::parse).collect();
        let primaries: Vec<Node> = all.iter().filter(|n| !n.is_replica).cloned().collect();
        let mut nodes = if primaries.is_empty() { all } else { primaries };
        nodes.sort_by(|a, b| a.run_id.cmp(&b.run_id));
        Self {
            nodes,
            appendfsync: appendfsync.to_owned(),
        }
    }

    /// Whether every write is on disk before it is answered.
    pub fn syncs_each_write(&self) -> bool {
        self.appendfsync == "always" && self.nodes.iter().all(|node| node.has_file)
    }

    /// Whether a queue that acknowledges in this way may lie here.
    pub fn check(&self, acknowledge: Acknowledge) -> Result<(), Unfit> {
        self.faults(acknowledge).next().map_or(Ok(()), Err)
    }

    /// Every reason for which a queue that acknowledges in this way must not lie here, of each node.
    fn faults(&self, acknowledge: Acknowledge) -> impl Iterator<Item = Unfit> {
        let durable = acknowledge == Acknowledge::Durable;
        self.nodes.iter().flat_map(move |node| {
            let found = node.version;
            let policy = || node.policy.clone();
            let appendfsync = || self.appendfsync.clone();
            let waits = match acknowledge {
                Acknowledge::Fast => None,
                Acknowledge::Replicated => Some("replicated"),
                Acknowledge::Durable => (self.appendfsync != "always").then_some("durable"),
            };
            let cluster = waits.filter(|_| node.is_cluster);
            let late = self.appendfsync != "always" && found < VERSION_WAITS;
            [
                (found < VERSION_MIN).then_some(Unfit::Old { found }),
                node.is_replica.then_some(Unfit::Replica),
                (node.policy != "noeviction").then(|| Unfit::Evicts { policy: policy() }),
                cluster.map(|setting| Unfit::Cluster { setting }),
                (durable && !node.has_file).then_some(Unfit::NoFile),
                (durable && node.has_file && late).then(|| Unfit::SyncsLate {
                    found,
                    appendfsync: appendfsync(),
                }),
            ]
            .into_iter()
            .flatten()
        })
    }

    /// What works and should be otherwise.
    pub fn warnings(&self, acknowledge: Acknowledge) -> Vec<Warning> {
        let any = |wrong: fn(&Node) -> bool| self.nodes.iter().any(wrong);
        let no_file = any(|node| !node.has_file);
        let found = [
            (any(|node| node.max_bytes == 0), Warning::NoLimit),
            (no_file, Warning::NoFile),
            (!no_file && self.appendfsync == "no", Warning::NeverSyncs),
            (
                acknowledge == Acknowledge::Replicated && any(|node| node.replicas == 0),
                Warning::NoReplica,
            ),
        ];
        let found = found.into_iter().filter(|(holds, _)| *holds);
        found.map(|(_, warning)| warning).collect()
    }

    /// Tells one set of servers, and one history of their data, from another.
    pub fn identity(&self) -> String {
        let ids = self.nodes.iter();
        let ids: Vec<String> = ids
            .map(|node| format!("{}/{}", node.run_id, node.replid))
            .collect();
        ids.join(" ")
    }

    /// The newest of the servers' times.
    pub fn time(&self) -> Option<Timestamp> {
        let newest = self.nodes.iter().map(|node| node.time_us).max();
        newest.filter(|us| *us > 0).map(Timestamp)
    }

    /// Why no new work is taken: a node has too little room left.
    pub fn full(&self) -> Option<String> {
        let node = self.nodes.iter().find(|node| node.is_full())?;
        Some(format!(
            "Redis uses {} of {} MiB of memory, above the {FULL_PERCENT} % at which new work is refused; raise its \
             `maxmemory`, or let jobs end and batches be purged",
            node.used_bytes / MIB,
            node.max_bytes / MIB
        ))
    }

    /// Memory in use and its limit, in bytes, of the fullest node that has a limit.
    pub fn memory(&self) -> Option<(u64, u64)> {
        let limited = self.nodes.iter().filter(|node| node.max_bytes > 0);
        limited
            .map(|node| (node.used_bytes, node.max_bytes))
            .max_by_key(|(used, max)| used.saturating_mul(1_000) / max)
    }
}

/// Asks the server about itself. When it syncs is asked only where that decides something: many hosts of Redis refuse
/// `CONFIG`.
pub async fn ask(link: &Link, acknowledge: Acknowledge) -> Result<Server, QueueError> {
    ask_about(link, acknowledge == Acknowledge::Durable).await
}

/// Asks the server about itself, and `with_sync` also when it syncs.
async fn ask_about(link: &Link, with_sync: bool) -> Result<Server, QueueError> {
    let mut info = redis::cmd("INFO");
    for section in ["server", "memory", "persistence", "replication"] {
        info.arg(section);
    }
    let infos = texts(link.run(&info).await?)?;
    let mut appendfsync = "unknown".to_owned();
    if with_sync {
        let asked = redis::cmd("CONFIG").arg("GET").arg("appendfsync").take();
        let answer = match link.run(&asked).await {
            Ok(answer) => texts(answer)?,
            Err(_) => Vec::new(),
        };
        let known = ["always", "everysec", "no"];
        let mut found = answer.into_iter().filter(|t| known.contains(&t.as_str()));
        appendfsync = found.next().unwrap_or(appendfsync);
        // Of the nodes of a Cluster, the laziest counts.
        appendfsync = found.find(|other| other != "always").unwrap_or(appendfsync);
    }
    Ok(Server::parse(
        infos.iter().map(String::as_str),
        &appendfsync,
    ))
}

/// All text in an answer, however it is nested: a Cluster answers with a map of nodes.
fn texts(value: Value) -> Result<Vec<String>, QueueError> {
    match value {
        Value::Array(values) => values.into_iter().map(texts).try_fold(
            Vec::new(),
            |mut all, one| -> Result<_, QueueError> {
                all.extend(one?);
                Ok(all)
            },
        ),
        Value::Map(pairs) => texts(Value::Array(
            pairs.into_iter().map(|(_, value)| value).collect(),
        )),
        Value::VerbatimString { text, .. } => Ok(vec![text]),
        value => decode::text(value).map(|text| vec![text]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(changes: &[(&str, &str)]) -> String {
        let mut lines = vec![
            ("redis_version", "7.0.15"),
            ("run_id", "aa"),
            ("server_time_usec", "1700000000000000"),
            ("used_memory", "1048576"),
            ("maxmemory", "104857600"),
            ("maxmemory_policy", "noeviction"),
            ("aof_enabled", "1"),
            ("role", "master"),
            ("connected_slaves", "1"),
            ("master_replid", "bb"),
        ];
        for (name, value) in changes {
            lines.retain(|(known, _)| known != name);
            lines.push((name, value));
        }
        let lines = lines.iter().map(|(name, value)| format!("{name}:{value}"));
        lines.collect::<Vec<_>>().join("\r\n")
    }

    pub fn server(changes: &[(&str, &str)], appendfsync: &str) -> Server {
        Server::parse([info(changes).as_str()], appendfsync)
    }

    /// What differs from a good server, when it syncs, how the queue acknowledges, and what the refusal says.
    type Case = (
        &'static [(&'static str, &'static str)],
        &'static str,
        Acknowledge,
        &'static str,
    );

    #[test]
    fn a_server_that_may_lose_jobs_is_refused_with_what_to_change() {
        let durable = Acknowledge::Durable;
        let cases: [Case; 6] = [
            (&[("redis_version", "6.2.14")], "", Acknowledge::Fast, "6.2"),
            (
                &[("maxmemory_policy", "allkeys-lru")],
                "",
                Acknowledge::Fast,
                "`noeviction`, got `allkeys-lru`",
            ),
            (&[("role", "slave")], "", Acknowledge::Fast, "primary"),
            (&[("aof_enabled", "0")], "always", durable, "appendonly yes"),
            (&[], "everysec", durable, "`appendfsync everysec`"),
            (&[], "unknown", durable, "7.2 or later; this is Redis 7.0"),
        ];
        for (changes, appendfsync, acknowledge, wanted) in cases {
            let refused = server(changes, appendfsync).check(acknowledge);
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        for (changes, appendfsync) in [
            (&[][..], "always"),
            (&[("redis_version", "7.2.0")][..], "everysec"),
            (&[("redis_version", "8.0.1")][..], "unknown"),
        ] {
            assert_eq!(server(changes, appendfsync).check(durable), Ok(()));
        }
        assert_eq!(server(&[], "everysec").check(Acknowledge::Fast), Ok(()));
    }

    #[test]
    fn on_a_cluster_no_write_has_to_wait() {
        let cluster = [("redis_mode", "cluster"), ("redis_version", "7.2.0")];
        for (appendfsync, acknowledge, refused) in [
            ("everysec", Acknowledge::Fast, false),
            ("always", Acknowledge::Replicated, true),
            ("everysec", Acknowledge::Durable, true),
            ("always", Acknowledge::Durable, false),
        ] {
            let checked = server(&cluster, appendfsync).check(acknowledge);
            assert_eq!(checked.is_err(), refused, "{acknowledge:?} {appendfsync}");
            if let Err(unfit) = checked {
                assert!(
                    unfit.to_string().contains("`queue_acknowledge = "),
                    "{unfit}"
                );
            }
        }
    }

    #[test]
    fn what_should_be_otherwise_is_said() {
        assert!(server(&[], "").warnings(Acknowledge::Replicated).is_empty());
        let poor = [
            ("maxmemory", "0"),
            ("aof_enabled", "0"),
            ("connected_slaves", "0"),
        ];
        let poor = server(&poor, "");
        assert_eq!(poor.warnings(Acknowledge::Fast).len(), 2);
        assert_eq!(poor.warnings(Acknowledge::Replicated).len(), 3);
        assert_eq!(poor.full(), None, "no limit, no share of it");
    }

    #[test]
    fn it_is_full_above_four_fifths_of_its_memory() {
        assert_eq!(server(&[("used_memory", "83886080")], "").full(), None);
        let full = server(&[("used_memory", "84934656")], "").full().unwrap();
        assert!(full.contains("uses 81 of 100 MiB"), "{full}");
    }

    #[test]
    fn of_a_cluster_the_primaries_count() {
        let (first, second) = (
            info(&[]),
            info(&[("run_id", "cc"), ("maxmemory", "1048577")]),
        );
        let replica = info(&[("role", "slave"), ("run_id", "dd"), ("maxmemory", "1")]);
        let forth = Server::parse([first.as_str(), &second, &replica], "");
        let back = Server::parse([replica.as_str(), &second, &first], "");
        assert_eq!(forth.identity(), "aa/bb cc/bb");
        assert_eq!(forth.identity(), back.identity());
        assert!(forth.full().is_some_and(|full| full.contains("1 of 1 MiB")));
        assert_eq!(forth.check(Acknowledge::Fast), Ok(()));
    }
}
