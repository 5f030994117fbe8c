//! One look at the system: the queue, the batches in progress, the open questions and the workers of all coordinators.

use std::time::Duration;

use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use serde_json::{Value, json};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::rates::Rates;
use crate::client::Client;
use crate::{admin, json};

/// How long a look may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Batches in progress that are asked for: more than any screen has room for.
const BATCHES_MAX: u32 = 200;

/// What was seen.
#[derive(Clone, Debug)]
pub struct Look {
    /// When, by this process's clock.
    pub at: Instant,
    /// The system's time, microseconds since the epoch; 0 where workers are not shown to us.
    pub now_us: u64,
    /// The queue by project and kind.
    pub queues: Vec<v1::QueueStats>,
    /// Batches in progress, newest first.
    pub batches: Vec<v1::Batch>,
    /// Questions that wait for a person.
    pub open_questions: u32,
    /// The workers, by id; none where the token is of one project, whose holder does not see them.
    pub workers: Option<Vec<v1::Worker>>,
}

/// Looks.
pub async fn take(client: &Client) -> Result<Look, Status> {
    match with_deadline("watch.look", LIMIT, ask(client)).await {
        Ok(looked) => looked,
        Err(timeout) => Err(Status::unavailable(timeout.to_string())),
    }
}

async fn ask(client: &Client) -> Result<Look, Status> {
    let request = v1::GetQueuesRequest {
        batches_max: BATCHES_MAX,
    };
    let queues = client.admin().get_queues(request).await?.into_inner();
    let (workers, now_us) = match admin::all_workers(client).await {
        Ok((workers, now_us)) => (Some(workers), now_us),
        Err(status) if status.code() == Code::PermissionDenied => (None, 0),
        Err(status) => return Err(status),
    };
    Ok(Look {
        at: Instant::now(),
        now_us,
        queues: queues.by_kind,
        batches: queues.batches,
        open_questions: queues.open_questions,
        workers,
    })
}

impl Look {
    /// How many coordinators have workers.
    pub fn coordinators(&self) -> usize {
        let mut ids: Vec<&str> = self
            .workers
            .iter()
            .flatten()
            .map(|worker| worker.coordinator.as_str())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids.len()
    }

    /// How long ago a worker last said something, in milliseconds.
    pub fn silent_ms(&self, worker: &v1::Worker) -> u64 {
        self.now_us.saturating_sub(worker.last_seen_us) / 1_000
    }

    /// For programs. What only two looks can tell is null in the first.
    pub fn to_json(&self, rates: &Rates) -> Value {
        let queue = |queue: &v1::QueueStats| {
            let mut value = admin::queue_json(queue);
            value["kind"] = json!(json::kind(queue.kind()));
            value["ends_per_s"] = json!(rates.ends_of(queue));
            value
        };
        let batch = |batch: &v1::Batch| {
            let mut value = json::batch(batch);
            value["ends_per_s"] = json!(rates.of_batch(batch));
            value["left_s"] = json!(rates.left_s(batch));
            value
        };
        let worker = |worker: &v1::Worker| {
            let mut value = admin::worker_json(worker);
            value["silent_ms"] = json!(self.silent_ms(worker));
            value["grants_per_s"] = json!(rates.of_worker(worker));
            value
        };
        let workers = self.workers.as_ref();
        json!({
            "queues": self.queues.iter().map(queue).collect::<Vec<_>>(),
            "batches": self.batches.iter().map(batch).collect::<Vec<_>>(),
            "workers": workers.map(|all| all.iter().map(worker).collect::<Vec<_>>()),
            "open_questions": self.open_questions,
            "grants_per_s": rates.grants,
            "ends_per_s": rates.ends,
        })
    }
}

/// Jobs of a batch that have ended.
pub fn done(batch: &v1::Batch) -> u64 {
    let counts = batch.counts.unwrap_or_default();
    counts.succeeded + counts.dead + counts.cancelled
}

/// Jobs of a batch that have not.
pub fn open(batch: &v1::Batch) -> u64 {
    let counts = batch.counts.unwrap_or_default();
    counts.blocked + counts.delayed + counts.ready + counts.leased
}
