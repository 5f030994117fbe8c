//! The training ops on the CPU, in f32 on all threads; in f64 they check gradients.

mod arena;
pub(super) mod attention;
mod gemm;
mod loss;
mod moe;
pub(super) mod optimizer;
mod peak;
mod rows;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use half::bf16;

use super::real::Real;
use super::{
    AdamStep, Attended, Backend, BufferId, DeviceFailed, ExpertRoom, ExpertWeights, Form, Heads,
    Kind, Mat, MemoryUse, MoeShape, Moments8, OutOfMemory, Rotation, Routes, Slice, Store,
};
use crate::cpu::Pool;
use arena::Arena;
pub use gemm::PACKED_MAX;
pub use peak::{peak_flops, spin};
use rows::{Table, TableMut, Turning};

/// The CPU, computing in `T`.
pub struct Cpu<T: Real> {
    pool: Arc<Pool>,
    arena: Arena<T>,
    /// Panels of the operand that is multiplied.
    packed: Vec<T>,
    flops: u64,
}

impl<T: Real> Cpu<T> {
    /// With its threads.
    #[must_use]
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            arena: Arena::new(),
            packed: Vec::new(),
            flops: 0,
        }
    }

    /// Numbers as they are, for gradient checks.
    ///
    /// # Panics
    /// When there are none.
    #[must_use]
    pub fn exact(&self, from: Slice) -> &[T] {
        self.arena.slice(from)
    }

    /// The same, to be written.
    ///
    /// # Panics
    /// When there are none.
    pub fn exact_mut(&mut self, buffer: BufferId) -> &mut [T] {
        self.arena.real_mut(buffer)
    }

    fn table(&self, mat: Mat) -> Table<'_, T> {
        Table {
            data: self.arena.mat(mat),
            stride: mat.stride,
            cols: mat.cols,
        }
    }

    fn turning<'a>(&'a self, heads: &Heads, with: &Rotation) -> Turning<'a, T> {
        assert!(with.q_norm.len == heads.dim && with.k_norm.len == heads.dim);
        Turning {
            heads: *heads,
            q_norm: self.arena.slice(with.q_norm),
            k_norm: self.arena.slice(with.k_norm),
            turns: self.arena.real(with.turns),
            positions: self.arena.ids(with.positions),
        }
    }

    fn input(&self, heads: &Heads, with: &Attended) -> attention::Input<'_, T> {
        assert!(with.qk.cols == heads.qk_width() && with.v.cols == heads.kv * heads.dim);
        attention::Input {
            heads: *heads,
            qk: self.table(with.qk),
            v: self.table(with.v),
            tokens: with.qk.rows,
        }
    }

    fn expert_weights(&self, moe: &MoeShape, weights: &ExpertWeights) -> moe::Weights<'_, T> {
        moe::Weights {
            gate_up: self.arena.mat(weights.gate_up),
            down: self.arena.mat(weights.down),
            hidden: weights.gate_up.cols,
            width: moe.width,
        }
    }

    /// Counts multiply-adds.
    fn count(&mut self, products: usize) {
        self.flops += 2 * products as u64;
    }
}

/// A matrix to be written, out of a buffer that was taken.
fn table_mut<T: Real>(taken: &mut arena::Taken<T>, mat: Mat) -> TableMut<'_, T> {
    TableMut::new(taken.mat(mat), mat.stride, mat.cols)
}

impl<T: Real> Backend for Cpu<T> {
    fn element_bytes(&self, kind: Kind) -> u64 {
        Arena::<T>::element_bytes(kind)
    }

    fn weights_are_exact(&self) -> bool {
        true
    }

    fn alloc(&mut self, kind: Kind, len: usize) -> Result<BufferId, OutOfMemory> {
        self.arena.alloc(kind, len, false)
    }

    fn alloc_host(&mut self, kind: Kind, len: usize) -> Result<BufferId, OutOfMemory> {
        self.arena.alloc(kind, len, true)
    }

    fn free(&mut self, buffer: BufferId) {
        self.arena.release(buffer);
    }

    fn memory(&self) -> MemoryUse {
        let mut memory = self.arena.memory();
        memory.device_peak += (self.packed.capacity() * size_of::<T>()) as u64;
        memory
    }

    fn flops(&self) -> u64 {
        self.flops
    }

    fn check(&mut self) -> Result<(), DeviceFailed> {
        Ok(())
    }

    fn write(&mut self, buffer: BufferId, start: usize, values: &[f32]) {
        let to = &mut self.arena.real_mut(buffer)[start..start + values.len()];
        for (to, value) in to.iter_mut().zip(values) {
            *to = T::of(f64::from(*value));
        }
    }

    fn write_bf16(&mut self, buffer: BufferId, start: usize, bytes: &[u8]) {
        let (pairs, _) = bytes.as_chunks::<2>();
        let to = &mut self.arena.real_mut(buffer)[start..start + pairs.len()];
        for (to, pair) in to.iter_mut().zip(pairs) {
            *to = T::of(f64::from(bf16::from_le_bytes(*pair).to_f32()));
        }
    }

    fn write_ids(&mut self, buffer: BufferId, start: usize, values: &[u32]) {
        self.arena.ids_mut(buffer)[start..start + values.len()].copy_from_slice(values);
    }

    fn write_bytes(&mut self, buffer: BufferId, start: usize, values: &[u8]) {
        self.arena.bytes_mut(buffer)[start..start + values.len()].copy_from_slice(values);
    }

    fn read(&mut self, from: Slice) -> Vec<f32> {
        let values = self.arena.slice(from).iter();
        values.map(|value| value.to_f64() as f32).collect()
    }

    fn read_bytes(&mut self, from: Slice) -> Vec<u8> {
        self.arena.bytes(from.buffer)[from.start..from.start + from.len].to_vec()
    }

    fn zero(&mut self, to: Slice) {
        self.arena.real_mut(to.buffer)[to.start..to.start + to.len].fill(T::ZERO);
    }

    fn copy(&mut self, from: Mat, to: Mat) {
        assert!(from.rows == to.rows && from.cols == to.cols);
        let mut taken = self.arena.take(to.buffer);
        let table = self.table(from);
        let out = taken.mat(to);
        for row in 0..from.rows {
            let at = row * to.stride;
            out[at..at + to.cols].copy_from_slice(table.row(row));
        }
        self.arena.put(taken);
    }

    fn round(&mut self, from: Slice, to: Slice) {
        let as_mat = |slice: Slice| Mat::at(slice.buffer, slice.start, 1, slice.len);
        self.copy(as_mat(from), as_mat(to));
    }

    fn offload(&mut self, from: BufferId, to: BufferId) {
        self.arena.swap(from, to);
    }

    fn offloaded(&mut self, _: BufferId) {}

    fn prefetch(&mut self, from: BufferId, to: BufferId) {
        self.arena.swap(from, to);
    }

    fn prefetched(&mut self, _: BufferId) {}

    fn gemm(&mut self, form: Form, scale: f64, a: Mat, b: Mat, to: Mat, store: Store) {
        let (m, k) = match form {
            Form::Tn => (a.cols, a.rows),
            Form::Nn | Form::Nt => (a.rows, a.cols),
        };
        let (n, depth) = match form {
            Form::Nt => (b.rows, b.cols),
            Form::Nn | Form::Tn => (b.cols, b.rows),
        };
        assert!(
            k == depth && to.rows == m && to.cols == n,
            "{form:?}: {a:?} {b:?} {to:?}"
        );
        let mut packed = std::mem::take(&mut self.packed);
        let mut taken = self.arena.take(to.buffer);
        let product = gemm::Product::new(
            form,
            (self.arena.mat(a), a.stride),
            (self.arena.mat(b), b.stride),
            [m, n, k],
            T::of(scale),
            store,
        );
        gemm::gemm(&self.pool, &mut packed, &product, taken.mat(to), to.stride);
        self.arena.put(taken);
        self.packed = packed;
        self.count(m * n * k);
    }

    fn embed(&mut self, ids: BufferId, table: Mat, out: Mat) {
        self.gather(Slice::new(ids, 0, out.rows), table, out);
    }

    fn embed_grad(&mut self, ids: BufferId, d_out: Mat, d_table: Mat) {
        let mut taken = self.arena.take(d_table.buffer);
        let from = self.table(d_out);
        let to = taken.mat(d_table);
        for (row, id) in self.arena.ids(ids)[..d_out.rows].iter().enumerate() {
            let at = *id as usize * d_table.stride;
            for (to, from) in to[at..at + d_table.cols].iter_mut().zip(from.row(row)) {
                *to += *from;
            }
        }
        self.arena.put(taken);
    }

    fn gather(&mut self, rows: Slice, from: Mat, to: Mat) {
        assert!(rows.len == to.rows && from.cols == to.cols);
        let mut taken = self.arena.take(to.buffer);
        let table = self.table(from);
        let out = taken.mat(to);
        let rows = &self.arena.ids(rows.buffer)[rows.start..rows.start + rows.len];
        for (i, row) in rows.iter().enumerate() {
            out[i * to.stride..i * to.stride + to.cols].copy_from_slice(table.row(*row as usize));
        }
        self.arena.put(taken);
    }

    fn scatter(&mut self, rows: Slice, from: Mat, to: Mat) {
        assert!(rows.len == from.rows && from.cols == to.cols);
        let mut taken = self.arena.take(to.buffer);
        let table = self.table(from);
        let out = taken.mat(to);
        let rows = &self.arena.ids(rows.buffer)[rows.start..rows.start + rows.len];
        for (i, row) in rows.iter().enumerate() {
            let at = *row as usize * to.stride;
            out[at..at + to.cols].copy_from_slice(table.row(i));
        }
        self.arena.put(taken);
    }

    fn norm(&mut self, eps: f64, x: Mat, weight: Slice, y: Mat) {
        assert!(x.rows == y.rows && x.cols == y.cols && weight.len == x.cols);
        let mut taken = self.arena.take(y.buffer);
        rows::norm(
            &self.pool,
            x.rows,
            T::of(eps),
            self.table(x),
            self.arena.slice(weight),
            &table_mut(&mut taken, y),
        );
        self.arena.put(taken);
    }

    fn norm_grad(
        &mut self,
        eps: f64,
        x: Mat,
        weight: Slice,
        d_y: Mat,
        d_x: Mat,
        d_weight: Option<Slice>,
    ) {
        assert!(x.cols == d_y.cols && x.cols == d_x.cols && weight.len == x.cols);
        let mut sums = vec![T::ZERO; d_weight.map_or(0, |slice| slice.len)];
        let mut taken = self.arena.take(d_x.buffer);
        rows::norm_grad(
            &self.pool,
            x.rows,
            T::of(eps),
            self.table(x),
            self.arena.slice(weight),
            self.table(d_y),
            &table_mut(&mut taken, d_x),
            &mut sums,
        );
        self.arena.put(taken);
        if let Some(slice) = d_weight {
            self.add(slice, &sums);
        }
    }

    fn rotate(&mut self, heads: &Heads, with: &Rotation, qkv: Mat, qk: Mat) {
        assert!(qkv.cols == heads.qkv_width() && qk.cols == heads.qk_width());
        let mut taken = self.arena.take(qk.buffer);
        rows::rotate(
            &self.pool,
            qk.rows,
            &self.turning(heads, with),
            self.table(qkv),
            &table_mut(&mut taken, qk),
        );
        self.arena.put(taken);
    }

    fn rotate_grad(
        &mut self,
        heads: &Heads,
        with: &Rotation,
        qkv: Mat,
        d_qkv: Mat,
        d_norms: Option<[Slice; 2]>,
    ) {
        assert!(qkv.cols == heads.qkv_width() && d_qkv.cols == heads.qkv_width());
        let mut sums = vec![T::ZERO; 2 * heads.dim];
        let mut taken = self.arena.take(d_qkv.buffer);
        rows::rotate_grad(
            &self.pool,
            qkv.rows,
            &self.turning(heads, with),
            self.table(qkv),
            &table_mut(&mut taken, d_qkv),
            &mut sums,
        );
        self.arena.put(taken);
        if let Some([q, k]) = d_norms {
            self.add(q, &sums[..heads.dim]);
            self.add(k, &sums[heads.dim..]);
        }
    }

    fn attention(&mut self, heads: &Heads, ends: &[usize], with: &Attended) {
        assert_eq!(ends.last(), Some(&with.qk.rows));
        assert!(with.out.cols == heads.q_width() && with.out.rows == with.qk.rows);
        let mut out = self.arena.take(with.out.buffer);
        let mut lse = self.arena.take(with.lse);
        let lse_part = Slice::new(with.lse, 0, heads.q * with.qk.rows);
        attention::forward(
            &self.pool,
            &self.input(heads, with),
            ends,
            out.mat(with.out),
            with.out.stride,
            lse.slice(lse_part),
        );
        self.arena.put(out);
        self.arena.put(lse);
        self.count(2 * attention::pairs(ends) as usize * heads.q_width());
    }

    fn attention_grad(
        &mut self,
        heads: &Heads,
        ends: &[usize],
        with: &Attended,
        d_out: Mat,
        d_qkv: Mat,
    ) {
        assert_eq!(ends.last(), Some(&with.qk.rows));
        assert!(d_qkv.cols == heads.qkv_width() && d_qkv.rows == with.qk.rows);
        let mut taken = self.arena.take(d_qkv.buffer);
        let saved = attention::Saved {
            out: self.table(with.out),
            lse: self.arena.real(with.lse),
            d_out: self.table(d_out),
        };
        attention::backward(
            &self.pool,
            &self.input(heads, with),
            &saved,
            ends,
            taken.mat(d_qkv),
            d_qkv.stride,
        );
        self.arena.put(taken);
        self.count(5 * attention::pairs(ends) as usize * heads.q_width());
    }

    fn swiglu(&mut self, gate_up: Mat, out: Mat) {
        assert!(gate_up.cols == 2 * out.cols && gate_up.rows == out.rows);
        let mut taken = self.arena.take(out.buffer);
        rows::swiglu(
            &self.pool,
            out.rows,
            self.table(gate_up),
            &table_mut(&mut taken, out),
        );
        self.arena.put(taken);
    }

    fn swiglu_grad(&mut self, gate_up: Mat, d_out: Mat) {
        assert!(gate_up.cols == 2 * d_out.cols && gate_up.rows == d_out.rows);
        let mut first = self.arena.take(gate_up.buffer);
        let mut second = self.arena.take(d_out.buffer);
        rows::swiglu_grad(
            &self.pool,
            d_out.rows,
            &table_mut(&mut first, gate_up),
            &table_mut(&mut second, d_out),
        );
        self.arena.put(first);
        self.arena.put(second);
    }

    fn route(&mut self, moe: &MoeShape, logits: Mat, routes: &Routes) {
        assert_eq!(logits.cols, moe.experts);
        let mut weights = self.arena.take(routes.weights);
        let all = Slice::new(routes.weights, 0, logits.rows * moe.top_k);
        let mut ids = vec![0; moe.ids_len(logits.rows)];
        let table = self.table(logits);
        moe::route(moe, logits.rows, table, &mut ids, weights.slice(all));
        self.arena.put(weights);
        self.write_ids(routes.ids, 0, &ids);
    }

    fn route_grad(
        &mut self,
        moe: &MoeShape,
        logits: Mat,
        routes: &Routes,
        d_weights: BufferId,
        d_logits: Mat,
    ) {
        assert!(logits.cols == moe.experts && d_logits.cols == moe.experts);
        let mut taken = self.arena.take(d_logits.buffer);
        moe::route_grad(
            moe,
            logits.rows,
            self.table(logits),
            self.arena.ids(routes.ids),
            self.arena.real(d_weights),
            &table_mut(&mut taken, d_logits),
        );
        self.arena.put(taken);
    }

    fn experts(
        &mut self,
        moe: &MoeShape,
        x: Mat,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        y: Option<Mat>,
    ) {
        let mut packed = std::mem::take(&mut self.packed);
        let mut taken = [gate_up.buffer, room.rows, room.mixed].map(|id| self.arena.take(id));
        let mut out = y.map(|y| self.arena.take(y.buffer));
        let table = match (&mut out, y) {
            (Some(out), Some(y)) => Some(table_mut(out, y)),
            _ => None,
        };
        let [held, rows, mixed] = &mut taken;
        let slots = x.rows * moe.top_k;
        let mut at = moe::Experts {
            pool: &self.pool,
            packed: &mut packed,
            sorted: moe::Sorted::new(moe, x.rows, self.arena.ids(routes.ids)),
            route_weights: self.arena.real(routes.weights),
            weights: self.expert_weights(moe, weights),
            rows: rows.slice(Slice::new(room.rows, 0, slots * x.cols)),
            mixed: mixed.slice(Slice::new(room.mixed, 0, slots * moe.width)),
            gate_up: held.mat(gate_up),
        };
        at.forward(self.table(x), table.as_ref());
        taken
            .into_iter()
            .chain(out)
            .for_each(|taken| self.arena.put(taken));
        self.packed = packed;
        let down = usize::from(y.is_some());
        self.count(slots * moe.width * x.cols * (2 + down));
    }

    fn experts_grad(
        &mut self,
        moe: &MoeShape,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        d_y: Mat,
        d_x: Mat,
        d_weights: BufferId,
    ) {
        let mut packed = std::mem::take(&mut self.packed);
        let mut taken = [gate_up.buffer, room.rows, room.mixed, d_x.buffer, d_weights]
            .map(|id| self.arena.take(id));
        let [held, rows, mixed, out, worth] = &mut taken;
        let slots = d_y.rows * moe.top_k;
        let mut at = moe::Experts {
            pool: &self.pool,
            packed: &mut packed,
            sorted: moe::Sorted::new(moe, d_y.rows, self.arena.ids(routes.ids)),
            route_weights: self.arena.real(routes.weights),
            weights: self.expert_weights(moe, weights),
            rows: rows.slice(Slice::new(room.rows, 0, slots * d_y.cols)),
            mixed: mixed.slice(Slice::new(room.mixed, 0, slots * moe.width)),
            gate_up: held.mat(gate_up),
        };
        let worth = worth.slice(Slice::new(d_weights, 0, slots));
        at.backward(self.table(d_y), &table_mut(out, d_x), worth);
        taken.into_iter().for_each(|taken| self.arena.put(taken));
        self.packed = packed;
        self.count(slots * moe.width * d_y.cols * 3);
    }

    fn cross_entropy(
        &mut self,
        logits: Mat,
        classes: usize,
        targets: Slice,
        losses: Slice,
        grad: Option<f64>,
    ) {
        assert!(targets.len == logits.rows && losses.len == logits.rows);
        assert!((1..=logits.cols).contains(&classes));
        let mut taken = self.arena.take(logits.buffer);
        let mut out = self.arena.take(losses.buffer);
        let ids = &self.arena.ids(targets.buffer)[targets.start..targets.start + targets.len];
        loss::cross_entropy(
            &self.pool,
            &table_mut(&mut taken, logits),
            classes,
            ids,
            out.slice(losses),
            grad.map(T::of),
        );
        self.arena.put(taken);
        self.arena.put(out);
    }

    fn sum_squares(&mut self, of: Slice) -> f64 {
        optimizer::sum_squares(&self.pool, self.arena.slice(of))
    }

    fn adamw(&mut self, step: &AdamStep, value: Slice, grad: Slice, m: Slice, v: Slice) {
        let mut taken = [value, m, v].map(|slice| self.arena.take(slice.buffer));
        let [values, ms, vs] = &mut taken;
        let grads = self.arena.slice(grad);
        optimizer::adamw(
            &self.pool,
            step,
            values.slice(value),
            grads,
            ms.slice(m),
            vs.slice(v),
        );
        for taken in taken {
            self.arena.put(taken);
        }
    }

    fn adamw8(&mut self, step: &AdamStep, value: Slice, grad: Slice, moments: &Moments8) {
        let mut m = self.read_bytes(moments.m);
        let mut v = self.read_bytes(moments.v);
        let exact = [value, moments.m_max, moments.v_max];
        let mut taken = exact.map(|slice| self.arena.take(slice.buffer));
        let [values, m_max, v_max] = &mut taken;
        let coded = optimizer::Coded {
            m: &mut m,
            v: &mut v,
            m_max: m_max.slice(moments.m_max),
            v_max: v_max.slice(moments.v_max),
        };
        let grads = self.arena.slice(grad);
        optimizer::adamw8(&self.pool, step, values.slice(value), grads, coded);
        for taken in taken {
            self.arena.put(taken);
        }
        self.write_bytes(moments.m.buffer, moments.m.start, &m);
        self.write_bytes(moments.v.buffer, moments.v.start, &v);
    }
}

impl<T: Real> Cpu<T> {
    fn add(&mut self, to: Slice, values: &[T]) {
        assert_eq!(to.len, values.len());
        let to = &mut self.arena.real_mut(to.buffer)[to.start..to.start + to.len];
        for (to, value) in to.iter_mut().zip(values) {
            *to += *value;
        }
    }
}
