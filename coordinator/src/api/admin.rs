//! `AdminService`: the queue in numbers, the connected workers, and what this coordinator is.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_core::id::WorkerId;
use espalier_core::queue::{StatLine, StateName};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use tonic::{Request, Response, Status};

use super::{Shared, queue_error};
use crate::auth::Call;

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
        self.0.auth.admit(request.metadata(), Call::ListWorkers)?;
        let workers = self.0.registry.list();
        Ok(Response::new(v1::ListWorkersResponse { workers }))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        self.0.auth.admit(request.metadata(), Call::DrainWorker)?;
        let worker = WorkerId::new(&request.get_ref().worker).map_err(ApiError::Field)?;
        if !self.0.registry.drain(&worker) {
            let (what, name) = ("worker", worker.to_string());
            return Err(ApiError::NotFound { what, name }.into());
        }
        Ok(Response::new(v1::DrainWorkerResponse {}))
    }

    async fn get_info(
        &self,
        request: Request<v1::GetInfoRequest>,
    ) -> Result<Response<v1::Info>, Status> {
        self.0.auth.admit(request.metadata(), Call::GetInfo)?;
        Ok(Response::new(v1::Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_url: self.0.store.url().to_owned(),
            queue: "embedded".to_owned(),
            mcp_servers: self.0.mcp_servers().into_iter().collect(),
        }))
    }
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
