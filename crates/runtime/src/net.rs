//! gRPC connections: one way to make a client channel and one way to make a server, with the same keepalive, TLS and
//! limits everywhere. What is spoken over them is the callers'.
//!
//! A service that runs several times over has [`Addresses`], of which [`channel_to`] takes one place.
//!
//! A server here never gets tonic's `timeout`: it would end long streams. Deadlines belong to the single calls.

mod addresses;
mod incoming;
mod own;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::net::TcpListener;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{
    Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig,
};

use crate::config::Secret;

pub use addresses::{Addresses, Place, choose};
pub use incoming::{Connection, Incoming};
pub use own::{OwnTls, own_address, own_channel};

/// Largest message of our protocols, in bytes, to be set on every generated client and server. A chunk of a
/// thousand job specs fits.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client may take over its part of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pings on a quiet connection: below the idle limit of common load balancers (60 s), and often enough that a peer
/// which vanished is noticed well within a lease.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// How long a ping may stay unanswered.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most concurrent calls of one connection. A worker needs a handful, a busy client some dozens.
const STREAMS_PER_CONNECTION_MAX: u32 = 256;

/// How a client checks the server, and shows itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientTls {
    /// PEM file of the authorities that are trusted. For a public certificate this is the system's bundle, such as
    /// `/etc/ssl/certs/ca-certificates.crt`.
    pub ca: PathBuf,
    /// The name that the server's certificate must carry, if it is not the one in the address.
    #[serde(default)]
    pub server_name: Option<String>,
    /// PEM file of the client's own certificate, where the server asks for one.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// The key of that certificate, in PEM.
    #[serde(default)]
    pub key: Option<Secret>,
}

/// How a server shows itself, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTls {
    /// PEM file of the certificate chain.
    pub cert: PathBuf,
    /// The key of the certificate, in PEM: usually `{ file = "…" }`.
    pub key: Secret,
    /// PEM file of the authorities whose client certificates are required. Absent: clients need none.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
}

/// Why a channel or a server could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address is not one.
    #[error("endpoint `{endpoint}` must be `http://host:port` or `https://host:port`")]
    Endpoint {
        /// The address.
        endpoint: String,
        /// What is wrong with it, where the parser says.
        source: Option<tonic::transport::Error>,
    },
    /// There are more addresses than anybody writes.
    #[error(
        "there must be at most {max} addresses, got {addresses}; use a name that stands for several"
    )]
    TooMany {
        /// How many there are.
        addresses: usize,
        /// How many there may be.
        max: usize,
    },
    /// A name stands for no address.
    #[error("`{host}` cannot be resolved")]
    Unknown {
        /// The name.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// Scheme and TLS settings contradict each other.
    #[error("endpoint `{endpoint}` {rule}")]
    Tls {
        /// The address.
        endpoint: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A certificate file cannot be read.
    #[error("certificate file `{}` cannot be read", file.display())]
    Certificate {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A certificate or key cannot be read.
    #[error("PEM file `{}` cannot be used", file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key of a client do not make a TLS configuration.
    #[error("the client's certificate and key are refused")]
    OwnTls(#[source] rustls::Error),
    /// Certificate and key do not make a TLS configuration.
    #[error(
        "the TLS settings are refused: certificate, key or authority is malformed, or they do not match"
    )]
    TlsSettings(#[source] tonic::transport::Error),
    /// A client certificate without its key, or the reverse.
    #[error("`cert` and `key` must be given together")]
    HalfIdentity,
    /// The token cannot be a header.
    #[error("the token must be printable ASCII")]
    Token,
    /// The listener could not be used.
    #[error("the listener cannot be used")]
    Listener(#[source] std::io::Error),
}

/// A channel that shows the token on every call.
pub type AuthorizedChannel = InterceptedService<Channel, Bearer>;

/// Adds `authorization: Bearer …` to every call, or nothing where there is no token.
#[derive(Clone, Debug)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: Option<&Secret>) -> Result<Self, NetError> {
        let Some(token) = token else {
            return Ok(Self(None));
        };
        let header = format!("Bearer {}", token.expose());
        let mut value = MetadataValue::try_from(header).map_err(|_| NetError::Token)?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl Interceptor for Bearer {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// A channel to `endpoint`. It connects at the first call and again after every break, so a server that is not up
/// yet shows as `UNAVAILABLE` of a call, not here. Within a tokio runtime.
pub fn channel(
    endpoint: &str,
    tls: Option<&ClientTls>,
    token: Option<&Secret>,
) -> Result<AuthorizedChannel, NetError> {
    open(endpoint, endpoint, tls, token)
}

/// As [`channel`], to one of the machines behind an address. Its certificate has to carry the address's name.
pub fn channel_to(
    place: &Place,
    tls: Option<&ClientTls>,
    token: Option<&Secret>,
) -> Result<AuthorizedChannel, NetError> {
    let scheme = match place.address.starts_with("https:") {
        true => "https",
        false => "http",
    };
    let at = format!("{scheme}://{}", place.at);
    open(&place.address, &at, tls, token)
}

/// A channel to `at`, where what is called `endpoint` is.
fn open(
    endpoint: &str,
    at: &str,
    tls: Option<&ClientTls>,
    token: Option<&Secret>,
) -> Result<AuthorizedChannel, NetError> {
    let refuse = |source| NetError::Endpoint {
        endpoint: endpoint.to_owned(),
        source,
    };
    let (host, _) = addresses::host_and_port(endpoint)?;
    let parsed = Endpoint::from_shared(at.to_owned()).map_err(|error| refuse(Some(error)))?;
    let origin = endpoint.parse().map_err(|_| refuse(None))?;
    let parsed = parsed.origin(origin);
    let contradiction = |rule| NetError::Tls {
        endpoint: endpoint.to_owned(),
        rule,
    };
    let parsed = match (parsed.uri().scheme_str(), tls) {
        (Some("http"), None) => parsed,
        (Some("https"), Some(tls)) => parsed
            .tls_config(client_tls(tls, &host)?)
            .map_err(NetError::TlsSettings)?,
        (Some("http"), Some(_)) => {
            return Err(contradiction(
                "must begin with `https://` when TLS is configured",
            ));
        }
        (Some("https"), None) => {
            return Err(contradiction(
                "needs `tls.ca`: the authorities that are trusted",
            ));
        }
        _ => return Err(refuse(None)),
    };
    let channel = parsed
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy();
    Ok(InterceptedService::new(channel, Bearer::new(token)?))
}

/// A server without services yet, with keepalive, limits and, where configured, TLS.
pub fn server(tls: Option<&ServerTls>) -> Result<Server, NetError> {
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX);
    match tls {
        Some(tls) => server
            .tls_config(server_tls(tls)?)
            .map_err(NetError::TlsSettings),
        None => Ok(server),
    }
}

/// What `serve_with_incoming` takes, from a listener that is already bound: tests bind port 0 and know the address
/// before the server runs.
pub fn incoming(listener: TcpListener) -> Incoming {
    Incoming::new(listener)
}

/// The address that clients of `listener` connect to.
pub fn endpoint_of(listener: &TcpListener, tls: Option<&ServerTls>) -> Result<String, NetError> {
    let address = listener.local_addr().map_err(NetError::Listener)?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    Ok(format!("{scheme}://{address}"))
}

/// Two crypto libraries are linked (tonic brings ring, reqwest brings aws-lc), and rustls refuses to choose. A
/// choice that the process made before stands.
fn choose_crypto() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// `host`: the name in the address, which the certificate must carry where the settings name no other.
fn client_tls(tls: &ClientTls, host: &str) -> Result<ClientTlsConfig, NetError> {
    choose_crypto();
    let name = tls.server_name.as_deref().unwrap_or(host);
    let config = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read_pem(&tls.ca)?))
        .domain_name(name);
    match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => {
            let identity = Identity::from_pem(read_pem(cert)?, key.expose());
            Ok(config.identity(identity))
        }
        (None, None) => Ok(config),
        _ => Err(NetError::HalfIdentity),
    }
}

fn server_tls(tls: &ServerTls) -> Result<ServerTlsConfig, NetError> {
    choose_crypto();
    let identity = Identity::from_pem(read_pem(&tls.cert)?, tls.key.expose());
    let config = ServerTlsConfig::new()
        .identity(identity)
        .timeout(HANDSHAKE_TIMEOUT);
    match &tls.client_ca {
        Some(ca) => Ok(config.client_ca_root(Certificate::from_pem(read_pem(ca)?))),
        None => Ok(config),
    }
}

fn read_pem(file: &Path) -> Result<Vec<u8>, NetError> {
    std::fs::read(file).map_err(|source| NetError::Certificate {
        file: file.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(endpoint: &str, tls: Option<&ClientTls>) -> String {
        channel(endpoint, tls, None)
            .expect_err(endpoint)
            .to_string()
    }

    #[tokio::test]
    async fn addresses_and_tls_settings_that_cannot_work_are_refused() {
        let tls = ClientTls {
            ca: "/nonexistent/ca.pem".into(),
            server_name: None,
            cert: None,
            key: None,
        };
        for bad in ["", "localhost:1", "ftp://localhost", "http//x y"] {
            assert!(
                refusal(bad, None).contains("must be `http://host:port`"),
                "{bad}"
            );
        }
        assert!(refusal("http://localhost:1", Some(&tls)).contains("must begin with `https://`"));
        assert!(refusal("https://localhost:1", None).contains("needs `tls.ca`"));
        assert!(refusal("https://localhost:1", Some(&tls)).contains("/nonexistent/ca.pem"));
    }

    #[tokio::test]
    async fn a_token_that_is_no_header_is_refused_without_being_shown() {
        let token = Secret::new("sk-line\nbreak");
        let error = channel("http://localhost:1", None, Some(&token)).unwrap_err();
        assert_eq!(error.to_string(), "the token must be printable ASCII");
        assert!(channel("http://localhost:1", None, Some(&Secret::new("ok"))).is_ok());
    }
}
