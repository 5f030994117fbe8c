//! Waiting for jobs that a command submitted: a bar on a terminal, a line now and then where there is none, an event at each
//! change for programs.

use std::time::{Duration, Instant};

use espalier_core::id::JobKey;
use espalier_proto::v1;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::client::Client;
use crate::context::Context;
use crate::exit::Problem;
use crate::json::state;
use crate::output::{note, plain};
use crate::submit::again;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often a line is printed where there is no terminal for a bar.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What one look shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// Whether nothing more is waited for.
    pub is_over: bool,
    /// How far it is, and of how much that is, as far as it is known.
    pub place: Option<(u64, Option<u64>)>,
    /// Beside the bar.
    pub message: String,
    /// In place of the bar. What differs from the look before is news.
    pub line: String,
    /// News for programs.
    pub event: Option<Value>,
}

/// Looks until it is over, and gives the last look.
pub async fn wait<T, F>(
    context: &Context,
    bar: ProgressBar,
    look: impl Fn() -> F,
    shown: impl Fn(&T) -> Shown,
) -> Result<T, Problem>
where
    F: Future<Output = Result<T, Problem>>,
{
    let (mut said, mut told) = (Instant::now(), String::new());
    loop {
        let seen = look().await?;
        let now = shown(&seen);
        if let Some((at, of)) = now.place {
            bar.set_position(at);
            of.into_iter().for_each(|of| bar.set_length(of));
        }
        if now.is_over {
            bar.finish_and_clear();
            return Ok(seen);
        }
        bar.set_message(now.message);
        let is_news = now.line != told && !now.line.is_empty();
        match (&now.event, context.out.json) {
            (Some(event), true) if is_news => {
                context.out.event(event)?;
                told = now.line;
            }
            (_, false) if is_news && bar.is_hidden() && said.elapsed() >= LINE_EVERY => {
                said = Instant::now();
                note(&now.line);
                told = now.line;
            }
            _ => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A job, as it is now.
pub async fn job(client: &Client, key: &JobKey) -> Result<v1::Job, Problem> {
    let request = v1::GetJobRequest {
        batch: key.batch.to_string(),
        id: key.job.to_string(),
    };
    again(client, || {
        let (mut jobs, request) = (client.jobs(), request.clone());
        async move { jobs.get_job(request).await }
    })
    .await
}

/// Whether a job is over, however it ended.
pub fn has_ended(job: &v1::Job) -> bool {
    use v1::JobState::{Cancelled, Dead, Succeeded};
    matches!(job.state(), Succeeded | Dead | Cancelled)
}

/// What is shown of a job in the words of its worker.
pub fn in_words(job: &v1::Job) -> Shown {
    let state = state(job.state());
    let message = match job.state() {
        v1::JobState::Leased => plain(&job.progress),
        _ => format!("{state}: waits for a worker"),
    };
    Shown {
        is_over: has_ended(job),
        place: None,
        message,
        line: plain(&job.progress),
        event: Some(json!({"state": state, "progress": job.progress})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_shown_in_its_workers_words_once_it_has_one() {
        let job = |state: v1::JobState| v1::Job {
            state: state.into(),
            progress: "reading".to_owned(),
            ..v1::Job::default()
        };
        let shown = in_words(&job(v1::JobState::Leased));
        assert_eq!((shown.message.as_str(), shown.is_over), ("reading", false));
        let shown = in_words(&job(v1::JobState::Ready));
        assert_eq!(shown.message, "ready: waits for a worker");
        assert!(in_words(&job(v1::JobState::Dead)).is_over);
    }
}
