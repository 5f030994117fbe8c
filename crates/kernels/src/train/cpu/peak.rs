//! What the machine's registers could do: the inner loop of products, on operands that stay in the first cache.

#![expect(unsafe_code, reason = "tiles read through pointers")]

use std::time::Instant;

use super::super::real::{Real, TILE_COLS, TILE_ROWS_MAX, tile_rows};
use super::gemm::{Panels, Rows, sweep};
use crate::cpu::Pool;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

const DEPTH: usize = 256;

struct Spin {
    rounds: u64,
}

impl Kernel for Spin {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let a = vec![f32::ONE; TILE_ROWS_MAX * DEPTH];
        let b = vec![f32::ONE; DEPTH * TILE_COLS];
        for _ in 0..self.rounds {
            let rows = Rows {
                start: a.as_ptr(),
                row: DEPTH,
                step: 1,
                count: tile_rows::<L>(),
            };
            let panel = Panels {
                start: b.as_ptr(),
                stride: 0,
                count: 1,
            };
            // SAFETY: `a` and `b` hold `DEPTH` values of each row and of the panel.
            unsafe {
                sweep(lanes, rows, panel, DEPTH, |_, _, _, sums| {
                    std::hint::black_box(sums);
                });
            }
        }
    }
}

/// Rounds of a measurement: some hundredths of a second.
const ROUNDS: u64 = 20_000;

/// The f32 matrix peak of this machine on the threads of `pool`, in floating-point operations a second: the best of a few
/// measurements, which take some tenths of a second in all.
#[must_use]
pub fn peak_flops(pool: &Pool) -> f64 {
    let rates = (0..5).map(|_| {
        let began = Instant::now();
        spin(pool, ROUNDS) as f64 / began.elapsed().as_secs_f64()
    });
    rates.fold(0.0, f64::max)
}

/// Multiplies on all threads for `rounds` rounds, and gives the floating-point operations that it did. Their number over
/// the time is the f32 matrix peak that shares are said of.
#[must_use]
pub fn spin(pool: &Pool, rounds: u64) -> u64 {
    pool.run(&|_| dispatch(pool.isa(), Spin { rounds }));
    let rows = match pool.isa() {
        crate::cpu::Isa::Portable => 4,
        crate::cpu::Isa::Avx2 => 6,
        crate::cpu::Isa::Avx512 => 8,
    };
    2 * (pool.threads() * DEPTH * TILE_COLS * rows) as u64 * rounds
}
