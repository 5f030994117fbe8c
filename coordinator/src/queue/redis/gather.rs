//! Many small requests become few large ones: what arrives while one call is on its way goes together in the next.
//! Nobody waits for a timer, so that a lone request goes at once.

use std::future::Future;

use espalier_runtime::tasks::{OnFailure, Tasks};
use tokio::sync::{mpsc, oneshot};

use crate::queue::QueueError;

/// Requests that wait; a full channel makes callers wait, which is the back pressure that they pass on.
const WAITING_MAX: usize = 1_024;
/// Items of one call: bounds how long a script holds the server.
pub const ITEMS_MAX: usize = 1_000;

type Answer<O> = oneshot::Sender<Result<Vec<O>, QueueError>>;

/// The way to a call that takes many items and answers each.
#[derive(Debug)]
pub struct Gather<I, O> {
    requests: mpsc::Sender<(Vec<I>, Answer<O>)>,
}

impl<I: Send + 'static, O: Send + 'static> Gather<I, O> {
    /// Starts the task that makes the calls.
    pub fn start<F>(
        tasks: &Tasks,
        name: &'static str,
        call: impl Fn(Vec<I>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<Vec<O>, QueueError>> + Send,
    {
        let (requests, mut waiting) = mpsc::channel::<(Vec<I>, Answer<O>)>(WAITING_MAX);
        tasks.spawn_apart(name, OnFailure::ShutDown, async move {
            while let Some(first) = waiting.recv().await {
                let mut together = Together::of(first);
                while together.items.len() < ITEMS_MAX
                    && let Ok(next) = waiting.try_recv()
                {
                    together.add(next);
                }
                let Together { items, askers } = together;
                answer(call(items).await, askers);
            }
        });
        Self { requests }
    }

    /// Asks; the answers are in the order of `items`. At most [`ITEMS_MAX`] items.
    pub async fn ask(&self, items: Vec<I>) -> Result<Vec<O>, QueueError> {
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.send((items, answer)).await;
        sent.map_err(|_| QueueError::Closed)?;
        answered.await.unwrap_or(Err(QueueError::Closed))
    }
}

/// What goes in one call, and how much of it is whose.
struct Together<I, O> {
    items: Vec<I>,
    askers: Vec<(usize, Answer<O>)>,
}

impl<I, O> Together<I, O> {
    fn of((items, asker): (Vec<I>, Answer<O>)) -> Self {
        let askers = vec![(items.len(), asker)];
        Self { items, askers }
    }

    fn add(&mut self, (items, asker): (Vec<I>, Answer<O>)) {
        self.askers.push((items.len(), asker));
        self.items.extend(items);
    }
}

/// Gives each asker its part. One that has gone needs none.
fn answer<O>(answered: Result<Vec<O>, QueueError>, askers: Vec<(usize, Answer<O>)>) {
    match answered {
        Ok(answers) => {
            let mut answers = answers.into_iter();
            for (n, asker) in askers {
                let _ = asker.send(Ok(answers.by_ref().take(n).collect()));
            }
        }
        Err(error) => {
            for (_, asker) in askers {
                let _ = asker.send(Err(error.clone()));
            }
        }
    }
}
