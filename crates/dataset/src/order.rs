//! In which order samples, or packs of them, are trained on: a new permutation for each epoch, the same for the same
//! seed on every machine, and resumable at any point by one number.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};

use crate::render::index;

/// Draws indices below a count without end: each epoch has every index once.
#[derive(Clone, Debug)]
pub struct Order {
    count: usize,
    seed: u64,
    drawn: u64,
    epoch: u64,
    permutation: Vec<u32>,
}

impl Order {
    /// Goes on where `drawn` indices were drawn before. `count` is that of samples or packs, below 2³²; with 0 nothing
    /// is drawn.
    pub fn new(count: usize, seed: u64, drawn: u64) -> Self {
        let mut order = Self {
            count,
            seed,
            drawn,
            epoch: 0,
            permutation: Vec::new(),
        };
        if count > 0 {
            order.shuffle(drawn / order.per_epoch());
        }
        order
    }

    /// How many were drawn: what a checkpoint keeps.
    pub fn drawn(&self) -> u64 {
        self.drawn
    }

    /// The epoch of the next draw, from 0.
    pub fn epoch(&self) -> u64 {
        self.drawn.checked_div(self.per_epoch()).unwrap_or_default()
    }

    fn per_epoch(&self) -> u64 {
        u64::from(index(self.count))
    }

    fn shuffle(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.permutation = permutation(index(self.count), self.seed, epoch);
    }
}

impl Iterator for Order {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.count == 0 {
            return None;
        }
        let epoch = self.epoch();
        if epoch != self.epoch {
            self.shuffle(epoch);
        }
        let at = usize::try_from(self.drawn % self.per_epoch()).ok()?;
        self.drawn += 1;
        self.permutation.get(at).map(|&index| index as usize)
    }
}

/// Fisher-Yates over a ChaCha8 stream whose key begins with the seed and whose nonce is the epoch.
fn permutation(count: u32, seed: u64, epoch: u64) -> Vec<u32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    random.set_stream(epoch);
    let mut permutation: Vec<u32> = (0..count).collect();
    for last in (1..permutation.len()).rev() {
        permutation.swap(last, below(&mut random, index(last) + 1) as usize);
    }
    permutation
}

/// A number below `bound`, each as likely as the others: numbers of the last, incomplete round are drawn again.
fn below(random: &mut ChaCha8Rng, bound: u32) -> u32 {
    let whole = u32::MAX - u32::MAX % bound;
    loop {
        let drawn = random.next_u32();
        if drawn < whole {
            return drawn % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_index_once_and_the_next_another_order() {
        let drawn: Vec<usize> = Order::new(50, 7, 0).take(100).collect();
        for epoch in drawn.chunks(50) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert_ne!(drawn[..50], drawn[50..]);
        let other: Vec<usize> = Order::new(50, 8, 0).take(50).collect();
        assert_ne!(drawn[..50], other);
    }

    #[test]
    fn it_goes_on_from_any_point() {
        let whole: Vec<usize> = Order::new(7, 3, 0).take(30).collect();
        for drawn in 0..30 {
            let mut rest = Order::new(7, 3, drawn);
            assert_eq!(rest.epoch(), drawn / 7);
            let from = usize::try_from(drawn).unwrap();
            assert_eq!(
                rest.by_ref().take(30 - from).collect::<Vec<_>>(),
                whole[from..]
            );
            assert_eq!(rest.drawn(), 30);
        }
    }

    /// A checkpoint of an older build must find the order that it left. Computed apart, from the definition of ChaCha.
    #[test]
    fn the_order_is_the_same_in_every_build() {
        assert_eq!(Order::new(8, 3407, 0).take(16).collect::<Vec<_>>(), GOLDEN);
    }

    const GOLDEN: [usize; 16] = [2, 4, 3, 7, 5, 6, 0, 1, 3, 1, 2, 0, 4, 7, 6, 5];

    #[test]
    fn nothing_and_one() {
        assert_eq!(Order::new(0, 1, 9).next(), None);
        assert_eq!(Order::new(0, 1, 9).epoch(), 0);
        assert_eq!(Order::new(1, 1, 9).take(3).collect::<Vec<_>>(), [0, 0, 0]);
    }
}
