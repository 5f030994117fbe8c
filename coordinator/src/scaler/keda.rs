//! Answers KEDA, which makes and ends pods in a cluster: how many jobs of some kinds there are, and for how many of them a
//! pod is. Every coordinator answers alike, since the jobs are the queue's.
//!
//! The port is apart from that of clients and workers, since whoever reaches it needs no token. It tells numbers and takes
//! nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::queue::JobKind;
use espalier_proto::keda::external_scaler_server::{ExternalScaler, ExternalScalerServer};
use espalier_proto::keda::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec,
    MetricValue, ScaledObjectRef,
};
use espalier_proto::status::ApiError;
use espalier_runtime::net::{self, NetError};
use espalier_runtime::tasks::{OnFailure, with_deadline};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Router;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::config::KedaConfig;
use super::demand::{self, Demand};
use crate::api::{Shared, queue_error};
use crate::peers::Read;
use crate::queue::QueueError;

/// Largest request: names, and the metadata of a trigger.
const REQUEST_BYTES_MAX: usize = 16 << 10;
/// Most streams at once: one for each object that is scaled.
const STREAMS_MAX: usize = 256;
/// How often a stream looks for a change.
const STREAM_INTERVAL: Duration = Duration::from_secs(1);
/// How long the queue may take to answer.
const DEMAND_LIMIT: Duration = Duration::from_secs(10);
/// Most jobs that one replica can be said to be for.
const PER_REPLICA_MAX: u32 = 1_000_000;
/// The name under which health is asked, beside the empty one.
const SERVICE: &str = "externalscaler.ExternalScaler";

/// The service.
#[derive(Clone)]
struct Keda {
    shared: Arc<Shared>,
    demand: Arc<Read<Demand>>,
    streams: Arc<Semaphore>,
}

/// Serves KEDA until the coordinator drains.
///
/// # Errors
/// The port cannot be had, or the coordinator's TLS settings cannot work.
pub async fn start(shared: &Arc<Shared>, config: &KedaConfig) -> Result<(), NetError> {
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(NetError::Listener)?;
    let keda = Keda {
        shared: Arc::clone(shared),
        demand: Arc::default(),
        streams: Arc::new(Semaphore::new(STREAMS_MAX)),
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    report(&health, ServingStatus::Serving).await;
    let router = net::server(shared.config.tls.as_ref())?
        .add_service(health_service.max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(ExternalScalerServer::new(keda).max_decoding_message_size(REQUEST_BYTES_MAX));
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "KEDA is answered");
    }
    let served = serve(Arc::clone(shared), router, listener, health);
    shared
        .tasks
        .spawn("scaler.keda", OnFailure::ShutDown, served);
    Ok(())
}

async fn serve(
    shared: Arc<Shared>,
    router: Router,
    listener: TcpListener,
    health: HealthReporter,
) -> Result<(), tonic::transport::Error> {
    let drained = async {
        shared.shutdown.draining().await;
        report(&health, ServingStatus::NotServing).await;
    };
    let serving = router.serve_with_incoming_shutdown(net::incoming(listener), drained);
    tokio::select! {
        served = serving => served,
        () = shared.shutdown.aborted() => Ok(()),
    }
}

async fn report(health: &HealthReporter, status: ServingStatus) {
    for service in ["", SERVICE] {
        health.set_service_status(service, status).await;
    }
}

impl Keda {
    async fn demand(&self) -> Result<Arc<Demand>, Status> {
        let read = self.demand.get(demand::read(&*self.shared.queue));
        match with_deadline("scaler.keda.demand", DEMAND_LIMIT, read).await {
            Ok(read) => read.map_err(|error: QueueError| queue_error(error).into()),
            Err(late) => Err(ApiError::Unavailable(late.to_string()).into()),
        }
    }

    async fn jobs(&self, asked: &Asked) -> Result<u64, Status> {
        let demand = self.demand().await?;
        Ok(asked.jobs(&demand))
    }

    /// Says so at once and whenever it changes, until the coordinator drains or nobody listens.
    async fn stream(
        self,
        asked: Asked,
        told: mpsc::Sender<Result<IsActiveResponse, Status>>,
        _place: OwnedSemaphorePermit,
    ) {
        let mut ticks = tokio::time::interval(STREAM_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = told.closed() => return,
                () = self.shared.shutdown.draining() => return,
            }
            // A queue that is away says nothing of its jobs.
            let Ok(jobs) = self.jobs(&asked).await else {
                continue;
            };
            let result = jobs > 0;
            if last.replace(result) != Some(result)
                && told.send(Ok(IsActiveResponse { result })).await.is_err()
            {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl ExternalScaler for Keda {
    async fn is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<IsActiveResponse>, Status> {
        let asked = Asked::parse(request.get_ref()).map_err(ApiError::Field)?;
        let result = self.jobs(&asked).await? > 0;
        Ok(Response::new(IsActiveResponse { result }))
    }

    type StreamIsActiveStream = ReceiverStream<Result<IsActiveResponse, Status>>;

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let asked = Asked::parse(request.get_ref()).map_err(ApiError::Field)?;
        let Ok(place) = Arc::clone(&self.streams).try_acquire_owned() else {
            let full = format!("at most {STREAMS_MAX} streams are served at once");
            return Err(ApiError::Exhausted(full).into());
        };
        let (told, stream) = mpsc::channel(1);
        let tasks = &self.shared.tasks;
        let telling = self.clone().stream(asked, told, place);
        tasks.spawn_apart("scaler.keda.stream", OnFailure::Log, telling);
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let asked = Asked::parse(request.get_ref()).map_err(ApiError::Field)?;
        let spec = MetricSpec {
            metric_name: asked.metric(),
            target_size: asked.jobs_per_replica.into(),
            target_size_float: asked.jobs_per_replica.into(),
        };
        Ok(Response::new(GetMetricSpecResponse {
            metric_specs: vec![spec],
        }))
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let request = request.into_inner();
        let object = request.scaled_object_ref.unwrap_or_default();
        let asked = Asked::parse(&object).map_err(|error| error.under("scaledObjectRef"));
        let asked = asked.map_err(ApiError::Field)?;
        if request.metric_name != asked.metric() {
            let rule = format!("must be `{}`, as the metadata says", asked.metric());
            let refused = FieldError::new("metricName", request.metric_name, rule);
            return Err(ApiError::Field(refused).into());
        }
        let jobs = self.jobs(&asked).await?;
        let value = MetricValue {
            metric_name: request.metric_name,
            metric_value: i64::try_from(jobs).unwrap_or(i64::MAX),
            metric_value_float: jobs as f64,
        };
        Ok(Response::new(GetMetricsResponse {
            metric_values: vec![value],
        }))
    }
}

/// What the metadata of a trigger asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    kinds: BTreeSet<JobKind>,
    jobs_per_replica: u32,
}

impl Asked {
    /// Other keys are KEDA's own.
    fn parse(object: &ScaledObjectRef) -> Result<Self, FieldError> {
        let key = |name: &str| object.scaler_metadata.get(name).map_or("", |v| v.trim());
        let within = |error: FieldError| error.under("scalerMetadata");
        Ok(Self {
            kinds: parse_kinds(key("kinds")).map_err(within)?,
            jobs_per_replica: parse_count(key("jobsPerReplica")).map_err(within)?,
        })
    }

    fn jobs(&self, demand: &Demand) -> u64 {
        self.kinds.iter().filter_map(|kind| demand.get(kind)).sum()
    }

    /// The name of what is measured: the same for the same kinds, in whatever order they are named.
    fn metric(&self) -> String {
        let kinds: Vec<&str> = self.kinds.iter().map(|kind| kind.as_str()).collect();
        format!("espalier-{}", kinds.join("-"))
    }
}

fn parse_kinds(text: &str) -> Result<BTreeSet<JobKind>, FieldError> {
    let known = |word: &str| {
        let found = JobKind::ALL.into_iter().find(|kind| kind.as_str() == word);
        found.ok_or_else(|| {
            let kinds = JobKind::ALL.map(JobKind::as_str).join("`, `");
            let rule = format!("must be kinds of jobs, separated by commas: `{kinds}`");
            let value = if word.is_empty() { "nothing" } else { word };
            FieldError::new("kinds", value, rule)
        })
    };
    text.split(',').map(|word| known(word.trim())).collect()
}

fn parse_count(text: &str) -> Result<u32, FieldError> {
    let count = text.parse().ok();
    let count = count.filter(|count| (1..=PER_REPLICA_MAX).contains(count));
    count.ok_or_else(|| {
        let rule = format!("must be a whole number in 1..={PER_REPLICA_MAX}");
        let value = if text.is_empty() { "nothing" } else { text };
        FieldError::new("jobsPerReplica", value, rule)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(metadata: &[(&str, &str)]) -> ScaledObjectRef {
        let metadata = metadata.iter();
        ScaledObjectRef {
            scaler_metadata: metadata
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..ScaledObjectRef::default()
        }
    }

    #[test]
    fn kinds_and_how_many_of_their_jobs_a_replica_is_for() {
        let asked = Asked::parse(&object(&[
            ("scalerAddress", "release-coordinator-keda.ml.svc:7412"),
            ("kinds", "export, curate,compare"),
            ("jobsPerReplica", "2"),
        ]));
        let asked = asked.unwrap();
        assert_eq!(asked.metric(), "espalier-curate-compare-export");
        assert_eq!(asked.jobs_per_replica, 2);
        let demand = [
            (JobKind::Curate, 3),
            (JobKind::Rollout, 9),
            (JobKind::Export, 1),
        ];
        assert_eq!(asked.jobs(&demand.into()), 4);
    }

    #[test]
    fn metadata_that_breaks_a_rule_is_refused_by_field_value_and_rule() {
        let cases = [
            (
                "",
                "1",
                "`scalerMetadata.kinds` must be kinds of jobs",
                "got `nothing`",
            ),
            (
                "rollout,,train",
                "1",
                "`scalerMetadata.kinds`",
                "got `nothing`",
            ),
            ("rollout,bake", "1", "`scalerMetadata.kinds`", "got `bake`"),
            (
                "rollout",
                "",
                "`scalerMetadata.jobsPerReplica` must be a whole number in 1..=1000000",
                "got `nothing`",
            ),
            ("rollout", "0", "`scalerMetadata.jobsPerReplica`", "got `0`"),
            (
                "rollout",
                "2.5",
                "`scalerMetadata.jobsPerReplica`",
                "got `2.5`",
            ),
        ];
        for (kinds, count, rule, value) in cases {
            let object = object(&[("kinds", kinds), ("jobsPerReplica", count)]);
            let refused = Asked::parse(&object).unwrap_err().to_string();
            assert!(
                refused.starts_with(rule) && refused.ends_with(value),
                "{refused}"
            );
        }
        let refused = Asked::parse(&ScaledObjectRef::default()).unwrap_err();
        assert_eq!(refused.field, "scalerMetadata.kinds");
    }
}
