//! How a rollout is judged: the tree that a client writes (`draft`), the rules that it must obey (`check`), its checked
//! form (here), and the way back for traces (`write`). Judging is not done here: the worker's verifiers do.

mod check;
mod draft;
mod write;

use serde_json::Value;

pub use draft::{
    AnswerDraft, HttpHook, McpCheck, TextRule, ToolCalled, VerifyDraft, WeightedDraft,
};

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
        let rules: serde_json::Map<_, _> = (0..64)
            .map(|n| (format!("a{n}"), json!({"regex": "x"})))
            .collect();
        let many = json!({"tool_called": {"name": "t", "arguments": rules}});
        assert!(errors(many)[0].contains("at most 64 checks"));
    }
}
