//! A channel to a server of this machine, to ask how it does. Nothing secret is said over it, so the certificate is not
//! judged: one that was renewed on disk is not the one that a server shows which read it at its start.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error as TlsError, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};

use super::NetError;

/// How a server of this machine is spoken to.
#[derive(Clone, Debug, Default)]
pub struct OwnTls {
    /// PEM files of a certificate and its key, where the server asks its clients for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Where a server that listens on `listen` is reached from its own machine.
pub fn own_address(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// A channel to the server at `address`, with TLS where `tls` is given. It connects at the first call.
///
/// # Errors
/// A file of the identity cannot be used.
pub fn own_channel(address: SocketAddr, tls: Option<&OwnTls>) -> Result<Channel, NetError> {
    let at = format!("http://{address}");
    let refused = |source| NetError::Endpoint {
        endpoint: at.clone(),
        source: Some(source),
    };
    let endpoint = Endpoint::from_shared(at.clone()).map_err(refused)?;
    let endpoint = endpoint.connect_timeout(super::CONNECT_TIMEOUT);
    let Some(tls) = tls else {
        return Ok(endpoint.connect_lazy());
    };
    let connector = Connector {
        address,
        tls: TlsConnector::from(Arc::new(client(tls)?)),
    };
    Ok(endpoint.connect_with_connector_lazy(connector))
}

fn client(tls: &OwnTls) -> Result<ClientConfig, NetError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(NetError::OwnTls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Any(provider)));
    let mut config = match &tls.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let unread = |file: &PathBuf, source| NetError::Pem {
                file: file.clone(),
                source,
            };
            let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect);
            let chain = chain.map_err(|error| unread(cert, error))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unread(key, error))?;
            let builder = builder.with_client_auth_cert(chain, key);
            builder.map_err(NetError::OwnTls)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Opens connections to one address.
#[derive(Clone)]
struct Connector {
    address: SocketAddr,
    tls: TlsConnector,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { address, tls } = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::IpAddress(address.ip().into());
            Ok(TokioIo::new(tls.connect(name, stream).await?))
        })
    }
}

/// Takes any certificate.
#[derive(Debug)]
struct Any(Arc<CryptoProvider>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_everywhere_is_found_on_loopback() {
        for (listen, own) in [
            ("0.0.0.0:7411", "127.0.0.1:7411"),
            ("[::]:7411", "[::1]:7411"),
            ("10.0.0.7:7411", "10.0.0.7:7411"),
        ] {
            assert_eq!(own_address(listen.parse().unwrap()), own.parse().unwrap());
        }
    }

    #[tokio::test]
    async fn an_identity_that_cannot_be_read_is_named() {
        let tls = OwnTls {
            identity: Some(("/nonexistent/c.pem".into(), "/nonexistent/k.pem".into())),
        };
        let error = own_channel(SocketAddr::from(([127, 0, 0, 1], 1)), Some(&tls)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "PEM file `/nonexistent/c.pem` cannot be used"
        );
    }
}
