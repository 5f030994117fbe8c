//! What a model learns from: samples of tokens, checked against the model, held in memory, and the order in which steps
//! take them.

mod order;
mod rows;
mod sampled;

use std::fmt;
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::engine::Documents;

pub use order::{Cursor, Order};
pub use rows::{Row, RowLines};
pub use sampled::Sampled;

/// Most tokens of a data set: 4 GiB of memory. Larger ones are split into several trainings.
pub const TOKENS_MAX: usize = 1 << 30;
/// Longest name of a sample, in bytes.
pub const NAME_BYTES_MAX: usize = 512;

/// Why samples cannot be learned from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DataError {
    /// There are none.
    #[error("`{path}` must have at least one sample, and it is empty")]
    Empty {
        /// Where.
        path: String,
    },
    /// A line that is no row.
    #[error("line {line} of `{path}` must be a row of tokens: {reason}")]
    Line {
        /// Where.
        path: String,
        /// From 1.
        line: usize,
        /// What was wrong.
        reason: String,
    },
    /// A sample that breaks a rule.
    #[error("sample `{sample}` ({place}): `{field}` {rule}, got {value}")]
    Sample {
        /// Where it stands.
        place: String,
        /// Its name.
        sample: String,
        /// Of it.
        field: &'static str,
        /// What it must be.
        rule: String,
        /// What it is.
        value: String,
    },
    /// More than memory is meant for.
    #[error(
        "all samples together must have at most {TOKENS_MAX} tokens, and sample `{sample}` ({place}) goes beyond: train on \
         fewer at once"
    )]
    TooLarge {
        /// Where it stands.
        place: String,
        /// Its name.
        sample: String,
    },
}

/// What samples are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Ids are below it.
    pub vocabulary: usize,
    /// Longest sample, in tokens.
    pub max_length: usize,
}

/// Samples in memory, one behind the other.
#[derive(Debug, Default)]
pub struct Samples {
    ids: Vec<u32>,
    ends: Vec<usize>,
    /// Of all samples, in their order, counted from each sample's beginning.
    supervised: Vec<Range<u32>>,
    supervised_ends: Vec<usize>,
    names: Vec<Box<str>>,
    cut: usize,
    digest: Sha256,
}

impl Samples {
    /// Takes a sample, which stands at `place`. One that is too long ends with its last whole turn.
    ///
    /// # Errors
    /// Names the sample, its place and the rule.
    pub fn push(
        &mut self,
        row: Row,
        rules: Rules,
        place: fmt::Arguments<'_>,
    ) -> Result<(), DataError> {
        let refuse = |field, rule: String, value: String| DataError::Sample {
            place: place.to_string(),
            sample: row.id.chars().take(NAME_BYTES_MAX).collect(),
            field,
            rule,
            value,
        };
        check(&row, rules, refuse)?;
        self.digest.update((row.id.len() as u64).to_le_bytes());
        self.digest.update(&row.id);
        self.digest.update((row.ids.len() as u64).to_le_bytes());
        for id in &row.ids {
            self.digest.update(id.to_le_bytes());
        }
        for [start, end] in &row.supervised {
            self.digest.update(start.to_le_bytes());
            self.digest.update(end.to_le_bytes());
        }
        let fits = |[_, end]: &&[u32; 2]| *end as usize <= rules.max_length;
        let kept = row.supervised.iter().take_while(fits).count();
        let length = match (row.ids.len() > rules.max_length, kept) {
            (false, _) => row.ids.len(),
            (true, 0) => {
                let rule = format!(
                    "must have a turn that ends within `max_length`, which is {}",
                    rules.max_length
                );
                let value = format!("{} tokens", row.ids.len());
                return Err(refuse("supervised", rule, value));
            }
            (true, kept) => {
                self.cut += 1;
                row.supervised[kept - 1][1] as usize
            }
        };
        if self.ids.len() + length > TOKENS_MAX {
            return Err(DataError::TooLarge {
                place: place.to_string(),
                sample: row.id,
            });
        }
        self.ids.extend_from_slice(&row.ids[..length]);
        self.ends.push(self.ids.len());
        let kept = row.supervised.iter().take_while(fits);
        self.supervised
            .extend(kept.map(|[start, end]| *start..*end));
        self.supervised_ends.push(self.supervised.len());
        self.names.push(row.id.into());
        Ok(())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// How many were cut at their last whole turn.
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Tokens that are learned, or measured.
    pub fn supervised_tokens(&self) -> usize {
        // The first token is predicted from nothing.
        let learned = |range: &Range<u32>| range.len() - usize::from(range.start == 0);
        self.supervised.iter().map(learned).sum()
    }

    /// Memory that they take, in bytes.
    pub fn bytes(&self) -> usize {
        let names: usize = self.names.iter().map(|name| name.len()).sum();
        names
            + self.names.capacity() * size_of::<Box<str>>()
            + self.ids.capacity() * size_of::<u32>()
            + (self.ends.capacity() + self.supervised_ends.capacity()) * size_of::<usize>()
            + self.supervised.capacity() * size_of::<Range<u32>>()
    }

    /// The name of a sample.
    pub fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    /// Tokens of each.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len()).map(|n| self.range(n).len()).collect()
    }

    /// What they say, as they came: SHA-256 in hex.
    pub fn sha256(&self) -> String {
        let hash = self.digest.clone().finalize();
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn range(&self, index: usize) -> Range<usize> {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[index]
    }

    fn supervised(&self, index: usize) -> &[Range<u32>] {
        let ends = &self.supervised_ends;
        let start = index.checked_sub(1).map_or(0, |before| ends[before]);
        &self.supervised[start..ends[index]]
    }

    /// All samples in their order, as many at once as have at most `tokens_max` tokens, or one.
    pub fn batches(&self, tokens_max: usize) -> Vec<Vec<usize>> {
        let mut batches: Vec<Vec<usize>> = Vec::new();
        let mut tokens = 0;
        for (index, length) in self.lengths().into_iter().enumerate() {
            match batches.last_mut() {
                Some(batch) if tokens + length <= tokens_max => {
                    batch.push(index);
                    tokens += length;
                }
                _ => {
                    batches.push(vec![index]);
                    tokens = length;
                }
            }
        }
        batches
    }

    /// These samples, laid end to end.
    pub fn pack(&self, indices: &[usize]) -> Packed {
        let mut packed = Packed::default();
        for index in indices {
            let start = packed.ids.len();
            packed.ids.extend_from_slice(&self.ids[self.range(*index)]);
            packed.supervised.resize(packed.ids.len(), false);
            for range in self.supervised(*index) {
                let range = start + range.start as usize..start + range.end as usize;
                packed.supervised[range].fill(true);
            }
            // The first token is predicted from nothing.
            if let Some(first) = packed.supervised.get_mut(start) {
                *first = false;
            }
            packed.ends.push(packed.ids.len());
        }
        packed
    }
}

fn check(
    row: &Row,
    rules: Rules,
    refuse: impl Fn(&'static str, String, String) -> DataError,
) -> Result<(), DataError> {
    let length = row.ids.len();
    if row.id.is_empty() || row.id.len() > NAME_BYTES_MAX {
        let rule = format!("must be a name of 1 to {NAME_BYTES_MAX} bytes");
        return Err(refuse("id", rule, format!("{} bytes", row.id.len())));
    }
    let beyond = row
        .ids
        .iter()
        .position(|id| *id as usize >= rules.vocabulary);
    if let Some(at) = beyond {
        let rule = format!("must be below the model's vocabulary, {}", rules.vocabulary);
        return Err(refuse("ids", rule, format!("{} at {at}", row.ids[at])));
    }
    let mut after = 0;
    for [start, end] in &row.supervised {
        if *start < after || start >= end || *end as usize > length {
            let rule = format!("must be ascending ranges within {length} tokens");
            return Err(refuse("supervised", rule, format!("{start}..{end}")));
        }
        after = *end;
    }
    // The first token is predicted from nothing.
    if row.supervised.iter().all(|[_, end]| *end <= 1) {
        let rule = "must have at least one token after the first".to_owned();
        return Err(refuse("supervised", rule, format!("{:?}", row.supervised)));
    }
    Ok(())
}

/// Samples laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    ids: Vec<u32>,
    ends: Vec<usize>,
    supervised: Vec<bool>,
}

impl Packed {
    /// As the engine takes them.
    pub fn documents(&self) -> Documents<'_> {
        Documents {
            ids: &self.ids,
            ends: &self.ends,
            supervised: &self.supervised,
        }
    }

    /// Tokens of all of them.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

#[cfg(test)]
mod tests;
