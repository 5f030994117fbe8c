//! Norms, products, experts, adapters.

use super::{AdaptersCase, ExpertsCase, Numbers, Ops, close};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn product(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let rows = weight.chunks(x.len());
    rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub fn rms_norm(ops: &dyn Ops) {
    let mut numbers = Numbers::new(1);
    for (rows, hidden) in [(1, 64), (7, 1024), (3, 2560), (2, 12288)] {
        let residual = numbers.stored(ops, rows * hidden, 3.0);
        let x = numbers.stored(ops, rows * hidden, 1.0);
        let weight = numbers.stored(ops, hidden, 1.0);
        for x in [None, Some(x.as_slice())] {
            let (sum, out) = ops.add_rms_norm(&residual, x, &weight, 1e-6);
            let exact_sum: Vec<f64> = (0..rows * hidden)
                .map(|i| f64::from(residual[i]) + x.map_or(0.0, |x| f64::from(x[i])))
                .collect();
            close("sum", ops, &sum, &exact_sum, 1.0);
            // The norm is that of the sum as it was stored.
            let exact: Vec<f64> = sum
                .chunks(hidden)
                .flat_map(|row| {
                    let mean =
                        row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / hidden as f64;
                    let scale = (mean + 1e-6).sqrt().recip();
                    row.iter()
                        .zip(&weight)
                        .map(move |(x, w)| f64::from(*x) * scale * f64::from(*w))
                })
                .collect();
            close("norm", ops, &out, &exact, 1.0);
        }
    }
}

pub fn silu_mul(ops: &dyn Ops) {
    let mut numbers = Numbers::new(2);
    for (rows, width) in [(1, 8), (5, 768), (3, 9728)] {
        let x = numbers.stored(ops, rows * 2 * width, 4.0);
        let exact: Vec<f64> = x
            .chunks(2 * width)
            .flat_map(|row| (0..width).map(|i| silu(f64::from(row[i])) * f64::from(row[width + i])))
            .collect();
        close("silu", ops, &ops.silu_mul(&x, width), &exact, 1.0);
    }
}

pub fn linear(ops: &dyn Ops) {
    let mut numbers = Numbers::new(3);
    for (rows, width, depth) in [
        (1, 64, 64),
        (3, 1000, 1024),
        (17, 256, 2560),
        (130, 64, 128),
    ] {
        let x = numbers.stored(ops, rows * depth, 1.0);
        let weight = numbers.stored(ops, width * depth, 0.05);
        let exact: Vec<f64> = x
            .chunks(depth)
            .flat_map(|row| product(&wide(row), &weight))
            .collect();
        close(
            "linear",
            ops,
            &ops.linear(&x, &weight, rows, width, depth),
            &exact,
            0.1,
        );
    }
}

/// The experts of a token and their weights; of equals the first.
fn route(logits: &[f32], chosen: usize, renormalise: bool) -> Vec<(usize, f64)> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let masses: Vec<f64> = logits.iter().map(|x| f64::from(x - top).exp()).collect();
    let all: f64 = masses.iter().sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    order.truncate(chosen);
    let kept: f64 = order.iter().map(|e| masses[*e]).sum();
    order
        .iter()
        .map(|e| (*e, masses[*e] / if renormalise { kept } else { all }))
        .collect()
}

pub fn experts(ops: &dyn Ops) {
    let mut numbers = Numbers::new(4);
    for (tokens, experts, chosen, hidden, width, renormalise) in [
        (1, 4, 2, 64, 32, true),
        (33, 8, 2, 64, 72, false),
        (50, 128, 8, 128, 96, true),
        (300, 4, 1, 64, 32, true),
    ] {
        let mut case = ExpertsCase {
            tokens,
            experts,
            chosen,
            hidden,
            width,
            renormalise,
            logits: (0..tokens * experts).map(|_| numbers.normal()).collect(),
            x: numbers.stored(ops, tokens * hidden, 1.0),
            gate_up: numbers.stored(ops, experts * 2 * width * hidden, 0.1),
            down: numbers.stored(ops, experts * hidden * width, 0.1),
        };
        // Equals: the first of them is taken.
        case.logits[1] = case.logits[0];
        let mut exact = Vec::new();
        for token in 0..tokens {
            let x = wide(&case.x[token * hidden..][..hidden]);
            let mut sum = vec![0.0; hidden];
            for (expert, weight) in route(
                &case.logits[token * experts..][..experts],
                chosen,
                renormalise,
            ) {
                let gate_up = product(
                    &x,
                    &case.gate_up[expert * 2 * width * hidden..][..2 * width * hidden],
                );
                let inner: Vec<f64> = (0..width)
                    .map(|i| silu(gate_up[i]) * gate_up[width + i])
                    .collect();
                let out = product(
                    &inner,
                    &case.down[expert * hidden * width..][..hidden * width],
                );
                sum.iter_mut().zip(out).for_each(|(s, o)| *s += weight * o);
            }
            exact.extend(sum);
        }
        // gate and up, their product, each expert's answer, the sum.
        close("experts", ops, &ops.experts(&case), &exact, 4.0);
    }
}

pub fn adapters(ops: &dyn Ops) {
    let mut numbers = Numbers::new(5);
    let tokens = 29;
    for (depth, rank, width, y_width, start) in [
        (64, 8, 32, 32, 0),
        (1024, 32, 256, 640, 128),
        (72, 16, 200, 208, 8),
    ] {
        let slots = (0..tokens)
            .map(|t| [None, Some(2), Some(0), Some(0), Some(1)][t / 4 % 5])
            .collect();
        let case = AdaptersCase {
            tokens,
            depth,
            rank,
            width,
            y_width,
            start,
            slots,
            scales: vec![2.0, 0.5, 1.25],
            x: numbers.stored(ops, tokens * depth, 1.0),
            y: numbers.stored(ops, tokens * y_width, 1.0),
            a: numbers.stored(ops, 3 * rank * depth, 0.1),
            b: numbers.stored(ops, 3 * width * rank, 0.1),
        };
        let mut exact = wide(&case.y);
        for token in 0..tokens {
            let Some(slot) = case.slots[token].map(|s| s as usize) else {
                continue;
            };
            let x = wide(&case.x[token * depth..][..depth]);
            let h = product(&x, &case.a[slot * rank * depth..][..rank * depth]);
            let added = product(&h, &case.b[slot * width * rank..][..width * rank]);
            for (i, added) in added.into_iter().enumerate() {
                exact[token * y_width + start + i] += f64::from(case.scales[slot]) * added;
            }
        }
        let got = ops.adapters(&case);
        close("adapters", ops, &got, &exact, 1.0);
        // Tokens without an adapter and columns outside are untouched.
        for (i, (got, before)) in got.iter().zip(&case.y).enumerate() {
            let column = i % y_width;
            let touched =
                case.slots[i / y_width].is_some() && (start..start + width).contains(&column);
            assert!(
                touched || got == before,
                "column {column} of token {}",
                i / y_width
            );
        }
    }
}
