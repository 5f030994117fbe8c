//! The same services over TLS on loopback.

use std::path::PathBuf;

use espalier_proto::v1;
use espalier_proto::v1::job_service_client::JobServiceClient;
use espalier_runtime::config::Secret;
use espalier_runtime::net::{self, ClientTls, ServerTls};

use crate::support::*;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

#[tokio::test]
async fn calls_work_over_tls_and_only_over_tls() {
    let key = std::fs::read_to_string(fixture("server.key")).unwrap();
    let coordinator = Coordinator::start_with(|config| {
        config.tls = Some(ServerTls {
            cert: fixture("server.pem"),
            key: Secret::new(key),
            client_ca: None,
        });
    })
    .await;
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
