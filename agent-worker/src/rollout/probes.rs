//! What verifiers ask of a live rollout: its browser, its servers, and hooks on hosts that the worker allows.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::spec::Verify;
use futures::StreamExt;
use serde_json::{Map, Value};

use crate::mcp::{McpError, ToolOutcome, Toolbox};
use crate::verify::{ProbeError, Probes};

/// Longest that one question may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer of a hook: a score and a reason.
const HOOK_ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Asks HTTP hooks, of allowed hosts only: a job must not make the worker call into its own network.
#[derive(Clone, Debug)]
pub struct Hooks {
    client: reqwest::Client,
    hosts: Arc<BTreeSet<String>>,
}

impl Hooks {
    /// `hosts` are `host` or `host:port`.
    pub fn new(hosts: impl IntoIterator<Item = String>) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .timeout(PROBE_TIMEOUT)
            // A redirect could lead to a host that is not allowed.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self {
            client,
            hosts: Arc::new(hosts.into_iter().collect()),
        })
    }

    fn allows(&self, url: &reqwest::Url) -> bool {
        let Some(host) = url.host_str() else {
            return false;
        };
        let with_port = url
            .port_or_known_default()
            .map(|port| format!("{host}:{port}"));
        self.hosts.contains(host) || with_port.is_some_and(|name| self.hosts.contains(&name))
    }

    /// The address of a hook that may be asked. Errors name no more of it than its path: the rest may hold secrets.
    fn checked(&self, url: &str) -> Result<reqwest::Url, ProbeError> {
        let refuse = |message: String| ProbeError {
            class: ErrorClass::Invalid,
            message,
        };
        let parsed = reqwest::Url::parse(url)
            .map_err(|error| refuse(format!("the address of a hook is no URL: {error}")))?;
        if !self.allows(&parsed) {
            let hook = shown(&parsed);
            return Err(refuse(format!(
                "hook `{hook}` is on a host that `http_hook_hosts` of the worker does not list"
            )));
        }
        Ok(parsed)
    }

    async fn ask(&self, url: &str, body: &Value) -> Result<Value, ProbeError> {
        let parsed = self.checked(url)?;
        let hook = shown(&parsed);
        let infra = |what: &str| ProbeError {
            class: ErrorClass::Infra,
            message: format!("hook `{hook}` {what}"),
        };
        let response = self
            .client
            .post(parsed)
            .json(body)
            .send()
            .await
            .map_err(|_| infra("did not answer"))?;
        if !response.status().is_success() {
            return Err(infra(&format!("answered {}", response.status())));
        }
        let mut text = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            text.extend_from_slice(&piece.map_err(|_| infra("broke off"))?);
            if text.len() > HOOK_ANSWER_BYTES_MAX {
                return Err(infra(&format!(
                    "answered more than {HOOK_ANSWER_BYTES_MAX} bytes"
                )));
            }
        }
        serde_json::from_slice(&text).map_err(|_| infra("did not answer JSON"))
    }
}

/// Scheme, host, port and path of an address.
fn shown(url: &reqwest::Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

/// The probes of a rollout whose servers still run.
pub(super) struct Live<'a> {
    pub toolbox: &'a Toolbox,
    pub hooks: &'a Hooks,
}

impl Live<'_> {
    /// Refuses checks that this rollout can never answer, before it has cost anything.
    pub(super) fn check(&self, verify: &Verify) -> Result<(), ProbeError> {
        for leaf in verify.leaves() {
            match leaf {
                Verify::Http(hook) => drop(self.hooks.checked(&hook.url)?),
                Verify::Page { .. } => self.toolbox.check_browser().map_err(failed)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Probes for Live<'_> {
    async fn page(&self, script: &str) -> Result<Value, ProbeError> {
        // The script is a function; the toolbox evaluates an expression. The line break ends a comment at its end.
        let call = format!("({script}\n)()");
        let answer = self.toolbox.evaluate_page(&call, PROBE_TIMEOUT).await;
        answer.map_err(failed)?.map_err(came_to_nothing)
    }

    async fn mcp_tool(
        &self,
        server: &str,
        tool: &str,
        arguments: &Map<String, Value>,
    ) -> Result<String, ProbeError> {
        let call = self
            .toolbox
            .call_server(server, tool, arguments.clone(), PROBE_TIMEOUT);
        text_of(call.await)
    }

    async fn mcp_resource(&self, server: &str, uri: &str) -> Result<String, ProbeError> {
        text_of(self.toolbox.read_resource(server, uri, PROBE_TIMEOUT).await)
    }

    async fn http(&self, url: &str, body: &Value) -> Result<Value, ProbeError> {
        self.hooks.ask(url, body).await
    }
}

fn text_of(answer: Result<ToolOutcome, McpError>) -> Result<String, ProbeError> {
    match answer {
        Ok(outcome) if outcome.is_error => Err(came_to_nothing(outcome.text)),
        Ok(outcome) => Ok(outcome.text),
        Err(error) => Err(failed(error)),
    }
}

/// The check itself failed: it scores nothing.
fn came_to_nothing(message: String) -> ProbeError {
    ProbeError {
        class: ErrorClass::Handler,
        message,
    }
}

fn failed(error: McpError) -> ProbeError {
    ProbeError {
        class: error.class(),
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_listed_hosts_are_asked() {
        let hooks = Hooks::new(["judge.example".to_owned(), "localhost:8080".to_owned()]).unwrap();
        let allows = |url: &str| hooks.allows(&url.parse().unwrap());
        assert!(allows("https://judge.example/score"));
        assert!(allows("http://localhost:8080/"));
        assert!(!allows("http://localhost:9090/"));
        assert!(!allows("http://judge.example.evil.example/"));
        let error = hooks
            .ask("http://169.254.169.254/?key=hunter2", &Value::Null)
            .await
            .unwrap_err();
        assert_eq!(error.class, ErrorClass::Invalid);
        assert!(error.message.contains("http_hook_hosts"), "{error}");
        assert!(!error.message.contains("hunter2"), "{error}");
    }
}
