//! A worker that keeps its job: how soon it hears of a cancel, and how soon its job is granted again once its
//! connection is cut without a word, as by a kill.

use std::time::{Duration, Instant};

use espalier_core::id::BatchId;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_proto::v1::worker_message::Message as Said;
use espalier_runtime::tasks::with_deadline;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::stack::{PROJECT, Stack};
use crate::bench::submit;
use crate::client::{Client, Target};
use crate::exit::Problem;
use crate::submit::open;

/// Longest wait for anything that a coordinator is to say.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A session of a worker that holds one job at most.
struct Holder {
    outbox: mpsc::Sender<v1::WorkerMessage>,
    incoming: Streaming<v1::CoordinatorMessage>,
}

impl Holder {
    async fn connect(target: &Target, name: String) -> Result<Self, Problem> {
        let client = Client::connect(target, None).await?;
        let (outbox, messages) = mpsc::channel(8);
        let hello = v1::Hello {
            worker: name,
            kinds: vec![v1::JobKind::Rollout.into()],
            capacity: 1,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        let credit = v1::Credit {
            kind: v1::JobKind::Rollout.into(),
            jobs: 1,
        };
        for message in [Said::Hello(hello), Said::Credit(credit)] {
            let message = v1::WorkerMessage {
                message: Some(message),
            };
            let _ = outbox.send(message).await;
        }
        let messages = ReceiverStream::new(messages);
        let incoming = client.worker().session(messages).await?.into_inner();
        Ok(Self { outbox, incoming })
    }

    /// The next message that `wanted` takes, and when it came.
    async fn next<T>(
        &mut self,
        mut wanted: impl FnMut(Message) -> Option<T>,
    ) -> Result<(T, Instant), Problem> {
        let waiting = async {
            while let Some(message) = self.incoming.message().await? {
                if let Some(found) = message.message.and_then(&mut wanted) {
                    return Ok((found, Instant::now()));
                }
            }
            Err(Problem::failed("the coordinator ended a worker's stream"))
        };
        with_deadline("bench.hold", ANSWER_LIMIT, waiting)
            .await
            .map_err(|timeout| Problem::failed(timeout.to_string()))?
    }

    async fn granted(&mut self) -> Result<(v1::Lease, Instant), Problem> {
        self.next(|message| match message {
            Message::Grants(grants) => grants.grants.into_iter().next()?.lease,
            _ => None,
        })
        .await
    }

    async fn cancelled(&mut self) -> Result<Instant, Problem> {
        let heard = self.next(|message| matches!(message, Message::Cancels(_)).then_some(()));
        Ok(heard.await?.1)
    }

    async fn finish(&mut self, lease: v1::Lease, class: v1::ErrorClass) -> Result<(), Problem> {
        let failure = v1::Failure {
            error: Some(v1::JobError {
                class: class.into(),
                message: "as asked".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let result = v1::Result {
            lease: Some(lease),
            outcome: Some(v1::result::Outcome::Failure(failure)),
        };
        let results = v1::Results {
            results: vec![result],
        };
        let message = v1::WorkerMessage {
            message: Some(Said::Results(results)),
        };
        let _ = self.outbox.send(message).await;
        let acked = self.next(|message| matches!(message, Message::ResultAcks(_)).then_some(()));
        acked.await.map(drop)
    }
}

async fn submit_one(client: &Client, batch: &BatchId, n: usize) -> Result<(), Problem> {
    let chunk = v1::SubmitChunkRequest {
        batch: batch.to_string(),
        chunk: u32::try_from(n).unwrap_or(u32::MAX),
        jobs: vec![submit::job(n)],
    };
    submit::send(client, vec![chunk]).await
}

/// For each of `rounds` running jobs: from the client's call to the word at its worker, who is at the other
/// coordinator where there are two.
pub async fn cancels(stack: &Stack, rounds: usize) -> Result<Vec<Duration>, Problem> {
    let client = stack.client(PROJECT, 1).await?;
    let batch = BatchId::new("cancel")?;
    open(&client, &batch, v1::JobSpec::default()).await?;
    let mut heard = Vec::with_capacity(rounds);
    for n in 0..rounds {
        let mut worker = Holder::connect(&stack.worker(0), format!("holder-{n}")).await?;
        submit_one(&client, &batch, n).await?;
        let (lease, _) = worker.granted().await?;
        let job = v1::JobRef {
            batch: batch.to_string(),
            id: submit::job(n).id.unwrap_or_default(),
        };
        let request = v1::CancelRequest {
            target: Some(v1::cancel_request::Target::Job(job)),
        };
        let began = Instant::now();
        client.jobs().cancel(request).await?;
        heard.push(worker.cancelled().await?.duration_since(began));
        worker.finish(lease, v1::ErrorClass::Cancelled).await?;
    }
    Ok(heard)
}

/// For each of `rounds` jobs whose worker is gone: from its grant to its next one, at a worker that waits.
pub async fn losses(stack: &Stack, rounds: usize) -> Result<Vec<Duration>, Problem> {
    let client = stack.client(PROJECT, 0).await?;
    let batch = BatchId::new("killed")?;
    open(&client, &batch, v1::JobSpec::default()).await?;
    let mut waits = Vec::with_capacity(rounds);
    for n in 0..rounds {
        let mut killed = Holder::connect(&stack.worker(0), format!("killed-{n}")).await?;
        submit_one(&client, &batch, n).await?;
        let (lost, first) = killed.granted().await?;
        let mut heir = Holder::connect(&stack.worker(0), format!("heir-{n}")).await?;
        drop(killed);
        let (lease, second) = heir.granted().await?;
        if lease.job != lost.job || lease.fence <= lost.fence {
            return Err(Problem::failed(format!(
                "{} was granted under fence {} after {} under {}",
                lease.job, lease.fence, lost.job, lost.fence
            )));
        }
        waits.push(second.duration_since(first));
        heir.finish(lease, v1::ErrorClass::Invalid).await?;
    }
    Ok(waits)
}
