//! The one table between errors and gRPC status codes. A [`FieldError`] rides along in the status' details, encoded
//! as `espalier.v1.FieldError`, so that a client need not read prose.

use espalier_core::error::FieldError;
use prost::Message;
use tonic::{Code, Status};

use crate::convert::field_error_to_wire;
use crate::v1;

/// Why a call was not answered, as far as a client has to know.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// A field of the request broke its rule.
    #[error("{0}")]
    Field(#[from] FieldError),
    /// There is no such thing, or it is another project's.
    #[error("there is no {what} `{name}`")]
    NotFound {
        /// What was asked for.
        what: &'static str,
        /// By what name.
        name: String,
    },
    /// The thing is there, and in a state that does not allow the call.
    #[error("{0}")]
    Conflict(String),
    /// No token, or one that nobody issued.
    #[error("a valid token is needed: send `authorization: Bearer TOKEN`")]
    Unauthenticated,
    /// The token's role does not allow the call.
    #[error("this call needs a token with role `{needed}`")]
    Forbidden {
        /// The role.
        needed: &'static str,
    },
    /// The call is about all projects, and the token about one.
    #[error(
        "this call needs a token with role `{needed}` and project `*`: it is about all projects"
    )]
    OneProject {
        /// The role.
        needed: &'static str,
    },
    /// Try again later.
    #[error("{0}")]
    Unavailable(String),
    /// More than the system takes on.
    #[error("{0}")]
    Exhausted(String),
    /// A fault of ours; the text says nothing that a client should not see.
    #[error("{0}")]
    Internal(String),
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let message = error.to_string();
        match error {
            ApiError::Field(field) => {
                let details = field_error_to_wire(field).encode_to_vec();
                Self::with_details(Code::InvalidArgument, message, details.into())
            }
            ApiError::NotFound { .. } => Self::not_found(message),
            ApiError::Conflict(_) => Self::failed_precondition(message),
            ApiError::Unauthenticated => Self::unauthenticated(message),
            ApiError::Forbidden { .. } | ApiError::OneProject { .. } => {
                Self::permission_denied(message)
            }
            ApiError::Unavailable(_) => Self::unavailable(message),
            ApiError::Exhausted(_) => Self::resource_exhausted(message),
            ApiError::Internal(_) => Self::internal(message),
        }
    }
}

/// The refused field that a status carries, if it carries one.
pub fn field_error(status: &Status) -> Option<FieldError> {
    if status.code() != Code::InvalidArgument || status.details().is_empty() {
        return None;
    }
    let wire = v1::FieldError::decode(status.details()).ok()?;
    Some(FieldError {
        field: wire.field,
        value: wire.value,
        rule: wire.rule,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_field_travels_in_the_status() {
        let error = FieldError::new("page_size", 5000, "must be at most 1000");
        let status = Status::from(ApiError::Field(error.clone()));
        assert_eq!(field_error(&status), Some(error));
        assert_eq!(field_error(&Status::not_found("x")), None);
    }
}
