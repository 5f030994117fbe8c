//! `espalier workers`, `queues` and `drain`: looking after the system.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

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
    /// The worker, from `espalier workers`
    #[arg(value_name = "WORKER")]
    pub worker: String,
}

/// `espalier workers`.
pub async fn workers(context: &Context) -> Outcome {
    let client = context.operator().await?;
    let (sessions, _) = sessions(&client).await?;
    let workers = by_process(sessions);
    context.out.show(
        || json!({"workers": workers.iter().map(with_sessions).collect::<Vec<_>>()}),
        || workers_table(workers.iter().map(|(worker, _)| worker)),
    )?;
    Ok(Exit::Ok)
}

/// Sessions as workers, by id.
pub fn as_workers(sessions: Vec<v1::Worker>) -> Vec<v1::Worker> {
    let workers = by_process(sessions).into_iter();
    workers.map(|(worker, _)| worker).collect()
}

/// The sessions of all workers of all coordinators, of which one that takes several kinds of jobs may have one for each;
/// and the moment by the clock that their times are of.
pub async fn sessions(client: &Client) -> Result<(Vec<v1::Worker>, u64), Status> {
    let mut request = v1::ListWorkersRequest {
        page_size: PAGE_SIZE,
        page_token: String::new(),
    };
    let mut sessions = Vec::new();
    loop {
        let page = client.admin().list_workers(request.clone()).await?;
        let page = page.into_inner();
        sessions.extend(page.workers);
        if page.next_page_token.is_empty() {
            return Ok((sessions, page.now_us));
        }
        request.page_token = page.next_page_token;
    }
}

/// Each process as one worker, by its id, with its sessions.
fn by_process(sessions: Vec<v1::Worker>) -> Vec<(v1::Worker, Vec<v1::Worker>)> {
    let mut found: BTreeMap<String, Vec<v1::Worker>> = BTreeMap::new();
    for session in sessions {
        found.entry(process(&session)).or_default().push(session);
    }
    let joined = found.into_iter().map(|(process, mut sessions)| {
        // What it does most comes first.
        sessions.sort_by_key(|session| Reverse(session.capacity));
        (joined(process, &sessions), sessions)
    });
    joined.collect()
}

/// A coordinator of an older version says nothing of processes.
fn process(session: &v1::Worker) -> String {
    match session.process.is_empty() {
        true => session.worker.clone(),
        false => session.process.clone(),
    }
}

/// What sessions of one process are together.
fn joined(process: String, sessions: &[v1::Worker]) -> v1::Worker {
    let first = sessions.first().cloned().unwrap_or_default();
    let tags: BTreeSet<&String> = sessions.iter().flat_map(|session| &session.tags).collect();
    let mut kinds = Vec::new();
    for kind in sessions.iter().flat_map(|session| &session.kinds) {
        if !kinds.contains(kind) {
            kinds.push(*kind);
        }
    }
    let since = sessions.iter().map(|session| session.connected_at_us).max();
    let heard = sessions.iter().map(|session| session.last_seen_us).max();
    v1::Worker {
        worker: process.clone(),
        process,
        tags: tags.into_iter().cloned().collect(),
        kinds,
        capacity: sessions.iter().map(|session| session.capacity).sum(),
        running: sessions.iter().map(|session| session.running).sum(),
        granted: sessions.iter().map(|session| session.granted).sum(),
        draining: sessions.iter().all(|session| session.draining),
        // Counts begin anew with the session that came last.
        connected_at_us: since.unwrap_or_default(),
        last_seen_us: heard.unwrap_or_default(),
        serving: sessions.iter().find_map(|session| session.serving.clone()),
        ..first
    }
}

fn with_sessions((worker, sessions): &(v1::Worker, Vec<v1::Worker>)) -> Value {
    let mut value = worker_json(worker);
    value["sessions"] = sessions.iter().map(worker_json).collect();
    value
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
        "instance": worker.instance,
        "serving": worker.serving.as_ref().map(|serving| json!({
            "url": serving.url,
            "models": serving.models,
        })),
    })
}

fn workers_table<'a>(workers: impl Iterator<Item = &'a v1::Worker>) -> String {
    let rows = workers.map(|worker| {
        let kinds: Vec<&str> = worker.kinds().map(json::kind).collect();
        [
            worker.worker.clone(),
            kinds.join(" "),
            format!("{} of {}", worker.running, worker.capacity),
            if worker.draining { "draining" } else { "ready" }.to_owned(),
            offers(worker),
            worker.version.clone(),
            Timestamp(worker.connected_at_us).to_string(),
        ]
    });
    table(
        [
            "worker", "kinds", "running", "state", "offers", "version", "since",
        ],
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
    let (sessions, _) = sessions(&client).await?;
    let of_process = sessions.into_iter();
    let of_process = of_process.filter(|session| process(session) == args.worker);
    let mut ids: Vec<String> = of_process.map(|session| session.worker).collect();
    if ids.is_empty() {
        // A session by itself, or none: the coordinator says so.
        ids.push(args.worker.clone());
    }
    for worker in ids {
        let request = v1::DrainWorkerRequest { worker };
        client.admin().drain_worker(request).await?;
    }
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
    fn the_sessions_of_a_process_are_one_worker() {
        let session = |worker: &str, process: &str, kind: v1::JobKind, capacity| v1::Worker {
            worker: worker.to_owned(),
            process: process.to_owned(),
            kinds: vec![kind.into()],
            tags: vec![format!("of-{worker}")],
            capacity,
            running: 1,
            draining: worker != "b",
            connected_at_us: u64::from(capacity),
            ..v1::Worker::default()
        };
        let workers = by_process(vec![
            session("a", "p", v1::JobKind::Curate, 1),
            session("b", "p", v1::JobKind::Rollout, 8),
            session("c", "", v1::JobKind::Train, 2),
        ]);
        let names: Vec<&str> = workers.iter().map(|(worker, _)| &*worker.worker).collect();
        assert_eq!(names, ["c", "p"]);
        let value = with_sessions(&workers[1]);
        assert_eq!(value["kinds"], json!(["rollout", "curate"]));
        assert_eq!(value["tags"], json!(["of-a", "of-b"]));
        assert_eq!(
            (&value["running"], &value["capacity"]),
            (&json!(2), &json!(9))
        );
        assert_eq!(
            (&value["draining"], &value["connected_at_us"]),
            (&json!(false), &json!(8))
        );
        assert_eq!(value["sessions"][1]["worker"], "a");
        let text = workers_table(workers.iter().map(|(worker, _)| worker));
        assert!(text.contains("rollout curate  2 of 9   ready"), "{text}");
    }

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
