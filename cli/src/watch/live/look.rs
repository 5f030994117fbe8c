//! One look at the system: the queue, the batches in progress, the open questions and the workers of all coordinators.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_core::id::PipelineName;
use espalier_core::pipeline::{Step, step_of_batch};
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;
use serde_json::{Value, json};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::rates::Rates;
use crate::client::Client;
use crate::output::total;
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
    /// Dollars that an hour of these workers costs; none where the coordinator has no prices.
    pub dollars_per_hour: Option<f64>,
}

/// Looks.
pub async fn take(client: &Client) -> Result<Look, Status> {
    // Boxed: three calls at once are much to carry around.
    let asked = Box::pin(ask(client));
    match with_deadline("watch.look", LIMIT, asked).await {
        Ok(looked) => looked,
        Err(timeout) => Err(Status::unavailable(timeout.to_string())),
    }
}

async fn ask(client: &Client) -> Result<Look, Status> {
    let request = v1::GetQueuesRequest {
        batches_max: BATCHES_MAX,
    };
    let (mut of_queues, mut of_info) = (client.admin(), client.admin());
    let (queues, sessions, info) = tokio::join!(
        of_queues.get_queues(request),
        admin::sessions(client),
        of_info.get_info(v1::GetInfoRequest {}),
    );
    let queues = queues?.into_inner();
    let (sessions, now_us) = shown(sessions)?.unwrap_or_default();
    let info = shown(info)?.map(tonic::Response::into_inner);
    let prices = info.as_ref().map(|info| &info.worker_prices);
    let prices = prices.filter(|prices| !prices.is_empty());
    let dollars_per_hour = prices.map(|prices| per_hour(&sessions, prices));
    let workers = info.is_some().then(|| admin::as_workers(sessions));
    Ok(Look {
        at: Instant::now(),
        now_us,
        queues: queues.by_kind,
        batches: queues.batches,
        open_questions: queues.open_questions,
        workers,
        dollars_per_hour,
    })
}

/// None: that is shown to tokens for all projects alone.
fn shown<T>(answer: Result<T, Status>) -> Result<Option<T>, Status> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(status) if status.code() == Code::PermissionDenied => Ok(None),
        Err(status) => Err(status),
    }
}

/// What an hour of these sessions costs: each as the dearest of its kinds.
fn per_hour(sessions: &[v1::Worker], prices: &BTreeMap<String, f64>) -> f64 {
    let of_session = |session: &v1::Worker| {
        let kinds = session.kinds().map(json::kind);
        let prices = kinds.filter_map(|kind| prices.get(kind).copied());
        prices.fold(0.0, f64::max)
    };
    total(sessions.iter().map(of_session))
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
        let pipeline = |(pipeline, step, at): (PipelineName, Step, &v1::Batch)| {
            let mut value = batch(at);
            value["pipeline"] = json!(pipeline);
            value["step"] = json!(step);
            value
        };
        let model = |served: &Served| json!({"model": served.model, "workers": served.workers, "urls": served.urls});
        let workers = self.workers.as_ref();
        json!({
            "queues": self.queues.iter().map(queue).collect::<Vec<_>>(),
            "batches": self.batches.iter().map(batch).collect::<Vec<_>>(),
            "workers": workers.map(|all| all.iter().map(worker).collect::<Vec<_>>()),
            "pipelines": pipelines(&self.batches).map(pipeline).collect::<Vec<_>>(),
            "models": models(self.workers.iter().flatten()).iter().map(model).collect::<Vec<_>>(),
            "dollars_per_hour": self.dollars_per_hour,
            "open_questions": self.open_questions,
            "grants_per_s": rates.grants,
            "ends_per_s": rates.ends,
        })
    }
}

/// Those of the batches that are steps of pipelines.
pub fn pipelines(batches: &[v1::Batch]) -> impl Iterator<Item = (PipelineName, Step, &v1::Batch)> {
    batches.iter().filter_map(|batch| {
        let (pipeline, step) = step_of_batch(&batch.batch)?;
        Some((pipeline, step, batch))
    })
}

/// A model, and who serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Its name.
    pub model: String,
    /// Workers that serve it.
    pub workers: usize,
    /// Where, in their order.
    pub urls: Vec<String>,
    /// Jobs that these workers run.
    pub running: u32,
}

/// The models that workers serve, by name.
pub fn models<'a>(workers: impl Iterator<Item = &'a v1::Worker>) -> Vec<Served> {
    let mut found: BTreeMap<&str, Served> = BTreeMap::new();
    for (worker, serving) in workers.filter_map(|worker| Some((worker, worker.serving.as_ref()?))) {
        for model in &serving.models {
            let served = found.entry(model).or_insert_with(|| Served {
                model: model.clone(),
                workers: 0,
                urls: Vec::new(),
                running: 0,
            });
            served.workers += 1;
            served.urls.push(serving.url.clone());
            served.running += worker.running;
        }
    }
    found.into_values().collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(models: &[&str]) -> v1::Worker {
        v1::Worker {
            serving: Some(v1::Serving {
                url: "http://10.0.0.7:8000/v1".to_owned(),
                models: models.iter().map(|model| (*model).to_owned()).collect(),
                ..v1::Serving::default()
            }),
            running: 2,
            ..v1::Worker::default()
        }
    }

    #[test]
    fn models_are_told_with_all_who_serve_them() {
        let workers = [serving(&["b", "a"]), v1::Worker::default(), serving(&["b"])];
        let found = models(workers.iter());
        let told: Vec<(&str, usize, u32)> = found
            .iter()
            .map(|served| (&*served.model, served.workers, served.running))
            .collect();
        assert_eq!(told, [("a", 1, 2), ("b", 2, 4)]);
        assert_eq!(found[1].urls.len(), 2);
    }

    #[test]
    fn an_hour_costs_each_session_once() {
        let session = |kinds: &[v1::JobKind]| v1::Worker {
            kinds: kinds.iter().map(|kind| (*kind).into()).collect(),
            ..v1::Worker::default()
        };
        let sessions = [
            session(&[v1::JobKind::Rollout]),
            session(&[v1::JobKind::Curate]),
            session(&[v1::JobKind::Train, v1::JobKind::Rollout]),
        ];
        let prices = [("rollout".to_owned(), 0.5), ("train".to_owned(), 2.0)].into();
        assert_eq!(per_hour(&sessions, &prices), 2.5);
    }
}
