//! Sixteen lanes of f32 on every machine, and the choice of instructions at run time.
//!
//! A kernel is written once, generic over [`Lanes`], and compiled for each [`Isa`]. Loops over plain floats inside a
//! kernel are compiled for the same instructions, and vectorised where that does not change their order.

#![expect(unsafe_code, reason = "vector instructions and raw loads")]

use super::pool::Isa;

/// A vector of 16 f32. Its value proves that the machine has the instructions: only [`dispatch`] makes one.
pub(crate) trait Lanes: Copy {
    type V: Copy;
    /// Room for 24 accumulators beside operands: AVX-512's 32 registers of 16 lanes.
    const WIDE: bool;
    /// Rows of a tile that its registers hold.
    const ROWS: usize;
    fn zero(self) -> Self::V;
    fn splat(self, x: f32) -> Self::V;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// # Safety
    /// 16 f32 can be read there.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// 16 f32 can be written there.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// 32 bf16, woven: elements 0, 2, 4, … are the first 16 and 1, 3, 5, … the second.
    ///
    /// # Safety
    /// 32 u16 can be read there.
    unsafe fn load_bf16(self, from: *const u16) -> (Self::V, Self::V);
    /// 16 bf16, in order.
    ///
    /// # Safety
    /// 16 u16 can be read there.
    unsafe fn load_bf16_16(self, from: *const u16) -> Self::V;
    /// # Safety
    /// 16 i8 can be read there.
    unsafe fn load_i8(self, from: *const i8) -> Self::V;
}

/// A function to be compiled for every instruction set.
pub(crate) trait Kernel {
    /// `#[inline(always)]` in every implementation, or it is compiled for no instructions in particular.
    fn run<L: Lanes>(self, lanes: L);
}

/// Runs a kernel with the given instructions.
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    debug_assert!(isa.is_available());
    match isa {
        Isa::Portable => kernel.run(Portable(())),
        // SAFETY: a pool is made only with instructions that the machine has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::with_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::with_avx512(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("never available"),
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Portable(());

impl Lanes for Portable {
    type V = [f32; 16];
    const WIDE: bool = false;
    const ROWS: usize = 1;
    #[inline(always)]
    fn zero(self) -> [f32; 16] {
        [0.0; 16]
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 16] {
        // SAFETY: by contract.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: [f32; 16]) {
        // SAFETY: by contract.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> ([f32; 16], [f32; 16]) {
        // SAFETY: by contract.
        let all = unsafe { from.cast::<[u16; 32]>().read_unaligned() };
        let at = |i: usize| f32::from_bits(u32::from(all[i]) << 16);
        (
            std::array::from_fn(|i| at(2 * i)),
            std::array::from_fn(|i| at(2 * i + 1)),
        )
    }
    #[inline(always)]
    unsafe fn load_bf16_16(self, from: *const u16) -> [f32; 16] {
        // SAFETY: by contract.
        let all = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        std::array::from_fn(|i| f32::from_bits(u32::from(all[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> [f32; 16] {
        // SAFETY: by contract.
        let all = unsafe { from.cast::<[i8; 16]>().read_unaligned() };
        std::array::from_fn(|i| f32::from(all[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Lanes};

    // SAFETY of the blocks below: a value of the type exists only under `with_…`, on a machine with the instructions;
    // pointers are good by the contracts of `Lanes`.

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn with_avx2<K: Kernel>(kernel: K) {
        kernel.run(Avx2(()));
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) fn with_avx512<K: Kernel>(kernel: K) {
        kernel.run(Avx512(()));
    }

    impl Lanes for Avx512 {
        type V = __m512;
        const WIDE: bool = true;
        const ROWS: usize = 6;
        #[inline(always)]
        fn zero(self) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: __m512) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> (__m512, __m512) {
            // SAFETY: see above.
            unsafe {
                let all = _mm512_loadu_si512(from.cast());
                let low = _mm512_slli_epi32::<16>(all);
                let high = _mm512_and_si512(all, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                (_mm512_castsi512_ps(low), _mm512_castsi512_ps(high))
            }
        }
        #[inline(always)]
        unsafe fn load_bf16_16(self, from: *const u16) -> __m512 {
            // SAFETY: see above.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, from: *const i8) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }
    }

    impl Lanes for Avx2 {
        type V = [__m256; 2];
        const WIDE: bool = false;
        const ROWS: usize = 3;
        #[inline(always)]
        fn zero(self) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe {
                [
                    _mm256_fmadd_ps(a[0], b[0], c[0]),
                    _mm256_fmadd_ps(a[1], b[1], c[1]),
                ]
            }
        }
        #[inline(always)]
        fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: [__m256; 2]) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> ([__m256; 2], [__m256; 2]) {
            // SAFETY: see above.
            unsafe {
                let a = _mm256_loadu_si256(from.cast());
                let b = _mm256_loadu_si256(from.add(16).cast());
                let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let low = [_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b)];
                let high = [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)];
                (
                    [_mm256_castsi256_ps(low[0]), _mm256_castsi256_ps(low[1])],
                    [_mm256_castsi256_ps(high[0]), _mm256_castsi256_ps(high[1])],
                )
            }
        }
        #[inline(always)]
        unsafe fn load_bf16_16(self, from: *const u16) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe {
                let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, from: *const i8) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe {
                let a = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
                let b = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()));
                [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
            }
        }
    }
}

/// Adds up 16 lanes by one fixed tree.
#[inline(always)]
pub(crate) fn tree(mut lanes: [f32; 16]) -> f32 {
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` to about 2 units in the last place; below -87.3 it stays at 1e-38. The same bits on every machine.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the rest is exact.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    // Minimax polynomial of e^r on ±ln(2)/2 (Cephes, expf).
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Numbers in ±1 that depend on the seed alone.
    pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0.0_f64;
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert!(exp(-1000.0) < 1.3e-38 && exp(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }
}
