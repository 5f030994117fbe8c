//! What the loop does next. Pure: the loop reports what happened, this says what follows.

use std::time::Duration;

use espalier_core::spec::Limits;
use espalier_core::trace::{StopReason, Totals};

/// How far the rollout is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress<'a> {
    /// Sums so far.
    pub totals: &'a Totals,
    /// Since the first model call.
    pub elapsed: Duration,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The user said something.
    UserSpoke,
    /// The user says no more.
    UserDone(StopReason),
    /// The model ended its turn, with so many calls of tools; `cut`: at its longest length.
    TurnEnded {
        /// Calls to answer.
        calls: usize,
        /// Whether the answer was cut.
        cut: bool,
    },
    /// Every call of the turn is answered.
    CallsAnswered,
    /// A call of the turn was never recorded.
    Unrecorded,
    /// The endpoint says that the prompt no longer fits.
    ContextFull,
    /// The time was up in the middle of a turn.
    TimeUp,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Ask the user for the next turn.
    AskUser,
    /// Call the model.
    CallModel,
    /// Answer the calls of the turn.
    AnswerCalls,
    /// End.
    Stop(StopReason),
}

/// The rule. Limits are looked at before a model call, so that the calls of the last turn still have their effect on
/// the world that the verifiers look at; time alone also ends a turn in the middle.
pub(super) fn decide(progress: Progress<'_>, limits: &Limits, event: Event) -> Action {
    match event {
        Event::UserDone(reason) => Action::Stop(reason),
        Event::ContextFull => Action::Stop(StopReason::ContextFull),
        Event::TimeUp => Action::Stop(StopReason::TimeLimit),
        Event::Unrecorded => Action::Stop(StopReason::Unrecorded),
        Event::TurnEnded { calls: 1.., .. } if out_of_time(progress, limits) => {
            Action::Stop(StopReason::TimeLimit)
        }
        Event::TurnEnded { calls: 1.., .. } => Action::AnswerCalls,
        Event::TurnEnded { cut: true, .. } => Action::Stop(StopReason::CutAnswer),
        Event::TurnEnded { .. } => Action::AskUser,
        Event::UserSpoke | Event::CallsAnswered => match spent(progress, limits) {
            Some(reason) => Action::Stop(reason),
            None => Action::CallModel,
        },
    }
}

fn spent(progress: Progress<'_>, limits: &Limits) -> Option<StopReason> {
    let totals = progress.totals;
    if totals.turns >= limits.turns_max {
        Some(StopReason::TurnLimit)
    } else if totals
        .prompt_tokens
        .saturating_add(totals.completion_tokens)
        >= limits.tokens_max
    {
        Some(StopReason::TokenLimit)
    } else if out_of_time(progress, limits) {
        Some(StopReason::TimeLimit)
    } else {
        None
    }
}

fn out_of_time(progress: Progress<'_>, limits: &Limits) -> bool {
    progress.elapsed >= wall(limits)
}

/// The time that a rollout may take.
pub(super) fn wall(limits: &Limits) -> Duration {
    Duration::from_secs(limits.wall_s.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(turns: u32, tokens: u64, elapsed_s: u64, event: Event) -> Action {
        let limits = Limits {
            turns_max: 3,
            tokens_max: 100,
            wall_s: 10,
            tool_calls_per_turn_max: 2,
            tool_call_s: 5,
            ask_s: 5,
        };
        let totals = Totals {
            turns,
            prompt_tokens: tokens,
            ..Totals::default()
        };
        let elapsed = Duration::from_secs(elapsed_s);
        let progress = Progress {
            totals: &totals,
            elapsed,
        };
        decide(progress, &limits, event)
    }

    const CALLS: Event = Event::TurnEnded {
        calls: 1,
        cut: false,
    };

    #[test]
    fn a_rollout_goes_on_until_an_answer() {
        assert_eq!(action(0, 0, 0, Event::UserSpoke), Action::CallModel);
        assert_eq!(action(1, 9, 1, CALLS), Action::AnswerCalls);
        assert_eq!(action(1, 9, 1, Event::CallsAnswered), Action::CallModel);
        let answer = Event::TurnEnded {
            calls: 0,
            cut: false,
        };
        assert_eq!(action(2, 9, 1, answer), Action::AskUser);
        let done = Event::UserDone(StopReason::Answered);
        assert_eq!(action(2, 9, 1, done), Action::Stop(StopReason::Answered));
    }

    #[test]
    fn each_limit_stops_before_the_next_model_call() {
        let stop = |reason| Action::Stop(reason);
        let next = Event::CallsAnswered;
        assert_eq!(action(3, 0, 0, next), stop(StopReason::TurnLimit));
        assert_eq!(action(1, 100, 0, next), stop(StopReason::TokenLimit));
        assert_eq!(action(1, 0, 10, next), stop(StopReason::TimeLimit));
        assert_eq!(
            action(3, 100, 0, CALLS),
            Action::AnswerCalls,
            "the last calls have their effect"
        );
        assert_eq!(action(1, 0, 10, CALLS), stop(StopReason::TimeLimit));
    }

    #[test]
    fn a_cut_answer_ends_the_rollout_unless_it_still_calls() {
        let cut = |calls| Event::TurnEnded { calls, cut: true };
        assert_eq!(action(1, 0, 0, cut(0)), Action::Stop(StopReason::CutAnswer));
        assert_eq!(action(1, 0, 0, cut(1)), Action::AnswerCalls);
    }
}
