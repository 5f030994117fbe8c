//! The way to a coordinator: where it is, by what token, and the generated clients over one channel.
//!
//! `ESPALIER_URL` and `ESPALIER_TOKEN` name a remote coordinator; without them, the file that `espalier up` left in
//! the data folder does.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use espalier_proto::v1;
use espalier_proto::v1::admin_service_client::AdminServiceClient;
use espalier_proto::v1::job_service_client::JobServiceClient;
use espalier_proto::v1::model_service_client::ModelServiceClient;
use espalier_proto::v1::worker_service_client::WorkerServiceClient;
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::model::ModelEndpoint;
use espalier_runtime::net::{
    self, Addresses, AuthorizedChannel, ClientTls, MESSAGE_BYTES_MAX, NetError,
};
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::error_chain;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

use crate::exit::{Exit, Problem};

/// How long the first call may take: a person is waiting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The file that `up` leaves for other commands.
const UP_FILE: &str = "up.json";

/// What `up` tells the other commands. Holds tokens, so only its owner may read the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpFile {
    /// Where the coordinator listens.
    pub url: String,
    /// The token of those who submit and look, in this project.
    pub token: String,
    /// The token of who looks after the system: workers serve all projects, so it is for all of them and for nothing
    /// else.
    pub admin_token: String,
    /// Where the traces are.
    pub store: String,
    /// The project of the first token.
    pub project: String,
    /// The process.
    pub pid: u32,
    /// The model, where this process serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ServedModel>,
}

/// A model that `up` serves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServedModel {
    /// What requests call it.
    pub name: String,
    /// Where its API is, up to and including the version.
    pub base_url: String,
    /// What lets requests in.
    pub api_key: String,
}

impl ServedModel {
    /// The same, for whoever asks it.
    pub fn endpoint(&self) -> ModelEndpoint {
        ModelEndpoint {
            api_key: Some(Secret::new(self.api_key.as_str())),
            ..ModelEndpoint::new(&self.base_url)
        }
    }
}

impl UpFile {
    /// Where it lies.
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join(UP_FILE)
    }

    /// Whether the process that wrote it is there: one that was killed has left it.
    pub fn is_of_the_living(&self) -> bool {
        Path::new("/proc").join(self.pid.to_string()).exists()
    }

    /// The file, where there is one.
    pub fn read(data_dir: &Path) -> Result<Option<Self>, Problem> {
        let path = Self::path(data_dir);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Problem::failed(format!(
                    "cannot read {}: {error}",
                    path.display()
                )));
            }
        };
        serde_json::from_str(&text).map(Some).map_err(|error| {
            Problem::failed(format!("{} is damaged: {error}", path.display()))
                .fix("stop `espalier up`, delete the file, and start it again")
        })
    }
}

/// Where `up` keeps traces unless it is told otherwise.
pub fn store_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("store")
}

/// The folder of `up`'s state: as given, or `~/.local/share/espalier`.
pub fn data_dir(given: Option<&Path>, environment: &Environment) -> Result<PathBuf, Problem> {
    if let Some(given) = given {
        return std::path::absolute(given).map_err(Problem::from);
    }
    if let Some(data) = environment
        .get("XDG_DATA_HOME")
        .filter(|text| !text.is_empty())
    {
        return Ok(Path::new(data).join("espalier"));
    }
    match environment.get("HOME").filter(|text| !text.is_empty()) {
        Some(home) => Ok(Path::new(home).join(".local/share/espalier")),
        None => Err(Problem::refused("no data folder: HOME is not set")
            .fix("name one with --data-dir or ESPALIER_DATA_DIR")),
    }
}

/// Where a coordinator is, and by what right we speak to it.
#[derive(Clone, Debug)]
pub struct Target {
    /// `http://host:port`; several coordinators with commas between them.
    pub url: String,
    /// Sent with each call.
    pub token: Option<Secret>,
    /// What told us: for error messages.
    pub origin: String,
}

impl Target {
    /// The one that `--url` or `ESPALIER_URL` names, with the token in `ESPALIER_TOKEN`.
    pub fn named(url: &str, environment: &Environment) -> Self {
        let token = environment
            .get("ESPALIER_TOKEN")
            .filter(|text| !text.is_empty());
        Self {
            url: url.to_owned(),
            token: token.map(Secret::new),
            origin: "--url or ESPALIER_URL".to_owned(),
        }
    }

    /// The local `up`, by the right of a client.
    pub fn local(data_dir: &Path) -> Result<Self, Problem> {
        Self::of_up(data_dir, |up| up.token)
    }

    /// The local `up`, by the right of its operator.
    pub fn local_operator(data_dir: &Path) -> Result<Self, Problem> {
        Self::of_up(data_dir, |up| up.admin_token)
    }

    fn of_up(data_dir: &Path, token: impl FnOnce(UpFile) -> String) -> Result<Self, Problem> {
        let path = UpFile::path(data_dir);
        match UpFile::read(data_dir)? {
            Some(up) => Ok(Self {
                url: up.url.clone(),
                token: Some(Secret::new(token(up))),
                origin: path.display().to_string(),
            }),
            None => Err(Problem::unreachable(format!(
                "no coordinator is known: {} is not there and ESPALIER_URL is not set",
                path.display()
            ))
            .fix("start one with `espalier up`, or set ESPALIER_URL and ESPALIER_TOKEN")),
        }
    }
}

/// A connection to one of the coordinators that are named. Clones share it.
#[derive(Clone)]
pub struct Client {
    links: Arc<Vec<AuthorizedChannel>>,
    /// Which of them is used.
    at: Arc<AtomicUsize>,
    /// Where they lead, with commas between them.
    pub url: String,
}

impl Client {
    /// A connection that a first, cheap call has proven: the other side speaks our protocol and takes the token. Several
    /// coordinators are tried in turn, from any of them on.
    pub async fn connect(target: &Target, tls: Option<&ClientTls>) -> Result<Self, Problem> {
        let client = Self::lazy(target, tls)?;
        let mut last = Ok(());
        for _ in client.links.iter() {
            let used = client.at();
            last = client.greet(target).await;
            match &last {
                Err(problem) if problem.exit == Exit::Unreachable => client.leave(used),
                _ => break,
            }
        }
        last.map(|()| client)
    }

    /// A client that has not connected yet.
    pub fn lazy(target: &Target, tls: Option<&ClientTls>) -> Result<Self, Problem> {
        let refused = |error: NetError| Problem::refused(error_chain(&error));
        let addresses = Addresses::parse(&target.url).map_err(refused)?;
        let links = addresses
            .iter()
            .map(|address| net::channel(address, tls, target.token.as_ref()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(refused)?;
        let first = rand::random_range(0..links.len());
        Ok(Self {
            links: Arc::new(links),
            at: Arc::new(AtomicUsize::new(first)),
            url: target.url.clone(),
        })
    }

    /// The coordinator that is used: a number for [`leave`](Self::leave).
    pub fn at(&self) -> usize {
        self.at.load(Ordering::Relaxed)
    }

    /// Lets the calls that follow go to the next coordinator, as the one that was used did not answer. Of several calls
    /// that failed there together the first decides.
    pub fn leave(&self, used: usize) {
        let next = used.wrapping_add(1);
        let _ = self
            .at
            .compare_exchange(used, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn link(&self) -> AuthorizedChannel {
        self.links[self.at() % self.links.len()].clone()
    }

    async fn greet(&self, target: &Target) -> Result<(), Problem> {
        let request = v1::ListBatchesRequest {
            page_size: 1,
            ..Default::default()
        };
        let mut jobs = self.jobs();
        let Target { url, origin, .. } = target;
        let away = |reason: String| {
            Problem::unreachable(format!(
                "cannot reach the coordinator at {url} (from {origin}): {reason}"
            ))
            .fix("start one with `espalier up`, or set ESPALIER_URL and ESPALIER_TOKEN")
        };
        let greeting = jobs.list_batches(request);
        match with_deadline("cli.connect", CONNECT_TIMEOUT, greeting).await {
            Err(timeout) => Err(away(timeout.to_string())),
            Ok(Err(status)) if status.code() == Code::Unavailable => Err(away(root_cause(&status))),
            // A token that may do less than look is for the command's own call to refuse.
            Ok(Err(status)) if status.code() == Code::PermissionDenied => Ok(()),
            Ok(Err(status)) => Err(status.into()),
            Ok(Ok(_)) => Ok(()),
        }
    }

    /// Submitting, watching and steering jobs.
    pub fn jobs(&self) -> JobServiceClient<AuthorizedChannel> {
        JobServiceClient::new(self.link())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Asking whether models are served.
    pub fn models(&self) -> ModelServiceClient<AuthorizedChannel> {
        ModelServiceClient::new(self.link()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Looking after the system.
    pub fn admin(&self) -> AdminServiceClient<AuthorizedChannel> {
        AdminServiceClient::new(self.link()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Playing a worker, for measurements.
    pub fn worker(&self) -> WorkerServiceClient<AuthorizedChannel> {
        WorkerServiceClient::new(self.link())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// The last cause in the chain: what is above it repeats it in layers.
pub fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => cause.to_string(),
    }
}

/// Whether a call failed because nobody answered it, or because its connection broke, which tonic gives as `Unknown` with a
/// source. Nothing is said by the coordinator then.
pub fn nobody_answered(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded => true,
        Code::Unknown => status.source().is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    #[test]
    fn a_target_is_named_or_found_in_the_file_of_up() {
        let folder = tempfile::tempdir().unwrap();
        let none = Target::local(folder.path()).unwrap_err();
        assert_eq!(none.exit, Exit::Unreachable);
        let up = UpFile {
            url: "http://127.0.0.1:1".to_owned(),
            token: "t".to_owned(),
            admin_token: "a".to_owned(),
            store: "memory://".to_owned(),
            project: "default".to_owned(),
            pid: 1,
            model: None,
        };
        let text = serde_json::to_string(&up).unwrap();
        std::fs::write(UpFile::path(folder.path()), text).unwrap();
        let found = Target::local(folder.path()).unwrap();
        let token = found.token.unwrap();
        assert_eq!(
            (found.url.as_str(), token.expose()),
            ("http://127.0.0.1:1", "t")
        );
        let operator = Target::local_operator(folder.path()).unwrap();
        assert_eq!(operator.token.unwrap().expose(), "a");
        let named = Target::named("http://h:2", &environment(&[("ESPALIER_TOKEN", "u")]));
        assert_eq!(
            (named.url.as_str(), named.token.unwrap().expose()),
            ("http://h:2", "u")
        );
    }

    #[tokio::test]
    async fn calls_that_fail_together_move_on_by_one() {
        let target = Target::named("http://127.0.0.1:1,http://127.0.0.1:2", &environment(&[]));
        let client = Client::lazy(&target, None).unwrap();
        let used = client.at();
        client.leave(used);
        client.leave(used);
        assert_eq!(client.at(), used + 1);
        let problem = Client::connect(&target, None).await.err().unwrap();
        assert_eq!(problem.exit, Exit::Unreachable);
        assert!(Client::lazy(&Target::named("nowhere", &environment(&[])), None).is_err());
    }

    #[test]
    fn the_data_folder_has_a_default() {
        let home = environment(&[("HOME", "/home/a")]);
        assert_eq!(
            data_dir(None, &home).unwrap(),
            Path::new("/home/a/.local/share/espalier")
        );
        assert!(data_dir(None, &environment(&[])).is_err());
    }
}
