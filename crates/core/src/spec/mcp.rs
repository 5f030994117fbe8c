//! MCP servers as jobs name them, and the policy over their tools.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::limits;
use super::pattern::Glob;
use crate::error::FieldError;

/// One entry of an `mcpServers` object, in the form that Claude Desktop and Cursor read.
///
/// `Debug` shows names of variables and headers but not their values: they are where people keep secrets.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct McpServer {
    /// Program of a stdio server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Its additional environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its working folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Address of a streamable HTTP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Headers sent with each request to it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
}

impl std::fmt::Debug for McpServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("McpServer")
            .field("command", &self.command)
            .field("args", &self.args.len())
            .field("env", &self.env.keys())
            .field(
                "url",
                &self
                    .url
                    .as_deref()
                    .map(|url| url.split(['?', '#']).next().unwrap_or_default()),
            )
            .field("headers", &self.headers.keys())
            .finish()
    }
}

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum McpTransport {
    /// A child process on pipes.
    Stdio,
    /// Streamable HTTP.
    Http,
}

impl McpServer {
    /// How the server is reached, or the rule that the entry breaks.
    pub fn transport(&self) -> Result<McpTransport, FieldError> {
        match (&self.command, &self.url) {
            (Some(command), None) if !command.trim().is_empty() => Ok(McpTransport::Stdio),
            (Some(command), None) => Err(FieldError::new("command", command, "must not be empty")),
            (None, Some(url)) if url.starts_with("http://") || url.starts_with("https://") => {
                Ok(McpTransport::Http)
            }
            (None, Some(url)) => Err(FieldError::new(
                "url",
                url,
                "must begin with http:// or https://",
            )),
            (Some(_), Some(url)) => Err(FieldError::new(
                "url",
                url,
                "must be absent where `command` is given",
            )),
            (None, None) => Err(FieldError::new("command", "", "or `url` must be given")),
        }
    }
}

/// A server that a rollout uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum McpUse {
    /// One that the worker's configuration defines.
    Named(String),
    /// One that the job brings along; refused unless the worker allows it.
    Inline {
        /// The name under which its tools appear.
        name: String,
        /// How it is started or reached.
        server: McpServer,
    },
}

impl McpUse {
    /// The name under which the server's tools appear.
    pub fn name(&self) -> &str {
        match self {
            Self::Named(name) | Self::Inline { name, .. } => name,
        }
    }
}

/// Which tools are offered, which need a yes first, and how they are told. Each entry of the lists is a glob over offered
/// names. `deny` wins over `ask`, `ask` over `allow`; an empty `allow` stands for everything but the dangerous ones, which
/// have to be named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolPolicy {
    /// Offered and run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Offered; each call waits for an answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ask: Vec<String>,
    /// Not offered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
    /// Whether tools are offered in brief: a sentence each, and arguments without descriptions; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brief: Option<bool>,
    /// What the answers of browsers have of the page after an action: `linked` (the default), a link to a file, or
    /// `inline`, the snapshot itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<String>,
}

/// The values of [`ToolPolicy::snapshots`].
const SNAPSHOTS: [&str; 2] = ["linked", INLINE];
const INLINE: &str = "inline";

impl ToolPolicy {
    /// Whether tools are offered in brief.
    pub fn is_brief(&self) -> bool {
        self.brief == Some(true)
    }

    /// Whether a page's snapshot stands in place of a link to it.
    pub fn has_inline_snapshots(&self) -> bool {
        self.snapshots.as_deref() == Some(INLINE)
    }

    /// Every list that is too long, every glob that breaks a rule, and an unknown way to show snapshots.
    pub fn check(&self) -> Vec<FieldError> {
        let lists = [
            ("allow", &self.allow),
            ("ask", &self.ask),
            ("deny", &self.deny),
        ];
        let mut errors = Vec::new();
        for (name, list) in lists {
            if list.len() > limits::LIST_MAX {
                let value = format!("{} entries", list.len());
                let rule = format!("must have at most {} entries", limits::LIST_MAX);
                errors.push(FieldError::new(name, value, rule));
                continue;
            }
            let refused = list.iter().enumerate().filter_map(|(i, glob)| {
                let rule = Glob::new(glob).err()?;
                Some(FieldError::new(format!("{name}[{i}]"), glob, rule))
            });
            errors.extend(refused);
        }
        if let Some(snapshots) = &self.snapshots
            && !SNAPSHOTS.contains(&snapshots.as_str())
        {
            let rule = format!("must be {}", SNAPSHOTS.join(" or "));
            errors.push(FieldError::new("snapshots", snapshots, rule));
        }
        errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_has_one_transport() {
        let stdio = McpServer {
            command: Some("npx".into()),
            ..McpServer::default()
        };
        assert_eq!(stdio.transport(), Ok(McpTransport::Stdio));
        let http = McpServer {
            url: Some("http://localhost:1/mcp".into()),
            ..McpServer::default()
        };
        assert_eq!(http.transport(), Ok(McpTransport::Http));
        let both = McpServer {
            command: Some("npx".into()),
            ..http
        };
        assert_eq!(both.transport().unwrap_err().field, "url");
        assert_eq!(
            McpServer::default().transport().unwrap_err().field,
            "command"
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let server = McpServer {
            url: Some("http://h/mcp?key=s3cret".into()),
            env: [("TOKEN".to_owned(), "s3cret".to_owned())].into(),
            headers: [("authorization".to_owned(), "s3cret".to_owned())].into(),
            args: vec!["--password=s3cret".into()],
            ..McpServer::default()
        };
        assert!(!format!("{server:?}").contains("s3cret"));
    }

    #[test]
    fn a_broken_glob_is_named() {
        let policy = ToolPolicy {
            ask: vec!["ok*".into(), "a[".into()],
            ..ToolPolicy::default()
        };
        let errors = policy.check();
        assert_eq!(errors.len(), 1);
        assert_eq!(
            (errors[0].field.as_str(), errors[0].value.as_str()),
            ("ask[1]", "a[")
        );
    }

    #[test]
    fn tools_are_told_as_ever_unless_the_job_says_otherwise() {
        let policy = |text: &str| serde_json::from_str::<ToolPolicy>(text).unwrap();
        let told = |text: &str| (policy(text).is_brief(), policy(text).has_inline_snapshots());
        assert_eq!(told("{}"), (false, false));
        assert_eq!(
            told(r#"{"brief":false,"snapshots":"linked"}"#),
            (false, false)
        );
        assert_eq!(told(r#"{"brief":true,"snapshots":"inline"}"#), (true, true));
        assert_eq!(policy(r#"{"snapshots":"linked"}"#).check(), []);
        let errors = policy(r#"{"snapshots":"inlined"}"#).check();
        assert_eq!(errors.len(), 1);
        assert_eq!(
            errors[0].to_string(),
            "`snapshots` must be linked or inline, got `inlined`"
        );
    }

    #[test]
    fn lists_are_short_and_globs_are_bounded() {
        let policy = ToolPolicy {
            allow: vec!["a".into(); limits::LIST_MAX + 1],
            ask: vec!["a".into(); limits::LIST_MAX],
            deny: vec!["{".repeat(20_000) + "a" + &"}".repeat(20_000)],
            ..ToolPolicy::default()
        };
        let errors = policy.check();
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            errors[0],
            "`allow` must have at most 64 entries, got `65 entries`"
        );
        assert!(
            errors[1].starts_with("`deny[0]` must have at most 1024 bytes, got `{{{"),
            "{errors:?}"
        );
        assert!(errors.len() == 2 && errors[1].len() < 250, "{errors:?}");
    }
}
