//! `espalier workers`, `queues` and `drain`: looking after the system.

use clap::Args;
use espalier_core::time::Timestamp;
use espalier_proto::v1;
use serde_json::{Value, json};
use tonic::Status;

use crate::client::Client;
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::json;
use crate::output::{count, duration, table};

/// Workers that one request asks for: the API's limit.
const PAGE_SIZE: u32 = 1000;

/// Options of `drain`.
#[derive(Args, Clone, Debug)]
pub struct Drain {
    /// The worker's id, from `espalier workers`
    #[arg(value_name = "WORKER")]
    pub worker: String,
}

/// `espalier workers`.
pub async fn workers(context: &Context) -> Outcome {
    let client = context.operator().await?;
    let (workers, _) = all_workers(&client).await?;
    context.out.show(
        || json!({"workers": workers.iter().map(worker_json).collect::<Vec<_>>()}),
        || workers_table(&workers),
    )?;
    Ok(Exit::Ok)
}

/// The workers of all coordinators by id, and the moment by the clock that their times are of.
pub async fn all_workers(client: &Client) -> Result<(Vec<v1::Worker>, u64), Status> {
    let mut request = v1::ListWorkersRequest {
        page_size: PAGE_SIZE,
        page_token: String::new(),
    };
    let mut workers = Vec::new();
    loop {
        let page = client.admin().list_workers(request.clone()).await?;
        let page = page.into_inner();
        workers.extend(page.workers);
        if page.next_page_token.is_empty() {
            return Ok((workers, page.now_us));
        }
        request.page_token = page.next_page_token;
    }
}

/// A worker for programs.
pub fn worker_json(worker: &v1::Worker) -> Value {
    json!({
        "worker": worker.worker,
        "tags": worker.tags,
        "capacity": worker.capacity,
        "running": worker.running,
        "draining": worker.draining,
        "connected_at_us": worker.connected_at_us,
        "version": worker.version,
        "kinds": worker.kinds().map(json::kind).collect::<Vec<_>>(),
        "coordinator": worker.coordinator,
        "last_seen_us": worker.last_seen_us,
        "granted": worker.granted,
        "serving": worker.serving.as_ref().map(|serving| json!({
            "url": serving.url,
            "models": serving.models,
        })),
    })
}

fn workers_table(workers: &[v1::Worker]) -> String {
    let rows = workers.iter().map(|worker| {
        [
            worker.worker.clone(),
            format!("{} of {}", worker.running, worker.capacity),
            if worker.draining { "draining" } else { "ready" }.to_owned(),
            offers(worker),
            worker.version.clone(),
            Timestamp(worker.connected_at_us).to_string(),
        ]
    });
    table(
        ["worker", "running", "state", "offers", "version", "since"],
        rows.collect(),
    )
}

/// Its tags, and the models that it serves.
fn offers(worker: &v1::Worker) -> String {
    let models = worker.serving.iter().flat_map(|serving| &serving.models);
    let models = models.map(|model| format!("model:{model}"));
    let offers: Vec<String> = worker.tags.iter().cloned().chain(models).collect();
    offers.join(" ")
}

/// `espalier queues`.
pub async fn queues(context: &Context) -> Outcome {
    let client = context.operator().await?;
    let request = v1::GetQueuesRequest::default();
    let queues = client
        .admin()
        .get_queues(request)
        .await?
        .into_inner()
        .queues;
    context.out.show(
        || json!({"queues": queues.iter().map(queue_json).collect::<Vec<_>>()}),
        || queues_table(&queues),
    )?;
    Ok(Exit::Ok)
}

/// A project's queue for programs.
pub fn queue_json(queue: &v1::QueueStats) -> Value {
    json!({
        "project": queue.project,
        "blocked": queue.blocked,
        "delayed": queue.delayed,
        "ready": queue.ready,
        "leased": queue.leased,
        "succeeded": queue.succeeded,
        "dead": queue.dead,
        "cancelled": queue.cancelled,
        "oldest_ready_ms": queue.oldest_ready_ms,
    })
}

fn queues_table(queues: &[v1::QueueStats]) -> String {
    let rows = queues.iter().map(|queue| {
        let oldest = match queue.oldest_ready_ms {
            0 => "-".to_owned(),
            ms => duration(ms),
        };
        [
            queue.project.clone(),
            count(queue.ready),
            count(queue.leased),
            count(queue.delayed),
            count(queue.blocked),
            count(queue.dead),
            oldest,
        ]
    });
    let header = [
        "project",
        "ready",
        "running",
        "delayed",
        "blocked",
        "dead",
        "oldest waits",
    ];
    table(header, rows.collect())
}

/// `espalier drain`.
pub async fn drain(context: &Context, args: &Drain) -> Outcome {
    let client = context.operator().await?;
    let request = v1::DrainWorkerRequest {
        worker: args.worker.clone(),
    };
    client.admin().drain_worker(request).await?;
    context.out.show(
        || json!({"worker": args.worker, "draining": true}),
        || format!("{} finishes what it has and takes no more", args.worker),
    )?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_queues() {
        let queue = v1::QueueStats {
            project: "default".to_owned(),
            ready: 1200,
            leased: 8,
            oldest_ready_ms: 1500,
            ..Default::default()
        };
        let expected = " PROJECT  READY  RUNNING  DELAYED  BLOCKED  DEAD  OLDEST WAITS\n default  1,200  8        0        0        0     1.5 s";
        assert_eq!(queues_table(&[queue]), expected);
    }
}
