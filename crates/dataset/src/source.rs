//! A conversation with everything that is known of it: what data sets are built from.
//!
//! It comes from a trace ([`Source::of_trace`]) or from files of others (`import`). What it is not: it has no token
//! mask yet, and its hints are still in it.

use std::collections::BTreeMap;

use espalier_core::chat::Message;
use espalier_core::trace::{PromptError, Trace, prompt_ids, sha256_hex};
use serde_json::{Value, json};

use crate::row::Split;

/// One conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// Its name: that of the trace, or the one that its file gives it.
    pub id: String,
    /// When it began, as whoever recorded it wrote it.
    pub timestamp: String,
    /// The model that spoke.
    pub model: String,
    /// All messages, hints included.
    pub messages: Vec<Message>,
    /// The tools, in the form in which the template is to render them.
    pub tools: Vec<Value>,
    /// What filters ask for.
    pub facts: Facts,
    /// Whether the model was left to think.
    pub thinking: bool,
    /// Whether hints stay in, where somebody said so of this conversation.
    pub keep_hints: Option<bool>,
    /// Calls whose token ids are known, in order of their messages.
    pub calls: Vec<SourceCall>,
}

/// What filters, balancing and splits ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// In [0, 1], where it was judged.
    pub reward: Option<f64>,
    /// Why the rollout stopped.
    pub stop: Option<String>,
    /// The task.
    pub task_id: Option<String>,
    /// The family of tasks.
    pub task_kind: Option<String>,
    /// The split that the job named, where it is one of ours.
    pub split: Option<Split>,
    /// The job's labels, and those that people gave.
    pub labels: BTreeMap<String, String>,
    /// Whether somebody said that it is not to be learnt from.
    pub rejected: bool,
    /// Calls of tools that failed.
    pub tool_errors: u32,
    /// Tokens of all prompts and completions, as servers counted.
    pub tokens: u64,
    /// Seconds from the first call to the verdict.
    pub wall_s: f64,
}

/// Token ids of one call of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceCall {
    /// Index of the assistant message that it gave.
    pub message: usize,
    /// The whole prompt; none where nobody knows it, or what came before the call has been changed since.
    pub prompt: Option<Vec<u32>>,
    /// What was sampled. Some servers count the end of the turn to it, some do not.
    pub completion: Vec<u32>,
    /// Whether the model came to the end of its turn.
    pub is_ended: bool,
}

impl Source {
    /// The conversation of a trace. Where it was corrected, its calls are those that no correction touched.
    ///
    /// # Errors
    /// The trace's prompts do not add up.
    pub fn of_trace(trace: &Trace) -> Result<Self, PromptError> {
        let header = &trace.header;
        let mut calls = Vec::new();
        let prompts = prompt_ids(&trace.model_calls)?;
        for (call, prompt) in trace.model_calls.iter().zip(prompts) {
            let completion = call.completion_ids.as_ref();
            if let Some(completion) = completion.filter(|ids| !ids.is_empty()) {
                calls.push(SourceCall {
                    message: call.message,
                    prompt: prompt.filter(|ids| !ids.is_empty()),
                    completion: completion.clone(),
                    is_ended: matches!(call.finish_reason.as_str(), "stop" | "tool_calls"),
                });
            }
        }
        calls.sort_by_key(|call| call.message);
        Ok(Self {
            id: header.id.clone(),
            timestamp: header.started_at_us.to_string(),
            model: header.provenance.model.clone(),
            messages: trace.messages.clone(),
            tools: header.tools.iter().map(|tool| json!(tool)).collect(),
            facts: facts(trace),
            thinking: header.provenance.sampling.thinking,
            keep_hints: None,
            calls,
        })
    }

    /// The call that gave a message.
    pub(crate) fn call_of(&self, message: usize) -> Option<&SourceCall> {
        let at = self
            .calls
            .binary_search_by_key(&message, |call| call.message);
        at.ok().map(|at| &self.calls[at])
    }

    /// What tells one task from another: its name, or what the user asked first.
    pub fn task_key(&self) -> String {
        if let Some(task) = &self.facts.task_id {
            return format!("task:{task}");
        }
        let mut users = self.messages.iter().filter(|m| m.role() == "user");
        let asked = users.next().map_or("", Message::content);
        format!("asked:{}", sha256_hex(asked.trim().as_bytes()))
    }
}

fn facts(trace: &Trace) -> Facts {
    let (header, outcome) = (&trace.header, &trace.outcome);
    let totals = outcome.totals;
    Facts {
        reward: trace.reward(),
        stop: Some(outcome.stop.as_str().to_owned()),
        task_id: header.task.task_id.clone(),
        task_kind: header.task.task_kind.clone(),
        split: header.task.split.as_deref().and_then(Split::named),
        labels: header.labels.clone(),
        rejected: false,
        tool_errors: totals.tool_errors,
        tokens: totals
            .prompt_tokens
            .saturating_add(totals.completion_tokens),
        wall_s: std::time::Duration::from_millis(totals.wall_ms).as_secs_f64(),
    }
}

#[cfg(test)]
mod tests;
