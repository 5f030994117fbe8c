//! A job as a client writes it, before any check.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::compare::CompareDraft;
use super::curate::CurateDraft;
use super::export::ExportDraft;
use super::mcp::{McpServer, ToolPolicy};
use super::score::ScoreDraft;
use super::train::TrainDraft;
use super::verify::VerifyDraft;
use crate::error::FieldError;

/// A job as a client writes it. Numbers are wide and signed, so that a value out of range meets our rule and not the
/// parser's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobDraft {
    /// Unique within the batch; given by the coordinator where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// 0 (last) to 9 (first); default 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i64>,
    /// Free-form names for filters and cancels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Jobs that must succeed first: `job` of this batch, or `batch/job`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Tags that a worker must offer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<String>,
    /// Milliseconds to wait after submission.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<i64>,
    /// How often the handler may fail; default 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<i64>,
    /// How often infrastructure may fail; default 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_infra: Option<i64>,
    /// Seconds that one attempt may take; default 3600, a day for requests, a week for training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_runtime_s: Option<i64>,
    /// W3C trace context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,

    /// The task that this is a try at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<String>,
    /// The family of tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_kind: Option<String>,
    /// `train`, `eval` or a name of the user's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Rollouts that are compared with each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Which sample of the task this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_index: Option<i64>,
    /// What the user says: one text, or a list of turns.
    #[serde(skip_serializing_if = "PromptDraft::is_absent")]
    pub prompt: PromptDraft,
    /// A system text that is part of the task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// A system text that helps, and that training leaves out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<String>,
    /// The model's name at its endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// How tokens are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingDraft>,
    /// Names of configured servers, or servers of the job's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mcp: Vec<McpUseDraft>,
    /// Rollouts, as `batch/job`, whose recorded answers stand in for the servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replay: Vec<String>,
    /// Which tools are offered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<ToolPolicy>,
    /// Where the rollout is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsDraft>,
    /// What the model is shown of results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observation: Option<ObservationDraft>,
    /// How the rollout is judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyDraft>,

    /// Requests to be answered, in place of a rollout: of the fields from `task_id` on none may stand beside it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generate: Option<GenerateDraft>,
    /// A model to be trained, in place of either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainDraft>,

    /// A version of an adapter that goes out, in place of all of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<ExportDraft>,

    /// A data set to be built, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curate: Option<CurateDraft>,

    /// Rollouts to be compared, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compare: Option<CompareDraft>,

    /// Recorded rollouts whose turns a model is asked for, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<ScoreDraft>,
}

/// See [`super::GenerateSpec`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `GenerateSpec`")]
pub struct GenerateDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

impl JobDraft {
    /// The same without what names the job or its submission, or decides when and how often it is tried.
    pub(super) fn without_schedule(&self) -> Self {
        Self {
            id: None,
            priority: None,
            delay_ms: None,
            max_attempts: None,
            max_infra: None,
            max_runtime_s: None,
            traceparent: None,
            ..self.clone()
        }
    }
}

/// One prompt or a list of user turns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PromptDraft {
    /// One turn.
    One(String),
    /// Several turns.
    Turns(Vec<String>),
    /// Not given.
    #[default]
    Absent,
}

impl PromptDraft {
    fn is_absent(&self) -> bool {
        *self == Self::Absent
    }

    /// The turns.
    pub fn turns(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Turns(turns) => turns,
            Self::Absent => &[],
        }
    }
}

/// See [`super::Sampling`]; what is absent takes Qwen3's recommended value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `Sampling`")]
pub struct SamplingDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens: Option<i64>,
}

/// See [`super::Limits`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `Limits`")]
pub struct LimitsDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turns: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wall_s: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls_per_turn: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_s: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ask_s: Option<i64>,
}

/// See [`super::Observation`]; at most one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `Observation`")]
pub struct ObservationDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat_chars: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact_tokens: Option<i64>,
}

/// A configured server's name, or a server of the job's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum McpUseDraft {
    /// A name from the worker's configuration.
    Named(String),
    /// A server in the form of an `mcpServers` entry, with its name beside it.
    Inline {
        /// The name under which its tools appear.
        name: String,
        /// How it is started or reached.
        server: McpServer,
    },
}

/// By hand, because serde tells of an untagged enum only that nothing matched, and not which key was wrong.
impl<'de> Deserialize<'de> for McpUseDraft {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Inline {
            name: String,
            server: McpServer,
        }

        struct NameOrInline;

        impl<'de> Visitor<'de> for NameOrInline {
            type Value = McpUseDraft;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a server, or an object of `name` and `server`")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<McpUseDraft, E> {
                Ok(McpUseDraft::Named(name.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<McpUseDraft, A::Error> {
                let Inline { name, server } = Inline::deserialize(MapAccessDeserializer::new(map))?;
                Ok(McpUseDraft::Inline { name, server })
            }
        }

        deserializer.deserialize_any(NameOrInline)
    }
}

/// A file of jobs in TOML: what they share, and each of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutFile {
    /// Stored once; each job's own words come on top.
    pub defaults: JobDraft,
    /// The jobs.
    pub jobs: Vec<JobDraft>,
}

/// Reads one line of a JSONL file of jobs. The bytes come from outside and may be anything.
pub fn parse_line(line: &[u8]) -> Result<JobDraft, FieldError> {
    let text = std::str::from_utf8(line).map_err(|e| {
        FieldError::new(
            "line",
            String::from_utf8_lossy(line),
            format!("must be UTF-8: {e}"),
        )
    })?;
    let value: Value = serde_json::from_str(text)
        .map_err(|e| FieldError::new("line", text, format!("must be a JSON object: {e}")))?;
    if !value.is_object() {
        return Err(FieldError::new("line", text, "must be a JSON object"));
    }
    from_value(value)
}

/// Reads a TOML file of jobs.
pub fn parse_toml(text: &str) -> Result<RolloutFile, FieldError> {
    from_toml(text)
}

/// Reads a checked structure from TOML, as [`from_value`] does from JSON.
pub(super) fn from_toml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, FieldError> {
    let value: toml::Table = toml::from_str(text)
        .map_err(|e| FieldError::new("file", "", format!("must be TOML: {}", e.message())))?;
    let value =
        serde_json::to_value(value).map_err(|e| FieldError::new("file", "", e.to_string()))?;
    from_value(value)
}

/// Reads a checked structure from JSON; the error has the path of the field and the value that stands there.
pub fn from_value<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(&value).map_err(|error| {
        let path = error.path().to_string();
        let found = value_at(&value, &path)
            .map(Value::to_string)
            .unwrap_or_default();
        let found = found.trim_matches('"');
        FieldError::new(
            path.clone(),
            found,
            format!("is refused: {}", error.inner()),
        )
    })
}

/// The value at a path such as `mcp[1].server.args`.
fn value_at<'v>(root: &'v Value, path: &str) -> Option<&'v Value> {
    let mut at = root;
    for part in path.split(['.', '[']).filter(|part| !part.is_empty()) {
        at = match part.strip_suffix(']') {
            Some(index) => at.get(index.parse::<usize>().ok()?)?,
            None => at.get(part)?,
        };
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_in_the_form_of_the_guide() {
        let draft = parse_line(
            br#"{"id":"a","prompt":["one","two"],"mcp":["browser",{"name":"x","server":{"command":"y"}}],
                "limits":{"turns":5},"verify":{"answer":{"equals":"5"}}}"#,
        )
        .unwrap();
        assert_eq!(draft.prompt.turns(), ["one", "two"]);
        assert_eq!(draft.mcp.len(), 2);
        let again = parse_line(serde_json::to_string(&draft).unwrap().as_bytes()).unwrap();
        assert_eq!(again, draft);
    }

    #[test]
    fn refusals_name_field_value_and_rule() {
        let cases: [(&[u8], &str, &str, &str); 6] = [
            (br#"{"promt":"x"}"#, "promt", "x", "unknown field"),
            (
                br#"{"limits":{"turnz":5}}"#,
                "limits.turnz",
                "5",
                "unknown field",
            ),
            (
                br#"{"limits":{"turns":"many"}}"#,
                "limits.turns",
                "many",
                "invalid type",
            ),
            (
                br#"{"prompt":"x""#,
                "line",
                "{\"prompt\":\"x\"",
                "must be a JSON object",
            ),
            (br#"[1]"#, "line", "[1]", "must be a JSON object"),
            (
                b"{\"prompt\":\"\xff\"}",
                "line",
                "{\"prompt\":\"\u{fffd}\"}",
                "must be UTF-8",
            ),
        ];
        for (line, field, value, rule) in cases {
            let error = parse_line(line).unwrap_err();
            assert_eq!(
                (error.field.as_str(), error.value.as_str()),
                (field, value),
                "{error}"
            );
            assert!(error.rule.contains(rule), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_named_with_their_path() {
        for (line, field, value) in [
            (
                r#"{"verify":{"page":{"script":"() => true","timout":5}}}"#,
                "verify.page.timout",
                "5",
            ),
            (
                r#"{"verify":{"all":[{"page":{"script":"s","x":1}}]}}"#,
                "verify.all[0].page.x",
                "1",
            ),
            (
                r#"{"mcp":["a",{"name":"x","server":{"command":"y"},"espalier":{"isolation":"process"}}]}"#,
                "mcp[1].espalier",
                r#"{"isolation":"process"}"#,
            ),
            (
                r#"{"mcp":[{"name":"x","server":{"command":"y","tiemout":5}}]}"#,
                "mcp[0].server.tiemout",
                "5",
            ),
        ] {
            let error = parse_line(line.as_bytes()).unwrap_err();
            assert_eq!(
                (error.field.as_str(), error.value.as_str()),
                (field, value),
                "{error}"
            );
            assert!(error.rule.contains("unknown field"), "{error}");
        }
        let error = parse_line(br#"{"mcp":[5]}"#).unwrap_err();
        assert_eq!(error.field, "mcp[0]");
        assert!(error.rule.contains("the name of a server"), "{error}");
        let error = parse_line(br#"{"mcp":[{"name":"x"}]}"#).unwrap_err();
        assert!(error.rule.contains("missing field `server`"), "{error}");
    }

    #[test]
    fn a_toml_file_has_defaults_and_jobs() {
        let file =
            parse_toml("[defaults]\nmcp = [\"browser\"]\n[[jobs]]\nprompt = \"x\"\n").unwrap();
        assert_eq!(file.jobs.len(), 1);
        assert_eq!(
            parse_toml("[[jobs]]\npromt = \"x\"").unwrap_err().field,
            "jobs[0].promt"
        );
    }
}
