//! Recorded rollouts in the place of MCP servers: their traces are read once, their answers one by one as they are asked
//! for. Which answer that is `espalier_core::trace::replay` says.

use std::collections::BTreeMap;

use bytes::Bytes;
use espalier_core::chat::ToolDef;
use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::id::{BatchId, JobId, JobKey};
use espalier_core::layout;
use espalier_core::trace::replay::{RecordedEnd, Recording, Replay};
use espalier_core::trace::{BlobRef, McpServerInfo, ReplaySource, sha256_hex};
use espalier_runtime::publish::{OfStore, patiently};
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::tasks::{BlockingFailed, blocking};
use espalier_runtime::traces::{Listed, Loaded, Traces, TracesError};
use serde_json::{Map, Value};

use crate::mcp::ToolOutcome;

/// Most memory that the calls of all recordings of a rollout take; their answers stay in the store.
const RECORDINGS_BYTES_MAX: usize = 64 << 20;

/// Why recordings cannot stand in for servers.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// What the job names cannot be used.
    #[error(transparent)]
    Refused(#[from] FieldError),
    /// A trace could not be read.
    #[error("the recording cannot be read")]
    Traces(#[from] TracesError),
    /// An answer could not be read.
    #[error("a recorded answer cannot be read")]
    Store(#[from] StoreError),
    /// An answer is not what its trace names.
    #[error("the recorded answer `{sha256}` {rule}")]
    Answer {
        /// Its name.
        sha256: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl ReplayError {
    /// What the queue has to know: what is stored is the same at the next try.
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::Store(error) | Self::Traces(TracesError::Store(error)) => {
                match error.is_not_found() {
                    true => ErrorClass::Invalid,
                    false => ErrorClass::Infra,
                }
            }
            Self::Traces(TracesError::Work(_)) | Self::Blocking(_) => ErrorClass::Infra,
            Self::Refused(_) | Self::Traces(_) | Self::Answer { .. } => ErrorClass::Invalid,
        }
    }
}

impl OfStore for ReplayError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) | Self::Traces(TracesError::Store(error)) => Some(error),
            _ => None,
        }
    }
}

/// The recordings of a rollout.
pub(super) struct Recorded {
    pub(super) tools: Vec<ToolDef>,
    pub(super) tools_sha256: String,
    pub(super) servers: Vec<McpServerInfo>,
    pub(super) browser: Option<String>,
    pub(super) sources: Vec<ReplaySource>,
    /// Of tools that a recording called: their servers, and those servers' own names of them.
    origins: BTreeMap<String, (Option<String>, Option<String>)>,
    replay: Replay,
    store: Store,
    /// The job that acts.
    key: JobKey,
}

impl Recorded {
    /// Reads the rollouts that `key` names, at least one. Those that were offered other tools than the first are left out:
    /// what they answered is of no use to who has the tools of the first.
    pub(super) async fn read(
        store: &Store,
        key: &JobKey,
        names: &[(BatchId, JobId)],
    ) -> Result<Self, ReplayError> {
        let traces = Traces::new(store.clone(), key.project.clone());
        let mut read: Option<Self> = None;
        let (mut recordings, mut bytes) = (Vec::new(), 0);
        for (i, (batch, job)) in names.iter().enumerate() {
            let job = JobKey::new(key.project.clone(), batch.clone(), job.clone());
            let field = format!("replay[{i}]");
            let loaded = load(&traces, key, job, &field).await?;
            let first = read.get_or_insert_with(|| Self::like(&loaded, store, key));
            let header = &loaded.trace.header;
            if header.tools != first.tools {
                tracing::warn!(job = %key, recording = %header.job, "a recording with other tools than the first is left out");
                continue;
            }
            first.add(&loaded);
            let work = move || Recording::of(&loaded.trace);
            let recording = blocking("replay.read", work).await?;
            bytes += recording.bytes();
            if bytes > RECORDINGS_BYTES_MAX {
                let rule = format!(
                    "must name recordings whose calls have at most {RECORDINGS_BYTES_MAX} bytes together"
                );
                return Err(FieldError::new("replay", format_args!("{bytes} bytes"), rule).into());
            }
            recordings.push(recording);
        }
        let missing = || FieldError::new("replay", "", "must name a recording");
        let mut read = read.ok_or_else(missing)?;
        read.replay = Replay::new(recordings);
        Ok(read)
    }

    /// Offers what a recording was offered.
    fn like(loaded: &Loaded, store: &Store, key: &JobKey) -> Self {
        let header = &loaded.trace.header;
        let provenance = &header.provenance;
        Self {
            tools: header.tools.clone(),
            tools_sha256: provenance.tools_sha256.clone(),
            servers: provenance.mcp_servers.clone(),
            browser: provenance.browser.clone(),
            sources: Vec::new(),
            origins: BTreeMap::new(),
            replay: Replay::new(Vec::new()),
            store: store.clone(),
            key: key.clone(),
        }
    }

    /// Takes note of one more recording.
    fn add(&mut self, loaded: &Loaded) {
        for call in &loaded.trace.tool_calls {
            let origin = (call.server.clone(), call.tool.clone());
            self.origins.entry(call.name.clone()).or_insert(origin);
        }
        let file = loaded.manifest.trace_file();
        self.sources.push(ReplaySource {
            job: loaded.trace.header.job.clone(),
            sha256: file.map(|file| file.sha256.clone()).unwrap_or_default(),
        });
    }

    pub(super) fn offers(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.function.name == name)
    }

    /// The server of a tool and the server's own name for it, as they were recorded: they are in calls alone.
    pub(super) fn origin(&self, name: &str) -> (Option<String>, Option<String>) {
        self.origins.get(name).cloned().unwrap_or_default()
    }

    /// The state that the rollout is in, where a recording was judged in it.
    pub(super) fn end(&self) -> Option<&RecordedEnd> {
        self.replay.end()
    }

    pub(super) fn final_url(&self) -> Option<String> {
        self.end().and_then(|end| end.final_url.clone())
    }

    /// What answers a call; none where it was never recorded.
    pub(super) async fn call(
        &mut self,
        name: &str,
        arguments: &Map<String, Value>,
    ) -> Result<Option<ToolOutcome>, ReplayError> {
        let Some(call) = self.replay.call(name, arguments) else {
            return Ok(None);
        };
        let call = call.clone();
        let raw = self.answer(&call.answer).await?;
        let outcome = ToolOutcome::of_raw(raw).await?;
        let refused = |reason: serde_json::Error| ReplayError::Answer {
            sha256: call.answer.sha256.clone(),
            rule: format!("must be a tool's result: {reason}"),
        };
        Ok(Some(outcome.map_err(refused)?))
    }

    async fn answer(&self, blob: &BlobRef) -> Result<Bytes, ReplayError> {
        let path = layout::blob(&self.key.project, &blob.sha256);
        let get = || async { Ok::<_, ReplayError>(self.store.get(&path).await?) };
        let bytes = patiently(&self.key, "recorded answer", get).await?;
        let (wanted, content) = (blob.sha256.clone(), bytes.clone());
        let holds = blocking("replay.digest", move || sha256_hex(&content) == wanted);
        if !holds.await? {
            return Err(ReplayError::Answer {
                sha256: blob.sha256.clone(),
                rule: format!("must have that digest, got {} other bytes", bytes.len()),
            });
        }
        Ok(bytes)
    }
}

/// A trace as it was recorded, for the job `key`: corrections change what is learned from it, not what servers answered.
/// `field` names it.
pub(crate) async fn load(
    traces: &Traces,
    key: &JobKey,
    job: JobKey,
    field: &str,
) -> Result<Loaded, ReplayError> {
    let listed = Listed { job, patches: 0 };
    let load = || async { Ok::<_, ReplayError>(traces.load(&listed).await?) };
    match patiently(key, "recording", load).await {
        Err(ReplayError::Traces(TracesError::NotPublished(job))) => {
            let rule = "must be a rollout that is published; a job may wait for it with `after`";
            Err(FieldError::new(field, job, rule).into())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::trace::{Outcome, StopReason, Verdict};
    use espalier_runtime::publish::NoLease;
    use serde_json::{Value, json};

    use super::super::RolloutError;
    use super::super::tests::{Ran, roll_as};
    use super::*;
    use crate::testing::{World, calls, says};

    /// Rolls out with servers and publishes it as `p/r/NAME`.
    async fn record(world: &World, name: &str, fields: Value) -> Outcome {
        let ran = roll_as(world, &format!("p/r/{name}"), fields).await;
        let outcome = ran.outcome.unwrap();
        let published = ran.recorder.publish(outcome.clone(), &NoLease);
        published.await.unwrap();
        outcome
    }

    /// Rolls out against recordings; the server that it names does not exist.
    async fn replay(world: &World, recordings: &[&str], verify: &Value) -> Ran {
        let fields = json!({"mcp": ["gone", "toy"], "replay": recordings, "verify": verify});
        roll_as(world, "p/b/j", fields).await
    }

    fn verdict(ran: &Ran) -> Option<&Verdict> {
        ran.outcome().verdict.as_ref()
    }

    const ADD: (&str, &str) = ("add", r#"{"a": 2, "b": 3}"#);

    /// What a notebook says that only its server knows.
    fn asks_the_server() -> Value {
        json!({"mcp": {"server": "toy", "tool": "echo", "arguments": {"text": "x"}, "text": {"equals": "x"}}})
    }

    #[tokio::test]
    async fn recordings_answer_as_their_servers_did() {
        let world = World::new().await;
        let turns = || {
            [
                calls(&[ADD, ("fail", "{}")]),
                calls(&[("picture", "{}")]),
                says("5"),
            ]
        };
        world.model.will(turns());
        let verify = json!({"all": [{"answer": {"equals": "5"}}, asks_the_server()]});
        let live = roll_as(&world, "p/r/j", json!({"verify": verify})).await;
        let recorded = live.outcome().clone();
        assert_eq!(recorded.verdict.as_ref().unwrap().reward, 1.0);
        let messages = live.recorder.messages().to_vec();
        let made = live.recorder.tool_calls().to_vec();
        live.recorder
            .publish(recorded.clone(), &NoLease)
            .await
            .unwrap();
        let tools = |n: usize| world.model.asked()[n]["tools"].clone();

        world.model.will(turns());
        let mut fields = json!({"mcp": ["gone", "toy"], "replay": ["r/j"], "verify": verify});
        fields["tools"] = json!({"ask": ["*"]});
        let again = roll_as(&world, "p/b/j", fields).await;
        assert_eq!(again.recorder.messages(), messages);
        assert_eq!(tools(0), tools(3), "what is offered is what was offered");
        assert_eq!(again.outcome().verdict, recorded.verdict);
        for (was, is) in made.iter().zip(again.recorder.tool_calls()) {
            let kept = |call: &espalier_core::trace::ToolCallRecord| {
                let shown = (
                    call.shown_tokens,
                    call.truncated,
                    call.is_error,
                    call.decision,
                );
                (
                    call.raw.clone(),
                    call.images.clone(),
                    call.server.clone(),
                    shown,
                )
            };
            assert_eq!(kept(is), kept(was));
        }
        assert_eq!(again.recorder.tool_calls().len(), 3);
    }

    #[tokio::test]
    async fn a_call_that_was_never_recorded_ends_the_rollout() {
        let world = World::new().await;
        world.model.will([calls(&[ADD]), says("5")]);
        record(&world, "j", json!({})).await;
        let other = ("add", r#"{"a": 2, "b": 4}"#);
        world.model.will([calls(&[ADD, other, ADD])]);
        let ran = replay(&world, &["r/j"], &json!({"answer": {"equals": "5"}})).await;
        assert_eq!(ran.outcome().stop, StopReason::Unrecorded);
        assert_eq!(
            verdict(&ran),
            None,
            "nobody knows how it would have gone on"
        );
        assert_eq!(ran.shown(), ["5"]);
        assert_eq!(ran.outcome().totals.tool_calls, 1);
        // What is no call of a server is told to the model as ever.
        world
            .model
            .will([calls(&[("subtract", "{}"), ("add", "[1]"), ADD]), says("5")]);
        let ran = replay(&world, &["r/j"], &json!({"answer": {"equals": "5"}})).await;
        assert_eq!(verdict(&ran).unwrap().reward, 1.0);
        assert_eq!(ran.shown().len(), 3);
    }

    #[tokio::test]
    async fn checks_of_the_world_are_known_where_a_recording_was_judged() {
        let world = World::new().await;
        let check = asks_the_server();
        world.model.will([calls(&[ADD]), says("5")]);
        record(&world, "j", json!({"verify": check})).await;
        let both = json!({"all": [{"answer": {"equals": "5"}}, check]});
        for (turns, verify, expected) in [
            (vec![calls(&[ADD]), says("5")], &both, Some(1.0)),
            // It ends before the call after which the recording was judged.
            (vec![says("5")], &both, None),
            (vec![says("6")], &both, Some(0.0)),
            (vec![says("6")], &check, None),
            (
                vec![calls(&[ADD]), says("5")],
                &json!({"url": {"contains": "x"}}),
                Some(0.0),
            ),
            (
                vec![says("5")],
                &json!({"any": [{"answer": {"equals": "5"}}, check]}),
                Some(1.0),
            ),
        ] {
            world.model.will(turns);
            let ran = replay(&world, &["r/j"], verify).await;
            assert_eq!(verdict(&ran).map(|it| it.reward), expected, "{verify}");
            let stop = match expected {
                Some(_) => StopReason::Answered,
                None => StopReason::Unrecorded,
            };
            assert_eq!(ran.outcome().stop, stop, "{verify}");
        }
    }

    #[tokio::test]
    async fn a_recording_that_is_not_there_is_refused() {
        let world = World::new().await;
        let ran = replay(&world, &["r/none"], &json!({"answer": {"equals": "5"}})).await;
        let error = ran.outcome.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Invalid);
        let RolloutError::Replay(error) = error else {
            panic!("{error}")
        };
        assert_eq!(
            error.to_string(),
            "`replay[0]` must be a rollout that is published; a job may wait for it with `after`, got `p/r/none`"
        );
    }

    #[tokio::test]
    async fn a_recording_with_other_tools_is_left_out() {
        let world = World::new().await;
        world.model.will([says("5"), says("5"), says("5")]);
        record(&world, "few", json!({"tools": {"allow": ["echo"]}})).await;
        record(&world, "all", json!({})).await;
        record(&world, "more", json!({})).await;
        let key: JobKey = "p/b/j".parse().unwrap();
        let batch: BatchId = "r".parse().unwrap();
        let names = ["all", "few", "more"].map(|name| (batch.clone(), name.parse().unwrap()));
        let read = Recorded::read(&world.record.store, &key, &names).await;
        let read = read.unwrap();
        let sources: Vec<String> = read.sources.iter().map(|it| it.job.to_string()).collect();
        assert_eq!(sources, ["p/r/all", "p/r/more"], "as the trace will say");
        assert!(read.offers("add"));
    }
}
