//! Golden rows: what version 1 looks like on the disk, for as long as there are files with it.

use std::time::Duration;

use super::super::{
    JobKind, LeaseRequest, Loading, Machine, MachineConfig, NewBatch, NewJob, Outcome, Selector,
};
use super::*;
use crate::error::ErrorClass;
use crate::id::{JobKey, WorkerId};

const GOLDEN: &str = include_str!("../golden/v1.txt");
const START: Timestamp = Timestamp(1_700_000_000_000_000);

fn key(job: &str) -> JobKey {
    format!("shop/nightly/{job}").parse().unwrap()
}

/// A queue with a job in each state and with every optional part of a row.
fn sample() -> Machine {
    let mut machine = Machine::new(MachineConfig::default());
    let root = key("root");
    let new = NewBatch {
        project: root.project.clone(),
        batch: root.batch.clone(),
        params_digest: [7; 32],
    };
    machine.open_batch(START, &new).unwrap();
    let job = |id: &str| NewJob::new(key(id).job, JobKind::Rollout, [1; 32]);
    let full = NewJob {
        priority: 9,
        needs: ["gpu".to_owned(), "mcp:browser".to_owned()].into(),
        deps: vec![root.clone()],
        not_before: Some(START + Duration::from_secs(60)),
        max_runtime: Some(Duration::from_secs(600)),
        labels: [("split".to_owned(), "train".to_owned())].into(),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        ..job("full")
    };
    let late = NewJob {
        not_before: Some(START + Duration::from_secs(60)),
        ..job("late")
    };
    let first = vec![
        job("root"),
        job("dead"),
        job("done"),
        job("runs"),
        full,
        late,
        job("root"),
    ];
    let (project, batch) = (&new.project, &new.batch);
    machine
        .submit(START, project, batch, 0, [3; 32], first)
        .unwrap();
    let request = LeaseRequest {
        worker: WorkerId::new("w-1").unwrap(),
        request: 1,
        kind: JobKind::Rollout,
        offers: BTreeSet::new(),
        n: 4,
        ttl: None,
    };
    let grants = machine.lease(START, &request).unwrap();
    let failed = |class| Outcome::Failed {
        class,
        message: "no such page".into(),
        log_tail: "GET /cart\n404".into(),
        retry_after: None,
    };
    machine.finish(START, &grants[0].key, grants[0].fence, Outcome::Released);
    machine.finish(
        START,
        &grants[1].key,
        grants[1].fence,
        failed(ErrorClass::Invalid),
    );
    let done = Outcome::Succeeded { spawn: Vec::new() };
    machine.finish(START, &grants[2].key, grants[2].fence, done);
    machine.cancel(START, &Selector::Job(key("late"))).unwrap();
    machine
}

/// One line a row: table, number, row.
fn lines(changes: &Changes) -> String {
    let text = |row: &Option<Vec<u8>>| String::from_utf8(row.clone().unwrap()).unwrap();
    let mut lines = Vec::new();
    let mut jobs: Vec<_> = changes.jobs.iter().collect();
    jobs.sort_by_key(|(seq, _)| *seq);
    for (seq, row) in jobs {
        lines.push(format!("job {} {}", seq.0, text(row)));
    }
    for (seq, row) in &changes.batches {
        lines.push(format!("batch {} {}", seq.0, text(row)));
    }
    for ((batch, n), row) in &changes.chunks {
        lines.push(format!("chunk {}/{n} {}", batch.0, text(row)));
    }
    for (number, row) in &changes.rings {
        lines.push(format!("ring {number:?} {}", text(row)));
    }
    lines.push(format!("meta 0 {}", text(&changes.meta)));
    lines.join("\n") + "\n"
}

#[test]
fn rows_of_version_1_are_written_as_ever() {
    let written = lines(&sample().take_changes());
    assert_eq!(written, GOLDEN, "\n{written}");
}

#[test]
fn rows_of_version_1_are_read() {
    let rows = |table: &'static str| {
        GOLDEN.lines().filter_map(move |line| {
            let (found, rest) = line.split_once(' ')?;
            let row = &rest[rest.find('{')?..];
            (found == table).then_some(row.as_bytes())
        })
    };
    for row in rows("job") {
        let read: JobRow = decode(row).unwrap();
        assert_eq!(encode(&read), row);
    }
    for row in rows("batch") {
        decode::<BatchRow>(row).unwrap();
    }
    for row in rows("chunk") {
        decode::<ChunkRow>(row).unwrap();
    }
    for row in rows("ring") {
        decode::<RingRow>(row).unwrap();
    }
    let meta: MetaRow = decode(rows("meta").next().unwrap()).unwrap();
    assert_eq!(meta.next_job, 6);
}

#[test]
fn a_later_version_is_refused_by_name() {
    let later = br#"{"v":2,"something":"else"}"#;
    let error = decode::<MetaRow>(later).unwrap_err();
    let told = "a stored meta row has version 2; this program reads up to 1";
    assert_eq!(error.to_string(), told);
}

#[test]
fn broken_rows_are_errors() {
    assert!(decode::<MetaRow>(b"").is_err());
    assert!(decode::<BatchRow>(br#"{"v":1}"#).is_err());
    let job = GOLDEN.lines().next().unwrap();
    let row = &job.as_bytes()[job.find('{').unwrap()..];
    let mut loading = Loading::new(MachineConfig::default());
    let error = loading.job(JobSeq(0), row).unwrap_err();
    assert!(error.to_string().contains("batch 0"), "{error}");
}
