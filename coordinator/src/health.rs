//! `espalier-coordinator health`: asks the coordinator of this machine how it does, for probes that run a command.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use espalier_runtime::net::{self, NetError, OwnTls};
use espalier_runtime::tasks::{DeadlineExceeded, with_deadline};
use serde::Deserialize;
use tonic::{Code, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::config::default_listen;

/// How long the coordinator may take to answer.
const TIMEOUT: Duration = Duration::from_secs(4);

/// What has to be known of a coordinator's configuration to ask it. Secrets are not read.
#[derive(Clone, Debug, Deserialize)]
pub struct Place {
    /// Where it listens.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Whether with TLS.
    #[serde(default)]
    pub tls: Option<PlaceTls>,
}

/// What has to be known of its TLS.
#[derive(Clone, Debug, Deserialize)]
pub struct PlaceTls {
    /// Whose certificates clients have to show.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
}

/// Why a coordinator is not well, or cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Nobody knows where it listens.
    #[error("`listen` must have a port other than 0 to be asked: {listen}")]
    Port {
        /// Where it is to listen.
        listen: SocketAddr,
    },
    /// The settings cannot work.
    #[error("the coordinator cannot be asked")]
    Net(#[from] NetError),
    /// It did not answer in time.
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
    /// It has no such service.
    #[error("it has no service `{service}`")]
    Unknown {
        /// The name that was asked for.
        service: String,
    },
    /// It cannot be reached, or refuses.
    #[error("it cannot be reached{hint}")]
    Away {
        /// What may be the reason.
        hint: &'static str,
        /// Why.
        source: Status,
    },
    /// It says that it does not serve.
    #[error("`{service}` is not served now")]
    NotServing {
        /// The name that was asked for.
        service: String,
    },
}

/// Asks the coordinator at `place`, on this machine, whether `service` is served: the name of a gRPC service,
/// `liveness`, or nothing for whether it should be sent requests.
///
/// # Errors
/// It is not, or cannot be asked.
pub async fn ask(place: &Place, service: &str, tls: &OwnTls) -> Result<(), HealthError> {
    let listen = place.listen;
    if listen.port() == 0 {
        return Err(HealthError::Port { listen });
    }
    let secured = place.tls.as_ref();
    let channel = net::own_channel(net::own_address(listen), secured.map(|_| tls))?;
    let mut client = HealthClient::new(channel);
    let service = service.to_owned();
    let request = HealthCheckRequest {
        service: service.clone(),
    };
    let answer = with_deadline("health.ask", TIMEOUT, client.check(request)).await?;
    let answer = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) if status.code() == Code::NotFound => {
            return Err(HealthError::Unknown { service });
        }
        Err(source) => {
            let asks = secured.is_some_and(|server| server.client_ca.is_some());
            let hint = match asks && tls.identity.is_none() {
                true => ": it asks for a certificate, so give --client-cert and --client-key",
                false => "",
            };
            return Err(HealthError::Away { hint, source });
        }
    };
    match answer.status == ServingStatus::Serving as i32 {
        true => Ok(()),
        false => Err(HealthError::NotServing { service }),
    }
}
