//! AdamW, with moments in full and in 8 bits, and sums of squares.

#![expect(unsafe_code, reason = "threads write parts of one slice")]

use std::ops::Range;
use std::sync::LazyLock;

use super::super::real::Real;
use super::super::{AdamStep, BLOCK_8BIT};
use super::rows::sum;
use crate::cpu::Pool;
use crate::cpu::pool::Parts;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

/// Elements that one thread takes at a time: whole blocks of the 8-bit form.
const CHUNK: usize = 16 * BLOCK_8BIT;

fn chunks(pool: &Pool, len: usize, job: &(dyn Fn(Range<usize>) + Sync)) {
    pool.each(len.div_ceil(CHUNK), &|chunk| {
        job(chunk * CHUNK..len.min((chunk + 1) * CHUNK));
    });
}

struct Squares<'a, T> {
    x: &'a [T],
    to: &'a mut f64,
}

impl<T: Real> Kernel for Squares<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        *self.to = sum(self.x.len(), |i| (self.x[i], self.x[i])).to_f64();
    }
}

/// Sum of squares: of chunks in their type, of all in f64.
pub(crate) fn sum_squares<T: Real>(pool: &Pool, x: &[T]) -> f64 {
    let mut sums = vec![0.0; x.len().div_ceil(CHUNK)];
    let parts = Parts::new(&mut sums);
    chunks(pool, x.len(), &|range| {
        let at = range.start / CHUNK;
        // SAFETY: each chunk is taken once.
        let to = unsafe { parts.part(at..at + 1) };
        dispatch(
            pool.isa(),
            Squares {
                x: &x[range],
                to: &mut to[0],
            },
        );
    });
    sums.iter().sum()
}

/// Numbers of a step, in the type that is computed in.
#[derive(Clone, Copy)]
pub(crate) struct Numbers<T> {
    pub(crate) beta1: T,
    pub(crate) beta2: T,
    pub(crate) rest1: T,
    pub(crate) rest2: T,
    pub(crate) eps: T,
    pub(crate) keep: T,
    pub(crate) rate: T,
    pub(crate) root: T,
    pub(crate) scale: T,
}

impl<T: Real> Numbers<T> {
    pub(crate) fn new(step: &AdamStep) -> Self {
        let power = step.step as f64;
        let correction1 = 1.0 - step.beta1.powf(power);
        let correction2 = 1.0 - step.beta2.powf(power);
        Self {
            beta1: T::of(step.beta1),
            beta2: T::of(step.beta2),
            rest1: T::of(1.0 - step.beta1),
            rest2: T::of(1.0 - step.beta2),
            eps: T::of(step.eps),
            keep: T::of(1.0 - step.lr * step.weight_decay),
            rate: T::of(step.lr / correction1),
            root: T::of(correction2.sqrt()),
            scale: T::of(step.grad_scale),
        }
    }

    /// New value and moments.
    #[inline(always)]
    fn update(&self, value: T, grad: T, m: T, v: T) -> (T, T, T) {
        let grad = grad * self.scale;
        let m = m * self.beta1 + grad * self.rest1;
        let v = v * self.beta2 + grad * grad * self.rest2;
        let value = value * self.keep - self.rate * m / (v.sqrt() / self.root + self.eps);
        (value, m, v)
    }
}

struct Full<'a, T> {
    numbers: Numbers<T>,
    value: &'a mut [T],
    grad: &'a [T],
    m: &'a mut [T],
    v: &'a mut [T],
}

impl<T: Real> Kernel for Full<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let moments = self.m.iter_mut().zip(self.v);
        for ((value, grad), (m, v)) in self.value.iter_mut().zip(self.grad).zip(moments) {
            (*value, *m, *v) = self.numbers.update(*value, *grad, *m, *v);
        }
    }
}

/// See [`super::super::Backend::adamw`].
pub(crate) fn adamw<T: Real>(
    pool: &Pool,
    step: &AdamStep,
    value: &mut [T],
    grad: &[T],
    m: &mut [T],
    v: &mut [T],
) {
    assert!(value.len() == grad.len() && m.len() == grad.len() && v.len() == grad.len());
    let numbers = Numbers::new(step);
    let (value, m, v) = (Parts::new(value), Parts::new(m), Parts::new(v));
    chunks(pool, grad.len(), &|range| {
        // SAFETY: chunks do not overlap.
        let (value, m, v) = unsafe {
            (
                value.part(range.clone()),
                m.part(range.clone()),
                v.part(range.clone()),
            )
        };
        let grad = &grad[range];
        dispatch(
            pool.isa(),
            Full {
                numbers,
                value,
                grad,
                m,
                v,
            },
        );
    });
}

/// Values that 8 bits name, ascending, and the middles between them: the dynamic map of Dettmers et al. 2022 (8-bit
/// Optimizers via Block-wise Quantization), whose codes are dense near zero: powers of ten times evenly spaced fractions.
struct Map {
    values: [f32; 256],
    middles: [f32; 255],
}

impl Map {
    fn dynamic(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for exponent in 0..7 {
            let items = 1 << if signed { exponent } else { exponent + 1 };
            let size = 10_f64.powi(exponent - 6);
            for item in 0..items {
                // Middles of `items` equal parts of [0.1, 1].
                let value = size * (0.1 + 0.9 * (f64::from(item) + 0.5) / f64::from(items));
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        let values = std::array::from_fn(|i| values[i] as f32);
        Self {
            values,
            middles: std::array::from_fn(|i| f32::midpoint(values[i], values[i + 1])),
        }
    }

    /// The code nearest to `x`; of two, the lower.
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        self.middles.partition_point(|middle| *middle < x) as u8
    }
}

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::dynamic(true));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::dynamic(false));

/// Values and middles of the signed map, then of the other, each filled up to 256.
pub(crate) fn maps() -> Vec<f32> {
    let all = [&*SIGNED, &*UNSIGNED].into_iter();
    all.flat_map(|map| map.values.iter().chain(&map.middles).chain(&[1.0]).copied())
        .collect()
}

/// Moments in 8 bits.
pub(crate) struct Coded<'a, T> {
    pub(crate) m: &'a mut [u8],
    pub(crate) v: &'a mut [u8],
    pub(crate) m_max: &'a mut [T],
    pub(crate) v_max: &'a mut [T],
}

/// See [`super::super::Backend::adamw8`].
pub(crate) fn adamw8<T: Real>(
    pool: &Pool,
    step: &AdamStep,
    value: &mut [T],
    grad: &[T],
    moments: Coded<'_, T>,
) {
    let len = grad.len();
    assert!(value.len() == len && moments.m.len() == len && moments.v.len() == len);
    let numbers = Numbers::new(step);
    let value = Parts::new(value);
    let (m, v) = (Parts::new(moments.m), Parts::new(moments.v));
    let (m_max, v_max) = (Parts::new(moments.m_max), Parts::new(moments.v_max));
    pool.each(len.div_ceil(BLOCK_8BIT), &|block| {
        let range = block * BLOCK_8BIT..len.min((block + 1) * BLOCK_8BIT);
        // SAFETY: blocks do not overlap.
        let (value, coded) = unsafe {
            let coded = Coded {
                m: m.part(range.clone()),
                v: v.part(range.clone()),
                m_max: m_max.part(block..block + 1),
                v_max: v_max.part(block..block + 1),
            };
            (value.part(range.clone()), coded)
        };
        update_block(&numbers, value, &grad[range], coded);
    });
}

fn update_block<T: Real>(numbers: &Numbers<T>, value: &mut [T], grad: &[T], coded: Coded<'_, T>) {
    let (signed, unsigned) = (&*SIGNED, &*UNSIGNED);
    let value_of = |map: &Map, code: u8| T::of(f64::from(map.values[code as usize]));
    let mut m_new = [T::ZERO; BLOCK_8BIT];
    let mut v_new = [T::ZERO; BLOCK_8BIT];
    let (mut m_max, mut v_max) = (T::ZERO, T::ZERO);
    for i in 0..grad.len() {
        let m = value_of(signed, coded.m[i]) * coded.m_max[0];
        let v = value_of(unsigned, coded.v[i]) * coded.v_max[0];
        (value[i], m_new[i], v_new[i]) = numbers.update(value[i], grad[i], m, v);
        m_max = m_max.max(m_new[i].abs());
        v_max = v_max.max(v_new[i]);
    }
    let code = |map: &Map, x: T, max: T| match max > T::ZERO {
        true => map.code((x / max).to_f64() as f32),
        false => map.code(0.0),
    };
    for i in 0..grad.len() {
        coded.m[i] = code(signed, m_new[i], m_max);
        coded.v[i] = code(unsigned, v_new[i], v_max);
    }
    coded.m_max[0] = m_max;
    coded.v_max[0] = v_max;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_256_ascending_values_and_codes_are_nearest() {
        for (map, least) in [(&*SIGNED, -0.992_968_75), (&*UNSIGNED, 0.0)] {
            assert!(map.values.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(
                (f64::from(map.values[0]) - least).abs() < 1e-6,
                "{}",
                map.values[0]
            );
            assert_eq!(map.values[255], 1.0);
            for (code, value) in map.values.iter().enumerate() {
                assert_eq!(map.code(*value) as usize, code);
            }
            assert_eq!(map.values[map.code(0.0) as usize], 0.0);
        }
        // The smallest step above zero: 1e-6 times the middle of [0.1, 1], or of its lower half.
        assert!(
            (SIGNED.values[128] - 0.55e-6).abs() < 1e-12,
            "{}",
            SIGNED.values[128]
        );
        assert!((UNSIGNED.values[1] - 0.325e-6).abs() < 1e-12);
    }

    #[test]
    fn a_step_is_that_of_the_formula_and_sums_do_not_depend_on_threads() {
        let step = AdamStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.5,
            step: 1,
            grad_scale: 0.5,
        };
        let pool = Pool::new(2);
        let (mut value, mut m, mut v) = ([2.0_f64], [0.0], [0.0]);
        adamw(&pool, &step, &mut value, &[3.0], &mut m, &mut v);
        // The first step is the sign of the gradient, whatever its size.
        assert!((value[0] - (2.0 * 0.95 - 0.1)).abs() < 1e-8, "{value:?}");
        assert!((m[0] - 0.15).abs() < 1e-12 && (v[0] - 0.00225).abs() < 1e-12);
        let x = crate::cpu::simd::tests::numbers(9, 3 * CHUNK + 5);
        let exact: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let all = [1, 2, 3].map(|threads| sum_squares(&Pool::new(threads), &x));
        assert!(all[0] == all[1] && all[1] == all[2]);
        assert!((all[0] - exact).abs() < 1e-5 * exact);
    }

    #[test]
    fn moments_in_8_bits_stay_near_those_in_full() {
        let pool = Pool::new(2);
        let len = 1000;
        let start = crate::cpu::simd::tests::numbers(1, len);
        let (mut full, mut eight) = (start.clone(), start.clone());
        let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
        let zero = (SIGNED.code(0.0), UNSIGNED.code(0.0));
        let (mut m8, mut v8) = (vec![zero.0; len], vec![zero.1; len]);
        let (mut m_max, mut v_max) = (vec![0.0_f32; 4], vec![0.0_f32; 4]);
        for step in 1..=30 {
            let grad = crate::cpu::simd::tests::numbers(100 + step, len);
            let step = AdamStep {
                lr: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                step,
                grad_scale: 1.0,
            };
            adamw(&pool, &step, &mut full, &grad, &mut m, &mut v);
            let coded = Coded {
                m: &mut m8,
                v: &mut v8,
                m_max: &mut m_max,
                v_max: &mut v_max,
            };
            adamw8(&pool, &step, &mut eight, &grad, coded);
        }
        let moved: f32 = full.iter().zip(&start).map(|(a, b)| (a - b).abs()).sum();
        let apart: f32 = full.iter().zip(&eight).map(|(a, b)| (a - b).abs()).sum();
        assert!(apart > 0.0 && apart < 0.05 * moved, "{apart} of {moved}");
    }
}
