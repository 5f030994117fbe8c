//! Reads the lines of a history in what coordinators logged.

use espalier_runtime::telemetry::names::target::HISTORY;
use serde_json::Value;

use super::Event;

/// The filter under which a coordinator tells its history, beside what it tells anyway.
pub fn filter() -> String {
    format!("info,h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn,{HISTORY}=debug")
}

/// The events of one log, which is JSON, one object a line. A process that is killed may leave half a line; with
/// `torn` such a line is one of them.
///
/// # Panics
/// At a line of the history that does not read.
pub fn read(log: &str, torn: bool) -> Vec<Event> {
    let lines = log.lines().filter(|line| line.contains(HISTORY));
    lines
        .filter_map(|line| match parse(line) {
            Ok(event) => event,
            Err(_) if torn => None,
            Err(error) => panic!("a line of the history does not read: {error}: {line}"),
        })
        .collect()
}

/// None: the line only speaks of the target.
fn parse(line: &str) -> serde_json::Result<Option<Event>> {
    let line: Value = serde_json::from_str(line)?;
    if line["target"] != HISTORY {
        return Ok(None);
    }
    serde_json::from_value(line).map(Some)
}
