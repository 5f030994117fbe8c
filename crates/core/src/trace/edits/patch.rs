//! The patch as it is stored, version 1.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chat::{Message, ToolDef};
use crate::id::JobKey;
use crate::time::Timestamp;
use crate::trace::{SCHEMA_VERSION, Verdict, sha256_hex};

/// One entry of the log of a trace. Its number is the object's name, counted from 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Patch {
    /// The trace schema that it speaks of.
    pub schema_version: u32,
    /// What is different.
    #[serde(flatten)]
    pub change: Change,
    /// When it was made.
    pub at_us: Timestamp,
    /// Who or what made it: a person, or such as `espalier traces reverify`.
    pub by: String,
    /// Why, for whoever reads the log.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// How many patches its maker had seen. Absent: all before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<u32>,
}

/// A log, as whoever used it writes it down: more may follow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Corrections {
    /// How many patches there were.
    pub count: u32,
    /// SHA-256 of them as a JSON array, in hex.
    pub sha256: String,
}

impl Corrections {
    /// None where nothing was corrected.
    pub fn of(log: &[Patch]) -> Option<Self> {
        let count = u32::try_from(log.len()).unwrap_or(u32::MAX);
        let sha256 = sha256_hex(serde_json::json!(log).to_string().as_bytes());
        (count > 0).then_some(Self { count, sha256 })
    }
}

/// What a patch changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Change {
    /// Another verdict in place of the one that counts.
    Verdict {
        /// The verdict that counts from here on.
        verdict: Verdict,
    },
    /// Changes of the conversation, in order; all of them or none.
    Edit {
        /// At least one.
        edits: Vec<Edit>,
    },
    /// What becomes of hints, whatever a data set does with them by default.
    Hints {
        /// Kept as if they were part of the task, or left out.
        keep: bool,
    },
    /// What a person thinks of the trace.
    Label {
        /// Labels to set, and those to remove as `null`.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        labels: BTreeMap<String, Option<String>>,
        /// Whether it is fit for training.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        judgement: Option<Judgement>,
        /// In [0, 1]; counts in place of the reward that checks gave.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reward: Option<f64>,
    },
    /// The trace is left out of data sets.
    Drop,
    /// It is no longer left out.
    Undrop,
    /// The conversation of another trace goes on where this one ends.
    Join {
        /// The other trace's job.
        from: JobKey,
        /// How many of the other trace's patches are in what was taken over.
        from_log: u32,
        /// Its conversation, without the system messages at its beginning.
        messages: Vec<Message>,
        /// Its tools that this trace does not have.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<ToolDef>,
    },
    /// An earlier patch counts no more. Taking back an undo makes what it took back count again.
    Undo {
        /// The number of that patch.
        patch: u32,
    },
}

/// One change of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "edit", rename_all = "snake_case")]
pub enum Edit {
    /// Another text in a message of any role.
    Content {
        /// The message.
        message: usize,
        /// Its text.
        content: String,
    },
    /// Other thoughts.
    Reasoning {
        /// An assistant message.
        message: usize,
        /// Its thoughts; none removes them.
        reasoning: Option<String>,
    },
    /// Other arguments of a call; its recorded result stays.
    Arguments {
        /// An assistant message.
        message: usize,
        /// Which of its calls, from 0.
        call: usize,
        /// What it is called with.
        arguments: Map<String, Value>,
    },
    /// An answer at the end of a conversation that has none there.
    Answer {
        /// Its text.
        content: String,
        /// Its thoughts.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reasoning: Option<String>,
    },
    /// Removes what follows a turn in its conversation.
    CutAfter {
        /// An assistant message.
        message: usize,
    },
    /// Removes an assistant message and the results of its calls.
    RemoveTurn {
        /// An assistant message.
        message: usize,
    },
    /// A conversation of its own begins here, with the same system messages.
    SplitBefore {
        /// A user message.
        message: usize,
    },
    /// Marks a system message as a hint, or as none.
    Hint {
        /// A system message.
        message: usize,
        /// Whether it is one.
        hint: bool,
    },
}

/// What a person says of a trace as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    /// Fit for training.
    Accepted,
    /// Not fit for training.
    Rejected,
}

impl Judgement {
    /// The name in records and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
        }
    }
}

impl Patch {
    /// A patch by somebody who has seen `log` patches.
    pub fn new(change: Change, by: impl Into<String>, at_us: Timestamp, log: u32) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            change,
            at_us,
            by: by.into(),
            why: String::new(),
            log: Some(log),
        }
    }

    /// The same with a reason.
    pub fn because(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }

    /// Reads a patch that somebody else may have written.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let patch: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if patch.schema_version != SCHEMA_VERSION {
            let found = patch.schema_version;
            return Err(format!(
                "`schema_version` must be {SCHEMA_VERSION}, got `{found}`"
            ));
        }
        Ok(patch)
    }

    /// How many messages it adds; they have their numbers whether or not it counts.
    pub(super) fn adds(&self) -> usize {
        match &self.change {
            Change::Join { messages, .. } => messages.len(),
            Change::Edit { edits } => {
                let answers = edits.iter().filter(|e| matches!(e, Edit::Answer { .. }));
                answers.count()
            }
            _ => 0,
        }
    }
}

impl Change {
    /// The name in records and tables.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Verdict { .. } => "verdict",
            Self::Edit { .. } => "edit",
            Self::Hints { .. } => "hints",
            Self::Label { .. } => "label",
            Self::Drop => "drop",
            Self::Undrop => "undrop",
            Self::Join { .. } => "join",
            Self::Undo { .. } => "undo",
        }
    }
}

impl Edit {
    /// The message that it names; none where it is about the end of the conversation.
    pub fn message(&self) -> Option<usize> {
        match self {
            Self::Content { message, .. }
            | Self::Reasoning { message, .. }
            | Self::Arguments { message, .. }
            | Self::CutAfter { message }
            | Self::RemoveTurn { message }
            | Self::SplitBefore { message }
            | Self::Hint { message, .. } => Some(*message),
            Self::Answer { .. } => None,
        }
    }
}
