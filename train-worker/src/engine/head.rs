//! The LM head and the loss, on rows that predict a target only, in chunks; gradients take the logits' place.

use espalier_kernels::train::{Backend, Form, Mat, Slice, Store};

use super::backward::dense;
use super::forward::Pass;

/// A row and the token that it is to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) row: u32,
    pub(crate) id: u32,
}

impl<B: Backend> Pass<'_, B> {
    /// -log p of each target. With `grad`, the residual stream's gradient of `grad` times their sum.
    pub(crate) fn loss(&mut self, targets: &[Target], grad: Option<f64>) -> Vec<f32> {
        let (rows, ids): (Vec<u32>, Vec<u32>) =
            targets.iter().map(|target| (target.row, target.id)).unzip();
        self.backend.write_ids(self.buffers.rows, 0, &rows);
        self.backend.write_ids(self.buffers.targets, 0, &ids);
        if grad.is_some() {
            let d_x = self.d_x();
            self.backend.zero(dense(d_x));
        }
        for first in (0..targets.len()).step_by(self.buffers.head.rows) {
            let count = self.buffers.head.rows.min(targets.len() - first);
            self.chunk(first, count, grad);
        }
        self.backend
            .read(Slice::new(self.buffers.losses, 0, targets.len()))
    }

    fn chunk(&mut self, first: usize, count: usize, grad: Option<f64>) {
        let head = &self.buffers.head;
        let model = self.model;
        let of = |buffer| Mat::dense(buffer, count, model.embedding.cols);
        let (input, normed) = (of(head.input), of(head.normed));
        let (d_input, d_normed) = (of(head.d_input), of(head.d_normed));
        let logits = Mat::dense(head.logits, count, model.head.rows);
        let rows = Slice::new(self.buffers.rows, first, count);
        let targets = Slice::new(self.buffers.targets, first, count);
        let losses = Slice::new(self.buffers.losses, first, count);
        let last = self.last();
        self.backend.gather(rows, last, input);
        self.backend.norm(self.eps, input, model.final_norm, normed);
        self.backend
            .gemm(Form::Nt, 1.0, normed, model.head, logits, Store::Set);
        self.backend
            .cross_entropy(logits, self.classes, targets, losses, grad);
        if grad.is_none() {
            return;
        }
        self.backend
            .gemm(Form::Nn, 1.0, logits, model.head, d_normed, Store::Set);
        if let Some(d_head) = model.d_head {
            self.backend
                .gemm(Form::Tn, 1.0, logits, normed, d_head, Store::Add);
        }
        self.backend.zero(dense(d_input));
        self.backend.norm_grad(
            self.eps,
            input,
            model.final_norm,
            d_normed,
            d_input,
            model.d_final_norm,
        );
        let d_x = self.d_x();
        self.backend.scatter(rows, d_input, d_x);
    }
}
