//! A row of a data set, as files hold it: the beginning of a conversation and which turns of it are trained.

use std::ops::Range;

use espalier_core::chat::Message;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One row. Messages have no hints; the columns `id` to `truncation_point` are the workshop's.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The conversation's id, with `_trunc_{truncation_point}` where the row is only a part of it.
    pub id: String,
    /// When the conversation began, as its source wrote it.
    pub timestamp: String,
    /// The model that spoke.
    pub model: String,
    /// The conversation, `arguments` as objects.
    pub messages: Vec<Message>,
    /// The tools that were offered, in the form in which the template renders them.
    pub tools: Vec<Value>,
    /// Whether the conversation goes on after the row.
    pub truncated: bool,
    /// The conversation's own id, where the row is only a part of it.
    pub original_id: Option<String>,
    /// Which assistant turn is the row's last, from 1, where the row is only a part of the conversation.
    pub truncation_point: Option<u32>,
    /// The task that it was a try at.
    pub task_id: Option<String>,
    /// The family of the task.
    pub task_kind: Option<String>,
    /// Whether it is trained on or held out.
    pub split: Split,
    /// In [0, 1], where it was judged.
    pub reward: Option<f64>,
    /// Assistant turns that are trained, counted from 0; ascending.
    pub trained_turns: Vec<u32>,
    /// The token ids that were sampled, where they are known.
    pub recorded: Option<Recorded>,
}

/// Token ids of a row as a model saw and sampled them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// All of them.
    pub ids: Vec<u32>,
    /// Which of them are trained: ascending, apart from each other.
    pub supervised: Vec<Range<u32>>,
}

/// The part of a data set that a row is in.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Trained on.
    #[default]
    Train,
    /// Held out, to measure on.
    Eval,
}

impl Split {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Train, Self::Eval];

    /// The name in files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Eval => "eval",
        }
    }

    /// That of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|split| split.as_str() == name)
    }
}
