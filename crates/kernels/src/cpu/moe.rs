//! Mixture of experts: which experts a token goes to, and their sum.

use super::linear::{Group, PackedLinear, linear_grouped};
use super::pool::Pool;
use super::{elementwise, simd};

/// The experts of each token, ascending by index, with their weights: `[tokens, top_k]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// Experts a token.
    pub top_k: usize,
    /// Experts.
    pub experts: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
}

/// Softmax in f32 over each row of router logits, the `top_k` most probable (of equals the lower index), and, where
/// `renormalise`, their weights divided by their sum.
///
/// # Panics
/// When `top_k` is 0 or above `experts`.
#[must_use]
pub fn route(logits: &[f32], experts: usize, top_k: usize, renormalise: bool) -> Routes {
    assert!(
        top_k > 0 && top_k <= experts,
        "top {top_k} of {experts} experts"
    );
    let mut routes = Routes {
        top_k,
        experts: Vec::with_capacity(logits.len() / experts * top_k),
        weights: Vec::with_capacity(logits.len() / experts * top_k),
    };
    let mut order: Vec<u32> = Vec::new();
    for row in logits.chunks(experts) {
        let most = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let parts: Vec<f32> = row.iter().map(|x| simd::exp(x - most)).collect();
        let sum: f32 = parts.iter().sum();
        order.clear();
        order.extend(0..experts as u32);
        order.sort_by(|a, b| {
            parts[*b as usize]
                .total_cmp(&parts[*a as usize])
                .then(a.cmp(b))
        });
        let chosen = &mut order[..top_k];
        let kept: f32 = chosen.iter().map(|e| parts[*e as usize]).sum();
        chosen.sort_unstable();
        let divisor = if renormalise { kept } else { sum };
        routes.experts.extend_from_slice(chosen);
        routes
            .weights
            .extend(chosen.iter().map(|e| parts[*e as usize] / divisor));
    }
    routes
}

/// The matrices of one layer's experts.
pub struct Experts {
    /// Gate and up of each, packed: `[2 · width, hidden]`.
    pub gate_up: Vec<PackedLinear>,
    /// Down of each: `[hidden, width]`.
    pub down: Vec<PackedLinear>,
}

/// `out[t] = Σ weight · down(silu(gate(x[t])) · up(x[t]))` over the token's experts, ascending.
///
/// # Panics
/// When lengths do not fit.
pub fn experts(pool: &Pool, x: &[f32], routes: &Routes, experts: &Experts, out: &mut [f32]) {
    let hidden = experts.down[0].outputs();
    let width = experts.down[0].inputs();
    assert_eq!(x.len() / hidden * routes.top_k, routes.experts.len());
    // Slots (token, choice) by expert; within one by token.
    let mut slots: Vec<u32> = (0..routes.experts.len() as u32).collect();
    slots.sort_by_key(|slot| (routes.experts[*slot as usize], *slot));
    let mut gathered = vec![0.0; slots.len() * hidden];
    for (slot, row) in slots.iter().zip(gathered.chunks_mut(hidden)) {
        let token = *slot as usize / routes.top_k;
        row.copy_from_slice(&x[token * hidden..(token + 1) * hidden]);
    }
    let expert_of = |row: usize| routes.experts[slots[row] as usize] as usize;
    let mut ranges = Vec::new();
    let mut start = 0;
    for row in 1..=slots.len() {
        if row == slots.len() || expert_of(row) != expert_of(start) {
            ranges.push((expert_of(start), start..row));
            start = row;
        }
    }
    let grouped = |matrices: &[PackedLinear], x: &[f32], y: &mut [f32]| {
        let groups: Vec<Group<'_>> = ranges
            .iter()
            .map(|(expert, rows)| Group {
                weights: &matrices[*expert],
                rows: rows.clone(),
            })
            .collect();
        linear_grouped(pool, x, &groups, y);
    };
    let mut gate_up = vec![0.0; slots.len() * 2 * width];
    grouped(&experts.gate_up, &gathered, &mut gate_up);
    let mut mixed = vec![0.0; slots.len() * width];
    elementwise::silu_mul(pool, &gate_up, width, &mut mixed);
    grouped(&experts.down, &mixed, &mut gathered);
    out.fill(0.0);
    // Rows come by ascending expert, and so do each token's sums.
    for (slot, row) in slots.iter().zip(gathered.chunks(hidden)) {
        let weight = routes.weights[*slot as usize];
        let token = *slot as usize / routes.top_k;
        for (out, y) in out[token * hidden..(token + 1) * hidden]
            .iter_mut()
            .zip(row)
        {
            *out += weight * y;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::numbers;
    use crate::cpu::{Form, RowSource};

    #[test]
    fn routes_are_the_most_probable_with_renormalised_weights() {
        let routes = route(&[0.0, 3.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0], 4, 2, true);
        assert_eq!(routes.experts, [1, 3, 0, 1]);
        let exact = 1.0 / (1.0 + (-1.0_f64).exp());
        assert!((f64::from(routes.weights[0]) - exact).abs() < 1e-6);
        assert!((routes.weights[0] + routes.weights[1] - 1.0).abs() < 1e-6);
        assert_eq!(routes.weights[2..], [0.5, 0.5]);
        let plain = route(&[0.0, 3.0, 1.0, 2.0], 4, 2, false);
        let sum = 1.0 + 3.0_f64.exp() + 1.0_f64.exp() + 2.0_f64.exp();
        assert!((f64::from(plain.weights[0]) - 3.0_f64.exp() / sum).abs() < 1e-6);
    }

    /// Against f64, 2e-5; and every token alone gives the same bits.
    #[test]
    fn experts_are_those_of_f64_and_do_not_depend_on_the_batch() {
        let (tokens, hidden, width, count, top_k) = (30, 48, 20, 6, 2);
        let pool = Pool::new(2);
        let matrix = |seed, n: usize, k: usize| {
            let w = numbers(seed, n * k);
            (
                PackedLinear::pack(&pool, Form::F32, k, &[RowSource::F32(&w)]).unwrap(),
                w,
            )
        };
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..count as u64 {
            gate_up.push(matrix(e + 1, 2 * width, hidden));
            down.push(matrix(e + 100, hidden, width));
        }
        let (gate_up, gate_up_w): (Vec<_>, Vec<_>) = gate_up.into_iter().unzip();
        let (down, down_w): (Vec<_>, Vec<_>) = down.into_iter().unzip();
        let all = Experts { gate_up, down };
        let x = numbers(50, tokens * hidden);
        let routes = route(&numbers(51, tokens * count), count, top_k, true);
        let mut out = vec![0.0; tokens * hidden];
        experts(&pool, &x, &routes, &all, &mut out);
        for token in 0..tokens {
            let x = &x[token * hidden..(token + 1) * hidden];
            let mut exact = vec![0.0_f64; hidden];
            for choice in token * top_k..(token + 1) * top_k {
                let e = routes.experts[choice] as usize;
                let dot = |w: &[f32], row: usize| -> f64 {
                    let pairs = w[row * hidden..(row + 1) * hidden].iter().zip(x);
                    pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
                };
                let h: Vec<f64> = (0..width)
                    .map(|i| {
                        let g = dot(&gate_up_w[e], i);
                        g / (1.0 + (-g).exp()) * dot(&gate_up_w[e], width + i)
                    })
                    .collect();
                for (row, exact) in exact.iter_mut().enumerate() {
                    let pairs = down_w[e][row * width..(row + 1) * width].iter().zip(&h);
                    let y: f64 = pairs.map(|(w, h)| f64::from(*w) * h).sum();
                    *exact += f64::from(routes.weights[choice]) * y;
                }
            }
            let got = &out[token * hidden..(token + 1) * hidden];
            for (exact, got) in exact.iter().zip(got) {
                assert!((exact - f64::from(*got)).abs() < 2e-5 * exact.abs().max(1.0));
            }
            let range = token * top_k..(token + 1) * top_k;
            let own = Routes {
                top_k,
                experts: routes.experts[range.clone()].to_vec(),
                weights: routes.weights[range].to_vec(),
            };
            let mut alone = vec![0.0; hidden];
            experts(&pool, x, &own, &all, &mut alone);
            assert_eq!(alone, got);
        }
    }
}
