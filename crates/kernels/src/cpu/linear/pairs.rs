//! Weights in bf16 on machines that multiply bf16 in pairs: twice the products of f32 in an instruction.
//!
//! Inputs are rounded to bf16 first. A panel has, for each two neighbours of k, the two weights of every output side by
//! side. Each output is one chain over pairs of k, ascending, whatever the number of rows.

use std::ops::Range;

use super::super::pool::{Isa, Parts, Pool};
use super::super::simd::{Kernel, Lanes, dispatch};
use super::{DIRECT_ROWS, PANEL, RowsOf, bf16};

/// Whether this machine does.
pub(super) fn are_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    let are = Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let are = false;
    are
}

/// Where weight `k` of column `column` lies in a panel.
pub(super) fn place(column: usize, k: usize) -> usize {
    k / 2 * 2 * PANEL + column * 2 + k % 2
}

/// Numbers of a panel: an odd k has a zero beside its last weight.
pub(super) fn panel_len(k: usize) -> usize {
    k.div_ceil(2) * 2 * PANEL
}

/// Packs rows of `k` weights, 64 a panel.
pub(super) fn pack(pool: &Pool, to: &mut [u16], k: usize, panels: usize, rows_of: &RowsOf<'_>) {
    let len = panel_len(k);
    let to = Parts::new(to);
    pool.split(panels, &|range| {
        let mut rows = vec![0.0; PANEL * k];
        for panel in range {
            rows.fill(0.0);
            rows_of(panel, &mut rows);
            // SAFETY: each panel is one thread's.
            let to = unsafe { to.part(panel * len..(panel + 1) * len) };
            for (pair, to) in to.chunks_mut(2 * PANEL).enumerate() {
                for (column, to) in to.chunks_mut(2).enumerate() {
                    let row = &rows[column * k..(column + 1) * k];
                    for (to, weight) in to.iter_mut().zip(&row[2 * pair..]) {
                        *to = bf16::from_f32(*weight).to_bits();
                    }
                }
            }
        }
    });
}

/// Inputs, rounded, two neighbours of k in a word.
pub(super) struct Inputs {
    words: Vec<u32>,
    /// Words of a row.
    pairs: usize,
}

impl Inputs {
    pub(super) fn of(pool: &Pool, x: &[f32], k: usize) -> Self {
        let (rows, pairs) = (x.len() / k, k.div_ceil(2));
        let mut words = vec![0; rows * pairs];
        let parts = Parts::new(&mut words);
        let round = |rows: Range<usize>| {
            // SAFETY: shares of rows do not overlap.
            let words = unsafe { parts.part(rows.start * pairs..rows.end * pairs) };
            let x = &x[rows.start * k..rows.end * k];
            dispatch(pool.isa(), Round { x, k, words });
        };
        // Few rows take less time than threads need to meet.
        match rows <= DIRECT_ROWS {
            true => round(0..rows),
            false => pool.split(rows, &round),
        }
        Self { words, pairs }
    }
}

struct Round<'a> {
    x: &'a [f32],
    k: usize,
    words: &'a mut [u32],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let rows = self.words.chunks_mut(self.k.div_ceil(2));
        for (words, x) in rows.zip(self.x.chunks(self.k)) {
            let (pairs, rest) = x.as_chunks::<2>();
            for (word, [low, high]) in words.iter_mut().zip(pairs) {
                *word = round(*low) | round(*high) << 16;
            }
            if let ([last], Some(word)) = (rest, words.last_mut()) {
                *word = round(*last);
            }
        }
    }
}

/// To nearest even, as [`bf16::from_f32`], without branches.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() {
        u32::from(bf16::NAN.to_bits())
    } else {
        rounded
    }
}

/// One thread's panels of one matrix.
pub(super) struct Panels<'a> {
    pub(super) weights: &'a [u16],
    pub(super) n: usize,
    pub(super) inputs: &'a Inputs,
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    pub(super) y: &'a Parts<'a, f32>,
}

impl Panels<'_> {
    /// Computes them.
    ///
    /// # Safety
    /// The machine has the instructions, and nobody else writes these rows of these panels.
    pub(super) unsafe fn run(&self) {
        // SAFETY: by contract.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            x86::run(self);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("never available");
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::super::super::pool::share;
    use super::{PANEL, Panels};

    /// Rows whose sums the registers hold beside operands: 24 of 32.
    const ROWS: usize = 6;
    /// Vectors of 16 sums, one for each output of a panel.
    const VECTORS: usize = PANEL / 16;
    /// Rows that pass over a block of weights together.
    const BLOCK_ROWS: usize = 240;
    /// Pairs of k of a block: its weights stay in the first cache while rows pass.
    const BLOCK_PAIRS: usize = 128;

    /// # Safety
    /// As for [`Panels::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn run(all: &Panels<'_>) {
        let pairs = all.inputs.pairs;
        let len = pairs * 2 * PANEL;
        for first in all.rows.clone().step_by(BLOCK_ROWS) {
            let rows = first..all.rows.end.min(first + BLOCK_ROWS);
            for panel in all.panels.clone() {
                let weights = &all.weights[panel * len..(panel + 1) * len];
                for from in (0..pairs).step_by(BLOCK_PAIRS) {
                    let part = from..pairs.min(from + BLOCK_PAIRS);
                    let weights = &weights[part.start * 2 * PANEL..part.end * 2 * PANEL];
                    // SAFETY: by contract.
                    unsafe { block(all, weights, rows.clone(), part, panel) };
                }
            }
        }
    }

    /// # Safety
    /// As for [`Panels::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn block(
        all: &Panels<'_>,
        weights: &[u16],
        rows: Range<usize>,
        pairs: Range<usize>,
        panel: usize,
    ) {
        let tiles = rows.len().div_ceil(ROWS);
        for index in 0..tiles {
            let part = share(rows.len(), index, tiles);
            let row = rows.start + part.start;
            // SAFETY: by contract.
            unsafe {
                match part.len() {
                    1 => tile::<1>(all, weights, row, pairs.clone(), panel),
                    2 => tile::<2>(all, weights, row, pairs.clone(), panel),
                    3 => tile::<3>(all, weights, row, pairs.clone(), panel),
                    4 => tile::<4>(all, weights, row, pairs.clone(), panel),
                    5 => tile::<5>(all, weights, row, pairs.clone(), panel),
                    6 => tile::<6>(all, weights, row, pairs.clone(), panel),
                    // Tiles have at least one row and at most `ROWS`.
                    _ => {}
                }
            }
        }
    }

    /// # Safety
    /// As for [`Panels::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile<const COUNT: usize>(
        all: &Panels<'_>,
        weights: &[u16],
        row: usize,
        pairs: Range<usize>,
        panel: usize,
    ) {
        let column = panel * PANEL;
        let width = (all.n - column).min(PANEL);
        let mask = |v: usize| -> u16 {
            let left = width.saturating_sub(v * 16).min(16);
            ((1_u32 << left) - 1) as u16
        };
        let words = all.inputs.pairs;
        let x = &all.inputs.words[row * words + pairs.start..(row + COUNT - 1) * words + pairs.end];
        let depth = pairs.len();
        assert_eq!(weights.len(), depth * 2 * PANEL);
        // SAFETY: `x` holds `COUNT` rows of `depth` words, `words` apart; `weights` as many times 64 pairs; of `y` only
        // this thread's columns are touched, and none beyond the row's end.
        unsafe {
            let y = all.y.start().add(row * all.n + column);
            let at = |r: usize, v: usize| y.wrapping_add(r * all.n + v * 16);
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; COUNT];
            if pairs.start > 0 {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_maskz_loadu_ps(mask(v), at(r, v));
                    }
                }
            }
            for k in 0..depth {
                let from = weights.as_ptr().add(k * 2 * PANEL);
                let mut w = [_mm512_setzero_si512(); VECTORS];
                for (v, w) in w.iter_mut().enumerate() {
                    *w = _mm512_loadu_si512(from.add(v * 32).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*x.as_ptr().add(r * words + k) as i32);
                    for (w, sum) in w.iter().zip(sums) {
                        *sum = _mm512_dpbf16_ps(*sum, as_bf16(x), as_bf16(*w));
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    _mm512_mask_storeu_ps(at(r, v), mask(v), *sum);
                }
            }
        }
    }

    #[inline(always)]
    fn as_bf16(bits: __m512i) -> __m512bh {
        // SAFETY: two types for the same 512 bits.
        unsafe { std::mem::transmute(bits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_rounded_as_bf16_is() {
        let numbers = crate::cpu::simd::tests::numbers(1, 1000);
        let special = [
            0.0,
            -0.0,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            1e-40,
        ];
        for x in numbers.into_iter().chain(special) {
            assert_eq!(round(x), u32::from(bf16::from_f32(x).to_bits()), "{x}");
        }
    }
}
