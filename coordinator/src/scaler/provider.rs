//! Where workers come from: the trait that every provider implements, and what goes in and out.
//!
//! A provider makes, lists and ends *instances*: each is a machine or a process that runs one worker. It decides
//! nothing: how many there are to be is the plan's. What it is asked for it may be asked for twice, and by another
//! coordinator than the one that asked first.

use std::fmt::Debug;
use std::time::Duration;

use espalier_core::time::Timestamp;
use futures::future::BoxFuture;

/// The variable in which an instance finds its name, which its worker says when it connects.
pub const INSTANCE_VARIABLE: &str = espalier_runtime::worker::INSTANCE_VARIABLE;

/// The answer of a provider.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, ProviderError>>;

/// Makes and ends instances of the pools that its configuration names.
pub trait Provider: Send + Sync + Debug {
    /// All instances of this scaler, of earlier coordinators too, that are not gone.
    fn list(&self) -> Answer<'_, Vec<Instance>>;

    /// Asks for an instance of `pool` called `name`, which it is told as [`INSTANCE_VARIABLE`]. After an error, a lost
    /// reply among them, it is open whether there is one: [`list`](Self::list) tells.
    fn create<'a>(&'a self, pool: &'a str, name: &'a str) -> Answer<'a, ()>;

    /// Ends an instance and forgets it; that it is gone already is no error.
    fn delete<'a>(&'a self, instance: &'a Instance) -> Answer<'a, ()>;

    /// This process ends: tells instances that live no longer than it does to end. Most live on.
    fn close(&self) {}
}

/// A machine or a process that runs one worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    /// The provider's name for it, unique for ever.
    pub id: String,
    /// The pool that it was made for; it may be one that the configuration names no more.
    pub pool: String,
    /// The scaler's name for it: that of a free slot, so that an instance which was asked for twice is seen as such.
    pub name: String,
    /// How it is.
    pub state: InstanceState,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// What it costs, in $; 0: nothing.
    pub price_per_hour: f64,
}

/// How an instance is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceState {
    /// It was asked for and does not run yet.
    Starting,
    /// It runs; whether its worker works is for the coordinators to know.
    Running,
    /// It will not run, or runs no more, in the provider's words.
    Failed(String),
}

/// Why a provider did not do what it was asked to. No variant holds a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// It was asked too often.
    #[error("asked too often; to be asked again in {} s", retry_after.as_secs())]
    RateLimited {
        /// When it may be asked again, from now.
        retry_after: Duration,
    },
    /// It has none to give now.
    #[error("there is no capacity: {0}")]
    NoCapacity(String),
    /// It will not get better by itself: a wrong key, an image or a command that does not exist.
    #[error("refused: {0}")]
    Refused(String),
    /// It cannot be asked, or did not answer in time.
    #[error("unavailable: {0}")]
    Unavailable(String),
}
