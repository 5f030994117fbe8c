use super::*;
use crate::cpu::Isa;
use crate::cpu::kv::{KvForm, KvShape, Place, QkvShape, norm_rope_write};
use crate::cpu::simd::tests::numbers;

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 80;
const WIDTH: usize = (HEADS + 2 * KV_HEADS) * DIM;

fn cache() -> KvCache {
    cache_in(KvForm::F32)
}

fn cache_in(form: KvForm) -> KvCache {
    let shape = KvShape {
        layers: 2,
        blocks: 40,
        heads: KV_HEADS,
        head_dim: DIM,
        form,
    };
    KvCache::new(shape).unwrap()
}

fn turns(positions: &[usize]) -> Vec<f32> {
    let of = |position: usize| {
        let angle = move |i: usize| position as f64 / 100_f64.powf(i as f64 / (DIM / 2) as f64);
        let cos = (0..DIM / 2).map(move |i| angle(i).cos() as f32);
        cos.chain((0..DIM / 2).map(move |i| angle(i).sin() as f32))
    };
    positions.iter().flat_map(|p| of(*p)).collect()
}

/// Runs tokens `range` of one sequence of rows `qkv` as one step.
fn step(
    pool: &Pool,
    cache: &mut KvCache,
    qkv: &[f32],
    range: std::ops::Range<usize>,
    blocks: &[u32],
) -> Vec<f32> {
    let positions: Vec<usize> = range.clone().collect();
    let places: Vec<Place> = positions
        .iter()
        .map(|p| Place {
            block: blocks[p / 16],
            offset: (p % 16) as u32,
        })
        .collect();
    let mut rows = qkv[range.start * WIDTH..range.end * WIDTH].to_vec();
    let (q_norm, k_norm) = (numbers(90, DIM), numbers(91, DIM));
    let shape = QkvShape {
        heads: HEADS,
        q_norm: &q_norm,
        k_norm: &k_norm,
        eps: 1e-6,
    };
    norm_rope_write(
        pool,
        &shape,
        &mut rows,
        &turns(&positions),
        &places,
        cache,
        1,
    );
    let mut out = vec![0.0; range.len() * HEADS * DIM];
    let span = Span {
        row: 0,
        tokens: range.len(),
        start: range.start,
        blocks,
    };
    attention(pool, &rows, WIDTH, HEADS, 0.3, &[span], cache, 1, &mut out);
    out
}

/// The same in f64, with no cache.
fn exact(qkv: &[f32], tokens: usize) -> Vec<f64> {
    let (q_norm, k_norm) = (numbers(90, DIM), numbers(91, DIM));
    let head = |token: usize, head: usize| -> Vec<f64> {
        let x = &qkv[token * WIDTH + head * DIM..][..DIM];
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        if head >= HEADS + KV_HEADS {
            return x;
        }
        let weight = if head < HEADS { &q_norm } else { &k_norm };
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / DIM as f64 + 1e-6).sqrt();
        let x: Vec<f64> = x
            .iter()
            .zip(weight)
            .map(|(x, w)| x / rms * f64::from(*w))
            .collect();
        let turns = turns(&[token]);
        let half = DIM / 2;
        (0..DIM)
            .map(|i| {
                let (c, s) = (
                    f64::from(turns[i % half]),
                    f64::from(turns[half + i % half]),
                );
                if i < half {
                    x[i] * c - x[i + half] * s
                } else {
                    x[i] * c + x[i - half] * s
                }
            })
            .collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut out = Vec::new();
    for token in 0..tokens {
        for h in 0..HEADS {
            let kv = h / (HEADS / KV_HEADS);
            let q = head(token, h);
            let scores: Vec<f64> = (0..=token)
                .map(|t| (0.3 * dot(&q, &head(t, HEADS + kv))).exp())
                .collect();
            let sum: f64 = scores.iter().sum();
            let mut row = vec![0.0; DIM];
            for (t, score) in scores.iter().enumerate() {
                for (row, v) in row.iter_mut().zip(head(t, HEADS + KV_HEADS + kv)) {
                    *row += score / sum * v;
                }
            }
            out.extend(row);
        }
    }
    out
}

/// Against f64, 2e-6 of values in ±1, with keys and values in bf16 2e-2; chunked, token by token, on other blocks and other
/// instructions: the same bits.
#[test]
fn whole_chunked_and_stepwise_agree_with_f64_and_bit_for_bit_with_each_other() {
    for (form, tolerance) in [(KvForm::F32, 2e-6), (KvForm::Bf16, 2e-2)] {
        agree(form, tolerance);
    }
}

fn agree(form: KvForm, tolerance: f64) {
    let tokens = 53;
    let qkv = numbers(1, tokens * WIDTH);
    let pool = Pool::new(2);
    let whole = step(&pool, &mut cache_in(form), &qkv, 0..tokens, &[3, 9, 1, 20]);
    for (got, exact) in whole.iter().zip(exact(&qkv, tokens)) {
        let error = (f64::from(*got) - exact).abs();
        assert!(error < tolerance, "{form:?}: {got} for {exact}");
    }
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        if !isa.is_available() {
            continue;
        }
        for sizes in [
            vec![tokens],
            vec![1; tokens],
            vec![16, 1, 7, 29],
            vec![5, 48],
        ] {
            let pool = Pool::with_isa(3, isa);
            let mut cache = cache_in(form);
            // Stale numbers of an earlier sequence must not show.
            step(
                &pool,
                &mut cache,
                &numbers(2, 48 * WIDTH),
                0..48,
                &[0, 7, 33],
            );
            let mut got = Vec::new();
            let mut at = 0;
            for size in &sizes {
                got.extend(step(&pool, &mut cache, &qkv, at..at + size, &[7, 0, 33, 2]));
                at += size;
            }
            assert!(got == whole, "{form:?} {isa:?} {sizes:?}: other bits");
        }
    }
}

#[test]
fn spans_of_a_batch_do_not_touch_each_other() {
    let pool = Pool::new(2);
    let (a, b) = (numbers(3, 20 * WIDTH), numbers(4, 33 * WIDTH));
    let alone_a = step(&pool, &mut cache(), &a, 0..20, &[0, 1]);
    let mut shared = cache();
    step(&pool, &mut shared, &a, 0..19, &[4, 2]);
    step(&pool, &mut shared, &b, 0..32, &[6, 5, 9]);
    let (q_norm, k_norm) = (numbers(90, DIM), numbers(91, DIM));
    let shape = QkvShape {
        heads: HEADS,
        q_norm: &q_norm,
        k_norm: &k_norm,
        eps: 1e-6,
    };
    let mut rows = [&a[19 * WIDTH..], &b[32 * WIDTH..]].concat();
    let places = [
        Place {
            block: 2,
            offset: 3,
        },
        Place {
            block: 9,
            offset: 0,
        },
    ];
    norm_rope_write(
        &pool,
        &shape,
        &mut rows,
        &turns(&[19, 32]),
        &places,
        &mut shared,
        1,
    );
    let spans = [
        Span {
            row: 0,
            tokens: 1,
            start: 19,
            blocks: &[4, 2],
        },
        Span {
            row: 1,
            tokens: 1,
            start: 32,
            blocks: &[6, 5, 9],
        },
    ];
    let mut out = vec![0.0; 2 * HEADS * DIM];
    attention(
        &pool, &rows, WIDTH, HEADS, 0.3, &spans, &shared, 1, &mut out,
    );
    assert_eq!(out[..HEADS * DIM], alone_a[19 * HEADS * DIM..]);
    let alone_b = step(&pool, &mut cache(), &b, 0..33, &[0, 1, 2]);
    assert_eq!(out[HEADS * DIM..], alone_b[32 * HEADS * DIM..]);
}
