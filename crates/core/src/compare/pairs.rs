//! Which rollout of one arm stands beside which of the other: the same sample of the same task.

use std::collections::BTreeMap;

use super::{Both, LeftOut, Side, Tried};
use crate::trace::StopReason;

/// One sample of one task, tried and judged in both arms.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// By the first arm.
    pub before: Tried,
    /// By the second arm.
    pub after: Tried,
}

impl Pair {
    /// The rollout of an arm.
    pub fn at(&self, side: Side) -> &Tried {
        match side {
            Side::Before => &self.before,
            Side::After => &self.after,
        }
    }

    /// Whether an arm solved it.
    pub fn solved(&self, side: Side) -> bool {
        self.at(side).solved == Some(true)
    }

    /// 1 where only the second arm solved it, -1 where only the first did, 0 where they agree.
    pub fn difference(&self) -> i32 {
        i32::from(self.solved(Side::After)) - i32::from(self.solved(Side::Before))
    }
}

/// A sample of a task on which one arm alone has a verdict: the other's rollout died, or was not judged or not asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Alone {
    /// The task.
    pub task: String,
    /// The arm that has the verdict.
    pub side: Side,
    /// Whether it was solved.
    pub solved: bool,
}

impl Alone {
    /// Second less first, if what is missing speaks against the second arm: the first would have solved the sample, the
    /// second not.
    pub fn worst_difference(&self) -> i32 {
        match self.side {
            Side::Before => -i32::from(self.solved),
            Side::After => i32::from(self.solved) - 1,
        }
    }
}

/// All pairs, by task and sample, and what is in none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// In the order of tasks and samples.
    pub pairs: Vec<Pair>,
    /// Verdicts without their counterpart.
    pub alone: Vec<Alone>,
    /// How many rollouts are in none, and why.
    pub left_out: LeftOut,
}

/// Puts the rollouts of two arms into pairs. Of several rollouts of one sample the first by its job's name counts, so that
/// the order in which they come changes nothing.
pub fn pair(before: Vec<Tried>, after: Vec<Tried>) -> Pairs {
    let mut left_out = LeftOut::default();
    let before = by_sample(before, Side::Before, &mut left_out);
    let mut after = by_sample(after, Side::After, &mut left_out);
    let mut found = Pairs::default();
    let mut alone = |tried: &Tried, side| {
        found.alone.extend(tried.solved.map(|solved| Alone {
            task: tried.task.clone(),
            side,
            solved,
        }));
    };
    for (sample, before) in before {
        let Some(after) = after.remove(&sample) else {
            leave_out(&mut left_out, Side::Before, &before);
            alone(&before, Side::Before);
            continue;
        };
        // Without a verdict of the one, that of the other says nothing.
        match (before.solved, after.solved) {
            (Some(_), Some(_)) => found.pairs.push(Pair { before, after }),
            _ => {
                leave_unjudged_out(&mut left_out, Side::Before, &before);
                leave_unjudged_out(&mut left_out, Side::After, &after);
                alone(&before, Side::Before);
                alone(&after, Side::After);
            }
        }
    }
    for tried in after.values() {
        leave_out(&mut left_out, Side::After, tried);
        alone(tried, Side::After);
    }
    Pairs { left_out, ..found }
}

fn by_sample(
    mut rollouts: Vec<Tried>,
    side: Side,
    left_out: &mut LeftOut,
) -> BTreeMap<(String, u32), Tried> {
    rollouts.sort_by(|a, b| a.job.cmp(&b.job));
    let mut found = BTreeMap::new();
    for tried in rollouts {
        let sample = (tried.task.clone(), tried.sample);
        if tried.task.is_empty() {
            *at(&mut left_out.without_task, side) += 1;
        } else if let std::collections::btree_map::Entry::Vacant(free) = found.entry(sample) {
            free.insert(tried);
        } else {
            *at(&mut left_out.repeated, side) += 1;
        }
    }
    found
}

/// Counts a rollout whose counterpart is not there.
fn leave_out(left_out: &mut LeftOut, side: Side, tried: &Tried) {
    let why = match tried.stop == StopReason::Unrecorded.as_str() {
        true => &mut left_out.unrecorded,
        false => &mut left_out.unpaired,
    };
    *at(why, side) += 1;
}

/// Counts a rollout where it or its counterpart was not judged.
fn leave_unjudged_out(left_out: &mut LeftOut, side: Side, tried: &Tried) {
    match tried.solved.is_none() && tried.stop != StopReason::Unrecorded.as_str() {
        true => *at(&mut left_out.unjudged, side) += 1,
        false => leave_out(left_out, side, tried),
    }
}

fn at(both: &mut Both<u64>, side: Side) -> &mut u64 {
    match side {
        Side::Before => &mut both.before,
        Side::After => &mut both.after,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Used;
    use super::*;

    /// `task/sample` of an arm, whose job is named after it.
    pub fn tried(arm: &str, task: &str, sample: u32, solved: Option<bool>) -> Tried {
        Tried {
            job: format!("p/{arm}/{arm}-{task}.s{sample}").parse().unwrap(),
            task: task.to_owned(),
            kind: "toy".to_owned(),
            sample,
            solved,
            stop: "answered".to_owned(),
            reason: String::new(),
            used: Used::default(),
        }
    }

    #[test]
    fn what_is_in_no_pair_is_counted_with_the_reason() {
        let of = |arm: &str, list: &[(&str, u32, Option<bool>)]| -> Vec<Tried> {
            let one = |(task, sample, solved): &(&str, u32, Option<bool>)| {
                tried(arm, task, *sample, *solved)
            };
            list.iter().map(one).collect()
        };
        let mut before = of(
            "a",
            &[
                ("t", 1, Some(true)),
                ("t", 0, Some(false)),
                ("u", 0, None),
                ("v", 0, Some(true)),
            ],
        );
        let nameless = Tried {
            task: String::new(),
            ..before[0].clone()
        };
        let again = Tried {
            job: "p/z/z".parse().unwrap(),
            solved: Some(false),
            ..before[0].clone()
        };
        before.extend([nameless, again]);
        let after = of(
            "b",
            &[
                ("t", 0, Some(true)),
                ("t", 1, Some(true)),
                ("u", 0, Some(true)),
                ("w", 0, Some(true)),
            ],
        );
        let found = pair(before.clone(), after.clone());
        let named: Vec<(u32, i32)> = found
            .pairs
            .iter()
            .map(|p| (p.before.sample, p.difference()))
            .collect();
        assert_eq!(named, [(0, 1), (1, 0)]);
        let both = |before, after| Both { before, after };
        let expected = LeftOut {
            without_task: both(1, 0),
            unjudged: both(1, 0),
            repeated: both(1, 0),
            unpaired: both(1, 2),
            unreadable: both(0, 0),
            unrecorded: both(0, 0),
        };
        assert_eq!(found.left_out, expected);
        let alone = |one: &Alone| (one.task.clone(), one.side, one.worst_difference());
        let alone: Vec<_> = found.alone.iter().map(alone).collect();
        let of = |task: &str, side, worst| (task.to_owned(), side, worst);
        assert_eq!(
            alone,
            [
                of("u", Side::After, 0),
                of("v", Side::Before, -1),
                of("w", Side::After, 0)
            ]
        );
        before.reverse();
        assert_eq!(pair(before, after), found, "order changes nothing");
    }

    #[test]
    fn what_was_never_recorded_is_neither_solved_nor_unjudged() {
        let unrecorded = |arm: &str, task: &str| Tried {
            stop: StopReason::Unrecorded.as_str().to_owned(),
            ..tried(arm, task, 0, None)
        };
        let before = vec![
            unrecorded("a", "both"),
            tried("a", "one", 0, Some(true)),
            unrecorded("a", "alone"),
        ];
        let after = vec![unrecorded("b", "both"), unrecorded("b", "one")];
        let found = pair(before, after);
        let both = |before, after| Both { before, after };
        let expected = LeftOut {
            unrecorded: both(2, 2),
            unpaired: both(1, 0),
            ..LeftOut::default()
        };
        assert_eq!((found.left_out, found.pairs.len()), (expected, 0));
        let worst = found.alone.iter().map(Alone::worst_difference);
        assert_eq!(
            worst.collect::<Vec<_>>(),
            [-1],
            "it speaks against the second arm"
        );
    }
}
