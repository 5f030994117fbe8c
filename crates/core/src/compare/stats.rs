//! Intervals of means over tasks, at 95 %.
//!
//! The task is the unit: samples of one task are not independent, so each task counts with the mean over its samples, and
//! the interval is made of the spread between tasks (clustered standard errors and paired differences, as Miller has
//! them: *Adding Error Bars to Evals*, 2024, arXiv:2411.00640, sections 2 and 4). Where shares are measured, tasks that
//! nobody has seen are added, half of which go either way, so that an interval is not empty because all tasks agree: two
//! and two for a share (Agresti and Coull, *The American Statistician* 52, 1998), a half of each of the four outcomes for
//! a paired difference of shares (Agresti and Min, *Statistics in Medicine* 24, 2005). With one sample a task these are
//! their formulas, but for the quantile, which is Student's for the tasks that there are. Nothing is drawn at random.

use serde::{Deserialize, Serialize};

/// The quantile that leaves 2.5 % above it.
const QUANTILE: f64 = 0.975;
/// Steps of a bisection: beyond what a double tells apart.
const BISECTIONS: u32 = 200;
/// Terms of a continued fraction, which comes to its end after some tens.
const TERMS_MAX: u32 = 500;

/// A mean over tasks and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean over tasks.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Estimate {
    /// Of a quantity with its sign turned.
    pub fn mirrored(self) -> Self {
        Self {
            value: -self.value,
            low: -self.high,
            high: -self.low,
        }
    }
}

/// The mean of shares, each of a task and in [0, 1]. `None` without tasks.
pub fn share(tasks: &[f64]) -> Option<Estimate> {
    adjusted(tasks, 4.0, 2.0, 2.0, (0.0, 1.0))
}

/// The mean of differences of shares, each of a task and in [-1, 1]. `None` without tasks.
pub fn difference_of_shares(tasks: &[f64]) -> Option<Estimate> {
    adjusted(tasks, 2.0, 0.0, 1.0, (-1.0, 1.0))
}

/// The mean of any numbers, one a task: Student's interval. With a single task nothing is known of the spread, and the
/// interval is the number itself; `None` without tasks.
pub fn mean(tasks: &[f64]) -> Option<Estimate> {
    let n = tasks.len() as f64;
    let value = plain_mean(tasks)?;
    let squares: f64 = tasks.iter().map(|x| (x - value).powi(2)).sum();
    let half = match tasks.len() {
        1 => 0.0,
        tasks => quantile(tasks) * (squares / (n - 1.0) / n).sqrt(),
    };
    Some(Estimate {
        value,
        low: value - half,
        high: value + half,
    })
}

/// The mean; `None` of nothing.
pub fn plain_mean(numbers: &[f64]) -> Option<f64> {
    let n = numbers.len();
    (n > 0).then(|| numbers.iter().sum::<f64>() / n as f64)
}

/// A mean over `tasks` and `more` tasks that nobody has seen, which add `sum` to the sum and `squares` to that of squares.
fn adjusted(
    tasks: &[f64],
    more: f64,
    sum: f64,
    squares: f64,
    (least, most): (f64, f64),
) -> Option<Estimate> {
    let value = plain_mean(tasks)?;
    let n = tasks.len() as f64 + more;
    let middle = (tasks.iter().sum::<f64>() + sum) / n;
    let squares = tasks.iter().map(|x| x * x).sum::<f64>() + squares;
    let spread = (squares / n - middle * middle).max(0.0);
    let half = match tasks.len() {
        // One task tells nothing of others.
        1 => most - least,
        tasks => quantile(tasks) * (spread / n).sqrt(),
    };
    Some(Estimate {
        value,
        low: (middle - half).clamp(least, most),
        high: (middle + half).clamp(least, most),
    })
}

/// Student's quantile for the mean of `tasks` numbers, two or more.
fn quantile(tasks: usize) -> f64 {
    student_quantile(QUANTILE, tasks as f64 - 1.0)
}

/// The number below which a share `p`, above a half, of Student's distribution with `freedom` degrees lies.
pub fn student_quantile(p: f64, freedom: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1e6);
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(low, high);
        match student_below(middle, freedom) < p {
            true => low = middle,
            false => high = middle,
        }
    }
    f64::midpoint(low, high)
}

/// The share of Student's distribution below `t`, which is 0 or more (Abramowitz and Stegun, 26.7.1 and 26.5.27).
fn student_below(t: f64, freedom: f64) -> f64 {
    let x = freedom / (freedom + t * t);
    1.0 - incomplete_beta(x, freedom / 2.0, 0.5) / 2.0
}

/// The regularized incomplete beta function, by its continued fraction (Abramowitz and Stegun, 26.5.8), on the side where
/// that comes to its end soon.
fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    let front = ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (-x).ln_1p();
    match x < (a + 1.0) / (a + b + 2.0) {
        true => front.exp() * beta_fraction(x, a, b) / a,
        false => 1.0 - front.exp() * beta_fraction(1.0 - x, b, a) / b,
    }
}

/// The continued fraction, by Lentz's method.
fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    let away = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let (mut c, mut d) = (1.0, 1.0 / away(1.0 - (a + b) * x / (a + 1.0)));
    let mut value = d;
    for term in 1..=TERMS_MAX {
        let m = f64::from(term);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let before = value;
        for part in [even, odd] {
            d = 1.0 / away(1.0 + part * d);
            c = away(1.0 + part / c);
            value *= c * d;
        }
        if (value - before).abs() <= f64::EPSILON * value.abs() {
            break;
        }
    }
    value
}

/// The logarithm of the gamma function above 0: Lanczos' approximation with g = 7 and nine terms.
fn ln_gamma(x: f64) -> f64 {
    const TERMS: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    // Reflection is not needed: every argument is a half or more.
    let x = x - 1.0;
    let mut sum = TERMS[0];
    for (i, term) in (1u32..).zip(&TERMS[1..]) {
        sum += term / (x + f64::from(i));
    }
    let t = x + 7.5;
    0.5 * (2.0 * std::f64::consts::PI).ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// By `golden/make.py`, with SciPy.
    const GOLDEN: &str = include_str!("golden/stats.json");

    fn near(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= 1e-9 * expected.abs().max(1.0)
    }

    fn numbers(value: &Value) -> Vec<f64> {
        let list = value.as_array().unwrap();
        list.iter().map(|x| x.as_f64().unwrap()).collect()
    }

    #[test]
    fn quantiles_are_scipys() {
        let golden: Value = serde_json::from_str(GOLDEN).unwrap();
        let quantiles = golden["quantiles"].as_array().unwrap();
        assert!(quantiles.len() > 10);
        for row in quantiles {
            let [p, freedom, expected] = numbers(row)[..] else {
                panic!("{row}")
            };
            let found = student_quantile(p, freedom);
            assert!(near(found, expected), "{row}: {found}");
        }
    }

    #[test]
    fn intervals_are_numpys_and_scipys() {
        let golden: Value = serde_json::from_str(GOLDEN).unwrap();
        let mut seen = 0;
        for case in golden["cases"].as_array().unwrap() {
            let tasks = numbers(&case["tasks"]);
            let found = match case["of"].as_str().unwrap() {
                "share" => share(&tasks),
                "difference" => difference_of_shares(&tasks),
                _ => mean(&tasks),
            };
            let found = found.unwrap();
            let expected = numbers(&case["expected"]);
            for (found, expected) in [found.value, found.low, found.high]
                .into_iter()
                .zip(expected)
            {
                assert!(near(found, expected), "{found} is not {expected}: {case}");
            }
            seen += 1;
        }
        assert!(seen >= 12, "{seen}");
    }

    #[test]
    fn one_sample_a_task_is_mcnemars_table() {
        // Agresti and Min's example has b = 1, c = 9 of 20: (c - b) / 22 ± z √(((b + c + 1) - (c - b)² / 22) / 22²).
        let tasks: Vec<f64> = [vec![1.0; 9], vec![-1.0; 1], vec![0.0; 10]].concat();
        let found = difference_of_shares(&tasks).unwrap();
        let half = student_quantile(0.975, 19.0) * ((11.0f64 - 64.0 / 22.0) / 484.0).sqrt();
        assert!(near(found.low, 8.0 / 22.0 - half) && near(found.high, 8.0 / 22.0 + half));
        assert!(near(found.value, 0.4));
    }

    #[test]
    fn nothing_tells_nothing() {
        assert_eq!(
            (share(&[]), difference_of_shares(&[]), mean(&[])),
            (None, None, None)
        );
        let one = difference_of_shares(&[1.0]).unwrap();
        assert_eq!((one.low, one.high), (-1.0, 1.0));
        let agreed = difference_of_shares(&[0.0; 10]).unwrap();
        assert!(agreed.low < -0.1 && agreed.high > 0.1, "{agreed:?}");
        let more = difference_of_shares(&[0.0; 200]).unwrap();
        assert!(more.low > -0.02 && more.high < 0.02, "{more:?}");
    }

    fn shares() -> impl Strategy<Value = Vec<f64>> {
        let one =
            (1u32..=8).prop_flat_map(|k| (0..=k).prop_map(move |x| f64::from(x) / f64::from(k)));
        proptest::collection::vec(one, 1..40)
    }

    proptest! {
        #[test]
        fn an_interval_holds_the_estimate(shares in shares(), n in 1usize..40) {
            let paired: Vec<f64> = shares.iter().zip(shares.iter().rev()).map(|(a, b)| a - b).collect();
            let all = vec![shares[0]; n];
            let differences = [&paired[..], &shares[..], &all[..]].map(|x| difference_of_shares(x).unwrap());
            let shares = [&shares[..], &all[..]].map(|x| share(x).unwrap());
            for found in differences.iter().chain(&shares) {
                prop_assert!(found.low <= found.value && found.value <= found.high, "{:?}", found);
            }
            prop_assert!(shares.iter().all(|found| found.low >= 0.0 && found.high <= 1.0));
        }

        #[test]
        fn the_other_way_round_is_the_mirror(shares in shares()) {
            let there: Vec<f64> = shares.iter().zip(shares.iter().rev()).map(|(a, b)| a - b * b).collect();
            let back: Vec<f64> = there.iter().map(|d| -d).collect();
            let (there, back) = (difference_of_shares(&there).unwrap(), difference_of_shares(&back).unwrap());
            let mirrored = back.mirrored();
            prop_assert!(near(there.value, mirrored.value) && near(there.low, mirrored.low) && near(there.high, mirrored.high));
        }
    }
}
