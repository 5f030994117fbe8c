//! A worker that does nothing: every job that it is granted has succeeded at once.

use std::sync::Arc;
use std::time::Instant;

use espalier_core::layout;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_proto::v1::worker_message::Message as Said;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::ledger::Ledger;
use super::submit;
use crate::client::{Client, Target};
use crate::exit::Problem;

/// Messages to the coordinator that may wait: a worker answers each of its messages with at most two.
const OUTBOX_MAX: usize = 64;
/// Grants that may wait to be looked at, in measurements of time.
pub const GRANTS_MAX: usize = 1024;

/// What a worker is told.
#[derive(Clone)]
pub struct Orders {
    /// Its name.
    pub name: String,
    /// How many jobs it takes at once.
    pub credit: u32,
    /// Where grants and answers to results are counted.
    pub ledger: Arc<Ledger>,
    /// Where the moments of grants go, if anybody wants them.
    pub granted: Option<mpsc::Sender<Instant>>,
    /// When to leave.
    pub leave: CancellationToken,
}

/// Works until it is told to leave.
pub async fn work(target: Target, orders: Orders) -> Result<(), Problem> {
    let client = Client::connect(&target, None).await?;
    let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
    let say = |message| v1::WorkerMessage {
        message: Some(message),
    };
    let gone = |_| Problem::failed("the coordinator ended a worker's stream");
    outbox.send(say(hello(&orders))).await.map_err(gone)?;
    outbox
        .send(say(credit(orders.credit)))
        .await
        .map_err(gone)?;
    let mut incoming = client
        .worker()
        .session(ReceiverStream::new(messages))
        .await?
        .into_inner();
    loop {
        let message = tokio::select! {
            () = orders.leave.cancelled() => return Ok(()),
            message = incoming.message() => message?,
        };
        let Some(message) = message.and_then(|message| message.message) else {
            return if orders.leave.is_cancelled() {
                Ok(())
            } else {
                Err(gone_early())
            };
        };
        match message {
            Message::Grants(grants) => {
                if let Some(granted) = &orders.granted {
                    for _ in &grants.grants {
                        // A measurement that is over does not look any more.
                        let _ = granted.try_send(Instant::now());
                    }
                }
                for grant in &grants.grants {
                    orders.ledger.granted(job_number(grant.lease.as_ref()));
                }
                let count = u32::try_from(grants.grants.len()).unwrap_or(u32::MAX);
                outbox.send(say(results(grants)?)).await.map_err(gone)?;
                outbox.send(say(credit(count))).await.map_err(gone)?;
            }
            Message::ResultAcks(acks) => {
                let mut accepted = 0;
                for ack in &acks.acks {
                    let counts = ack.verdict() == v1::result_ack::Verdict::Accepted;
                    let number = job_number(ack.lease.as_ref());
                    orders.ledger.answered(number, counts);
                    accepted += usize::from(counts);
                }
                orders.ledger.tell(accepted);
            }
            _ => {}
        }
    }
}

fn job_number(lease: Option<&v1::Lease>) -> Option<usize> {
    submit::number(&lease?.job)
}

fn gone_early() -> Problem {
    Problem::failed("the coordinator ended a worker's stream")
}

fn hello(orders: &Orders) -> Said {
    Said::Hello(v1::Hello {
        worker: orders.name.clone(),
        kinds: vec![v1::JobKind::Rollout.into()],
        capacity: orders.credit,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    })
}

fn credit(jobs: u32) -> Said {
    Said::Credit(v1::Credit {
        kind: v1::JobKind::Rollout.into(),
        jobs,
    })
}

fn results(grants: v1::Grants) -> Result<Said, Problem> {
    let done = |grant: v1::Grant| {
        let lease = grant.lease.unwrap_or_default();
        let manifest = layout::manifest(&lease.job.parse()?);
        let success = v1::Success {
            manifest,
            summary: Some(v1::RolloutSummary {
                stop: "answered".to_owned(),
                ..Default::default()
            }),
            spawn: Vec::new(),
        };
        Ok::<_, Problem>(v1::Result {
            lease: Some(lease),
            outcome: Some(v1::result::Outcome::Success(success)),
        })
    };
    let results = grants
        .grants
        .into_iter()
        .map(done)
        .collect::<Result<_, _>>()?;
    Ok(Said::Results(v1::Results { results }))
}
