//! Of two coordinators on one Redis one makes workers, and the other one when that one ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_coordinator::CoordinatorConfig;
use espalier_coordinator::scaler::ScalerConfig;
use espalier_coordinator::scaler::config::{KedaConfig, LocalConfig, LocalPool};
use espalier_core::queue::JobKind;
use espalier_proto::v1;
use espalier_runtime::config::Secret;
use espalier_runtime::net;
use espalier_testbed::redis::RedisServer;
use espalier_testbed::wait_for;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::*;

const SEEN_DEADLINE: Duration = Duration::from_secs(20);

/// Makes a coordinator start processes that write their ids into files of `folder`, by the names of their instances.
fn scale(config: &mut CoordinatorConfig, folder: &Path, min: u32) {
    let script = format!(
        "echo $$ > '{}/{{instance}}'; exec sleep 600",
        folder.display()
    );
    let pool = LocalPool {
        name: "a".to_owned(),
        kinds: [JobKind::Rollout].into(),
        jobs_per_worker: 1,
        min,
        max: 2,
        idle_s: 0,
        start_s: 600,
        grace_s: 5,
        command: ["/bin/sh".to_owned(), "-c".to_owned(), script].into(),
        env: Default::default(),
        pass_env: Default::default(),
    };
    config.scaler = Some(ScalerConfig {
        interval_s: 1,
        runpod: None,
        keda: None,
        local: Some(LocalConfig { pools: vec![pool] }),
    });
}

/// Where the process of an instance is found, if it was started and lives.
fn process(folder: &Path, instance: &str) -> Option<PathBuf> {
    let pid = std::fs::read_to_string(folder.join(instance)).ok()?;
    let process = Path::new("/proc").join(pid.trim());
    (!pid.is_empty() && process.exists()).then_some(process)
}

async fn until(folder: &Path, instance: &str, lives: bool) {
    let what = format!("{instance} to live: {lives}");
    wait_for(&what, SEEN_DEADLINE, || async {
        let found = process(folder, instance);
        if found.is_some() == lives {
            Ok(())
        } else {
            Err(found)
        }
    })
    .await;
}

#[tokio::test]
async fn the_oldest_coordinator_makes_workers_and_the_next_one_when_it_ends() {
    let redis = RedisServer::start().await;
    let (of_a, of_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = Coordinator::start_on(&redis, |config| scale(config, of_a.path(), 1)).await;
    until(of_a.path(), "local-a-0", true).await;
    let b = Coordinator::start_on(&redis, |config| scale(config, of_b.path(), 1)).await;
    // Several looks.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(process(of_a.path(), "local-a-0").is_some());
    assert!(process(of_b.path(), "local-a-0").is_none());
    a.end().await.unwrap();
    until(of_a.path(), "local-a-0", false).await;
    until(of_b.path(), "local-a-0", true).await;
    b.end().await.unwrap();
    until(of_b.path(), "local-a-0", false).await;
}

#[tokio::test]
async fn an_instance_lives_as_long_as_its_worker_has_a_job_wherever_that_is_connected() {
    let redis = RedisServer::start().await;
    let folder = tempfile::tempdir().unwrap();
    let a = Coordinator::start_on(&redis, |config| scale(config, folder.path(), 0)).await;
    let b = Coordinator::start_on(&redis, |_| {}).await;
    let mut jobs = a.jobs(SHOP);
    open(&mut jobs, "b1").await;
    submit(&mut jobs, "b1", 0, vec![plain("j0"), plain("j1")]).await;
    let mut workers = Vec::new();
    for n in 0..2 {
        let instance = format!("local-a-{n}");
        until(folder.path(), &instance, true).await;
        let hello = v1::Hello {
            instance,
            ..hello(&format!("w{n}"), 1)
        };
        let mut worker = b.greet(hello).await;
        worker.hear().await;
        worker.credit(1).await;
        let lease = worker.grants(1).await.remove(0).lease.unwrap();
        workers.push((worker, lease));
    }
    // One job is left: one instance too many, and it is known which.
    let (mut first, lease) = workers.remove(0);
    first.report(lease, failed()).await;
    until(folder.path(), "local-a-0", false).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(
        process(folder.path(), "local-a-1").is_some(),
        "it has a job"
    );
}

#[tokio::test]
async fn kedas_port_tells_its_health_and_nothing_of_ours() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = listener.local_addr().unwrap();
    drop(listener);
    let coordinator = Coordinator::start_with(|config| {
        config.scaler = Some(ScalerConfig {
            interval_s: 1,
            runpod: None,
            keda: Some(KedaConfig { listen }),
            local: None,
        });
    })
    .await;
    let endpoint = format!("http://{listen}");
    // With a token, which opens nothing there.
    let channel = net::channel(&endpoint, None, Some(&Secret::new(ADMIN))).unwrap();
    wait_for("KEDA to be answered", SEEN_DEADLINE, || async {
        let mut health = HealthClient::new(channel.clone());
        for service in ["", "externalscaler.ExternalScaler"] {
            let service = service.to_owned();
            let answer = health.check(HealthCheckRequest { service }).await?;
            assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
        }
        Ok::<(), tonic::Status>(())
    })
    .await;
    let mut admin = v1::admin_service_client::AdminServiceClient::new(channel);
    let refused = admin.list_workers(v1::ListWorkersRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unimplemented);
    coordinator.end().await.unwrap();
}

/// The end of a job for good.
fn failed() -> v1::result::Outcome {
    let error = v1::JobError {
        class: v1::ErrorClass::Invalid.into(),
        message: "it cannot be done".to_owned(),
        ..v1::JobError::default()
    };
    v1::result::Outcome::Failure(v1::Failure {
        error: Some(error),
        retry_after_ms: 0,
    })
}
