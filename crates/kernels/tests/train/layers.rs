//! Ops of layers and of the head.

use espalier_kernels::train::{
    Attended, ExpertRoom, ExpertWeights, Heads, Kind, Mat, MoeShape, Rotation, Routes, Slice,
};

use super::Bench;

/// A gradient that begins at zero, so that its own size is what errors are measured by.
fn zeroes(bench: &mut Bench, len: usize) -> Slice {
    let slice = bench.exact_numbers(len);
    bench.run(|backend| backend.zero(slice));
    slice
}

pub fn norms(bench: &mut Bench) {
    let eps = 1e-6;
    for (rows, cols, spare) in [(70, 64, 0), (300, 1000, 16), (9, 21, 4), (3, 9000, 0)] {
        let (x, y) = (bench.mat(rows, cols, spare), bench.mat(rows, cols, spare));
        let weight = bench.weights(cols);
        bench.run(|backend| backend.norm(eps, x, weight, y));
        bench.close_all("norm", y, 1.0);
        let (d_y, d_x) = (bench.mat(rows, cols, 0), bench.mat(rows, cols, spare));
        let d_weight = zeroes(bench, cols);
        bench.run(|backend| backend.norm_grad(eps, x, weight, d_y, d_x, Some(d_weight)));
        bench.close_all("d_x", d_x, 1.0);
        bench.close("d_weight", d_weight, 0.05);
        bench.run(|backend| backend.norm_grad(eps, x, weight, d_y, d_x, None));
        bench.close_all("d_x again", d_x, 2.0);
    }
}

fn heads(q: usize, kv: usize, dim: usize) -> Heads {
    Heads {
        q,
        kv,
        dim,
        eps: 1e-6,
    }
}

pub fn rotation(bench: &mut Bench) {
    for heads in [
        heads(4, 2, 128),
        heads(3, 1, 6),
        heads(2, 2, 16),
        heads(5, 1, 256),
    ] {
        let (tokens, dim) = (50, heads.dim);
        let positions: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % 20).collect();
        let turns: Vec<f32> = (0..20)
            .flat_map(|position| {
                let angle = move |i: usize| position as f32 * 0.9 / (i + 1) as f32;
                let cos = (0..dim / 2).map(move |i| angle(i).cos());
                cos.chain((0..dim / 2).map(move |i| angle(i).sin()))
            })
            .collect();
        let with = Rotation {
            q_norm: bench.weights(dim),
            k_norm: bench.weights(dim),
            turns: bench.alloc(Kind::Exact, turns.len()),
            positions: bench.ids(&positions),
        };
        bench.write(with.turns, &turns);
        let qkv = bench.mat(tokens, heads.qkv_width(), 0);
        let qk = bench.mat(tokens, heads.qk_width(), 0);
        bench.run(|backend| backend.rotate(&heads, &with, qkv, qk));
        bench.close_all("rotate", qk, 1.0);
        let d_norms = [zeroes(bench, dim), zeroes(bench, dim)];
        for wanted in [Some(d_norms), None] {
            let d_qkv = bench.mat(tokens, heads.qkv_width(), 0);
            bench.run(|backend| backend.rotate_grad(&heads, &with, qkv, d_qkv, wanted));
            bench.close_all("rotate_grad", d_qkv, 1.0);
        }
        for d_norm in d_norms {
            bench.close("d_norm", d_norm, 0.05);
        }
    }
}

pub fn attention(bench: &mut Bench) {
    let cases = [
        (heads(4, 2, 16), vec![7, 8, 140, 150]),
        (heads(3, 3, 20), vec![64, 128, 129, 200]),
        (heads(2, 1, 6), vec![90]),
        (heads(8, 2, 64), vec![300]),
        (heads(8, 1, 128), vec![1, 65, 450]),
    ];
    for (heads, ends) in cases {
        let tokens = *ends.last().unwrap();
        let qkv = bench.mat(tokens, heads.qkv_width(), 0);
        let with = Attended {
            qk: bench.mat(tokens, heads.qk_width(), 0),
            v: qkv.columns(heads.qk_width(), heads.kv * heads.dim),
            out: bench.mat(tokens, heads.q_width(), 0),
            lse: bench.exact_numbers(heads.q * tokens).buffer,
        };
        bench.run(|backend| backend.attention(&heads, &ends, &with));
        // Weights of the softmax are rounded, then the sum is.
        bench.close_all(&format!("{heads:?}: out"), with.out, 2.0);
        bench.close("lse", Slice::new(with.lse, 0, heads.q * tokens), 0.1);
        bench.agree(Slice::new(with.out.buffer, 0, tokens * heads.q_width()));
        let d_out = bench.mat(tokens, heads.q_width(), 0);
        let d_qkv = bench.mat(tokens, heads.qkv_width(), 0);
        bench.run(|backend| backend.attention_grad(&heads, &ends, &with, d_out, d_qkv));
        bench.close_all(&format!("{heads:?}: d_qkv"), d_qkv, 2.5);
        let first = bench.got.read(all(d_qkv));
        bench.run(|backend| backend.attention_grad(&heads, &ends, &with, d_out, d_qkv));
        assert_eq!(bench.got.read(all(d_qkv)), first, "the same bits each time");
    }
}

fn all(mat: Mat) -> Slice {
    Slice::new(mat.buffer, 0, mat.rows * mat.stride)
}

pub fn swiglu(bench: &mut Bench) {
    for (width, spare) in [(64, 0), (72, 16), (21, 3)] {
        let gate_up = bench.mat(90, 2 * width, spare);
        let out = bench.mat(90, width, spare);
        bench.run(|backend| backend.swiglu(gate_up, out));
        bench.close_all("swiglu", out, 1.0);
        let d_out = bench.mat(90, width, spare);
        bench.run(|backend| backend.swiglu_grad(gate_up, d_out));
        bench.close_all("gate and up", gate_up, 1.0);
        bench.close_all("out again", d_out, 1.0);
    }
}

pub fn cross_entropy(bench: &mut Bench) {
    // Classes, and columns that are none.
    for (rows, classes, more) in [(40, 37, 0), (20, 4096, 0), (5, 30_011, 0), (9, 4091, 5)] {
        let logits = bench.mat(rows, classes + more, 0);
        let kept = bench.mat(rows, classes + more, 0);
        bench.run(|backend| backend.copy(logits, kept));
        let ids: Vec<u32> = (0..rows + 2).map(|i| (i * 7919 % classes) as u32).collect();
        let targets = Slice::new(bench.ids(&ids), 2, rows);
        let losses = bench.exact_numbers(rows + 1);
        let losses = Slice::new(losses.buffer, 1, rows);
        bench.run(|backend| backend.cross_entropy(logits, classes, targets, losses, None));
        bench.close("losses", losses, 0.05);
        bench.run(|backend| backend.cross_entropy(kept, classes, targets, losses, Some(0.3)));
        bench.close("losses with gradients", losses, 0.05);
        // Mostly one number, that of the target: its rounding does not average out.
        bench.close_all("gradients", kept, 2.0);
        let none = bench.got.read(Slice::new(kept.buffer, classes, more));
        assert!(none.iter().all(|x| *x == 0.0), "{none:?}");
    }
}

pub fn experts(bench: &mut Bench) {
    for (experts, top_k, hidden, width, renormalise) in
        [(6, 2, 64, 24, true), (130, 8, 72, 136, false)]
    {
        let moe = MoeShape {
            experts,
            top_k,
            width,
            renormalise,
        };
        let (tokens, slots) = (90, 90 * top_k);
        let logits = bench.mat_of(Kind::Exact, tokens, experts, 0);
        let routes = Routes {
            ids: bench.ids(&vec![0; moe.ids_len(tokens)]),
            weights: bench.exact_numbers(slots).buffer,
        };
        bench.run(|backend| backend.route(&moe, logits, &routes));
        bench.close("weights", Slice::new(routes.weights, 0, slots), 0.05);
        let weights = ExpertWeights {
            gate_up: bench.mat_of(Kind::Weights, experts * 2 * width, hidden, 0),
            down: bench.mat_of(Kind::Weights, experts * hidden, width, 0),
        };
        let room = ExpertRoom {
            rows: bench.mat(slots, hidden, 0).buffer,
            mixed: bench.mat(slots, width, 0).buffer,
        };
        let (x, y) = (bench.mat(tokens, hidden, 0), bench.mat(tokens, hidden, 16));
        let gate_up = bench.mat(slots, 2 * width, 0);
        bench.run(|backend| {
            backend.experts(&moe, x, &routes, &weights, &room, gate_up, Some(y));
        });
        bench.close_all("gate and up", gate_up, 1.0);
        bench.close_all("y", y, 3.0);
        bench.agree(all(gate_up));
        let (d_y, d_x) = (bench.mat(tokens, hidden, 0), bench.mat(tokens, hidden, 0));
        let d_weights = bench.exact_numbers(slots);
        bench.run(|backend| {
            let d_weights = d_weights.buffer;
            backend.experts_grad(&moe, &routes, &weights, &room, gate_up, d_y, d_x, d_weights);
        });
        bench.close_all("d_x", d_x, 4.0);
        bench.close("d_weights", d_weights, 2.0);
        bench.agree(d_weights);
        let d_logits = bench.mat(tokens, experts, 0);
        bench.run(|backend| {
            backend.route_grad(&moe, logits, &routes, d_weights.buffer, d_logits);
        });
        bench.close_all("d_logits", d_logits, 1.5);
    }
}
