//! Which conversations are wanted: `reward >= 0.9 and task_kind = booking and not label.quality = bad`.
//!
//! Comparisons of a field with a value, joined by `and`, `or`, `not` and brackets. Numbers know `=`, `!=`, `<`, `<=`, `>`,
//! `>=`; texts `=`, `!=` and `~` (contains); `solved` stands alone. What a conversation does not have equals nothing and
//! is neither above nor below anything.

mod parse;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::source::Source;

/// Longest expression, in bytes.
pub(crate) const TEXT_BYTES_MAX: usize = 4096;

/// An expression that was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    text: String,
    expression: Expression,
}

/// Why an expression is none: the place, and what must stand there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the filter must have {rule} at column {column}, got {got}")]
pub struct FilterError {
    /// Counted in characters from 1.
    pub column: usize,
    /// What would have been accepted.
    pub rule: String,
    /// What stands there.
    pub got: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Expression {
    All(Vec<Self>),
    Any(Vec<Self>),
    Not(Box<Self>),
    Number(NumberField, NumberIs, f64),
    Text(TextField, TextIs, String),
    Solved,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NumberField {
    Reward,
    Turns,
    Messages,
    ToolErrors,
    Tokens,
    WallS,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum TextField {
    Id,
    Model,
    Stop,
    TaskId,
    TaskKind,
    Split,
    Label(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NumberIs {
    Equal,
    Other,
    Below,
    AtMost,
    Above,
    AtLeast,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TextIs {
    Equal,
    Other,
    Holding,
}

impl Filter {
    /// Whether a conversation is wanted.
    pub fn admits(&self, source: &Source) -> bool {
        self.expression.holds(source)
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        Ok(Self {
            expression: parse::expression(text)?,
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Filter {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Filter {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Expression {
    fn holds(&self, source: &Source) -> bool {
        match self {
            Self::All(parts) => parts.iter().all(|part| part.holds(source)),
            Self::Any(parts) => parts.iter().any(|part| part.holds(source)),
            Self::Not(part) => !part.holds(source),
            Self::Solved => source.facts.reward.is_some_and(|reward| reward >= 1.0),
            Self::Number(field, is, value) => is.holds(field.of(source), *value),
            Self::Text(field, is, value) => is.holds(field.of(source), value),
        }
    }
}

impl NumberField {
    fn of(self, source: &Source) -> Option<f64> {
        let count = |n: usize| u32::try_from(n).map_or(f64::INFINITY, f64::from);
        let facts = &source.facts;
        match self {
            Self::Reward => facts.reward,
            Self::Turns => {
                let said = source.messages.iter().filter(|m| m.role() == "assistant");
                Some(count(said.count()))
            }
            Self::Messages => Some(count(source.messages.len())),
            Self::ToolErrors => Some(f64::from(facts.tool_errors)),
            // Exact up to 2⁵³.
            Self::Tokens => Some(facts.tokens as f64),
            Self::WallS => Some(facts.wall_s),
        }
    }
}

impl TextField {
    fn of<'s>(&self, source: &'s Source) -> Option<&'s str> {
        let facts = &source.facts;
        match self {
            Self::Id => Some(&source.id),
            Self::Model => Some(&source.model),
            Self::Stop => facts.stop.as_deref(),
            Self::TaskId => facts.task_id.as_deref(),
            Self::TaskKind => facts.task_kind.as_deref(),
            Self::Split => facts.split.map(|split| split.as_str()),
            Self::Label(name) => facts.labels.get(name).map(String::as_str),
        }
    }
}

impl NumberIs {
    #[expect(clippy::float_cmp, reason = "a number is asked for as it is written")]
    fn holds(self, found: Option<f64>, value: f64) -> bool {
        let Some(found) = found else {
            return self == Self::Other;
        };
        match self {
            Self::Equal => found == value,
            Self::Other => found != value,
            Self::Below => found < value,
            Self::AtMost => found <= value,
            Self::Above => found > value,
            Self::AtLeast => found >= value,
        }
    }
}

impl TextIs {
    fn holds(self, found: Option<&str>, value: &str) -> bool {
        match self {
            Self::Equal => found == Some(value),
            Self::Other => found != Some(value),
            Self::Holding => found.is_some_and(|text| text.contains(value)),
        }
    }
}

#[cfg(test)]
mod tests;
