//! From a draft to a job: every rule of every field, in one place.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::draft::{GenerateDraft, JobDraft, McpUseDraft, ObservationDraft, SamplingDraft};
use super::mcp::{McpUse, ToolPolicy};
use super::verify::Verify;
use super::{
    Dependency, GenerateSpec, JobSpec, Limits, Observation, RolloutSpec, Sampling, Task, Work,
};
use crate::error::FieldError;
use crate::id::{BatchId, JobId};
use crate::layout::UploadName;

/// A closed range that a number must lie in.
pub type Range<T> = RangeInclusive<T>;

/// Bounds of everything that a client may ask for.
pub mod limits {
    /// Longest prompt, system text or hint, in bytes.
    pub const TEXT_BYTES_MAX: usize = 256 * 1024;
    /// Largest spec as it is stored, in bytes.
    pub const SPEC_BYTES_MAX: usize = 1024 * 1024;
    /// Most user turns of a rollout.
    pub const PROMPTS_MAX: usize = 64;
    /// Most labels or tags of a job, and most jobs that it waits for.
    pub const LIST_MAX: usize = 64;
    /// Most jobs that a data set or a comparison waits for: it is made of what they leave. Far below what the queue takes
    /// for one job, and their names fit into a spec.
    pub const AFTER_MANY_MAX: usize = 4096;
    /// Longest label, tag, task name or model name, in bytes.
    pub const NAME_BYTES_MAX: usize = 256;
    /// Longest name of the model of a batch of requests, in bytes: it becomes a part of a tag.
    pub const GENERATE_MODEL_BYTES_MAX: usize = 240;
    /// Most MCP servers of a rollout.
    pub const SERVERS_MAX: usize = 16;
}

/// How long an attempt may take where nobody says.
const MAX_RUNTIME_DEFAULT_S: i64 = 3600;
/// The same of a batch of requests, for which other APIs promise a day, of an export, a data set and a comparison.
const DAY_S: i64 = 86_400;
/// Longest attempt, and what training is given: it goes on where it was stopped, but an attempt that takes too long counts
/// as a failure.
const RUNTIME_S_MAX: i64 = 7 * 86_400;
/// Longest rollout.
const WALL_S_MAX: i64 = 86_400;
/// What an attempt may take beside its rollout: servers start, checks are made, the result is stored.
const RUNTIME_MARGIN_S: i64 = 900;

/// Collects what is wrong, so that a client sees all of it at once.
#[derive(Default)]
pub(super) struct Faults(pub(super) Vec<FieldError>);

impl Faults {
    /// `value`, if nothing is wrong.
    pub(super) fn or<T>(self, value: T) -> Result<T, Vec<FieldError>> {
        match self.0.is_empty() {
            true => Ok(value),
            false => Err(self.0),
        }
    }

    /// What was read of `field`, whatever the reader calls it.
    pub(super) fn keep<T>(&mut self, field: &str, read: Result<T, FieldError>) -> Option<T> {
        read.map_err(|error| self.add(field, error.value, error.rule))
            .ok()
    }

    pub(super) fn add(&mut self, field: &str, value: impl Display, rule: impl Into<String>) {
        self.0.push(FieldError::new(field, value, rule));
    }

    pub(super) fn take<T>(
        &mut self,
        parent: &str,
        result: Result<T, Vec<FieldError>>,
    ) -> Option<T> {
        result
            .map_err(|errors| self.0.extend(errors.into_iter().map(|e| e.under(parent))))
            .ok()
    }

    /// `value`, or `default` where there is none; a value out of range is a fault.
    pub(super) fn number<T>(
        &mut self,
        field: &str,
        value: Option<i64>,
        range: Range<i64>,
        default: i64,
    ) -> T
    where
        T: TryFrom<i64> + Default,
    {
        let value = value.unwrap_or(default);
        if !range.contains(&value) {
            self.add(
                field,
                value,
                format!("must be in {}..={}", range.start(), range.end()),
            );
        }
        T::try_from(value).unwrap_or_default()
    }

    pub(super) fn float(
        &mut self,
        field: &str,
        value: Option<f64>,
        default: f64,
        rule: &str,
        ok: impl Fn(f64) -> bool,
    ) -> f64 {
        let value = value.unwrap_or(default);
        if !(value.is_finite() && ok(value)) {
            self.add(field, value, rule);
        }
        value
    }

    fn text(&mut self, field: &str, value: &str) {
        if value.len() > limits::TEXT_BYTES_MAX {
            self.add(
                field,
                value,
                format!("must have at most {} bytes", limits::TEXT_BYTES_MAX),
            );
        }
    }

    pub(super) fn name(&mut self, field: &str, value: Option<&str>) {
        let Some(value) = value else { return };
        if value.trim().is_empty()
            || value.len() > limits::NAME_BYTES_MAX
            || value.contains(char::is_control)
        {
            let rule = format!(
                "must be 1 to {} bytes of printable text",
                limits::NAME_BYTES_MAX
            );
            self.add(field, value, rule);
        }
    }

    pub(super) fn count(&mut self, field: &str, count: usize, max: usize) {
        if count > max {
            self.add(
                field,
                format_args!("{count} entries"),
                format!("must have at most {max} entries"),
            );
        }
    }
}

impl JobDraft {
    /// The job, or every rule that the draft breaks.
    pub fn check(&self) -> Result<JobSpec, Vec<FieldError>> {
        let mut faults = Faults::default();
        let id = self
            .id
            .as_ref()
            .and_then(|id| JobId::new(id).map_err(|e| faults.0.push(e)).ok());
        let priority = faults.number("priority", self.priority, 0..=9, 5);
        let gathers = self.curate.is_some() || self.compare.is_some();
        let after_max = if gathers {
            limits::AFTER_MANY_MAX
        } else {
            limits::LIST_MAX
        };
        let after = check_after(&mut faults, &self.after, after_max);
        let delay_ms = faults.number("delay_ms", self.delay_ms, 0..=30 * 86_400_000, 0);
        let max_attempts = faults.number("max_attempts", self.max_attempts, 1..=100, 3);
        let max_infra = faults.number("max_infra", self.max_infra, 1..=1000, 20);
        let max_runtime = self.check_max_runtime(&mut faults);
        let work = self.check_work(&mut faults);
        faults.count("labels", self.labels.len(), limits::LIST_MAX);
        for (name, value) in &self.labels {
            faults.name(&format!("labels.{name}"), Some(value));
            faults.name("labels", Some(name));
        }
        faults.count("needs", self.needs.len(), limits::LIST_MAX);
        for (i, tag) in self.needs.iter().enumerate() {
            faults.name(&format!("needs[{i}]"), Some(tag));
        }
        if let Some(traceparent) = &self.traceparent
            && !is_traceparent(traceparent)
        {
            faults.add(
                "traceparent",
                traceparent,
                "must be a W3C traceparent, version 00",
            );
        }
        match work {
            Some(work) if faults.0.is_empty() => Ok(JobSpec {
                id,
                priority,
                labels: self.labels.clone(),
                after,
                needs: self.needs.clone(),
                delay: Duration::from_millis(delay_ms),
                max_attempts,
                max_infra,
                max_runtime,
                traceparent: self.traceparent.clone(),
                work,
            }),
            _ => Err(faults.0),
        }
    }

    fn check_work(&self, faults: &mut Faults) -> Option<Work> {
        let alone = |faults: &mut Faults, name: &str| {
            if let serde_json::Value::Object(given) = serde_json::json!(self.of_the_work()) {
                let rule = format!("must be absent where `{name}` is given");
                for (field, value) in given.into_iter().filter(|(field, _)| field != name) {
                    faults.add(&field, value, rule.as_str());
                }
            }
        };
        if let Some(train) = &self.train {
            alone(faults, "train");
            let train = faults.take("train", train.check());
            return train.map(|train| Work::Train(Box::new(train)));
        }
        if let Some(export) = &self.export {
            alone(faults, "export");
            return faults.take("export", export.check()).map(Work::Export);
        }
        if let Some(curate) = &self.curate {
            alone(faults, "curate");
            let curate = faults.take("curate", curate.check());
            return curate.map(|curate| Work::Curate(Box::new(curate)));
        }
        if let Some(compare) = &self.compare {
            alone(faults, "compare");
            let compare = faults.take("compare", compare.check());
            return compare.map(|compare| Work::Compare(Box::new(compare)));
        }
        if let Some(score) = &self.score {
            alone(faults, "score");
            let score = faults.take("score", score.check());
            return score.map(|score| Work::Score(Box::new(score)));
        }
        if let Some(generate) = &self.generate {
            alone(faults, "generate");
            return check_generate(faults, generate).map(Work::Generate);
        }
        Some(Work::Rollout(Box::new(self.check_rollout(faults))))
    }

    /// What says what is to be done.
    fn of_the_work(&self) -> Self {
        Self {
            labels: Default::default(),
            after: Vec::new(),
            needs: Vec::new(),
            ..self.without_schedule()
        }
    }

    /// Who asks for a long rollout without a word about the attempt expects it to run that long.
    fn check_max_runtime(&self, faults: &mut Faults) -> Duration {
        let wall_s = self.limits.as_ref().and_then(|limits| limits.wall_s);
        let takes_long = self.generate.is_some()
            || self.export.is_some()
            || self.curate.is_some()
            || self.compare.is_some()
            || self.score.is_some();
        let default = match takes_long {
            _ if self.train.is_some() => RUNTIME_S_MAX,
            // A large model takes hours to fetch and to send, a million traces hours to read.
            true => DAY_S,
            false => MAX_RUNTIME_DEFAULT_S,
        };
        let default = wall_s.map_or(default, |wall_s| {
            let wall_s = wall_s.clamp(0, WALL_S_MAX);
            default.max(wall_s + RUNTIME_MARGIN_S)
        });
        let given = self.max_runtime_s;
        let max_runtime = faults.number("max_runtime_s", given, 1..=RUNTIME_S_MAX, default);
        if let (Some(given), Some(wall_s)) = (given, wall_s)
            && given <= wall_s
        {
            let rule = format!(
                "must be above `limits.wall_s`, which is {wall_s}: an attempt also starts servers, judges and publishes"
            );
            faults.add("max_runtime_s", given, rule);
        }
        Duration::from_secs(max_runtime)
    }

    fn check_rollout(&self, faults: &mut Faults) -> RolloutSpec {
        let mcp = check_mcp(faults, &self.mcp);
        let verify = self
            .verify
            .as_ref()
            .and_then(|draft| faults.take("verify", draft.check()));
        if let Some(verify) = &verify {
            check_verify_servers(faults, verify, &mcp);
        }
        let tools = self.tools.clone().unwrap_or_default();
        faults.0.extend(
            ToolPolicy::check(&tools)
                .into_iter()
                .map(|e| e.under("tools")),
        );
        self.check_texts(faults);
        RolloutSpec {
            task: Task {
                task_id: self.task_id.clone(),
                task_kind: self.task_kind.clone(),
                split: self.split.clone(),
                group: self.group.clone(),
                sample_index: faults.number("sample_index", self.sample_index, 0..=1_000_000, 0),
            },
            prompts: self.prompt.turns().to_vec(),
            system: self.system.clone(),
            hints: self.hints.clone(),
            model: self.model.clone(),
            sampling: check_sampling(faults, &self.sampling.clone().unwrap_or_default()),
            mcp,
            replay: check_recordings(faults, "replay", &self.replay),
            tools,
            limits: self.check_limits(faults),
            observation: check_observation(faults, self.observation.as_ref()),
            verify,
        }
    }

    fn check_texts(&self, faults: &mut Faults) {
        let turns = self.prompt.turns();
        if turns.is_empty() {
            faults.add("prompt", "", "must be a text or a list of texts");
        }
        faults.count("prompt", turns.len(), limits::PROMPTS_MAX);
        for (i, turn) in turns.iter().enumerate() {
            let field = if turns.len() == 1 {
                "prompt".to_owned()
            } else {
                format!("prompt[{i}]")
            };
            if turn.trim().is_empty() {
                faults.add(&field, turn, "must not be empty");
            }
            faults.text(&field, turn);
        }
        faults.text("system", self.system.as_deref().unwrap_or_default());
        faults.text("hints", self.hints.as_deref().unwrap_or_default());
        for (field, value) in [
            ("task_id", &self.task_id),
            ("task_kind", &self.task_kind),
            ("split", &self.split),
            ("group", &self.group),
            ("model", &self.model),
        ] {
            faults.name(field, value.as_deref());
        }
    }

    fn check_limits(&self, faults: &mut Faults) -> Limits {
        let draft = self.limits.clone().unwrap_or_default();
        Limits {
            turns_max: faults.number("limits.turns", draft.turns, 1..=1000, 30),
            tokens_max: faults.number("limits.tokens", draft.tokens, 1..=100_000_000, 500_000),
            wall_s: faults.number("limits.wall_s", draft.wall_s, 1..=WALL_S_MAX, 900),
            tool_calls_per_turn_max: faults.number(
                "limits.tool_calls_per_turn",
                draft.tool_calls_per_turn,
                1..=128,
                8,
            ),
            tool_call_s: faults.number("limits.tool_call_s", draft.tool_call_s, 1..=3600, 60),
            ask_s: faults.number("limits.ask_s", draft.ask_s, 1..=86_400, 300),
        }
    }
}

fn check_generate(faults: &mut Faults, draft: &GenerateDraft) -> Option<GenerateSpec> {
    faults.name("generate.model", draft.model.as_deref());
    let model_bytes = draft.model.as_ref().map_or(0, String::len);
    if (limits::GENERATE_MODEL_BYTES_MAX + 1..=limits::NAME_BYTES_MAX).contains(&model_bytes) {
        let rule = format!(
            "must have at most {} bytes",
            limits::GENERATE_MODEL_BYTES_MAX
        );
        faults.add("generate.model", model_bytes, rule);
    }
    match UploadName::new(draft.requests.as_deref().unwrap_or_default()) {
        Ok(requests) => Some(GenerateSpec {
            requests,
            model: draft.model.clone(),
        }),
        Err(error) => {
            faults.add("generate.requests", error.value, error.rule);
            None
        }
    }
}

fn check_after(faults: &mut Faults, after: &[String], max: usize) -> Vec<Dependency> {
    faults.count("after", after.len(), max);
    let parse = |text: &String| match text.split_once('/') {
        None => JobId::new(text).map(Dependency::SameBatch),
        Some((batch, job)) => Ok(Dependency::Elsewhere(
            BatchId::new(batch)?,
            JobId::new(job)?,
        )),
    };
    let mut good = Vec::new();
    for (i, text) in after.iter().enumerate() {
        match parse(text) {
            Ok(dependency) => good.push(dependency),
            Err(_) => faults.add(
                &format!("after[{i}]"),
                text,
                "must be `job` of this batch, or `batch/job`",
            ),
        }
    }
    good
}

fn check_mcp(faults: &mut Faults, uses: &[McpUseDraft]) -> Vec<McpUse> {
    faults.count("mcp", uses.len(), limits::SERVERS_MAX);
    let mut good: Vec<McpUse> = Vec::new();
    for (i, entry) in uses.iter().enumerate() {
        let field = format!("mcp[{i}]");
        let checked = match entry {
            McpUseDraft::Named(name) => McpUse::Named(name.clone()),
            McpUseDraft::Inline { name, server } => {
                if let Err(error) = server.transport() {
                    faults.0.push(error.under(&format!("{field}.server")));
                }
                McpUse::Inline {
                    name: name.clone(),
                    server: server.clone(),
                }
            }
        };
        // The name becomes a part of tool names and of tags, so it follows the rule of identifiers.
        if JobId::new(checked.name()).is_err() {
            faults.add(
                &field,
                checked.name(),
                "must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or a digit",
            );
        }
        if good.iter().any(|other| other.name() == checked.name()) {
            faults.add(&field, checked.name(), "must be named once");
        }
        good.push(checked);
    }
    good
}

/// Rollouts as `batch/job`.
pub(super) fn check_recordings(
    faults: &mut Faults,
    field: &str,
    names: &[String],
) -> Vec<(BatchId, JobId)> {
    faults.count(field, names.len(), limits::LIST_MAX);
    let mut good = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let field = format!("{field}[{i}]");
        let parts = name.split_once('/');
        match parts.map(|(batch, job)| (BatchId::new(batch), JobId::new(job))) {
            Some((Ok(batch), Ok(job))) if good.contains(&(batch.clone(), job.clone())) => {
                faults.add(&field, name, "must be named once");
            }
            Some((Ok(batch), Ok(job))) => good.push((batch, job)),
            _ => faults.add(&field, name, "must be `batch/job`"),
        }
    }
    good
}

fn check_verify_servers(faults: &mut Faults, verify: &Verify, mcp: &[McpUse]) {
    for leaf in verify.leaves() {
        if let Verify::Mcp(check) = leaf
            && !mcp.iter().any(|server| server.name() == check.server)
        {
            faults.add(
                "verify.mcp.server",
                &check.server,
                "must be one of the job's `mcp` servers",
            );
        }
    }
}

fn check_sampling(faults: &mut Faults, draft: &SamplingDraft) -> Sampling {
    let thinking = draft.thinking.unwrap_or(true);
    let (temperature, top_p) = if thinking { (0.6, 0.95) } else { (0.7, 0.8) };
    Sampling {
        thinking,
        temperature: faults.float(
            "sampling.temperature",
            draft.temperature,
            temperature,
            "must be in [0, 2]",
            |v| (0.0..=2.0).contains(&v),
        ),
        top_p: faults.float(
            "sampling.top_p",
            draft.top_p,
            top_p,
            "must be in (0, 1]",
            |v| v > 0.0 && v <= 1.0,
        ),
        top_k: faults.number("sampling.top_k", draft.top_k, 0..=200_000, 20),
        min_p: faults.float(
            "sampling.min_p",
            draft.min_p,
            0.0,
            "must be in [0, 1]",
            |v| (0.0..=1.0).contains(&v),
        ),
        presence_penalty: faults.float(
            "sampling.presence_penalty",
            draft.presence_penalty,
            0.0,
            "must be in [-2, 2]",
            |v| (-2.0..=2.0).contains(&v),
        ),
        seed: draft.seed,
        completion_tokens_max: faults.number(
            "sampling.completion_tokens",
            draft.completion_tokens,
            1..=131_072,
            4096,
        ),
    }
}

/// Tokens of a result that a rule may ask for: room for a note that something is missing, and any model's context.
const OBSERVATION_TOKENS: Range<i64> = 64..=1_000_000;

fn check_observation(faults: &mut Faults, draft: Option<&ObservationDraft>) -> Observation {
    let draft = draft.cloned().unwrap_or_default();
    let rules = [
        ("max_tokens", draft.max_tokens),
        ("compat_chars", draft.compat_chars),
        ("compact_tokens", draft.compact_tokens),
    ];
    let mut given = rules
        .iter()
        .filter_map(|&(name, value)| Some((name, value?)));
    let (name, value) = match given.next() {
        Some((name, value)) => (name, Some(value)),
        None => ("max_tokens", None),
    };
    let field = format!("observation.{name}");
    if let (Some(value), Some((other, _))) = (value, given.next()) {
        let rule = format!("must be absent where `{other}` is given");
        faults.add(&field, value, rule);
        return Observation::MaxTokens(0);
    }
    match name {
        "compat_chars" => Observation::CompatChars(faults.number(&field, value, 1..=10_000_000, 0)),
        "compact_tokens" => {
            Observation::CompactTokens(faults.number(&field, value, OBSERVATION_TOKENS, 0))
        }
        _ => Observation::MaxTokens(faults.number(&field, value, OBSERVATION_TOKENS, 4096)),
    }
}

/// W3C Trace Context, level 1: `00-` 32 hex `-` 16 hex `-` 2 hex, ids not all zero.
fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex =
        |s: &str, n| s.len() == n && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let nonzero = |s: &str| s.bytes().any(|b| b != b'0');
    match parts[..] {
        ["00", trace, span, flags] => {
            hex(trace, 32) && hex(span, 16) && hex(flags, 2) && nonzero(trace) && nonzero(span)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::parse_line;
    use super::*;

    fn spec(line: &str) -> JobSpec {
        parse_line(line.as_bytes()).unwrap().check().unwrap()
    }

    fn faults(line: &str) -> Vec<String> {
        let errors = parse_line(line.as_bytes()).unwrap().check().unwrap_err();
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_defaults_are_qwen3s_recommendations() {
        let job = spec(r#"{"prompt":"x"}"#);
        assert_eq!((job.priority, job.max_attempts, job.max_infra), (5, 3, 20));
        let sampling = job.rollout().unwrap().sampling.clone();
        assert_eq!(
            (sampling.temperature, sampling.top_p, sampling.top_k),
            (0.6, 0.95, 20)
        );
        let plain = spec(r#"{"prompt":"x","sampling":{"thinking":false}}"#)
            .rollout()
            .unwrap()
            .sampling
            .clone();
        assert_eq!((plain.temperature, plain.top_p), (0.7, 0.8));
    }

    #[test]
    fn every_fault_is_named_at_once() {
        let found = faults(
            r#"{"id":"a/b","prompt":" ","priority":12,"limits":{"turns":-1},"sampling":{"top_p":1.7},
                "after":["x/y/z"],"mcp":["a","a"],"observation":{"max_tokens":5},"traceparent":"00-0-0-0"}"#,
        );
        let has = |part: &str| {
            assert!(
                found.iter().any(|f| f.starts_with(part)),
                "{part} not in {found:#?}"
            )
        };
        has("`id` must be 1 to 128");
        has("`prompt` must not be empty, got ` `");
        has("`priority` must be in 0..=9, got `12`");
        has("`limits.turns` must be in 1..=1000, got `-1`");
        has("`sampling.top_p` must be in (0, 1], got `1.7`");
        has("`after[0]` must be `job` of this batch");
        has("`mcp[1]` must be named once, got `a`");
        has("`observation.max_tokens` must be in 64..=1000000, got `5`");
        has("`traceparent` must be a W3C traceparent");
        assert_eq!(found.len(), 9);
    }

    #[test]
    fn an_observation_has_one_rule() {
        let observed = |rule: &str| {
            spec(&format!(r#"{{"prompt":"x","observation":{rule}}}"#))
                .rollout()
                .unwrap()
                .observation
        };
        assert_eq!(observed("{}"), Observation::MaxTokens(4096));
        assert_eq!(observed(r#"{"max_tokens":64}"#), Observation::MaxTokens(64));
        assert_eq!(
            observed(r#"{"compat_chars":1}"#),
            Observation::CompatChars(1)
        );
        assert_eq!(
            observed(r#"{"compact_tokens":2000}"#),
            Observation::CompactTokens(2000)
        );
        let refused = |rule: &str| {
            let found = faults(&format!(r#"{{"prompt":"x","observation":{rule}}}"#));
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].clone()
        };
        assert_eq!(
            refused(r#"{"max_tokens":100,"compat_chars":5}"#),
            "`observation.max_tokens` must be absent where `compat_chars` is given, got `100`"
        );
        assert_eq!(
            refused(r#"{"compat_chars":5,"compact_tokens":100}"#),
            "`observation.compat_chars` must be absent where `compact_tokens` is given, got `5`"
        );
        assert_eq!(
            refused(r#"{"compact_tokens":63}"#),
            "`observation.compact_tokens` must be in 64..=1000000, got `63`"
        );
    }

    #[test]
    fn large_texts_and_missing_prompts_are_refused() {
        assert_eq!(
            faults("{}"),
            ["`prompt` must be a text or a list of texts, got ``"]
        );
        let long = format!(
            r#"{{"prompt":"{}"}}"#,
            "a".repeat(limits::TEXT_BYTES_MAX + 1)
        );
        assert!(faults(&long)[0].contains("must have at most 262144 bytes"));
    }

    #[test]
    fn an_attempt_outlasts_its_rollout() {
        for (line, expected_s) in [
            (r#"{"prompt":"x"}"#, 3600),
            (r#"{"prompt":"x","limits":{"wall_s":60}}"#, 3600),
            (r#"{"prompt":"x","limits":{"wall_s":7200}}"#, 8100),
            (r#"{"prompt":"x","limits":{"wall_s":86400}}"#, 87_300),
            (r#"{"prompt":"x","max_runtime_s":60}"#, 60),
            (
                r#"{"prompt":"x","max_runtime_s":61,"limits":{"wall_s":60}}"#,
                61,
            ),
        ] {
            assert_eq!(spec(line).max_runtime.as_secs(), expected_s, "{line}");
        }
        let found = faults(r#"{"prompt":"x","max_runtime_s":3600,"limits":{"wall_s":7200}}"#);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with("`max_runtime_s` must be above `limits.wall_s`, which is 7200")
                && found[0].ends_with("got `3600`"),
            "{found:?}"
        );
        // A rollout that is refused for itself takes nothing else along, however large it is.
        let found = faults(r#"{"prompt":"x","limits":{"wall_s":9223372036854775807}}"#);
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn a_batch_of_requests_is_no_rollout() {
        let job = spec(
            r#"{"id":"a","labels":{"a":"b"},"needs":["gpu"],"priority":1,"generate":{"requests":"a/b.jsonl"}}"#,
        );
        let generate = job.generate().unwrap();
        assert_eq!(
            (generate.requests.as_str(), &generate.model),
            ("a/b.jsonl", &None)
        );
        assert_eq!((job.rollout(), job.max_runtime.as_secs()), (None, 86_400));
        let model = "m".repeat(limits::GENERATE_MODEL_BYTES_MAX + 1);
        for (line, fields) in [
            (r#"{"generate":{}}"#, &["generate.requests"][..]),
            (
                r#"{"generate":{"requests":"../x"}}"#,
                &["generate.requests"],
            ),
            (
                r#"{"generate":{"requests":"x","model":" "}}"#,
                &["generate.model"],
            ),
            (
                r#"{"generate":{"requests":"x"},"prompt":"y","limits":{"turns":1},"mcp":["a"]}"#,
                &["limits", "mcp", "prompt"],
            ),
            (
                &format!(r#"{{"generate":{{"requests":"x","model":"{model}"}}}}"#),
                &["generate.model"],
            ),
        ] {
            let errors = parse_line(line.as_bytes()).unwrap().check().unwrap_err();
            let mut found: Vec<&str> = errors.iter().map(|e| e.field.as_str()).collect();
            found.sort_unstable();
            assert_eq!(found, fields, "{line}");
        }
    }

    #[test]
    fn recordings_are_named_once_and_in_full() {
        let job = spec(r#"{"prompt":"x","replay":["b/j","c/j"]}"#);
        let named = &job.rollout().unwrap().replay;
        let named: Vec<String> = named.iter().map(|(b, j)| format!("{b}/{j}")).collect();
        assert_eq!(named, ["b/j", "c/j"]);
        let found = faults(r#"{"prompt":"x","replay":["b/j","j","b/j","/"]}"#);
        assert_eq!(
            found,
            [
                "`replay[1]` must be `batch/job`, got `j`",
                "`replay[2]` must be named once, got `b/j`",
                "`replay[3]` must be `batch/job`, got `/`",
            ]
        );
        let many: Vec<String> = (0..=limits::LIST_MAX)
            .map(|n| format!("\"b/j{n}\""))
            .collect();
        let found = faults(&format!(
            r#"{{"prompt":"x","replay":[{}]}}"#,
            many.join(",")
        ));
        assert_eq!(
            found,
            ["`replay` must have at most 64 entries, got `65 entries`"]
        );
    }

    #[test]
    fn a_check_names_a_server_of_the_job() {
        let line = r#"{"prompt":"x","mcp":["a"],
            "verify":{"mcp":{"server":"b","tool":"t","text":{"contains":"y"}}}}"#;
        assert_eq!(
            faults(line),
            ["`verify.mcp.server` must be one of the job's `mcp` servers, got `b`"]
        );
    }

    #[test]
    fn dependencies_resolve_within_the_project() {
        let job = spec(r#"{"prompt":"x","after":["j0","other/j9"]}"#);
        let (project, batch) = ("p".parse().unwrap(), "b".parse().unwrap());
        let keys: Vec<String> = job
            .after
            .iter()
            .map(|d| d.resolve(&project, &batch).to_string())
            .collect();
        assert_eq!(keys, ["p/b/j0", "p/other/j9"]);
    }
}
