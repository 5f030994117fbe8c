//! Ops on single rows: RMSNorm with and without a residual, sums, SiLU·mul.

#![expect(unsafe_code, reason = "threads write rows of one slice")]

use super::pool::{Parts, Pool};
use super::simd::{Kernel, Lanes, dispatch, exp, tree};

/// Sum of squares in 16 lanes by `index % 16`.
#[inline(always)]
pub(crate) fn square_sum(row: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(*x, *lane);
    }
    tree(lanes)
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    1.0 / (square_sum(row) / row.len() as f32 + eps).sqrt()
}

struct Norm<'a> {
    x: &'a mut [f32],
    delta: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let width = self.weight.len();
        let rows = self.x.chunks_mut(width).zip(self.out.chunks_mut(width));
        for (row, (x, out)) in rows.enumerate() {
            if let Some(delta) = self.delta {
                for (x, d) in x.iter_mut().zip(&delta[row * width..]) {
                    *x += d;
                }
            }
            let scale = inverse_rms(x, self.eps);
            for ((out, x), w) in out.iter_mut().zip(&*x).zip(self.weight) {
                *out = w * (x * scale);
            }
        }
    }
}

/// `x += delta`, then `out = weight · x / rms(x)`, on rows of `weight.len()`.
///
/// # Panics
/// When the lengths differ.
pub fn add_rms_norm(
    pool: &Pool,
    x: &mut [f32],
    delta: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert!(x.len() == out.len() && delta.is_none_or(|d| d.len() == x.len()));
    let width = weight.len();
    let rows = x.len() / width;
    let (x, out) = (Parts::new(x), Parts::new(out));
    pool.split(rows, &|range| {
        let range = range.start * width..range.end * width;
        // SAFETY: shares do not overlap.
        let (x, out) = unsafe { (x.part(range.clone()), out.part(range.clone())) };
        let delta = delta.map(|d| &d[range]);
        dispatch(
            pool.isa(),
            Norm {
                x,
                delta,
                weight,
                eps,
                out,
            },
        );
    });
}

/// `out = weight · x / rms(x)`, on rows of `weight.len()`.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm(pool: &Pool, x: &mut [f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    add_rms_norm(pool, x, None, weight, eps, out);
}

/// `x += delta`.
///
/// # Panics
/// When the lengths differ.
pub fn add(x: &mut [f32], delta: &[f32]) {
    assert_eq!(x.len(), delta.len());
    for (x, d) in x.iter_mut().zip(delta) {
        *x += d;
    }
}

struct Silu<'a> {
    gate_up: &'a [f32],
    out: &'a mut [f32],
    width: usize,
}

impl Kernel for Silu<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let rows = self.gate_up.chunks(2 * self.width);
        for (gate_up, out) in rows.zip(self.out.chunks_mut(self.width)) {
            let (gate, up) = gate_up.split_at(self.width);
            for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                *out = g / (1.0 + exp(-g)) * u;
            }
        }
    }
}

/// `out = silu(gate) · up`, where a row of `gate_up` is `width` of gate, then `width` of up.
///
/// # Panics
/// When the lengths do not fit.
pub fn silu_mul(pool: &Pool, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    let rows = out.len() / width;
    let out = Parts::new(out);
    pool.split(rows, &|range| {
        // SAFETY: shares do not overlap.
        let out = unsafe { out.part(range.start * width..range.end * width) };
        let gate_up = &gate_up[range.start * 2 * width..range.end * 2 * width];
        dispatch(
            pool.isa(),
            Silu {
                gate_up,
                out,
                width,
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::simd::tests::numbers;

    #[test]
    fn norm_is_that_of_f64_and_the_same_on_all_instructions() {
        for width in [128, 100, 7] {
            let (x, d, w) = (
                numbers(1, 5 * width),
                numbers(2, 5 * width),
                numbers(3, width),
            );
            let mut first: Option<Vec<f32>> = None;
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                if !isa.is_available() {
                    continue;
                }
                let (mut sum, mut out) = (x.clone(), vec![0.0; 5 * width]);
                add_rms_norm(
                    &Pool::with_isa(2, isa),
                    &mut sum,
                    Some(&d),
                    &w,
                    1e-6,
                    &mut out,
                );
                for row in 0..5 {
                    let at = row * width..(row + 1) * width;
                    let xs: Vec<f64> = x[at.clone()]
                        .iter()
                        .zip(&d[at.clone()])
                        .map(|(x, d)| f64::from(*x) + f64::from(*d))
                        .collect();
                    let mean = xs.iter().map(|x| x * x).sum::<f64>() / width as f64;
                    for ((x, w), out) in xs.iter().zip(&w).zip(&out[at]) {
                        let exact = x / (mean + 1e-6).sqrt() * f64::from(*w);
                        assert!((exact - f64::from(*out)).abs() < 1e-6, "{exact} {out}");
                    }
                }
                assert_eq!(*first.get_or_insert_with(|| out.clone()), out);
            }
        }
    }

    #[test]
    fn silu_is_that_of_f64() {
        let x: Vec<f32> = numbers(4, 2 * 60).iter().map(|x| x * 30.0).collect();
        let mut out = vec![0.0; 60];
        silu_mul(&Pool::new(2), &x, 20, &mut out);
        for (i, out) in out.iter().enumerate() {
            let at = i / 20 * 40 + i % 20;
            let (g, u) = (f64::from(x[at]), f64::from(x[at + 20]));
            let exact = g / (1.0 + (-g).exp()) * u;
            assert!((exact - f64::from(*out)).abs() <= 1e-6 * exact.abs() + 1e-9);
        }
    }
}
