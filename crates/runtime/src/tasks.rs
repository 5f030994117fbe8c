//! Named, supervised tasks, and waits that end. The only place that spawns.
//!
//! A task has a name and a meaning of its failure; a wait has a name and a deadline. Both show in logs and metrics,
//! so that nothing dies or hangs in silence. Restarting what failed is not done here: a loop that should go on
//! handles its own errors, and an orchestrator restarts a process that shut down.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinError};
use tracing::{Instrument, Span};

use crate::shutdown::Shutdown;
use crate::telemetry;

/// What it means that a task failed or panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// Expected: logged at debug level only.
    Ignore,
    /// Worth a look: logged as an error, the process goes on.
    Log,
    /// The process is of no use without it: logged as an error, and the process drains.
    ShutDown,
}

/// What a task may end with: nothing, or a result whose error is logged.
pub trait TaskOutcome: Send + 'static {
    /// The error, if there is one.
    fn into_failure(self) -> Option<Box<dyn Error + Send + Sync>>;
}

impl TaskOutcome for () {
    fn into_failure(self) -> Option<Box<dyn Error + Send + Sync>> {
        None
    }
}

impl<E> TaskOutcome for Result<(), E>
where
    E: Into<Box<dyn Error + Send + Sync>> + Send + 'static,
{
    fn into_failure(self) -> Option<Box<dyn Error + Send + Sync>> {
        self.err().map(Into::into)
    }
}

/// The tasks of one process, or of one part of it. Clones share the set.
#[derive(Clone, Debug)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shutdown: Shutdown,
    state: Mutex<State>,
    one_ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    last_id: u64,
    running: HashMap<u64, (&'static str, Option<AbortHandle>)>,
    first_failure: Option<&'static str>,
}

impl Tasks {
    /// An empty set whose [`OnFailure::ShutDown`] tasks drain `shutdown`.
    pub fn new(shutdown: Shutdown) -> Self {
        Self {
            inner: Arc::new(Inner {
                shutdown,
                state: Mutex::default(),
                one_ended: Notify::new(),
            }),
        }
    }

    /// Runs `future` as a task. A panic is a failure like an error: logged with `name`, acted on by `on_failure`.
    pub fn spawn<F>(&self, name: &'static str, on_failure: OnFailure, future: F) -> TaskHandle
    where
        F: Future + Send + 'static,
        F::Output: TaskOutcome,
    {
        self.start(name, on_failure, future, Span::current())
    }

    /// [`spawn`](Self::spawn) for a task that may outlive what started it: it does not belong to the span of its
    /// starter, which would stay open, and its trace unfinished, for as long as the task runs.
    pub fn spawn_apart<F>(&self, name: &'static str, on_failure: OnFailure, future: F) -> TaskHandle
    where
        F: Future + Send + 'static,
        F::Output: TaskOutcome,
    {
        self.start(name, on_failure, future, Span::none())
    }

    fn start<F>(
        &self,
        name: &'static str,
        on_failure: OnFailure,
        future: F,
        span: Span,
    ) -> TaskHandle
    where
        F: Future + Send + 'static,
        F::Output: TaskOutcome,
    {
        let id = self.inner.register(name);
        let registered = Registered {
            inner: Arc::clone(&self.inner),
            id,
        };
        let inner = Arc::clone(&self.inner);
        let supervised = async move {
            let registered = registered;
            let failure = match AssertUnwindSafe(future).catch_unwind().await {
                Ok(outcome) => outcome.into_failure(),
                Err(panic) => Some(panic_text(panic.as_ref()).into()),
            };
            if let Some(error) = failure {
                inner.failed(name, on_failure, error.as_ref());
            }
            drop(registered);
        };
        let abort = raw_spawn(supervised.instrument(span));
        self.inner.keep_abort_handle(id, abort.clone());
        TaskHandle { name, abort }
    }

    /// Waits for every task to end. After `deadline` the rest is aborted and its names are returned.
    pub async fn join_all(&self, deadline: Duration) -> Result<(), Unfinished> {
        let all_ended = async {
            loop {
                // Registered before the check, so that an end between check and wait is not missed.
                let ended = self.inner.one_ended.notified();
                if self.inner.lock().running.is_empty() {
                    return;
                }
                ended.await;
            }
        };
        if tokio::time::timeout(deadline, all_ended).await.is_ok() {
            return Ok(());
        }
        Err(self.abort_all(deadline))
    }

    /// How many tasks run under each name.
    pub fn running(&self) -> BTreeMap<&'static str, usize> {
        let mut names = BTreeMap::new();
        for (name, _) in self.inner.lock().running.values() {
            *names.entry(*name).or_default() += 1;
        }
        names
    }

    /// The first [`OnFailure::ShutDown`] task that failed: `main` turns it into a non-zero exit code.
    pub fn first_failure(&self) -> Option<&'static str> {
        self.inner.lock().first_failure
    }

    fn abort_all(&self, after: Duration) -> Unfinished {
        let names = self.running();
        for (_, abort) in self.inner.lock().running.values() {
            if let Some(abort) = abort {
                abort.abort();
            }
        }
        Unfinished { names, after }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that may panic runs under the lock, and the state is valid after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, name: &'static str) -> u64 {
        let mut state = self.lock();
        state.last_id += 1;
        let id = state.last_id;
        state.running.insert(id, (name, None));
        id
    }

    fn keep_abort_handle(&self, id: u64, abort: AbortHandle) {
        // A task that has already ended is no longer in the map.
        if let Some(entry) = self.lock().running.get_mut(&id) {
            entry.1 = Some(abort);
        }
    }

    fn failed(&self, name: &'static str, on_failure: OnFailure, error: &(dyn Error + 'static)) {
        let error = telemetry::error_chain(error);
        match on_failure {
            OnFailure::Ignore => tracing::debug!(task = name, error, "task failed"),
            OnFailure::Log => tracing::error!(task = name, error, "task failed"),
            OnFailure::ShutDown => {
                tracing::error!(task = name, error, "task failed: shutting down");
                self.lock().first_failure.get_or_insert(name);
                self.shutdown.drain();
            }
        }
    }
}

/// Takes a task off the list when it ends in any way: done, panicked, aborted, or dropped with its runtime.
struct Registered {
    inner: Arc<Inner>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.inner.lock().running.remove(&self.id);
        self.inner.one_ended.notify_waiters();
    }
}

/// A running task. Dropping the handle leaves the task running.
#[derive(Clone, Debug)]
pub struct TaskHandle {
    name: &'static str,
    abort: AbortHandle,
}

impl TaskHandle {
    /// The name it was spawned with.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Ends the task at its next await. Not a failure.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.abort.is_finished()
    }
}

/// Tasks that did not end in time, and were aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// How many of each name.
    pub names: BTreeMap<&'static str, usize>,
    /// How long they were waited for.
    pub after: Duration,
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tasks did not end within {:?}:", self.after)?;
        for (name, count) in &self.names {
            write!(f, " {name} ×{count}")?;
        }
        Ok(())
    }
}

impl Error for Unfinished {}

/// A wait that came to its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` did not end within {after:?}")]
pub struct DeadlineExceeded {
    /// The name of the wait.
    pub name: &'static str,
    /// How long it was allowed to take.
    pub after: Duration,
}

/// Waits for `future` for at most `after`, then drops it and counts the time-out under `name`.
pub async fn with_deadline<F: Future>(
    name: &'static str,
    after: Duration,
    future: F,
) -> Result<F::Output, DeadlineExceeded> {
    match tokio::time::timeout(after, future).await {
        Ok(output) => Ok(output),
        Err(_) => {
            telemetry::metrics().wait_timed_out(name);
            tracing::debug!(wait = name, after_s = after.as_secs_f64(), "wait timed out");
            Err(DeadlineExceeded { name, after })
        }
    }
}

/// Work off the async threads that did not come back with a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("blocking work `{name}` failed: {reason}")]
pub struct BlockingFailed {
    /// The name of the work.
    pub name: &'static str,
    /// The panic's text, or that the runtime is shutting down.
    pub reason: String,
}

/// Runs `work` on the blocking pool: for anything that computes over half a millisecond or calls blocking IO. It
/// cannot be interrupted, so bound its input.
pub async fn blocking<T, F>(name: &'static str, work: F) -> Result<T, BlockingFailed>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .map_err(|error| BlockingFailed {
            name,
            reason: join_error_text(error),
        })
}

/// Runs `work` here, with [`blocking`]'s answer to a panic: for what takes less than waking another thread.
pub fn here<T>(name: &'static str, work: impl FnOnce() -> T) -> Result<T, BlockingFailed> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).map_err(|panic| BlockingFailed {
        name,
        reason: panic_text(panic.as_ref()),
    })
}

/// How long [`block_on`] waits at the end for work off the async threads. What has a result that counts was waited for
/// before; what is left is work that somebody gave up on.
const BLOCKING_GRACE: Duration = Duration::from_secs(2);

/// Runs the one future that a process is made of, on threads of its own. Blocking work that comes to no end cannot be
/// stopped, so it is left behind: the process must be able to end.
///
/// # Errors
/// The threads cannot be started.
pub fn block_on<F: Future>(future: F) -> std::io::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let output = runtime.block_on(future);
    runtime.shutdown_timeout(BLOCKING_GRACE);
    Ok(output)
}

/// Runs `future` without a set to belong to, for the few tasks that live as long as the process.
pub(crate) fn detached(name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
    raw_spawn(async move {
        if let Err(panic) = AssertUnwindSafe(future).catch_unwind().await {
            tracing::error!(
                task = name,
                error = panic_text(panic.as_ref()),
                "task failed"
            );
        }
    });
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the module that the rule points to"
)]
fn raw_spawn(future: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    tokio::spawn(future).abort_handle()
}

fn join_error_text(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => panic_text(panic.as_ref()),
        Err(_) => "the runtime is shutting down".to_owned(),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panicked: {}", text.as_deref().unwrap_or("unknown reason"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::SubscriberExt;

    const SOON: Duration = Duration::from_secs(10);

    async fn boom() {
        panic!("boom");
    }

    #[tokio::test]
    async fn failures_act_by_their_meaning() {
        let shutdown = Shutdown::new();
        let tasks = Tasks::new(shutdown.clone());
        tasks.spawn("ok", OnFailure::ShutDown, async {});
        tasks.spawn("ignored", OnFailure::Ignore, async {
            Err::<(), _>(io::Error::other("x"))
        });
        tasks.spawn("logged", OnFailure::Log, boom());
        tasks.join_all(SOON).await.unwrap();
        assert!(!shutdown.is_draining());
        assert_eq!(tasks.first_failure(), None);

        tasks.spawn("vital", OnFailure::ShutDown, boom());
        tasks.join_all(SOON).await.unwrap();
        assert!(shutdown.is_draining());
        assert_eq!(tasks.first_failure(), Some("vital"));
    }

    struct Closed(Arc<AtomicBool>);

    impl<S: tracing::Subscriber> Layer<S> for Closed {
        fn on_close(&self, _: tracing::span::Id, _: tracing_subscriber::layer::Context<'_, S>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn a_task_apart_does_not_keep_the_span_of_its_starter_open() {
        let closed = Arc::new(AtomicBool::default());
        let subscriber = tracing_subscriber::registry().with(Closed(Arc::clone(&closed)));
        let _default = tracing::subscriber::set_default(subscriber);
        let tasks = Tasks::new(Shutdown::new());
        let forever = std::future::pending::<()>;
        let span = tracing::info_span!("rollout");
        span.in_scope(|| tasks.spawn_apart("server", OnFailure::Log, forever()));
        drop(span);
        assert!(closed.load(Ordering::SeqCst));
    }

    #[tokio::test(start_paused = true)]
    async fn join_all_names_and_ends_what_hangs() {
        let tasks = Tasks::new(Shutdown::new());
        let stuck = [
            tasks.spawn("stuck", OnFailure::Log, std::future::pending::<()>()),
            tasks.spawn("stuck", OnFailure::Log, std::future::pending::<()>()),
        ];
        tasks.spawn("done", OnFailure::Log, async {});

        let error = tasks.join_all(SOON).await.unwrap_err();
        assert_eq!(error.names, BTreeMap::from([("stuck", 2)]));
        assert!(error.to_string().ends_with("stuck ×2"), "{error}");

        tasks.join_all(SOON).await.expect("aborted tasks end");
        assert!(stuck.iter().all(TaskHandle::is_finished));
    }

    #[tokio::test]
    async fn an_aborted_task_leaves_the_list_without_failing() {
        let shutdown = Shutdown::new();
        let tasks = Tasks::new(shutdown.clone());
        let task = tasks.spawn("t", OnFailure::ShutDown, std::future::pending::<()>());
        assert_eq!(tasks.running(), BTreeMap::from([("t", 1)]));
        task.abort();
        tasks.join_all(SOON).await.unwrap();
        assert!(!shutdown.is_draining());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_at_its_deadline_with_its_name() {
        let error = with_deadline("model.chat", SOON, std::future::pending::<()>())
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "`model.chat` did not end within 10s");
        assert_eq!(with_deadline("x", SOON, async { 7 }).await, Ok(7));
    }

    #[tokio::test]
    async fn blocking_work_returns_its_value_or_its_panic() {
        assert_eq!(blocking("sum", || 1 + 1).await, Ok(2));
        assert_eq!(here("sum", || 1 + 1), Ok(2));
        let bad = || panic!("no {}", "way");
        let elsewhere = blocking::<(), _>("bad", bad).await.unwrap_err();
        let said = "blocking work `bad` failed: panicked: no way";
        for error in [elsewhere, here::<()>("bad", bad).unwrap_err()] {
            assert_eq!(error.to_string(), said);
        }
    }

    #[test]
    fn a_process_ends_though_blocking_work_does_not() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let began = std::time::Instant::now();
        let left = block_on(async {
            let work = blocking("endless", move || ended.recv().is_ok());
            with_deadline("endless", Duration::from_millis(10), work).await
        });
        assert!(left.unwrap().is_err());
        assert!(began.elapsed() >= BLOCKING_GRACE, "it was waited for");
        drop(end);
    }
}
