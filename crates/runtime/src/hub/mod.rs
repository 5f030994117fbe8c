//! The Hugging Face hub, or a server that speaks as it does: what a repository holds, its files into the cache that other
//! programs share, and commits.
//!
//! ```text
//! download   files of one commit → the hub's cache, taken up where they broke off
//! upload     files → one commit: small ones in its body, large ones to the hub's storage first (lfs)
//! http       one request: deadline, retries, what a refusal means
//! ```
//! The token is a header of requests to the hub itself. It is shown to nobody else: not to the storage that the hub sends
//! large files to, and in no message.

mod download;
mod error;
mod http;
mod lfs;
mod meter;
mod upload;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::{FieldError, shorten};
use espalier_core::spec::is_hub_repo;
use serde::Deserialize;

use crate::config::{Environment, Secret};

pub use download::Snapshot;
pub use error::{HubError, Refusal};
pub use meter::Meter;
pub use upload::{Change, Commit, Content, RepoState, Upload};

/// The branch that people see first, and that is written to.
pub const MAIN: &str = "main";
/// The hub of everybody.
const ENDPOINT: &str = "https://huggingface.co";

/// How the hub is reached, and where its files are kept.
#[derive(Clone)]
pub struct HubSettings {
    /// Without a slash at its end.
    pub endpoint: String,
    /// Shown to the endpoint.
    pub token: Option<Secret>,
    /// PEM file of authorities that are trusted beside the system's: a company's own.
    pub ca: Option<PathBuf>,
    /// Folder of what is fetched.
    pub cache: Option<PathBuf>,
    /// Nothing is asked; what was fetched before is all that there is.
    pub offline: bool,
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An endpoint may hold a password.
        let mut out = f.debug_struct("HubSettings");
        out.field("has_token", &self.token.is_some())
            .field("ca", &self.ca)
            .field("cache", &self.cache)
            .field("offline", &self.offline);
        out.finish_non_exhaustive()
    }
}

impl HubSettings {
    /// As the hub's own clients read the environment: `HF_ENDPOINT`, `HF_TOKEN` or the file `HF_TOKEN_PATH` (by default
    /// `token` in `HF_HOME`, which is where a login leaves it), `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`; and for
    /// a company's authorities `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE` or `SSL_CERT_FILE`.
    #[must_use]
    pub fn new(environment: &Environment) -> Self {
        let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let yes =
            |value: &String| matches!(&*value.to_ascii_lowercase(), "1" | "on" | "yes" | "true");
        let home =
            path("HF_HOME").or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")));
        let token = get("HF_TOKEN").map(|token| Secret::new(token.trim()));
        let endpoint = get("HF_ENDPOINT").map_or(ENDPOINT, String::as_str);
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.or_else(|| Secret::of_file(&token_file?).ok()),
            ca: ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]
                .into_iter()
                .find_map(path),
            cache: path("HF_HUB_CACHE").or_else(|| Some(home?.join("hub"))),
            offline: get("HF_HUB_OFFLINE").is_some_and(yes),
        }
    }

    /// With another folder for what is fetched, if one is given.
    #[must_use]
    pub fn with_cache(mut self, folder: Option<&Path>) -> Self {
        self.cache = folder.map(Path::to_owned).or(self.cache);
        self
    }
}

/// What a configuration file says of the hub; what is absent stays as the environment has it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HubConfig {
    /// Its address; default `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// A token that may read, and write where exports go.
    pub token: Option<Secret>,
    /// PEM file of authorities that are trusted beside the system's.
    pub ca: Option<PathBuf>,
}

impl HubConfig {
    /// `settings` with what this says in their place.
    #[must_use]
    pub fn over(&self, mut settings: HubSettings) -> HubSettings {
        if let Some(endpoint) = &self.endpoint {
            settings.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        settings.token = self.token.clone().or(settings.token);
        settings.ca = self.ca.clone().or(settings.ca);
        settings
    }
}

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// A model, or an adapter.
    Model,
    /// A data set.
    Dataset,
}

/// A repository: its kind, and `owner/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    kind: RepoKind,
    name: Box<str>,
}

impl Repo {
    /// A repository of the kind.
    ///
    /// # Errors
    /// The name is not `owner/name` of the characters that the hub allows.
    pub fn new(kind: RepoKind, name: &str) -> Result<Self, FieldError> {
        if is_hub_repo(name) {
            return Ok(Self {
                kind,
                name: name.into(),
            });
        }
        let rule = "must be `owner/name`, of A-Z a-z 0-9 . _ -";
        Err(FieldError::new("repo", shorten(name), rule))
    }

    /// `owner/name`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn owner_and_name(&self) -> (&str, &str) {
        self.name.split_once('/').unwrap_or(("", &self.name))
    }

    fn kind_name(&self) -> &'static str {
        match self.kind {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        }
    }

    /// Where requests about it go, below the endpoint.
    fn api(&self) -> String {
        format!("api/{}s/{}", self.kind_name(), self.name)
    }

    /// Where its content is, below the endpoint.
    fn path(&self) -> String {
        match self.kind {
            RepoKind::Model => self.name.to_string(),
            RepoKind::Dataset => format!("datasets/{}", self.name),
        }
    }

    /// Its folder in the cache.
    fn folder(&self) -> String {
        let (owner, name) = self.owner_and_name();
        format!("{}s--{owner}--{name}", self.kind_name())
    }
}

impl FromStr for Repo {
    type Err = FieldError;

    /// A model's.
    fn from_str(name: &str) -> Result<Self, FieldError> {
        Self::new(RepoKind::Model, name)
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Whether `revision` can be a branch, a tag or a commit: branches may have slashes, but lead nowhere else.
#[must_use]
pub fn is_revision(revision: &str) -> bool {
    revision.len() <= 256 && revision.split('/').all(is_plain_name)
}

/// Whether `name` is one step of a path and leads down.
#[must_use]
pub fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=255).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.')
}

/// A revision as one step of a URL's path.
fn encoded(revision: &str) -> String {
    revision.replace('/', "%2F")
}

/// The hub. Clones share its connections.
#[derive(Clone, Debug)]
pub struct Hub {
    settings: Arc<HubSettings>,
    http: http::Http,
}

impl Hub {
    /// Reads the authorities; asks nobody.
    ///
    /// # Errors
    /// The authorities or the token cannot be used.
    pub fn new(settings: HubSettings) -> Result<Self, HubError> {
        Ok(Self {
            http: http::Http::new(&settings)?,
            settings: Arc::new(settings),
        })
    }

    /// With other waits between tries: the first is about so long, unless the hub asks for another.
    #[must_use]
    pub fn with_first_wait(mut self, wait: Duration) -> Self {
        self.http = self.http.with_first_wait(wait);
        self
    }

    /// Whether there is a token to show.
    #[must_use]
    pub fn has_token(&self) -> bool {
        self.settings.token.is_some()
    }

    /// Where people look at a repository.
    #[must_use]
    pub fn page(&self, repo: &Repo) -> String {
        self.url(&repo.path())
    }

    fn url(&self, below: &str) -> String {
        format!("{}/{below}", self.settings.endpoint)
    }
}
