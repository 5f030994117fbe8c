//! `WatchBatch`: the progress of a batch as a stream that ends with it.
//!
//! The stream asks the queue a few times a second instead of listening to every event: a batch ends thousands of
//! jobs a second, and a watcher wants what they add up to. Asking is one read, and it cannot miss anything. How many
//! streams ask at once is bounded by token: whoever opens streams and forgets them keeps nobody else from watching.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::{BatchId, ProjectId};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Status;

use super::{Shared, page, queue_error, view};

/// Time between two looks: what a person sees as at once.
const LOOK_INTERVAL: Duration = Duration::from_millis(150);
/// Most jobs of one event: bounds the work of one look.
const JOBS_MAX: usize = 500;
/// How long a client may take to read one event before the stream is given up; it can take it up again.
const SEND_LIMIT: Duration = Duration::from_secs(60);
/// Events that wait for a slow client; the next look waits for room. One place is kept for the end.
pub const EVENTS_MAX: usize = 4;

/// Places for watchers: some for each token.
#[derive(Debug)]
pub struct Places {
    of_each: u32,
    by_token: BTreeMap<String, Arc<Semaphore>>,
}

impl Places {
    /// `of_each` places for each of the tokens with these names.
    pub fn new(tokens: impl IntoIterator<Item = String>, of_each: u32) -> Self {
        let places = || Arc::new(Semaphore::new(of_each as usize));
        Self {
            of_each,
            by_token: tokens.into_iter().map(|name| (name, places())).collect(),
        }
    }

    /// A place of the token, which is free again when the answer is dropped.
    pub fn take(&self, token: &str) -> Result<OwnedSemaphorePermit, ApiError> {
        let free = self.by_token.get(token).cloned();
        let taken = free.and_then(|free| free.try_acquire_owned().ok());
        taken.ok_or_else(|| {
            ApiError::Exhausted(format!(
                "token `{token}` watches {} batches already, which is the most (`watches_max`); end a watch, or look \
                 now and then with GetBatch",
                self.of_each
            ))
        })
    }
}

/// One watcher.
pub(super) struct Watch {
    pub(super) shared: Arc<Shared>,
    pub(super) project: ProjectId,
    pub(super) batch: BatchId,
    pub(super) cursor: u64,
    pub(super) events: mpsc::Sender<Result<v1::BatchEvent, Status>>,
}

impl Watch {
    /// Sends events until the batch is complete, the client goes, or the coordinator drains; then the place is free.
    pub async fn run(mut self, place: OwnedSemaphorePermit) {
        let events = self.events.clone();
        end_with_error(events, self.send_events()).await;
        drop(place);
    }

    async fn send_events(&mut self) -> Result<(), ApiError> {
        let mut last_sent = None;
        loop {
            let (event, more) = self.look().await?;
            let complete = event.batch.as_ref().is_some_and(|batch| batch.complete);
            if last_sent.as_ref() != Some(&event) {
                let mut seen = event.clone();
                seen.ended.clear();
                last_sent = Some(seen);
                if !send(&self.events, SEND_LIMIT, event).await? {
                    return Ok(());
                }
            }
            if more {
                continue;
            }
            if complete || !self.pause().await? {
                return Ok(());
            }
        }
    }

    /// What has ended since the cursor, the batch at that moment, and whether there is more.
    async fn look(&mut self) -> Result<(v1::BatchEvent, bool), ApiError> {
        let (project, batch) = (self.project.clone(), self.batch.clone());
        let queue = &self.shared.queue;
        let page = queue.ended_after(project, batch, self.cursor, JOBS_MAX);
        let page = page.await.map_err(queue_error)?;
        let (cursors, jobs): (Vec<u64>, Vec<_>) = page.jobs.into_iter().unzip();
        let ended = page::fitting(jobs.into_iter().map(view::job));
        let more = cursors.len() == JOBS_MAX || ended.len() < cursors.len();
        let last = ended.len().checked_sub(1).map(|last| cursors[last]);
        self.cursor = last.unwrap_or(self.cursor);
        let now = self.shared.now();
        let open_questions =
            super::questions::count(&self.shared, &self.project, &self.batch, now).await?;
        let event = v1::BatchEvent {
            batch: Some(view::batch(&page.batch)),
            ended,
            cursor: self.cursor,
            open_questions,
        };
        Ok((event, more))
    }

    /// Waits until it is time to look again; false: nobody watches any more. That this coordinator ends is an error.
    async fn pause(&self) -> Result<bool, ApiError> {
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => Ok(true),
            () = self.events.closed() => Ok(false),
            () = self.shared.shutdown.draining() => Err(ApiError::Unavailable(
                "the coordinator is shutting down; watch again with `after_cursor`".to_owned(),
            )),
        }
    }
}

/// A stream of events.
type Events = mpsc::Sender<Result<v1::BatchEvent, Status>>;

/// Runs what fills a stream, and ends the stream with its error. The place for that is kept from the beginning: a
/// stream that breaks off must not look like one whose batch is complete.
async fn end_with_error(events: Events, fill: impl Future<Output = Result<(), ApiError>>) {
    let Ok(last) = events.try_reserve_owned() else {
        return;
    };
    if let Err(error) = fill.await {
        last.send(Err(error.into()));
    }
}

/// False: the client has gone. One that does not read is an error.
async fn send(events: &Events, limit: Duration, event: v1::BatchEvent) -> Result<bool, ApiError> {
    let sent = with_deadline("api.watch", limit, events.send(Ok(event))).await;
    let sent = sent.map_err(|_| {
        ApiError::Unavailable(
            "the events were not read in time; watch again with `after_cursor`".to_owned(),
        )
    })?;
    Ok(sent.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_does_not_read_gets_an_error_and_no_silent_end() {
        let (events, mut received) = mpsc::channel(EVENTS_MAX);
        let fill = async {
            let limit = Duration::from_millis(1);
            while send(&events, limit, v1::BatchEvent::default()).await? {}
            Ok(())
        };
        end_with_error(events.clone(), fill).await;
        drop(events);
        let mut last = None;
        while let Some(event) = received.recv().await {
            last = Some(event);
        }
        assert_eq!(last.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
    }
}
