//! `AdminService`: the queue in numbers, the connected workers, and what this coordinator is.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_core::id::WorkerId;
use espalier_core::queue::{StatLine, StateName};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use tonic::{Request, Response, Status};

use super::page::{self, List};
use super::{Shared, queue_error};
use crate::auth::Call;
use crate::peers::{self, Order};

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
        let stats = self.0.queue.stats().await.map_err(queue_error)?;
        let seen = |line: &&StatLine| token.project.covers(&line.project);
        let queues = by_project(stats.lines.iter().filter(seen));
        Ok(Response::new(v1::GetQueuesResponse { queues }))
    }

    async fn list_workers(
        &self,
        request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        self.0
            .auth
            .everything(request.metadata(), Call::ListWorkers)?;
        let workers = self.workers().await?;
        let page = page_of_workers(workers, request.get_ref())?;
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
        }))
    }
}

impl AdminApi {
    /// The workers of all coordinators, ordered by id. One that has just moved is where it came to last.
    async fn workers(&self) -> Result<Vec<v1::Worker>, ApiError> {
        let others = self.0.peers.workers().await.map_err(queue_error)?;
        let mut all = (*others).clone();
        for worker in self.0.registry.list() {
            let newer = all.get(&worker.worker);
            if newer.is_none_or(|other| other.connected_at_us <= worker.connected_at_us) {
                all.insert(worker.worker.clone(), worker);
            }
        }
        Ok(all.into_values().collect())
    }
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
    })
}

/// Sums the lines of each project's kinds.
fn by_project<'a>(lines: impl Iterator<Item = &'a StatLine>) -> Vec<v1::QueueStats> {
    let mut queues: BTreeMap<&str, v1::QueueStats> = BTreeMap::new();
    for line in lines {
        let sum = queues.entry(line.project.as_str()).or_default();
        sum.project = line.project.to_string();
        sum.blocked += line.counters.get(StateName::Blocked);
        sum.delayed += line.counters.get(StateName::Delayed);
        sum.ready += line.counters.get(StateName::Ready);
        sum.leased += line.counters.get(StateName::Leased);
        sum.dead += line.counters.get(StateName::Dead);
        let oldest = line.oldest_ready.unwrap_or_default().as_millis();
        sum.oldest_ready_ms = sum
            .oldest_ready_ms
            .max(u64::try_from(oldest).unwrap_or(u64::MAX));
    }
    queues.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

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
