//! The forward pass, as the backward needs it: layer by layer, leaving in each layer's buffers what the plan keeps.

use espalier_kernels::train::{
    Attended, Backend, BufferId, ExpertRoom, Form, Heads, Mat, MoeShape, Rotation, Routes, Slice,
    Store,
};

use super::buffers::{Buffers, LayerInput};
use super::layout::Role;
use super::model::{Layer, Linear, Mlp, Model};

/// One micro-batch on its way through the model.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a mut B,
    pub(crate) model: &'a Model,
    pub(crate) buffers: &'a Buffers<BufferId>,
    pub(crate) heads: Heads,
    pub(crate) moe: Option<MoeShape>,
    pub(crate) eps: f64,
    /// Ids that have logits.
    pub(crate) classes: usize,
    /// Where documents end.
    pub(crate) ends: &'a [usize],
    pub(crate) tokens: usize,
}

/// A layer's activations: its own, or those that all layers share.
#[derive(Clone, Copy)]
pub(crate) struct Views {
    pub(crate) input: Mat,
    pub(crate) qkv: Mat,
    pub(crate) heads: Mat,
    pub(crate) lse: BufferId,
    pub(crate) mid: Mat,
    pub(crate) gate_up: Mat,
    pub(crate) xa: Option<Mat>,
}

/// Of a layer with experts.
pub(crate) struct Sparse {
    pub(crate) moe: MoeShape,
    pub(crate) logits: Mat,
    pub(crate) d_logits: Mat,
    pub(crate) routes: Routes,
    pub(crate) d_weights: BufferId,
    pub(crate) room: ExpertRoom,
}

impl<B: Backend> Pass<'_, B> {
    pub(crate) fn hidden(&self) -> usize {
        self.model.embedding.cols
    }

    /// A matrix of all tokens in a buffer.
    pub(crate) fn rows(&self, buffer: BufferId, cols: usize) -> Mat {
        Mat::dense(buffer, self.tokens, cols)
    }

    /// The normed input of what is at work.
    pub(crate) fn normed(&self) -> Mat {
        self.rows(self.buffers.narrow, self.hidden())
    }

    /// q and k, turned.
    pub(crate) fn qk(&self) -> Mat {
        self.rows(self.buffers.middle, self.heads.qk_width())
    }

    /// Gradient of the residual stream.
    pub(crate) fn d_x(&self) -> Mat {
        self.rows(self.buffers.d_x, self.hidden())
    }

    /// What the last layer gives.
    pub(crate) fn last(&self) -> Mat {
        self.rows(self.buffers.last, self.hidden())
    }

    pub(crate) fn input(&self, index: usize) -> Mat {
        let buffer = match (&self.buffers.layers[index].input, &self.buffers.stages) {
            (LayerInput::Kept(buffer), _) => *buffer,
            (LayerInput::Offloaded { stage, .. }, Some(stages)) => stages[*stage],
            (LayerInput::Offloaded { .. }, None) => {
                unreachable!("buffers are taken with stages where an input is offloaded")
            }
        };
        self.rows(buffer, self.hidden())
    }

    fn output(&self, index: usize) -> Mat {
        match index + 1 < self.model.layers.len() {
            true => self.input(index + 1),
            false => self.last(),
        }
    }

    pub(crate) fn views(&self, index: usize) -> Views {
        let own = &self.buffers.layers[index];
        let again = self.buffers.again.as_ref();
        let pick = |own: Option<BufferId>, shared: Option<BufferId>| {
            own.or(shared).unwrap_or_else(|| {
                unreachable!("buffers are shared where a layer does not keep its own")
            })
        };
        let gate_up = match (&self.model.layers[index].mlp, &self.moe) {
            (Mlp::Sparse { .. }, Some(moe)) => [self.tokens * moe.top_k, 2 * moe.width],
            (Mlp::Dense { gate_up, .. }, _) => [self.tokens, gate_up.weight.rows],
            (Mlp::Sparse { .. }, None) => unreachable!("experts come with their shape"),
        };
        let ranks = ranks(&self.model.layers[index]);
        Views {
            input: self.input(index),
            qkv: self.rows(
                pick(own.qkv, again.map(|all| all.qkv)),
                self.heads.qkv_width(),
            ),
            heads: self.rows(
                pick(own.heads, again.map(|all| all.heads)),
                self.heads.q_width(),
            ),
            lse: pick(own.lse, again.map(|all| all.lse)),
            mid: self.rows(pick(own.mid, again.map(|all| all.mid)), self.hidden()),
            gate_up: Mat::dense(
                pick(own.gate_up, again.map(|all| all.gate_up)),
                gate_up[0],
                gate_up[1],
            ),
            xa: own.xa.map(|xa| self.rows(xa, ranks)),
        }
    }

    pub(crate) fn attended(&self, views: &Views) -> Attended {
        let (qk, kv) = (self.heads.qk_width(), self.heads.kv * self.heads.dim);
        Attended {
            qk: self.qk(),
            v: views.qkv.columns(qk, kv),
            out: views.heads,
            lse: views.lse,
        }
    }

    pub(crate) fn rotation(&self, layer: &Layer) -> Rotation {
        Rotation {
            q_norm: layer.norms[1],
            k_norm: layer.norms[2],
            turns: self.buffers.turns,
            positions: self.buffers.positions,
        }
    }

    /// From ids to the last layer's output. With `keep`, inputs go to the host where the plan has them there.
    pub(crate) fn forward(&mut self, keep: bool) {
        let first = self.input(0);
        self.backend
            .embed(self.buffers.ids, self.model.embedding, first);
        for index in 0..self.model.layers.len() {
            // The stage that the output goes to was the input's of the layer before.
            if let (true, Some(before)) = (keep, index.checked_sub(1))
                && let LayerInput::Offloaded { host, .. } = self.buffers.layers[before].input
            {
                self.backend.offloaded(host);
            }
            self.layer(index);
            if let (true, LayerInput::Offloaded { host, .. }) =
                (keep, &self.buffers.layers[index].input)
            {
                let stage = self.input(index).buffer;
                self.backend.offload(stage, *host);
            }
        }
    }

    fn layer(&mut self, index: usize) {
        let model = self.model;
        let layer = &model.layers[index];
        let views = self.views(index);
        self.attention_inputs(layer, &views, true);
        self.attend(layer, &views);
        self.attention_output(layer, &views, true);
        let (mid, output) = (views.mid, self.output(index));
        let normed = self.normed();
        self.backend.norm(self.eps, mid, layer.norms[3], normed);
        self.backend.copy(mid, output);
        match &layer.mlp {
            Mlp::Dense { gate_up, down } => {
                self.apply(gate_up, normed, &views, views.gate_up, Store::Set, true);
                let mixed = self.rows(self.buffers.wide, down.weight.cols);
                self.backend.swiglu(views.gate_up, mixed);
                self.apply(down, mixed, &views, output, Store::Add, true);
            }
            Mlp::Sparse { router, experts } => {
                let sparse = self.sparse();
                self.route(&sparse, *router);
                let Sparse {
                    moe, routes, room, ..
                } = &sparse;
                self.backend.experts(
                    moe,
                    normed,
                    routes,
                    experts,
                    room,
                    views.gate_up,
                    Some(output),
                );
            }
        }
    }

    /// q, k and v of a layer's input. `fresh`: for the first time.
    pub(crate) fn attention_inputs(&mut self, layer: &Layer, views: &Views, fresh: bool) {
        let normed = self.normed();
        self.backend
            .norm(self.eps, views.input, layer.norms[0], normed);
        self.apply(&layer.qkv, normed, views, views.qkv, Store::Set, fresh);
    }

    /// Rotation and attention.
    pub(crate) fn attend(&mut self, layer: &Layer, views: &Views) {
        self.turn(layer, views);
        let attended = self.attended(views);
        self.backend.attention(&self.heads, self.ends, &attended);
    }

    pub(crate) fn turn(&mut self, layer: &Layer, views: &Views) {
        let (rotation, qk) = (self.rotation(layer), self.qk());
        self.backend.rotate(&self.heads, &rotation, views.qkv, qk);
    }

    /// The residual stream after attention.
    pub(crate) fn attention_output(&mut self, layer: &Layer, views: &Views, fresh: bool) {
        self.backend.copy(views.input, views.mid);
        self.apply(&layer.o, views.heads, views, views.mid, Store::Add, fresh);
    }

    /// Experts' shape and buffers.
    ///
    /// # Panics
    /// When the model has none.
    pub(crate) fn sparse(&self) -> Sparse {
        let (Some(moe), Some(buffers)) = (self.moe, &self.buffers.moe) else {
            unreachable!("a layer with experts comes with their shape and buffers")
        };
        Sparse {
            moe,
            logits: self.rows(buffers.logits, moe.experts),
            d_logits: self.rows(buffers.d_logits, moe.experts),
            routes: Routes {
                ids: buffers.routes,
                weights: buffers.weights,
            },
            d_weights: buffers.d_weights,
            room: ExpertRoom {
                rows: buffers.rows,
                mixed: buffers.mixed,
            },
        }
    }

    /// Where the normed rows go.
    pub(crate) fn route(&mut self, sparse: &Sparse, router: Mat) {
        let normed = self.normed();
        self.backend
            .gemm(Form::Nt, 1.0, normed, router, sparse.logits, Store::Set);
        self.backend
            .route(&sparse.moe, sparse.logits, &sparse.routes);
    }

    /// `y = x · Wᵀ + scale · (x · Aᵀ) · Bᵀ`, or that is added. What is not `fresh` has its `x · Aᵀ` already.
    pub(crate) fn apply(
        &mut self,
        linear: &Linear,
        x: Mat,
        views: &Views,
        y: Mat,
        store: Store,
        fresh: bool,
    ) {
        self.backend.gemm(Form::Nt, 1.0, x, linear.weight, y, store);
        let (Role::Adapted(adapted), Some(xa)) = (&linear.role, views.xa) else {
            return;
        };
        let weights = self.model.flat.compute;
        let xa = xa.columns(linear.xa, adapted.ranks());
        if fresh {
            let a = Mat::at(weights, adapted.a, adapted.ranks(), x.cols);
            self.backend.gemm(Form::Nt, 1.0, x, a, xa, Store::Set);
        }
        for (i, part) in adapted.parts.iter().enumerate() {
            let own = xa.columns(i * adapted.rank, adapted.rank);
            let b = Mat::at(weights, part.b, part.outputs, adapted.rank);
            let to = y.columns(part.column, part.outputs);
            self.backend
                .gemm(Form::Nt, adapted.scale, own, b, to, Store::Add);
        }
    }
}

/// Ranks of all adapters of a layer.
fn ranks(layer: &Layer) -> usize {
    let mlp = match &layer.mlp {
        Mlp::Dense { gate_up, down } => gate_up.role.ranks() + down.role.ranks(),
        Mlp::Sparse { .. } => 0,
    };
    layer.qkv.role.ranks() + layer.o.role.ranks() + mlp
}

/// Neighbouring elements of a row vector's gradient, where it is trained.
pub(crate) fn norm_grad(layer: &Layer, which: usize) -> Option<Slice> {
    layer.d_norms.map(|norms| norms[which])
}
