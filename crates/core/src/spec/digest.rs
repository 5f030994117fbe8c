//! The digest of what a job asks for: how a published result is told from one of another job that had the same name.
//!
//! Names come again: once retention forgot a batch, its name is free, and the old results still lie under it. The
//! worker that holds a lease computes the digest from the spec that it was granted; nobody sends it over the wire.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::draft::{JobDraft, PromptDraft};
use crate::error::FieldError;
use crate::trace::sha256_hex;

/// Length of a digest in hex.
const HEX_LEN: usize = 64;
/// How much of a digest people are shown: enough to tell two apart, short enough to compare by eye.
const SHOWN_LEN: usize = 12;

/// SHA-256 of a job's spec in its canonical form, in lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpecDigest(String);

impl SpecDigest {
    /// The digest of a job as it is granted: the batch's defaults under the job's own words, read back from the wire.
    ///
    /// The canonical form is the draft as JSON without white space, keys sorted at every level, absent fields left
    /// out, the prompt always a list. It is made of the draft and not of the checked spec, so that a release with
    /// other default values still knows what an earlier one published.
    ///
    /// Left out is what decides when and how often a job is tried, but not what it does: `priority`, `delay_ms`,
    /// `max_attempts`, `max_infra`, `max_runtime_s`; and what names a job or its submission: `id`, which is a part of
    /// the job's key and absent where the coordinator gave it, and `traceparent`.
    pub fn of(draft: &JobDraft) -> Self {
        let mut asked = draft.without_schedule();
        // What is no rollout has no prompt, not even an empty one.
        let is_rollout = draft.generate.is_none()
            && draft.train.is_none()
            && draft.export.is_none()
            && draft.curate.is_none()
            && draft.compare.is_none()
            && draft.score.is_none();
        if is_rollout {
            asked.prompt = PromptDraft::Turns(draft.prompt.turns().to_vec());
        }
        let mut canonical = serde_json::json!(asked);
        // Maps keep the order in which their keys came.
        canonical.sort_all_objects();
        Self(sha256_hex(canonical.to_string().as_bytes()))
    }

    /// What a job asks for whose spec only names its input: the same with the input's own digest, since another content
    /// may come to lie under the name. `input_sha256` is in lower-case hex; hashed are both digests with a space between
    /// them.
    pub fn with_input(&self, input_sha256: &str) -> Self {
        Self(sha256_hex(format!("{self} {input_sha256}").as_bytes()))
    }

    /// All of it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its beginning, for messages.
    pub fn short(&self) -> &str {
        &self.0[..SHOWN_LEN]
    }
}

impl TryFrom<String> for SpecDigest {
    type Error = FieldError;

    fn try_from(text: String) -> Result<Self, FieldError> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == HEX_LEN && text.bytes().all(hex) {
            return Ok(Self(text));
        }
        let rule = format!("must be {HEX_LEN} lower-case hex digits");
        Err(FieldError::new("spec_sha256", text, rule))
    }
}

impl From<SpecDigest> for String {
    fn from(digest: SpecDigest) -> Self {
        digest.0
    }
}

impl fmt::Display for SpecDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::parse_line;

    const JOB: &str = r#"{"prompt":"x","labels":{"a":"1"},"mcp":["toy"],"limits":{"turns":5},
        "verify":{"mcp":{"server":"toy","tool":"t","arguments":{"a":{"d":1,"c":2},"b":1},"text":{"contains":"x"}}}}"#;

    fn digest(line: &str) -> SpecDigest {
        SpecDigest::of(&parse_line(line.as_bytes()).unwrap())
    }

    #[test]
    fn the_canonical_form_never_changes() {
        // Computed by hand: `printf '{"prompt":["x"]}' | sha256sum`.
        let expected = "3cbf77bd9167206c2049dd4df4401dce35d667449e5983ae09d5361e60501d4c";
        assert_eq!(digest(r#"{"prompt":"x"}"#).as_str(), expected);
        assert_eq!(digest(r#"{"prompt":"x"}"#).short(), &expected[..12]);
        // `printf '{"generate":{"requests":"x"}}' | sha256sum`.
        let expected = "d62574a6057329ef401012824e4cdfb75b070f91c774721d9edebdf6233b3d29";
        assert_eq!(
            digest(r#"{"generate":{"requests":"x"}}"#).as_str(),
            expected
        );
        // `printf '{"train":{"base":"x","settings":{"lr":0.5,"rank":8}}}' | sha256sum`.
        let expected = "43f1fd52a8345b378275a97d81292e3dfc5f6ee93dbcfd264344a38fec93c4a2";
        let train = r#"{"train":{"settings":{"rank":8,"lr":0.5},"base":"x"}}"#;
        assert_eq!(digest(train).as_str(), expected);
    }

    #[test]
    fn what_a_name_stands_for_counts() {
        let named = digest(r#"{"generate":{"requests":"x"}}"#);
        let empty = sha256_hex(b"");
        // `printf 'd625…3d29 e3b0…b855' | sha256sum`, both in full.
        let expected = "97b41cc305c99d01eb5a20487760734bddc05cde85040482ab984ac2e25f8343";
        assert_eq!(named.with_input(&empty).as_str(), expected);
        let other = named.with_input(&sha256_hex(b"other"));
        assert!(other != named.with_input(&empty) && other != named);
    }

    #[test]
    fn order_form_and_schedule_do_not_count() {
        let same = [
            r#"{"limits":{"turns":5},"mcp":["toy"],"labels":{"a":"1"},"prompt":["x"],
            "verify":{"mcp":{"text":{"contains":"x"},"arguments":{"b":1,"a":{"c":2,"d":1}},"tool":"t","server":"toy"}}}"#
                .to_owned(),
            JOB.replacen('{', r#"{"id":"j","priority":9,"delay_ms":5,"#, 1),
            JOB.replacen('{', r#"{"max_attempts":1,"max_infra":1,"max_runtime_s":1,"#, 1),
            JOB.replacen('{', r#"{"traceparent":"00-a-b-01","#, 1),
        ];
        for line in same {
            assert_eq!(digest(&line), digest(JOB), "{line}");
        }
    }

    #[test]
    fn whatever_the_rollout_is_told_counts() {
        let others = [
            JOB.replacen(r#""x""#, r#""y""#, 1),
            JOB.replacen(r#""a":"1""#, r#""a":"2""#, 1),
            JOB.replacen(r#""turns":5"#, r#""turns":6"#, 1),
            JOB.replacen(r#""c":2"#, r#""c":3"#, 1),
            JOB.replacen('{', r#"{"sampling":{"seed":1},"#, 1),
            JOB.replacen('{', r#"{"model":"m","#, 1),
            JOB.replacen('{', r#"{"hints":"h","#, 1),
            JOB.replacen('{', r#"{"after":["other"],"#, 1),
            JOB.replacen('{', r#"{"needs":["gpu"],"#, 1),
            r#"{"generate":{"requests":"x"}}"#.to_owned(),
        ];
        for line in others {
            assert_ne!(line, JOB);
            assert_ne!(digest(&line), digest(JOB), "{line}");
        }
    }

    #[test]
    fn what_is_stored_is_a_digest_or_refused() {
        let own = digest(JOB);
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<SpecDigest>(&text).unwrap(), own);
        for bad in ["", "abc", &"A".repeat(64), &"é".repeat(32)] {
            let error = SpecDigest::try_from(bad.to_owned()).unwrap_err();
            assert_eq!(error.field, "spec_sha256");
        }
    }
}
