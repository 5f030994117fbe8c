//! Faults that a test asks a [`Store`](super::Store) to show: full disks, stores that are away, hang, or lose their
//! reply. Production stores carry none.

use std::fmt;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::{Error, Result};

/// What happens to one try of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The backend fails in a way that may pass.
    Unavailable,
    /// No space is left.
    Full,
    /// Permission is denied.
    Denied,
    /// No answer comes; nothing happens.
    Hang,
    /// The operation is performed, and then the answer is lost.
    LoseReply,
    /// The operation is performed, so much later.
    Late(Duration),
}

type Plan = dyn FnMut(&'static str, &str) -> Option<Fault> + Send;

/// Decides, for each try, whether a fault shows. Clones share the plan.
#[derive(Clone)]
pub struct Faults(Arc<Mutex<Box<Plan>>>);

impl Faults {
    /// Asks `plan` with the operation's name (`create`, `put`, `get`, …) and the path.
    pub fn new(plan: impl FnMut(&'static str, &str) -> Option<Fault> + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Box::new(plan))))
    }

    /// Replaces the plan, so that a fault may begin and end while a test runs.
    pub fn set(&self, plan: impl FnMut(&'static str, &str) -> Option<Fault> + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(plan);
    }

    pub(super) fn decide(&self, operation: &'static str, path: &str) -> Option<Fault> {
        let mut plan = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        plan(operation, path)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faults")
    }
}

impl Fault {
    /// Performs `operation` with the fault.
    pub(super) async fn perform<T>(self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        let kind = match self {
            Self::Unavailable => ErrorKind::ConnectionReset,
            Self::Full => ErrorKind::StorageFull,
            Self::Denied => ErrorKind::PermissionDenied,
            Self::Hang => std::future::pending().await,
            Self::LoseReply | Self::Late(_) => {
                if let Self::Late(by) = self {
                    tokio::time::sleep(by).await;
                }
                let answer = operation.await;
                if self != Self::LoseReply {
                    return answer;
                }
                ErrorKind::ConnectionReset
            }
        };
        Err(Error::Generic {
            store: "faults",
            source: Box::new(std::io::Error::from(kind)),
        })
    }
}
