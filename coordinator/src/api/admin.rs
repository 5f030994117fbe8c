//! `AdminService`: the queue in numbers, the connected workers, and what this coordinator is.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_core::error::FieldError;
use espalier_core::id::{ProjectId, WorkerId};
use espalier_core::queue::{StatLine, StateName};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use tonic::{Request, Response, Status};

use super::page::{self, List};
use super::{Shared, queue_error, view};
use crate::auth::Call;
use crate::peers::{self, Order};

/// Most projects of which one answer tells the batches.
const PROJECTS_MAX: usize = 100;
/// How many of a project's newest batches are looked at for those that are in progress.
const NEWEST_MAX: usize = 100;
/// Most batches of one answer.
const BATCHES_MAX: u32 = 1_000;

/// The service.
#[derive(Clone)]
pub struct AdminApi(pub Arc<Shared>);

#[tonic::async_trait]
impl v1::admin_service_server::AdminService for AdminApi {
    async fn get_queues(
        &self,
        request: Request<v1::GetQueuesRequest>,
    ) -> Result<Response<v1::GetQueuesResponse>, Status> {
        let token = self.0.auth.admit(request.metadata(), Call::GetQueues)?;
        let mut stats = self.0.queue.stats().await.map_err(queue_error)?;
        stats
            .lines
            .retain(|line| token.project.covers(&line.project));
        let (batches, open_questions) = match request.get_ref().batches_max {
            0 => (Vec::new(), 0),
            max @ 1..=BATCHES_MAX => self.in_progress(&stats.lines, max as usize).await?,
            max => {
                let rule = format!("must be at most {BATCHES_MAX}");
                let refused = FieldError::new("batches_max", max, rule);
                return Err(ApiError::Field(refused).into());
            }
        };
        Ok(Response::new(v1::GetQueuesResponse {
            queues: by_project(&stats.lines),
            by_kind: stats.lines.iter().map(numbers).collect(),
            batches,
            open_questions,
        }))
    }

    async fn list_workers(
        &self,
        request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        self.0
            .auth
            .everything(request.metadata(), Call::ListWorkers)?;
        let workers = self.0.workers().await.map_err(queue_error)?;
        let mut page = page_of_workers(workers, request.get_ref())?;
        page.now_us = self.0.now().0;
        Ok(Response::new(page))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        self.0
            .auth
            .everything(request.metadata(), Call::DrainWorker)?;
        let worker = WorkerId::new(&request.get_ref().worker).map_err(ApiError::Field)?;
        let at_another = self.0.peers.workers().await.map_err(queue_error)?;
        let known =
            self.0.registry.find(&worker).is_some() || at_another.contains_key(worker.as_str());
        if !known {
            let (what, name) = ("worker", worker.to_string());
            return Err(ApiError::NotFound { what, name }.into());
        }
        peers::give(&self.0, &Order::Drain { worker }).await?;
        Ok(Response::new(v1::DrainWorkerResponse {}))
    }

    async fn get_info(
        &self,
        request: Request<v1::GetInfoRequest>,
    ) -> Result<Response<v1::Info>, Status> {
        self.0.auth.everything(request.metadata(), Call::GetInfo)?;
        let mcp_servers = self.0.mcp_servers().await.map_err(queue_error)?;
        let worker_prices = self.0.config.prices.workers.iter();
        let worker_prices = worker_prices.map(|(kind, price)| (kind.to_string(), *price));
        Ok(Response::new(v1::Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_url: self.0.store.url().to_owned(),
            queue: if self.0.config.is_embedded() {
                "embedded"
            } else {
                "redis"
            }
            .to_owned(),
            mcp_servers: mcp_servers.into_iter().collect(),
            worker_prices: worker_prices.collect(),
        }))
    }
}

impl AdminApi {
    /// Batches that are not complete, newest first, and how many questions are open, of the projects that have most to
    /// do: each costs a call of the queue.
    async fn in_progress(
        &self,
        lines: &[StatLine],
        max: usize,
    ) -> Result<(Vec<v1::Batch>, u32), ApiError> {
        let others = self.0.peers.questions().await.map_err(queue_error)?;
        let (mut batches, mut questions) = (Vec::new(), 0);
        for project in busiest(lines) {
            let newest = self
                .0
                .queue
                .batches_newest(project.clone(), None, NEWEST_MAX);
            let newest = newest.await.map_err(queue_error)?;
            let open = newest.iter().filter(|batch| batch.completed_at.is_none());
            batches.extend(open.map(view::batch));
            let count = &self.0.questions;
            questions += count.count(&others, &project, None, self.0.now());
        }
        batches.sort_by_key(|batch| std::cmp::Reverse(batch.created_at_us));
        Ok((page::fitting(batches.into_iter().take(max)), questions))
    }
}

/// The projects with the most jobs that have not ended, at most [`PROJECTS_MAX`].
fn busiest(lines: &[StatLine]) -> Vec<ProjectId> {
    let mut left: BTreeMap<&ProjectId, u64> = BTreeMap::new();
    for line in lines {
        *left.entry(&line.project).or_default() += line.counters.active();
    }
    let mut projects: Vec<_> = left.into_iter().collect();
    projects.sort_by_key(|(_, open)| std::cmp::Reverse(*open));
    let first = projects.into_iter().take(PROJECTS_MAX);
    first.map(|(project, _)| project.clone()).collect()
}

/// The page of `all`, which are ordered by id, that a request asks for.
fn page_of_workers(
    all: Vec<v1::Worker>,
    request: &v1::ListWorkersRequest,
) -> Result<v1::ListWorkersResponse, ApiError> {
    let size = page::size(request.page_size)?;
    let list = List::of("ListWorkers");
    let after = list.after(&request.page_token)?;
    let first = after.map_or(0, |after| {
        all.partition_point(|w| w.worker.as_str() <= after)
    });
    let left = all.len() - first;
    let workers = page::fitting(all.into_iter().skip(first).take(size));
    let last = workers.last().filter(|_| workers.len() < left);
    Ok(v1::ListWorkersResponse {
        next_page_token: last.map(|w| list.token(&w.worker)).unwrap_or_default(),
        workers,
        now_us: 0,
    })
}

/// A line of the queue, as clients see it.
fn numbers(line: &StatLine) -> v1::QueueStats {
    let oldest = line.oldest_ready.unwrap_or_default().as_millis();
    v1::QueueStats {
        project: line.project.to_string(),
        kind: view::kind(line.kind).into(),
        blocked: line.counters.get(StateName::Blocked),
        delayed: line.counters.get(StateName::Delayed),
        ready: line.counters.get(StateName::Ready),
        leased: line.counters.get(StateName::Leased),
        succeeded: line.counters.get(StateName::Succeeded),
        dead: line.counters.get(StateName::Dead),
        cancelled: line.counters.get(StateName::Cancelled),
        oldest_ready_ms: u64::try_from(oldest).unwrap_or(u64::MAX),
    }
}

/// Sums the lines of each project's kinds.
fn by_project(lines: &[StatLine]) -> Vec<v1::QueueStats> {
    let mut queues: BTreeMap<&str, v1::QueueStats> = BTreeMap::new();
    for line in lines {
        let (sum, more) = (
            queues.entry(line.project.as_str()).or_default(),
            numbers(line),
        );
        sum.project = more.project;
        sum.blocked += more.blocked;
        sum.delayed += more.delayed;
        sum.ready += more.ready;
        sum.leased += more.leased;
        sum.succeeded += more.succeeded;
        sum.dead += more.dead;
        sum.cancelled += more.cancelled;
        sum.oldest_ready_ms = sum.oldest_ready_ms.max(more.oldest_ready_ms);
    }
    queues.into_values().collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use espalier_core::queue::{Counters, JobKind};
    use prost::Message;

    use super::*;

    #[test]
    fn kinds_are_told_apart_and_summed_and_the_busiest_projects_come_first() {
        let line = |project: &str, kind, ready: u64, succeeded: u64| {
            let counters = StateName::ALL.map(|state| match state {
                StateName::Ready => ready,
                StateName::Succeeded => succeeded,
                _ => 0,
            });
            StatLine {
                project: project.parse().unwrap(),
                kind,
                counters: Counters::from(counters),
                oldest_ready: Some(Duration::from_millis(ready)),
            }
        };
        let lines = [
            line("a", JobKind::Rollout, 2, 90),
            line("b", JobKind::Rollout, 1, 0),
            line("b", JobKind::Train, 4, 3),
        ];
        let sums = by_project(&lines);
        assert_eq!(sums.len(), 2);
        assert_eq!(
            (sums[1].ready, sums[1].succeeded, sums[1].oldest_ready_ms),
            (5, 3, 4)
        );
        assert_eq!(numbers(&lines[2]).ready, 4);
        let busiest: Vec<String> = busiest(&lines).iter().map(ToString::to_string).collect();
        assert_eq!(busiest, ["b", "a"]);
    }

    #[test]
    fn workers_come_in_pages_that_clients_take_by_default() {
        let worker = |n: usize| v1::Worker {
            worker: format!("w{n:04}"),
            tags: vec!["t".repeat(256); 40],
            ..v1::Worker::default()
        };
        let all: Vec<v1::Worker> = (0..1_500).map(worker).collect();
        let mut request = v1::ListWorkersRequest {
            page_size: 1_000,
            page_token: String::new(),
        };
        let mut seen = Vec::new();
        loop {
            let page = page_of_workers(all.clone(), &request).unwrap();
            assert!(page.encoded_len() < 4 << 20, "{}", page.encoded_len());
            seen.extend(page.workers);
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        assert_eq!(seen, all);
        request.page_token = "x".to_owned();
        let refused = page_of_workers(all, &request).unwrap_err();
        assert!(matches!(refused, ApiError::Field(field) if field.field == "page_token"));
    }
}
