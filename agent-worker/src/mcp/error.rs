//! What goes wrong between a rollout and its MCP servers, and what that means for the attempt.

use std::time::Duration;

use espalier_core::error::{ErrorClass, FieldError};
use espalier_runtime::tasks::BlockingFailed;

/// An error that ends a connection or an attempt. A tool that merely fails is none: that is a [`super::ToolOutcome`]
/// with its error flag set, which the model sees.
#[derive(Debug, thiserror::Error)]
pub enum McpError {
    /// The job names a server, brings one along or asks for a policy in a way that cannot work.
    #[error(transparent)]
    Invalid(#[from] FieldError),

    /// The name was not offered to the model.
    #[error("no tool `{name}` is offered")]
    UnknownTool {
        /// What was called.
        name: String,
    },

    /// What this worker needs to start the server is missing here. Another worker may have it.
    #[error("server `{server}` cannot be started here: {reason}")]
    Missing {
        /// Name of the server.
        server: String,
        /// What is missing, and how to get it.
        reason: String,
    },

    /// The server did not come up, or ended its connection before it was ready.
    #[error("server `{server}` did not start: {reason}")]
    Start {
        /// Name of the server.
        server: String,
        /// What was seen.
        reason: String,
        /// The end of its standard error, without secrets but with what the model and its tools said to one another,
        /// as far as the server logs that. It is no part of the message, which goes into logs and telemetry.
        stderr: String,
    },

    /// The server's process or its connection ended.
    #[error("server `{server}` is gone: {reason}")]
    Crashed {
        /// Name of the server.
        server: String,
        /// What was seen.
        reason: String,
        /// The end of its standard error, without secrets but with what the model and its tools said to one another,
        /// as far as the server logs that. It is no part of the message, which goes into logs and telemetry.
        stderr: String,
    },

    /// What the server kept for this rollout (pages, cookies, a session) is lost.
    #[error("server `{server}` lost the state of this rollout: {reason}")]
    ContextLost {
        /// Name of the server.
        server: String,
        /// How that was seen.
        reason: String,
    },

    /// A call did not end in time, and the server does not say that it is alive either.
    #[error("`{what}` of server `{server}` did not end within {after:?}")]
    Deadline {
        /// Name of the server.
        server: String,
        /// The tool, or the wait.
        what: String,
        /// How long it was allowed to take.
        after: Duration,
    },

    /// The server sent more than an answer may hold.
    #[error("server `{server}` sent more than {bytes_max} bytes for one answer")]
    TooLarge {
        /// Name of the server.
        server: String,
        /// The limit.
        bytes_max: usize,
    },

    /// An answer could not be converted off the async threads.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),

    /// The rollout was cancelled.
    #[error("cancelled")]
    Cancelled,

    /// The host is shutting down.
    #[error("the worker is shutting down")]
    ShuttingDown,
}

impl McpError {
    /// What the queue has to know.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Invalid(_) => ErrorClass::Invalid,
            Self::UnknownTool { .. } => ErrorClass::Handler,
            Self::Missing { .. }
            | Self::Start { .. }
            | Self::Crashed { .. }
            | Self::ContextLost { .. }
            | Self::Deadline { .. }
            | Self::TooLarge { .. }
            | Self::Blocking(_) => ErrorClass::Infra,
            Self::Cancelled => ErrorClass::Cancelled,
            Self::ShuttingDown => ErrorClass::Preempted,
        }
    }

    /// The end of what a server that is gone wrote to its standard error. For whoever looks at the job or sits at the
    /// terminal; not for logs.
    pub fn last_words(&self) -> Option<&str> {
        match self {
            Self::Start { stderr, .. } | Self::Crashed { stderr, .. } => {
                Some(stderr.as_str()).filter(|stderr| !stderr.is_empty())
            }
            _ => None,
        }
    }

    /// Whether the server, and not only this rollout's connection, has to be doubted.
    pub(super) fn doubts_server(&self) -> bool {
        matches!(
            self,
            Self::Start { .. }
                | Self::Crashed { .. }
                | Self::ContextLost { .. }
                | Self::Deadline { .. }
        )
    }
}
