//! Rollouts a minute of a running `espalier up`: a file of jobs from submission to the end of the last one.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::Problem;
use crate::submit::file::{Additions, JobFile};
use crate::submit::{pair, send, stamp};
use crate::watch::Report;

/// Options of `bench rollouts`.
#[derive(Args, Clone, Debug)]
pub struct Rollouts {
    /// Jobs, as `espalier submit` takes them
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What ${KEY} stands for in the jobs' texts; may be given several times
    #[arg(long = "var", value_name = "KEY=VALUE", value_parser = pair)]
    pub vars: Vec<(String, String)>,
}

/// Measures.
pub async fn measure(context: &Context, args: &Rollouts) -> Result<Value, Problem> {
    let client = context.client().await?;
    let batch = BatchId::new(format!("bench-{}", stamp(SystemClock.now())))?;
    let additions = Additions {
        vars: args.vars.iter().cloned().collect(),
        ..Additions::default()
    };
    let file = JobFile::open(&args.file, additions)?;
    let began = Instant::now();
    let sent = send(&client, &batch, file, true).await?;
    if sent.refused > 0 {
        return Err(Problem::refused(format!(
            "{} jobs of {} were refused",
            sent.refused,
            args.file.display()
        ))
        .fix("`espalier submit` shows which and why"));
    }
    let mut report = Report::default();
    let request = v1::WatchBatchRequest {
        batch: batch.to_string(),
        after_cursor: 0,
    };
    let mut events = client.jobs().watch_batch(request).await?.into_inner();
    while !report.batch.complete {
        let event = events.message().await?;
        report.take(event.ok_or_else(|| Problem::failed("the coordinator ended the watch early"))?);
    }
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    let faults = report.faults();
    if !faults.is_empty() {
        return Err(Problem::failed(faults.join("; ")));
    }
    Ok(json!({
        "batch": batch,
        "rollouts": sent.accepted,
        "seconds": minutes * 60.0,
        "rollouts_per_min": sent.accepted as f64 / minutes,
        "report": report.to_json(None)["report"]["kinds"],
    }))
}
