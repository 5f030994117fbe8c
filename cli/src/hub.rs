//! What commands share that push to the Hugging Face hub: names of repositories, the token, and what is said at the end.

use espalier_core::spec::is_hub_repo;
use espalier_runtime::hub::{HubError, HubSettings};
use espalier_runtime::telemetry::error_chain;
use serde_json::json;

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, note};

/// A repository, as an argument.
pub fn repo(text: &str) -> Result<String, String> {
    match is_hub_repo(text) {
        true => Ok(text.to_owned()),
        false => Err("must be OWNER/NAME, of A-Z a-z 0-9 . _ -".to_owned()),
    }
}

/// The hub of this terminal, with its token.
pub fn settings(context: &Context) -> Result<HubSettings, Problem> {
    let hub = HubSettings::new(&context.environment);
    match hub.token {
        Some(_) => Ok(hub),
        None => Err(Problem::refused("there is no token for the hub")
            .fix("set HF_TOKEN to one that may write, or HF_TOKEN_PATH to a file with it")),
    }
}

impl From<HubError> for Problem {
    fn from(error: HubError) -> Self {
        Self::failed(error_chain(&error))
    }
}

/// What came of a push.
#[derive(Clone, Debug)]
pub struct Pushed<'a> {
    /// What went out, as programs call it: `adapter` or `dataset`.
    pub kind: &'static str,
    /// Its name.
    pub name: &'a str,
    /// Its version.
    pub version: u32,
    /// The repository.
    pub repo: &'a str,
    /// Where people look at it.
    pub page: String,
    /// The commit that has all of it.
    pub commit: String,
    /// Whether something changed.
    pub changed: bool,
    /// Whether everybody can see it.
    pub is_public: bool,
    /// Whether that was asked for.
    pub public: bool,
    /// Files that it has.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Pushed<'_> {
    /// Says it.
    pub fn report(&self, context: &Context) -> Outcome {
        if self.is_public && !self.public {
            note(format!(
                "{} was there already, and everybody can see it",
                self.repo
            ));
        }
        let Self {
            name,
            version,
            page,
            commit,
            ..
        } = self;
        context.out.show(
            || {
                json!({
                    self.kind: name, "version": version, "repo": self.repo, "page": page, "commit": commit,
                    "changed": self.changed, "public": self.is_public,
                    "files": self.files, "bytes": self.bytes,
                })
            },
            || match self.changed {
                true => format!(
                    "{name}@v{version} is at {page}: {} files, {} bytes, commit {commit}",
                    self.files,
                    count(self.bytes)
                ),
                false => format!("{page} had all of {name}@v{version} already, since commit {commit}"),
            },
        )?;
        Ok(Exit::Ok)
    }
}
