//! What the figures were measured on.

use serde_json::{Value, json};

/// Processor, cores, memory and system, as Linux tells them, and how this binary was built.
pub fn describe() -> Value {
    let cpu = field("/proc/cpuinfo", "model name", ':')
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let memory_kib = field("/proc/meminfo", "MemTotal", ':').and_then(|text| {
        text.split_whitespace()
            .next()
            .and_then(|number| number.parse::<u64>().ok())
    });
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_mib": memory_kib.map(|kib| kib / 1024),
        "os": field("/etc/os-release", "PRETTY_NAME", '=').map(|name| name.trim_matches('"').to_owned()),
        "kernel": first_line("/proc/sys/kernel/osrelease"),
        "load_1min": first_line("/proc/loadavg").and_then(|line| line.split(' ').next()?.parse::<f64>().ok()),
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "version": env!("CARGO_PKG_VERSION"),
    })
}

/// The value of the first line `name: value`.
fn field(file: &str, name: &str, separator: char) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let (_, value) = text
        .lines()
        .filter_map(|line| line.split_once(separator))
        .find(|(key, _)| key.trim() == name)?;
    Some(value.trim().to_owned())
}

fn first_line(file: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_cores_memory_and_a_system() {
        let machine = describe();
        assert!(machine["cores"].as_u64().unwrap() > 0);
        assert!(machine["memory_mib"].as_u64().unwrap() > 0);
        assert!(machine["kernel"].is_string());
    }
}
