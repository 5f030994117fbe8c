//! `espalier watch`: a batch's progress until it is done, then what came of it; without a batch the whole system, live.

mod live;
mod report;

use std::time::{Duration, Instant};

use clap::Args;
use espalier_core::id::{PipelineName, ProjectId};
use espalier_proto::v1;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::store::Store;
use futures::{Stream as FuturesStream, StreamExt};
use indicatif::ProgressBar;
use serde_json::json;
use tonic::{Code, Status};

use crate::client::{Client, root_cause};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, note, plain};
use crate::{json, progress, run};
pub use live::top;
pub use report::Report;

/// How long a coordinator may be away before we give up: longer than a restart takes.
const AWAY_MAX: Duration = Duration::from_secs(120);
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    max: Duration::from_secs(5),
};
/// How often a line is printed where there is no terminal for a bar.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Options of `watch`.
#[derive(Args, Clone, Debug)]
pub struct Watch {
    /// The batch, or the pipeline that `espalier run` runs; without one, queues, batches in progress and workers of all
    /// coordinators are shown live
    #[arg(value_name = "BATCH|PIPELINE")]
    pub batch: Option<String>,
    /// Seconds between two looks at the whole system [default: 1 on a terminal and with --json, else 5]
    #[arg(long, value_name = "SECONDS", conflicts_with = "batch", value_parser = clap::value_parser!(u64).range(1..=60))]
    pub every: Option<u64>,
    /// Look once and end
    #[arg(long, conflicts_with = "every")]
    pub once: bool,
    /// Of a pipeline: its project [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME", requires = "batch")]
    pub project: Option<ProjectId>,
    /// Of a pipeline: the object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL", requires = "batch")]
    pub store: Option<String>,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Watch) -> Outcome {
    let Some(batch) = &args.batch else {
        return live::run(context, args).await;
    };
    let client = context.client().await?;
    if !is_there(&client, batch).await?
        && let Some(exit) = pipeline(context, args, batch).await?
    {
        return Ok(exit);
    }
    match args.once {
        true => once(context, &client, batch).await,
        false => follow(context, &client, batch).await,
    }
}

/// Shows how far a batch is.
async fn once(context: &Context, client: &Client, batch: &str) -> Outcome {
    let request = v1::GetBatchRequest {
        batch: batch.to_owned(),
    };
    let batch = client.jobs().get_batch(request).await?.into_inner();
    let mut report = Report::default();
    report.take(v1::BatchEvent {
        batch: Some(batch),
        ..v1::BatchEvent::default()
    });
    let (batch, counts) = (&report.batch, report.counts());
    let ended = counts.succeeded + counts.dead + counts.cancelled;
    context.out.show(
        || json!({"batch": json::batch(batch)}),
        || {
            format!(
                "{}: {} of {} done, {}",
                batch.batch,
                count(ended),
                count(report.jobs()),
                status_text(&counts, 0, None)
            )
        },
    )?;
    Ok(Exit::Ok)
}

/// Whether there is a batch of this name.
async fn is_there(client: &Client, batch: &str) -> Result<bool, Problem> {
    let request = v1::GetBatchRequest {
        batch: batch.to_owned(),
    };
    match client.jobs().get_batch(request).await {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::NotFound => Ok(false),
        Err(status) => Err(status.into()),
    }
}

/// Follows the pipeline of this name, where there is one.
async fn pipeline(context: &Context, args: &Watch, name: &str) -> Result<Option<Exit>, Problem> {
    let url = match &args.store {
        Some(url) => Some(url.clone()),
        None => context.store_url()?,
    };
    let (Some(url), Ok(name)) = (url, PipelineName::new(name)) else {
        return Ok(None);
    };
    let project = match &args.project {
        Some(project) => project.clone(),
        None => context.project()?,
    };
    let store = Store::open_to_read(&url)?;
    run::watch(context, store, project, &name, args.once).await
}

/// How long a coordinator has been away.
#[derive(Debug, Default)]
struct Away {
    failures: u32,
    since: Option<Instant>,
}

impl Away {
    /// Notes that a call failed. Gives how long to wait before the next try, or the failure itself where another try
    /// would be of no use.
    fn after(&mut self, status: Status) -> Result<Duration, Status> {
        let lost = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
        );
        let since = *self.since.get_or_insert_with(Instant::now);
        if !lost || since.elapsed() > AWAY_MAX {
            return Err(status);
        }
        self.failures += 1;
        Ok(BACKOFF.jittered(self.failures))
    }

    /// Whether it is away.
    fn is_noted(&self) -> bool {
        self.failures > 0
    }
}

/// Follows a batch to its end and says what came of it.
pub async fn follow(context: &Context, client: &Client, batch: &str) -> Outcome {
    let mut watched = Watched::new(context, batch);
    let bar = watched.bar.clone();
    let take = |event: v1::BatchEvent| {
        if context.out.json {
            context.out.event(&event_json(&event))?;
        }
        watched.take(event);
        Ok(())
    };
    events(context, client, batch, take, |said| bar.set_message(said)).await?;
    bar.finish_and_clear();
    finish(context, watched.report)
}

/// Hands every event of a batch to `take`, until the batch is complete. Where the connection is lost, `say` is told, and
/// it is taken up again where it was.
pub async fn events(
    context: &Context,
    client: &Client,
    batch: &str,
    mut take: impl FnMut(v1::BatchEvent) -> Result<(), Problem>,
    mut say: impl FnMut(String),
) -> Result<(), Problem> {
    let mut stream = Stream {
        batch,
        cursor: 0,
        moved: false,
        is_complete: false,
    };
    let (mut client, mut away) = (client.clone(), Away::default());
    while !stream.is_complete {
        let Err(status) = stream.take(&client, &mut take).await? else {
            // The stream ended in good order before the batch did: the coordinator is restarting.
            tokio::time::sleep(BACKOFF.jittered(1)).await;
            continue;
        };
        // A stream that brought something counts as having been there.
        if std::mem::take(&mut stream.moved) {
            away = Away::default();
        }
        let said = plain(&format!(
            "connection lost, trying again: {}",
            root_cause(&status)
        ));
        let wait = away.after(status)?;
        say(said);
        tokio::time::sleep(wait).await;
        // An `up` that was started again may listen elsewhere.
        if let Ok(fresh) = context.client().await {
            client = fresh;
        }
    }
    Ok(())
}

/// Where the events of a batch are.
struct Stream<'a> {
    batch: &'a str,
    cursor: u64,
    moved: bool,
    is_complete: bool,
}

impl Stream<'_> {
    /// One connection, until it ends or breaks.
    async fn take(
        &mut self,
        client: &Client,
        take: &mut impl FnMut(v1::BatchEvent) -> Result<(), Problem>,
    ) -> Result<Result<(), Status>, Problem> {
        let request = v1::WatchBatchRequest {
            batch: self.batch.to_owned(),
            after_cursor: self.cursor,
        };
        match client.jobs().watch_batch(request).await {
            Ok(response) => self.read(response.into_inner(), take).await,
            Err(status) => Ok(Err(status)),
        }
    }

    /// Events until there are no more. Of a batch that is complete already they come in pages, each of which says so: only
    /// when the stream has ended in good order has every job been told of.
    async fn read(
        &mut self,
        mut events: impl FuturesStream<Item = Result<v1::BatchEvent, Status>> + Unpin,
        take: &mut impl FnMut(v1::BatchEvent) -> Result<(), Problem>,
    ) -> Result<Result<(), Status>, Problem> {
        let mut is_complete = false;
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(event) => event,
                Err(status) => return Ok(Err(status)),
            };
            self.moved = true;
            self.cursor = event.cursor;
            is_complete = event.batch.as_ref().is_some_and(|batch| batch.complete);
            take(event)?;
        }
        self.is_complete = is_complete;
        Ok(Ok(()))
    }
}

/// What has been seen of a batch.
struct Watched {
    batch: String,
    report: Report,
    bar: ProgressBar,
    lines: bool,
    last_line: Option<Instant>,
    began: Instant,
    ended_before: Option<u64>,
}

impl Watched {
    fn new(context: &Context, batch: &str) -> Self {
        let bar = progress::things(0, batch.to_owned());
        Self {
            batch: batch.to_owned(),
            report: Report::default(),
            lines: bar.is_hidden() && !context.out.json,
            bar,
            last_line: None,
            began: Instant::now(),
            ended_before: None,
        }
    }

    fn take(&mut self, event: v1::BatchEvent) {
        let questions = event.open_questions;
        self.report.take(event);
        let counts = self.report.counts();
        let ended = counts.succeeded + counts.dead + counts.cancelled;
        let ended_before = *self.ended_before.get_or_insert(ended);
        let rate = rate(ended - ended_before.min(ended), self.began.elapsed());
        let text = status_text(&counts, questions, rate);
        self.bar.set_length(self.report.jobs());
        self.bar.set_position(ended);
        self.bar.set_message(text.clone());
        if self.lines && self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.last_line = Some(Instant::now());
            note(format!(
                "{}: {} of {} done, {text}",
                self.batch,
                count(ended),
                count(self.report.jobs())
            ));
        }
    }
}

/// Jobs a minute.
fn rate(ended: u64, elapsed: Duration) -> Option<f64> {
    let minutes = elapsed.as_secs_f64() / 60.0;
    (ended > 0 && minutes > 0.0).then(|| ended as f64 / minutes)
}

fn status_text(counts: &v1::Counts, questions: u32, rate: Option<f64>) -> String {
    let waiting = counts.ready + counts.blocked + counts.delayed;
    let mut parts = vec![
        format!("{} running", count(counts.leased)),
        format!("{} waiting", count(waiting)),
    ];
    if counts.dead > 0 {
        parts.push(format!("{} dead", count(counts.dead)));
    }
    if counts.cancelled > 0 {
        parts.push(format!("{} cancelled", count(counts.cancelled)));
    }
    if let Some(rate) = rate {
        parts.push(format!("{rate:.1}/min"));
        let left_s = (waiting + counts.leased) as f64 / rate * 60.0;
        parts.push(format!(
            "{} left",
            crate::output::duration((left_s * 1000.0) as u64)
        ));
    }
    if questions > 0 {
        parts.push(format!("{questions} open questions: espalier questions"));
    }
    parts.join(" · ")
}

fn event_json(event: &v1::BatchEvent) -> serde_json::Value {
    json!({
        "batch": event.batch.as_ref().map(json::batch),
        "ended": event.ended.iter().map(json::job).collect::<Vec<_>>(),
        "cursor": event.cursor,
        "open_questions": event.open_questions,
    })
}

fn finish(context: &Context, report: Report) -> Outcome {
    let faults = report.faults();
    let store = context.up_file()?.map(|up| up.store);
    if context.out.json {
        context.out.event(&report.to_json(store.as_deref()))?;
    } else {
        context.out.line(report.to_text(store.as_deref()))?;
    }
    for fault in &faults {
        note(format!("error: {fault}"));
    }
    Ok(if faults.is_empty() {
        Exit::Ok
    } else {
        Exit::Failed
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_that_is_away_is_waited_for_and_one_that_refuses_is_not() {
        let mut away = Away::default();
        assert!(!away.is_noted());
        assert!(away.after(Status::unavailable("gone")).is_ok() && away.is_noted());
        assert!(away.after(Status::permission_denied("no")).is_err());
        away.since = Instant::now().checked_sub(AWAY_MAX + Duration::from_secs(1));
        assert!(away.since.is_some() && away.after(Status::unavailable("gone")).is_err());
    }

    #[tokio::test]
    async fn a_batch_of_several_pages_is_read_to_its_last_one() {
        let page = |cursor: u64| v1::BatchEvent {
            batch: Some(v1::Batch {
                complete: true,
                ..v1::Batch::default()
            }),
            cursor,
            ..v1::BatchEvent::default()
        };
        let mut stream = Stream {
            batch: "b",
            cursor: 0,
            moved: false,
            is_complete: false,
        };
        let mut seen = Vec::new();
        let mut take = |event: v1::BatchEvent| {
            seen.push(event.cursor);
            Ok(())
        };
        // It breaks after the first page: that the batch is complete does not end it.
        let broken = [Ok(page(500)), Err(Status::unavailable("gone"))];
        let broken = stream.read(futures::stream::iter(broken), &mut take);
        assert!(broken.await.unwrap().is_err());
        assert_eq!((stream.is_complete, stream.cursor), (false, 500));
        let rest = [Ok(page(1_000)), Ok(page(1_100))];
        let rest = stream.read(futures::stream::iter(rest), &mut take);
        assert!(rest.await.unwrap().is_ok() && stream.is_complete);
        assert_eq!(seen, [500, 1_000, 1_100]);
    }

    #[test]
    fn the_status_says_what_matters() {
        let counts = v1::Counts {
            ready: 5,
            leased: 3,
            succeeded: 12,
            dead: 1,
            ..Default::default()
        };
        let rate = rate(4, Duration::from_secs(60));
        assert_eq!(
            status_text(&counts, 2, rate),
            "3 running · 5 waiting · 1 dead · 4.0/min · 2 min 00 s left · 2 open questions: espalier questions"
        );
        assert_eq!(
            status_text(&v1::Counts::default(), 0, None),
            "0 running · 0 waiting"
        );
    }
}
