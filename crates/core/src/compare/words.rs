//! A report's numbers as people read them: the same tables for a terminal, for Markdown and for a page. Nothing is escaped
//! here; whoever writes them knows for what.

use super::stats::Estimate;
use super::{Bucket, Group, Measured, Report, Side};

/// A header and its rows, all of one length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new<const N: usize>(header: [&str; N]) -> Self {
        Self {
            header: header.map(str::to_owned).to_vec(),
            rows: Vec::new(),
        }
    }

    fn push<const N: usize>(&mut self, row: [String; N]) {
        self.rows.push(row.to_vec());
    }
}

/// Success by kind of task, and of all together where there are several.
pub fn success(report: &Report) -> Table {
    let (before, after) = labels(report);
    let mut table = Table::new([
        "task kind",
        "tasks",
        "pairs",
        before,
        after,
        "difference in points",
        "tasks better",
        "tasks worse",
    ]);
    let comparison = &report.comparison;
    let mut row = |name: &str, group: &Group| {
        table.push([
            name.to_owned(),
            group.tasks.to_string(),
            group.pairs.to_string(),
            percent(&group.success.before),
            percent(&group.success.after),
            points(&group.difference),
            group.tasks_better.to_string(),
            group.tasks_worse.to_string(),
        ]);
    };
    for (kind, group) in &comparison.kinds {
        row(kind_name(kind), group);
    }
    if comparison.kinds.len() != 1 {
        row("all", &comparison.pooled);
    }
    table
}

/// What a rollout takes in each arm.
pub fn effort(report: &Report) -> Table {
    let (before, after) = labels(report);
    let mut table = Table::new(["of a rollout", before, after, "difference"]);
    let group = &report.comparison.pooled;
    for (name, measured) in [
        ("turns", &group.turns),
        ("tokens", &group.tokens),
        ("invalid calls", &group.invalid_calls),
        ("seconds", &group.seconds),
    ] {
        let Measured {
            before,
            after,
            difference,
        } = measured;
        table.push([
            name.to_owned(),
            number(*before),
            number(*after),
            signed(difference),
        ]);
    }
    let has_prices = Side::ALL
        .iter()
        .any(|side| report.arms.at(*side).prices.is_some());
    if has_prices {
        let cost = |side| match group.cost_per_solved.at(side) {
            Some(cost) => format!("{cost:.6} {}", report.currency),
            None if report.arms.at(side).prices.is_some() => "none is solved".to_owned(),
            None => "no price".to_owned(),
        };
        table.push([
            "cost per solved task".to_owned(),
            cost(Side::Before),
            cost(Side::After),
            String::new(),
        ]);
    }
    table
}

/// How hard the tasks are: rows before, columns after.
pub fn difficulty(report: &Report) -> Table {
    let (before, after) = labels(report);
    let difficulty = &report.comparison.difficulty;
    let of = |bucket: Bucket| format!("{after}: {}", bucket.as_str());
    let columns = Bucket::ALL.map(of);
    let mut table = Table {
        header: [
            vec![before.to_owned()],
            columns.to_vec(),
            vec!["tasks".to_owned()],
        ]
        .concat(),
        rows: Vec::new(),
    };
    for bucket in Bucket::ALL {
        let row = difficulty.tasks[bucket as usize];
        let [never, mixed, always] = row.map(|tasks| tasks.to_string());
        let all = difficulty.count(Side::Before, bucket).to_string();
        table.push([bucket.as_str().to_owned(), never, mixed, always, all]);
    }
    table
}

/// Rollouts that are in no pair, by reason; without rows where all are in one.
pub fn left_out(report: &Report) -> Table {
    let (before, after) = labels(report);
    let mut table = Table::new(["in no pair", before, after]);
    let left_out = &report.comparison.left_out;
    for (name, both) in [
        ("the job names no task", left_out.without_task),
        ("not judged", left_out.unjudged),
        ("a call was never recorded", left_out.unrecorded),
        ("the same sample again", left_out.repeated),
        ("the other arm has no such sample", left_out.unpaired),
        ("the trace cannot be read", left_out.unreadable),
    ] {
        if both.before + both.after > 0 {
            table.push([
                name.to_owned(),
                both.before.to_string(),
                both.after.to_string(),
            ]);
        }
    }
    table
}

/// What a family of tasks is called.
pub fn kind_name(kind: &str) -> &str {
    if kind.is_empty() { "(none)" } else { kind }
}

/// A share and its interval: `37.5 % (28.1 to 47.9)`.
pub fn percent(share: &Estimate) -> String {
    let [value, low, high] = [share.value, share.low, share.high].map(|x| x * 100.0);
    format!("{value:.1} % ({low:.1} to {high:.1})")
}

/// A difference of shares in points: `+12.5 (+3.1 to +21.9)`.
pub fn points(difference: &Estimate) -> String {
    let [value, low, high] = [difference.value, difference.low, difference.high].map(|x| x * 100.0);
    format!("{value:+.1} ({low:+.1} to {high:+.1})")
}

/// A number with its sign and its interval: `-1.50 (-2.00 to -1.00)`.
pub fn signed(difference: &Estimate) -> String {
    let [value, low, high] = [difference.value, difference.low, difference.high].map(|x| {
        let sign = if x < 0.0 { "-" } else { "+" };
        format!("{sign}{}", number(x.abs()))
    });
    format!("{value} ({low} to {high})")
}

/// Two digits of what is small, none of what is large; of what is smaller still, those that tell it from nothing.
fn number(x: f64) -> String {
    match x.abs() {
        tiny if tiny > 0.0 && tiny < 0.001 => format!("{x:.1e}"),
        small if small > 0.0 && small < 0.01 => format!("{x:.4}"),
        large if large >= 1000.0 => format!("{x:.0}"),
        middle if middle >= 100.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

fn labels(report: &Report) -> (&str, &str) {
    (&report.arms.before.label, &report.arms.after.label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let of = |value, low, high| Estimate { value, low, high };
        assert_eq!(percent(&of(0.375, 0.281, 0.479)), "37.5 % (28.1 to 47.9)");
        assert_eq!(points(&of(-0.125, -0.2, 0.0)), "-12.5 (-20.0 to +0.0)");
        assert_eq!(
            signed(&of(-1.5, -2000.4, 120.25)),
            "-1.50 (-2000 to +120.2)"
        );
        assert_eq!(
            signed(&of(-0.00042, -0.0031, 0.0)),
            "-4.2e-4 (-0.0031 to +0.00)"
        );
        assert_eq!(kind_name(""), "(none)");
    }
}
