//! The closed set of error classes, and the error of a field that broke its rule.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest part of a refused value that an error shows, in bytes: enough to recognise it, too little to flood a log.
const VALUE_SHOWN_BYTES_MAX: usize = 120;

/// A value that was refused at the door: which field, what it held, and the rule that it broke.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    /// Path of the field in the client's own terms, such as `verify.all[1].answer.regex`.
    pub field: String,
    /// The value as the client wrote it, shortened.
    pub value: String,
    /// What would have been accepted, beginning with "must" or "is".
    pub rule: String,
}

impl FieldError {
    /// Shortens `value` to what an error may show.
    pub fn new(
        field: impl Into<String>,
        value: impl fmt::Display,
        rule: impl Into<String>,
    ) -> Self {
        Self {
            field: field.into(),
            value: shorten(&value.to_string()),
            rule: rule.into(),
        }
    }

    /// The same error, seen from the structure that holds the field.
    pub fn under(mut self, parent: &str) -> Self {
        let dot = if self.field.starts_with('[') { "" } else { "." };
        self.field = format!("{parent}{dot}{}", self.field);
        self
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}, got `{}`", self.field, self.rule, self.value)
    }
}

impl std::error::Error for FieldError {}

/// `text`, cut at a character border so that an error stays readable.
pub fn shorten(text: &str) -> String {
    if text.len() <= VALUE_SHOWN_BYTES_MAX {
        return text.to_owned();
    }
    let mut end = VALUE_SHOWN_BYTES_MAX;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}… ({} bytes)", &text[..end], text.len())
}

/// What went wrong with an attempt, as far as the queue has to know. Retry, budget and status follow from the class
/// alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// The job can never succeed as it is written: straight to `DEAD`.
    Invalid,
    /// The handler failed; another try may work. Counts against `max_attempts`.
    Handler,
    /// What the handler stands on failed: a lease that ran out, a browser that crashed, a store that was away.
    /// Counts against `max_infra`.
    Infra,
    /// The work was stopped in good order before it was done; counts against nothing.
    Preempted,
    /// Somebody cancelled the job.
    Cancelled,
}

impl ErrorClass {
    /// The name in records, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Handler => "handler",
            Self::Infra => "infra",
            Self::Preempted => "preempted",
            Self::Cancelled => "cancelled",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_error_names_field_value_and_rule() {
        let error = FieldError::new("top_p", 1.7, "must be in (0, 1]").under("sampling");
        assert_eq!(
            error.to_string(),
            "`sampling.top_p` must be in (0, 1], got `1.7`"
        );
    }

    #[test]
    fn a_long_value_is_cut_at_a_character() {
        let error = FieldError::new("prompt", "é".repeat(10_000), "must be shorter");
        assert!(error.value.len() < 200, "{}", error.value);
        assert!(error.value.ends_with("(20000 bytes)"));
    }
}
