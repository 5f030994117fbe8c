//! Why RunPod did not do what it was asked to. No error holds the key, or a value of a pod's environment.

use std::time::Duration;

use espalier_runtime::tasks::DeadlineExceeded;
use espalier_runtime::telemetry::error_chain;

use crate::scaler::provider::ProviderError;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The key cannot be shown, or there are no authorities to trust.
    #[error("requests to RunPod cannot be made: {0}")]
    Client(String),
    /// It cannot be reached, or the connection broke.
    #[error("{what}: RunPod cannot be reached at {at}")]
    Unreachable {
        /// What was asked.
        what: &'static str,
        /// Its address.
        at: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It did not answer in time.
    #[error("{what}: RunPod does not answer")]
    Late {
        /// What was asked.
        what: &'static str,
        /// The wait.
        #[source]
        source: DeadlineExceeded,
    },
    /// It was asked too often.
    #[error("{what}: RunPod asks to wait for {} s", retry_after.as_secs())]
    RateLimited {
        /// What was asked.
        what: &'static str,
        /// How long, from now.
        retry_after: Duration,
    },
    /// It answered, and said no.
    #[error("{what}: RunPod refuses with {status}{}", after_colon(says))]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The status.
        status: u16,
        /// In its own words.
        says: String,
    },
    /// Its answer is not what its description has.
    #[error("{what}: RunPod's answer {rule}")]
    Malformed {
        /// What was asked.
        what: &'static str,
        /// The rule that it breaks.
        rule: String,
    },
}

fn after_colon(says: &str) -> String {
    match says.is_empty() {
        true => String::new(),
        false => format!(": {says}"),
    }
}

impl ApiError {
    /// Whether what was asked may have been done although it failed.
    pub fn may_be_done(&self) -> bool {
        match self {
            Self::Unreachable { source, .. } => !source.is_connect() && !source.is_builder(),
            Self::Late { .. } | Self::Malformed { .. } => true,
            Self::Refused { status, .. } => *status >= 500,
            Self::Client(_) | Self::RateLimited { .. } => false,
        }
    }

    /// Whether the same may succeed when it is asked again.
    pub fn passes(&self) -> bool {
        match self {
            Self::Unreachable { source, .. } => !source.is_builder(),
            Self::Late { .. } => true,
            Self::Refused { status, .. } => *status >= 500,
            Self::RateLimited { .. } | Self::Client(_) | Self::Malformed { .. } => false,
        }
    }

    /// Whether another type of GPU may be had where this one was refused: RunPod has no other sign of a lack of capacity
    /// than 400, and 403 is of the pool that the GPU is in.
    pub fn is_of_the_gpu(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                status: 400 | 403,
                ..
            }
        )
    }
}

impl From<ApiError> for ProviderError {
    fn from(error: ApiError) -> Self {
        let text = error_chain(&error);
        match error {
            ApiError::RateLimited { retry_after, .. } => Self::RateLimited { retry_after },
            ApiError::Unreachable { .. } | ApiError::Late { .. } | ApiError::Malformed { .. } => {
                Self::Unavailable(text)
            }
            ApiError::Refused { status, .. } => match status {
                401 => Self::Refused(format!("{text}; the key must be one of the account")),
                402 => Self::Refused(format!("{text}; the account needs credit")),
                403 => Self::Refused(format!(
                    "{text}; give the key the right to read and write pods"
                )),
                500.. => Self::Unavailable(text),
                _ => Self::Refused(text),
            },
            ApiError::Client(_) => Self::Refused(text),
        }
    }
}
