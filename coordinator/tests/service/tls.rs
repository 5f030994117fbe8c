//! The same services over TLS on loopback.

use std::net::SocketAddr;
use std::path::PathBuf;

use espalier_coordinator::health::{self, Place, PlaceTls};
use espalier_proto::v1;
use espalier_proto::v1::job_service_client::JobServiceClient;
use espalier_runtime::config::Secret;
use espalier_runtime::net::{self, ClientTls, OwnTls, ServerTls};

use crate::support::*;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

async fn secured(client_ca: Option<PathBuf>) -> Coordinator {
    let key = std::fs::read_to_string(fixture("server.key")).unwrap();
    Coordinator::start_with(|config| {
        config.tls = Some(ServerTls {
            cert: fixture("server.pem"),
            key: Secret::new(key),
            client_ca,
        });
    })
    .await
}

#[tokio::test]
async fn calls_work_over_tls_and_only_over_tls() {
    let coordinator = secured(None).await;
    let tls = ClientTls {
        ca: fixture("ca.pem"),
        server_name: Some("localhost".to_owned()),
        cert: None,
        key: None,
    };
    let token = Secret::new(SHOP);
    let secure = format!("https://{}", coordinator.address);
    let channel = net::channel(&secure, Some(&tls), Some(&token)).unwrap();
    let mut jobs = JobServiceClient::new(channel);
    let request = v1::ListBatchesRequest::default;
    assert!(jobs.list_batches(request()).await.is_ok());

    let mut plain = coordinator.jobs(SHOP);
    assert!(plain.list_batches(request()).await.is_err());
}

fn place(listen: SocketAddr, client_ca: Option<PathBuf>) -> Place {
    Place {
        listen,
        tls: Some(PlaceTls { client_ca }),
    }
}

#[tokio::test]
async fn a_coordinator_with_tls_is_asked_how_it_does() {
    let coordinator = secured(None).await;
    let place = place(coordinator.address, None);
    let tls = OwnTls::default();
    let asked = |service| health::ask(&place, service, &tls);
    for service in ["liveness", "espalier.v1.WorkerService"] {
        assert!(asked(service).await.is_ok(), "{service}");
    }
    let unknown = asked("x").await.unwrap_err().to_string();
    assert_eq!(unknown, "it has no service `x`");
    let plain = Place { tls: None, ..place };
    let refused = health::ask(&plain, "liveness", &OwnTls::default()).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.to_string(), "it cannot be reached");
}

#[tokio::test]
async fn one_that_asks_for_certificates_says_so_to_who_shows_none() {
    let coordinator = secured(Some(fixture("ca.pem"))).await;
    let place = place(coordinator.address, Some(fixture("ca.pem")));
    let nobody = health::ask(&place, "liveness", &OwnTls::default()).await;
    let said = nobody.unwrap_err().to_string();
    assert!(said.contains("--client-cert"), "{said}");
}
