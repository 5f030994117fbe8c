//! Which samples make up which step. All of it follows from the seed and the lengths of the samples, so that a cursor is
//! enough to go on.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use espalier_core::spec::{TrainLength, TrainSettings};

/// How far training is in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cursor {
    /// Passes over the data that are done.
    pub epoch: u32,
    /// Samples of this pass that are done.
    pub position: usize,
}

/// The samples of a step, by their index in the data set: one list a micro-batch.
pub type Micros = Vec<Vec<usize>>;

/// Lays samples out over steps.
#[derive(Clone, Debug)]
pub struct Order {
    /// Of each sample, in tokens.
    lengths: Vec<usize>,
    seed: u64,
    batch: usize,
    accumulation: usize,
    packing: bool,
    /// Most tokens of a micro-batch.
    tokens_max: usize,
    length: TrainLength,
    /// Of the epoch that was asked for last.
    permutation: Option<(u32, Vec<u32>)>,
}

impl Order {
    /// Over samples of these lengths, at least one. A micro-batch has at most `tokens_max` tokens, which is no less than
    /// the longest sample has.
    pub fn new(lengths: Vec<usize>, settings: &TrainSettings, tokens_max: usize) -> Self {
        Self {
            lengths,
            seed: settings.seed,
            batch: settings.batch,
            accumulation: settings.accumulation,
            packing: settings.packing,
            tokens_max: tokens_max.min(settings.batch.saturating_mul(settings.max_length)),
            length: settings.length,
            permutation: None,
        }
    }

    /// The samples of the step at `cursor`, and where the next one begins. A step never takes from two epochs. Samples of
    /// a batch that do not fit into one micro-batch go into several, which changes no gradient.
    pub fn step(&mut self, cursor: Cursor) -> (Micros, Cursor) {
        let count = self.lengths.len();
        let (tokens, accumulation) = (self.tokens_max, self.accumulation);
        let (batch, samples) = match self.packing {
            true => (usize::MAX, usize::MAX),
            false => (self.batch, self.batch * accumulation),
        };
        let lengths = std::mem::take(&mut self.lengths);
        let order = self.permutation(cursor.epoch, count);
        let mut micros = Vec::new();
        let end = count.min(cursor.position.saturating_add(samples));
        let mut position = cursor.position;
        while position < end && (batch < usize::MAX || micros.len() < accumulation) {
            let left = &order[position..end];
            let in_batch = batch - (position - cursor.position) % batch;
            let take = fitting(left, &lengths, tokens).min(in_batch);
            micros.push(left[..take].iter().map(|i| *i as usize).collect());
            position += take;
        }
        self.lengths = lengths;
        let next = match position < count {
            true => Cursor { position, ..cursor },
            false => Cursor {
                epoch: cursor.epoch + 1,
                position: 0,
            },
        };
        (micros, next)
    }

    /// Steps in all. Where samples are packed, as many as their order makes.
    pub fn steps(&mut self) -> u64 {
        let epochs = match self.length {
            TrainLength::Steps(steps) => return steps,
            TrainLength::Epochs(epochs) => epochs,
        };
        if !self.packing {
            let samples = self.batch * self.accumulation;
            return u64::from(epochs) * self.lengths.len().div_ceil(samples) as u64;
        }
        let (mut cursor, mut steps) = (Cursor::default(), 0);
        while cursor.epoch < epochs {
            (_, cursor) = self.step(cursor);
            steps += 1;
        }
        steps
    }

    /// Most tokens that a micro-batch may have, in whatever order samples come.
    pub fn micro_tokens_max(&self) -> usize {
        let longest_first = || {
            let mut lengths = self.lengths.clone();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths
        };
        let together: usize = match self.packing {
            false => longest_first().iter().take(self.batch).sum(),
            true => self.lengths.iter().sum(),
        };
        together.min(self.tokens_max)
    }

    fn permutation(&mut self, epoch: u32, count: usize) -> &[u32] {
        let kept = self.permutation.take().filter(|(of, _)| *of == epoch);
        let fresh = || (epoch, permutation(self.seed, epoch, count));
        let (_, order) = self.permutation.insert(kept.unwrap_or_else(fresh));
        order
    }
}

/// How many of `left` fit into `tokens`: at least one.
fn fitting(left: &[u32], lengths: &[usize], tokens: usize) -> usize {
    let mut sum = 0;
    let fits = |index: &&u32| {
        sum += lengths[**index as usize];
        sum <= tokens
    };
    left.iter().take_while(fits).count().max(1)
}

/// The order of `count` samples in an epoch: Fisher and Yates' shuffle over ChaCha8, which is the same on every machine
/// and in every release.
fn permutation(seed: u64, epoch: u32, count: usize) -> Vec<u32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&epoch.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    let mut order: Vec<u32> = (0..u32::try_from(count).unwrap_or(u32::MAX)).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, below(&mut random, last as u64 + 1) as usize);
    }
    order
}

/// A number below `end`, each as likely: Lemire, *Fast Random Integer Generation in an Interval* (2019).
fn below(random: &mut ChaCha8Rng, end: u64) -> u64 {
    loop {
        let wide = u128::from(random.next_u64()) * u128::from(end);
        if (wide as u64) >= end.wrapping_neg() % end {
            return (wide >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::spec::TrainSettingsDraft;

    fn order(lengths: &[usize], change: impl Fn(&mut TrainSettingsDraft)) -> Order {
        let mut draft = TrainSettingsDraft {
            batch: Some(2),
            accumulation: Some(2),
            max_length: Some(10),
            epochs: Some(2),
            ..TrainSettingsDraft::default()
        };
        change(&mut draft);
        Order::new(lengths.to_vec(), &draft.check().unwrap(), 20)
    }

    /// All steps from `cursor` on.
    fn steps(order: &mut Order, mut cursor: Cursor) -> Vec<Micros> {
        let mut steps = Vec::new();
        while cursor.epoch < 2 {
            let (micros, next) = order.step(cursor);
            steps.push(micros);
            cursor = next;
        }
        steps
    }

    #[test]
    fn every_sample_comes_once_an_epoch_in_an_order_of_its_own() {
        let mut order = order(&[3; 9], |_| {});
        let steps = steps(&mut order, Cursor::default());
        let sizes: Vec<Vec<usize>> = steps
            .iter()
            .map(|step| step.iter().map(Vec::len).collect())
            .collect();
        let epoch = [vec![2, 2], vec![2, 2], vec![1]];
        assert_eq!(sizes, [epoch.clone(), epoch].concat());
        assert_eq!(order.steps(), 6);
        let flat = |steps: &[Micros]| -> Vec<usize> {
            steps.iter().flatten().flatten().copied().collect()
        };
        let (first, second) = (flat(&steps[..3]), flat(&steps[3..]));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..9).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_cursor_is_enough_to_go_on() {
        let lengths: Vec<usize> = (0..50).map(|n| 1 + n % 9).collect();
        for packing in [false, true] {
            let make = || order(&lengths, |draft| draft.packing = Some(packing));
            let whole = steps(&mut make(), Cursor::default());
            let mut cursor = Cursor::default();
            for done in 0..whole.len() {
                assert_eq!(steps(&mut make(), cursor), whole[done..]);
                (_, cursor) = make().step(cursor);
            }
            assert_eq!(make().steps(), whole.len() as u64);
        }
    }

    #[test]
    fn packing_fills_micro_batches_up_to_their_tokens() {
        let lengths: Vec<usize> = (0..50).map(|n| 1 + n % 9).collect();
        let mut order = order(&lengths, |draft| draft.packing = Some(true));
        let tokens = |micro: &Vec<usize>| micro.iter().map(|i| lengths[*i]).sum::<usize>();
        let steps = steps(&mut order, Cursor::default());
        let sums: Vec<usize> = steps.iter().flatten().map(tokens).collect();
        assert!(sums.iter().all(|sum| *sum <= 20), "{sums:?}");
        assert!(
            sums.iter().filter(|sum| **sum > 11).count() >= sums.len() - 2,
            "{sums:?}"
        );
        assert_eq!(order.micro_tokens_max(), 20);
        let unpacked = super::tests::order(&lengths, |_| {});
        assert_eq!(unpacked.micro_tokens_max(), 18);
    }

    #[test]
    fn a_batch_that_is_too_large_goes_into_several_micro_batches() {
        let mut order = order(&[9; 5], |draft| draft.batch = Some(3));
        let (micros, next) = order.step(Cursor::default());
        let sizes: Vec<usize> = micros.iter().map(Vec::len).collect();
        assert_eq!((sizes, next.epoch), (vec![2, 1, 2], 1));
        assert_eq!(order.micro_tokens_max(), 20);
    }

    #[test]
    fn the_order_never_changes() {
        // Stored checkpoints count on it. Computed by a second implementation of ChaCha8, in Python.
        assert_eq!(permutation(3407, 0, 8), [4, 2, 0, 7, 1, 6, 3, 5]);
        assert_eq!(permutation(3407, 1, 8), [0, 6, 4, 1, 5, 2, 3, 7]);
    }
}
