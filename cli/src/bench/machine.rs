//! What the figures were measured on.

use serde_json::{Value, json};

/// Processor, cores and memory, as Linux tells them.
pub fn describe() -> Value {
    let cpu =
        field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let memory_kib = field("/proc/meminfo", "MemTotal").and_then(|text| {
        text.split_whitespace()
            .next()
            .and_then(|number| number.parse::<u64>().ok())
    });
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_mib": memory_kib.map(|kib| kib / 1024),
    })
}

/// The value of the first line `name: value`.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let (_, value) = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)?;
    Some(value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_cores_and_memory() {
        let machine = describe();
        assert!(machine["cores"].as_u64().unwrap() > 0);
        assert!(machine["memory_mib"].as_u64().unwrap() > 0);
    }
}
