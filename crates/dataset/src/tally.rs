//! How long the rows of a data set are as samples: what its record, its card and its histogram are made of.

use std::collections::BTreeMap;

use espalier_core::error::FieldError;
use serde::{Deserialize, Serialize};

use crate::build::Chosen;
use crate::manifest::DropReason;
use crate::row::Split;
use crate::sample::{Sample, SampleError};

/// The version that this code writes, and the only one that it reads.
const SCHEMA_VERSION: u32 = 1;
/// Task kinds that are told apart; further ones are counted as one.
const KINDS_MAX: usize = 200;
/// The name under which those are counted.
const OTHER_KINDS: &str = "(others)";
/// The first bucket of the histogram ends here; each further one is twice as long.
const FIRST_BUCKET: usize = 256;

/// Sums over the samples of a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// [`SCHEMA_VERSION`].
    schema_version: u32,
    /// Tokens of the longest sample that was allowed.
    pub max_length: usize,
    /// Tokens of all samples.
    pub tokens: u64,
    /// Of these, those that are trained or measured.
    pub supervised_tokens: u64,
    /// Samples that lost turns because their row is too long.
    pub cut: u64,
    /// Rows that give no sample, and are not in the data set.
    pub left_out: u64,
    /// Sums by task kind; rows without one are under the empty name.
    pub kinds: BTreeMap<String, KindTally>,
    /// Samples by length: below 256 tokens, below 512, and so on.
    pub lengths: Vec<u64>,
}

/// Sums over the samples of one task kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindTally {
    /// Rows that are trained on.
    pub train_rows: u64,
    /// Rows that are held out.
    pub eval_rows: u64,
    /// Tokens of both.
    pub tokens: u64,
    /// Of these, those that are trained or measured.
    pub supervised_tokens: u64,
}

impl Tally {
    /// Of samples of at most `max_length` tokens, none of which was added yet.
    pub fn new(max_length: usize) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            max_length,
            tokens: 0,
            supervised_tokens: 0,
            cut: 0,
            left_out: 0,
            kinds: BTreeMap::new(),
            lengths: Vec::new(),
        }
    }

    /// Counts a sample.
    pub fn add(&mut self, sample: &Sample, split: Split) {
        let (tokens, supervised) = (sample.ids.len() as u64, sample.supervised_tokens() as u64);
        self.tokens += tokens;
        self.supervised_tokens += supervised;
        self.cut += u64::from(sample.cut.is_some());
        let bucket = bucket(sample.ids.len());
        if self.lengths.len() <= bucket {
            self.lengths.resize(bucket + 1, 0);
        }
        self.lengths[bucket] += 1;
        let name = sample.task_kind.as_deref().unwrap_or_default();
        let is_known = self.kinds.contains_key(name) || self.kinds.len() < KINDS_MAX;
        let name = if is_known { name } else { OTHER_KINDS };
        let kind = self.kinds.entry(name.to_owned()).or_default();
        match split {
            Split::Train => kind.train_rows += 1,
            Split::Eval => kind.eval_rows += 1,
        }
        kind.tokens += tokens;
        kind.supervised_tokens += supervised;
    }

    /// Rows of a split.
    pub fn rows(&self, split: Split) -> u64 {
        let of = |kind: &KindTally| match split {
            Split::Train => kind.train_rows,
            Split::Eval => kind.eval_rows,
        };
        self.kinds.values().map(of).sum()
    }

    /// The buckets of the histogram: the tokens that bound each from above, and how many samples are in it.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let ends = (0_u32..).map(|n| (FIRST_BUCKET as u64) << n.min(50));
        ends.zip(self.lengths.iter().copied())
    }

    /// Reads a tally that somebody else may have written.
    ///
    /// # Errors
    /// It is none, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FieldError> {
        let tally: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be the sums of a data set: {error}");
            FieldError::new("tally", String::from_utf8_lossy(bytes), rule)
        })?;
        if tally.schema_version != SCHEMA_VERSION {
            let rule = format!("must be {SCHEMA_VERSION}");
            return Err(FieldError::new(
                "schema_version",
                tally.schema_version,
                rule,
            ));
        }
        Ok(tally)
    }
}

/// The bucket of a length: the first ends below 256 tokens.
fn bucket(tokens: usize) -> usize {
    (tokens / FIRST_BUCKET)
        .checked_ilog2()
        .map_or(0, |log| log as usize + 1)
}

impl Chosen {
    /// Takes a row of the `n`th source back, which gives no sample. With its last row the source is dropped.
    pub fn leave_out(&mut self, n: usize, error: &SampleError) {
        let Some(entry) = self.entries.get_mut(n) else {
            return;
        };
        let cause = std::error::Error::source(error).map(ToString::to_string);
        let reason = cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
        match entry.rows {
            0 | 1 => entry.drop(DropReason::NoSample, reason),
            _ => {
                entry.rows -= 1;
                entry.detail = espalier_core::error::shorten(&reason);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Origin, TurnsCut};

    fn sample(tokens: usize, kind: Option<&str>) -> Sample {
        Sample {
            id: "a".into(),
            ids: vec![1; tokens],
            supervised: std::iter::once(1..3).collect(),
            origin: Origin::Rendered,
            task_id: None,
            task_kind: kind.map(str::to_owned),
            cut: None,
        }
    }

    #[test]
    fn samples_are_counted_by_kind_split_and_length() {
        let mut tally = Tally::new(1000);
        for (tokens, kind, split) in [
            (3, Some("a"), Split::Train),
            (255, Some("a"), Split::Eval),
            (256, None, Split::Train),
            (600, Some("b"), Split::Train),
        ] {
            tally.add(&sample(tokens, kind), split);
        }
        let cut = TurnsCut {
            tokens: 9,
            turns: 1,
        };
        let cut = Sample {
            cut: Some(cut),
            ..sample(1000, None)
        };
        tally.add(&cut, Split::Eval);
        assert_eq!(
            (tally.tokens, tally.supervised_tokens, tally.cut),
            (2114, 10, 1)
        );
        assert_eq!((tally.rows(Split::Train), tally.rows(Split::Eval)), (3, 2));
        let buckets: Vec<_> = tally.buckets().collect();
        assert_eq!(buckets, [(256, 2), (512, 1), (1024, 2)]);
        let kind = tally.kinds["a"];
        assert_eq!((kind.train_rows, kind.eval_rows, kind.tokens), (1, 1, 258));
        let text = serde_json::to_vec(&tally).unwrap();
        assert_eq!(Tally::parse(&text).unwrap(), tally);
        assert!(Tally::parse(b"{}").is_err());
    }

    #[test]
    fn kinds_beyond_a_bound_are_counted_as_one() {
        let mut tally = Tally::new(9);
        for n in 0..KINDS_MAX + 5 {
            tally.add(&sample(3, Some(&n.to_string())), Split::Train);
        }
        assert_eq!(tally.kinds.len(), KINDS_MAX + 1);
        assert_eq!(tally.kinds[OTHER_KINDS].train_rows, 5);
    }
}
