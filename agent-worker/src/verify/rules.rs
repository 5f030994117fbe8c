//! Rules for texts, numbers and calls. Pure; each gives a score and the reason for it.

use std::sync::LazyLock;

use espalier_core::error::shorten;
use espalier_core::spec::pattern::{self, Glob};
use espalier_core::spec::{TextRule, ToolCalled};
use espalier_core::trace::{Decision, ToolCallRecord};
use regex::Regex;
use serde_json::Value;

/// Scores `text`, which the reason calls `what`.
pub fn text(rule: &TextRule, text: &str, what: &str) -> (f64, String) {
    let (holds, wanted) = match rule {
        TextRule::Equals(wanted) => (
            text.trim() == wanted.trim(),
            format!("equal `{}`", shorten(wanted)),
        ),
        TextRule::Contains(wanted) => (
            text.contains(wanted),
            format!("contain `{}`", shorten(wanted)),
        ),
        // The pattern was compiled once at the door; one that fails here matches nothing.
        TextRule::Regex(pattern) => (
            pattern::regex(pattern).is_ok_and(|regex| regex.is_match(text)),
            format!("match `{}`", shorten(pattern)),
        ),
    };
    if holds {
        (1.0, format!("{what} does {wanted}"))
    } else {
        (
            0.0,
            format!("{what} does not {wanted}: `{}`", shorten(text.trim())),
        )
    }
}

/// Scores the last number in `answer`. Thousands may be parted by commas, as English writes them.
pub fn number(wanted: f64, tolerance: f64, answer: &str) -> (f64, String) {
    let Some(found) = last_number(answer) else {
        return (
            0.0,
            format!("the answer holds no number: `{}`", shorten(answer.trim())),
        );
    };
    // A decimal fraction such as 12.1 is not exact in binary: allow for its rounding on top of what was asked for.
    let slack = tolerance + f64::EPSILON * wanted.abs().max(1.0) * 4.0;
    if (found - wanted).abs() <= slack {
        (1.0, format!("the answer's last number is {found}"))
    } else {
        (
            0.0,
            format!("the answer's last number is {found}, not {wanted} ± {tolerance}"),
        )
    }
}

/// A number without its sign: thousands, a fraction, an exponent that is not the beginning of a word.
static NUMBER: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?:\d[\d,]*(?:\.\d+)*|\.\d+)(?:[eE][+\-−]?\d+\b)?").ok());

/// The minus signs that models write: of keyboards and of typesetting.
const MINUS: [char; 2] = ['-', '−'];

fn last_number(text: &str) -> Option<f64> {
    let found = NUMBER.as_ref()?.find_iter(text).last()?;
    let (before, mut digits) = (&text[..found.start()], found.as_str());
    if before.ends_with(|c: char| c == '.' || c.is_alphanumeric()) {
        // The point belongs to what stands before.
        digits = digits.trim_start_matches('.');
    }
    let number: f64 = digits.replace(',', "").replace('−', "-").parse().ok()?;
    // In `3-5` it is no sign.
    let negative = before.ends_with(MINUS)
        && !before
            .trim_end_matches(MINUS)
            .ends_with(char::is_alphanumeric);
    Some(if negative { -number } else { number })
}

/// Whether `record` is a call that was really made and fits `wanted`, whose `name` is compiled.
pub fn call_matches(wanted: &ToolCalled, name: &Glob, record: &ToolCallRecord) -> bool {
    let made =
        matches!(record.decision, Decision::Allowed | Decision::Approved) && !record.is_error;
    let argument_fits = |(name, rule): (&String, &TextRule)| match record.arguments.get(name) {
        Some(Value::String(value)) => text(rule, value, "").0 > 0.0,
        Some(other) => text(rule, &other.to_string(), "").0 > 0.0,
        None => false,
    };
    made && name.is_match(&record.name) && wanted.arguments.iter().all(argument_fits)
}

/// A boolean or a number in [0, 1] as a score; anything else is 0.
pub fn value_score(value: &Value, what: &str) -> (f64, String) {
    match value {
        Value::Bool(true) => (1.0, format!("{what} says true")),
        Value::Bool(false) => (0.0, format!("{what} says false")),
        other => match other.as_f64() {
            Some(score) if (0.0..=1.0).contains(&score) => (score, format!("{what} says {score}")),
            _ => (
                0.0,
                format!(
                    "{what} must be a boolean or in [0, 1], got `{}`",
                    shorten(&other.to_string())
                ),
            ),
        },
    }
}
