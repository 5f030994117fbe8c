//! Mixture of experts for training: routes, and frozen experts forward and backward.

#![expect(unsafe_code, reason = "threads write rows of one slice")]

use super::super::real::Real;
use super::super::{Form, MoeShape, Store};
use super::gemm::{Product, gemm};
use super::rows::{Table, TableMut, blocks, sum, swiglu, swiglu_grad};
use crate::cpu::Pool;
use crate::cpu::pool::Parts;

/// Softmax of a row of logits.
fn softmax<T: Real>(logits: &[T]) -> Vec<T> {
    let most = logits.iter().fold(T::LOWEST, |a, b| a.max(*b));
    let parts: Vec<T> = logits.iter().map(|x| (*x - most).exp()).collect();
    let total = parts.iter().fold(T::ZERO, |a, b| a + *b);
    parts.into_iter().map(|x| x / total).collect()
}

/// See [`super::super::Backend::route`]. `ids` and `weights` are laid out as [`super::super::Routes`] says.
pub(crate) fn route<T: Real>(
    moe: &MoeShape,
    tokens: usize,
    logits: Table<'_, T>,
    ids: &mut [u32],
    weights: &mut [T],
) {
    let slots = tokens * moe.top_k;
    let mut order: Vec<u32> = Vec::with_capacity(moe.experts);
    for token in 0..tokens {
        let parts = softmax(logits.row(token));
        order.clear();
        order.extend(0..moe.experts as u32);
        // Of equals, and of what is not a number, the lower index.
        order.sort_by(|a, b| {
            let (x, y) = (parts[*a as usize].to_f64(), parts[*b as usize].to_f64());
            y.total_cmp(&x).then(a.cmp(b))
        });
        let chosen = &mut order[..moe.top_k];
        chosen.sort_unstable();
        let kept = chosen
            .iter()
            .fold(T::ZERO, |sum, e| sum + parts[*e as usize]);
        let divisor = if moe.renormalise { kept } else { T::ONE };
        for (choice, expert) in chosen.iter().enumerate() {
            ids[token * moe.top_k + choice] = *expert;
            weights[token * moe.top_k + choice] = parts[*expert as usize] / divisor;
        }
    }
    let (experts, rest) = ids.split_at_mut(slots);
    let (sorted, starts) = rest.split_at_mut(slots);
    for (slot, sorted) in sorted.iter_mut().enumerate() {
        *sorted = slot as u32;
    }
    sorted.sort_by_key(|slot| (experts[*slot as usize], *slot));
    for (expert, start) in starts.iter_mut().enumerate().take(moe.experts + 1) {
        *start = sorted.partition_point(|slot| (experts[*slot as usize] as usize) < expert) as u32;
    }
}

/// See [`super::super::Backend::route_grad`].
pub(crate) fn route_grad<T: Real>(
    moe: &MoeShape,
    tokens: usize,
    logits: Table<'_, T>,
    ids: &[u32],
    d_weights: &[T],
    d_logits: &TableMut<'_, T>,
) {
    for token in 0..tokens {
        let slots = token * moe.top_k..(token + 1) * moe.top_k;
        let mut parts = softmax(logits.row(token));
        if moe.renormalise {
            // The chosen alone share the weight: a softmax among themselves.
            let mut among = vec![T::ZERO; moe.experts];
            let chosen = &ids[slots.clone()];
            let kept = chosen
                .iter()
                .fold(T::ZERO, |sum, e| sum + parts[*e as usize]);
            for expert in chosen {
                among[*expert as usize] = parts[*expert as usize] / kept;
            }
            parts = among;
        }
        let mut d_parts = vec![T::ZERO; moe.experts];
        for slot in slots {
            d_parts[ids[slot] as usize] = d_weights[slot];
        }
        let mean = sum(moe.experts, |i| (d_parts[i], parts[i]));
        // SAFETY: one thread.
        let out = unsafe { d_logits.row(token) };
        for ((out, part), d) in out.iter_mut().zip(&parts).zip(&d_parts) {
            *out = *part * (*d - mean);
        }
    }
}

/// Slots by expert, as [`super::super::Routes::ids`] has them.
pub(crate) struct Sorted<'a> {
    slots: &'a [u32],
    starts: &'a [u32],
    top_k: usize,
}

impl<'a> Sorted<'a> {
    pub(crate) fn new(moe: &MoeShape, tokens: usize, ids: &'a [u32]) -> Self {
        let slots = tokens * moe.top_k;
        Self {
            slots: &ids[slots..2 * slots],
            starts: &ids[2 * slots..2 * slots + moe.experts + 1],
            top_k: moe.top_k,
        }
    }

    fn token(&self, place: usize) -> usize {
        self.slots[place] as usize / self.top_k
    }

    /// Where each slot is among the sorted.
    fn places(&self) -> Vec<usize> {
        let mut places = vec![0; self.slots.len()];
        for (place, slot) in self.slots.iter().enumerate() {
            places[*slot as usize] = place;
        }
        places
    }

    /// Rows of a token's table, by expert.
    fn gather<T: Real>(&self, from: Table<'_, T>) -> Vec<T> {
        let mut to = Vec::with_capacity(self.slots.len() * from.cols);
        for place in 0..self.slots.len() {
            to.extend_from_slice(from.row(self.token(place)));
        }
        to
    }

    /// `y[token] += weight · rows[place]` over the token's choices, ascending; all weights are 1 where there are none.
    fn add_up<T: Real>(
        &self,
        pool: &Pool,
        rows: &[T],
        width: usize,
        weights: Option<&[T]>,
        y: &TableMut<'_, T>,
    ) {
        let places = self.places();
        blocks(pool, places.len() / self.top_k, &|_, tokens| {
            for token in tokens {
                // SAFETY: each row is one block's.
                let y = unsafe { y.row(token) };
                for slot in token * self.top_k..(token + 1) * self.top_k {
                    let weight = weights.map_or(T::ONE, |weights| weights[slot]);
                    let row = &rows[places[slot] * width..(places[slot] + 1) * width];
                    for (y, x) in y.iter_mut().zip(row) {
                        *y += weight * *x;
                    }
                }
            }
        });
    }
}

/// Matrices of a layer's experts.
pub(crate) struct Weights<'a, T> {
    pub(crate) gate_up: &'a [T],
    pub(crate) down: &'a [T],
    pub(crate) hidden: usize,
    pub(crate) width: usize,
}

/// `y = x · W` or `x · Wᵀ` for the rows of each expert; `w` holds `[n, k]` or `[k, n]` matrices one under the other.
fn grouped<T: Real>(
    pool: &Pool,
    packed: &mut Vec<T>,
    sorted: &Sorted<'_>,
    form: Form,
    (x, k): (&[T], usize),
    w: &[T],
    (y, n): (&mut [T], usize),
) {
    for (expert, range) in sorted.starts.windows(2).enumerate() {
        let (from, to) = (range[0] as usize, range[1] as usize);
        let w = &w[expert * n * k..(expert + 1) * n * k];
        let stride = if form == Form::Nt { k } else { n };
        let product = Product::new(
            form,
            (&x[from * k..to * k], k),
            (w, stride),
            [to - from, n, k],
            T::ONE,
            Store::Set,
        );
        gemm(pool, packed, &product, &mut y[from * n..to * n], n);
    }
}

/// See [`super::super::Backend::experts`]. Gives the bytes of what it took for itself.
#[expect(clippy::too_many_arguments, reason = "one op's operands")]
pub(crate) fn experts<T: Real>(
    pool: &Pool,
    packed: &mut Vec<T>,
    sorted: &Sorted<'_>,
    route_weights: &[T],
    weights: &Weights<'_, T>,
    x: Table<'_, T>,
    gate_up: &mut [T],
    y: Option<&TableMut<'_, T>>,
) {
    let (hidden, width) = (weights.hidden, weights.width);
    let slots = sorted.slots.len();
    let mut rows = sorted.gather(x);
    let form = Form::Nt;
    grouped(
        pool,
        packed,
        sorted,
        form,
        (&rows, hidden),
        weights.gate_up,
        (gate_up, 2 * width),
    );
    let Some(y) = y else { return };
    let mut mixed = vec![T::ZERO; slots * width];
    let table = Table {
        data: gate_up,
        stride: 2 * width,
        cols: 2 * width,
    };
    swiglu(pool, slots, table, &TableMut::new(&mut mixed, width, width));
    grouped(
        pool,
        packed,
        sorted,
        form,
        (&mixed, width),
        weights.down,
        (&mut rows, hidden),
    );
    sorted.add_up(pool, &rows, hidden, Some(route_weights), y);
}

/// See [`super::super::Backend::experts_grad`].
#[expect(clippy::too_many_arguments, reason = "one op's operands")]
pub(crate) fn experts_grad<T: Real>(
    pool: &Pool,
    packed: &mut Vec<T>,
    sorted: &Sorted<'_>,
    route_weights: &[T],
    weights: &Weights<'_, T>,
    d_y: Table<'_, T>,
    gate_up: &mut [T],
    d_x: &TableMut<'_, T>,
    d_weights: &mut [T],
) {
    let (hidden, width) = (weights.hidden, weights.width);
    let slots = sorted.slots.len();
    let mut rows = sorted.gather(d_y);
    let mut d_mixed = vec![T::ZERO; slots * width];
    let form = Form::Nn;
    grouped(
        pool,
        packed,
        sorted,
        form,
        (&rows, hidden),
        weights.down,
        (&mut d_mixed, width),
    );
    // What a slot's weight is worth needs no further product: d_y · (down · mixed) is (downᵀ · d_y) · mixed.
    let raw = d_mixed.clone();
    for (place, row) in d_mixed.chunks_mut(width).enumerate() {
        let weight = route_weights[sorted.slots[place] as usize];
        row.iter_mut().for_each(|x| *x *= weight);
    }
    let table = TableMut::new(gate_up, 2 * width, 2 * width);
    swiglu_grad(
        pool,
        slots,
        &table,
        &TableMut::new(&mut d_mixed, width, width),
    );
    let d_weights = Parts::new(d_weights);
    blocks(pool, slots, &|_, places| {
        for place in places {
            let at = place * width..(place + 1) * width;
            let (raw, mixed) = (&raw[at.clone()], &d_mixed[at]);
            let slot = sorted.slots[place] as usize;
            // SAFETY: each slot has one place.
            let to = unsafe { d_weights.part(slot..slot + 1) };
            to[0] = sum(width, |i| (raw[i], mixed[i]));
        }
    });
    grouped(
        pool,
        packed,
        sorted,
        form,
        (gate_up, 2 * width),
        weights.gate_up,
        (&mut rows, hidden),
    );
    sorted.add_up(pool, &rows, hidden, None, d_x);
}
