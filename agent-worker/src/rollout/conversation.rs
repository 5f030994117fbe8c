//! The other side of a rollout: who speaks for the user, who allows what has to be asked, and who watches.
//!
//! A job's rollout has a fixed list of turns and asks through the coordinator ([`Scripted`]); `espalier chat` has a
//! person at a terminal. The loop is the same.

use std::collections::VecDeque;
use std::time::Duration;

use espalier_core::chat::Message;
use espalier_core::trace::{StopReason, ToolCallRecord};
use serde_json::{Map, Value};

/// What the user does when it is their turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserTurn {
    /// Says something.
    Say(String),
    /// Says no more.
    Done(StopReason),
}

/// A call that waits for a yes or a no.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The offered name of the tool.
    pub tool: &'a str,
    /// Its arguments.
    pub arguments: &'a Map<String, Value>,
    /// After this long nobody's answer counts any more, and the call is refused.
    pub timeout: Duration,
}

/// Something that happened, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Seen<'a> {
    /// The model is about to speak.
    Thinking,
    /// A message was added. A tool's result comes as [`Seen::ToolAnswered`].
    Said(&'a Message),
    /// A tool is about to run.
    ToolCalled {
        /// Its offered name.
        name: &'a str,
        /// Its arguments.
        arguments: &'a Map<String, Value>,
    },
    /// A call was answered, by the tool or by us in its place.
    ToolAnswered {
        /// The record of the call.
        record: &'a ToolCallRecord,
        /// What the model is shown.
        shown: &'a str,
    },
    /// A turn ended: of its time, this much was neither the model's nor the tools'.
    TurnCost {
        /// Number of the model call, from 1.
        turn: u32,
        /// Time of our own.
        overhead: Duration,
        /// Characters of tool results in it.
        result_chars: usize,
    },
}

/// The other side of a rollout.
pub trait Conversation: Send {
    /// The next turn of the user.
    fn next_turn(&mut self) -> impl Future<Output = UserTurn> + Send;

    /// Whether a call may run. The loop gives up waiting after the question's time.
    fn approve(&mut self, question: Question<'_>) -> impl Future<Output = bool> + Send;

    /// Ends when the user wants no more of it in the middle of a turn; the rollout then ends in good order, with what
    /// there is. Polled anew in each turn.
    fn hung_up(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Told of everything that happens. Must not block.
    fn see(&mut self, _seen: Seen<'_>) {}
}

/// Answers the questions of a scripted rollout.
pub trait Approver: Send + Sync {
    /// Whether a call may run.
    fn approve(&self, question: Question<'_>) -> impl Future<Output = bool> + Send;
    /// Told how far the rollout is, for people.
    fn progress(&self, _text: String) {}
}

/// A rollout whose user turns are known from the start.
#[derive(Debug)]
pub struct Scripted<A> {
    turns: VecDeque<String>,
    approver: A,
    model_calls: u32,
}

impl<A: Approver> Scripted<A> {
    /// The user says `prompts`, one after each answer, and `approver` answers questions.
    pub fn new(prompts: impl IntoIterator<Item = String>, approver: A) -> Self {
        Self {
            turns: prompts.into_iter().collect(),
            approver,
            model_calls: 0,
        }
    }
}

impl<A: Approver> Conversation for Scripted<A> {
    async fn next_turn(&mut self) -> UserTurn {
        match self.turns.pop_front() {
            Some(text) => UserTurn::Say(text),
            None => UserTurn::Done(StopReason::Answered),
        }
    }

    async fn approve(&mut self, question: Question<'_>) -> bool {
        self.approver.approve(question).await
    }

    fn see(&mut self, seen: Seen<'_>) {
        match seen {
            Seen::Thinking => {
                self.model_calls += 1;
                self.approver
                    .progress(format!("turn {}: model", self.model_calls));
            }
            Seen::ToolCalled { name, .. } => {
                self.approver
                    .progress(format!("turn {}: {name}", self.model_calls));
            }
            Seen::Said(_) | Seen::ToolAnswered { .. } | Seen::TurnCost { .. } => {}
        }
    }
}
