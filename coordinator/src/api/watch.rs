//! `WatchBatch`: the progress of a batch as a stream that ends with it.
//!
//! The stream asks the queue a few times a second instead of listening to every event: a batch ends thousands of
//! jobs a second, and a watcher wants what they add up to. Asking is one read, and it cannot miss anything.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::{BatchId, ProjectId};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use tokio::sync::mpsc;
use tonic::Status;

use super::{Shared, queue_error, view};

/// Time between two looks: what a person sees as at once.
const LOOK_INTERVAL: Duration = Duration::from_millis(150);
/// Most jobs of one event: bounds the work of one look.
const JOBS_MAX: usize = 500;
/// How long a client may take to read one event before the stream is given up; it can take it up again.
const SEND_LIMIT: Duration = Duration::from_secs(60);
/// Events that wait for a slow client; the next look waits for room.
pub const EVENTS_MAX: usize = 4;

/// One watcher.
pub struct Watch {
    pub shared: Arc<Shared>,
    pub project: ProjectId,
    pub batch: BatchId,
    pub cursor: u64,
    pub events: mpsc::Sender<Result<v1::BatchEvent, Status>>,
}

impl Watch {
    /// Sends events until the batch is complete, the client goes, or the coordinator drains.
    pub async fn run(mut self) {
        let mut last_sent = None;
        loop {
            let (event, more) = match self.look().await {
                Ok(seen) => seen,
                Err(error) => {
                    self.send(Err(error.into())).await;
                    return;
                }
            };
            let complete = event.batch.as_ref().is_some_and(|batch| batch.complete);
            if last_sent.as_ref() != Some(&event) {
                let mut seen = event.clone();
                seen.ended.clear();
                last_sent = Some(seen);
                if !self.send(Ok(event)).await {
                    return;
                }
            }
            if more {
                continue;
            }
            if complete || !self.pause().await {
                return;
            }
        }
    }

    /// False: the client has gone, or does not read.
    async fn send(&self, event: Result<v1::BatchEvent, Status>) -> bool {
        let sent = with_deadline("api.watch", SEND_LIMIT, self.events.send(event)).await;
        matches!(sent, Ok(Ok(())))
    }

    /// What has ended since the cursor, the batch at that moment, and whether there is more.
    async fn look(&mut self) -> Result<(v1::BatchEvent, bool), ApiError> {
        let (project, batch) = (self.project.clone(), self.batch.clone());
        let queue = &self.shared.queue;
        let page = queue.ended_after(project, batch, self.cursor, JOBS_MAX);
        let page = page.await.map_err(queue_error)?;
        let (cursors, jobs): (Vec<u64>, Vec<_>) = page.jobs.into_iter().unzip();
        let ended = view::fitting(jobs);
        let more = cursors.len() == JOBS_MAX || ended.len() < cursors.len();
        let last = ended.len().checked_sub(1).map(|last| cursors[last]);
        self.cursor = last.unwrap_or(self.cursor);
        let now = self.shared.now();
        let event = v1::BatchEvent {
            batch: Some(view::batch(&page.batch)),
            ended,
            cursor: self.cursor,
            open_questions: self.shared.questions.count(&self.project, &self.batch, now),
        };
        Ok((event, more))
    }

    /// Waits until it is time to look again; false: nobody watches any more, or this coordinator ends.
    async fn pause(&self) -> bool {
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => true,
            () = self.events.closed() => false,
            () = self.shared.shutdown.draining() => {
                let gone = ApiError::Unavailable(
                    "the coordinator is shutting down; watch again with `after_cursor`".to_owned(),
                );
                let _ = self.events.try_send(Err(gone.into()));
                false
            }
        }
    }
}
