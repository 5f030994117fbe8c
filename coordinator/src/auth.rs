//! Who may call what: bearer tokens, kept as SHA-256 only, and one table from call to role.
//!
//! A [`Gate`] turns callers without a known token away before anything of their message is read. Then every handler
//! begins with [`Auth::admit`], [`Auth::project`] or [`Auth::everything`], which know roles and projects. A project that a token does not name does not
//! exist for it: handlers look things up under the token's project only, so that another project's batch answers
//! like one that nobody opened. Health and reflection are open and never come here.

use std::fmt;
use std::sync::Arc;

use espalier_core::error::FieldError;
use espalier_core::id::ProjectId;
use espalier_proto::status::ApiError;
use espalier_runtime::telemetry;
use opentelemetry::KeyValue;
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Open batches, submit, cancel, retry, answer questions.
    Submit,
    /// Look at batches, jobs, questions and traces.
    Read,
    /// Take jobs.
    Worker,
    /// Look after the system.
    Admin,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Submit, Self::Read, Self::Worker, Self::Admin];

    /// The name in configurations and refusals.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Submit => "submit",
            Self::Read => "read",
            Self::Worker => "worker",
            Self::Admin => "admin",
        }
    }
}

/// The one table: every call of the API, and the role that it needs.
macro_rules! calls {
    ($($service:literal { $($call:ident => $role:ident),+ $(,)? })+) => {
        /// A call of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each is documented in the protos")]
        pub enum Call { $($($call),+),+ }

        impl Call {
            /// Every call, as `Service/Call`.
            pub const ALL: &[(&str, Self)] =
                &[$($((concat!($service, "/", stringify!($call)), Self::$call)),+),+];

            /// The role that it needs.
            pub fn role(self) -> Role {
                match self { $($(Self::$call => Role::$role),+),+ }
            }
        }
    };
}

calls! {
    "JobService" {
        OpenBatch => Submit,
        SubmitChunk => Submit,
        CloseBatch => Submit,
        GetBatch => Read,
        ListBatches => Read,
        GetJob => Read,
        ListJobs => Read,
        WatchBatch => Read,
        Cancel => Submit,
        Retry => Submit,
        ListQuestions => Read,
        AnswerQuestion => Submit,
        GetTrace => Read,
    }
    "ModelService" {
        GetModel => Read,
    }
    "WorkerService" {
        Session => Worker,
    }
    "AdminService" {
        GetQueues => Admin,
        ListWorkers => Admin,
        DrainWorker => Admin,
        GetInfo => Admin,
    }
}

/// SHA-256 of a token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The hash of `token`.
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Compares in a time that does not depend on where the two differ.
    fn matches(&self, other: &Self) -> bool {
        let difference = self.0.iter().zip(other.0).fold(0, |d, (a, b)| d | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

/// Shows nothing of the hash: short tokens could be found from it.
impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let refuse = || serde::de::Error::custom("must be the 64 hex digits of a token's SHA-256");
        if text.len() != 64 || !text.is_ascii() {
            return Err(refuse());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| refuse())?;
        }
        Ok(Self(bytes))
    }
}

/// The projects that a token is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// `*`: all of them. For workers and operators.
    All,
    /// One.
    Project(ProjectId),
}

impl Scope {
    /// Whether the token is about `project`.
    pub fn covers(&self, project: &ProjectId) -> bool {
        match self {
            Self::All => true,
            Self::Project(own) => own == project,
        }
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "*" {
            return Ok(Self::All);
        }
        ProjectId::new(text)
            .map(Self::Project)
            .map_err(serde::de::Error::custom)
    }
}

/// One entry of `tokens`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// What logs call the holder.
    pub name: String,
    /// SHA-256 of the token in hex, as `printf %s TOKEN | sha256sum` prints it.
    pub sha256: TokenHash,
    /// The project, or `*` for tokens of workers and operators.
    pub project: Scope,
    /// What it allows.
    pub roles: Vec<Role>,
}

impl TokenConfig {
    /// The entry of `token`.
    pub fn of(name: impl Into<String>, token: &str, project: Scope, roles: &[Role]) -> Self {
        Self {
            name: name.into(),
            sha256: TokenHash::of(token),
            project,
            roles: roles.to_vec(),
        }
    }

    /// Checks what the types cannot say.
    pub(crate) fn validate(&self) -> Result<(), FieldError> {
        if self.name.trim().is_empty() {
            return Err(FieldError::new("name", &self.name, "must not be empty"));
        }
        if self.roles.is_empty() {
            return Err(FieldError::new("roles", "nothing", "must name a role"));
        }
        // Calls of clients name no project: it is the token's. Workers draw from all projects, because the queue is
        // fair between them.
        let of_clients = |role: &Role| matches!(role, Role::Submit | Role::Read);
        match &self.project {
            Scope::All if self.roles.iter().any(of_clients) => Err(FieldError::new(
                "project",
                "*",
                "must be one project for the roles submit and read",
            )),
            Scope::Project(project) if self.roles.contains(&Role::Worker) => Err(FieldError::new(
                "project",
                project,
                "must be `*` for the role worker",
            )),
            _ => Ok(()),
        }
    }
}

/// All tokens.
#[derive(Clone, Debug)]
pub struct Auth {
    tokens: Vec<TokenConfig>,
}

impl Auth {
    /// Takes checked entries.
    pub fn new(tokens: Vec<TokenConfig>) -> Self {
        Self { tokens }
    }

    /// The caller's token, which allows `call`.
    pub fn admit(&self, metadata: &MetadataMap, call: Call) -> Result<&TokenConfig, ApiError> {
        let admitted = self.find(metadata).and_then(|token| {
            let needed = call.role();
            if token.roles.contains(&needed) {
                return Ok(token);
            }
            Err(ApiError::Forbidden {
                needed: needed.as_str(),
            })
        });
        admitted.inspect_err(count_failure)
    }

    /// Refuses a caller who shows no known token.
    fn know(&self, metadata: &MetadataMap) -> Result<(), ApiError> {
        let known = self.find(metadata).map(|_| ());
        known.inspect_err(count_failure)
    }

    /// Admits to calls that are about the whole system, such as those on workers, which serve every project: the
    /// token has to be for all of them.
    pub fn everything(&self, metadata: &MetadataMap, call: Call) -> Result<(), ApiError> {
        match &self.admit(metadata, call)?.project {
            Scope::All => Ok(()),
            Scope::Project(_) => {
                let error = ApiError::OneProject {
                    needed: call.role().as_str(),
                };
                count_failure(&error);
                Err(error)
            }
        }
    }

    /// The caller's project, for calls that are about one.
    pub fn project(&self, metadata: &MetadataMap, call: Call) -> Result<ProjectId, ApiError> {
        match &self.admit(metadata, call)?.project {
            Scope::Project(project) => Ok(project.clone()),
            Scope::All => Err(ApiError::Forbidden {
                needed: call.role().as_str(),
            }),
        }
    }

    /// Compares with every token, so that the time says nothing about which one came close.
    fn find(&self, metadata: &MetadataMap) -> Result<&TokenConfig, ApiError> {
        let presented = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(bearer)
            .ok_or(ApiError::Unauthenticated)?;
        let hash = TokenHash::of(presented);
        self.tokens
            .iter()
            .fold(None, |found, token| {
                let matches = token.sha256.matches(&hash);
                found.or(matches.then_some(token))
            })
            .ok_or(ApiError::Unauthenticated)
    }
}

/// Stands before the services that need a token. The message of a call may be large, and tonic reads it whole before
/// a handler runs, so a caller who is nobody is refused by the headers alone.
#[derive(Clone, Debug)]
pub struct Gate(pub Arc<Auth>);

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.0.know(request.metadata())?;
        Ok(request)
    }
}

fn count_failure(error: &ApiError) {
    let reason = match error {
        ApiError::Unauthenticated => "unauthenticated",
        _ => "forbidden",
    };
    let label = KeyValue::new(telemetry::names::attribute::ERROR_TYPE, reason);
    telemetry::metrics().auth_failures.add(1, &[label]);
}

/// The token in `Bearer TOKEN`; the scheme's case does not matter (RFC 9110).
fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use std::collections::BTreeSet;

    fn auth() -> Auth {
        let shop = Scope::Project("shop".parse().unwrap());
        Auth::new(vec![
            TokenConfig::of("ci", "s3cret", shop, &[Role::Submit]),
            TokenConfig::of("ops", "0ther", Scope::All, &[Role::Admin]),
        ])
    }

    fn bearing(header: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", header.parse().unwrap());
        metadata
    }

    #[test]
    fn the_table_has_every_call_of_the_protos() {
        let set = prost_types::FileDescriptorSet::decode(espalier_proto::DESCRIPTORS).unwrap();
        let services = set.file.iter().flat_map(|file| &file.service);
        let of_protos: BTreeSet<String> = services
            .flat_map(|service| {
                let calls = service.method.iter();
                calls.map(|call| format!("{}/{}", service.name(), call.name()))
            })
            .collect();
        let of_table: BTreeSet<String> = Call::ALL.iter().map(|(n, _)| (*n).to_owned()).collect();
        assert_eq!(of_table, of_protos);
    }

    #[test]
    fn a_token_opens_what_its_role_allows() {
        let auth = auth();
        let project = auth.project(&bearing("bearer s3cret"), Call::OpenBatch);
        assert_eq!(project.unwrap().as_str(), "shop");
        let forbidden = auth.project(&bearing("Bearer s3cret"), Call::GetJob);
        assert!(matches!(
            forbidden,
            Err(ApiError::Forbidden { needed: "read" })
        ));
        assert!(auth.admit(&bearing("Bearer 0ther"), Call::GetInfo).is_ok());
    }

    #[test]
    fn what_is_no_known_token_is_nobody() {
        let auth = auth();
        for header in [
            "",
            "Bearer",
            "Bearer ",
            "Basic s3cret",
            "Bearer s3cre",
            "s3cret",
        ] {
            let found = auth.admit(&bearing(header), Call::OpenBatch);
            assert!(matches!(found, Err(ApiError::Unauthenticated)), "{header}");
        }
        let found = auth.admit(&MetadataMap::new(), Call::OpenBatch);
        assert!(matches!(found, Err(ApiError::Unauthenticated)));
    }

    #[test]
    fn neither_token_nor_hash_is_shown() {
        let shown = format!("{:?}", auth());
        assert!(!shown.contains("s3cret"));
        assert!(shown.contains("[redacted]"));
    }
}
