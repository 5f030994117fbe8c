//! What every backend of the queue must do, as named scenarios over `dyn Queue`.
//!
//! A backend gives a function that makes a [`Fixture`] and calls [`conformance_tests`] with it, which makes one test
//! of each scenario. The suite looks only through the trait, so that two backends which pass are interchangeable.

pub mod cancel;
pub mod deps;
pub mod durable;
pub mod finish;
pub mod lease;
pub mod order;
pub mod peers;
pub mod read;
pub mod submit;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::id::{BatchId, Fence, JobId, JobKey, ProjectId, WorkerId};
use espalier_core::queue::{
    BatchView, Event, ItemResult, JobKind, JobView, LeaseRequest, NewBatch, NewJob, StateName,
};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, ManualClock};
use futures::future::BoxFuture;
use sha2::{Digest, Sha256};
use tokio::sync::broadcast::Receiver;

use super::{
    Chunk, ChunkReply, Finish, FinishAck, Granted, JobResult, OpenBatch, Outcome, Queue,
    QueueError, Submission,
};

/// How a queue's process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// In good order.
    Closed,
    /// By SIGKILL, or a power cut: what was not synced is gone.
    Killed,
}

/// Ends the queue that it is given and opens what is left of it.
pub type Reopen = Box<dyn Fn(Arc<dyn Queue>, Ending) -> BoxFuture<'static, Arc<dyn Queue>> + Send>;

/// A fresh queue whose clock the scenario moves.
pub struct Fixture {
    pub queue: Arc<dyn Queue>,
    pub clock: Arc<ManualClock>,
    pub reopen: Reopen,
}

/// One test of each scenario, on fixtures that `$fixture()` makes.
macro_rules! conformance_tests {
    ($fixture:path) => {
        $crate::queue::conformance::scenarios!($fixture,
            cancel: waiting_jobs_are_cancelled_at_once,
            cancel: running_jobs_are_asked_to_stop,
            cancel: a_cancelled_job_that_expires_is_cancelled,
            cancel: a_label_cancels_across_batches,
            cancel: a_cancelled_batch_takes_no_more,
            cancel: ended_jobs_stay_as_they_are,
            deps: a_job_waits_for_what_it_needs,
            deps: the_end_of_one_is_the_end_of_all_behind_it,
            deps: dependencies_reach_across_batches,
            deps: cycles_and_missing_ones_are_rejected_alone,
            deps: a_requeue_brings_back_what_died_with_it,
            deps: a_requeue_waits_for_what_stays_dead,
            deps: spawned_jobs_join_with_the_finish,
            deps: a_refused_spawn_changes_nothing,
            durable: what_was_answered_survives_a_kill,
            durable: leases_survive_a_restart_with_a_fresh_term,
            durable: fences_grow_over_restarts_and_clock_steps,
            durable: order_and_fairness_survive_a_restart,
            durable: a_closed_queue_says_so,
            finish: a_repeated_finish_is_one_finish,
            finish: an_old_fence_changes_nothing,
            finish: handler_failures_spend_attempts,
            finish: infrastructure_failures_spend_another_budget,
            finish: invalid_is_dead_at_once_and_keeps_its_error,
            finish: a_release_spends_nothing,
            finish: a_retry_waits_as_long_as_it_was_told,
            finish: results_come_back,
            finish: one_bad_finish_spoils_no_other,
            lease: a_lost_reply_is_repeated_for_a_while,
            lease: an_expired_lease_goes_to_another_with_a_greater_fence,
            lease: a_renewed_lease_holds,
            lease: a_run_too_long_is_a_failure_of_the_handler,
            lease: a_late_finish_counts_until_somebody_reaps,
            lease: an_outage_is_not_a_mass_expiry,
            lease: a_worker_gets_only_what_it_can_do,
            lease: limits_are_refused_by_field,
            lease: grants_carry_what_was_submitted,
            order: higher_priority_first_then_submission,
            order: a_small_tenant_beside_a_big_one_waits_its_share,
            order: a_tenant_that_calls_everything_urgent_starves_nobody,
            order: a_returning_tenant_has_no_credit,
            order: delayed_jobs_wait_for_their_moment,
            order: a_wake_up_names_the_lane,
            peers: what_a_coordinator_shows_all_see,
            peers: who_is_silent_too_long_is_seen_no_more,
            peers: a_list_is_read_as_it_is_now,
            peers: what_is_told_reaches_whoever_listens,
            read: lists_page_by_name,
            read: filters_look_at_state_kind_and_label,
            read: a_watcher_resumes_after_what_it_saw,
            read: complete_batches_are_purged_and_no_others,
            read: statistics_count_by_project_and_kind,
            read: delayed_jobs_are_told_by_kind_when_they_are_due_soon,
            read: what_is_unknown_is_none,
            read: the_newest_batches_come_first_and_page_by_number,
            submit: a_project_has_so_many_open_batches_until_idle_ones_are_closed,
            submit: a_chunk_again_has_no_second_effect,
            submit: a_chunk_again_is_judged_by_what_the_caller_lets_through,
            submit: what_was_rejected_may_come_in_when_the_reason_has_gone,
            submit: a_job_again_is_the_same_job,
            submit: each_job_is_judged_alone,
            submit: a_batch_again_is_the_same_batch,
            submit: a_closed_batch_refuses_new_chunks_only,
            submit: a_batch_is_complete_when_closed_and_done,
            submit: needs_that_one_project_makes_up_take_no_room_of_others,
        );
    };
}

macro_rules! scenarios {
    ($fixture:path, $($part:ident: $name:ident,)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                let run = $crate::queue::conformance::$part::$name($fixture().await);
                // A scenario that hangs has to say which one it is.
                let limit = std::time::Duration::from_secs(50);
                tokio::time::timeout(limit, run).await.expect(stringify!($name));
            }
        )*
    };
}

pub(crate) use {conformance_tests, scenarios};

const SECOND: Duration = Duration::from_secs(1);

fn project(name: &str) -> ProjectId {
    ProjectId::new(name).unwrap()
}

fn batch_id(name: &str) -> BatchId {
    BatchId::new(name).unwrap()
}

/// `project/batch/job`.
fn key(text: &str) -> JobKey {
    text.parse().unwrap()
}

fn new_job(id: &str) -> NewJob {
    NewJob::new(JobId::new(id).unwrap(), JobKind::Rollout, [1; 32])
}

fn submission(job: NewJob) -> Submission {
    let spec = Bytes::from(format!("spec of {}", job.id));
    Submission { job, spec }
}

/// What stands for the digest of the request that brought `jobs`.
fn digest_of(jobs: &[NewJob]) -> [u8; 32] {
    let ids: Vec<_> = jobs.iter().map(|job| job.id.as_str()).collect();
    Sha256::digest(ids.join(" ")).into()
}

fn failed(class: ErrorClass) -> Outcome {
    Outcome::Failed {
        class,
        message: "it broke".into(),
        log_tail: "last line".into(),
        retry_after: None,
    }
}

fn succeeded() -> Outcome {
    Outcome::Succeeded {
        result: JobResult::default(),
        spawn: Vec::new(),
    }
}

fn lease_request(worker: &str, n: u32) -> LeaseRequest {
    LeaseRequest {
        worker: WorkerId::new(worker).unwrap(),
        request: 0,
        kind: JobKind::Rollout,
        offers: Default::default(),
        n,
        ttl: None,
    }
}

/// Where each job of the chunk ended: accepted, there, or the field that was wrong.
fn verdicts(reply: &ChunkReply) -> Vec<&str> {
    let word = |item: &'static str| item;
    reply
        .items
        .iter()
        .map(|item| match item {
            ItemResult::Accepted => word("accepted"),
            ItemResult::AlreadyThere => word("there"),
            ItemResult::Rejected(FieldError { field, .. }) => field,
        })
        .collect()
}

impl Fixture {
    async fn open(&self, project_name: &str, batch: &str) -> BatchView {
        let request = OpenBatch {
            batch: NewBatch {
                project: project(project_name),
                batch: batch_id(batch),
                params_digest: [9; 32],
            },
            defaults: Bytes::from(format!("defaults of {batch}")),
        };
        self.queue.open_batch(request).await.unwrap()
    }

    async fn close(&self, project_name: &str, batch: &str) -> BatchView {
        let closed = self
            .queue
            .close_batch(project(project_name), batch_id(batch));
        closed.await.unwrap()
    }

    async fn try_submit(
        &self,
        project_name: &str,
        batch: &str,
        n: u32,
        jobs: Vec<NewJob>,
    ) -> Result<ChunkReply, QueueError> {
        let chunk = Chunk {
            project: project(project_name),
            batch: batch_id(batch),
            n,
            digest: digest_of(&jobs),
            jobs: jobs.into_iter().map(submission).collect(),
        };
        self.queue.submit(chunk).await
    }

    /// Submits to batch `b` of project `p`.
    async fn submit(&self, n: u32, jobs: Vec<NewJob>) -> ChunkReply {
        self.try_submit("p", "b", n, jobs).await.unwrap()
    }

    /// Opens batch `b` of project `p` with plain jobs.
    async fn with_jobs(&self, ids: &[&str]) {
        self.open("p", "b").await;
        let reply = self
            .submit(0, ids.iter().map(|id| new_job(id)).collect())
            .await;
        assert!(reply.items.iter().all(|item| *item == ItemResult::Accepted));
    }

    async fn lease(&self, n: u32) -> Vec<Granted> {
        self.queue.lease(lease_request("w", n)).await.unwrap()
    }

    /// The names of the jobs that `n` grants are of.
    async fn lease_ids(&self, n: u32) -> Vec<String> {
        let grants = self.lease(n).await;
        let ids = grants.iter().map(|g| g.grant.key.job.to_string());
        ids.collect()
    }

    /// Leases one job and ends it.
    async fn run_one(&self, outcome: Outcome) -> Granted {
        let granted = self.lease(1).await.remove(0);
        let ack = self.finish(&granted, outcome).await;
        assert_eq!(ack, FinishAck::Accepted);
        granted
    }

    async fn finish(&self, granted: &Granted, outcome: Outcome) -> FinishAck {
        self.finish_as(&granted.grant.key, granted.grant.fence, outcome)
            .await
    }

    async fn finish_as(&self, key: &JobKey, fence: Fence, outcome: Outcome) -> FinishAck {
        let finish = Finish {
            key: key.clone(),
            fence,
            outcome,
        };
        self.queue.finish(vec![finish]).await.unwrap().remove(0)
    }

    async fn job(&self, text: &str) -> JobView {
        let found = self.queue.job(key(text)).await.unwrap();
        found.unwrap_or_else(|| panic!("{text} is not there")).job
    }

    async fn state(&self, text: &str) -> StateName {
        self.job(text).await.state.name()
    }

    async fn batch(&self) -> BatchView {
        let found = self.queue.batch(project("p"), batch_id("b")).await;
        found.unwrap().unwrap()
    }

    async fn tick(&self) {
        while self.queue.tick(1_000).await.unwrap().more {}
    }

    fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The next event that `wanted` lets through. Events are hints that may be on their way for a moment.
    async fn event(events: &mut Receiver<Event>, wanted: impl Fn(&Event) -> bool) -> Event {
        loop {
            let next = tokio::time::timeout(10 * SECOND, events.recv());
            let event = next.await.expect("no such event").unwrap();
            if wanted(&event) {
                return event;
            }
        }
    }

    async fn reopened(self, how: Ending) -> Self {
        let queue = (self.reopen)(self.queue, how).await;
        Self { queue, ..self }
    }
}
