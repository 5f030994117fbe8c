//! Names for what a person did not name: made of a file's name and of the time.

use std::path::Path;

use espalier_core::time::Timestamp;

/// The name of `file` without its ending, made of what an id may hold: `chars_max` characters at most, `otherwise`
/// where nothing is left.
pub fn of_file(file: &Path, chars_max: usize, otherwise: &str) -> String {
    let stem = file
        .file_stem()
        .map(|stem| stem.to_string_lossy())
        .unwrap_or_default();
    let allowed = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: String = stem.chars().take(chars_max).map(allowed).collect();
    match name.trim_start_matches(['.', '_', '-']) {
        "" => otherwise.to_owned(),
        name => name.to_owned(),
    }
}

/// A time that can stand in a name: yyyymmdd-hhmmss in UTC.
pub fn stamp(now: Timestamp) -> String {
    let micros = i64::try_from(now.0).unwrap_or(i64::MAX);
    chrono::DateTime::from_timestamp_micros(micros)
        .map(|time| time.format("%Y%m%d-%H%M%S").to_string())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::id::JobId;

    #[test]
    fn names_hold_what_ids_may_hold() {
        let named = |file: &str| of_file(Path::new(file), 100, "trace");
        assert_eq!(named("/a/go to_trelis.json"), "go-to_trelis");
        assert_eq!(named("my tasks ä.jsonl"), "my-tasks--");
        assert_eq!(named("__.json"), "trace");
        assert!(JobId::new(named(&"x".repeat(300))).is_ok());
    }
}
