//! Channels and servers against each other, with a service that is at hand: OTLP's.

#![expect(clippy::unwrap_used, reason = "the service is part of the test")]

use std::path::Path;
use std::sync::{Arc, Mutex};

use espalier_runtime::config::Secret;
use espalier_runtime::net::{self, ClientTls, OwnTls, ServerTls};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

/// Remembers the last `authorization` header.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Option<String>>>);

#[tonic::async_trait]
impl TraceService for Seen {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let header = request.metadata().get("authorization");
        *self.0.lock().unwrap() = header.map(|value| value.to_str().unwrap().to_owned());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn serve(seen: Seen, tls: Option<&ServerTls>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = net::endpoint_of(&listener, tls).unwrap();
    let server = net::server(tls)
        .unwrap()
        .add_service(TraceServiceServer::new(seen))
        .serve_with_incoming(net::incoming(listener));
    Tasks::new(Shutdown::new()).spawn("server", OnFailure::Log, server);
    endpoint
}

async fn call(endpoint: &str, tls: Option<&ClientTls>, token: Option<&str>) -> Result<(), Status> {
    let token = token.map(Secret::new);
    let channel = net::channel(endpoint, tls, token.as_ref()).unwrap();
    let mut client =
        TraceServiceClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX);
    client.export(ExportTraceServiceRequest::default()).await?;
    Ok(())
}

#[tokio::test]
async fn the_token_rides_on_every_call() {
    let seen = Seen::default();
    let endpoint = serve(seen.clone(), None).await;
    call(&endpoint, None, Some("t-1")).await.unwrap();
    assert_eq!(seen.0.lock().unwrap().as_deref(), Some("Bearer t-1"));
    call(&endpoint, None, None).await.unwrap();
    assert_eq!(seen.0.lock().unwrap().as_deref(), None);
}

/// Writes a self-signed certificate and its key, and returns where the certificate lies and the key's text.
fn certificate(folder: &Path, name: &str) -> (std::path::PathBuf, Secret) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let file = folder.join(format!("{name}.pem"));
    std::fs::write(&file, made.cert.pem()).unwrap();
    (file, Secret::new(made.signing_key.serialize_pem()))
}

#[tokio::test]
async fn tls_lets_in_who_trusts_the_certificate_and_shows_one() {
    let folder = tempfile::tempdir().unwrap();
    let (server_cert, server_key) = certificate(folder.path(), "espalier.test");
    let (client_cert, client_key) = certificate(folder.path(), "worker.test");
    let server_tls = ServerTls {
        cert: server_cert.clone(),
        key: server_key,
        client_ca: Some(client_cert.clone()),
    };
    let endpoint = serve(Seen::default(), Some(&server_tls)).await;
    let trusted = ClientTls {
        ca: server_cert,
        server_name: Some("espalier.test".to_owned()),
        cert: Some(client_cert.clone()),
        key: Some(client_key),
    };
    call(&endpoint, Some(&trusted), Some("t")).await.unwrap();

    let without_certificate = ClientTls {
        cert: None,
        key: None,
        ..trusted.clone()
    };
    call(&endpoint, Some(&without_certificate), None)
        .await
        .unwrap_err();
    let other_authority = ClientTls {
        ca: client_cert,
        ..trusted
    };
    call(&endpoint, Some(&other_authority), None)
        .await
        .unwrap_err();
}

#[tokio::test]
async fn a_server_of_this_machine_is_asked_whatever_certificate_it_shows() {
    let folder = tempfile::tempdir().unwrap();
    let (server_cert, server_key) = certificate(folder.path(), "espalier.test");
    let (client_cert, client_key) = certificate(folder.path(), "probe.test");
    let key_file = folder.path().join("probe.key");
    std::fs::write(&key_file, client_key.expose()).unwrap();
    let server_tls = ServerTls {
        cert: server_cert,
        key: server_key,
        client_ca: Some(client_cert.clone()),
    };
    let endpoint = serve(Seen::default(), Some(&server_tls)).await;
    let address = endpoint.strip_prefix("https://").unwrap().parse().unwrap();
    let call = async |tls: Option<&OwnTls>| {
        let channel = net::own_channel(address, tls).unwrap();
        let mut client = TraceServiceClient::new(channel);
        client.export(ExportTraceServiceRequest::default()).await
    };
    let identity = Some((client_cert, key_file));
    call(Some(&OwnTls { identity })).await.unwrap();
    call(Some(&OwnTls::default())).await.unwrap_err();
    call(None).await.unwrap_err();
}
