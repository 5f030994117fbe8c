//! What was granted and how attempts ended, told to the log line by line, for those who look afterwards whether the
//! queue kept its promises: the fault tests do, and so may an operator with a doubt.
//!
//! The lines are of one target, at debug level. While that is off, a whole batch costs one look at a flag.

use espalier_core::id::WorkerId;
use espalier_runtime::telemetry::names::target::HISTORY;
use tracing::Level;

use crate::queue::{Finish, FinishAck, Granted, Outcome};

/// Tells what the queue granted to `worker`.
pub fn granted(worker: &WorkerId, granted: &[Granted]) {
    if !tracing::enabled!(target: HISTORY, Level::DEBUG) {
        return;
    }
    for Granted { grant, .. } in granted {
        let (job, fence, attempt) = (&grant.key, grant.fence.0, grant.attempt);
        tracing::debug!(target: HISTORY, %job, fence, attempt, %worker, "granted");
    }
}

/// Tells what the queue said to the ends of attempts of `worker`.
pub fn finished(worker: &WorkerId, finishes: &[Finish], acks: &[FinishAck]) {
    if !tracing::enabled!(target: HISTORY, Level::DEBUG) {
        return;
    }
    for (finish, ack) in finishes.iter().zip(acks) {
        let (job, fence) = (&finish.key, finish.fence.0);
        let (outcome, verdict) = (outcome_name(&finish.outcome), verdict_name(ack));
        tracing::debug!(target: HISTORY, %job, fence, %worker, outcome, verdict, "finished");
    }
}

/// How an attempt ended, in a word: `succeeded`, `released`, or the class of the failure.
pub fn outcome_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Succeeded { .. } => "succeeded",
        Outcome::Failed { class, .. } => class.as_str(),
        Outcome::Released => "released",
    }
}

fn verdict_name(ack: &FinishAck) -> &'static str {
    match ack {
        FinishAck::Accepted => "accepted",
        FinishAck::AlreadyFinished => "known",
        FinishAck::Stale => "stale",
        FinishAck::Refused(_) => "refused",
    }
}
