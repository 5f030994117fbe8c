//! Verifiers: what a rollout is worth, as a number in [0, 1] with the reasons.
//!
//! The tree is walked here. What a check needs to know of the finished rollout stands in [`Evidence`]; what has to be
//! asked of the world goes through [`Probes`], which a live rollout answers from its own browser and servers, and which
//! `espalier traces reverify` answers with "not without a live rollout". Called by the rollout loop, before it gives up
//! its browser, and by the CLI.

mod json;
mod rules;

use std::future::Future;

use espalier_core::error::ErrorClass;
use espalier_core::spec::pattern::Glob;
use espalier_core::spec::{AnswerRule, McpCheck, TextRule, ToolCalled, Verify};
use espalier_core::trace::{CheckResult, ToolCallRecord, Trace, Verdict};
use serde_json::{Map, Value, json};

/// What the finished rollout left behind.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// What the model answered in the end; empty where a limit stopped it before.
    pub answer: &'a str,
    /// Address of the browser's current page, where there is a browser.
    pub final_url: Option<&'a str>,
    /// Every tool call, in order.
    pub tool_calls: &'a [ToolCallRecord],
}

impl<'a> From<&'a Trace> for Evidence<'a> {
    fn from(trace: &'a Trace) -> Self {
        Self {
            answer: trace.answer(),
            final_url: trace.outcome.final_url.as_deref(),
            tool_calls: &trace.tool_calls,
        }
    }
}

/// A question that the world did not answer.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{message}")]
pub struct ProbeError {
    /// Whether the job, the handler or its ground is to blame. `Handler` means that the check itself came to nothing
    /// (a script that throws, a tool that answers with an error): it scores 0 with that reason. Every other class ends
    /// the attempt.
    pub class: ErrorClass,
    /// What was asked, and what came of it.
    pub message: String,
}

/// What has to be asked of the world.
pub trait Probes {
    /// What a check of the world (`url`, `page`, `mcp`) is known to find, which is then not asked.
    fn known(&self, _check: &Verify) -> Option<(f64, String)> {
        None
    }
    /// Runs a function in the rollout's current page.
    fn page(&self, script: &str) -> impl Future<Output = Result<Value, ProbeError>> + Send;
    /// Calls a tool by the server's own name for it.
    fn mcp_tool(
        &self,
        server: &str,
        tool: &str,
        arguments: &Map<String, Value>,
    ) -> impl Future<Output = Result<String, ProbeError>> + Send;
    /// Reads a resource.
    fn mcp_resource(
        &self,
        server: &str,
        uri: &str,
    ) -> impl Future<Output = Result<String, ProbeError>> + Send;
    /// Posts a JSON body and reads a JSON answer.
    fn http(
        &self,
        url: &str,
        body: &Value,
    ) -> impl Future<Output = Result<Value, ProbeError>> + Send;
}

/// Probes of a rollout that is over.
#[derive(Clone, Copy, Debug)]
pub struct Offline;

impl Offline {
    fn refuse(what: &str) -> ProbeError {
        ProbeError {
            class: ErrorClass::Invalid,
            message: format!("{what} cannot be checked without a live rollout"),
        }
    }
}

impl Probes for Offline {
    async fn page(&self, _: &str) -> Result<Value, ProbeError> {
        Err(Self::refuse("a page script"))
    }

    async fn mcp_tool(
        &self,
        server: &str,
        _: &str,
        _: &Map<String, Value>,
    ) -> Result<String, ProbeError> {
        Err(Self::refuse(&format!("a tool of `{server}`")))
    }

    async fn mcp_resource(&self, server: &str, _: &str) -> Result<String, ProbeError> {
        Err(Self::refuse(&format!("a resource of `{server}`")))
    }

    async fn http(&self, _: &str, _: &Value) -> Result<Value, ProbeError> {
        Err(Self::refuse("an HTTP hook"))
    }
}

/// Walks the tree. Every leaf is checked, also where the result is settled earlier, because the reasons are kept.
///
/// # Errors
/// The first probe that failed for a reason other than the check's own.
pub async fn judge<P: Probes + Sync>(
    verify: &Verify,
    evidence: &Evidence<'_>,
    probes: &P,
) -> Result<Verdict, ProbeError> {
    let mut checks = Vec::new();
    let reward = score(verify, String::new(), evidence, probes, &mut checks).await?;
    Ok(Verdict { reward, checks })
}

/// Recursion in an `async fn` needs a box; `core` bounds the depth of the tree.
fn score<'a, P: Probes + Sync>(
    verify: &'a Verify,
    path: String,
    evidence: &'a Evidence<'_>,
    probes: &'a P,
    checks: &'a mut Vec<CheckResult>,
) -> std::pin::Pin<Box<dyn Future<Output = Result<f64, ProbeError>> + Send + 'a>> {
    Box::pin(async move {
        let (name, found) = match (verify, probes.known(verify)) {
            (Verify::All(list), _) => {
                let scores = scores(list.iter(), &path, "all", evidence, probes, checks).await?;
                return Ok(scores.into_iter().fold(1.0, f64::min));
            }
            (Verify::Any(list), _) => {
                let scores = scores(list.iter(), &path, "any", evidence, probes, checks).await?;
                return Ok(scores.into_iter().fold(0.0, f64::max));
            }
            (Verify::Weighted(list), _) => {
                let parts = list.iter().map(|(_, check)| check);
                let scores = scores(parts, &path, "weighted", evidence, probes, checks).await?;
                let weights = list.iter().map(|(weight, _)| *weight);
                return Ok(weighted_mean(weights, &scores));
            }
            (Verify::Url(_), Some(found)) => ("url", Ok(found)),
            (Verify::Page { .. }, Some(found)) => ("page", Ok(found)),
            (Verify::Mcp(_), Some(found)) => ("mcp", Ok(found)),
            (Verify::Answer(rule), _) => ("answer", answer(rule, evidence.answer).await),
            (Verify::Url(rule), None) => ("url", Ok(url(rule, evidence.final_url))),
            (Verify::ToolCalled(call), _) => {
                ("tool_called", Ok(tool_called(call, evidence.tool_calls)))
            }
            (Verify::Page { script }, None) => ("page", page(script, probes).await),
            (Verify::Mcp(check), None) => ("mcp", mcp(check, probes).await),
            (Verify::Http(hook), _) => ("http", http(&hook.url, evidence, probes).await),
        };
        let (score, reason) = match found {
            Ok(found) => found,
            Err(error) if error.class == ErrorClass::Handler => (0.0, error.message),
            Err(error) => return Err(error),
        };
        checks.push(CheckResult {
            path: join(&path, name),
            score,
            reason,
        });
        Ok(score)
    })
}

async fn scores<'a, P: Probes + Sync>(
    list: impl Iterator<Item = &'a Verify>,
    path: &str,
    name: &str,
    evidence: &Evidence<'_>,
    probes: &P,
    checks: &mut Vec<CheckResult>,
) -> Result<Vec<f64>, ProbeError> {
    let mut found = Vec::new();
    for (i, check) in list.enumerate() {
        let path = join(path, &format!("{name}[{i}]"));
        found.push(score(check, path, evidence, probes, checks).await?);
    }
    Ok(found)
}

/// Weights count against the largest, so that the sum of huge ones stays finite: a reward must be a number.
fn weighted_mean(weights: impl Iterator<Item = f64> + Clone, scores: &[f64]) -> f64 {
    let largest = weights.clone().fold(f64::MIN_POSITIVE, f64::max);
    let shares = weights.map(|weight| weight / largest);
    let sum: f64 = shares.clone().sum();
    let scored: f64 = shares.zip(scores).map(|(share, score)| share * score).sum();
    (scored / sum).clamp(0.0, 1.0)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

type Scored = Result<(f64, String), ProbeError>;

/// What a check of an answer finds in `answer`, in [0, 1].
pub(crate) async fn answer_score(rule: &AnswerRule, answer: &str) -> Result<f64, ProbeError> {
    Ok(self::answer(rule, answer).await?.0)
}

async fn answer(rule: &AnswerRule, answer: &str) -> Scored {
    match rule {
        AnswerRule::Text(rule) => Ok(rules::text(rule, answer, "the answer")),
        AnswerRule::Number { value, tolerance } => Ok(rules::number(*value, *tolerance, answer)),
        AnswerRule::Json { path, equals } => json::score(path, equals.as_ref(), answer).await,
    }
}

fn url(rule: &TextRule, final_url: Option<&str>) -> (f64, String) {
    match final_url {
        Some(url) => rules::text(rule, url, "the final address"),
        None => (0.0, "no browser was open at the end".to_owned()),
    }
}

fn tool_called(call: &ToolCalled, made: &[ToolCallRecord]) -> (f64, String) {
    // The glob was compiled once at the door; one that fails here fits nothing.
    let name = Glob::new(&call.name).ok();
    let fits = |record| {
        name.as_ref()
            .is_some_and(|name| rules::call_matches(call, name, record))
    };
    match made.iter().position(fits) {
        Some(i) => (1.0, format!("tool call {} is `{}`", i + 1, made[i].name)),
        None => (
            0.0,
            format!(
                "none of {} tool calls is a `{}` as asked",
                made.len(),
                call.name
            ),
        ),
    }
}

async fn page<P: Probes + Sync>(script: &str, probes: &P) -> Scored {
    let value = probes.page(script).await?;
    Ok(rules::value_score(&value, "the page"))
}

async fn mcp<P: Probes + Sync>(check: &McpCheck, probes: &P) -> Scored {
    let text = match (&check.tool, &check.resource) {
        (Some(tool), _) => {
            probes
                .mcp_tool(&check.server, tool, &check.arguments)
                .await?
        }
        (None, Some(uri)) => probes.mcp_resource(&check.server, uri).await?,
        (None, None) => return Ok((0.0, "neither a tool nor a resource is named".to_owned())),
    };
    let what = check
        .tool
        .as_deref()
        .or(check.resource.as_deref())
        .unwrap_or_default();
    Ok(rules::text(
        &check.text,
        &text,
        &format!("`{what}` of `{}`", check.server),
    ))
}

async fn http<P: Probes + Sync>(url: &str, evidence: &Evidence<'_>, probes: &P) -> Scored {
    let body = json!({
        "answer": evidence.answer,
        "final_url": evidence.final_url,
        "tool_calls": evidence.tool_calls.iter()
            .map(|call| json!({"name": call.name, "arguments": call.arguments, "is_error": call.is_error}))
            .collect::<Vec<_>>(),
    });
    let said = probes.http(url, &body).await?;
    let (score, default_reason) = rules::value_score(
        said.get("score").unwrap_or(&Value::Null),
        "the hook's `score`",
    );
    let reason = said
        .get("reason")
        .and_then(Value::as_str)
        .map(espalier_core::error::shorten);
    Ok((score, reason.unwrap_or(default_reason)))
}

#[cfg(test)]
mod tests;
