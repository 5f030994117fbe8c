//! How a rollout is judged: the tree that a client writes, and its checked form.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::FieldError;

/// Deepest nesting of `all`, `any` and `weighted`: more is a mistake, and recursion stays bounded.
const DEPTH_MAX: usize = 8;

/// Most checks in one tree.
const CHECKS_MAX: usize = 64;

/// A check as a client writes it. One key names the kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyDraft {
    /// The last assistant message.
    Answer(AnswerDraft),
    /// The address of the browser's current page at the end.
    Url(TextRule),
    /// JavaScript, run in the rollout's own browser by the worker.
    Page {
        /// A function that returns a boolean or a number in [0, 1].
        script: String,
    },
    /// A call that the model must have made.
    ToolCalled(ToolCalled),
    /// What a tool or resource of an MCP server says at the end; the worker asks, not the model.
    Mcp(McpCheck),
    /// A service that returns `{"score": 0..1, "reason": "…"}`.
    Http(HttpHook),
    /// The lowest score counts.
    All(Vec<VerifyDraft>),
    /// The highest score counts.
    Any(Vec<VerifyDraft>),
    /// The weighted mean counts.
    Weighted(Vec<WeightedDraft>),
}

/// One share of a weighted mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedDraft {
    /// Above 0; the weights need not add up to 1.
    pub weight: f64,
    /// What is weighed.
    pub check: VerifyDraft,
}

/// A rule for a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextRule {
    /// The same, but for white space at both ends.
    Equals(String),
    /// Holds it somewhere.
    Contains(String),
    /// Matches somewhere; Rust's regular expressions, which take linear time.
    Regex(String),
}

/// A rule for an answer as a client writes it: exactly one of the first four, or `json_path` with `equals`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerDraft {
    /// The same text, but for white space at both ends; with `json_path`, the JSON value found there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<Value>,
    /// Holds this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
    /// Matches somewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// The last number in the answer is this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<f64>,
    /// How far the number may be off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// RFC 9535 path into the first JSON value in the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_path: Option<String>,
}

/// A call that the model must have made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolCalled {
    /// Glob over the offered name.
    pub name: String,
    /// Rules for arguments, by name; a value that is not a string is compared as JSON text.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub arguments: BTreeMap<String, TextRule>,
}

/// A tool or a resource of an MCP server, and a rule for its text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct McpCheck {
    /// A server of this rollout.
    pub server: String,
    /// The server's own name of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    /// In place of a tool: a resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
    /// The rule for the text that comes back.
    pub text: TextRule,
}

/// A service that judges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpHook {
    /// Its address; the worker's configuration lists the hosts that may be asked.
    pub url: String,
}

/// A checked tree. Reward is a number in [0, 1].
#[derive(Clone, Debug, PartialEq)]
pub enum Verify {
    /// See [`VerifyDraft::Answer`].
    Answer(AnswerRule),
    /// See [`VerifyDraft::Url`].
    Url(TextRule),
    /// See [`VerifyDraft::Page`].
    Page {
        /// The function.
        script: String,
    },
    /// See [`VerifyDraft::ToolCalled`].
    ToolCalled(ToolCalled),
    /// See [`VerifyDraft::Mcp`].
    Mcp(McpCheck),
    /// See [`VerifyDraft::Http`].
    Http(HttpHook),
    /// See [`VerifyDraft::All`].
    All(Vec<Verify>),
    /// See [`VerifyDraft::Any`].
    Any(Vec<Verify>),
    /// See [`VerifyDraft::Weighted`].
    Weighted(Vec<(f64, Verify)>),
}

/// A checked rule for an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum AnswerRule {
    /// About the text.
    Text(TextRule),
    /// About the last number in it.
    Number {
        /// What it should be.
        value: f64,
        /// How far it may be off.
        tolerance: f64,
    },
    /// About a value in the first JSON text in it.
    Json {
        /// RFC 9535.
        path: String,
        /// What the path should find; nothing: that it finds anything.
        equals: Option<Value>,
    },
}

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

fn check_regex(pattern: &str) -> Result<(), FieldError> {
    let Err(error) = regex::Regex::new(pattern) else {
        return Ok(());
    };
    // The error's own text draws the pattern over several lines; its last line says what is wrong.
    let text = error.to_string();
    let reason = text
        .lines()
        .last()
        .unwrap_or_default()
        .trim_start_matches("error: ")
        .to_owned();
    Err(FieldError::new(
        "regex",
        pattern,
        format!("must be a regular expression: {reason}"),
    ))
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
        match serde_json_path::JsonPath::parse(path) {
            Ok(_) => Ok(AnswerRule::Json {
                path: path.to_owned(),
                equals: self.equals.clone(),
            }),
            Err(error) => Err(FieldError::new(
                "json_path",
                path,
                format!("must be an RFC 9535 path: {}", error.message()),
            )),
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
        if let Err(error) = globset::Glob::new(&self.name) {
            errors.push(FieldError::new(
                "name",
                &self.name,
                format!("must be a glob: {}", error.kind()),
            ));
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

impl Verify {
    /// Every check of the tree, this one first.
    pub fn leaves(&self) -> Vec<&Verify> {
        match self {
            Self::All(list) | Self::Any(list) => list.iter().flat_map(Self::leaves).collect(),
            Self::Weighted(list) => list.iter().flat_map(|(_, check)| check.leaves()).collect(),
            leaf => vec![leaf],
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn errors(text: Value) -> Vec<String> {
        let draft: VerifyDraft = serde_json::from_value(text).unwrap();
        draft
            .check()
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn every_form_is_read_checked_and_written_back() {
        let tree = json!({"all": [
            {"answer": {"equals": "5"}},
            {"answer": {"number": 12.5, "tolerance": 0.01}},
            {"answer": {"json_path": "$.price", "equals": 3}},
            {"url": {"contains": "/confirm"}},
            {"any": [{"page": {"script": "() => true"}}, {"http": {"url": "http://localhost/judge"}}]},
            {"tool_called": {"name": "browser_*", "arguments": {"url": {"regex": "^http"}}}},
            {"weighted": [{"weight": 0.5, "check": {"mcp": {"server": "files", "tool": "read", "text": {"contains": "x"}}}}]},
        ]});
        let draft: VerifyDraft = serde_json::from_value(tree.clone()).unwrap();
        let checked = draft.check().unwrap();
        assert_eq!(
            serde_json::to_value(VerifyDraft::from(&checked)).unwrap(),
            tree
        );
        assert_eq!(checked.leaves().len(), 8);
    }

    #[test]
    fn broken_rules_are_named_with_their_place() {
        assert_eq!(
            errors(json!({"all": [{"answer": {"contains": "x"}}, {"answer": {"regex": "(a"}}]})),
            ["`all[1].answer.regex` must be a regular expression: unclosed group, got `(a`"]
        );
        let path = errors(json!({"answer": {"json_path": "$.[", "equals": 1}}));
        assert!(
            path[0].starts_with("`answer.json_path` must be an RFC 9535 path"),
            "{path:?}"
        );
        assert_eq!(
            errors(json!({"any": []})),
            ["`any` must hold at least one check, got `[]`"]
        );
        assert_eq!(
            errors(json!({"weighted": [{"weight": -1.0, "check": {"url": {"contains": "x"}}}]})),
            ["`weighted[0].weight` must be above 0, got `-1`"]
        );
        assert!(
            errors(json!({"answer": {"contains": "x", "regex": "y"}}))[0].contains("exactly one")
        );
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let mut deep = json!({"url": {"contains": "x"}});
        for _ in 0..20 {
            deep = json!({"all": [deep]});
        }
        assert!(errors(deep)[0].contains("levels deep"));
        let wide: Vec<Value> = (0..200)
            .map(|_| json!({"url": {"contains": "x"}}))
            .collect();
        assert!(errors(json!({ "all": wide }))[0].contains("at most 64 checks"));
    }
}
