//! How a command ends: the exit code that scripts branch on, and the problem that people read.

use std::error::Error;
use std::fmt;
use std::io;

use espalier_core::error::FieldError;
use espalier_proto::status::field_error;
use espalier_runtime::config::ConfigError;
use espalier_runtime::store::StoreError;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::traces::TracesError;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::client::nobody_answered;

/// What the process ends with. Documented in `--help`; the greater one counts where two apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Jobs failed for good or were lost, or a check failed.
    Failed = 1,
    /// The command line or some of the input was refused.
    Refused = 2,
    /// The coordinator cannot be reached, or does not accept the token.
    Unreachable = 3,
}

/// What every command returns.
pub type Outcome = Result<Exit, Problem>;

/// Why a command ended early, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The exit code.
    pub exit: Exit,
    /// What was tried, on what, and why it failed. Empty where there is nobody left to read it.
    pub message: String,
    /// What to do.
    pub fix: Option<String>,
}

impl Problem {
    /// A failure.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// Input that is refused.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, message)
    }

    /// A coordinator that does not answer us.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new(Exit::Unreachable, message)
    }

    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            fix: None,
        }
    }

    /// Says what to do.
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// For `--json`.
    pub fn to_json(&self) -> Value {
        json!({"error": {"message": self.message, "fix": self.fix, "exit_code": self.exit as u8}})
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match &self.fix {
            Some(fix) => write!(f, "\n  fix: {fix}"),
            None => Ok(()),
        }
    }
}

impl Error for Problem {}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        // `espalier … | head` is no failure: the reader has seen enough.
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::new(Exit::Ok, "");
        }
        Self::failed(error.to_string())
    }
}

impl From<FieldError> for Problem {
    fn from(error: FieldError) -> Self {
        Self::refused(error.to_string())
    }
}

impl From<ConfigError> for Problem {
    fn from(error: ConfigError) -> Self {
        Self::refused(chain(&error))
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::failed(chain(&error))
    }
}

impl From<TracesError> for Problem {
    fn from(error: TracesError) -> Self {
        match &error {
            TracesError::NotPublished(job) => Self::refused(error.to_string()).fix(format!(
                "see what there is with `espalier traces list {}`",
                job.batch
            )),
            _ => Self::failed(chain(&error)),
        }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        if let Some(field) = field_error(&status) {
            return field.into();
        }
        let message = status.message().to_owned();
        match status.code() {
            // It answered, and says itself what is the matter: only a broken connection has a source.
            Code::Unavailable if status.source().is_none() => {
                Self::unreachable(message).fix("then try again: what was accepted is kept")
            }
            _ if nobody_answered(&status) => {
                Self::unreachable(format!("the coordinator does not answer: {message}"))
                    .fix("start one with `espalier up`, or try again: what was accepted is kept")
            }
            Code::Unauthenticated => Self::unreachable(message)
                .fix("set ESPALIER_TOKEN to a token that the coordinator knows"),
            Code::PermissionDenied => {
                Self::unreachable(message).fix("set ESPALIER_TOKEN to a token with that role")
            }
            Code::NotFound | Code::FailedPrecondition | Code::AlreadyExists => {
                Self::refused(message)
            }
            Code::InvalidArgument | Code::OutOfRange | Code::ResourceExhausted => {
                Self::refused(message)
            }
            code => Self::failed(format!("the coordinator failed ({code:?}): {message}")),
        }
    }
}

fn chain(error: &(dyn Error + 'static)) -> String {
    error_chain(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_proto::status::ApiError;

    #[test]
    fn statuses_become_exit_codes() {
        let cases = [
            (ApiError::Unavailable("away".to_owned()), Exit::Unreachable),
            (ApiError::Unauthenticated, Exit::Unreachable),
            (ApiError::Forbidden { needed: "submit" }, Exit::Unreachable),
            (ApiError::Conflict("closed".to_owned()), Exit::Refused),
            (ApiError::Internal("x".to_owned()), Exit::Failed),
        ];
        for (error, exit) in cases {
            assert_eq!(Problem::from(Status::from(error)).exit, exit);
        }
        let full = ApiError::Unavailable("the disk is full; free space there".to_owned());
        let problem = Problem::from(Status::from(full));
        assert_eq!(problem.message, "the disk is full; free space there");
        let field = FieldError::new("batch", "a b", "must be a name");
        let problem = Problem::from(Status::from(ApiError::Field(field)));
        assert_eq!(problem.exit, Exit::Refused);
        assert_eq!(problem.message, "`batch` must be a name, got `a b`");
    }

    #[test]
    fn a_closed_pipe_is_silent_success() {
        let problem = Problem::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((problem.exit, problem.message.as_str()), (Exit::Ok, ""));
    }
}
