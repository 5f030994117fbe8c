//! What the hub refuses, and what goes wrong on the way to it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use espalier_core::error::ErrorClass;

use crate::tasks::{BlockingFailed, DeadlineExceeded};

/// What an answer of the hub means that is none of success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 401: no token, or one that it does not know.
    Token,
    /// 403: the token may not do this.
    Forbidden,
    /// 404: not there, or hidden from this token.
    Missing,
    /// 409, 412: there already, or changed meanwhile.
    Conflict,
    /// 408, 429 and 5xx, for as long as was tried: it may pass.
    Busy,
    /// Anything else.
    Other,
}

impl Refusal {
    pub(super) fn of(status: u16) -> Self {
        match status {
            401 => Self::Token,
            403 => Self::Forbidden,
            404 => Self::Missing,
            409 | 412 => Self::Conflict,
            408 | 429 | 500..=599 => Self::Busy,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token => "it wants a token that it knows: set HF_TOKEN",
            Self::Forbidden => "the token may not do this: it needs the right to write there",
            Self::Missing => "there is no such thing, or the token may not see it",
            Self::Conflict => "somebody else changed it meanwhile, or it is there already",
            Self::Busy => "it is busy or broken, and was asked several times",
            Self::Other => "it does not take this",
        })
    }
}

/// Why the hub did not do what it was asked. No message holds the token or a signed address.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It said no.
    #[error("the hub answered {status} to {what}: {refusal}{}", quoted(says))]
    Refused {
        /// What was asked, and of which repository.
        what: String,
        /// The status of HTTP.
        status: u16,
        /// What it means.
        refusal: Refusal,
        /// What it says itself, shortened.
        says: String,
    },
    /// It did not answer, or the connection broke, as often as was tried.
    #[error("the hub cannot be reached for {what}")]
    Unreachable {
        /// What was asked.
        what: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Nothing moved for a while, as often as was tried.
    #[error("{what} stopped: nothing moved for {after_s} s")]
    Stalled {
        /// What was on its way.
        what: String,
        /// For how long.
        after_s: u64,
    },
    /// An answer that says something else than it should.
    #[error("the hub's answer to {what} {rule}")]
    Malformed {
        /// What was asked.
        what: String,
        /// The rule that the answer breaks.
        rule: String,
    },
    /// A name that leads out of its folder.
    #[error("file `{name}` must be a path of plain names below the repository")]
    Name {
        /// The name.
        name: String,
    },
    /// A file that changed while it was sent.
    #[error("{} must stay as it is until it is uploaded, and it changed", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// More than a commit takes.
    #[error("{what} must be at most {max}, is {found}")]
    TooMuch {
        /// Of what.
        what: String,
        /// How much it may be.
        max: u64,
        /// How much it is.
        found: u64,
    },
    /// What came is not what was promised.
    #[error("{file} of {repo} is damaged: {what} must be {expected}, is {found}; it was removed")]
    Damaged {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
        /// Size or digest.
        what: &'static str,
        /// As promised.
        expected: String,
        /// As it came.
        found: String,
    },
    /// A file of this machine cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The authorities cannot be used.
    #[error("{} must hold certificates in PEM", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
    },
    /// The token cannot be a header.
    #[error("the token of the hub must be printable ASCII")]
    Token,
    /// The client cannot be made.
    #[error("the client of the hub cannot be made")]
    Client(#[source] reqwest::Error),
    /// A folder for what is fetched is needed.
    #[error("no folder for what is fetched: set `--download-dir`, HF_HOME or HOME")]
    NoCache,
    /// The hub is not to be asked.
    #[error("HF_HUB_OFFLINE is set: the hub is not asked for {what}")]
    Offline {
        /// What was wanted.
        what: String,
    },
    /// A question that was not answered in time.
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

fn quoted(says: &str) -> String {
    match says {
        "" => String::new(),
        says => format!(" (it says: {says})"),
    }
}

impl HubError {
    /// What it means for a job.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Refused {
                refusal: Refusal::Busy | Refusal::Conflict,
                ..
            }
            | Self::Unreachable { .. }
            | Self::Stalled { .. }
            | Self::Late(_)
            | Self::File { .. }
            | Self::Blocking(_) => ErrorClass::Infra,
            Self::Malformed { .. } | Self::Damaged { .. } | Self::Changed { .. } => {
                ErrorClass::Handler
            }
            // Asked again it says the same, until a person acts.
            Self::Refused { .. }
            | Self::Name { .. }
            | Self::TooMuch { .. }
            | Self::Ca { .. }
            | Self::Token
            | Self::Client(_)
            | Self::NoCache
            | Self::Offline { .. } => ErrorClass::Invalid,
        }
    }

    /// Whether the hub said that it is not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.refused_as(Refusal::Missing)
    }

    pub(super) fn refused_as(&self, wanted: Refusal) -> bool {
        matches!(self, Self::Refused { refusal, .. } if *refusal == wanted)
    }
}
