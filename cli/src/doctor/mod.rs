//! `espalier doctor`: looks at this machine and at what it is connected to, and says what to do about each fault.
//!
//! What is checked is in `checks`, `cluster` and `hardware`; this module runs them one after the other, so that they do
//! not disturb each other, and shows what they found.

mod checks;
mod cluster;
mod hardware;

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{cut, note, plain};

/// Options of `doctor`.
#[derive(Args, Clone, Debug)]
pub struct Doctor {
    /// Also checks these MCP servers [default: the built-in browser]
    #[arg(long, value_name = "FILE")]
    pub mcp: Option<PathBuf>,
    /// Also checks this model endpoint, such as http://localhost:8000/v1
    #[arg(long, value_name = "URL")]
    pub model_url: Option<String>,
    /// Name of the model at that endpoint [default: the first that it lists]
    #[arg(long, value_name = "NAME", requires = "model_url")]
    pub model: Option<String>,
    /// Environment variable that holds the endpoint's API key
    #[arg(long, value_name = "VAR", requires = "model_url")]
    pub api_key_env: Option<String>,
    /// Also checks what this configuration of a coordinator names: its Redis and its object store
    #[arg(long, value_name = "FILE", env = "ESPALIER_COORDINATOR_CONFIG")]
    pub coordinator_config: Option<PathBuf>,
    /// Also checks this Redis, such as redis://host:6379; one with a password goes in ESPALIER_COORDINATOR_QUEUE
    #[arg(long, value_name = "ADDRESS")]
    pub queue: Option<String>,
    /// Object store to check, such as s3://bucket/prefix [default: the coordinator's, or that of `espalier up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Folder that holds node_modules/@playwright/mcp
    #[arg(long, value_name = "DIR")]
    pub playwright_dir: Option<PathBuf>,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, or is not needed by everybody.
    Warn,
    /// Does not work.
    Fail,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How it ended.
    pub level: Level,
    /// What was seen.
    pub seen: String,
    /// What to do about it; empty if all is well.
    pub fix: String,
}

impl Finding {
    /// All is well.
    pub fn ok(what: impl Into<String>, seen: impl Into<String>) -> Self {
        Self::new(what, Level::Ok, seen, "")
    }

    /// Worth knowing.
    pub fn warn(what: impl Into<String>, seen: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, Level::Warn, seen, fix)
    }

    /// Does not work.
    pub fn fail(what: impl Into<String>, seen: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, Level::Fail, seen, fix)
    }

    fn new(
        what: impl Into<String>,
        level: Level,
        seen: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            what: what.into(),
            level,
            seen: seen.into(),
            fix: fix.into(),
        }
    }

    fn to_json(&self) -> Value {
        json!({"check": self.what, "result": self.level.as_str(), "seen": self.seen, "fix": self.fix})
    }
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// Runs the command.
pub async fn run(context: &Context, args: &Doctor) -> Outcome {
    let mut findings = Vec::new();
    findings.extend(checks::data_dir(context));
    let (keys, configured) = cluster::keys(context, args);
    findings.extend(configured);
    findings.extend(cluster::redis(&keys).await);
    findings.push(cluster::store(context, &keys).await);
    findings.push(checks::tokenizer().await);
    findings.extend(hardware::findings().await);
    findings.extend(checks::programs(&context.environment).await);
    findings.extend(checks::servers(context, args).await);
    findings.push(checks::coordinator(context).await);
    findings.extend(checks::model(context, args).await);
    findings.push(checks::telemetry(context).await);
    context.out.show(
        || json!({"checks": findings.iter().map(Finding::to_json).collect::<Vec<_>>()}),
        || findings_text(&findings),
    )?;
    let failed = findings
        .iter()
        .filter(|finding| finding.level == Level::Fail)
        .count();
    if failed > 0 {
        note(format!("{failed} checks failed"));
        return Ok(Exit::Failed);
    }
    Ok(Exit::Ok)
}

/// A line a finding; the fix on a line of its own, so that it can be copied.
fn findings_text(findings: &[Finding]) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.what.chars().count())
        .max()
        .unwrap_or(0);
    let mut lines = Vec::new();
    for finding in findings {
        let Finding {
            what,
            level,
            seen,
            fix,
        } = finding;
        lines.push(format!(
            "{:4}  {what:width$}  {}",
            level.as_str(),
            cut(&plain(seen), 400)
        ));
        if !fix.is_empty() {
            lines.push(format!("      {:width$}  → {}", "", plain(fix)));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_findings() {
        let findings = [
            Finding::ok("disk", "50 GiB free"),
            Finding::fail("node", "not found", "install Node.js"),
        ];
        assert_eq!(
            findings_text(&findings),
            "ok    disk  50 GiB free\nfail  node  not found\n            → install Node.js"
        );
    }
}
