//! The tree of checks as a client writes it. Nothing in it is trusted; `check` makes a [`Verify`](super::Verify) of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A check as a client writes it. One key names the kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
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
