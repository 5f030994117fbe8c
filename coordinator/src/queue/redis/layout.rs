//! The keys and values of a small queue, as the golden file has them: a change of the layout shows here, and needs a
//! version that older programs refuse.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::ErrorClass;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId, WorkerId};
use espalier_core::queue::{JobKind, LeaseRequest, NewBatch, NewJob};
use espalier_runtime::clock::ManualClock;
use espalier_testbed::redis::RedisServer;
use redis::{Cmd, Value};

use super::ConnectError;
use super::core::LAYOUT;
use super::decode::{Reader, bytes, text};
use super::link::Link;
use super::tests::{START, open, try_open};
use crate::queue::{
    Chunk, Finish, FinishAck, JobResult, OpenBatch, Outcome, Queue, Renewal, Submission,
};

fn job(id: &str) -> NewJob {
    NewJob::new(JobId::new(id).unwrap(), JobKind::Rollout, [7; 32])
}

/// One job in every state, with everything that a job may carry.
fn jobs() -> Vec<NewJob> {
    let key = |id: &str| format!("p/b/{id}").parse::<JobKey>().unwrap();
    let mut jobs: Vec<NewJob> = ["ok", "dead", "runs", "cancelled", "ready"].map(job).into();
    jobs.push(NewJob {
        deps: vec![key("runs"), key("ok")],
        ..job("blocked")
    });
    jobs.push(NewJob {
        not_before: Some(START + Duration::from_secs(60)),
        priority: 9,
        needs: ["gpu".to_owned(), "mcp:browser".to_owned()].into(),
        max_attempts: 1,
        max_infra: 2,
        max_runtime: Some(Duration::from_secs(5)),
        labels: [("split".to_owned(), "test".to_owned())].into(),
        traceparent: Some("00-1-2-01".to_owned()),
        ..job("delayed")
    });
    jobs
}

async fn fill(queue: &dyn Queue) {
    let (project, batch) = (ProjectId::new("p").unwrap(), BatchId::new("b").unwrap());
    let request = OpenBatch {
        batch: NewBatch {
            project: project.clone(),
            batch: batch.clone(),
            params_digest: [9; 32],
        },
        defaults: Bytes::from("defaults"),
    };
    queue.open_batch(request).await.unwrap();
    let submission = |job: NewJob| Submission {
        spec: Bytes::from(format!("spec of {}", job.id)),
        job,
    };
    let chunk = Chunk {
        project: project.clone(),
        batch: batch.clone(),
        n: 3,
        digest: [1; 32],
        jobs: jobs().into_iter().map(submission).collect(),
    };
    queue.submit(chunk).await.unwrap();
    let cancelled = espalier_core::queue::Selector::Job("p/b/cancelled".parse().unwrap());
    queue.cancel(cancelled).await.unwrap();
    let request = LeaseRequest {
        worker: WorkerId::new("w").unwrap(),
        request: 5,
        kind: JobKind::Rollout,
        offers: Default::default(),
        n: 3,
        ttl: None,
    };
    let granted = queue.lease(request).await.unwrap();
    let end = |n: usize, outcome| Finish {
        key: granted[n].grant.key.clone(),
        fence: granted[n].grant.fence,
        outcome,
    };
    let result = JobResult {
        summary: Bytes::from(vec![0, 1, 255]),
        manifest: "p/manifest.json".to_owned(),
    };
    let succeeded = Outcome::Succeeded {
        result,
        spawn: Vec::new(),
    };
    let failed = Outcome::Failed {
        class: ErrorClass::Invalid,
        message: "no such page".to_owned(),
        log_tail: "404".to_owned(),
        retry_after: None,
    };
    let acks = queue.finish(vec![end(0, succeeded), end(1, failed)]).await;
    assert_eq!(acks.unwrap(), [FinishAck::Accepted, FinishAck::Accepted]);
    let renewal = Renewal {
        key: granted[2].grant.key.clone(),
        fence: granted[2].grant.fence,
        progress: Some("turn 3".to_owned()),
    };
    queue.renew(vec![renewal]).await.unwrap();
    queue.close_batch(project, batch).await.unwrap();
}

/// The fields of a job's row, which is a map in MessagePack.
const ROW: &str = "
    local fields = {}
    for name, value in pairs(cmsgpack.unpack(redis.call('GET', KEYS[1]))) do
        fields[#fields + 1] = name
        fields[#fields + 1] = type(value) == 'number' and string.format('%.0f', value) or value
    end
    return fields";

/// Every key with its value, ordered, a line each; what is no text is escaped.
async fn dump(link: &Link) -> String {
    let ask = |args: &[&[u8]]| {
        let mut cmd = Cmd::new();
        for arg in args {
            cmd.arg(*arg);
        }
        async move { link.run(&cmd).await.unwrap() }
    };
    let mut keys = Vec::new();
    let mut all = Reader::of(ask(&[b"KEYS", b"*"]).await).unwrap();
    while !all.is_empty() {
        keys.push(all.bytes().unwrap());
    }
    keys.sort_unstable();
    let mut dump = String::new();
    for key in keys {
        let sort = text(ask(&[b"TYPE", &key]).await).unwrap();
        let _ = writeln!(dump, "{} ({sort})", key.escape_ascii());
        let (entries, width) = match sort.as_str() {
            "string" if key.starts_with(b"{test:0}:j:") => {
                (list(ask(&[b"EVAL", ROW.as_bytes(), b"1", &key]).await), 2)
            }
            "string" => (vec![bytes(ask(&[b"GET", &key]).await).unwrap()], 1),
            "hash" => (list(ask(&[b"HGETALL", &key]).await), 2),
            "set" => (list(ask(&[b"SMEMBERS", &key]).await), 1),
            "zset" => (
                list(ask(&[b"ZRANGE", &key, b"0", b"-1", b"WITHSCORES"]).await),
                2,
            ),
            "list" => (list(ask(&[b"LRANGE", &key, b"0", b"-1"]).await), 1),
            other => panic!("no value of the queue is a {other}"),
        };
        let mut lines: Vec<String> = entries
            .chunks(width)
            .map(|entry| {
                let parts = entry.iter().map(|part| part.escape_ascii().to_string());
                parts.collect::<Vec<_>>().join(" = ")
            })
            .collect();
        lines.sort_unstable();
        lines.iter().for_each(|line| {
            let _ = writeln!(dump, "    {line}");
        });
    }
    dump
}

fn list(value: Value) -> Vec<Bytes> {
    let mut list = Reader::of(value).unwrap();
    let mut entries = Vec::new();
    while !list.is_empty() {
        entries.push(list.bytes().unwrap());
    }
    entries
}

#[tokio::test]
async fn the_layout_is_that_of_the_golden_file() {
    let server = RedisServer::start_with(&[("appendfsync", "no")]).await;
    let clock = Arc::new(ManualClock::new(START));
    let queue = open(&server.url(), Some(clock), 1).await;
    fill(queue.as_ref()).await;
    let found = dump(&queue.shards[0].core.link).await;
    let golden = include_str!("golden/layout-v2.txt");
    assert!(
        found == golden,
        "the layout has changed: give it the next version (`LAYOUT`), say how the old one is read, and make this the \
         golden file:\n{found}"
    );
}

#[tokio::test]
async fn a_queue_that_another_version_wrote_is_refused() {
    let server = RedisServer::start_with(&[("appendfsync", "no")]).await;
    drop(open(&server.url(), None, 1).await);
    for other in [LAYOUT - 1, LAYOUT + 1] {
        let version = other.to_string();
        server.cli(&["HSET", "{test:0}:m", "v", &version]).await;
        let refused = try_open(&server.url(), None, 1).await.err().unwrap();
        assert!(matches!(refused, ConnectError::OtherLayout { found } if found == other));
        let kept = server.cli(&["HGET", "{test:0}:m", "v"]).await;
        assert_eq!(kept.trim(), version);
    }
    let refused = try_open(&server.url(), None, 2).await.err().unwrap();
    assert!(matches!(
        refused,
        ConnectError::Shards { found: 1, asked: 2 }
    ));
}
