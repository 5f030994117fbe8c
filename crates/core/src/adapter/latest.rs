//! Which version of an adapter is `latest`: a log of entries, each created once under the next number; the highest one
//! counts.
//!
//! `file://` knows no compare-and-swap, so nothing is written over. Whoever serves an adapter looks at the highest entry
//! alone; going back needs all of them.

use serde::{Deserialize, Serialize};

use crate::error::FieldError;
use crate::id::AdapterName;
use crate::time::Timestamp;

/// The version of [`LatestEntry`] that this code writes, and the only one that it reads.
pub const LATEST_RECORD_VERSION: u32 = 1;

/// That a version is `latest` from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatestEntry {
    /// [`LATEST_RECORD_VERSION`].
    pub record_version: u32,
    /// The adapter.
    pub name: AdapterName,
    /// The number of the entry, from 1.
    pub seq: u64,
    /// The version, from 1.
    pub version: u32,
    /// Why.
    pub why: Why,
    /// When.
    pub created_at_us: Timestamp,
}

/// Why a version became `latest`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Why {
    /// Somebody said so.
    Hand,
    /// A comparison's gate let it pass.
    Comparison {
        /// Object path of the report.
        report: String,
        /// SHA-256 of it, in hex.
        sha256: String,
    },
    /// The version before it was taken back.
    Rollback {
        /// The version that was taken back.
        from: u32,
    },
}

impl LatestEntry {
    /// Reads an entry that somebody else may have written: number `seq` of `name`.
    ///
    /// # Errors
    /// It is broken, of another version, or of another adapter or number.
    pub fn parse(bytes: &[u8], name: &AdapterName, seq: u64) -> Result<Self, FieldError> {
        let entry: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be an entry of a log: {error}");
            FieldError::new("latest", String::from_utf8_lossy(bytes), rule)
        })?;
        let refuse = |field: &str, value: &dyn std::fmt::Display, rule: String| {
            Err(FieldError::new(format!("latest.{field}"), value, rule))
        };
        if entry.record_version != LATEST_RECORD_VERSION {
            let rule = format!("must be {LATEST_RECORD_VERSION}");
            return refuse("record_version", &entry.record_version, rule);
        }
        if entry.name != *name {
            return refuse("name", &entry.name, format!("must be {name}"));
        }
        if entry.seq != seq {
            return refuse("seq", &entry.seq, format!("must be {seq}"));
        }
        if entry.version == 0 {
            return refuse("version", &entry.version, "must be 1 or more".to_owned());
        }
        Ok(entry)
    }
}

/// The version to which a rollback goes: the one that was `latest` before the one that is now, where rollbacks have taken
/// back what they took back. `log` is in order.
pub fn rollback_to(log: &[LatestEntry]) -> Option<u32> {
    let mut stack: Vec<u32> = Vec::new();
    for entry in log {
        match entry.why {
            Why::Rollback { .. } => {
                stack.pop();
                // Of a log with holes the entry's own word counts.
                if stack.last() != Some(&entry.version) {
                    stack.push(entry.version);
                }
            }
            // The same version again is no step that could be taken back.
            _ if stack.last() == Some(&entry.version) => {}
            _ => stack.push(entry.version),
        }
    }
    stack.pop();
    stack.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(versions: &[i64]) -> Vec<LatestEntry> {
        let mut found: Vec<LatestEntry> = Vec::new();
        for (seq, version) in (1..).zip(versions) {
            let why = match version {
                0 => Why::Rollback {
                    from: found[found.len() - 1].version,
                },
                _ => Why::Hand,
            };
            let version = match version {
                0 => rollback_to(&found).unwrap(),
                version => u32::try_from(*version).unwrap(),
            };
            found.push(LatestEntry {
                record_version: LATEST_RECORD_VERSION,
                name: "shop".parse().unwrap(),
                seq,
                version,
                why,
                created_at_us: Timestamp(seq),
            });
        }
        found
    }

    #[test]
    fn rollbacks_go_back_one_by_one() {
        for (versions, expected) in [
            (&[][..], None),
            (&[1], None),
            (&[1, 1], None),
            (&[1, 2], Some(1)),
            (&[1, 2, 3], Some(2)),
            (&[1, 2, 3, 0], Some(1)),
            (&[1, 2, 3, 0, 0], None),
            (&[1, 2, 0, 3], Some(1)),
            (&[1, 2, 2, 0], None),
            (&[2, 1], Some(2)),
        ] {
            assert_eq!(rollback_to(&log(versions)), expected, "{versions:?}");
        }
    }

    #[test]
    fn an_entry_of_another_place_is_refused() {
        let entry = &log(&[1, 2])[1];
        let bytes = serde_json::to_vec(entry).unwrap();
        let name = "shop".parse().unwrap();
        assert_eq!(&LatestEntry::parse(&bytes, &name, 2).unwrap(), entry);
        let fields = |bytes: &[u8], name: &str, seq| {
            LatestEntry::parse(bytes, &name.parse().unwrap(), seq)
                .unwrap_err()
                .field
        };
        assert_eq!(fields(&bytes, "shop", 3), "latest.seq");
        assert_eq!(fields(&bytes, "other", 2), "latest.name");
        assert_eq!(fields(b"{}", "shop", 2), "latest");
        let newer = LatestEntry {
            record_version: 2,
            ..entry.clone()
        };
        let newer = serde_json::to_vec(&newer).unwrap();
        assert_eq!(fields(&newer, "shop", 2), "latest.record_version");
    }

    #[test]
    fn the_stored_form_stays() {
        let why = Why::Comparison {
            report: "p/x".to_owned(),
            sha256: "ab".to_owned(),
        };
        let entry = LatestEntry {
            why,
            ..log(&[4])[0].clone()
        };
        let text = r#"{"record_version":1,"name":"shop","seq":1,"version":4,"why":{"by":"comparison","report":"p/x","sha256":"ab"},"created_at_us":1}"#;
        assert_eq!(serde_json::to_string(&entry).unwrap(), text);
        assert_eq!(
            serde_json::to_string(&Why::Rollback { from: 3 }).unwrap(),
            r#"{"by":"rollback","from":3}"#
        );
        assert_eq!(
            serde_json::to_string(&Why::Hand).unwrap(),
            r#"{"by":"hand"}"#
        );
    }
}
