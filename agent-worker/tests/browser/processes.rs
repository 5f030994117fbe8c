//! What runs behind a host, as the kernel tells it: trees of processes, their command lines and their ports.

use std::collections::BTreeSet;

pub(super) fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // A zombie has ended.
    (fields.next()? != "Z").then_some(())?;
    fields.next()?.parse().ok()
}

pub(super) fn running() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// `roots` and everything that descends from them.
pub(super) fn tree(roots: &[i32]) -> BTreeSet<i32> {
    let mut tree: BTreeSet<i32> = roots
        .iter()
        .copied()
        .filter(|pid| parent_of(*pid).is_some())
        .collect();
    loop {
        let more: Vec<i32> = running()
            .into_iter()
            .filter(|pid| {
                !tree.contains(pid) && parent_of(*pid).is_some_and(|parent| tree.contains(&parent))
            })
            .collect();
        if more.is_empty() {
            return tree;
        }
        tree.extend(more);
    }
}

pub(super) fn command_line(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

pub(super) fn kill_where(roots: &[i32], wanted: impl Fn(&str) -> bool) {
    let pids: Vec<i32> = tree(roots)
        .into_iter()
        .filter(|pid| wanted(&command_line(*pid)))
        .collect();
    assert!(!pids.is_empty(), "no such process");
    for pid in pids {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // It may have ended with one that was killed before it.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Ports on which one of `pids` listens.
pub(super) fn listening_ports(pids: &BTreeSet<i32>) -> BTreeSet<u16> {
    let mut sockets = BTreeSet::new();
    for pid in pids {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        sockets.extend(links.filter_map(|link| {
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse::<u64>().ok()
        }));
    }
    let mut ports = BTreeSet::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(file)
            .unwrap_or_default()
            .lines()
            .skip(1)
        {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (is_listening, inode) = (fields[3] == "0A", fields[9].parse().unwrap());
            if is_listening && sockets.contains(&inode) {
                let (_, port) = fields[1].rsplit_once(':').unwrap();
                ports.insert(u16::from_str_radix(port, 16).unwrap());
            }
        }
    }
    ports
}
