//! The threads that compute which ids are allowed: those of all answers of a step side by side.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::GrammarError;

/// Threads, at most. A mask takes some tens of microseconds, and a few milliseconds at most.
const THREADS_MAX: usize = 8;
/// How long a result may take, with those that wait before it: a bound of llguidance that did not hold.
const RESULT_MAX: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Some threads. They end with the last clone and their last job.
#[derive(Clone)]
pub(super) struct Threads(Sender<Job>);

impl Threads {
    /// Half of the cores, but one at least.
    pub(super) fn start() -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (jobs, received) = channel::<Job>();
        let received = Arc::new(Mutex::new(received));
        for _ in 0..(cores / 2).clamp(1, THREADS_MAX) {
            let received = Arc::clone(&received);
            std::thread::Builder::new()
                .name("espalier-masks".to_owned())
                .spawn(move || work(&received))?;
        }
        Ok(Self(jobs))
    }

    /// Begins `job`, whose result can be waited for. Not bounded here: an answer has one job at a time.
    pub(super) fn begin<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Pending<T> {
        let (send, result) = channel();
        // Where nobody waits any more, or no thread is left, whoever waits learns that.
        let _ = self.0.send(Box::new(move || {
            let _ = send.send(job());
        }));
        Pending(result)
    }
}

fn work(received: &Mutex<Receiver<Job>>) {
    loop {
        let next = received
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok(job) = next else { return };
        // What a job leaves behind when it panics is dropped with it, and whoever waits for its result learns that.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
    }
}

/// A result that comes.
pub(super) struct Pending<T>(Receiver<T>);

impl<T> Pending<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// It does not come.
    pub(super) fn wait(self) -> Result<T, GrammarError> {
        self.0.recv_timeout(RESULT_MAX).map_err(|_| {
            let reason = format!(
                "what is allowed was not known within {} s",
                RESULT_MAX.as_secs()
            );
            GrammarError::Run { reason }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_panics_is_told_and_the_thread_goes_on() {
        let threads = Threads::start().unwrap();
        for _ in 0..2 * THREADS_MAX {
            let broken = threads.begin(|| panic!("broken"));
            assert!(matches!(
                broken.wait(),
                Err::<(), _>(GrammarError::Run { .. })
            ));
        }
        let many: Vec<_> = (0..100).map(|i| threads.begin(move || i * i)).collect();
        for (i, result) in many.into_iter().enumerate() {
            assert_eq!(result.wait().unwrap(), i * i);
        }
    }
}
