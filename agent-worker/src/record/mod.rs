//! The recorder of one rollout: steps are durable as they happen, and the finished trace becomes visible at once.
//!
//! Each step is written to a file of this machine before the rollout goes on, so that it outlives a kill of the
//! process; the file is synced at most 200 ms later, so that a power loss costs no more than that. In the background
//! the file's new lines go to the store, as a segment every 10 s or 1 MB, and raw results go there as blobs. Only the
//! manifest, created once and written last, makes anything visible ([`publish`](Recorder::publish)).
//!
//! It does not decide what is recorded (that is the rollout loop) and never removes an object. When a recorder is
//! dropped its files of this machine go away, after one try to bring the last steps to the store. After a kill the next
//! process that takes the data folder brings what is left there to the store ([`ship_leftovers`]).

mod error;
mod leftovers;
mod log;
mod publish;
mod ship;
mod spool;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use espalier_core::chat::Message;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::{
    BlobRef, FileEntry, Header, ModelCall, Outcome, Step, StopReason, ToolCallRecord, Totals,
    sha256_hex,
};
use espalier_runtime::clock::Clock;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{self, OnFailure, Tasks};

pub use error::RecordError;
pub(crate) use leftovers::ship_leftovers;
pub use spool::Spool;

use log::StepLog;
use ship::Shipment;

/// Most bytes of raw results and pictures that one rollout keeps: sixty screenshots and as many large pages. What
/// comes after is shown to the model but not kept.
const BLOB_BYTES_MAX: u64 = 256 << 20;

/// Most blobs of one rollout: the results of some hundred calls and a few pictures of each. Each is a file of this
/// machine, an object and an entry of the manifest, however small it is.
const BLOBS_MAX: usize = 2048;

/// Up to this size a blob is hashed where it is: a tenth of a millisecond, less than the way to another thread.
const HASH_INLINE_BYTES_MAX: usize = 32 << 10;

/// What recorders share.
#[derive(Clone)]
pub struct RecordContext {
    /// Where results go.
    pub store: Store,
    /// Where steps are kept until then.
    pub spool: Spool,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Where background work runs.
    pub tasks: Tasks,
}

/// Records one attempt.
pub struct Recorder {
    context: RecordContext,
    key: JobKey,
    attempt: u32,
    fence: Fence,
    spec: Option<SpecDigest>,
    log: Arc<StepLog>,
    shipment: Arc<Shipment>,
    header: Option<Box<Header>>,
    messages: Vec<Message>,
    model_calls: Vec<ModelCall>,
    tool_calls: Vec<ToolCallRecord>,
    blobs: BTreeMap<String, FileEntry>,
    blob_bytes: u64,
}

impl Recorder {
    /// Begins the recording of an attempt at a job that asks for `spec`; none where no job asks.
    pub async fn open(
        context: RecordContext,
        key: JobKey,
        attempt: u32,
        fence: Fence,
        spec: Option<SpecDigest>,
    ) -> Result<Self, RecordError> {
        let log = Arc::new(StepLog::create(context.spool.folder(&key, fence)).await?);
        let shipment = Arc::new(Shipment::new(
            context.store.clone(),
            Arc::clone(&log),
            key.clone(),
            fence,
        ));
        let work = Arc::clone(&shipment);
        context
            .tasks
            .spawn("record.ship", OnFailure::Log, async move {
                work.run().await;
            });
        Ok(Self {
            context,
            key,
            attempt,
            fence,
            spec,
            log,
            shipment,
            header: None,
            messages: Vec::new(),
            model_calls: Vec::new(),
            tool_calls: Vec::new(),
            blobs: BTreeMap::new(),
            blob_bytes: 0,
        })
    }

    /// The job that is recorded.
    pub fn key(&self) -> &JobKey {
        &self.key
    }

    /// Which attempt at the job this is.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The lease of the attempt.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The tool calls so far.
    pub fn tool_calls(&self) -> &[ToolCallRecord] {
        &self.tool_calls
    }

    /// Whether there is something to publish: a header and a word.
    pub fn has_begun(&self) -> bool {
        self.header.is_some() && !self.messages.is_empty()
    }

    /// The outcome of a conversation that broke off with its user still there: what was recorded, without a verdict.
    pub fn broken_off(&self) -> Outcome {
        let errors = self.tool_calls.iter().filter(|call| call.is_error).count();
        let sum = |tokens: fn(&ModelCall) -> u64| self.model_calls.iter().map(tokens).sum();
        let now = self.context.clock.now();
        let began = self.header.as_ref().map_or(now, |h| h.started_at_us);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Outcome {
            stop: StopReason::UserExit,
            ended_at_us: now,
            final_url: None,
            verdict: None,
            totals: Totals {
                turns: count(self.model_calls.len()),
                tool_calls: count(self.tool_calls.len()),
                tool_errors: count(errors),
                prompt_tokens: sum(|call| call.prompt_tokens),
                completion_tokens: sum(|call| call.completion_tokens),
                wall_ms: u64::try_from(now.since(began).as_millis()).unwrap_or(u64::MAX),
            },
        }
    }

    /// Records what is known before the first model call.
    pub async fn header(&mut self, header: Header) -> Result<(), RecordError> {
        let step = Step::Header(Box::new(header));
        self.write(&[&step]).await?;
        self.keep(step);
        Ok(())
    }

    /// Records a message and returns its index.
    pub async fn message(&mut self, message: Message) -> Result<usize, RecordError> {
        let step = Step::Message { message };
        self.write(&[&step]).await?;
        Ok(self.keep(step))
    }

    /// Records an assistant's message and the model call that gave it, in one write. Returns the message's index.
    pub async fn model_call(
        &mut self,
        message: Message,
        call: ModelCall,
    ) -> Result<usize, RecordError> {
        let (message, call) = (Step::Message { message }, Step::ModelCall(Box::new(call)));
        self.write(&[&message, &call]).await?;
        self.keep(call);
        Ok(self.keep(message))
    }

    /// Records a tool's message and the call that it answers, in one write. Returns the message's index.
    pub async fn tool_call(
        &mut self,
        message: Message,
        call: ToolCallRecord,
    ) -> Result<usize, RecordError> {
        let (message, call) = (Step::Message { message }, Step::ToolCall(Box::new(call)));
        self.write(&[&message, &call]).await?;
        self.keep(call);
        Ok(self.keep(message))
    }

    /// Takes a written step into the trace that is being made. Returns the index of the last message.
    fn keep(&mut self, step: Step) -> usize {
        match step {
            Step::Header(header) => self.header = Some(header),
            Step::Message { message } => self.messages.push(message),
            Step::ModelCall(call) => self.model_calls.push(*call),
            Step::ToolCall(call) => self.tool_calls.push(*call),
            Step::Outcome(_) => {}
        }
        self.messages.len().saturating_sub(1)
    }

    /// Records the end, as the last step.
    pub async fn outcome(&mut self, outcome: &Outcome) -> Result<(), RecordError> {
        self.write(&[&Step::Outcome(Box::new(outcome.clone()))])
            .await
    }

    /// Keeps `content` as a blob of the project. None where the rollout has kept as much as it may.
    pub async fn blob(
        &mut self,
        content: Bytes,
        media_type: &str,
    ) -> Result<Option<BlobRef>, RecordError> {
        let size = content.len() as u64;
        let sha256 = digest(&content).await?;
        let path = layout::blob(&self.key.project, &sha256);
        if !self.blobs.contains_key(&path) {
            if self.blob_bytes + size > BLOB_BYTES_MAX || self.blobs.len() >= BLOBS_MAX {
                tracing::warn!(job = %self.key, size, "raw result not kept: the rollout's blobs are at their limit");
                return Ok(None);
            }
            self.log.write_blob(&sha256, content).await?;
            self.blob_bytes += size;
            let entry = FileEntry {
                path: path.clone(),
                size,
                sha256: sha256.clone(),
            };
            self.blobs.insert(path, entry);
            self.shipment.add_blob(sha256.clone());
        }
        Ok(Some(BlobRef {
            sha256,
            size,
            media_type: media_type.to_owned(),
        }))
    }

    /// Writes steps at once: each write is a way to another thread and back.
    async fn write(&self, steps: &[&Step]) -> Result<(), RecordError> {
        let mut lines = Vec::new();
        for step in steps {
            serde_json::to_writer(&mut lines, step).map_err(RecordError::Encode)?;
            lines.push(b'\n');
        }
        self.log.append(lines).await?;
        self.shipment.written();
        self.sync_soon();
        Ok(())
    }

    /// Syncs the log after a moment, unless that is under way already.
    fn sync_soon(&self) {
        if !self.log.begin_sync() {
            return;
        }
        let log = Arc::clone(&self.log);
        self.context
            .tasks
            .spawn("record.sync", OnFailure::Log, async move {
                log.sync_after_delay().await
            });
    }
}

/// The name of a blob.
async fn digest(content: &Bytes) -> Result<String, RecordError> {
    if content.len() <= HASH_INLINE_BYTES_MAX {
        return Ok(sha256_hex(content));
    }
    let content = content.clone();
    Ok(tasks::blocking("record.hash", move || sha256_hex(&content)).await?)
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shipment.end();
    }
}
