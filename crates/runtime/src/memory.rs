//! How much memory there is for this process: for whoever sizes a cache or a plan by it.

use std::path::Path;

/// What is taken to be there where the system does not tell.
const UNKNOWN: u64 = 4 << 30;

/// Bytes that this process can still take: what the machine has left, and what its control group allows.
pub fn available() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .as_deref()
        .and_then(meminfo);
    let group = control_group(Path::new("/sys/fs/cgroup"));
    [machine, group]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(UNKNOWN)
}

fn meminfo(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The limit less what is in use and cannot be given back, of version 2 or 1. None: no limit.
fn control_group(root: &Path) -> Option<u64> {
    let number = |file: &str| -> Option<u64> {
        std::fs::read_to_string(root.join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let (limit, used, stat) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?, "memory.stat"),
        None => (
            number("memory/memory.limit_in_bytes")?,
            number("memory/memory.usage_in_bytes")?,
            "memory/memory.stat",
        ),
    };
    let stat = std::fs::read_to_string(root.join(stat)).unwrap_or_default();
    let files = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    let files = files
        .and_then(|bytes| bytes.trim().parse().ok())
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_machine_and_group_leave() {
        assert_eq!(
            meminfo("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"),
            Some(2 << 20)
        );
        let folder = tempfile::TempDir::new().unwrap();
        let write =
            |file: &str, text: &str| std::fs::write(folder.path().join(file), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "600\n");
        assert_eq!(control_group(folder.path()), None);
        write("memory.max", "1000\n");
        write("memory.stat", "anon 500\ninactive_file 100\n");
        assert_eq!(control_group(folder.path()), Some(500));
        assert!(available() > 0);
    }
}
