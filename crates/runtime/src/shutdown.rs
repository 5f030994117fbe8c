//! The two stages of an end. *Drain*: stop taking work, finish or hand back what is held. *Abort*: let go of
//! everything now; leases run out by themselves.
//!
//! `main` makes one [`Shutdown`] from the process's signals and gives clones to everything. This module decides
//! nothing about what draining means: each part waits on [`Shutdown::draining`] and [`Shutdown::aborted`].

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::tasks;

/// A handle to the state of the process: running, draining or aborted. Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    drain: CancellationToken,
    abort: CancellationToken,
}

impl Shutdown {
    /// Running, and ended only by [`drain`](Self::drain) and [`abort`](Self::abort). For tests and for parts inside
    /// a process.
    pub fn new() -> Self {
        Self::default()
    }

    /// Drains at the first SIGTERM or SIGINT; aborts at the second one, or when draining takes longer than
    /// `drain_limit`, however it began. Must be called within a tokio runtime.
    pub fn from_signals(drain_limit: Duration) -> std::io::Result<Self> {
        let shutdown = Self::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let watched = shutdown.clone();
        tasks::detached("shutdown.signals", async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
                _ = interrupt.recv() => tracing::info!("SIGINT: draining; once more to stop at once"),
                () = watched.draining() => {}
            }
            watched.drain();
            tokio::select! {
                _ = terminate.recv() => tracing::warn!("second signal: stopping at once"),
                _ = interrupt.recv() => tracing::warn!("second signal: stopping at once"),
                () = tokio::time::sleep(drain_limit) => {
                    tracing::warn!(drain_limit_s = drain_limit.as_secs_f64(), "draining took too long: stopping at once");
                }
                () = watched.aborted() => {}
            }
            watched.abort();
        });
        Ok(shutdown)
    }

    /// Begins to drain. Idempotent.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Ends everything now, which includes draining. Idempotent.
    pub fn abort(&self) {
        self.drain.cancel();
        self.abort.cancel();
    }

    /// Whether no more work should be taken.
    pub fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Whether everything should let go.
    pub fn is_aborted(&self) -> bool {
        self.abort.is_cancelled()
    }

    /// Waits until draining begins. Cancel-safe.
    pub async fn draining(&self) {
        self.drain.cancelled().await;
    }

    /// Waits until the abort. Cancel-safe.
    pub async fn aborted(&self) {
        self.abort.cancelled().await;
    }

    /// A token that is cancelled when draining begins; cancelling the token itself drains nothing.
    pub fn drain_token(&self) -> CancellationToken {
        self.drain.child_token()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn abort_includes_drain_and_drain_does_not_abort() {
        let shutdown = Shutdown::new();
        let seen_elsewhere = shutdown.clone();
        shutdown.drain();
        seen_elsewhere.draining().await;
        assert!(!seen_elsewhere.is_aborted());

        let shutdown = Shutdown::new();
        shutdown.abort();
        shutdown.draining().await;
        shutdown.aborted().await;
    }

    #[tokio::test]
    async fn a_token_that_was_handed_out_cannot_end_the_process() {
        let shutdown = Shutdown::new();
        shutdown.drain_token().cancel();
        assert!(!shutdown.is_draining());
    }

    #[tokio::test(start_paused = true)]
    async fn draining_for_too_long_becomes_an_abort() {
        let shutdown = Shutdown::from_signals(Duration::from_secs(30)).unwrap();
        let began = tokio::time::Instant::now();
        shutdown.drain();
        shutdown.aborted().await;
        assert_eq!(began.elapsed().as_secs(), 30);
    }
}
