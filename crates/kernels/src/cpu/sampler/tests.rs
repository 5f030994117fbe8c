use std::sync::Arc;

use super::*;
use crate::cpu::simd::tests::numbers;
use crate::sampling::Seen;

/// The plainest instructions, on this thread.
fn pool() -> Pool {
    Pool::with_isa(1, Isa::Portable)
}

fn probabilities(logits: &[f32], temperature: f64) -> Vec<f64> {
    let parts: Vec<f64> = logits
        .iter()
        .map(|x| (f64::from(*x) / temperature).exp())
        .collect();
    let sum: f64 = parts.iter().sum();
    parts.iter().map(|p| p / sum).collect()
}

/// Draws 40,000 tokens and compares with the exact distribution. The limit is passed by chance once in 10⁶ or so
/// (chi-square of up to 60 degrees of freedom), and the seeds are fixed.
fn check(logits: &[f32], how: &Sampling, exact: &[f64]) {
    let draws = 40_000;
    let mut counts = vec![0_u32; logits.len()];
    for step in 0..draws {
        let how = Sampling {
            seed: 7,
            step,
            ..how.clone()
        };
        counts[draw(&pool(), &mut logits.to_vec(), &how).unwrap().id as usize] += 1;
    }
    let (mut chi, mut free) = (0.0, -1.0);
    for (id, (count, p)) in counts.iter().zip(exact).enumerate() {
        let expected = p * f64::from(draws);
        if *p == 0.0 {
            assert_eq!(*count, 0, "{id} cannot be drawn");
        } else {
            assert!(
                expected > 5.0,
                "the test's distribution has too thin a tail"
            );
            chi += (f64::from(*count) - expected).powi(2) / expected;
            free += 1.0;
        }
    }
    let limit = free + 5.0 * (2.0_f64 * free).sqrt() + 12.0;
    assert!(
        chi < limit,
        "chi-square {chi} with {free} degrees of freedom"
    );
}

fn at_step(how: &Sampling, step: u32) -> Sampling {
    Sampling {
        step,
        ..how.clone()
    }
}

fn logits() -> Vec<f32> {
    numbers(5, 40).iter().map(|x| x * 2.0).collect()
}

/// Zero but for the ids that `keep` says, and one in sum.
fn only(mut exact: Vec<f64>, keep: impl Fn(usize, f64) -> bool) -> Vec<f64> {
    for (id, p) in exact.iter_mut().enumerate() {
        if !keep(id, *p) {
            *p = 0.0;
        }
    }
    let sum: f64 = exact.iter().sum();
    exact.iter().map(|p| p / sum).collect()
}

#[test]
fn draws_follow_the_exact_distribution() {
    let logits = logits();
    let plain = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    check(&logits, &plain, &probabilities(&logits, 1.0));
    let warm = Sampling {
        temperature: 1.7,
        ..plain.clone()
    };
    check(&logits, &warm, &probabilities(&logits, 1.7));
    let exact = probabilities(&logits, 1.0);
    let mut sorted = exact.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let top_k = Sampling {
        top_k: 7,
        ..plain.clone()
    };
    check(&logits, &top_k, &only(exact.clone(), |_, p| p >= sorted[6]));
    let needed = (1..)
        .find(|n| sorted[..*n].iter().sum::<f64>() >= 0.6)
        .unwrap();
    let top_p = Sampling {
        top_p: 0.6,
        ..plain.clone()
    };
    check(
        &logits,
        &top_p,
        &only(exact.clone(), |_, p| p >= sorted[needed - 1]),
    );
    let min_p = Sampling {
        min_p: 0.3,
        ..plain.clone()
    };
    check(
        &logits,
        &min_p,
        &only(exact.clone(), |_, p| p >= 0.3 * sorted[0]),
    );
    // top-p is of all probabilities, before min-p takes its share.
    let both = Sampling {
        top_p: 0.6,
        min_p: 0.3,
        ..plain.clone()
    };
    let keep = |_: usize, p: f64| p >= sorted[needed - 1] && p >= 0.3 * sorted[0];
    check(&logits, &both, &only(exact.clone(), keep));
    let odd = Arc::new([0xaaaa_aaaa, 0xaaaa_aaaa]);
    let masked = Sampling {
        allowed: Some(odd),
        ..plain.clone()
    };
    check(&logits, &masked, &only(exact, |id, _| id % 2 == 1));
}

#[test]
fn penalties_and_bias_move_logits_and_not_reported_logprobs() {
    let logits = logits();
    let seen = [(3, 2), (4, 0), (9, 1), (500, 1)];
    let penalties = Penalties {
        presence: 0.4,
        frequency: 0.2,
        repetition: 1.3,
        seen: seen
            .map(|(id, in_answer)| Seen { id, in_answer })
            .into_iter()
            .collect(),
    };
    let how = Sampling {
        temperature: 1.0,
        penalties: Some(penalties),
        bias: Some(Arc::new([(4, 1.5), (501, 9.0)])),
        logprobs: Some(3),
        ..Sampling::default()
    };
    let mut moved = logits.clone();
    for (id, times) in [(3, 2.0), (4, 0.0), (9, 1.0)] {
        let x = moved[id];
        moved[id] = if x > 0.0 { x / 1.3 } else { x * 1.3 };
        if times > 0.0 {
            moved[id] -= 0.4 + 0.2 * times;
        }
    }
    moved[4] += 1.5;
    check(&logits, &how, &probabilities(&moved, 1.0));
    let exact = probabilities(&logits, 1.0);
    for step in 0..200 {
        let drawn = draw(&pool(), &mut logits.clone(), &at_step(&how, step)).unwrap();
        assert!((f64::from(drawn.logprob) - exact[drawn.id as usize].ln()).abs() < 1e-5);
        assert_eq!(drawn.top.len(), 3);
        assert!(drawn.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    }
}

#[test]
fn greedy_takes_the_largest_and_of_equals_the_lowest() {
    let mut logits = vec![1.0, 5.0, 5.0, -1.0];
    assert_eq!(
        draw(&pool(), &mut logits, &Sampling::default()).unwrap().id,
        1
    );
    let how = Sampling {
        allowed: Some(Arc::new([0b1101])),
        ..Sampling::default()
    };
    assert_eq!(draw(&pool(), &mut logits, &how).unwrap().id, 2);
}

#[test]
fn what_cannot_be_drawn_is_an_error() {
    for temperature in [0.0, 1.0] {
        let none = Sampling {
            temperature,
            allowed: Some(Arc::new([])),
            ..Sampling::default()
        };
        assert_eq!(
            draw(&pool(), &mut [1.0, 2.0], &none),
            Err(DrawError::NothingAllowed)
        );
        let plain = Sampling {
            temperature,
            ..Sampling::default()
        };
        for bad in [
            [1.0, f32::NAN],
            [f32::NAN, 1.0],
            [f32::NAN; 2],
            [f32::INFINITY, 0.0],
        ] {
            assert_eq!(
                draw(&pool(), &mut bad.clone(), &plain),
                Err(DrawError::NotANumber)
            );
        }
    }
}

#[test]
fn one_token_is_kept_however_low_top_p_is() {
    let how = Sampling {
        temperature: 1.0,
        top_p: 1e-9,
        ..Sampling::default()
    };
    for step in 0..50 {
        let drawn = draw(&pool(), &mut [0.0, 3.0, 0.0], &at_step(&how, step)).unwrap();
        assert_eq!(drawn.id, 1);
    }
}

/// The known answers of the paper's own test file (`philox4x32 10`).
#[test]
fn philox_gives_the_known_answers() {
    assert_eq!(
        philox([0; 4], [0; 2]),
        [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
    );
    assert_eq!(
        philox([u32::MAX; 4], [u32::MAX; 2]),
        [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
    );
}

#[test]
fn a_seed_and_a_step_give_one_number_and_others_another() {
    assert_eq!(uniform(5, 9).to_bits(), uniform(5, 9).to_bits());
    let mut all: Vec<u64> = (0..100)
        .flat_map(|s| (0..100).map(move |t| uniform(s, t).to_bits()))
        .collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 10_000);
}

#[test]
fn a_temperature_that_is_nearly_0_is_0() {
    for temperature in [1e-6, 1e-39, f32::MIN_POSITIVE] {
        let how = Sampling {
            temperature,
            top_k: 20,
            allowed: Some(Arc::new([0b110])),
            ..Sampling::default()
        };
        let drawn = draw(&pool(), &mut [9.0, 1.0, 3.0], &how).unwrap();
        assert_eq!(drawn.id, 2, "{temperature}");
    }
    // The coldest that is none: still the likeliest, and what is not allowed is not drawn.
    let how = Sampling {
        temperature: crate::sampling::GREEDY_BELOW,
        allowed: Some(Arc::new([0b110])),
        ..Sampling::default()
    };
    assert_eq!(draw(&pool(), &mut [9.0, 1.0, 3.0], &how).unwrap().id, 2);
}
