//! Which version of an adapter is `latest`: a log of entries, each created once under the next number; the highest one
//! counts.
//!
//! `file://` knows no compare-and-swap, so nothing is written over. Whoever serves an adapter looks at the highest entry
//! alone; going back needs all of them.
//!
//! An entry may put a canary beside the version that is `latest`: another version, for a share of conversations. Which
//! ones follows from how they begin and from the entry, so that all workers choose alike and no conversation changes over
//! between two of its turns.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::FieldError;
use crate::id::AdapterName;
use crate::time::Timestamp;

/// The version of [`LatestEntry`] that this code writes, and the only one that it reads.
pub const LATEST_RECORD_VERSION: u32 = 1;

/// A version that answers a share of conversations in the place of the one that is `latest`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Canary {
    /// The version, from 1.
    pub version: u32,
    /// Its share, in (0, 1).
    pub share: f64,
}

impl Canary {
    /// Checks that it can stand beside the version `latest`.
    ///
    /// # Errors
    /// Names the field below `canary` and the rule.
    pub fn check(&self, latest: u32) -> Result<(), FieldError> {
        let refuse = |field: &str, value: &dyn std::fmt::Display, rule: &str| {
            Err(FieldError::new(format!("canary.{field}"), value, rule))
        };
        if self.version == 0 {
            return refuse("version", &self.version, "must be 1 or more");
        }
        if self.version == latest {
            return refuse("version", &self.version, "must be another than latest");
        }
        if !(self.share > 0.0 && self.share < 1.0) {
            return refuse("share", &self.share, "must be in (0, 1)");
        }
        Ok(())
    }

    /// Whether it answers the conversation that begins with `opening`, while entry `seq` counts.
    #[must_use]
    pub fn answers(&self, seq: u64, opening: &[u8]) -> bool {
        let digest = Sha256::new()
            .chain_update(seq.to_le_bytes())
            .chain_update(opening)
            .finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        // As many bits as an f64 holds: a number that is uniform in [0, 1).
        let draw = (u64::from_be_bytes(first) >> 11) as f64 / (1u64 << 53) as f64;
        draw < self.share
    }
}

/// That a version is `latest` from now on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatestEntry {
    /// [`LATEST_RECORD_VERSION`].
    pub record_version: u32,
    /// The adapter.
    pub name: AdapterName,
    /// The number of the entry, from 1.
    pub seq: u64,
    /// The version, from 1.
    pub version: u32,
    /// Another one, for a share of conversations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
    /// Why: of the canary, where there is one.
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
    /// Another version was taken back: the one that was `latest`, or its canary.
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
        if let Some(canary) = &entry.canary {
            let checked = canary.check(entry.version);
            checked.map_err(|error| error.under("latest"))?;
        }
        Ok(entry)
    }

    /// Whether it says what `other` would say, because of the same comparison. What people say by hand is said anew.
    #[must_use]
    pub fn is_for(&self, other: &Self) -> bool {
        matches!(self.why, Why::Comparison { .. })
            && self.why == other.why
            && (self.version, self.canary) == (other.version, other.canary)
    }

    /// The version that it says why of, and that a rollback takes back: the canary, where there is one.
    #[must_use]
    pub fn subject(&self) -> u32 {
        self.canary.map_or(self.version, |canary| canary.version)
    }
}

/// The version to which a rollback goes: the one that was `latest` before the one that is now, where rollbacks have taken
/// back what they took back. A canary goes alone. `log` is in order.
pub fn rollback_to(log: &[LatestEntry]) -> Option<u32> {
    let mut stack: Vec<u32> = Vec::new();
    let mut has_canary = false;
    for entry in log {
        match entry.why {
            Why::Rollback { .. } => {
                if !has_canary {
                    stack.pop();
                }
                // Of a log with holes the entry's own word counts.
                if stack.last() != Some(&entry.version) {
                    stack.push(entry.version);
                }
            }
            // The same version again is no step that could be taken back.
            _ if stack.last() == Some(&entry.version) => {}
            _ => stack.push(entry.version),
        }
        has_canary = entry.canary.is_some();
    }
    if !has_canary {
        stack.pop();
    }
    stack.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is done to a log.
    #[derive(Clone, Copy, Debug)]
    enum Move {
        Promote(u32),
        Canary(u32),
        Back,
    }
    use Move::{Back, Canary as Try, Promote};

    fn log(moves: &[Move]) -> Vec<LatestEntry> {
        let mut found: Vec<LatestEntry> = Vec::new();
        for (seq, step) in (1..).zip(moves) {
            let (version, canary, why) = match step {
                Promote(version) => (*version, None, Why::Hand),
                Try(version) => {
                    let canary = Canary {
                        version: *version,
                        share: 0.25,
                    };
                    (found[found.len() - 1].version, Some(canary), Why::Hand)
                }
                Back => {
                    let from = found[found.len() - 1].subject();
                    (rollback_to(&found).unwrap(), None, Why::Rollback { from })
                }
            };
            found.push(LatestEntry {
                record_version: LATEST_RECORD_VERSION,
                name: "shop".parse().unwrap(),
                seq,
                version,
                canary,
                why,
                created_at_us: Timestamp(seq),
            });
        }
        found
    }

    #[test]
    fn rollbacks_go_back_one_by_one() {
        for (moves, expected) in [
            (&[][..], None),
            (&[Promote(1)], None),
            (&[Promote(1), Promote(1)], None),
            (&[Promote(1), Promote(2)], Some(1)),
            (&[Promote(1), Promote(2), Promote(3)], Some(2)),
            (&[Promote(1), Promote(2), Promote(3), Back], Some(1)),
            (&[Promote(1), Promote(2), Promote(3), Back, Back], None),
            (&[Promote(1), Promote(2), Back, Promote(3)], Some(1)),
            (&[Promote(1), Promote(2), Promote(2), Back], None),
            (&[Promote(2), Promote(1)], Some(2)),
        ] {
            assert_eq!(rollback_to(&log(moves)), expected, "{moves:?}");
        }
    }

    #[test]
    fn a_rollback_takes_a_canary_back_alone() {
        for (moves, expected) in [
            (&[Promote(1), Try(2)][..], Some(1)),
            (&[Promote(1), Try(2), Back], None),
            (&[Promote(1), Promote(2), Try(3)], Some(2)),
            (&[Promote(1), Promote(2), Try(3), Back], Some(1)),
            (&[Promote(1), Promote(2), Try(3), Try(4), Back], Some(1)),
            (&[Promote(1), Try(2), Promote(2)], Some(1)),
            (&[Promote(1), Try(2), Promote(1)], None),
        ] {
            assert_eq!(rollback_to(&log(moves)), expected, "{moves:?}");
        }
        let back = &log(&[Promote(1), Try(2), Back])[2];
        assert_eq!(
            (back.version, back.canary, &back.why),
            (1, None, &Why::Rollback { from: 2 })
        );
    }

    #[test]
    fn a_canary_answers_its_share_and_the_same_conversations_everywhere() {
        let canary = Canary {
            version: 2,
            share: 0.1,
        };
        let conversations: Vec<String> = (0..10_000).map(|n| format!("hello {n}")).collect();
        let of = |canary: Canary, seq| {
            let answered = conversations
                .iter()
                .filter(|opening| canary.answers(seq, opening.as_bytes()));
            answered.count()
        };
        // Four standard deviations.
        assert!((880..1_120).contains(&of(canary, 7)), "{}", of(canary, 7));
        let half = Canary {
            share: 0.5,
            ..canary
        };
        assert!((4_800..5_200).contains(&of(half, 7)), "{}", of(half, 7));
        // Another entry has other conversations.
        let both = conversations.iter().filter(|opening| {
            half.answers(7, opening.as_bytes()) && half.answers(8, opening.as_bytes())
        });
        assert!((2_300..2_700).contains(&both.count()));
        // Workers of several versions choose alike.
        let first: Vec<usize> = (0..100)
            .filter(|n| canary.answers(7, conversations[*n].as_bytes()))
            .collect();
        assert_eq!(first, [2, 33, 35, 63, 88, 92]);
    }

    fn refused(entry: &LatestEntry, name: &str, seq: u64) -> String {
        let bytes = serde_json::to_vec(entry).unwrap();
        let parsed = LatestEntry::parse(&bytes, &name.parse().unwrap(), seq);
        parsed.unwrap_err().field
    }

    #[test]
    fn an_entry_of_another_place_is_refused() {
        let entry = &log(&[Promote(1), Promote(2)])[1];
        let bytes = serde_json::to_vec(entry).unwrap();
        let name = "shop".parse().unwrap();
        assert_eq!(&LatestEntry::parse(&bytes, &name, 2).unwrap(), entry);
        assert_eq!(refused(entry, "shop", 3), "latest.seq");
        assert_eq!(refused(entry, "other", 2), "latest.name");
        let empty = LatestEntry::parse(b"{}", &name, 2).unwrap_err();
        assert_eq!(empty.field, "latest");
        let newer = LatestEntry {
            record_version: 2,
            ..entry.clone()
        };
        assert_eq!(refused(&newer, "shop", 2), "latest.record_version");
    }

    #[test]
    fn a_canary_is_another_version_and_answers_a_part() {
        let entry = &log(&[Promote(1), Try(2)])[1];
        let with = |version, share| LatestEntry {
            canary: Some(Canary { version, share }),
            ..entry.clone()
        };
        for (version, share, field) in [
            (1, 0.1, "latest.canary.version"),
            (0, 0.1, "latest.canary.version"),
            (2, 0.0, "latest.canary.share"),
            (2, 1.0, "latest.canary.share"),
            (2, -0.5, "latest.canary.share"),
        ] {
            assert_eq!(refused(&with(version, share), "shop", 2), field);
        }
        let not_a_number = Canary {
            version: 2,
            share: f64::NAN,
        };
        assert!(not_a_number.check(1).is_err());
    }

    #[test]
    fn the_stored_form_stays() {
        let why = Why::Comparison {
            report: "p/x".to_owned(),
            sha256: "ab".to_owned(),
        };
        let entry = LatestEntry {
            why,
            ..log(&[Promote(4)])[0].clone()
        };
        let text = r#"{"record_version":1,"name":"shop","seq":1,"version":4,"why":{"by":"comparison","report":"p/x","sha256":"ab"},"created_at_us":1}"#;
        assert_eq!(serde_json::to_string(&entry).unwrap(), text);
        let name = "shop".parse().unwrap();
        assert_eq!(LatestEntry::parse(text.as_bytes(), &name, 1), Ok(entry));
        let canary = &log(&[Promote(4), Try(5)])[1];
        let text = r#"{"record_version":1,"name":"shop","seq":2,"version":4,"canary":{"version":5,"share":0.25},"why":{"by":"hand"},"created_at_us":2}"#;
        assert_eq!(serde_json::to_string(canary).unwrap(), text);
        assert_eq!(
            serde_json::to_string(&Why::Rollback { from: 3 }).unwrap(),
            r#"{"by":"rollback","from":3}"#
        );
    }
}
