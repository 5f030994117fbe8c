//! What a train worker does with a granted job, and what the end of an attempt is called.

use std::sync::atomic::Ordering;

use espalier_proto::v1;
use espalier_runtime::publish::{PublishError, stopped_outcome};
use espalier_runtime::telemetry::{error_chain, metrics};
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome};

use crate::attempt::Workshop;
use crate::error::TrainError;

impl Handler for Workshop {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Train
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        let _running = Running::begin();
        let stopped = context.lease().stopped();
        let attempt = Box::pin(self.attempt(&grant, &context));
        match stopped.run_until_cancelled(attempt).await {
            Some(Ok(published)) => published.into(),
            None | Some(Err(TrainError::Stopped | TrainError::Publish(PublishError::Stopped))) => {
                stopped_outcome(&context)
            }
            Some(Err(error @ TrainError::Preempted { .. })) => JobOutcome::Released {
                reason: error.to_string(),
            },
            Some(Err(error)) if error.is_of_device() => {
                // Another process may find the device well again.
                self.device_lost.store(true, Ordering::SeqCst);
                self.shutdown.drain();
                JobOutcome::failed(error.class(), error_chain(&error))
            }
            Some(Err(error)) => JobOutcome::failed(error.class(), error_chain(&error)),
        }
    }
}

/// Counts a training as running until it is dropped, however it ends.
struct Running;

impl Running {
    fn begin() -> Self {
        metrics().trainings_running.add(1, &[]);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        metrics().trainings_running.add(-1, &[]);
    }
}
