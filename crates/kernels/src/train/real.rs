//! The two types of numbers that training computes in on the CPU: f32, and f64 for gradient checks.

#![expect(unsafe_code, reason = "tiles read through pointers")]

use crate::buffer::Plain;
use crate::cpu::Isa;
use crate::cpu::simd::{self, Kernel, Lanes, dispatch};

/// Columns of a tile of a product.
pub const TILE_COLS: usize = 16;
/// Most rows of a tile.
pub const TILE_ROWS_MAX: usize = 8;

/// Sums of a tile.
pub type Tile<T> = [[T; TILE_COLS]; TILE_ROWS_MAX];

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
    use super::{Isa, TILE_ROWS_MAX, Tile};

    /// The inner loop of products.
    pub trait Tiles: Sized {
        /// `sums[r][c] = Σ a[r][p · step] · b[p · 16 + c]` for p below `depth`, in one chain of fused multiply-adds each;
        /// for the first [`tile_rows`](super::tile_rows) rows of `sums`.
        ///
        /// # Safety
        /// All of that can be read, and the machine has the instructions.
        #[doc(hidden)]
        unsafe fn tile(
            isa: Isa,
            a: &[*const Self; TILE_ROWS_MAX],
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
    match isa::<L>() {
        Isa::Avx512 => 8,
        Isa::Avx2 => 6,
        Isa::Portable => 4,
    }
}

/// The instructions of lanes.
#[inline(always)]
pub(crate) fn isa<L: Lanes>() -> Isa {
    match L::ROWS {
        6 => Isa::Avx512,
        3 => Isa::Avx2,
        _ => Isa::Portable,
    }
}

/// A tile to be computed.
struct TileOf<'a, T> {
    a: &'a [*const T; TILE_ROWS_MAX],
    step: usize,
    b: *const T,
    depth: usize,
    sums: &'a mut Tile<T>,
}

impl TileOf<'_, f32> {
    #[inline(always)]
    fn rows<L: Lanes, const ROWS: usize>(self, lanes: L) {
        let rows: [*const f32; ROWS] = std::array::from_fn(|r| self.a[r]);
        let mut acc = [lanes.zero(); ROWS];
        for p in 0..self.depth {
            // SAFETY: by the promise of `tile`, for all p below depth.
            unsafe {
                let b = lanes.load(self.b.add(p * TILE_COLS));
                for (acc, row) in acc.iter_mut().zip(rows) {
                    *acc = lanes.fma(lanes.splat(*row.add(p * self.step)), b, *acc);
                }
            }
        }
        for (sums, acc) in self.sums.iter_mut().zip(acc) {
            // SAFETY: a row of `sums` takes 16.
            unsafe { lanes.store(sums.as_mut_ptr(), acc) };
        }
    }
}

impl Kernel for TileOf<'_, f32> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match isa::<L>() {
            Isa::Avx512 => self.rows::<L, 8>(lanes),
            Isa::Avx2 => self.rows::<L, 6>(lanes),
            Isa::Portable => self.rows::<L, 4>(lanes),
        }
    }
}

impl Kernel for TileOf<'_, f64> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for (a, sums) in self
            .a
            .iter()
            .zip(self.sums.iter_mut())
            .take(tile_rows::<L>())
        {
            let mut acc = [0.0; TILE_COLS];
            for p in 0..self.depth {
                // SAFETY: by the promise of `tile`, for all p below depth.
                let (a, b) = unsafe {
                    let b = self.b.add(p * TILE_COLS).cast::<[f64; TILE_COLS]>();
                    (*a.add(p * self.step), &*b)
                };
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = a.mul_add(*b, *acc);
                }
            }
            *sums = acc;
        }
    }
}

macro_rules! tiles {
    ($name:ident) => {
        impl sealed::Tiles for $name {
            // One copy of each loop in the program: it is called from many places, for many products each time.
            #[inline(never)]
            unsafe fn tile(
                isa: Isa,
                a: &[*const Self; TILE_ROWS_MAX],
                step: usize,
                b: *const Self,
                depth: usize,
                sums: &mut Tile<Self>,
            ) {
                dispatch(
                    isa,
                    TileOf {
                        a,
                        step,
                        b,
                        depth,
                        sums,
                    },
                );
            }
        }
    };
}
tiles!(f32);
tiles!(f64);

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
