//! Mixture of experts for training: routes, and frozen experts forward and backward.

#![expect(unsafe_code, reason = "threads write rows of one slice")]

use super::super::real::Real;
use super::super::{Form, MoeShape, Store};
use super::gemm::{Product, gemm};
use super::rows::{Table, TableMut, blocks, sigmoid, sum, swiglu};
use crate::cpu::Pool;
use crate::cpu::pool::Parts;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

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
    fn gather<T: Real>(&self, from: Table<'_, T>, to: &mut [T]) {
        for (place, to) in to.chunks_mut(from.cols).enumerate() {
            to.copy_from_slice(from.row(self.token(place)));
        }
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

/// A layer's experts at work. Rows lie by expert.
pub(crate) struct Experts<'a, T> {
    pub(crate) pool: &'a Pool,
    pub(crate) packed: &'a mut Vec<T>,
    pub(crate) sorted: Sorted<'a>,
    /// Of each slot.
    pub(crate) route_weights: &'a [T],
    pub(crate) weights: Weights<'a, T>,
    /// `[slots, hidden]`.
    pub(crate) rows: &'a mut [T],
    /// `[slots, width]`.
    pub(crate) mixed: &'a mut [T],
    /// `[slots, 2 · width]`.
    pub(crate) gate_up: &'a mut [T],
}

/// `y = x · W` or `x · Wᵀ` for the rows of each expert; `w` holds `[n, k]` or `[k, n]` matrices one under the other.
fn grouped<T: Real>(
    (pool, packed, sorted): (&Pool, &mut Vec<T>, &Sorted<'_>),
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

impl<T: Real> Experts<'_, T> {
    /// See [`super::super::Backend::experts`].
    pub(crate) fn forward(&mut self, x: Table<'_, T>, y: Option<&TableMut<'_, T>>) {
        let (hidden, width) = (self.weights.hidden, self.weights.width);
        self.sorted.gather(x, self.rows);
        grouped(
            (self.pool, self.packed, &self.sorted),
            Form::Nt,
            (self.rows, hidden),
            self.weights.gate_up,
            (self.gate_up, 2 * width),
        );
        let Some(y) = y else { return };
        let table = Table {
            data: &*self.gate_up,
            stride: 2 * width,
            cols: 2 * width,
        };
        let slots = self.sorted.slots.len();
        let mixed = TableMut::new(self.mixed, width, width);
        swiglu(self.pool, slots, table, &mixed);
        grouped(
            (self.pool, self.packed, &self.sorted),
            Form::Nt,
            (self.mixed, width),
            self.weights.down,
            (self.rows, hidden),
        );
        let weights = Some(self.route_weights);
        self.sorted.add_up(self.pool, self.rows, hidden, weights, y);
    }

    /// See [`super::super::Backend::experts_grad`].
    pub(crate) fn backward(
        &mut self,
        d_y: Table<'_, T>,
        d_x: &TableMut<'_, T>,
        d_weights: &mut [T],
    ) {
        let (hidden, width) = (self.weights.hidden, self.weights.width);
        self.sorted.gather(d_y, self.rows);
        grouped(
            (self.pool, self.packed, &self.sorted),
            Form::Nn,
            (self.rows, hidden),
            self.weights.down,
            (self.mixed, width),
        );
        let gate_up = Parts::new(self.gate_up);
        let d_weights = Parts::new(d_weights);
        blocks(self.pool, self.sorted.slots.len(), &|_, places| {
            let slots = &self.sorted.slots[places.clone()];
            let d_mixed = &self.mixed[places.start * width..places.end * width];
            // SAFETY: each place is one block's.
            let gate_up = unsafe { gate_up.part(places.start * 2 * width..places.end * 2 * width) };
            dispatch(
                self.pool.isa(),
                MixedGrad {
                    slots,
                    weights: self.route_weights,
                    d_mixed,
                    gate_up,
                    d_weights: &d_weights,
                    width,
                },
            );
        });
        grouped(
            (self.pool, self.packed, &self.sorted),
            Form::Nn,
            (self.gate_up, 2 * width),
            self.weights.gate_up,
            (self.rows, hidden),
        );
        self.sorted.add_up(self.pool, self.rows, hidden, None, d_x);
    }
}

/// Gradients of gate and up, and what each slot's weight is worth. That needs no further product: d_y · (down · mixed) is
/// (downᵀ · d_y) · mixed.
struct MixedGrad<'a, T> {
    slots: &'a [u32],
    weights: &'a [T],
    d_mixed: &'a [T],
    gate_up: &'a mut [T],
    d_weights: &'a Parts<'a, T>,
    width: usize,
}

impl<T: Real> Kernel for MixedGrad<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let rows = self.gate_up.chunks_exact_mut(2 * self.width);
        let rows = rows.zip(self.d_mixed.chunks_exact(self.width));
        for ((gate_up, d_mixed), slot) in rows.zip(self.slots) {
            let slot = *slot as usize;
            let weight = self.weights[slot];
            let (gate, up) = gate_up.split_at_mut(self.width);
            let worth = sum(self.width, |i| {
                (d_mixed[i], gate[i] * sigmoid(gate[i]) * up[i])
            });
            // SAFETY: each slot has one place.
            let to = unsafe { self.d_weights.part(slot..slot + 1) };
            to[0] = worth;
            for ((gate, up), d) in gate.iter_mut().zip(up).zip(d_mixed) {
                let (g, u, d) = (*gate, *up, *d * weight);
                let s = sigmoid(g);
                let silu = g * s;
                *up = d * silu;
                *gate = d * u * (s + silu * (T::ONE - s));
            }
        }
    }
}
