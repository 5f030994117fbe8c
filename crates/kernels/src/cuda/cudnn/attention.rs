//! Causal attention within documents, as graphs that cuDNN knows: what follows is the order of nodes that it matches.
//!
//! A plan is for so many documents of at most so many tokens. Where each begins, and how long it is, it reads when it runs;
//! rows of other documents are neither read nor written. An empty document is none.
//!
//! The backward is the one whose results repeat: it keeps the gradients of all scores, so its scratch memory grows with
//! the square of the length. The one that adds up gradients of q with atomics needs little, and differs from run to run.

#![expect(unsafe_code, reason = "plans run on memory by address")]

use super::Cudnn;
use super::graph::{Each, Graph, Layout, Number, Of, Sizes, Tensor};
use super::plan::Plan;
use crate::cuda::error::CudaError;

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Documents, empty ones included.
    pub(crate) documents: usize,
    /// The most tokens of one: whole tiles.
    pub(crate) longest: usize,
    /// Heads of q, of k and v, and elements of a head.
    pub(crate) heads: [usize; 3],
    /// From one row to the next, in elements.
    pub(crate) strides: Strides,
}

/// From one row to the next, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Strides {
    /// Of q and k.
    pub(crate) qk: usize,
    /// Of v.
    pub(crate) v: usize,
    /// Of what attention gives.
    pub(crate) out: usize,
    /// Of each row's log-sum-exp: all heads, also those that are not of the plan.
    pub(crate) lse: usize,
    /// Of the gradient of `out`; forward: 0.
    pub(crate) d_out: usize,
    /// Of the gradients of q, k and v; forward: 0.
    pub(crate) d_qkv: usize,
}

/// Rows of a tile: lengths of plans are multiples.
pub(crate) const TILE: usize = 128;

impl Shape {
    fn rows(&self, heads: usize, stride: usize) -> Layout {
        let [documents, tokens, stride, dim] =
            [self.documents, self.longest, stride, self.heads[2]].map(|n| n as i64);
        Layout {
            sizes: [documents, heads as i64, tokens, dim],
            strides: [tokens * stride, dim, stride, 1],
        }
    }

    fn lse(&self) -> Layout {
        let [documents, heads, tokens, stride] = [
            self.documents,
            self.heads[0],
            self.longest,
            self.strides.lse,
        ]
        .map(|n| n as i64);
        Layout {
            sizes: [documents, heads, tokens, 1],
            strides: [tokens * stride, 1, stride, 1],
        }
    }

    /// A score of each query and key.
    fn scores(&self) -> Layout {
        let [documents, heads, tokens] =
            [self.documents, self.heads[0], self.longest].map(|n| n as i64);
        Layout::dense([documents, heads, tokens, tokens])
    }

    /// A number a document.
    fn numbers(&self, more: usize) -> Layout {
        Layout::dense([(self.documents + more) as i64, 1, 1, 1])
    }

    /// Floats that the backward keeps outside cuDNN's scratch memory.
    pub(crate) fn deltas(&self) -> usize {
        self.documents * self.heads[0] * self.longest
    }

    /// All memory that the backward needs for itself, as cuDNN 9.19 takes it: a gradient of each score, `deltas`, and where
    /// heads share keys, gradients of k and v for each head of q.
    pub(crate) fn backward_bytes(&self) -> usize {
        let [q, kv, dim] = self.heads;
        let shared = if q == kv { 0 } else { 4 * dim };
        self.documents * q * self.longest * (2 * self.longest + shared + 4)
    }
}

/// What a plan is given the address of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Q,
    K,
    V,
    Out,
    /// `[tokens, heads]`, fp32, to base e.
    Lse,
    /// Tokens of each document: 32 bits.
    Lengths,
    /// Where each document begins, and where the last ends, in elements: 64 bits; of q and k.
    QkOffsets,
    VOffsets,
    OutOffsets,
    LseOffsets,
    DOut,
    DQ,
    DK,
    DV,
    DOutOffsets,
    DQkvOffsets,
    /// Room for [`Shape::deltas`].
    Delta,
}

/// Attention of one shape, forward or backward.
pub(crate) struct Attention {
    plan: Plan,
    parts: Vec<(Part, Tensor)>,
}

impl Attention {
    /// Plans the forward. Writes [`Part::Out`] and [`Part::Lse`].
    pub(crate) fn forward(cudnn: &Cudnn, shape: &Shape) -> Result<Self, CudaError> {
        let mut making = Making::new(shape)?;
        making.mix()?;
        making.plan(cudnn, "attention")
    }

    /// Plans the backward. Writes [`Part::DQ`], [`Part::DK`] and [`Part::DV`].
    pub(crate) fn backward(cudnn: &Cudnn, shape: &Shape) -> Result<Self, CudaError> {
        let mut making = Making::new(shape)?;
        making.gradients()?;
        making.plan(cudnn, "attention's backward")
    }

    /// Scratch memory that a run needs.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.plan.scratch_bytes
    }

    /// Launches it.
    ///
    /// # Safety
    /// `address` must give each part memory of the device that lives until what was launched has run: documents by these
    /// offsets and lengths lie within it, by the shape's strides, and are no longer than the shape's longest. `scratch` must
    /// have as many bytes as `scratch_bytes`.
    pub(crate) unsafe fn run(
        &self,
        cudnn: &Cudnn,
        address: impl Fn(Part) -> u64,
        scratch: u64,
    ) -> Result<(), CudaError> {
        let at = self.parts.iter();
        let at: Vec<(Tensor, u64)> = at.map(|(part, tensor)| (*tensor, address(*part))).collect();
        // SAFETY: passed on.
        unsafe { self.plan.run(cudnn, &at, scratch) }
    }
}

/// A graph in the making.
struct Making<'a> {
    graph: Graph,
    shape: &'a Shape,
    parts: Vec<(Part, Tensor)>,
    /// Of queries and of keys: the same numbers, which cuDNN wants told twice.
    lengths: [Tensor; 2],
    scale: Tensor,
}

impl<'a> Making<'a> {
    fn new(shape: &'a Shape) -> Result<Self, CudaError> {
        let mut graph = Graph::default();
        let mut lengths = |name| graph.outer(name, Number::I32, shape.numbers(0));
        let lengths = [lengths("lengths of queries")?, lengths("lengths of keys")?];
        let scale = 1.0 / (shape.heads[2] as f64).sqrt();
        let scale = graph.constant("scale", scale as f32)?;
        let parts = lengths.map(|tensor| (Part::Lengths, tensor)).into();
        Ok(Self {
            graph,
            shape,
            parts,
            lengths,
            scale,
        })
    }

    fn plan(self, cudnn: &Cudnn, name: &str) -> Result<Attention, CudaError> {
        let what = format!("{name} of {:?}", self.shape);
        Ok(Attention {
            plan: Plan::new(cudnn, self.graph, &what)?,
            parts: self.parts,
        })
    }

    fn outer(&mut self, part: Part, number: Number, layout: Layout) -> Result<Tensor, CudaError> {
        let tensor = self.graph.outer(&format!("{part:?}"), number, layout)?;
        self.parts.push((part, tensor));
        Ok(tensor)
    }

    fn offsets(&mut self, part: Part) -> Result<Tensor, CudaError> {
        self.outer(part, Number::I64, self.shape.numbers(1))
    }

    fn ragged(
        &mut self,
        part: Part,
        number: Number,
        layout: Layout,
        offsets: Tensor,
    ) -> Result<Tensor, CudaError> {
        let name = format!("{part:?}");
        let tensor = self.graph.ragged(&name, number, layout, offsets)?;
        self.parts.push((part, tensor));
        Ok(tensor)
    }

    /// q, k transposed, and where documents of both begin.
    fn queries_and_keys(&mut self) -> Result<[Tensor; 3], CudaError> {
        let [heads, kv_heads, _] = self.shape.heads;
        let offsets = self.offsets(Part::QkOffsets)?;
        let stride = self.shape.strides.qk;
        let q = self.shape.rows(heads, stride);
        let q = self.ragged(Part::Q, Number::Bf16, q, offsets)?;
        let k = self.shape.rows(kv_heads, stride).transposed();
        let k = self.ragged(Part::K, Number::Bf16, k, offsets)?;
        Ok([q, k, offsets])
    }

    /// v as it lies.
    fn values(&mut self) -> Layout {
        self.shape.rows(self.shape.heads[1], self.shape.strides.v)
    }

    /// Scores of queries and keys, masked where a document has no such token.
    fn scores(&mut self, q: Tensor, k: Tensor) -> Result<Tensor, CudaError> {
        let (scores, [queries, keys]) = (self.shape.scores(), self.lengths);
        let graph = &mut self.graph;
        let raw = graph.inner("scores", Number::F32, scores)?;
        let sizes = Sizes {
            rows: Some(queries),
            columns: Some(keys),
            depth: None,
        };
        graph.product("scores", [q, k, raw], sizes)?;
        let scaled = graph.then("scaled scores", Each::Times, &[raw, self.scale], scores)?;
        let mut index = |axis| graph.then("index", Each::Index(axis), &[scaled], scores);
        let (row, column) = (index(2)?, index(3)?);
        let row = graph.then("query in length", Each::Less, &[row, queries], scores)?;
        let column = graph.then("key in length", Each::Less, &[column, keys], scores)?;
        let both = graph.then("both in length", Each::And, &[row, column], scores)?;
        self.masked(scaled, both)
    }

    /// Scores where a query sees the key.
    fn causal(&mut self, of: Tensor) -> Result<Tensor, CudaError> {
        let scores = self.shape.scores();
        let mut index = |axis| self.graph.then("index", Each::Index(axis), &[of], scores);
        let (row, column) = (index(2)?, index(3)?);
        let seen = self
            .graph
            .then("key is seen", Each::AtLeast, &[row, column], scores)?;
        self.masked(of, seen)
    }

    fn masked(&mut self, of: Tensor, seen: Tensor) -> Result<Tensor, CudaError> {
        let never = self.graph.constant("never", f32::NEG_INFINITY)?;
        let scores = self.shape.scores();
        self.graph
            .then("masked scores", Each::Choose, &[of, never, seen], scores)
    }

    /// The forward: softmax of the scores, and the mix of values by it.
    fn mix(&mut self) -> Result<(), CudaError> {
        let [q, k, _] = self.queries_and_keys()?;
        let values = self.values();
        let offsets = self.offsets(Part::VOffsets)?;
        let v = self.ragged(Part::V, Number::Bf16, values, offsets)?;
        let offsets = self.offsets(Part::LseOffsets)?;
        let lse = self.ragged(Part::Lse, Number::F32, self.shape.lse(), offsets)?;
        let offsets = self.offsets(Part::OutOffsets)?;
        let out = self.shape.rows(self.shape.heads[0], self.shape.strides.out);
        let out = self.ragged(Part::Out, Number::Bf16, out, offsets)?;
        let scores = self.scores(q, k)?;
        let scores = self.causal(scores)?;

        let (all, column) = (self.shape.scores(), self.shape.scores().column());
        let graph = &mut self.graph;
        let top = graph.inner("largest score", Number::F32, column)?;
        graph.reduce("largest score", Of::Max, scores, top)?;
        let less = graph.then("scores less the largest", Each::Minus, &[scores, top], all)?;
        let weights = graph.then("weights", Each::Exp, &[less], all)?;
        let sum = graph.inner("sum of weights", Number::F32, column)?;
        graph.reduce("sum of weights", Of::Sum, weights, sum)?;
        let log = graph.then("log of the sum", Each::Log, &[sum], column)?;
        graph.each("log-sum-exp", Each::Plus, &[top, log], lse)?;
        let shares = graph.inner("shares", Number::Bf16, all)?;
        graph.each("shares", Each::Over, &[weights, sum], shares)?;
        let [queries, keys] = self.lengths;
        let sizes = Sizes {
            rows: Some(queries),
            columns: None,
            depth: Some(keys),
        };
        graph.product("mix of values", [shares, v, out], sizes)
    }

    /// The backward: gradients of q, k and v from that of the mix.
    fn gradients(&mut self) -> Result<(), CudaError> {
        let [q, k, qk_offsets] = self.queries_and_keys()?;
        let (heads, strides) = (self.shape.heads, self.shape.strides);
        let values = self.values().transposed();
        let offsets = self.offsets(Part::VOffsets)?;
        let v = self.ragged(Part::V, Number::Bf16, values, offsets)?;
        let offsets = self.offsets(Part::LseOffsets)?;
        let lse = self.ragged(Part::Lse, Number::F32, self.shape.lse(), offsets)?;
        let offsets = self.offsets(Part::DOutOffsets)?;
        let d_out = self.shape.rows(heads[0], strides.d_out);
        let d_out = self.ragged(Part::DOut, Number::Bf16, d_out, offsets)?;
        let delta = self.deltas(d_out)?;

        let scores = self.scores(q, k)?;
        let all = self.shape.scores();
        let scores = self.graph.then(
            "scores less their log-sum-exp",
            Each::Minus,
            &[scores, lse],
            all,
        )?;
        let scores = self.causal(scores)?;
        let weights = self.graph.then("weights", Each::Exp, &[scores], all)?;

        let offsets = self.offsets(Part::DQkvOffsets)?;
        self.of_keys(Part::DV, weights, d_out, offsets)?;
        let d_scores = self.d_scores([d_out, v, delta, weights])?;
        self.of_keys(Part::DK, d_scores, q, offsets)?;
        self.of_queries(d_scores, qk_offsets, k, offsets)
    }

    /// out · d_out of each head of each row.
    fn deltas(&mut self, d_out: Tensor) -> Result<Tensor, CudaError> {
        let [heads, _, dim] = self.shape.heads;
        let offsets = self.offsets(Part::OutOffsets)?;
        let out = self.shape.rows(heads, self.shape.strides.out);
        let out = self.ragged(Part::Out, Number::Bf16, out, offsets)?;
        let column = self.shape.scores().column();
        let delta = self.outer(Part::Delta, Number::F32, column)?;
        let graph = &mut self.graph;
        let [documents, _, tokens, _] = column.sizes;
        let each = Layout::dense([documents, heads as i64, tokens, dim as i64]);
        let products = graph.then("d_out by out", Each::Times, &[d_out, out], each)?;
        let sum = graph.inner("sum of d_out by out", Number::F32, column)?;
        graph.reduce("sum of d_out by out", Of::Sum, products, sum)?;
        // Where there is dropout, the sum is scaled here: cuDNN looks for the node.
        let one = graph.constant("one", 1.0)?;
        graph.each("delta", Each::Times, &[sum, one], delta)?;
        Ok(delta)
    }

    /// Gradients of scores.
    fn d_scores(&mut self, [d_out, v, delta, weights]: [Tensor; 4]) -> Result<Tensor, CudaError> {
        let (all, [queries, keys]) = (self.shape.scores(), self.lengths);
        let graph = &mut self.graph;
        let d_weights = graph.inner("gradients of weights", Number::F32, all)?;
        let sizes = Sizes {
            rows: Some(queries),
            columns: Some(keys),
            depth: None,
        };
        graph.product("gradients of weights", [d_out, v, d_weights], sizes)?;
        let less = graph.then("less delta", Each::Minus, &[d_weights, delta], all)?;
        let d_scores = graph.then("gradients of scores", Each::Times, &[less, weights], all)?;
        let of = [d_scores, self.scale];
        graph.then("scaled gradients of scores", Each::Times, &of, all)
    }

    /// Gradients of k or of v: `weightsᵀ · rows`, summed over the heads of q that share a head of k.
    fn of_keys(
        &mut self,
        part: Part,
        weights: Tensor,
        rows: Tensor,
        offsets: Tensor,
    ) -> Result<(), CudaError> {
        let [heads, kv_heads, dim] = self.shape.heads;
        let out = self.shape.rows(kv_heads, self.shape.strides.d_qkv);
        let [documents, _, tokens, _] = out.sizes;
        let out = self.ragged(part, Number::Bf16, out, offsets)?;
        let [queries, keys] = self.lengths;
        let sizes = Sizes {
            rows: Some(keys),
            columns: None,
            depth: Some(queries),
        };
        let transposed = self.shape.scores().transposed();
        let graph = &mut self.graph;
        let weights_t = graph.inner("weights by key", Number::Bf16, transposed)?;
        graph.reshape("weights by key", weights, weights_t)?;
        if heads == kv_heads {
            return graph.product(&format!("{part:?}"), [weights_t, rows, out], sizes);
        }
        let of_each = Layout::dense([documents, heads as i64, tokens, dim as i64]);
        let of_each = graph.inner("gradients of each head", Number::Bf16, of_each)?;
        graph.product("gradients of each head", [weights_t, rows, of_each], sizes)?;
        graph.reduce("sum over heads that share keys", Of::Sum, of_each, out)
    }

    /// Gradients of q.
    fn of_queries(
        &mut self,
        d_scores: Tensor,
        qk_offsets: Tensor,
        k: Tensor,
        offsets: Tensor,
    ) -> Result<(), CudaError> {
        let [heads, kv_heads, _] = self.shape.heads;
        let strides = self.shape.strides;
        let out = self.shape.rows(heads, strides.d_qkv);
        let out = self.ragged(Part::DQ, Number::Bf16, out, offsets)?;
        let keys_by_row = self.shape.rows(kv_heads, strides.qk);
        let [queries, keys] = self.lengths;
        let graph = &mut self.graph;
        let keys_by_row =
            graph.ragged_inner("keys by row", Number::F32, keys_by_row, qk_offsets)?;
        graph.reshape("keys by row", k, keys_by_row)?;
        let sizes = Sizes {
            rows: Some(queries),
            columns: None,
            depth: Some(keys),
        };
        graph.product("gradients of queries", [d_scores, keys_by_row, out], sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backward_takes_what_cudnn_was_seen_to_take() {
        let shape = |documents, longest, heads| Shape {
            documents,
            longest,
            heads,
            strides: Strides::default(),
        };
        let seen = [
            (shape(8, 4096, [32, 8, 128]), 9_131_000_000),
            (shape(1, 8192, [4, 1, 128]), 553_780_000),
            (shape(1, 32_768, [4, 1, 128]), 8_657_570_000),
            (shape(2, 1024, [4, 4, 64]), 16_810_000),
            (shape(2, 1536, [8, 2, 64]), 81_890_000),
        ];
        for (shape, bytes) in seen {
            let apart = shape.backward_bytes().abs_diff(bytes);
            assert!(
                apart < bytes / 1000,
                "{shape:?}: {}",
                shape.backward_bytes()
            );
        }
    }
}
