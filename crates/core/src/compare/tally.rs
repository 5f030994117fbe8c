//! From pairs to numbers.

use std::collections::BTreeMap;

use super::pairs::{Alone, Pair, Pairs};
use super::stats::{self, Estimate};
use super::{Both, Bucket, Comparison, Difficulty, Group, Measured, Prices, Side, Tried};
use crate::error::FieldError;

/// What the pairs tell of the arms, whose tokens cost `prices`.
///
/// # Errors
/// There is no pair.
pub fn compare(pairs: &Pairs, prices: &Both<Option<Prices>>) -> Result<Comparison, FieldError> {
    let all: Vec<&Pair> = pairs.pairs.iter().collect();
    let Some(pooled) = group(&all, prices) else {
        let rule = "must have a sample of a task that both arms tried and a check judged";
        return Err(FieldError::new("arms", "no pair of rollouts", rule));
    };
    let mut kinds: BTreeMap<&str, Vec<&Pair>> = BTreeMap::new();
    for pair in &all {
        kinds.entry(&pair.before.kind).or_default().push(pair);
    }
    let kinds = kinds.into_iter().filter_map(|(kind, pairs)| {
        let group = group(&pairs, prices)?;
        Some((kind.to_owned(), group))
    });
    let verdicts = |side| all.iter().map(move |pair| pair.solved(side));
    let mut verdicts = verdicts(Side::Before).chain(verdicts(Side::After));
    let first = verdicts.next();
    Ok(Comparison {
        pooled,
        kinds: kinds.collect(),
        difficulty: difficulty(&all),
        no_signal: verdicts.all(|verdict| Some(verdict) == first),
        worst_difference: worst_difference(&all, &pairs.alone),
        left_out: pairs.left_out,
    })
}

/// Second less first by task, where verdicts without a counterpart speak against the second arm; none where there are none.
fn worst_difference(pairs: &[&Pair], alone: &[Alone]) -> Option<Estimate> {
    if alone.is_empty() {
        return None;
    }
    // The sum of a task's differences, and its samples.
    let mut tasks: BTreeMap<&str, (i32, u32)> = BTreeMap::new();
    let of_pairs = pairs
        .iter()
        .map(|pair| (&*pair.before.task, pair.difference()));
    let of_alone = alone.iter().map(|one| (&*one.task, one.worst_difference()));
    for (task, difference) in of_pairs.chain(of_alone) {
        let (sum, samples) = tasks.entry(task).or_default();
        *sum += difference;
        *samples += 1;
    }
    let means = tasks
        .values()
        .map(|(sum, samples)| f64::from(*sum) / f64::from(*samples));
    stats::difference_of_shares(&means.collect::<Vec<_>>())
}

/// Pairs in the order in which a person wants to read them: those whose outcome changed, then those that neither arm
/// solved, then the others; of each task one before a second one.
pub fn order_for_reading(pairs: &[Pair]) -> Vec<usize> {
    let class = |pair: &Pair| match (pair.solved(Side::Before), pair.solved(Side::After)) {
        (before, after) if before != after => 0,
        (false, _) => 1,
        _ => 2,
    };
    let mut seen: BTreeMap<(i32, &str), usize> = BTreeMap::new();
    let keyed = pairs.iter().enumerate().map(|(n, pair)| {
        let class = class(pair);
        let nth = seen.entry((class, &pair.before.task)).or_default();
        *nth += 1;
        ((class, *nth, &*pair.before.task, pair.before.sample), n)
    });
    let mut keyed: Vec<_> = keyed.collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, n)| n).collect()
}

/// `None` without pairs.
fn group(pairs: &[&Pair], prices: &Both<Option<Prices>>) -> Option<Group> {
    let tasks = by_task(pairs);
    let share = |side| by_mean(&tasks, |pair| f64::from(u8::from(pair.solved(side))));
    let (before, after) = (share(Side::Before), share(Side::After));
    let differences: Vec<f64> = before.iter().zip(&after).map(|(b, a)| a - b).collect();
    let count = |holds: &dyn Fn(i32) -> bool| {
        let held = pairs.iter().filter(|pair| holds(pair.difference()));
        held.count() as u64
    };
    Some(Group {
        tasks: tasks.len() as u64,
        pairs: pairs.len() as u64,
        success: Both {
            before: stats::share(&before)?,
            after: stats::share(&after)?,
        },
        difference: stats::difference_of_shares(&differences)?,
        tasks_better: differences.iter().filter(|d| **d > 0.0).count() as u64,
        tasks_worse: differences.iter().filter(|d| **d < 0.0).count() as u64,
        gained: count(&|d| d > 0),
        lost: count(&|d| d < 0),
        turns: measured(&tasks, |tried| f64::from(tried.used.turns))?,
        tokens: measured(&tasks, |tried| {
            (tried.used.prompt_tokens + tried.used.completion_tokens) as f64
        })?,
        invalid_calls: measured(&tasks, |tried| f64::from(tried.used.invalid_calls))?,
        seconds: measured(&tasks, |tried| tried.used.wall_ms as f64 / 1000.0)?,
        cost_per_solved: Both::of(|side| cost_per_solved(pairs, side, *prices.at(side))),
    })
}

/// The pairs of each task, by its name.
fn by_task<'p>(pairs: &[&'p Pair]) -> Vec<Vec<&'p Pair>> {
    let mut tasks: BTreeMap<&str, Vec<&Pair>> = BTreeMap::new();
    for pair in pairs {
        tasks.entry(&pair.before.task).or_default().push(pair);
    }
    tasks.into_values().collect()
}

/// The mean of each task over its samples.
fn by_mean(tasks: &[Vec<&Pair>], of: impl Fn(&Pair) -> f64) -> Vec<f64> {
    let mean = |pairs: &Vec<&Pair>| {
        let sum: f64 = pairs.iter().map(|pair| of(pair)).sum();
        sum / pairs.len() as f64
    };
    tasks.iter().map(mean).collect()
}

fn measured(tasks: &[Vec<&Pair>], of: impl Fn(&Tried) -> f64) -> Option<Measured> {
    let [before, after] = Side::ALL.map(|side| by_mean(tasks, |pair| of(pair.at(side))));
    let differences: Vec<f64> = before.iter().zip(&after).map(|(b, a)| a - b).collect();
    Some(Measured {
        before: stats::plain_mean(&before)?,
        after: stats::plain_mean(&after)?,
        difference: stats::mean(&differences).map(without_noise)?,
    })
}

/// A difference of means that is no more than rounding is none.
fn without_noise(estimate: Estimate) -> Estimate {
    let plain = |x: f64| if x.abs() < 1e-12 { 0.0 } else { x };
    Estimate {
        value: plain(estimate.value),
        low: plain(estimate.low),
        high: plain(estimate.high),
    }
}

fn cost_per_solved(pairs: &[&Pair], side: Side, prices: Option<Prices>) -> Option<f64> {
    let prices = prices?;
    let solved = pairs.iter().filter(|pair| pair.solved(side)).count();
    let cost: f64 = pairs
        .iter()
        .map(|pair| prices.of(&pair.at(side).used))
        .sum();
    (solved > 0).then(|| cost / solved as f64)
}

fn difficulty(pairs: &[&Pair]) -> Difficulty {
    let mut found = Difficulty::default();
    for task in by_task(pairs) {
        let bucket = |side| {
            let solved = task.iter().filter(|pair| pair.solved(side)).count();
            Bucket::of(solved, task.len()) as usize
        };
        found.samples = found.samples.max(task.len() as u64);
        found.tasks[bucket(Side::Before)][bucket(Side::After)] += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pair;
    use super::super::pairs::tests::tried;
    use super::super::{GateReason, GateSettings, Used, judge};
    use super::*;

    /// A task with the verdicts of its samples, in each arm.
    type Task<'a> = (&'a str, &'a [bool], &'a [bool]);

    fn pairs(tasks: &[Task<'_>]) -> Pairs {
        let side = |arm: &str, pick: &dyn Fn(&Task<'_>) -> Vec<bool>| {
            let each = tasks.iter().flat_map(|task| {
                let verdicts = pick(task).into_iter().zip(0u32..);
                let of = task.0.to_owned();
                let of = verdicts.map(move |(solved, sample)| (of.clone(), sample, solved));
                of.collect::<Vec<_>>()
            });
            let each = each.map(|(task, sample, solved)| tried(arm, &task, sample, Some(solved)));
            each.collect::<Vec<_>>()
        };
        pair(side("a", &|t| t.1.to_vec()), side("b", &|t| t.2.to_vec()))
    }

    fn compared(pairs: &Pairs) -> Comparison {
        compare(pairs, &Both::default()).unwrap()
    }

    #[test]
    fn tasks_are_what_is_counted() {
        let (yes, no) = (true, false);
        let pairs = pairs(&[
            ("hard", &[no, no], &[yes, no]),
            ("easy", &[yes, yes], &[yes, yes]),
            ("lost", &[yes, no], &[no, no]),
            ("won", &[no, no], &[yes, yes]),
        ]);
        let found = compared(&pairs);
        let group = &found.pooled;
        assert_eq!(
            (group.tasks, group.pairs, group.gained, group.lost),
            (4, 8, 3, 1)
        );
        assert_eq!((group.tasks_better, group.tasks_worse), (2, 1));
        let shares = (
            group.success.before.value,
            group.success.after.value,
            group.difference.value,
        );
        assert_eq!(shares, (3.0 / 8.0, 5.0 / 8.0, 0.25));
        let count = |side| Bucket::ALL.map(|bucket| found.difficulty.count(side, bucket));
        assert_eq!(
            (count(Side::Before), count(Side::After)),
            ([2, 1, 1], [1, 1, 2])
        );
        assert_eq!((found.difficulty.samples, found.no_signal), (2, false));
        let names = order_for_reading(&pairs.pairs);
        let names: Vec<(&str, u32)> = names
            .iter()
            .map(|n| (&*pairs.pairs[*n].before.task, pairs.pairs[*n].before.sample))
            .collect();
        let changed = [("hard", 0), ("lost", 0), ("won", 0), ("won", 1)];
        let same = [("hard", 1), ("lost", 1), ("easy", 0), ("easy", 1)];
        assert_eq!(names, [changed, same].concat());
    }

    #[test]
    fn means_and_costs_are_of_the_pairs() {
        let used = |turns, tokens| Used {
            turns,
            prompt_tokens: tokens,
            completion_tokens: tokens,
            invalid_calls: turns,
            wall_ms: 1500,
        };
        let arm = |arm: &str, solved, used| {
            ["t", "u"]
                .map(|task| Tried {
                    used,
                    ..tried(arm, task, 0, Some(solved))
                })
                .to_vec()
        };
        let pairs = pair(
            arm("a", false, used(4, 1_000_000)),
            arm("b", true, used(2, 500_000)),
        );
        let prices = Some(Prices {
            prompt: 1.0,
            completion: 3.0,
        });
        let found = compare(
            &pairs,
            &Both {
                before: prices,
                after: prices,
            },
        )
        .unwrap()
        .pooled;
        assert_eq!(
            (
                found.turns.before,
                found.turns.after,
                found.turns.difference.value
            ),
            (4.0, 2.0, -2.0)
        );
        assert_eq!(
            (found.seconds.before, found.seconds.difference.value),
            (1.5, 0.0)
        );
        assert_eq!(
            found.cost_per_solved,
            Both {
                before: None,
                after: Some(2.0)
            }
        );
        assert_eq!(found.tokens.after, 1e6);
    }

    #[test]
    fn no_pair_is_no_comparison_and_verdicts_that_are_all_one_no_signal() {
        let error = compare(&Pairs::default(), &Both::default()).unwrap_err();
        assert_eq!(error.field, "arms");
        for verdict in [true, false] {
            let same = [verdict];
            let names: Vec<String> = (0..200).map(|n| format!("t{n}")).collect();
            let tasks: Vec<_> = names
                .iter()
                .map(|name| (&**name, &same[..], &same[..]))
                .collect();
            let found = compared(&pairs(&tasks));
            assert!(found.no_signal);
            let verdict = judge(&found, GateSettings::default());
            assert_eq!(
                (verdict.passed, verdict.reason),
                (false, GateReason::NoSignal)
            );
        }
    }

    fn tables() -> impl Strategy<Value = Vec<(Vec<bool>, Vec<bool>)>> {
        let task = (1usize..4).prop_flat_map(|k| {
            let verdicts = || proptest::collection::vec(any::<bool>(), k);
            (verdicts(), verdicts())
        });
        proptest::collection::vec(task, 1..30)
    }

    proptest! {
        #[test]
        fn swapped_arms_mirror(table in tables()) {
            let names: Vec<String> = (0..table.len()).map(|n| format!("t{n:02}")).collect();
            let rows = || names.iter().zip(&table);
            let there: Vec<_> = rows().map(|(name, (a, b))| (&**name, &a[..], &b[..])).collect();
            let back: Vec<_> = rows().map(|(name, (a, b))| (&**name, &b[..], &a[..])).collect();
            let (there, back) = (compared(&pairs(&there)).pooled, compared(&pairs(&back)).pooled);
            let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
            let mirrored = back.difference.mirrored();
            prop_assert!(near(there.difference.value, mirrored.value));
            prop_assert!(near(there.difference.low, mirrored.low) && near(there.difference.high, mirrored.high));
            prop_assert_eq!(there.success.before, back.success.after);
            prop_assert_eq!((there.gained, there.tasks_better), (back.lost, back.tasks_worse));
            let estimates = [there.success.before, there.success.after, there.difference, there.turns.difference];
            prop_assert!(estimates.iter().all(|e| e.low <= e.value && e.value <= e.high));
        }
    }
}
