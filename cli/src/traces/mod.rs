//! `espalier traces`: listing, reading, correcting, exporting, importing and judging again.
//!
//! Traces are read from the object store where this machine can reach it, and through the API otherwise; corrections are
//! written to the store alone. Formats and proofs are `espalier_runtime::traces`', what corrections mean is
//! `espalier_core::trace::edits`'; this module chooses and shows.

mod diff;
mod edit;
mod export;
mod history;
mod import;
mod list;
mod mark;
mod merge;
mod pick;
mod render;
mod reverify;
mod show;
mod source;

use clap::{Args, Subcommand};
use espalier_core::trace::edits::{Change, Judgement};

use crate::context::Context;
use crate::exit::Outcome;
use crate::jobs::JobName;
use source::Entry;
pub use source::Source;

/// What to do.
#[derive(Subcommand, Clone, Debug)]
pub enum TracesCommand {
    /// Published traces of a batch, or of the whole project
    List(list::List),
    /// One trace, to be read like a conversation
    Show(Show),
    /// One trace as the model saw it, and whether the chat template writes the same tokens
    Render(render::Render),
    /// Write traces as files for training, or as lines for other programs
    #[command(after_help = EXPORT_HELP)]
    Export(export::Export),
    /// Take in the workshop's trace files as a batch of their own
    Import(import::Import),
    /// Judge stored traces again, where their checks need no live browser
    Reverify(reverify::Reverify),
    /// Correct a conversation: a turn, the answer, where it ends, what becomes of hints
    #[command(after_help = EDIT_HELP)]
    Edit(Box<edit::EditArgs>),
    /// Label traces; accept or reject them for training
    Label(mark::Label),
    /// Leave traces out of data sets
    Drop(mark::Omit),
    /// No longer leave them out
    Undrop(mark::Omit),
    /// Let the conversations of other traces follow that of the first
    Merge(merge::Merge),
    /// Make several conversations out of one
    Split(edit::Split),
    /// The corrections of a trace
    Log(history::Log),
    /// Take a correction back; nothing is deleted
    Undo(history::Undo),
}

const EDIT_HELP: &str = "\
  espalier traces edit b1/price-1 --turn 2 --reasoning '' --content 'I open the shop.'
  espalier traces edit b1/price-1 --turn 3 --arguments '{\"url\": \"http://shop.test\"}'
  espalier traces edit b1/price-1 --cut-after 3 --answer @answer.txt --note 'it was right here'
  espalier traces edit --batch b1 --solved --drop-hints
  espalier traces edit b1/price-1 --editor

What was recorded stays: `espalier traces show --diff` compares, `traces undo` takes back.";

const EXPORT_HELP: &str = "\
  espalier traces export b1 --format workshop --min-reward 1 --out good/    one file a trace, for training
  espalier traces export b1 --format jsonl | jq .outcome                    whole traces, one a line";

/// Where traces are.
#[derive(Args, Clone, Debug)]
pub struct Place {
    /// Object store, such as file:///var/lib/espalier [default: that of the local `up`, else through the API]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// Which traces.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// Only with at least this reward
    #[arg(long, value_name = "REWARD")]
    pub min_reward: Option<f64>,
    /// Only of this family of tasks
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// Only those whose every check held
    #[arg(long, conflicts_with = "failed")]
    pub solved: bool,
    /// Only those with a check that did not hold
    #[arg(long)]
    pub failed: bool,
    /// Only those that somebody accepted
    #[arg(long)]
    pub accepted: bool,
}

impl Filter {
    /// Whether a trace is meant. One without a verdict passes no rule about rewards.
    pub fn admits(&self, entry: &Entry) -> bool {
        let summary = &entry.summary;
        let reward_ok = self
            .min_reward
            .is_none_or(|min| summary.reward.is_some_and(|reward| reward >= min));
        let kind_ok = self
            .kind
            .as_ref()
            .is_none_or(|kind| *kind == summary.task_kind);
        let solved = summary.solved();
        reward_ok
            && kind_ok
            && (!self.solved || solved == Some(true))
            && (!self.failed || solved == Some(false))
            && (!self.accepted || entry.standing.judgement == Some(Judgement::Accepted))
    }
}

/// Options of `traces show`.
#[derive(Args, Clone, Debug)]
pub struct Show {
    /// The job that made it
    #[arg(value_name = "BATCH/JOB")]
    pub job: JobName,
    /// The steps of one attempt, as far as they reached the store, in place of what was published
    #[arg(long, value_name = "FENCE")]
    pub attempt: Option<u64>,
    /// Tool results as a whole, not only their first lines
    #[arg(long)]
    pub full: bool,
    /// What was recorded, whatever corrections say
    #[arg(long, conflicts_with_all = ["attempt", "diff", "form"])]
    pub raw: bool,
    /// What corrections have changed, as a unified difference
    #[arg(long, conflicts_with_all = ["attempt", "form"])]
    pub diff: bool,
    /// The conversation as a text that `edit --form` takes back
    #[arg(long, conflicts_with = "attempt")]
    pub form: bool,
    /// Lines of a tool result that are shown
    #[arg(long, value_name = "N", default_value_t = 12, conflicts_with = "full")]
    pub lines: usize,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, command: &TracesCommand) -> Outcome {
    match command {
        TracesCommand::List(args) => list::run(context, args).await,
        TracesCommand::Show(args) => show::run(context, args).await,
        TracesCommand::Render(args) => render::run(context, args).await,
        TracesCommand::Export(args) => export::run(context, args).await,
        TracesCommand::Import(args) => import::run(context, args).await,
        TracesCommand::Reverify(args) => reverify::run(context, args).await,
        TracesCommand::Edit(args) => edit::run(context, args).await,
        TracesCommand::Label(args) => mark::label(context, args).await,
        TracesCommand::Drop(args) => mark::omit(context, args, Change::Drop).await,
        TracesCommand::Undrop(args) => mark::omit(context, args, Change::Undrop).await,
        TracesCommand::Merge(args) => merge::run(context, args).await,
        TracesCommand::Split(args) => edit::split(context, args).await,
        TracesCommand::Log(args) => history::log(context, args).await,
        TracesCommand::Undo(args) => history::undo(context, args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::time::Timestamp;
    use espalier_core::trace::edits::Standing;
    use espalier_core::trace::{RolloutSummary, StopReason, Totals};

    fn entry(reward: Option<f64>) -> Entry {
        Entry {
            job: "default/b/j".parse().unwrap(),
            summary: RolloutSummary {
                reward,
                stop: StopReason::Answered,
                reason: String::new(),
                task_id: String::new(),
                task_kind: "shop".to_owned(),
                totals: Totals::default(),
            },
            published: Timestamp(0),
            patches: 0,
            standing: Standing::default(),
        }
    }

    #[test]
    fn filters_ask_for_a_verdict() {
        let at_least = Filter {
            min_reward: Some(0.5),
            ..Filter::default()
        };
        assert_eq!(
            [Some(0.5), Some(0.4), None].map(|r| at_least.admits(&entry(r))),
            [true, false, false]
        );
        let solved = Filter {
            solved: true,
            kind: Some("shop".to_owned()),
            ..Filter::default()
        };
        assert_eq!(
            [Some(1.0), Some(0.9), None].map(|r| solved.admits(&entry(r))),
            [true, false, false]
        );
        let failed = Filter {
            failed: true,
            ..Filter::default()
        };
        assert_eq!(
            [Some(1.0), Some(0.9), None].map(|r| failed.admits(&entry(r))),
            [false, true, false]
        );
        assert!(Filter::default().admits(&entry(None)));
        let accepted = Filter {
            accepted: true,
            ..Filter::default()
        };
        let mut one = entry(None);
        assert!(!accepted.admits(&one));
        one.standing.judgement = Some(Judgement::Accepted);
        assert!(accepted.admits(&one));
    }
}
