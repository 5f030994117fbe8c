//! Adapters that follow their `latest`: the store is asked every few seconds which version counts, and a version that has
//! become `latest` takes the place of the one before, as a load over HTTP would let it.
//!
//! A version that cannot be had or loaded changes nothing: the one before is served on, the log and `/v1/adapters` say why,
//! and it is tried again, less and less often.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::{AdaptersError, Latest, Watch, find, pull};
use espalier_core::adapter::AdapterKind;
use espalier_core::id::{AdapterName, ProjectId};
use espalier_runtime::ids::{IdSource as _, UuidIds};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{DeadlineExceeded, with_deadline};
use espalier_runtime::telemetry::error_chain;

use super::adapters::Adapters;
use crate::api::backend::{AdapterError, Following};

/// The project of adapters that are named without one.
const PROJECT_DEFAULT: &str = "default";
/// How long one look may take, with fetching a version and loading it.
const LOOK_LIMIT: Duration = Duration::from_secs(1200);
/// Longest wait between two tries of a version that does not load.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// An adapter that is followed: `NAME`, or `PROJECT/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// Its project.
    pub project: ProjectId,
    /// Its name, also for requests.
    pub name: AdapterName,
}

impl FromStr for Followed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (project, name) = text.split_once('/').unwrap_or((PROJECT_DEFAULT, text));
        let project = project.parse().ok();
        let both = project.zip(name.parse().ok());
        let (project, name) = both.ok_or_else(|| "must be NAME or PROJECT/NAME".to_owned())?;
        Ok(Self { project, name })
    }
}

impl fmt::Display for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.name)
    }
}

/// Why a version is not served.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Adapters(#[from] AdaptersError),
    #[error(transparent)]
    Load(#[from] AdapterError),
    #[error("v{0} is a whole model, and only adapters are followed")]
    Whole(u32),
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
}

/// How far one look came.
enum Step {
    /// What is latest is served, or nothing is.
    Settled,
    /// What is latest did not load, and is not tried again yet.
    Waits,
}

/// What follows adapters.
pub(super) struct Follower {
    store: Store,
    every: Duration,
    /// Where versions lie while they are read.
    scratch: PathBuf,
    followed: Vec<Mutex<State>>,
}

/// One adapter, and how far it is followed.
#[derive(Clone)]
struct State {
    of: Followed,
    /// The newest entry that was served, or 0.
    served_seq: u64,
    /// The version that is served.
    served: Option<u32>,
    /// The version that is latest.
    latest: Option<u32>,
    /// Why that is not the one that is served.
    error: Option<String>,
    /// The entry whose version did not load, and before which moment it is not tried again.
    failed: Option<(u64, Instant)>,
    failures: u32,
}

impl Follower {
    /// Looks at `store` about `every` so often.
    pub(super) fn new(
        store: Store,
        every: Duration,
        scratch: PathBuf,
        followed: Vec<Followed>,
    ) -> Self {
        let state = |of| {
            Mutex::new(State {
                of,
                served_seq: 0,
                served: None,
                latest: None,
                error: None,
                failed: None,
                failures: 0,
            })
        };
        Self {
            store,
            every,
            scratch,
            followed: followed.into_iter().map(state).collect(),
        }
    }

    /// Follows until the process aborts.
    pub(super) async fn run(&self, adapters: &Adapters, shutdown: Shutdown) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.every) => {}
                () = shutdown.aborted() => return,
            }
            tokio::select! {
                () = self.look(adapters) => {}
                () = shutdown.aborted() => return,
            }
        }
    }

    /// Looks once at every adapter, one after the other.
    pub(super) async fn look(&self, adapters: &Adapters) {
        for followed in &self.followed {
            self.look_at(followed, adapters).await;
        }
    }

    /// What is followed, for `/v1/adapters`.
    pub(super) fn told(&self) -> Vec<Following> {
        let told = |state: &Mutex<State>| {
            let state = read(state);
            Following {
                name: state.of.name.to_string(),
                project: state.of.project.to_string(),
                served: state.served,
                latest: state.latest,
                error: state.error,
            }
        };
        self.followed.iter().map(told).collect()
    }

    async fn look_at(&self, followed: &Mutex<State>, adapters: &Adapters) {
        let mut state = read(followed);
        let looked = with_deadline("infer.follow", LOOK_LIMIT, self.step(&mut state, adapters));
        let result = Box::pin(looked).await;
        match result.map_err(FollowError::from).flatten() {
            Ok(Step::Settled) => (state.error, state.failures, state.failed) = (None, 0, None),
            Ok(Step::Waits) => {}
            Err(error) => {
                let said = error_chain(&error);
                if state.error.as_ref() != Some(&said) {
                    tracing::warn!(
                        adapter = %state.of,
                        latest = state.latest,
                        served = state.served,
                        error = said,
                        "latest is not served, and what was served is served on"
                    );
                }
                state.error = Some(said);
                state.failures = state.failures.saturating_add(1);
                let wait = self.every * 2u32.saturating_pow(state.failures.min(10));
                let wait = wait.min(WAIT_MAX).max(self.every);
                state.failed = state.failed.map(|(seq, _)| (seq, Instant::now() + wait));
            }
        }
        *followed.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Serves what has become latest since the entry that is served.
    async fn step(&self, state: &mut State, adapters: &Adapters) -> Result<Step, FollowError> {
        let Followed { project, name } = state.of.clone();
        let latest = Latest {
            store: &self.store,
            project: &project,
            name: &name,
        };
        let Some(seq) = latest.newest_after(state.served_seq).await? else {
            return Ok(Step::Settled);
        };
        // A newer entry is tried at once.
        if let Some((failed, until)) = state.failed
            && failed == seq
            && Instant::now() < until
        {
            return Ok(Step::Waits);
        }
        state.failed = Some((seq, Instant::now()));
        let version = latest.entry(seq).await?.version;
        state.latest = Some(version);
        if state.served == Some(version) {
            state.served_seq = seq;
            return Ok(Step::Settled);
        }
        let record = find(&self.store, &project, &name, Some(version)).await?;
        if record.kind == AdapterKind::Full {
            return Err(FollowError::Whole(version));
        }
        let folder = self.scratch.join(UuidIds.fresh());
        let pulled = pull(&self.store, &record, &folder, &Watch::default()).await;
        let loaded = match pulled {
            Ok(()) => {
                let place = format!("{project}/{name}@v{version}");
                let load = adapters.load_folder(name.as_str(), place, folder.clone());
                load.await.map(drop).map_err(FollowError::from)
            }
            Err(error) => Err(error.into()),
        };
        // Its numbers are in memory, or of no use.
        if let Err(error) = tokio::fs::remove_dir_all(&folder).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %folder.display(), %error, "a folder that is needed no more stays");
        }
        loaded?;
        tracing::info!(adapter = %state.of, version, "latest is served");
        (state.served_seq, state.served) = (seq, Some(version));
        Ok(Step::Settled)
    }
}

/// A copy: one look at a time changes it, and whoever reads it meanwhile sees what was before.
fn read(state: &Mutex<State>) -> State {
    state.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Follows beside the serving.
pub(super) async fn run(
    follower: Arc<Follower>,
    served: Arc<super::backend::Served>,
    shutdown: Shutdown,
) {
    follower.run(&served.adapters, shutdown).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_followed_is_named_with_its_project_or_without() {
        let read = |text: &str| text.parse::<Followed>().map(|f| f.to_string());
        assert_eq!(read("shop"), Ok("default/shop".to_owned()));
        assert_eq!(read("p/shop"), Ok("p/shop".to_owned()));
        for bad in ["", "/", "p/", "/shop", "a/b/c", "a b"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
