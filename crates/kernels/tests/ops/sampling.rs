//! The sampler against the exact distribution.

use std::collections::BTreeMap;

use super::{Drawn, How, Numbers, Ops};

fn logits(seed: u64, rows: usize, columns: usize) -> Vec<f32> {
    let mut numbers = Numbers::new(seed);
    (0..rows * columns)
        .map(|_| numbers.normal() * 2.0)
        .collect()
}

pub fn greedy(ops: &dyn Ops) {
    let columns = 1_500;
    let mut x = logits(50, 3, columns);
    for id in [700, 701, 1_400] {
        x[id] = 50.0;
    }
    x[columns + 1_499] = 50.0;
    x[2 * columns] = 50.0;
    let drawn = ops.sample(
        &x,
        columns,
        columns,
        &[How::at(0.0), How::at(0.0), How::at(0.0)],
    );
    let ids: Vec<Option<u32>> = drawn.iter().map(|d| d.id).collect();
    assert_eq!(ids, [Some(700), Some(1_499), Some(0)]);
}

/// What may be drawn and how likely: top-k, top-p over what that left, min-p.
fn exact(x: &[f32], how: &How) -> BTreeMap<u32, f64> {
    let value = |x: &f32| f64::from(x / how.temperature);
    let mut all: Vec<(u32, f64)> = (0..).zip(x.iter().map(value)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let top = all[0].1;
    let mass = |x: f64| (x - top).exp();
    if how.top_k > 0 {
        all.truncate(how.top_k as usize);
    }
    let total: f64 = all.iter().map(|(_, x)| mass(*x)).sum();
    let mut before = 0.0;
    let mut reached = |x: f64| {
        let is_over = before >= f64::from(how.top_p) * total;
        before += mass(x);
        is_over
    };
    let kept = all
        .iter()
        .position(|(_, x)| reached(*x))
        .unwrap_or(all.len());
    all.truncate(kept);
    all.retain(|(_, x)| mass(*x) >= f64::from(how.min_p));
    let total: f64 = all.iter().map(|(_, x)| mass(*x)).sum();
    all.into_iter()
        .map(|(id, x)| (id, mass(x) / total))
        .collect()
}

pub fn chi_square(ops: &dyn Ops) {
    let columns = 300;
    let row = logits(51, 1, columns);
    let plain = How::at(1.0);
    let ways = [
        plain.clone(),
        How {
            top_k: 20,
            ..How::at(0.6)
        },
        How {
            top_p: 0.8,
            ..plain.clone()
        },
        How {
            min_p: 0.05,
            ..plain.clone()
        },
        How {
            top_k: 20,
            top_p: 0.95,
            ..How::at(0.6)
        },
        How {
            top_k: 40,
            top_p: 0.9,
            min_p: 0.02,
            ..How::at(1.3)
        },
        How {
            top_k: 1,
            ..How::at(0.7)
        },
    ];
    let draws = 20_000;
    for way in ways {
        let likely = exact(&row, &way);
        let mut counts: BTreeMap<u32, f64> = BTreeMap::new();
        for batch in 0..draws / 500 {
            let hows: Vec<How> = (0..500)
                .map(|n| How {
                    seed: 7,
                    step: batch * 500 + n,
                    ..way.clone()
                })
                .collect();
            for drawn in ops.sample(&row.repeat(500), columns, columns, &hows) {
                *counts.entry(drawn.id.unwrap()).or_default() += 1.0;
            }
        }
        for id in counts.keys() {
            assert!(
                likely.contains_key(id),
                "{way:?} drew {id}, which is filtered out"
            );
        }
        // Cells with fewer than 5 expected are one.
        let (mut sum, mut cells, mut rare, mut rare_seen) = (0.0, 0.0, 0.0, 0.0);
        for (id, p) in &likely {
            let (expected, seen) = (p * f64::from(draws), counts.get(id).copied().unwrap_or(0.0));
            if expected < 5.0 {
                rare += expected;
                rare_seen += seen;
            } else {
                sum += (seen - expected).powi(2) / expected;
                cells += 1.0;
            }
        }
        if rare > 0.0 {
            sum += (rare_seen - rare).powi(2) / rare.max(1.0);
            cells += 1.0;
        }
        // Five deviations above the mean of the distribution with so many cells.
        let allowed = cells - 1.0 + 5.0 * (2.0 * f64::max(cells - 1.0, 1.0)).sqrt();
        assert!(
            sum <= allowed,
            "{way:?}: chi-square {sum:.1} over {cells} cells, {allowed:.1} allowed"
        );
    }
}

pub fn seeds(ops: &dyn Ops) {
    let columns = 2_000;
    let x = logits(52, 8, columns);
    let how = |n: u32| How {
        top_p: 0.95,
        seed: 0xDEAD_BEEF_0000_0001 + u64::from(n),
        step: 3 * n,
        ..How::at(1.0)
    };
    let hows: Vec<How> = (0..8).map(how).collect();
    let together = ops.sample(&x, columns, columns, &hows);
    assert_eq!(
        together,
        ops.sample(&x, columns, columns, &hows),
        "the same call"
    );
    for (n, (row, how)) in x.chunks(columns).zip(&hows).enumerate() {
        let alone = ops.sample(row, columns, columns, std::slice::from_ref(how));
        assert_eq!(alone[0], together[n], "row {n} alone");
    }
    let other = |change: fn(&mut How)| {
        let mut hows = vec![How::at(1.0); 64];
        let first = ops.sample(&x[..columns].repeat(64), columns, columns, &hows);
        assert!(first.iter().all(|d| d.id == first[0].id));
        hows.iter_mut()
            .enumerate()
            .for_each(|(n, how)| (0..n).for_each(|_| change(how)));
        let ids: std::collections::BTreeSet<_> = ops
            .sample(&x[..columns].repeat(64), columns, columns, &hows)
            .iter()
            .map(|d| d.id)
            .collect();
        assert!(ids.len() > 8, "{} ids of 64 draws", ids.len());
    };
    other(|how| how.seed += 1);
    other(|how| how.seed += 1 << 32);
    other(|how| how.step += 1);
}

pub fn never(ops: &dyn Ops) {
    let (columns, ids_end) = (640, 601);
    let mut x = logits(53, 64, columns);
    // What pads the table is by far the most likely.
    x.chunks_mut(columns)
        .for_each(|row| row[ids_end..].fill(40.0));
    let allowed: Vec<u32> = (0..600).filter(|id| id % 7 == 3).collect();
    for temperature in [0.0, 1.0] {
        let how = |n: u32| How {
            step: n,
            allowed: n.is_multiple_of(2).then(|| allowed.clone()),
            top_count: 5,
            ..How::at(temperature)
        };
        let hows: Vec<How> = (0..64).map(how).collect();
        for (how, drawn) in hows.iter().zip(ops.sample(&x, columns, ids_end, &hows)) {
            let id = drawn.id.unwrap();
            assert!((id as usize) < ids_end, "{id} pads the table");
            assert!(
                how.allowed.as_ref().is_none_or(|a| a.contains(&id)),
                "{id} is masked"
            );
            assert!(
                drawn.top.iter().all(|(id, _)| (*id as usize) < ids_end),
                "{:?}",
                drawn.top
            );
        }
    }
}

pub fn penalties(ops: &dyn Ops) {
    let columns = 64;
    let mut x = vec![0.0; columns];
    (x[5], x[6], x[7], x[8]) = (4.0, 3.5, 3.0, -1.0);
    let first = |how: How| ops.sample(&x, columns, columns, &[how])[0].id.unwrap();
    assert_eq!(first(How::at(0.0)), 5);
    assert_eq!(
        first(How {
            bias: vec![(5, -1.0)],
            ..How::at(0.0)
        }),
        6
    );
    assert_eq!(
        first(How {
            bias: vec![(8, 100.0), (5, -1.0)],
            ..How::at(0.0)
        }),
        8
    );
    // 4 - 0.75 < 3.5; a prompt's ids have no presence.
    assert_eq!(
        first(How {
            presence: 0.75,
            written: vec![5],
            ..How::at(0.0)
        }),
        6
    );
    assert_eq!(
        first(How {
            presence: 0.75,
            prompt: vec![5],
            ..How::at(0.0)
        }),
        5
    );
    // Once is not enough, twice is.
    assert_eq!(
        first(How {
            frequency: 0.3,
            written: vec![5],
            ..How::at(0.0)
        }),
        5
    );
    assert_eq!(
        first(How {
            frequency: 0.3,
            written: vec![5, 5],
            ..How::at(0.0)
        }),
        6
    );
    // 4 / 1.2 < 3.5, prompt or not.
    assert_eq!(
        first(How {
            repetition: 1.2,
            written: vec![5],
            ..How::at(0.0)
        }),
        6
    );
    assert_eq!(
        first(How {
            repetition: 1.2,
            prompt: vec![5],
            ..How::at(0.0)
        }),
        6
    );
    assert_eq!(
        first(How {
            repetition: 1.2,
            prompt: vec![5, 6],
            ..How::at(0.0)
        }),
        5
    );
    // Negative logits are multiplied: all others are masked, -1 · 2 < -1.9.
    x[9] = -1.9;
    let how = How {
        repetition: 2.0,
        prompt: vec![8],
        allowed: Some(vec![8, 9]),
        ..How::at(0.0)
    };
    assert_eq!(ops.sample(&x, columns, columns, &[how])[0].id, Some(9));
}

pub fn logprobs(ops: &dyn Ops) {
    let columns = 3_000;
    let x = logits(54, 6, columns);
    let how = |n: u32| How {
        step: n,
        top_k: 5,
        top_count: [0, 1, 20][n as usize % 3],
        bias: vec![(3, 9.0)],
        ..How::at(0.8)
    };
    let hows: Vec<How> = (0..6).map(how).collect();
    for ((row, how), Drawn { id, logprob, top }) in x
        .chunks(columns)
        .zip(&hows)
        .zip(ops.sample(&x, columns, columns, &hows))
    {
        let lse = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        let of = |id: u32| f64::from(row[id as usize]) - lse;
        assert!(
            (f64::from(logprob) - of(id.unwrap())).abs() < 2e-5,
            "{logprob} of {id:?}"
        );
        let mut order: Vec<u32> = (0..columns as u32).collect();
        order.sort_by(|a, b| of(*b).total_cmp(&of(*a)).then(a.cmp(b)));
        let ids: Vec<u32> = top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, order[..how.top_count as usize]);
        assert!(
            top.iter()
                .all(|(id, p)| (f64::from(*p) - of(*id)).abs() < 2e-5),
            "{top:?}"
        );
    }
}

pub fn nothing(ops: &dyn Ops) {
    let columns = 100;
    let mut x = logits(55, 3, columns);
    x[50] = f32::NAN;
    let hows = [
        How::at(1.0),
        How {
            allowed: Some(Vec::new()),
            ..How::at(1.0)
        },
        How::at(1.0),
    ];
    let ids: Vec<bool> = ops
        .sample(&x, columns, columns, &hows)
        .iter()
        .map(|d| d.id.is_some())
        .collect();
    assert_eq!(ids, [false, false, true]);
}
