//! From the tree that a client wrote to the checked one, or to every rule that is broken.

use serde_json::Value;

use super::draft::{
    AnswerDraft, HttpHook, McpCheck, TextRule, ToolCalled, VerifyDraft, WeightedDraft,
};
use super::{AnswerRule, Verify};
use crate::error::FieldError;
use crate::spec::pattern::{self, Glob};

/// Deepest nesting of `all`, `any` and `weighted`: more is a mistake, and recursion stays bounded.
const DEPTH_MAX: usize = 8;

/// Most checks in one tree.
const CHECKS_MAX: usize = 64;

impl VerifyDraft {
    /// The checked tree, or every rule that is broken, with paths from the root of the tree.
    pub fn check(&self) -> Result<Verify, Vec<FieldError>> {
        let count = self.count();
        if count > CHECKS_MAX {
            return Err(vec![FieldError::new(
                "",
                count,
                format!("must hold at most {CHECKS_MAX} checks"),
            )]);
        }
        self.check_at(DEPTH_MAX)
    }

    fn count(&self) -> usize {
        match self {
            Self::All(list) | Self::Any(list) => 1 + list.iter().map(Self::count).sum::<usize>(),
            Self::Weighted(list) => 1 + list.iter().map(|item| item.check.count()).sum::<usize>(),
            Self::ToolCalled(check) => 1 + check.arguments.len(),
            _ => 1,
        }
    }

    fn check_at(&self, depth_left: usize) -> Result<Verify, Vec<FieldError>> {
        let Some(depth_left) = depth_left.checked_sub(1) else {
            return Err(vec![FieldError::new(
                "",
                "",
                format!("must be at most {DEPTH_MAX} levels deep"),
            )]);
        };
        match self {
            Self::Answer(draft) => draft
                .check()
                .map(Verify::Answer)
                .map_err(|e| vec![e.under("answer")]),
            Self::Url(rule) => rule
                .check()
                .map(|()| Verify::Url(rule.clone()))
                .map_err(|e| vec![e.under("url")]),
            Self::Page { script } if script.trim().is_empty() => Err(vec![FieldError::new(
                "page.script",
                script,
                "must not be empty",
            )]),
            Self::Page { script } => Ok(Verify::Page {
                script: script.clone(),
            }),
            Self::ToolCalled(call) => call
                .check()
                .map(|()| Verify::ToolCalled(call.clone()))
                .map_err(under("tool_called")),
            Self::Mcp(check) => check
                .check()
                .map(|()| Verify::Mcp(check.clone()))
                .map_err(under("mcp")),
            Self::Http(hook) => hook
                .check()
                .map(|()| Verify::Http(hook.clone()))
                .map_err(|e| vec![e.under("http")]),
            Self::All(list) => check_list("all", list, depth_left).map(Verify::All),
            Self::Any(list) => check_list("any", list, depth_left).map(Verify::Any),
            Self::Weighted(list) => check_weighted(list, depth_left),
        }
    }
}

fn under(parent: &'static str) -> impl Fn(Vec<FieldError>) -> Vec<FieldError> {
    move |errors| {
        errors
            .into_iter()
            .map(|error| error.under(parent))
            .collect()
    }
}

fn check_list(
    name: &str,
    list: &[VerifyDraft],
    depth_left: usize,
) -> Result<Vec<Verify>, Vec<FieldError>> {
    if list.is_empty() {
        return Err(vec![FieldError::new(
            name,
            "[]",
            "must hold at least one check",
        )]);
    }
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for (i, item) in list.iter().enumerate() {
        match item.check_at(depth_left) {
            Ok(check) => good.push(check),
            Err(errors) => bad.extend(errors.into_iter().map(|e| e.under(&format!("{name}[{i}]")))),
        }
    }
    if bad.is_empty() { Ok(good) } else { Err(bad) }
}

fn check_weighted(list: &[WeightedDraft], depth_left: usize) -> Result<Verify, Vec<FieldError>> {
    let checks: Vec<VerifyDraft> = list.iter().map(|item| item.check.clone()).collect();
    let mut errors: Vec<FieldError> = list
        .iter()
        .enumerate()
        .filter(|(_, item)| !(item.weight > 0.0 && item.weight.is_finite()))
        .map(|(i, item)| {
            FieldError::new(
                format!("weighted[{i}].weight"),
                item.weight,
                "must be above 0",
            )
        })
        .collect();
    match check_list("weighted", &checks, depth_left) {
        Ok(checks) if errors.is_empty() => Ok(Verify::Weighted(
            list.iter().map(|item| item.weight).zip(checks).collect(),
        )),
        Ok(_) => Err(errors),
        Err(more) => {
            errors.extend(more);
            Err(errors)
        }
    }
}

impl TextRule {
    /// Whether the rule itself is sound.
    pub fn check(&self) -> Result<(), FieldError> {
        match self {
            Self::Regex(pattern) => check_regex(pattern),
            Self::Contains(text) if text.is_empty() => {
                Err(FieldError::new("contains", "", "must not be empty"))
            }
            Self::Equals(_) | Self::Contains(_) => Ok(()),
        }
    }
}

fn check_regex(text: &str) -> Result<(), FieldError> {
    let compiled = pattern::regex(text);
    compiled
        .map(drop)
        .map_err(|rule| FieldError::new("regex", text, rule))
}

impl AnswerDraft {
    fn check(&self) -> Result<AnswerRule, FieldError> {
        if let Some(path) = &self.json_path {
            return self.check_json(path);
        }
        let given = [
            self.equals.is_some(),
            self.contains.is_some(),
            self.regex.is_some(),
            self.number.is_some(),
        ];
        if given.iter().filter(|given| **given).count() != 1 {
            let rule =
                "must hold exactly one of `equals`, `contains`, `regex`, `number`, or `json_path`";
            return Err(FieldError::new(
                "",
                serde_json::to_string(self).unwrap_or_default(),
                rule,
            ));
        }
        if let Some(tolerance) = self.tolerance
            && (self.number.is_none() || !(tolerance >= 0.0 && tolerance.is_finite()))
        {
            return Err(FieldError::new(
                "tolerance",
                tolerance,
                "must be at least 0 and go with `number`",
            ));
        }
        match (&self.equals, &self.contains, &self.regex, self.number) {
            (Some(Value::String(text)), ..) => Ok(AnswerRule::Text(TextRule::Equals(text.clone()))),
            (Some(other), ..) => Err(FieldError::new(
                "equals",
                other,
                "must be a string unless `json_path` is given",
            )),
            (_, Some(text), ..) => checked_text(TextRule::Contains(text.clone())),
            (_, _, Some(pattern), _) => checked_text(TextRule::Regex(pattern.clone())),
            (_, _, _, Some(value)) => Ok(AnswerRule::Number {
                value,
                tolerance: self.tolerance.unwrap_or(0.0),
            }),
            (None, None, None, None) => Err(FieldError::new("", "{}", "must hold a rule")),
        }
    }

    fn check_json(&self, path: &str) -> Result<AnswerRule, FieldError> {
        if self.contains.is_some()
            || self.regex.is_some()
            || self.number.is_some()
            || self.tolerance.is_some()
        {
            return Err(FieldError::new(
                "json_path",
                path,
                "must go with `equals` alone",
            ));
        }
        match pattern::json_path(path) {
            Ok(_) => Ok(AnswerRule::Json {
                path: path.to_owned(),
                equals: self.equals.clone(),
            }),
            Err(rule) => Err(FieldError::new("json_path", path, rule)),
        }
    }
}

fn checked_text(rule: TextRule) -> Result<AnswerRule, FieldError> {
    rule.check()?;
    Ok(AnswerRule::Text(rule))
}

impl ToolCalled {
    fn check(&self) -> Result<(), Vec<FieldError>> {
        let mut errors = Vec::new();
        if let Err(rule) = Glob::new(&self.name) {
            errors.push(FieldError::new("name", &self.name, rule));
        }
        for (name, rule) in &self.arguments {
            errors.extend(
                rule.check()
                    .err()
                    .map(|e| e.under(&format!("arguments.{name}"))),
            );
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }
}

impl McpCheck {
    fn check(&self) -> Result<(), Vec<FieldError>> {
        let mut errors = Vec::new();
        if self.tool.is_some() == self.resource.is_some() {
            let value = self.tool.as_deref().unwrap_or_default();
            errors.push(FieldError::new(
                "tool",
                value,
                "or `resource` must be given, not both",
            ));
        }
        errors.extend(self.text.check().err().map(|e| e.under("text")));
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }
}

impl HttpHook {
    fn check(&self) -> Result<(), FieldError> {
        if self.url.starts_with("http://") || self.url.starts_with("https://") {
            return Ok(());
        }
        Err(FieldError::new(
            "url",
            &self.url,
            "must begin with http:// or https://",
        ))
    }
}
