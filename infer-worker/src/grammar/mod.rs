//! Answers that must have a form: JSON of a schema, or calls of tools.
//!
//! A [`Grammar`] is what a request asks for; a [`Constraint`] is one answer's state, which the engine tells what was
//! drawn and asks what is allowed next. What that takes is computed by threads of its own, for all answers of a step at
//! once. The work of llguidance is hidden here, and only the trait is seen by the [scheduler](crate::scheduler).

mod arguments;
mod compiled;
mod exactly;
mod guide;
mod masks;
mod weight;

use std::sync::Arc;

use serde_json::Value;

pub use exactly::Exactly;
pub use guide::{Guides, Vocabulary};

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that follows a schema.
    Json {
        /// The schema.
        schema: Value,
    },
    /// Calls of tools and nothing else.
    Calls {
        /// What may be called.
        calls: Vec<CallGrammar>,
        /// Whether more than one call may come.
        several: bool,
    },
    /// One or the other.
    JsonOrCalls {
        /// The schema.
        schema: Value,
        /// What may be called.
        calls: Vec<CallGrammar>,
        /// Whether more than one call may come.
        several: bool,
    },
}

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct CallGrammar {
    /// Its name.
    pub name: String,
    /// The schema of its arguments.
    pub arguments: Value,
}

/// Where an answer begins: thoughts are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thoughts {
    /// Inside a thought.
    Open,
    /// Where a thought may begin.
    Possible,
    /// After a thought.
    Over,
}

/// One answer's state.
pub trait Constraint: Send {
    /// Which ids may come next: bit `id % 32` of word `id / 32`; ids beyond the end may not. Waits for what
    /// [`push`](Self::push) began, at most a few milliseconds. Of an answer that has not begun it is known.
    ///
    /// # Errors
    /// An id that came was not allowed, or the grammar became too expensive; the answer ends.
    fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError>;

    /// An allowed id came: begins to compute what may come after it, and does not wait.
    ///
    /// # Errors
    /// The id was not allowed; the answer ends.
    fn push(&mut self, id: u32) -> Result<(), GrammarError>;
}

/// A grammar that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It does not compile.
    #[error("the schema cannot be compiled: {reason}")]
    Compile {
        /// Why.
        reason: String,
    },
    /// Others are being compiled, and took too long.
    #[error("too many grammars are being compiled")]
    Busy,
    /// It stopped working in the middle of an answer.
    #[error("the grammar cannot go on: {reason}")]
    Run {
        /// Why.
        reason: String,
    },
}
