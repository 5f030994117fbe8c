//! The two types of numbers that training computes in on the CPU: f32, and f64 for gradient checks.

#![expect(unsafe_code, reason = "tiles read through pointers")]

use crate::buffer::Plain;
use crate::cpu::simd::{self, Lanes};

/// Columns of a tile of a product.
pub(crate) const TILE_COLS: usize = 16;
/// Most rows of a tile.
pub(crate) const TILE_ROWS_MAX: usize = 8;

/// Sums of a tile.
pub(crate) type Tile<T> = [[T; TILE_COLS]; TILE_ROWS_MAX];

/// f32 or f64.
pub trait Real:
    Plain
    + std::fmt::Debug
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + sealed::Tiles
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Below all numbers.
    const LOWEST: Self;
    /// Rounded to nearest.
    fn of(x: f64) -> Self;
    /// Exactly.
    fn to_f64(self) -> f64;
    /// `e^x`.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// `self · a + b`, rounded once.
    fn fma(self, a: Self, b: Self) -> Self;
    /// Magnitude.
    fn abs(self) -> Self;
    /// The larger; the other where one is NaN.
    fn max(self, other: Self) -> Self;
}

mod sealed {
    use super::{Lanes, Tile};

    /// The inner loop of products.
    pub trait Tiles: Sized {
        /// `sums[r][c] = Σ a[r][p · step] · b[p · 16 + c]` for p below `depth`, in one chain of fused multiply-adds each;
        /// for the first [`rows`](super::tile_rows) rows of `sums`.
        ///
        /// # Safety
        /// All of that can be read.
        #[expect(private_bounds, reason = "sealed: nobody outside calls it")]
        unsafe fn tile<L: Lanes>(
            lanes: L,
            a: &[*const Self; super::TILE_ROWS_MAX],
            step: usize,
            b: *const Self,
            depth: usize,
            sums: &mut Tile<Self>,
        );
    }
}

/// Rows of a tile: what the registers hold.
#[inline(always)]
pub(crate) fn tile_rows<L: Lanes>() -> usize {
    match L::ROWS {
        6 => 8,
        3 => 6,
        _ => 4,
    }
}

#[inline(always)]
unsafe fn tile_f32<L: Lanes, const ROWS: usize>(
    lanes: L,
    a: &[*const f32; TILE_ROWS_MAX],
    step: usize,
    b: *const f32,
    depth: usize,
    sums: &mut Tile<f32>,
) {
    let rows: [*const f32; ROWS] = std::array::from_fn(|r| a[r]);
    let mut acc = [lanes.zero(); ROWS];
    for p in 0..depth {
        // SAFETY: by the caller's promise, for all p below depth.
        unsafe {
            let b = lanes.load(b.add(p * TILE_COLS));
            for r in 0..ROWS {
                acc[r] = lanes.fma(lanes.splat(*rows[r].add(p * step)), b, acc[r]);
            }
        }
    }
    for r in 0..ROWS {
        // SAFETY: a row of `sums` takes 16.
        unsafe { lanes.store(sums[r].as_mut_ptr(), acc[r]) };
    }
}

impl sealed::Tiles for f32 {
    #[inline(always)]
    #[expect(private_bounds, reason = "sealed: nobody outside calls it")]
    unsafe fn tile<L: Lanes>(
        lanes: L,
        a: &[*const Self; TILE_ROWS_MAX],
        step: usize,
        b: *const Self,
        depth: usize,
        sums: &mut Tile<Self>,
    ) {
        // SAFETY: passed on.
        unsafe {
            match tile_rows::<L>() {
                8 => tile_f32::<L, 8>(lanes, a, step, b, depth, sums),
                6 => tile_f32::<L, 6>(lanes, a, step, b, depth, sums),
                _ => tile_f32::<L, 4>(lanes, a, step, b, depth, sums),
            }
        }
    }
}

impl sealed::Tiles for f64 {
    #[inline(always)]
    #[expect(private_bounds, reason = "sealed: nobody outside calls it")]
    unsafe fn tile<L: Lanes>(
        _: L,
        a: &[*const Self; TILE_ROWS_MAX],
        step: usize,
        b: *const Self,
        depth: usize,
        sums: &mut Tile<Self>,
    ) {
        for (a, sums) in a.iter().zip(sums.iter_mut()).take(tile_rows::<L>()) {
            let mut acc = [0.0; TILE_COLS];
            for p in 0..depth {
                // SAFETY: by the caller's promise, for all p below depth.
                let (a, b) = unsafe {
                    (
                        *a.add(p * step),
                        &*b.add(p * TILE_COLS).cast::<[f64; TILE_COLS]>(),
                    )
                };
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = a.mul_add(*b, *acc);
                }
            }
            *sums = acc;
        }
    }
}

macro_rules! real {
    ($name:ident, $exp:expr) => {
        impl Real for $name {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LOWEST: Self = $name::NEG_INFINITY;
            #[inline(always)]
            #[expect(clippy::allow_attributes, reason = "one macro for both types")]
            #[allow(clippy::cast_possible_truncation, reason = "rounding is meant")]
            fn of(x: f64) -> Self {
                x as $name
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                $name::ln(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $name::sqrt(self)
            }
            #[inline(always)]
            fn fma(self, a: Self, b: Self) -> Self {
                self.mul_add(a, b)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $name::abs(self)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                $name::max(self, other)
            }
        }
    };
}
real!(f32, simd::exp);
real!(f64, f64::exp);
