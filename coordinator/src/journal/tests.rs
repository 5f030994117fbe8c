use std::sync::Arc;

use espalier_core::queue::{JobKind, NewBatch, NewJob};
use espalier_runtime::clock::SystemClock;
use tempfile::TempDir;

use super::*;
use crate::queue::{Embedded, EmbeddedConfig, Submission};

#[tokio::test]
async fn where_the_queue_loses_nothing_nothing_is_kept() {
    let folder = TempDir::new().unwrap();
    let config = EmbeddedConfig::new(folder.path().join("queue.redb"), Arc::new(SystemClock));
    let queue: Arc<dyn Queue> = Arc::new(Embedded::open(config).unwrap());
    let store = Store::open("memory://").await.unwrap();
    let shutdown = Shutdown::new();
    let tasks = Tasks::new(shutdown.clone());
    let name = "espalier";
    let journal = Journal::start(
        Arc::clone(&queue),
        store.clone(),
        name,
        true,
        &tasks,
        &shutdown,
    );
    let (project, batch): (ProjectId, BatchId) = ("p".parse().unwrap(), "b".parse().unwrap());
    let request = OpenBatch {
        batch: NewBatch {
            project: project.clone(),
            batch: batch.clone(),
            params_digest: [0; 32],
        },
        defaults: Bytes::new(),
    };
    journal.open_batch(request).await.unwrap();
    let job = NewJob::new("a".parse().unwrap(), JobKind::Rollout, [1; 32]);
    let chunk = Chunk {
        project: project.clone(),
        batch: batch.clone(),
        n: 0,
        digest: [0; 32],
        jobs: vec![Submission {
            job,
            spec: Bytes::new(),
        }],
    };
    journal.submit(chunk, None).await.unwrap();
    let closed = journal.close_batch(project.clone(), batch.clone()).await;
    assert_eq!(closed.unwrap().counters.total(), 1);
    let all = Selector::Batch(project, batch);
    assert_eq!(journal.cancel(all).await.unwrap().cancelled, 1);
    assert_eq!(store.list("", None, 10).await.unwrap(), []);
}
