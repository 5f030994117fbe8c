//! `espalier traces edit` and `split`: changes of a conversation, told by options or in an editor.

pub mod difference;
mod editor;
pub mod form;
#[cfg(test)]
mod tests;
mod texts;

use std::path::PathBuf;

use clap::Args;
use espalier_core::chat::Message;
use espalier_core::error::FieldError;
use espalier_core::trace::edits::{Change, Conversation, Edit, check, turns};
use espalier_runtime::traces::Loaded;

use super::Place;
use super::mark::write_all;
use super::pick::{Author, Whole, Writer, Written, report};
use crate::context::Context;
use crate::exit::{Outcome, Problem};
use crate::jobs::JobName;
use texts::Text;

/// Options of `traces edit`.
#[derive(Args, Clone, Debug)]
pub struct EditArgs {
    /// The jobs that made them; several only where hints are all that is changed
    #[arg(value_name = "BATCH/JOB")]
    pub jobs: Vec<JobName>,
    /// The turn that --content, --reasoning and --arguments are about, as `show` counts
    #[arg(long, value_name = "N", conflicts_with = "message")]
    pub turn: Option<usize>,
    /// The message that --content is about, as `show` counts, of any role
    #[arg(long, value_name = "N")]
    pub message: Option<usize>,
    /// Another text; `@FILE` reads it, `@-` from standard input
    #[arg(long, value_name = "TEXT|@FILE")]
    pub content: Option<Text>,
    /// Other thoughts; an empty text removes them
    #[arg(long, value_name = "TEXT|@FILE", requires = "turn")]
    pub reasoning: Option<Text>,
    /// Other arguments of a call of the turn
    #[arg(long, value_name = "JSON|@FILE", requires = "turn")]
    pub arguments: Option<Text>,
    /// Which call of the turn
    #[arg(long, value_name = "N", default_value_t = 1, requires = "arguments")]
    pub call: usize,
    /// Another final answer, or one where there is none
    #[arg(long, value_name = "TEXT|@FILE")]
    pub answer: Option<Text>,
    /// Removes a turn with the results of its calls; may be given several times
    #[arg(long, value_name = "N")]
    pub remove_turn: Vec<usize>,
    /// Removes what follows a turn in its conversation
    #[arg(long, value_name = "N")]
    pub cut_after: Option<usize>,
    /// A conversation of its own begins with the user message that this turn answers
    #[arg(long, value_name = "N")]
    pub split_before: Vec<usize>,
    /// Marks a system message as a hint
    #[arg(long, value_name = "MESSAGE")]
    pub hint: Vec<usize>,
    /// Marks a system message as no hint
    #[arg(long, value_name = "MESSAGE")]
    pub no_hint: Vec<usize>,
    /// Hints stay in training rows
    #[arg(long, conflicts_with = "drop_hints")]
    pub keep_hints: bool,
    /// Hints are left out of training rows
    #[arg(long)]
    pub drop_hints: bool,
    /// Opens the conversation in $VISUAL or $EDITOR
    #[arg(long, conflicts_with_all = ["form", "turn", "message", "content", "answer", "remove_turn", "cut_after", "split_before", "hint", "no_hint"])]
    pub editor: bool,
    /// Takes the conversation from a file that `show --form` wrote and somebody edited
    #[arg(long, value_name = "FILE", conflicts_with_all = ["turn", "message", "content", "answer", "remove_turn", "cut_after", "split_before", "hint", "no_hint"])]
    pub form: Option<PathBuf>,
    /// In place of single jobs, for hints.
    #[command(flatten)]
    pub whole: Whole,
    /// Who, and why.
    #[command(flatten)]
    pub author: Author,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Options of `traces split`.
#[derive(Args, Clone, Debug)]
pub struct Split {
    /// The job that made it
    #[arg(value_name = "BATCH/JOB")]
    pub job: JobName,
    /// Turns whose user message begins a conversation of its own, as `show` counts
    #[arg(long = "before", value_name = "N", required = true)]
    pub before: Vec<usize>,
    /// Who, and why.
    #[command(flatten)]
    pub author: Author,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs `traces edit`.
pub async fn run(context: &Context, args: &EditArgs) -> Outcome {
    let mut writer = Writer::open(context, &args.place, &args.author).await?;
    let hints = (args.keep_hints || args.drop_hints).then_some(Change::Hints {
        keep: args.keep_hints,
    });
    if !args.is_about_one() {
        let Some(change) = hints else {
            return Err(Problem::refused("nothing is to be changed").fix(
                "give --turn with --content, --answer, --cut-after, --editor or another: see --help",
            ));
        };
        return write_all(context, &writer, &args.jobs, &args.whole, &change).await;
    }
    let ([job], None) = (&args.jobs[..], &args.whole.batch) else {
        return Err(Problem::refused(
            "a conversation is edited in one trace, and one must be named as BATCH/JOB",
        ));
    };
    let job = job.key(writer.traces.project().clone());
    let loaded = writer.load(&job).await?;
    let edited = match &args.form {
        Some(form) => Some(editor::edits_of_file(&loaded, form)?),
        None if args.editor => Some(editor::edits(context, &loaded).await?),
        None => None,
    };
    let edits = match edited {
        Some(edited) => {
            writer.has_seen(edited.seen);
            edited.edits
        }
        None => edits(&writer, &loaded, args)?,
    };
    write(context, &writer, loaded, edits, hints).await
}

/// Runs `traces split`.
pub async fn split(context: &Context, args: &Split) -> Outcome {
    let writer = Writer::open(context, &args.place, &args.author).await?;
    let job = args.job.key(writer.traces.project().clone());
    let loaded = writer.load(&job).await?;
    let edits = args.before.iter();
    let edits: Result<Vec<Edit>, FieldError> =
        edits.map(|turn| split_before(&loaded, *turn)).collect();
    write(context, &writer, loaded, edits?, None).await
}

/// One patch for all edits of the conversation, and one for hints.
async fn write(
    context: &Context,
    writer: &Writer,
    loaded: Loaded,
    edits: Vec<Edit>,
    hints: Option<Change>,
) -> Outcome {
    let edits = (!edits.is_empty()).then_some(Change::Edit { edits });
    let changes: Vec<Change> = edits.into_iter().chain(hints).collect();
    if changes.is_empty() {
        return report(context, &[Written::Same(loaded.trace.header.job)]);
    }
    let mut written = Vec::new();
    let mut now = Some(loaded);
    for change in changes {
        let Some(loaded) = now else { break };
        let (one, grown) = writer.write(loaded, change).await?;
        written.push(one);
        now = grown;
    }
    report(context, &written)
}

impl EditArgs {
    /// Whether anything is asked for that means one conversation.
    fn is_about_one(&self) -> bool {
        let texts = [
            &self.content,
            &self.reasoning,
            &self.arguments,
            &self.answer,
        ];
        let lists = [
            &self.remove_turn,
            &self.split_before,
            &self.hint,
            &self.no_hint,
        ];
        texts.iter().any(|text| text.is_some())
            || lists.iter().any(|list| !list.is_empty())
            || self.cut_after.is_some()
            || self.editor
            || self.form.is_some()
    }
}

/// What the options say, in an order in which it can be done.
fn edits(writer: &Writer, loaded: &Loaded, args: &EditArgs) -> Result<Vec<Edit>, Problem> {
    let mut edits = text_edits(loaded, args)?;
    let marks = [(&args.hint, true), (&args.no_hint, false)];
    for (messages, hint) in marks {
        let mark = |message: &usize| Edit::Hint {
            message: *message,
            hint,
        };
        edits.extend(messages.iter().map(mark));
    }
    for turn in &args.split_before {
        edits.push(split_before(loaded, *turn)?);
    }
    for turn in &args.remove_turn {
        let message = message_of(loaded, "remove_turn", *turn)?;
        edits.push(Edit::RemoveTurn { message });
    }
    if let Some(turn) = args.cut_after {
        let message = message_of(loaded, "cut_after", turn)?;
        edits.push(Edit::CutAfter { message });
    }
    if let Some(text) = &args.answer {
        let answer = answer(writer, loaded, &edits, text.read("answer")?)?;
        edits.push(answer);
    }
    Ok(edits)
}

fn text_edits(loaded: &Loaded, args: &EditArgs) -> Result<Vec<Edit>, Problem> {
    let mut edits = Vec::new();
    let message = match (args.turn, args.message) {
        (Some(turn), _) => Some(message_of(loaded, "turn", turn)?),
        (None, message) => message,
    };
    let Some(message) = message else {
        return match &args.content {
            Some(_) => Err(Problem::refused("--content needs --turn or --message")),
            None => Ok(edits),
        };
    };
    if let Some(text) = &args.content {
        let content = text.read("content")?;
        edits.push(Edit::Content { message, content });
    }
    if let Some(text) = &args.reasoning {
        let text = text.read("reasoning")?;
        let reasoning = (!text.trim().is_empty()).then_some(text);
        edits.push(Edit::Reasoning { message, reasoning });
    }
    if let Some(text) = &args.arguments {
        let text = text.read("arguments")?;
        let arguments = serde_json::from_str(&text).map_err(|error| {
            let rule = format!("must be a JSON object: {error}");
            FieldError::new("arguments", &text, rule)
        })?;
        let call = args.call.checked_sub(1);
        let call = call.ok_or_else(|| FieldError::new("call", args.call, "must be 1 or more"))?;
        edits.push(Edit::Arguments {
            message,
            call,
            arguments,
        });
    }
    if edits.is_empty() {
        let fix = "give --content, --reasoning or --arguments with it";
        return Err(Problem::refused("nothing of the turn is to be changed").fix(fix));
    }
    Ok(edits)
}

/// The number of a turn's assistant message.
fn message_of(loaded: &Loaded, field: &str, turn: usize) -> Result<usize, FieldError> {
    let turns = turns(&loaded.trace, &loaded.log);
    let message = turn.checked_sub(1).and_then(|at| turns.get(at));
    message.copied().ok_or_else(|| {
        let rule = format!("must be one of the {} turns, from 1", turns.len());
        FieldError::new(field, turn, rule)
    })
}

/// The split before the user message that a turn answers.
fn split_before(loaded: &Loaded, turn: usize) -> Result<Edit, FieldError> {
    let number = message_of(loaded, "split_before", turn)?;
    let before = |conversation: &Conversation| {
        let mut origins = conversation.origins.iter();
        let at = origins.position(|origin| origin.number() == number)?;
        let user = at.checked_sub(1)?;
        let is_user = matches!(conversation.messages[user], Message::User { .. });
        is_user.then(|| conversation.origins[user].number())
    };
    let mut found = loaded.curated.conversations.iter().filter_map(before);
    match found.next() {
        Some(message) => Ok(Edit::SplitBefore { message }),
        None => {
            let rule = "must be a turn that comes right after a user message";
            Err(FieldError::new("split_before", turn, rule))
        }
    }
}

/// The answer in place of the one at the end, or after what is there once `edits` are made.
fn answer(
    writer: &Writer,
    loaded: &Loaded,
    edits: &[Edit],
    content: String,
) -> Result<Edit, FieldError> {
    let curated = match edits {
        [] => loaded.curated.clone(),
        edits => {
            let edits = edits.to_vec();
            let patch = writer.patch(loaded, Change::Edit { edits });
            check(&loaded.trace, &loaded.log, &patch)?
        }
    };
    let last = curated.conversations.last();
    let last = last.and_then(|last| last.messages.last().zip(last.origins.last()));
    Ok(match last {
        Some((Message::Assistant { tool_calls, .. }, origin)) if tool_calls.is_empty() => {
            let message = origin.number();
            Edit::Content { message, content }
        }
        _ => Edit::Answer {
            content,
            reasoning: None,
        },
    })
}
