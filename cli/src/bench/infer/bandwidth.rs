//! How fast this machine's cores read memory together: what decoding cannot be faster than.

use std::time::Instant;

/// Far more than any cache, in words of 8 bytes.
const WORDS: usize = 64 << 20;
const ROUNDS: usize = 5;

/// Bytes a second, the best of some sums over 512 MB by `threads` threads.
pub fn read_per_s(threads: usize) -> f64 {
    let words = vec![1_u64; WORDS];
    let rate = |_| {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(WORDS.div_ceil(threads)) {
                scope.spawn(|| std::hint::black_box(sum(part)));
            }
        });
        (8 * WORDS) as f64 / began.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(rate).fold(0.0, f64::max)
}

/// In many lanes, so that additions do not wait for each other.
fn sum(words: &[u64]) -> [u64; 64] {
    let mut lanes = [0_u64; 64];
    for chunk in words.as_chunks::<64>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes
}
