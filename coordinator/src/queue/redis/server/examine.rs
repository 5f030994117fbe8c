//! Shows a server to people: what there is of it, what is wrong with that, and what to do. `espalier doctor` asks; the
//! rules are those by which a coordinator starts.

use std::time::Instant;

use espalier_runtime::config::Secret;

use super::super::address::Address;
use super::super::link::{Acknowledge, Link};
use super::super::{ConnectError, address};
use super::{FULL_PERCENT, MIB, Server, Unfit, Warning, ask_about};

/// How one aspect of a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grade {
    /// As it should be.
    Good,
    /// A queue works there, and should not stay there like this.
    Poor,
    /// No coordinator starts on it, or none takes new work.
    Unfit,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aspect {
    /// What.
    pub what: &'static str,
    /// How it is. Holds no secret.
    pub seen: String,
    /// Whether that is good.
    pub grade: Grade,
    /// What is wrong, and what to change; empty where nothing is.
    pub fix: String,
}

/// Looks at the server at `url`, on which a queue is to acknowledge in this way. Connects as a coordinator does, and so
/// leaves the scripts in the server's cache and nothing else.
pub async fn examine(url: &Secret, acknowledge: Acknowledge) -> Result<Vec<Aspect>, ConnectError> {
    let began = Instant::now();
    let link = Link::new(Address::parse(url)?, acknowledge);
    let server = ask_about(&link, true).await?;
    let place = address::shown(url);
    let mut aspects = vec![server.reached(&place, began.elapsed().as_millis(), acknowledge)];
    aspects.push(encryption(url));
    aspects.extend(server.aspects(acknowledge));
    Ok(aspects)
}

fn encryption(url: &Secret) -> Aspect {
    let (secure, local) = (address::is_encrypted(url), address::is_local(url));
    let seen = match (secure, local) {
        (true, _) => "yes",
        (false, true) => "none, and none is needed on this machine",
        (false, false) => "none",
    };
    let fix = "the password and all jobs can be read on the way: use rediss in place of redis, unless the network is \
               private";
    Aspect::of(
        "TLS",
        seen,
        (!secure && !local).then_some((Grade::Poor, fix)),
    )
}

impl Aspect {
    fn of(
        what: &'static str,
        seen: impl Into<String>,
        wrong: Option<(Grade, impl ToString)>,
    ) -> Self {
        let (grade, fix) = match wrong {
            Some((grade, fix)) => (grade, fix.to_string()),
            None => (Grade::Good, String::new()),
        };
        let seen = seen.into();
        Self {
            what,
            seen,
            grade,
            fix,
        }
    }
}

impl Server {
    fn reached(&self, place: &str, after_ms: u128, acknowledge: Acknowledge) -> Aspect {
        let role = match self.nodes.iter().any(|node| node.is_replica) {
            true => "a replica",
            false => "a primary",
        };
        let seen = format!("{place}: {role}, answers after {after_ms} ms");
        let wrong = self.fault(acknowledge, |unfit| matches!(unfit, Unfit::Replica));
        Aspect::of("server", seen, wrong)
    }

    /// All but where it is.
    fn aspects(&self, acknowledge: Acknowledge) -> Vec<Aspect> {
        let fault = |of: fn(&Unfit) -> bool| self.fault(acknowledge, of);
        let oldest = self.nodes.iter().map(|node| node.version).min();
        let policy = self.nodes.iter().map(|node| node.policy.as_str());
        let policy = policy.max_by_key(|policy| *policy != "noeviction");
        let on_disk = |unfit: &Unfit| matches!(unfit, Unfit::NoFile | Unfit::SyncsLate { .. });
        vec![
            Aspect::of(
                "version",
                oldest.unwrap_or_default().to_string(),
                fault(|unfit| matches!(unfit, Unfit::Old { .. })),
            ),
            Aspect::of(
                "eviction",
                policy.unwrap_or_default(),
                fault(|unfit| matches!(unfit, Unfit::Evicts { .. })),
            ),
            self.room(acknowledge),
            Aspect::of(
                "disk",
                self.safety(acknowledge),
                fault(on_disk)
                    .or_else(|| self.warning(acknowledge, Warning::NoFile))
                    .or_else(|| self.warning(acknowledge, Warning::NeverSyncs)),
            ),
            Aspect::of(
                "replicas",
                self.nodes
                    .iter()
                    .map(|node| node.replicas)
                    .min()
                    .unwrap_or_default()
                    .to_string(),
                fault(|unfit| matches!(unfit, Unfit::Cluster { .. }))
                    .or_else(|| self.warning(acknowledge, Warning::NoReplica)),
            ),
        ]
    }

    fn room(&self, acknowledge: Acknowledge) -> Aspect {
        let seen = match self.memory() {
            Some((used, max)) => format!(
                "{} of {} MiB in use, new work is taken up to {FULL_PERCENT} %",
                used / MIB,
                max / MIB
            ),
            None => {
                let used: u64 = self.nodes.iter().map(|node| node.used_bytes).sum();
                format!("{} MiB in use, without a limit", used / MIB)
            }
        };
        let full = self.full().map(|full| (Grade::Unfit, full));
        let wrong = full.or_else(|| self.warning(acknowledge, Warning::NoLimit));
        Aspect::of("memory", seen, wrong)
    }

    /// What is on its disk when, and what that means for acknowledged work.
    fn safety(&self, acknowledge: Acknowledge) -> String {
        let file = self.nodes.iter().all(|node| node.has_file);
        let when = match (file, self.appendfsync.as_str()) {
            (false, _) => {
                return "no append-only file: what is acknowledged is gone after a restart"
                    .to_owned();
            }
            (true, "unknown") => {
                "append-only file, synced at times that it does not tell (it refuses CONFIG)"
                    .to_owned()
            }
            (true, when) => format!("append-only file, `appendfsync {when}`"),
        };
        let meaning = match (acknowledge, self.appendfsync.as_str()) {
            (Acknowledge::Durable, _) => {
                "`durable`: what is acknowledged is on disk, and only a failover may lose it"
            }
            (Acknowledge::Replicated, _) => {
                "`replicated`: what is acknowledged is at a replica too"
            }
            (Acknowledge::Fast, "always") => "`fast`: only a failover may lose acknowledged work",
            (Acknowledge::Fast, "everysec") => {
                "`fast`: a power cut, a failover or a kill in the middle of a sync may lose two seconds of acknowledged work"
            }
            (Acknowledge::Fast, _) => {
                "`fast`: a power cut or a failover may lose acknowledged work"
            }
        };
        format!("{when}; {meaning}")
    }

    fn fault(&self, acknowledge: Acknowledge, of: fn(&Unfit) -> bool) -> Option<(Grade, String)> {
        let unfit = self.faults(acknowledge).find(of)?;
        Some((Grade::Unfit, unfit.to_string()))
    }

    fn warning(&self, acknowledge: Acknowledge, wanted: Warning) -> Option<(Grade, String)> {
        let found = self.warnings(acknowledge).contains(&wanted);
        // Without a replica nothing is taken, though a coordinator starts and waits for one.
        let grade = match wanted {
            Warning::NoReplica => Grade::Unfit,
            _ => Grade::Poor,
        };
        found.then(|| (grade, wanted.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::server;
    use super::*;

    fn wrong(changes: &[(&str, &str)], sync: &str, how: Acknowledge) -> Vec<(&'static str, Grade)> {
        let server = server(changes, sync);
        let mut aspects = server.aspects(how);
        aspects.push(server.reached("redis://h", 1, how));
        let wrong = aspects.iter().filter(|aspect| aspect.grade != Grade::Good);
        let wrong: Vec<_> = wrong.collect();
        assert!(wrong.iter().all(|aspect| !aspect.fix.is_empty()));
        wrong
            .iter()
            .map(|aspect| (aspect.what, aspect.grade))
            .collect()
    }

    #[test]
    fn each_fault_stands_at_its_aspect() {
        use Acknowledge::{Durable, Fast, Replicated};
        use Grade::{Poor, Unfit};
        assert_eq!(wrong(&[], "everysec", Fast), []);
        let all = [
            ("redis_version", "6.2.1"),
            ("maxmemory_policy", "allkeys-lru"),
            ("maxmemory", "0"),
            ("aof_enabled", "0"),
            ("connected_slaves", "0"),
            ("role", "slave"),
        ];
        assert_eq!(
            wrong(&all, "everysec", Replicated),
            [
                ("version", Unfit),
                ("eviction", Unfit),
                ("memory", Poor),
                ("disk", Poor),
                ("replicas", Unfit),
                ("server", Unfit)
            ]
        );
        assert_eq!(wrong(&[], "everysec", Durable), [("disk", Unfit)]);
        assert_eq!(wrong(&[], "no", Fast), [("disk", Poor)]);
        assert_eq!(
            wrong(&[("used_memory", "99999999")], "", Fast),
            [("memory", Unfit)]
        );
    }

    #[test]
    fn what_is_acknowledged_is_said_to_be_as_safe_as_it_is() {
        let safety = |sync, how| server(&[], sync).safety(how);
        assert!(safety("everysec", Acknowledge::Fast).contains("two seconds"));
        assert!(safety("always", Acknowledge::Fast).contains("only a failover"));
        assert!(safety("always", Acknowledge::Durable).contains("on disk"));
        assert!(safety("unknown", Acknowledge::Fast).contains("refuses CONFIG"));
        let none = server(&[("aof_enabled", "0")], "").safety(Acknowledge::Fast);
        assert!(none.contains("gone after a restart"));
    }
}
