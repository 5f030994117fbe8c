//! The backward pass, layer by layer from the last, in place: the gradient of the residual stream is one buffer, and each
//! part of a layer adds its own to it. What a layer did not keep is computed again first.

use espalier_kernels::train::{Backend, ExpertWeights, Form, Mat, Slice, Store};

use super::buffers::LayerInput;
use super::forward::{Pass, Sparse, Views, norm_grad};
use super::layout::{Adapted, Role};
use super::model::{Linear, Mlp};
use super::plan::Keep;

impl<B: Backend> Pass<'_, B> {
    /// From the gradient of the last layer's output to those of all that is trained below.
    pub(crate) fn backward(&mut self, keeps: &[Keep]) {
        let count = self.model.layers.len();
        self.prefetch(count - 1);
        for index in (0..count).rev() {
            if let Some(before) = index.checked_sub(1) {
                self.prefetch(before);
            }
            if let LayerInput::Offloaded { host, .. } = self.buffers.layers[index].input {
                self.backend.prefetched(host);
            }
            let views = self.views(index);
            self.again(index, keeps[index], &views);
            self.mlp_grad(index, keeps[index], &views);
            self.attention_grad(index, &views);
        }
        if let Some(d_embedding) = self.model.d_embedding {
            let d_x = self.d_x();
            self.backend.embed_grad(self.buffers.ids, d_x, d_embedding);
        }
    }

    fn prefetch(&mut self, index: usize) {
        if let LayerInput::Offloaded { host, .. } = self.buffers.layers[index].input {
            let stage = self.input(index).buffer;
            self.backend.prefetch(host, stage);
        }
    }

    /// What a layer did not keep of attention.
    fn again(&mut self, index: usize, keep: Keep, views: &Views) {
        let model = self.model;
        let layer = &model.layers[index];
        if keep >= Keep::Heads {
            self.attention_inputs(layer, views, false);
            if keep >= Keep::Input {
                self.attend(layer, views);
            }
            self.attention_output(layer, views, false);
        }
    }

    /// From the layer's output to the residual stream after attention.
    fn mlp_grad(&mut self, index: usize, keep: Keep, views: &Views) {
        let model = self.model;
        let layer = &model.layers[index];
        let normed = self.normed();
        self.backend
            .norm(self.eps, views.mid, layer.norms[3], normed);
        let d_normed = self.d_normed();
        let again = keep >= Keep::NoGateUp;
        match &layer.mlp {
            Mlp::Dense { gate_up, down } => {
                if again {
                    self.apply(gate_up, normed, views, views.gate_up, Store::Set, false);
                }
                self.dense_grad(gate_up, down, views, d_normed);
            }
            Mlp::Sparse { router, experts } => {
                self.sparse_grad(*router, experts, views, again, d_normed);
            }
        }
        let d_x = self.d_x();
        let d_weight = norm_grad(layer, 3);
        self.backend
            .norm_grad(self.eps, views.mid, layer.norms[3], d_normed, d_x, d_weight);
    }

    /// Where gradients of normed inputs go.
    fn d_normed(&self) -> Mat {
        self.rows(self.buffers.middle, self.hidden())
    }

    fn dense_grad(&mut self, gate_up: &Linear, down: &Linear, views: &Views, d_normed: Mat) {
        let d_x = self.d_x();
        let mixed = self.rows(self.buffers.wide, down.weight.cols);
        self.input_grad(down, d_x, views, Some(mixed));
        // `mixed` held its gradient; now it holds what the forward gave, which the gradient of down's weights reads.
        self.backend.swiglu_grad(views.gate_up, mixed);
        self.weight_grad(down, d_x, mixed);
        self.input_grad(gate_up, views.gate_up, views, Some(d_normed));
        let normed = self.normed();
        self.weight_grad(gate_up, views.gate_up, normed);
    }

    fn sparse_grad(
        &mut self,
        router: Mat,
        experts: &ExpertWeights,
        views: &Views,
        again: bool,
        d_normed: Mat,
    ) {
        let sparse = self.sparse();
        self.route(&sparse, router);
        let Sparse {
            moe,
            logits,
            d_logits,
            routes,
            d_weights,
            room,
        } = sparse;
        let (normed, d_x) = (self.normed(), self.d_x());
        if again {
            self.backend
                .experts(&moe, normed, &routes, experts, &room, views.gate_up, None);
        }
        self.backend.zero(dense(d_normed));
        self.backend.experts_grad(
            &moe,
            &routes,
            experts,
            &room,
            views.gate_up,
            d_x,
            d_normed,
            d_weights,
        );
        self.backend
            .route_grad(&moe, logits, &routes, d_weights, d_logits);
        self.backend
            .gemm(Form::Nn, 1.0, d_logits, router, d_normed, Store::Add);
    }

    /// From the residual stream after attention to the layer's input.
    fn attention_grad(&mut self, index: usize, views: &Views) {
        let model = self.model;
        let layer = &model.layers[index];
        let d_x = self.d_x();
        let d_heads = self.rows(self.buffers.narrow, self.heads.q_width());
        self.input_grad(&layer.o, d_x, views, Some(d_heads));
        self.weight_grad(&layer.o, d_x, views.heads);
        self.turn(layer, views);
        let d_qkv = self.rows(self.buffers.wide, self.heads.qkv_width());
        let attended = self.attended(views);
        self.backend
            .attention_grad(&self.heads, self.ends, &attended, d_heads, d_qkv);
        let rotation = self.rotation(layer);
        let d_norms = layer.d_norms.map(|norms| [norms[1], norms[2]]);
        self.backend
            .rotate_grad(&self.heads, &rotation, views.qkv, d_qkv, d_norms);
        let normed = self.normed();
        self.backend
            .norm(self.eps, views.input, layer.norms[0], normed);
        // Below the first layer nothing is trained, unless the embedding is.
        let wanted = index > 0 || model.d_embedding.is_some();
        let d_normed = self.d_normed();
        self.input_grad(&layer.qkv, d_qkv, views, wanted.then_some(d_normed));
        self.weight_grad(&layer.qkv, d_qkv, normed);
        if wanted {
            let d_weight = norm_grad(layer, 0);
            self.backend.norm_grad(
                self.eps,
                views.input,
                layer.norms[0],
                d_normed,
                d_x,
                d_weight,
            );
        }
    }

    /// Gradients that do not read the matrix's input: of its `B`s, of `x · Aᵀ`, and of the input itself.
    fn input_grad(&mut self, linear: &Linear, d_y: Mat, views: &Views, d_x: Option<Mat>) {
        if let (Role::Adapted(adapted), Some(xa)) = (&linear.role, views.xa) {
            let xa = xa.columns(linear.xa, adapted.ranks());
            let flat = &self.model.flat;
            for (i, part) in adapted.parts.iter().enumerate() {
                let d_y = d_y.columns(part.column, part.outputs);
                let own = (i * adapted.rank, adapted.rank);
                let d_xa = self.d_xa(adapted).columns(own.0, own.1);
                let xa = xa.columns(own.0, own.1);
                let b = Mat::at(flat.compute, part.b, part.outputs, adapted.rank);
                let d_b = Mat::at(flat.grads, part.b, part.outputs, adapted.rank);
                let scale = adapted.scale;
                self.backend.gemm(Form::Nn, scale, d_y, b, d_xa, Store::Set);
                self.backend.gemm(Form::Tn, scale, d_y, xa, d_b, Store::Add);
            }
        }
        let Some(d_x) = d_x else { return };
        self.backend
            .gemm(Form::Nn, 1.0, d_y, linear.weight, d_x, Store::Set);
        if let Role::Adapted(adapted) = &linear.role {
            let d_xa = self.d_xa(adapted);
            let a = Mat::at(
                self.model.flat.compute,
                adapted.a,
                adapted.ranks(),
                d_x.cols,
            );
            self.backend.gemm(Form::Nn, 1.0, d_xa, a, d_x, Store::Add);
        }
    }

    /// Gradients that read it: of the `A`s, or of all weights. After [`Pass::input_grad`] of the same matrix.
    fn weight_grad(&mut self, linear: &Linear, d_y: Mat, x: Mat) {
        let grads = self.model.flat.grads;
        match &linear.role {
            Role::Frozen => {}
            Role::Full(start) => {
                let d_w = Mat::at(grads, *start, linear.weight.rows, linear.weight.cols);
                self.backend.gemm(Form::Tn, 1.0, d_y, x, d_w, Store::Add);
            }
            Role::Adapted(adapted) => {
                let d_a = Mat::at(grads, adapted.a, adapted.ranks(), x.cols);
                let d_xa = self.d_xa(adapted);
                self.backend.gemm(Form::Tn, 1.0, d_xa, x, d_a, Store::Add);
            }
        }
    }

    fn d_xa(&self, adapted: &Adapted) -> Mat {
        let Some(buffer) = self.buffers.d_xa else {
            unreachable!("buffers are taken with room for adapters' gradients")
        };
        self.rows(buffer, adapted.ranks())
    }
}

/// All elements of a dense matrix.
pub(crate) fn dense(mat: Mat) -> Slice {
    Slice::new(mat.buffer, mat.start, mat.span())
}
