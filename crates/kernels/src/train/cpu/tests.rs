//! Every primitive's backward against finite differences of its forward in f64, and attention and experts against plain
//! formulas.

use std::sync::Arc;

use super::*;
use crate::cpu::simd::tests::numbers;

/// A CPU in f64 and buffers filled with numbers.
struct Bench {
    cpu: Cpu<f64>,
    seed: u64,
}

impl Bench {
    fn new() -> Self {
        Self {
            cpu: Cpu::new(Arc::new(Pool::new(2))),
            seed: 1,
        }
    }

    fn real(&mut self, len: usize) -> BufferId {
        let buffer = self.cpu.alloc(Kind::Exact, len).unwrap();
        self.seed += 1;
        self.cpu.write(buffer, 0, &numbers(self.seed, len));
        buffer
    }

    fn mat(&mut self, rows: usize, cols: usize) -> Mat {
        Mat::dense(self.real(rows * cols), rows, cols)
    }

    fn slice(&mut self, len: usize) -> Slice {
        Slice::new(self.real(len), 0, len)
    }

    fn ids(&mut self, values: &[u32]) -> BufferId {
        let buffer = self.cpu.alloc(Kind::Ids, values.len()).unwrap();
        self.cpu.write_ids(buffer, 0, values);
        buffer
    }

    fn values(&self, buffer: BufferId, len: usize) -> Vec<f64> {
        self.cpu.exact(Slice::new(buffer, 0, len)).to_vec()
    }

    /// `Σ out · weights`, a number that depends on everything.
    fn dot(&self, a: Mat, b: Mat) -> f64 {
        let (a, b) = (self.cpu.table(a), self.cpu.table(b));
        let rows = (0..b.data.len() / b.cols.max(1)).map(|row| (a.row(row), b.row(row)));
        rows.flat_map(|(a, b)| a.iter().zip(b))
            .map(|(a, b)| a * b)
            .sum()
    }

    /// Compares `grad` with differences of `loss` when elements of `of` change.
    fn differ(
        &mut self,
        what: &str,
        of: BufferId,
        grad: &[f64],
        mut loss: impl FnMut(&mut Self) -> f64,
    ) {
        const STEP: f64 = 1e-5;
        let stride = (grad.len() / 60).max(1);
        let size = grad.iter().fold(1e-3, |most, x| x.abs().max(most));
        for i in (0..grad.len()).step_by(stride) {
            let was = self.cpu.exact_mut(of)[i];
            self.cpu.exact_mut(of)[i] = was + STEP;
            let up = loss(self);
            self.cpu.exact_mut(of)[i] = was - STEP;
            let down = loss(self);
            self.cpu.exact_mut(of)[i] = was;
            let found = (up - down) / (2.0 * STEP);
            let apart = (found - grad[i]).abs() / size;
            assert!(apart < 1e-6, "{what} {i}: {found} is not {}", grad[i]);
        }
    }
}

const ROWS: usize = 70;

#[test]
fn norm() {
    let mut bench = Bench::new();
    let (x, y, d_y, d_x) = (
        bench.mat(ROWS, 24),
        bench.mat(ROWS, 24),
        bench.mat(ROWS, 24),
        bench.mat(ROWS, 24),
    );
    let (weight, d_weight) = (bench.slice(24), bench.slice(24));
    bench.cpu.zero(Slice::new(d_x.buffer, 0, ROWS * 24));
    bench.cpu.zero(d_weight);
    bench
        .cpu
        .norm_grad(1e-3, x, weight, d_y, d_x, Some(d_weight));
    let mut loss = |bench: &mut Bench| {
        bench.cpu.norm(1e-3, x, weight, y);
        bench.dot(y, d_y)
    };
    let grad = bench.values(d_x.buffer, ROWS * 24);
    bench.differ("x", x.buffer, &grad, &mut loss);
    let grad = bench.values(d_weight.buffer, 24);
    bench.differ("weight", weight.buffer, &grad, &mut loss);
    // What is there is added to.
    bench.cpu.norm_grad(1e-3, x, weight, d_y, d_x, None);
    let twice = bench.values(d_x.buffer, ROWS * 24);
    let once = twice.iter().map(|x| x / 2.0).collect::<Vec<_>>();
    bench.differ("x", x.buffer, &once, &mut loss);
}

const HEADS: Heads = Heads {
    q: 4,
    kv: 2,
    dim: 16,
    eps: 1e-3,
};

#[test]
fn rotation() {
    let mut bench = Bench::new();
    let (qkv, d_qkv) = (
        bench.mat(ROWS, HEADS.qkv_width()),
        bench.mat(ROWS, HEADS.qkv_width()),
    );
    let qk = bench.mat(ROWS, HEADS.qk_width());
    let with = Rotation {
        q_norm: bench.slice(16),
        k_norm: bench.slice(16),
        turns: bench.real(ROWS * 16),
        positions: {
            let positions: Vec<u32> = (0..ROWS as u32).map(|i| i * 7 % ROWS as u32).collect();
            bench.ids(&positions)
        },
    };
    let seen = d_qkv.columns(0, HEADS.qk_width());
    let kept = bench.mat(ROWS, HEADS.qk_width());
    bench.cpu.copy(seen, kept);
    let d_norms = [bench.slice(16), bench.slice(16)];
    d_norms.iter().for_each(|slice| bench.cpu.zero(*slice));
    bench
        .cpu
        .rotate_grad(&HEADS, &with, qkv, d_qkv, Some(d_norms));
    let mut loss = |bench: &mut Bench| {
        bench.cpu.rotate(&HEADS, &with, qkv, qk);
        bench.dot(qk, kept)
    };
    let mut grad = bench.values(d_qkv.buffer, ROWS * HEADS.qkv_width());
    // v is not turned: its columns of the gradient are left alone.
    for row in grad.chunks_mut(HEADS.qkv_width()) {
        row[HEADS.qk_width()..].fill(0.0);
    }
    bench.differ("qkv", qkv.buffer, &grad, &mut loss);
    for (weight, d_weight) in [with.q_norm, with.k_norm].into_iter().zip(d_norms) {
        let grad = bench.values(d_weight.buffer, 16);
        bench.differ("weight", weight.buffer, &grad, &mut loss);
    }
}

fn attended(bench: &mut Bench, tokens: usize) -> Attended {
    Attended {
        qk: bench.mat(tokens, HEADS.qk_width()),
        v: bench.mat(tokens, HEADS.kv * HEADS.dim),
        out: bench.mat(tokens, HEADS.q_width()),
        lse: bench.real(HEADS.q * tokens),
    }
}

#[test]
fn attention_is_softmax_of_scores_within_each_document() {
    let (tokens, ends) = (150, [7, 8, 140, 150]);
    let mut bench = Bench::new();
    let with = attended(&mut bench, tokens);
    bench.cpu.attention(&HEADS, &ends, &with);
    let (qk, v, out) = (
        bench.cpu.table(with.qk),
        bench.cpu.table(with.v),
        bench.cpu.table(with.out),
    );
    let dim = HEADS.dim;
    let mut start = 0;
    for end in ends {
        for row in start..end {
            for head in 0..HEADS.q {
                let kv = head / 2;
                let q = &qk.row(row)[head * dim..(head + 1) * dim];
                let scores: Vec<f64> = (start..=row)
                    .map(|key| {
                        let k = &qk.row(key)[(HEADS.q + kv) * dim..];
                        q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / 4.0
                    })
                    .collect();
                let total: f64 = scores.iter().map(|score| score.exp()).sum();
                let lse = bench
                    .cpu
                    .exact(Slice::new(with.lse, head * tokens + row, 1))[0];
                assert!((lse - total.ln()).abs() < 1e-12);
                for i in 0..dim {
                    let mix: f64 = scores
                        .iter()
                        .enumerate()
                        .map(|(key, score)| score.exp() / total * v.row(start + key)[kv * dim + i])
                        .sum();
                    assert!((out.row(row)[head * dim + i] - mix).abs() < 1e-12);
                }
            }
        }
        start = end;
    }
}

#[test]
fn attention_backward() {
    let (tokens, ends) = (130, [5, 125, 130]);
    let mut bench = Bench::new();
    let with = attended(&mut bench, tokens);
    let d_out = bench.mat(tokens, HEADS.q_width());
    let d_qkv = bench.mat(tokens, HEADS.qkv_width());
    bench.cpu.attention(&HEADS, &ends, &with);
    bench.cpu.attention_grad(&HEADS, &ends, &with, d_out, d_qkv);
    let mut loss = |bench: &mut Bench| {
        bench.cpu.attention(&HEADS, &ends, &with);
        bench.dot(with.out, d_out)
    };
    let grad = bench.values(d_qkv.buffer, tokens * HEADS.qkv_width());
    let columns = |from: usize, count: usize| -> Vec<f64> {
        let rows = grad.chunks(HEADS.qkv_width());
        rows.flat_map(|row| row[from..from + count].to_vec())
            .collect()
    };
    let (qk, v) = (HEADS.qk_width(), HEADS.kv * HEADS.dim);
    bench.differ("q and k", with.qk.buffer, &columns(0, qk), &mut loss);
    bench.differ("v", with.v.buffer, &columns(qk, v), &mut loss);
}

#[test]
fn swiglu() {
    let mut bench = Bench::new();
    let (gate_up, out, d_out) = (
        bench.mat(ROWS, 40),
        bench.mat(ROWS, 20),
        bench.mat(ROWS, 20),
    );
    let (d_gate_up, mixed) = (bench.mat(ROWS, 40), bench.mat(ROWS, 20));
    bench.cpu.copy(gate_up, d_gate_up);
    bench.cpu.copy(d_out, mixed);
    bench.cpu.swiglu_grad(d_gate_up, mixed);
    let grad = bench.values(d_gate_up.buffer, ROWS * 40);
    bench.differ("gate and up", gate_up.buffer, &grad, |bench| {
        bench.cpu.swiglu(gate_up, out);
        bench.dot(out, d_out)
    });
    bench.cpu.swiglu(gate_up, out);
    assert_eq!(
        bench.values(mixed.buffer, ROWS * 20),
        bench.values(out.buffer, ROWS * 20)
    );
}

#[test]
fn products_and_embeddings() {
    let mut bench = Bench::new();
    let (x, w, y, d_y) = (
        bench.mat(ROWS, 30),
        bench.mat(20, 30),
        bench.mat(ROWS, 20),
        bench.mat(ROWS, 20),
    );
    let (d_x, d_w) = (bench.mat(ROWS, 30), bench.mat(20, 30));
    bench.cpu.gemm(Form::Nn, 0.5, d_y, w, d_x, Store::Set);
    bench.cpu.gemm(Form::Tn, 0.5, d_y, x, d_w, Store::Set);
    let mut loss = |bench: &mut Bench| {
        bench.cpu.gemm(Form::Nt, 0.5, x, w, y, Store::Set);
        bench.dot(y, d_y)
    };
    for (of, grad) in [(x, d_x), (w, d_w)] {
        let grad = bench.values(grad.buffer, grad.rows * grad.cols);
        bench.differ("product", of.buffer, &grad, &mut loss);
    }
    let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * i % 11).collect();
    let ids = bench.ids(&ids);
    let (table, d_table) = (bench.mat(11, 20), bench.mat(11, 20));
    bench.cpu.zero(Slice::new(d_table.buffer, 0, 220));
    bench.cpu.embed_grad(ids, d_y, d_table);
    let grad = bench.values(d_table.buffer, 220);
    bench.differ("embedding", table.buffer, &grad, |bench| {
        bench.cpu.embed(ids, table, y);
        bench.dot(y, d_y)
    });
}

#[test]
fn cross_entropy() {
    let mut bench = Bench::new();
    let (logits, work) = (bench.mat(ROWS, 37), bench.mat(ROWS, 37));
    let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * 5 % 37).collect();
    let targets = Slice::new(bench.ids(&ids), 0, ROWS);
    let losses = bench.slice(ROWS);
    bench.cpu.copy(logits, work);
    bench
        .cpu
        .cross_entropy(work, 37, targets, losses, Some(0.3));
    let grad = bench.values(work.buffer, ROWS * 37);
    bench.differ("logits", logits.buffer, &grad, |bench| {
        bench.cpu.copy(logits, work);
        bench.cpu.cross_entropy(work, 37, targets, losses, None);
        0.3 * bench.values(losses.buffer, ROWS).iter().sum::<f64>()
    });
}

#[test]
fn experts_and_routes() {
    for renormalise in [true, false] {
        let moe = MoeShape {
            experts: 6,
            top_k: 2,
            width: 10,
            renormalise,
        };
        let (tokens, hidden) = (40, 12);
        let mut bench = Bench::new();
        let (logits, d_logits) = (bench.mat(tokens, 6), bench.mat(tokens, 6));
        let (x, d_x) = (bench.mat(tokens, hidden), bench.mat(tokens, hidden));
        let (y, d_y) = (bench.mat(tokens, hidden), bench.mat(tokens, hidden));
        let gate_up = bench.mat(tokens * 2, 20);
        let weights = ExpertWeights {
            gate_up: bench.mat(6 * 20, hidden),
            down: bench.mat(6 * hidden, 10),
        };
        let routes = Routes {
            ids: bench.ids(&vec![0; moe.ids_len(tokens)]),
            weights: bench.real(tokens * 2),
        };
        let d_weights = bench.real(tokens * 2);
        let room = ExpertRoom {
            rows: bench.real(tokens * 2 * hidden),
            mixed: bench.real(tokens * 2 * 10),
        };
        let mut loss = |bench: &mut Bench| {
            bench.cpu.zero(Slice::new(y.buffer, 0, tokens * hidden));
            bench.cpu.route(&moe, logits, &routes);
            bench
                .cpu
                .experts(&moe, x, &routes, &weights, &room, gate_up, Some(y));
            bench.dot(y, d_y)
        };
        loss(&mut bench);
        bench.cpu.zero(Slice::new(d_x.buffer, 0, tokens * hidden));
        bench
            .cpu
            .experts_grad(&moe, &routes, &weights, &room, gate_up, d_y, d_x, d_weights);
        bench
            .cpu
            .route_grad(&moe, logits, &routes, d_weights, d_logits);
        let grad = bench.values(d_x.buffer, tokens * hidden);
        bench.differ("x", x.buffer, &grad, &mut loss);
        let grad = bench.values(d_logits.buffer, tokens * 6);
        bench.differ("logits", logits.buffer, &grad, &mut loss);
    }
}

#[test]
fn buffers_go_to_the_host_and_back_and_memory_is_counted() {
    let mut cpu = Cpu::<f32>::new(Arc::new(Pool::new(1)));
    let device = cpu.alloc(Kind::Activations, 3).unwrap();
    let host = cpu.alloc_host(Kind::Activations, 3).unwrap();
    assert_eq!((cpu.memory().device, cpu.memory().host), (12, 12));
    cpu.write(device, 0, &[1.0, 2.0, 3.0]);
    cpu.offload(device, host);
    cpu.offloaded(host);
    cpu.write(device, 0, &[4.0, 4.0, 4.0]);
    cpu.prefetch(host, device);
    cpu.prefetched(host);
    assert_eq!(cpu.read(Slice::new(device, 1, 2)), [2.0, 3.0]);
    cpu.free(device);
    assert_eq!(cpu.memory().device, 0);
    assert_eq!(cpu.memory().device_peak, 12);
    let again = cpu.alloc(Kind::Ids, 2).unwrap();
    assert_eq!(again, device);
}
