//! Several machines on one: network namespaces, joined by a switch that is a namespace too. What runs on a host reaches the
//! others by their addresses alone, and nothing outside. A host has an address of IPv6, and one of IPv4 for servers that know no
//! other.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The variable by which a person leaves these tests out.
pub const OPT_OUT: &str = "ESPALIER_TEST_WITHOUT_HOSTS";
/// Where `ip` keeps the namespaces that it has made.
const NAMESPACES: &str = "/run/netns";
const SWITCH: &str = "switch";

/// Running hosts. They go with their test.
#[derive(Debug)]
pub struct Hosts {
    prefix: String,
    names: Vec<String>,
}

/// What a thread does meanwhile, and what it starts, is on another host.
#[derive(Debug)]
pub struct There {
    back: File,
}

impl Hosts {
    /// Hosts of these names. Where the machine lets nobody make namespaces, the test fails: one that is left out in silence
    /// proves nothing. It gives none only where [`OPT_OUT`] is set.
    pub fn start(names: &[&str]) -> Option<Self> {
        let hosts = Self {
            prefix: format!("espalier-{}-", std::process::id()),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        match hosts.make() {
            Ok(()) => Some(hosts),
            Err(_) if std::env::vars_os().any(|(name, _)| name == OPT_OUT) => None,
            Err(why) => panic!(
                "nobody may make network namespaces here: {why}; run as root with iproute2, or set {OPT_OUT}=1 to leave out \
                 the tests with several hosts"
            ),
        }
    }

    fn make(&self) -> Result<(), String> {
        self.add(SWITCH)?;
        self.ip(SWITCH, "link add bridge type bridge")?;
        self.ip(SWITCH, "link set bridge up")?;
        for (name, number) in self.names.iter().zip(1..) {
            let host = self.namespace(name);
            self.add(name)?;
            let port = format!("port{number}");
            let pair = format!("link add {port} type veth peer name eth0 netns {host}");
            self.ip(SWITCH, &pair)?;
            self.ip(SWITCH, &format!("link set {port} master bridge up"))?;
            self.ip(
                name,
                &format!("address add {}/64 dev eth0 nodad", v6(number)),
            )?;
            self.ip(name, &format!("address add {}/24 dev eth0", v4(number)))?;
            self.ip(name, "link set eth0 up")?;
        }
        Ok(())
    }

    fn add(&self, name: &str) -> Result<(), String> {
        ip(&format!("netns add {}", self.namespace(name)))?;
        self.ip(name, "link set lo up")
    }

    fn ip(&self, name: &str, words: &str) -> Result<(), String> {
        ip(&format!("-netns {} {words}", self.namespace(name)))
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// From 1, as the ports of the switch are.
    fn number(&self, name: &str) -> u8 {
        let found = self.names.iter().zip(1..).find(|(known, _)| *known == name);
        let (_, number) = found.unwrap_or_else(|| panic!("there is no host `{name}`"));
        number
    }

    /// Where `port` of a host is.
    pub fn address(&self, name: &str, port: u16) -> SocketAddr {
        (v6(self.number(name)), port).into()
    }

    /// The host by IPv4.
    pub fn address_v4(&self, name: &str) -> Ipv4Addr {
        v4(self.number(name))
    }

    /// Takes this thread to a host until what is given back is dropped.
    #[must_use]
    pub fn enter(&self, name: &str) -> There {
        let open = |path: &Path| {
            File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let back = open(Path::new("/proc/thread-self/ns/net"));
        enter(&open(&Path::new(NAMESPACES).join(self.namespace(name))));
        There { back }
    }

    /// Pulls the cable of a host.
    pub fn unplug(&self, name: &str) {
        self.plugged(name, "down");
    }

    /// Puts it in again.
    pub fn plug(&self, name: &str) {
        self.plugged(name, "up");
    }

    fn plugged(&self, name: &str, state: &str) {
        let set = format!("link set port{} {state}", self.number(name));
        let done = self.ip(SWITCH, &set);
        done.unwrap_or_else(|why| panic!("the cable of {name}: {why}"));
    }
}

impl Drop for There {
    fn drop(&mut self) {
        enter(&self.back);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().map(String::as_str).chain([SWITCH]) {
            let _ = ip(&format!("netns delete {}", self.namespace(name)));
        }
    }
}

/// All hosts are in one network of local addresses, of either kind.
fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into())
}

fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

fn enter(namespace: &File) {
    let moved = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    moved.expect("who makes namespaces may enter them");
}

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "`ip {words}`: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Err(format!("`ip`: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn hosts_reach_each_other_while_they_are_plugged_in_and_nobody_else() {
        let Some(hosts) = Hosts::start(&["a", "b"]) else {
            return println!("SKIPPED: {OPT_OUT} is set");
        };
        let there = hosts.address("b", 7000);
        let listener = {
            let _there = hosts.enter("b");
            TcpListener::bind(there).unwrap()
        };
        let limit = Duration::from_millis(500);
        assert!(
            TcpStream::connect_timeout(&there, limit).is_err(),
            "this machine is no host"
        );
        {
            let _there = hosts.enter("a");
            TcpStream::connect_timeout(&there, limit).unwrap();
            hosts.unplug("b");
            let cut = TcpStream::connect_timeout(&there, limit).unwrap_err();
            assert!(
                matches!(cut.kind(), ErrorKind::TimedOut | ErrorKind::HostUnreachable),
                "{cut}"
            );
            hosts.plug("b");
            TcpStream::connect_timeout(&there, Duration::from_secs(5)).unwrap();
        }
        drop(listener);
        let namespace = Path::new(NAMESPACES).join(hosts.namespace("a"));
        assert!(namespace.exists());
        drop(hosts);
        assert!(!namespace.exists());
    }
}
