//! The form of what is measured: every figure as JSON, and the few that people ask for with their bounds.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::table;

/// What a measurement gives.
pub struct Figures {
    /// Every figure, for programs.
    pub values: Value,
    /// The ones that people ask for.
    pub headlines: Vec<Headline>,
}

/// One figure with its bound, where it has one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Headline {
    /// What was measured.
    pub what: String,
    /// What came out.
    pub value: f64,
    /// In which unit.
    pub unit: String,
    /// What it must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
    /// Whether it is that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<bool>,
}

/// What a figure must be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(most) => format!("≤ {}", number(most)),
            Self::AtLeast(least) => format!("≥ {}", number(least)),
        }
    }
}

impl Headline {
    /// A figure without a bound.
    pub fn new(what: impl Into<String>, value: f64, unit: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            value,
            unit: unit.into(),
            bound: None,
            holds: None,
        }
    }

    /// The same with a bound.
    pub fn bound(self, bound: Bound) -> Self {
        Self {
            holds: Some(bound.holds(self.value)),
            bound: Some(bound),
            ..self
        }
    }

    fn cells(&self, bench: &str) -> [String; 5] {
        let verdict = match self.holds {
            Some(true) => "holds",
            Some(false) => "missed",
            None => "",
        };
        [
            bench.to_owned(),
            self.what.clone(),
            format!("{} {}", number(self.value), self.unit)
                .trim_end()
                .to_owned(),
            self.bound.map(Bound::text).unwrap_or_default(),
            verdict.to_owned(),
        ]
    }
}

/// Three digits that count: 12,345 · 123 · 12.3 · 1.23 · 0.012.
fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => {
            let sign = if value < 0.0 { "-" } else { "" };
            format!("{sign}{}", crate::output::count(value.abs().round() as u64))
        }
        10.0..100.0 => trimmed(format!("{value:.1}")),
        1.0..10.0 => trimmed(format!("{value:.2}")),
        _ => trimmed(format!("{value:.3}")),
    }
}

fn trimmed(text: String) -> String {
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Options of `bench table`.
#[derive(Args, Clone, Debug)]
pub struct TableArgs {
    /// What `bench … --json` wrote, one measurement a line
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// One line of such a file; what is not for the table is not read.
#[derive(Deserialize)]
struct Line {
    bench: String,
    headlines: Vec<Headline>,
}

/// Shows the headlines of a file as a table.
pub fn show(context: &Context, args: &TableArgs) -> Outcome {
    let name = args.file.display();
    let text = std::fs::read_to_string(&args.file)
        .map_err(|error| Problem::refused(format!("cannot read {name}: {error}")))?;
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line: Line = serde_json::from_str(line).map_err(|error| {
            let place = number + 1;
            Problem::refused(format!(
                "{name}:{place}: must be a line of `espalier bench --json`: {error}"
            ))
        })?;
        rows.extend(line.headlines.iter().map(|one| one.cells(&line.bench)));
    }
    let header = ["measurement", "figure", "measured", "bound", ""];
    context.out.line(table(header, rows))?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_on_their_edge() {
        let at = |value, bound| Headline::new("x", value, "ms").bound(bound).holds;
        assert_eq!(at(500.0, Bound::AtMost(500.0)), Some(true));
        assert_eq!(at(500.1, Bound::AtMost(500.0)), Some(false));
        assert_eq!(at(14_999.0, Bound::AtLeast(15_000.0)), Some(false));
        assert_eq!(Headline::new("x", 1.0, "").holds, None);
    }

    #[test]
    fn numbers_have_three_digits_that_count() {
        let shown = [15_000.4, 123.4, 12.34, 1.0, 0.0123, 0.0].map(number);
        assert_eq!(shown, ["15,000", "123", "12.3", "1", "0.012", "0"]);
    }

    #[test]
    fn a_headline_survives_its_file() {
        let headline = Headline::new("x", 1.5, "ms").bound(Bound::AtMost(2.0));
        let text = serde_json::to_string(&headline).unwrap();
        assert!(text.contains(r#""bound":{"at_most":2.0}"#), "{text}");
        assert_eq!(serde_json::from_str::<Headline>(&text).unwrap(), headline);
        assert_eq!(
            headline.cells("b"),
            ["b", "x", "1.5 ms", "≤ 2", "holds"].map(str::to_owned)
        );
    }
}
