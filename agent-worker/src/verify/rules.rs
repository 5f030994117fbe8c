//! Rules for texts, numbers, JSON values and calls. Pure; each gives a score and the reason for it.

use std::sync::LazyLock;

use espalier_core::error::shorten;
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
            regex::Regex::new(pattern).is_ok_and(|regex| regex.is_match(text)),
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

/// Scores what `path` finds in the first JSON value of `answer`.
pub fn json(path: &str, equals: Option<&Value>, answer: &str) -> (f64, String) {
    let Some(value) = first_json(answer) else {
        return (
            0.0,
            format!("the answer holds no JSON: `{}`", shorten(answer.trim())),
        );
    };
    let Ok(path) = serde_json_path::JsonPath::parse(path) else {
        return (0.0, format!("`{path}` is not a path"));
    };
    let found = path.query(&value).all();
    match (found.first(), equals) {
        (None, _) => (
            0.0,
            format!(
                "`{path}` finds nothing in `{}`",
                shorten(&value.to_string())
            ),
        ),
        (Some(_), None) => (1.0, format!("`{path}` finds a value")),
        (Some(_), Some(wanted)) if found.iter().any(|value| same(value, wanted)) => (
            1.0,
            format!("`{path}` finds `{}`", shorten(&wanted.to_string())),
        ),
        (Some(first), Some(wanted)) => (
            0.0,
            format!(
                "`{path}` finds `{}`, not `{}`",
                shorten(&first.to_string()),
                shorten(&wanted.to_string())
            ),
        ),
    }
}

/// 5 and 5.0 are the same number to a reader, though not to JSON's types.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Models wrap JSON in prose and fences: take the first place where a value can be read.
fn first_json(text: &str) -> Option<Value> {
    let whole = serde_json::from_str(text.trim()).ok();
    whole.or_else(|| {
        let starts = text.char_indices().filter(|(_, c)| matches!(c, '{' | '['));
        // Each try may read to the end of the text; a bound keeps a hostile answer from costing its square.
        starts.take(64).find_map(|(start, _)| {
            let mut values =
                serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
            values.next()?.ok()
        })
    })
}

/// Whether `record` is a call that was really made and fits `wanted`.
pub fn call_matches(wanted: &ToolCalled, record: &ToolCallRecord) -> bool {
    let made =
        matches!(record.decision, Decision::Allowed | Decision::Approved) && !record.is_error;
    let name_fits = || {
        globset::Glob::new(&wanted.name).is_ok_and(|g| g.compile_matcher().is_match(&record.name))
    };
    let argument_fits = |(name, rule): (&String, &TextRule)| match record.arguments.get(name) {
        Some(Value::String(value)) => text(rule, value, "").0 > 0.0,
        Some(other) => text(rule, &other.to_string(), "").0 > 0.0,
        None => false,
    };
    made && name_fits() && wanted.arguments.iter().all(argument_fits)
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
