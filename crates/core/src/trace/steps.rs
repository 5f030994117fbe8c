//! A rollout as it happens, one line a step, and the trace that the lines add up to.

use serde::{Deserialize, Serialize};

use super::{Header, ModelCall, Outcome, SCHEMA_VERSION, ToolCallRecord, Trace};
use crate::chat::Message;

/// One thing that happened in a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// The first line.
    Header(Box<Header>),
    /// A message was added to the conversation.
    Message {
        /// The message.
        message: Message,
    },
    /// The model was called; its message is a step of its own, before this one.
    ModelCall(Box<ModelCall>),
    /// A tool was called; its message is a step of its own, before this one.
    ToolCall(Box<ToolCallRecord>),
    /// The last line.
    Outcome(Box<Outcome>),
}

/// Why lines do not add up to a trace.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TraceError {
    /// A line that is not a step.
    #[error("line {line} of the trace is not a step: {reason}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What the parser said.
        reason: String,
    },
    /// The first line is missing.
    #[error("the trace does not begin with its header")]
    NoHeader,
    /// The last line is missing: the attempt was cut off.
    #[error("the trace has no outcome: the attempt was cut off after {messages} messages")]
    NoOutcome {
        /// How far it came.
        messages: usize,
    },
    /// A version that this build cannot read.
    #[error("`schema_version` must be {SCHEMA_VERSION}, got `{found}`")]
    Version {
        /// What the trace says.
        found: u32,
    },
    /// A record that points at a message which is not there.
    #[error("a call points at message {message}, and there are {messages}")]
    Dangling {
        /// The index.
        message: usize,
        /// How many there are.
        messages: usize,
    },
    /// A whole trace that is not JSON of this schema.
    #[error("not a trace: {reason}")]
    Json {
        /// What the parser said.
        reason: String,
    },
}

impl Trace {
    /// What `steps` add up to.
    pub fn from_steps(steps: impl IntoIterator<Item = Step>) -> Result<Self, TraceError> {
        let (mut header, mut outcome) = (None, None);
        let (mut messages, mut model_calls, mut tool_calls) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Header(first) => header = Some(*first),
                Step::Message { message } => messages.push(message),
                Step::ModelCall(call) => model_calls.push(*call),
                Step::ToolCall(call) => tool_calls.push(*call),
                Step::Outcome(last) => outcome = Some(*last),
            }
        }
        let header = header.ok_or(TraceError::NoHeader)?;
        let outcome = outcome.ok_or(TraceError::NoOutcome {
            messages: messages.len(),
        })?;
        Self {
            header,
            messages,
            model_calls,
            tool_calls,
            outcome,
        }
        .checked()
    }

    /// Reads steps from lines of JSON.
    pub fn from_lines(text: &str) -> Result<Self, TraceError> {
        let parse = |(i, line)| {
            serde_json::from_str::<Step>(line).map_err(|error| TraceError::Line {
                line: i + 1,
                reason: error.to_string(),
            })
        };
        let lines = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .enumerate();
        Self::from_steps(lines.map(parse).collect::<Result<Vec<_>, _>>()?)
    }

    /// Reads a whole trace from JSON.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TraceError> {
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let json = |error: serde_json::Error| TraceError::Json {
            reason: error.to_string(),
        };
        let version: Version = serde_json::from_slice(bytes).map_err(json)?;
        if version.schema_version != SCHEMA_VERSION {
            return Err(TraceError::Version {
                found: version.schema_version,
            });
        }
        serde_json::from_slice::<Self>(bytes)
            .map_err(json)?
            .checked()
    }

    fn checked(self) -> Result<Self, TraceError> {
        if self.header.schema_version != SCHEMA_VERSION {
            return Err(TraceError::Version {
                found: self.header.schema_version,
            });
        }
        let messages = self.messages.len();
        let pointers = self
            .model_calls
            .iter()
            .map(|c| c.message)
            .chain(self.tool_calls.iter().map(|c| c.message));
        match pointers.into_iter().find(|message| *message >= messages) {
            Some(message) => Err(TraceError::Dangling { message, messages }),
            None => Ok(self),
        }
    }
}
