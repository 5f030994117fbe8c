//! Attention over a paged cache: norm of q and k, RoPE, the cache, and causal attention, whole and in pieces.

use super::{AttentionCase, Numbers, Ops, close};

fn case(
    ops: &dyn Ops,
    seed: u64,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    positions: &[usize],
) -> AttentionCase {
    let mut numbers = Numbers::new(seed);
    let width = (heads + 2 * kv_heads) * head_dim;
    AttentionCase {
        heads,
        kv_heads,
        head_dim,
        eps: 1e-6,
        theta: 1e6,
        q_weight: numbers.stored(ops, head_dim, 1.0),
        k_weight: numbers.stored(ops, head_dim, 1.0),
        qkv: positions
            .iter()
            .map(|p| numbers.stored(ops, p * width, 1.0))
            .collect(),
        steps: Vec::new(),
    }
}

const SHAPES: [(usize, usize, usize); 7] = [
    (16, 8, 128),
    (32, 8, 128),
    (64, 8, 128),
    (40, 8, 128),
    (4, 4, 16),
    (4, 2, 32),
    (4, 1, 64),
];

fn normed(x: &[f32], weight: &[f32], eps: f32, turn: &[f32]) -> Vec<f64> {
    let (dim, half) = (x.len(), x.len() / 2);
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
    let scale = (mean + f64::from(eps)).sqrt().recip();
    let y: Vec<f64> = x
        .iter()
        .zip(weight)
        .map(|(x, w)| f64::from(*x) * scale * f64::from(*w))
        .collect();
    let turned = |i: usize| {
        let (cos, sin) = (f64::from(turn[i % half]), f64::from(turn[half + i % half]));
        if i < half {
            y[i] * cos - y[i + half] * sin
        } else {
            y[i] * cos + y[i - half] * sin
        }
    };
    (0..dim).map(turned).collect()
}

/// All positions of one sequence at once.
fn exact(case: &AttentionCase, sequence: usize) -> Vec<f64> {
    let (dim, width, turns) = (case.head_dim, case.width(), case.turns());
    let part =
        |position: usize, head: usize| &case.qkv[sequence][position * width + head * dim..][..dim];
    let positions = case.positions(sequence);
    let turn = |p: usize| &turns[p * dim..][..dim];
    let k_of = |p, kv| normed(part(p, case.heads + kv), &case.k_weight, case.eps, turn(p));
    let keys: Vec<Vec<Vec<f64>>> = (0..case.kv_heads)
        .map(|kv| (0..positions).map(|p| k_of(p, kv)).collect())
        .collect();
    let mut out = Vec::new();
    for position in 0..positions {
        for head in 0..case.heads {
            let kv = head / (case.heads / case.kv_heads);
            let q = normed(
                part(position, head),
                &case.q_weight,
                case.eps,
                turn(position),
            );
            let scores: Vec<f64> = keys[kv][..=position]
                .iter()
                .map(|k| k.iter().zip(&q).map(|(k, q)| k * q).sum::<f64>() / (dim as f64).sqrt())
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let masses: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let all: f64 = masses.iter().sum();
            let mut sum = vec![0.0; dim];
            for (p, mass) in masses.iter().enumerate() {
                let v = part(p, case.heads + case.kv_heads + kv);
                sum.iter_mut()
                    .zip(v)
                    .for_each(|(s, v)| *s += mass / all * f64::from(*v));
            }
            out.extend(sum);
        }
    }
    out
}

fn check(what: &str, ops: &dyn Ops, case: &AttentionCase) {
    for (sequence, got) in ops.attention(case).iter().enumerate() {
        // q, k, the weights of the softmax, the result; scores of deviation over 1 make errors of q and k larger.
        let what = format!(
            "{what}, {} / {} heads of {}, sequence {sequence}",
            case.heads, case.kv_heads, case.head_dim
        );
        close(&what, ops, got, &exact(case, sequence), 4.0);
    }
}

pub fn in_one_piece(ops: &dyn Ops) {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let mut case = case(ops, 10 + seed as u64, shape, &[1, 16, 67, 130]);
        case.steps = vec![(0..4).map(|s| (s, 0, case.positions(s))).collect()];
        check("in one piece", ops, &case);
    }
}

pub fn in_chunks_then_one_by_one(ops: &dyn Ops) {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let mut case = case(ops, 20 + seed as u64, shape, &[90, 41]);
        // A row of one token beside a chunk is mixed prefill.
        case.steps = vec![
            vec![(0, 0, 20)],
            vec![(0, 20, 51), (1, 0, 1)],
            vec![(1, 1, 38), (0, 71, 1)],
        ];
        case.steps
            .extend((0..2).map(|n| vec![(1, 39 + n, 1), (0, 72 + n, 1)]));
        case.steps.extend((74..90).map(|p| vec![(0, p, 1)]));
        check("in chunks", ops, &case);
    }
}

pub fn of_many_rows_at_once(ops: &dyn Ops) {
    let lengths: Vec<usize> = (0..33).map(|n| 1 + n * 7 % 90).collect();
    let mut case = case(ops, 30, (8, 4, 32), &lengths);
    case.steps = vec![
        (0..33)
            .filter(|s| lengths[*s] > 1)
            .map(|s| (s, 0, lengths[s] - 1))
            .collect(),
    ];
    case.steps
        .push((0..33).map(|s| (s, lengths[s] - 1, 1)).collect());
    check("many rows", ops, &case);
}

pub fn over_a_long_row(ops: &dyn Ops) {
    let mut case = case(ops, 40, (2, 1, 128), &[1500]);
    case.steps = vec![
        vec![(0, 0, 1000)],
        vec![(0, 1000, 498)],
        vec![(0, 1498, 1)],
        vec![(0, 1499, 1)],
    ];
    check("a long row", ops, &case);
}
