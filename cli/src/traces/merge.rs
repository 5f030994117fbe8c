//! `espalier traces merge`: one conversation out of those of several traces.

use std::collections::BTreeSet;

use clap::Args;
use espalier_core::chat::{Message, ToolDef};
use espalier_core::error::FieldError;
use espalier_core::trace::edits::{Change, Conversation};
use espalier_runtime::traces::Loaded;

use super::Place;
use super::pick::{Author, Writer, Written, report};
use crate::context::Context;
use crate::exit::{Outcome, Problem};
use crate::jobs::JobName;

/// Options of `traces merge`.
#[derive(Args, Clone, Debug)]
pub struct Merge {
    /// The job whose trace goes on
    #[arg(value_name = "BATCH/JOB")]
    pub first: JobName,
    /// The jobs whose conversations follow, in order; their own traces are dropped
    #[arg(value_name = "BATCH/JOB", required = true)]
    pub others: Vec<JobName>,
    /// Who, and why.
    #[command(flatten)]
    pub author: Author,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command. What follows is written into the first trace before the other is dropped, so that a command that
/// was stopped loses nothing, and can be given again after `undo`.
pub async fn run(context: &Context, args: &Merge) -> Outcome {
    let writer = Writer::open(context, &args.place, &args.author).await?;
    let names: Vec<&JobName> = [&args.first].into_iter().chain(&args.others).collect();
    let distinct: BTreeSet<String> = names
        .iter()
        .map(|n| format!("{}/{}", n.batch, n.job))
        .collect();
    if distinct.len() < names.len() {
        return Err(Problem::refused("a trace cannot be merged with itself"));
    }
    let project = writer.traces.project().clone();
    let mut first = writer.load(&args.first.key(project.clone())).await?;
    let mut written = Vec::new();
    for other in &args.others {
        let other = writer.load(&other.key(project.clone())).await?;
        let change = joined(&first, &other)?;
        let (one, grown) = writer.write(first, change).await?;
        written.push(one);
        let Some(grown) = grown else { break };
        first = grown;
        let (dropped, _) = writer.write(other, Change::Drop).await?;
        if !matches!(dropped, Written::Same(_)) {
            written.push(dropped);
        }
    }
    report(context, &written)
}

/// The change that lets the conversation of `other` follow that of `first`.
fn joined(first: &Loaded, other: &Loaded) -> Result<Change, FieldError> {
    let name = |field: &str| format!("{}.{field}", other.trace.header.job.job);
    let [conversation] = &other.curated.conversations[..] else {
        let parts = other.curated.conversations.len();
        let rule = "must be one, not split: undo the split first";
        return Err(FieldError::new(name("conversations"), parts, rule));
    };
    let here = frame(&first.curated.conversations[0]);
    let there = frame(conversation);
    if here != there {
        let rule = "must be the system message of the first trace: edit one of them first";
        return Err(FieldError::new(name("system"), there.join(" "), rule));
    }
    let known = &first.curated.conversations[0].tools;
    let mut tools: Vec<ToolDef> = Vec::new();
    for tool in &conversation.tools {
        match known.iter().find(|k| k.function.name == tool.function.name) {
            None => tools.push(tool.clone()),
            Some(known) if known == tool => {}
            Some(_) => {
                let rule = "must be the same tool as in the first trace";
                return Err(FieldError::new(name("tools"), &tool.function.name, rule));
            }
        }
    }
    let messages = conversation.messages.iter();
    let messages = messages.skip_while(|message| message.role() == "system");
    Ok(Change::Join {
        from: other.trace.header.job.clone(),
        from_log: other.curated.patches,
        messages: with_free_ids(first, messages.cloned().collect()),
        tools,
    })
}

/// The system messages that training keeps.
fn frame(conversation: &Conversation) -> Vec<&str> {
    let messages = conversation.messages.iter();
    let system = messages.filter_map(|message| match message {
        Message::System {
            content,
            hint: false,
        } => Some(content.as_str()),
        _ => None,
    });
    system.collect()
}

/// `messages` with ids of calls that the conversations of `first` do not have.
fn with_free_ids(first: &Loaded, mut messages: Vec<Message>) -> Vec<Message> {
    let conversations = first.curated.conversations.iter();
    let known: BTreeSet<&str> = conversations
        .flat_map(|conversation| &conversation.messages)
        .flat_map(calls)
        .map(String::as_str)
        .collect();
    let own: BTreeSet<String> = messages.iter().flat_map(calls).cloned().collect();
    let mut mark = String::new();
    while own
        .iter()
        .any(|id| known.contains(format!("{id}{mark}").as_str()))
    {
        mark.push('+');
    }
    for message in &mut messages {
        match message {
            Message::Assistant { tool_calls, .. } => {
                tool_calls
                    .iter_mut()
                    .for_each(|call| call.id.push_str(&mark));
            }
            Message::Tool { tool_call_id, .. } => tool_call_id.push_str(&mark),
            Message::System { .. } | Message::User { .. } => {}
        }
    }
    messages
}

fn calls(message: &Message) -> impl Iterator<Item = &String> {
    let calls = match message {
        Message::Assistant { tool_calls, .. } => tool_calls.as_slice(),
        _ => &[],
    };
    calls.iter().map(|call| &call.id)
}
