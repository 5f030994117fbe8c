//! A lineage as a tree: what something is, where it lies, its digest, whether that is true, and what it was made from.

use serde::Serialize;

use crate::output::plain;

/// Whether what is there is what was written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// It is.
    Verified,
    /// It is there and is what it should be, but nobody wrote down its digest: a record, which has the digests of others.
    Read,
    /// It cannot be told here.
    Unverified {
        /// Why not.
        why: String,
    },
    /// It is not.
    Broken {
        /// What is wrong.
        why: String,
    },
}

/// One thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// What it is: `adapter`, `file`, `job`, …
    pub kind: &'static str,
    /// Its name: an object path, where it is an object.
    pub name: String,
    /// SHA-256 of it, in hex, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// More of it, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Whether it is what was written down.
    #[serde(flatten)]
    pub state: State,
    /// What belongs to it, and what it was made from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<Node>,
}

impl Node {
    /// A thing without children.
    pub fn new(kind: &'static str, name: impl Into<String>, state: State) -> Self {
        Self {
            kind,
            name: name.into(),
            sha256: None,
            detail: String::new(),
            state,
            children: Vec::new(),
        }
    }

    /// One that is not what it should be.
    pub fn broken(kind: &'static str, name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(kind, name, State::Broken { why: why.into() })
    }

    /// One of which this cannot be told.
    pub fn unverified(kind: &'static str, name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(kind, name, State::Unverified { why: why.into() })
    }

    /// How many of the whole tree are verified, cannot be, and are broken. Records are none of the three.
    pub fn counts(&self) -> [u64; 3] {
        let own = match self.state {
            State::Verified => [1, 0, 0],
            State::Read => [0, 0, 0],
            State::Unverified { .. } => [0, 1, 0],
            State::Broken { .. } => [0, 0, 1],
        };
        self.children.iter().fold(own, |sum, child| {
            let more = child.counts();
            [sum[0] + more[0], sum[1] + more[1], sum[2] + more[2]]
        })
    }

    /// For people: a line a thing. Of many alike that are verified only the first are named.
    pub fn to_text(&self) -> String {
        let mut lines = Vec::new();
        self.lines("", "", &mut lines);
        lines.join("\n")
    }

    fn lines(&self, first: &str, rest: &str, lines: &mut Vec<String>) {
        lines.push(format!("{first}{}", self.line()));
        let shown = self.shown();
        let left = self.children.len() - shown.len();
        for (n, child) in shown.iter().enumerate() {
            let is_last = n + 1 == shown.len() && left == 0;
            let (first, more) = match is_last {
                true => ("└─ ", "   "),
                false => ("├─ ", "│  "),
            };
            child.lines(&format!("{rest}{first}"), &format!("{rest}{more}"), lines);
        }
        if left > 0 {
            lines.push(format!(
                "{rest}└─ … and {left} more that are well; --json has all"
            ));
        }
    }

    fn line(&self) -> String {
        let (sign, why) = match &self.state {
            State::Verified => ("✓", ""),
            State::Read => ("·", ""),
            State::Unverified { why } => ("?", why.as_str()),
            State::Broken { why } => ("✗", why.as_str()),
        };
        let mut line = format!("{sign} {} {}", self.kind, plain(&self.name));
        if let Some(sha256) = &self.sha256 {
            let short: String = sha256.chars().take(SHA256_SHOWN).collect();
            line.push_str(&format!("  sha256 {}", plain(&short)));
        }
        for more in [self.detail.as_str(), why] {
            if !more.is_empty() {
                line.push_str(&format!("  {}", plain(more)));
            }
        }
        line
    }

    /// Children that a person is shown: all that are not verified through and through, and the first of the others.
    fn shown(&self) -> Vec<&Self> {
        let mut fine = 0;
        let is_shown = |child: &&Self| {
            let [_, unverified, broken] = child.counts();
            fine += usize::from(unverified + broken == 0);
            unverified + broken > 0 || fine <= SHOWN_MAX
        };
        self.children.iter().filter(is_shown).collect()
    }
}

/// How much of a digest people are shown.
const SHA256_SHOWN: usize = 12;
/// Children that are shown, where all is well with them.
const SHOWN_MAX: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_tree() {
        let mut files = Node::new("job", "p/b/train", State::Read);
        files.children = vec![
            Node {
                sha256: Some("ab".repeat(32)),
                ..Node::new("file", "a.json", State::Verified)
            },
            Node::broken("file", "b\u{1b}.json", "is not there"),
        ];
        let mut root = Node::new("adapter", "shop@v2", State::Verified);
        root.detail = "lora".to_owned();
        root.children = vec![files, Node::unverified("model", "Qwen", "it is elsewhere")];
        assert_eq!(
            root.to_text(),
            "✓ adapter shop@v2  lora\n\
             ├─ · job p/b/train\n\
             │  ├─ ✓ file a.json  sha256 abababababab\n\
             │  └─ ✗ file b\u{fffd}.json  is not there\n\
             └─ ? model Qwen  it is elsewhere"
        );
        assert_eq!(root.counts(), [2, 1, 1]);
    }

    #[test]
    fn of_many_that_are_well_the_first_are_shown_and_what_is_broken_always() {
        let mut root = Node::new("data set", "d@v1", State::Verified);
        root.children = (0..30)
            .map(|n| Node::new("trace", format!("t{n}"), State::Verified))
            .collect();
        root.children.push(Node::broken("trace", "bad", "altered"));
        let text = root.to_text();
        assert!(
            text.contains("t11") && !text.contains("t12") && text.contains("✗ trace bad"),
            "{text}"
        );
        assert!(
            text.ends_with("└─ … and 18 more that are well; --json has all"),
            "{text}"
        );
    }
}
