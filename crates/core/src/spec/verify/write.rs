//! From the checked tree back to the form that a client writes.

use serde_json::Value;

use super::draft::{AnswerDraft, TextRule, VerifyDraft, WeightedDraft};
use super::{AnswerRule, Verify};

/// The tree in the form that a client would write; a trace stores it so, and `reverify` reads it back.
impl From<&Verify> for VerifyDraft {
    fn from(check: &Verify) -> Self {
        match check {
            Verify::Answer(rule) => Self::Answer(rule.into()),
            Verify::Url(rule) => Self::Url(rule.clone()),
            Verify::Page { script } => Self::Page {
                script: script.clone(),
            },
            Verify::ToolCalled(call) => Self::ToolCalled(call.clone()),
            Verify::Mcp(check) => Self::Mcp(check.clone()),
            Verify::Http(hook) => Self::Http(hook.clone()),
            Verify::All(list) => Self::All(list.iter().map(Self::from).collect()),
            Verify::Any(list) => Self::Any(list.iter().map(Self::from).collect()),
            Verify::Weighted(list) => Self::Weighted(
                list.iter()
                    .map(|(weight, check)| WeightedDraft {
                        weight: *weight,
                        check: check.into(),
                    })
                    .collect(),
            ),
        }
    }
}

impl From<&AnswerRule> for AnswerDraft {
    fn from(rule: &AnswerRule) -> Self {
        let empty = Self::default();
        match rule.clone() {
            AnswerRule::Text(TextRule::Equals(text)) => Self {
                equals: Some(Value::String(text)),
                ..empty
            },
            AnswerRule::Text(TextRule::Contains(text)) => Self {
                contains: Some(text),
                ..empty
            },
            AnswerRule::Text(TextRule::Regex(pattern)) => Self {
                regex: Some(pattern),
                ..empty
            },
            AnswerRule::Number { value, tolerance } => Self {
                number: Some(value),
                tolerance: Some(tolerance),
                ..empty
            },
            AnswerRule::Json { path, equals } => Self {
                json_path: Some(path),
                equals,
                ..empty
            },
        }
    }
}
