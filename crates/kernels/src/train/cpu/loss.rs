//! Cross entropy of rows of logits, and its gradient in place.

#![expect(unsafe_code, reason = "threads write rows of one slice")]

use std::ops::Range;

use super::super::real::Real;
use super::rows::{TableMut, blocks, sum};
use crate::cpu::Pool;
use crate::cpu::pool::Parts;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

struct CrossEntropy<'a, T> {
    rows: Range<usize>,
    logits: &'a TableMut<'a, T>,
    classes: usize,
    targets: &'a [u32],
    losses: &'a Parts<'a, T>,
    grad: Option<T>,
}

impl<T: Real> Kernel for CrossEntropy<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for row in self.rows {
            // SAFETY: each row is one block's.
            let (all, loss) = unsafe { (self.logits.row(row), self.losses.part(row..row + 1)) };
            let (logits, rest) = all.split_at_mut(self.classes);
            let target = self.targets[row] as usize;
            let most = largest(logits);
            let wanted = logits[target] - most;
            for x in logits.iter_mut() {
                *x = (*x - most).exp();
            }
            let total = sum(logits.len(), |i| (logits[i], T::ONE));
            loss[0] = total.ln() - wanted;
            if let Some(grad) = self.grad {
                let share = grad / total;
                for x in logits.iter_mut() {
                    *x *= share;
                }
                logits[target] = logits[target] - grad;
                rest.fill(T::ZERO);
            }
        }
    }
}

/// The largest; NaN where there is one, so that it shows.
#[inline(always)]
fn largest<T: Real>(row: &[T]) -> T {
    let mut lanes = [row[0]; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if *x > *lane { *x } else { *lane };
    }
    lanes
        .into_iter()
        .fold(row[0], |a, b| if b > a { b } else { a })
}

/// See [`super::super::Backend::cross_entropy`].
pub(crate) fn cross_entropy<T: Real>(
    pool: &Pool,
    logits: &TableMut<'_, T>,
    classes: usize,
    targets: &[u32],
    losses: &mut [T],
    grad: Option<T>,
) {
    let losses = Parts::new(losses);
    blocks(pool, targets.len(), &|_, rows| {
        dispatch(
            pool.isa(),
            CrossEntropy {
                rows,
                logits,
                classes,
                targets,
                losses: &losses,
                grad,
            },
        );
    });
}
