//! Forgets what is old: the private objects of attempts that lost, the requests that were brought for the batch alone, then
//! the batch's rows in the queue. A batch that was left open, with all its jobs ended for as long as is kept, is closed
//! first.
//!
//! Objects go first, so that a break in between leaves rows that name the work still to be done. Meanwhile a batch may
//! be retried, or purged and opened again under its name: objects are told by the fence of their attempt, which grows
//! with the queue's time, and none of an attempt that is younger than half the time of keeping is touched. Nor are
//! requests that were written since then; `espalier generate` writes old ones again before it names them.
//!
//! What a manifest published stays. So do all other uploads: they are the user's, who may name them again. So does everything under `blobs/`, large specs included: such an object is named by
//! its content alone and belongs to the project, so that a batch which has the same job, or is submitted again, refers
//! to the one that is there. Nothing counts those references, and a spec that is gone would end a waiting job.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::{BatchId, Fence, JobKey, ProjectId};
use espalier_core::layout;
use espalier_core::queue::BatchView;
use espalier_core::time::Timestamp;
use espalier_core::trace::Manifest;
use espalier_runtime::store::{LIST_MAX, Store, StoreError};
use espalier_runtime::telemetry;

use crate::api::Shared;
use crate::queue::{PAGE_MAX, QueueError};

/// Time between two rounds: days are kept, so an hour more is nothing.
const INTERVAL: Duration = Duration::from_secs(3_600);
/// Most batches of one round; the next one takes the rest.
const BATCHES_MAX: usize = 100;

/// Why a round stopped early. The next one goes on.
#[derive(Debug, thiserror::Error)]
enum RetentionError {
    #[error("the queue could not be asked")]
    Queue(#[from] QueueError),
    #[error("objects could not be removed")]
    Store(#[from] StoreError),
}

/// Runs rounds until the process aborts.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        let round = tokio::select! {
            round = round(&shared, shared.config.keep()) => round,
            () = shared.shutdown.aborted() => return,
        };
        match round {
            Ok(0) => {}
            Ok(batches) => tracing::info!(batches, "old batches forgotten"),
            Err(error) => {
                tracing::warn!(
                    error = telemetry::error_chain(&error),
                    "retention stopped early"
                );
            }
        }
    }
}

/// One round; returns how many batches were forgotten.
async fn round(shared: &Shared, keep: Duration) -> Result<usize, RetentionError> {
    let stats = shared.queue.stats().await?;
    let mut projects: Vec<ProjectId> = stats.lines.into_iter().map(|l| l.project).collect();
    projects.dedup();
    let mut due = Vec::new();
    for project in projects {
        due.extend(due_of(shared, project, keep).await?);
    }
    let before = oldest_kept(shared.now(), keep);
    let mut cleaned = BTreeSet::new();
    for batch in in_turn(due) {
        if is_as_seen(shared, &batch).await? {
            // Before its rows: what the queue has forgotten must not be driven again.
            shared.journal.forget(&batch.project, &batch.batch).await?;
            clean(&shared.store, &batch.project, &batch.batch, before).await?;
            cleaned.insert((batch.project, batch.batch));
        }
    }
    // A client that went away never closes its batches. What it submitted has ended, and stays for as long again.
    // One that lacks what the queue lost is not idle, and takes nothing any more when it is closed.
    if shared.journal.is_whole() {
        for (project, batch) in shared.queue.close_idle(keep, BATCHES_MAX).await? {
            tracing::info!(%project, %batch, "an idle batch was closed");
        }
    }
    let purged = shared.queue.purge(keep, BATCHES_MAX).await?;
    // In place of one that was retried, the queue forgot another. Nothing names its objects but this answer.
    for (project, batch) in purged.iter().filter(|name| !cleaned.contains(name)) {
        shared.journal.forget(project, batch).await?;
        clean(&shared.store, project, batch, before).await?;
    }
    Ok(purged.len())
}

/// Attempts with a lower fence were over when this round began: a fence is never lower than the time of its grant in
/// microseconds. Half the time of keeping is more than clocks differ and than fences run ahead of the time.
fn oldest_kept(now: Timestamp, keep: Duration) -> Fence {
    let half_us = u64::try_from(keep.as_micros() / 2).unwrap_or(u64::MAX);
    Fence(now.0.saturating_sub(half_us))
}

/// Whether a batch is still the one that was found due, and nobody has retried it.
async fn is_as_seen(shared: &Shared, seen: &BatchView) -> Result<bool, QueueError> {
    let (project, batch) = (seen.project.clone(), seen.batch.clone());
    let now = shared.queue.batch(project, batch).await?;
    Ok(now.is_some_and(|now| now.seq == seen.seq && now.completed_at == seen.completed_at))
}

/// Batches of a project that have been complete for longer than `keep`.
async fn due_of(
    shared: &Shared,
    project: ProjectId,
    keep: Duration,
) -> Result<Vec<BatchView>, QueueError> {
    let now = shared.now();
    let mut due = Vec::new();
    let mut after = None;
    loop {
        let page = shared.queue.batches(project.clone(), after, PAGE_MAX);
        let page = page.await?;
        let whole = page.len() == PAGE_MAX;
        after = page.last().map(|batch| batch.batch.clone());
        let old = |batch: &BatchView| batch.completed_at.is_some_and(|at| now.since(at) >= keep);
        due.extend(page.into_iter().filter(old));
        if !whole {
            return Ok(due);
        }
    }
}

/// Those of a round, oldest first: the order in which the queue forgets, so that none is forgotten uncleaned.
fn in_turn(mut due: Vec<BatchView>) -> Vec<BatchView> {
    due.sort_unstable_by_key(|batch| (batch.completed_at, batch.seq));
    due.truncate(BATCHES_MAX);
    due
}

/// Removes what attempts of a batch wrote that no manifest names, if their fence is lower than `before`, and the requests
/// that were brought for it before then.
async fn clean(
    store: &Store,
    project: &ProjectId,
    batch: &BatchId,
    before: Fence,
) -> Result<(), StoreError> {
    clean_attempts(store, project, batch, before).await?;
    clean_uploads(store, project, batch, Timestamp(before.0)).await
}

async fn clean_uploads(
    store: &Store,
    project: &ProjectId,
    batch: &BatchId,
    before: Timestamp,
) -> Result<(), StoreError> {
    let prefix = layout::batch_uploads(project, batch);
    let mut after: Option<String> = None;
    loop {
        let page = store.list(&prefix, after.as_deref(), LIST_MAX).await?;
        for object in page.iter().filter(|object| object.modified < before) {
            store.delete(&object.path).await?;
        }
        if page.len() < LIST_MAX {
            return Ok(());
        }
        after = page.last().map(|object| object.path.clone());
    }
}

async fn clean_attempts(
    store: &Store,
    project: &ProjectId,
    batch: &BatchId,
    before: Fence,
) -> Result<(), StoreError> {
    let mut winners: BTreeMap<JobKey, Winner> = BTreeMap::new();
    let mut after: Option<String> = None;
    loop {
        let prefix = layout::batch(project, batch);
        let page = store.list(&prefix, after.as_deref(), LIST_MAX).await?;
        for object in &page {
            let attempt = layout::attempt_of(&object.path);
            let Some((key, fence)) = attempt.filter(|(_, fence)| *fence < before) else {
                continue;
            };
            let winner = match winners.get(&key) {
                Some(winner) => *winner,
                None => {
                    let winner = winner_of(store, &key).await?;
                    winners.insert(key, winner);
                    winner
                }
            };
            if winner.beats(fence) {
                store.delete(&object.path).await?;
            }
        }
        if page.len() < LIST_MAX {
            return Ok(());
        }
        after = page.last().map(|object| object.path.clone());
    }
}

/// Which attempt of a job was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Winner {
    /// The one with this fence.
    Attempt(Fence),
    /// None: every attempt lost.
    Nobody,
    /// The manifest cannot be read by this version, so nothing of the job is touched.
    Unknown,
}

impl Winner {
    fn beats(self, fence: Fence) -> bool {
        match self {
            Self::Attempt(winner) => winner != fence,
            Self::Nobody => true,
            Self::Unknown => false,
        }
    }
}

async fn winner_of(store: &Store, key: &JobKey) -> Result<Winner, StoreError> {
    match store.get(&layout::manifest(key)).await {
        Ok(bytes) => Ok(match Manifest::parse(&bytes, key) {
            Ok(manifest) => Winner::Attempt(manifest.fence),
            Err(_) => Winner::Unknown,
        }),
        Err(error) if error.is_not_found() => Ok(Winner::Nobody),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use espalier_core::layout::UploadName;
    use espalier_core::queue::{BatchSeq, Counters};

    #[test]
    fn an_attempt_since_the_decision_is_out_of_reach_and_one_that_is_due_is_not() {
        let day = Duration::from_secs(86_400);
        let now = Timestamp::from_ms(1_700_000_000_000);
        let before = oldest_kept(now, day);
        assert!(before < Fence(now.0), "granted after the round began");
        assert!(
            Fence(now.0 - 86_400_000_000) < before,
            "ended when it was due"
        );
    }

    #[tokio::test]
    async fn what_no_manifest_names_goes_and_the_rest_stays() {
        let store = Store::open("memory://").await.unwrap();
        let (project, batch) = ("shop".parse().unwrap(), "b".parse().unwrap());
        let put = async |path: String, content: &'static str| {
            store
                .put(&path, Bytes::from_static(content.as_bytes()))
                .await
                .unwrap();
            path
        };
        let key = |job: &str| -> JobKey { format!("shop/b/{job}").parse().unwrap() };
        let (dead, unreadable) = (key("dead"), key("unreadable"));
        let lost = put(layout::trace(&dead, Fence(1)), "x").await;
        put(layout::manifest(&unreadable), "{}").await;
        let unknown = put(layout::trace(&unreadable, Fence(2)), "x").await;
        let blob = put(layout::blob(&project, "ab"), "x").await;
        let retried = put(layout::trace(&dead, Fence(9)), "x").await;

        for _ in 0..2 {
            clean(&store, &project, &batch, Fence(9)).await.unwrap();
            assert!(store.head(&retried).await.is_ok(), "its job runs again");
            assert!(store.head(&lost).await.unwrap_err().is_not_found());
            assert!(store.head(&unknown).await.is_ok());
            assert!(store.head(&blob).await.is_ok());
        }
    }

    #[tokio::test]
    async fn old_requests_of_a_batch_go_and_what_users_bring_stays() {
        let store = Store::open("memory://").await.unwrap();
        let (project, batch) = ("shop".parse().unwrap(), "b".parse().unwrap());
        let put = async |name: UploadName| {
            let path = layout::upload(&project, &name);
            store.put(&path, Bytes::from_static(b"x")).await.unwrap();
            store.head(&path).await.unwrap()
        };
        let own = put(UploadName::of_batch(&batch, "ab").unwrap()).await;
        let longer = "b2".parse().unwrap();
        let others = [
            put(UploadName::of_batch(&longer, "ab").unwrap()).await,
            put(UploadName::new("b/ab.jsonl").unwrap()).await,
            put(UploadName::new("ab.jsonl").unwrap()).await,
        ];
        let clean = async |before: Timestamp| {
            let before = Fence(before.0);
            clean(&store, &project, &batch, before).await.unwrap();
        };
        clean(own.modified).await;
        store.head(&own.path).await.expect("it is as young");
        clean(Timestamp(own.modified.0 + 1)).await;
        assert!(store.head(&own.path).await.unwrap_err().is_not_found());
        clean(Timestamp(u64::MAX)).await;
        for other in others {
            store
                .head(&other.path)
                .await
                .expect("it is not the batch's");
        }
    }

    #[test]
    fn a_round_cleans_what_the_queue_forgets_first() {
        let batch = |n: u32| BatchView {
            project: "shop".parse().unwrap(),
            batch: format!("b{n:04}").parse().unwrap(),
            seq: BatchSeq(n),
            params_digest: [0; 32],
            opened_at: Timestamp(0),
            closed: true,
            cancelled: false,
            completed_at: Some(Timestamp(u64::from(10_000 - n))),
            counters: Counters::default(),
            last_end: 0,
        };
        let turn = in_turn((0..1_000).map(batch).collect());
        let names: Vec<&str> = turn.iter().map(|b| b.batch.as_str()).collect();
        assert_eq!(names.len(), BATCHES_MAX);
        assert_eq!((names[0], names[BATCHES_MAX - 1]), ("b0999", "b0900"));
    }

    #[test]
    fn a_winner_beats_every_other_attempt() {
        assert!(Winner::Attempt(Fence(2)).beats(Fence(1)));
        assert!(!Winner::Attempt(Fence(2)).beats(Fence(2)));
        assert!(Winner::Nobody.beats(Fence(1)));
        assert!(!Winner::Unknown.beats(Fence(1)));
    }
}
