//! What a trace and its log come to.

use std::collections::HashMap;

use serde_json::json;

use super::standing::Standing;
use crate::chat::{Message, ToolDef};
use crate::error::FieldError;
use crate::trace::{ModelCall, ToolCallRecord, Trace, Verdict, answer_of, sha256_hex};

/// A trace with its log applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Curated {
    /// How many patches the log has.
    pub patches: u32,
    /// At least one; several where it was split.
    pub conversations: Vec<Conversation>,
    /// What is said of it as a whole.
    pub standing: Standing,
    /// The verdict that counts.
    pub verdict: Option<Verdict>,
    /// Patches that do not fit what is there. [`check`](super::check) lets none in, so that somebody else wrote them.
    pub refused: Vec<Refused>,
}

/// A patch that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its number.
    pub patch: u32,
    /// Why.
    pub error: FieldError,
}

/// A conversation that training may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The messages, without the hints that are to be left out. One that is still marked as a hint is for the data set
    /// to keep or to leave out.
    pub messages: Vec<Message>,
    /// Where each message is from.
    pub origins: Vec<Origin>,
    /// The tools that are offered in it.
    pub tools: Vec<ToolDef>,
    /// How many model calls of the trace, from the first, are as they were recorded: message, all before it, and tools.
    /// Their token ids are valid for training. Hints are not looked at: where they were left out, the prompt is to be
    /// rendered anew without them, and the sampled ids stay.
    pub untouched_calls: usize,
}

/// Where a message is from, with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// As it was recorded; its mark as a hint may differ.
    Recorded(usize),
    /// Recorded, and changed since.
    Edited(usize),
    /// Added by a patch.
    Added(usize),
}

impl Origin {
    /// The number of the message.
    pub fn number(self) -> usize {
        match self {
            Self::Recorded(number) | Self::Edited(number) | Self::Added(number) => number,
        }
    }
}

impl Curated {
    /// The reward that counts.
    pub fn reward(&self) -> Option<f64> {
        self.verdict.as_ref().map(|verdict| verdict.reward)
    }

    /// What the model answers in the end.
    pub fn answer(&self) -> &str {
        self.conversations
            .last()
            .map_or("", |conversation| answer_of(&conversation.messages))
    }

    /// Each conversation as a trace of its own: `recorded` with these messages, tools, labels and verdict. Of its
    /// records those stay that are still about a message of it; of the model calls, the untouched ones. The first has
    /// the recorded id, the others `#2` and so on behind it.
    pub fn traces(&self, recorded: &Trace) -> Vec<Trace> {
        let numbered = self.conversations.iter().enumerate();
        numbered
            .map(|(n, conversation)| {
                let mut trace = conversation.trace(recorded);
                if n > 0 {
                    trace.header.id = format!("{}#{}", trace.header.id, n + 1);
                }
                trace.header.labels = self.standing.labels_over(&recorded.header.labels);
                trace.outcome.verdict = self.verdict.clone();
                trace
            })
            .collect()
    }
}

impl Conversation {
    fn trace(&self, recorded: &Trace) -> Trace {
        let mut header = recorded.header.clone();
        if self.tools != header.tools {
            header.tools = self.tools.clone();
            header.provenance.tools_sha256 = sha256_hex(json!(self.tools).to_string().as_bytes());
        }
        let origins = self.origins.iter().enumerate();
        let places: HashMap<usize, usize> = origins.map(|(at, o)| (o.number(), at)).collect();
        let model_call = |call: &ModelCall| {
            let message = *places.get(&call.message)?;
            let call = call.clone();
            Some(ModelCall { message, ..call })
        };
        let tool_call = |call: &ToolCallRecord| {
            let message = *places.get(&call.message)?;
            let call = call.clone();
            Some(ToolCallRecord { message, ..call })
        };
        let untouched = &recorded.model_calls[..self.untouched_calls];
        Trace {
            header,
            messages: self.messages.clone(),
            model_calls: untouched.iter().filter_map(model_call).collect(),
            tool_calls: recorded.tool_calls.iter().filter_map(tool_call).collect(),
            outcome: recorded.outcome.clone(),
        }
    }
}
