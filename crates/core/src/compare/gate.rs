//! Whether a comparison is enough for the second arm to take the place of the first.

use serde::{Deserialize, Serialize};

use super::Comparison;

/// What is asked of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateSettings {
    /// The lower end of the paired difference's interval must be above this. What one arm alone has a verdict on speaks
    /// against the second arm: a model whose rollouts die is not better for it.
    pub min_difference: f64,
    /// At least so many tasks must have been tried by both arms.
    pub min_tasks: u64,
}

impl Default for GateSettings {
    /// Two points are given away at most; how many tasks it takes to say that the interval tells, and there are never
    /// fewer than make intervals over tasks hold what they promise.
    fn default() -> Self {
        Self {
            min_difference: -0.02,
            min_tasks: 30,
        }
    }
}

/// Why a gate is open or shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateReason {
    /// Everything that was asked for holds.
    GoodEnough,
    /// Every verdict of both arms is the same.
    NoSignal,
    /// There are too few tasks.
    TooFewTasks,
    /// The lower end of the interval is too low.
    NotShown,
}

/// What the gate says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateVerdict {
    /// Whether the second arm may take the first one's place.
    pub passed: bool,
    /// Why.
    pub reason: GateReason,
    /// The same in words.
    pub words: String,
    /// What was asked.
    pub settings: GateSettings,
}

/// Judges a comparison.
pub fn judge(comparison: &Comparison, settings: GateSettings) -> GateVerdict {
    let group = &comparison.pooled;
    let worst = comparison.worst_difference;
    let (low, least) = (
        worst.unwrap_or(group.difference).low,
        settings.min_difference,
    );
    let counted = match worst {
        Some(_) => ", where samples that one model alone has a verdict on speak against the second",
        None => "",
    };
    let (reason, words) = if comparison.no_signal {
        let verdict = if group.success.before.value > 0.0 {
            "solved"
        } else {
            "failed"
        };
        let words = format!(
            "the data carry no signal: all {} rollouts of both arms are judged {verdict}, so that nothing tells them apart; \
             look at the checks of the tasks",
            2 * group.pairs
        );
        (GateReason::NoSignal, words)
    } else if group.tasks < settings.min_tasks {
        let words = format!(
            "{} tasks were tried by both arms, and `min_tasks` is {}",
            group.tasks, settings.min_tasks
        );
        (GateReason::TooFewTasks, words)
    } else if low <= least {
        let words = format!(
            "the lower end of the paired difference is {}, which must be above {} points (`min_difference`){counted}",
            points(low),
            points(least)
        );
        (GateReason::NotShown, words)
    } else {
        let words = format!(
            "the lower end of the paired difference over {} tasks is {} points, above {}{counted}",
            group.tasks,
            points(low),
            points(least)
        );
        (GateReason::GoodEnough, words)
    };
    GateVerdict {
        passed: reason == GateReason::GoodEnough,
        reason,
        words,
        settings,
    }
}

/// A difference of shares as people say it: -0.02 as -2.0.
fn points(difference: f64) -> String {
    format!("{:+.1}", difference * 100.0)
}

#[cfg(test)]
mod tests {
    use super::super::pairs::tests::tried;
    use super::super::{Both, compare, pair};
    use super::*;

    /// `n` tasks of one sample, of which the first `before` and the first `after` are solved.
    fn judged(n: usize, before: usize, after: usize, settings: GateSettings) -> GateVerdict {
        let arm = |arm: &str, solved| {
            let one = |task| tried(arm, &format!("t{task:03}"), 0, Some(task < solved));
            (0..n).map(one).collect::<Vec<_>>()
        };
        let pairs = pair(arm("a", before), arm("b", after));
        judge(&compare(&pairs, &Both::default()).unwrap(), settings)
    }

    #[test]
    fn the_gate_says_why() {
        let settings = GateSettings::default();
        for (n, before, after, reason, words) in [
            (60, 20, 45, GateReason::GoodEnough, "over 60 tasks is +2"),
            (
                29,
                0,
                29,
                GateReason::TooFewTasks,
                "29 tasks were tried by both arms, and `min_tasks` is 30",
            ),
            (
                60,
                45,
                20,
                GateReason::NotShown,
                "must be above -2.0 points",
            ),
            // Nothing is lost, but sixty tasks do not show that no more than two points may be.
            (60, 30, 30, GateReason::NotShown, "is -3.2, which"),
            (120, 60, 60, GateReason::GoodEnough, "above -2.0"),
            (
                60,
                60,
                60,
                GateReason::NoSignal,
                "all 120 rollouts of both arms are judged solved",
            ),
            (60, 0, 0, GateReason::NoSignal, "judged failed"),
        ] {
            let verdict = judged(n, before, after, settings);
            assert_eq!(verdict.reason, reason, "{verdict:?}");
            assert_eq!(verdict.passed, reason == GateReason::GoodEnough);
            assert!(verdict.words.contains(words), "{words}: {verdict:?}");
        }
    }

    #[test]
    fn what_one_arm_alone_has_speaks_against_the_second() {
        let arm = |arm: &str, solved: usize, tasks: usize| {
            let one = |task| tried(arm, &format!("t{task:03}"), 0, Some(task < solved));
            (0..tasks).map(one).collect::<Vec<_>>()
        };
        let judged = |after: usize| {
            let pairs = pair(arm("a", 20, 60), arm("b", 45, after));
            let comparison = compare(&pairs, &Both::default()).unwrap();
            judge(&comparison, GateSettings::default())
        };
        assert!(judged(60).passed && !judged(60).words.contains("alone"));
        let some = judged(58);
        assert!(
            some.passed && some.words.contains("alone has a verdict"),
            "{some:?}"
        );
        // The second arm has what the first did not solve, and nothing of the rest.
        let survivors = pair(arm("a", 20, 60), arm("b", 45, 60).split_off(20));
        let comparison = compare(&survivors, &Both::default()).unwrap();
        assert!(comparison.pooled.difference.low > 0.3);
        let verdict = judge(&comparison, GateSettings::default());
        assert_eq!(verdict.reason, GateReason::NotShown, "{verdict:?}");
    }

    #[test]
    fn settings_decide() {
        let lenient = GateSettings {
            min_difference: -1.0,
            min_tasks: 1,
        };
        assert!(
            judged(2, 1, 0, lenient).reason == GateReason::NotShown,
            "two tasks may be anything"
        );
        assert!(judged(10, 5, 4, lenient).passed);
        let strict = GateSettings {
            min_difference: 0.4,
            min_tasks: 1,
        };
        assert!(!judged(60, 20, 45, strict).passed);
    }
}
