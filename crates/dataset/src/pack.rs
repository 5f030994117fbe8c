//! Samples laid end to end, so that a step computes on tokens and not on padding. Pure and deterministic.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::sample::Sample;

/// Which samples share a pack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// The longest first, each into the pack in which it leaves the least room (best-fit decreasing): at most 11/9 of
    /// the fewest packs that there can be, and for samples of mixed lengths hardly a token of room.
    #[default]
    Dense,
    /// In their order, a new pack where the next one does not fit.
    InOrder,
    /// Each by itself.
    Single,
}

/// Several samples laid end to end; positions restart, no document sees another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// All ids.
    pub ids: Vec<u32>,
    /// Where each document ends: ascending, the last is `ids.len()`.
    pub ends: Vec<usize>,
    /// For each token whether it is a target.
    pub supervised: Vec<bool>,
    /// Index of each document's sample in the data set.
    pub samples: Vec<usize>,
}

/// A sample that fits into no pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sample {sample} must have at most {max} tokens to fit into a pack, got {tokens}")]
pub struct PackError {
    /// Its index.
    pub sample: usize,
    /// Its length.
    pub tokens: usize,
    /// The length of a pack.
    pub max: usize,
}

/// Which samples, by index, share each pack. Indices within a pack ascend, and packs are in the order of their first.
///
/// # Errors
/// A sample is longer than `tokens_max`.
pub fn pack(
    lengths: &[usize],
    tokens_max: usize,
    packing: Packing,
) -> Result<Vec<Vec<usize>>, PackError> {
    let max = tokens_max;
    let long = lengths.iter().position(|&tokens| tokens > max);
    if let Some(sample) = long {
        let tokens = lengths[sample];
        return Err(PackError {
            sample,
            tokens,
            max,
        });
    }
    Ok(match packing {
        Packing::Dense => dense(lengths, max),
        Packing::InOrder => in_order(lengths, max),
        Packing::Single => (0..lengths.len()).map(|sample| vec![sample]).collect(),
    })
}

fn in_order(lengths: &[usize], max: usize) -> Vec<Vec<usize>> {
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (sample, &tokens) in lengths.iter().enumerate() {
        match packs.last_mut().filter(|_| tokens <= room) {
            Some(pack) => pack.push(sample),
            None => {
                packs.push(vec![sample]);
                room = max;
            }
        }
        room -= tokens;
    }
    packs
}

fn dense(lengths: &[usize], max: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&sample| (std::cmp::Reverse(lengths[sample]), sample));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // Packs by the room that is left in them.
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for sample in order {
        let tokens = lengths[sample];
        let (room, pack) = match rooms.range((tokens, 0)..).next().copied() {
            Some(found) => {
                rooms.remove(&found);
                found
            }
            None => {
                packs.push(Vec::new());
                (max, packs.len() - 1)
            }
        };
        packs[pack].push(sample);
        rooms.insert((room - tokens, pack));
    }
    for pack in &mut packs {
        pack.sort_unstable();
    }
    packs.sort_unstable_by_key(|pack| pack.first().copied());
    packs
}

impl Packed {
    /// The samples of these indices, in this order.
    pub fn of(samples: &[Sample], indices: &[usize]) -> Self {
        let mut packed = Self::default();
        for &index in indices {
            packed.push(index, &samples[index]);
        }
        packed
    }

    /// Lays one more sample at the end.
    pub fn push(&mut self, index: usize, sample: &Sample) {
        let start = self.ids.len();
        self.ids.extend_from_slice(&sample.ids);
        self.supervised.resize(self.ids.len(), false);
        for span in &sample.supervised {
            let (first, last) = (start + span.start as usize, start + span.end as usize);
            self.supervised[first..last].fill(true);
        }
        self.ends.push(self.ids.len());
        self.samples.push(index);
    }

    /// Tokens that are targets.
    pub fn supervised_tokens(&self) -> usize {
        self.supervised.iter().filter(|target| **target).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sample::Origin;

    fn sample(ids: &[u32], supervised: &[std::ops::Range<u32>]) -> Sample {
        Sample {
            id: String::new(),
            ids: ids.to_vec(),
            supervised: supervised.to_vec(),
            origin: Origin::Recorded,
            task_id: None,
            task_kind: None,
            cut: None,
        }
    }

    #[test]
    fn documents_keep_their_ends_and_targets() {
        let samples = [sample(&[1, 2, 3], &[1..2, 2..3]), sample(&[4, 5], &[1..2])];
        let packed = Packed::of(&samples, &[1, 0]);
        assert_eq!(packed.ids, [4, 5, 1, 2, 3]);
        assert_eq!(packed.ends, [2, 5]);
        assert_eq!(packed.supervised, [false, true, false, true, true]);
        assert_eq!(packed.samples, [1, 0]);
        assert_eq!(packed.supervised_tokens(), 3);
    }

    #[test]
    fn each_way_of_packing() {
        let lengths = [5, 4, 6, 1, 9];
        let packs = |packing| pack(&lengths, 10, packing).unwrap();
        assert_eq!(packs(Packing::InOrder), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(packs(Packing::Dense), [vec![0], vec![1, 2], vec![3, 4]]);
        assert_eq!(packs(Packing::Single).len(), 5);
        let error = pack(&lengths, 8, Packing::Dense).unwrap_err().to_string();
        assert_eq!(
            error,
            "sample 4 must have at most 8 tokens to fit into a pack, got 9"
        );
    }

    proptest! {
        #[test]
        fn every_sample_is_packed_once_and_fits(lengths in prop::collection::vec(1_usize..60, 0..80)) {
            for packing in [Packing::Dense, Packing::InOrder, Packing::Single] {
                let packs = pack(&lengths, 64, packing).unwrap();
                let mut all: Vec<usize> = packs.concat();
                all.sort_unstable();
                prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
                for pack in &packs {
                    prop_assert!(pack.iter().map(|&sample| lengths[sample]).sum::<usize>() <= 64);
                }
            }
            let total: usize = lengths.iter().sum();
            let dense = pack(&lengths, 64, Packing::Dense).unwrap().len();
            // Two packs that both are half empty would be one.
            prop_assert!(dense <= 1 + 2 * total / 64);
        }
    }
}
