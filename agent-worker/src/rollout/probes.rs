//! What verifiers ask of a live rollout: its browser, its servers, and hooks on hosts that the worker allows.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::spec::Verify;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::tasks::with_deadline;
use futures::StreamExt;
use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::mcp::{McpError, ToolOutcome, Toolbox};
use crate::verify::{ProbeError, Probes};

/// Longest that one question may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer of a hook: a score and a reason.
const HOOK_ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The reason of a check that there was no time for.
const TIME_OVER: &str = "the time for checks was over";
/// How often a hook is asked before the rollout is given up for it: asking again is cheaper than rolling out again.
const HOOK_TRIES_MAX: u32 = 3;
/// Between tries: a hook that restarts is back within seconds, and the checks' time must hold all tries.
const HOOK_BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(500),
    max: Duration::from_secs(5),
};

/// Asks HTTP hooks, of allowed hosts only: a job must not make the worker call into its own network.
#[derive(Clone, Debug)]
pub struct Hooks {
    client: reqwest::Client,
    hosts: Arc<BTreeSet<String>>,
}

impl Hooks {
    /// `hosts` are `host` or `host:port`, in any case.
    pub fn new(hosts: impl IntoIterator<Item = String>) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .timeout(PROBE_TIMEOUT)
            // A redirect could lead to a host that is not allowed.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self {
            client,
            // The parser of addresses gives hosts in lower case.
            hosts: Arc::new(
                hosts
                    .into_iter()
                    .map(|host| host.to_ascii_lowercase())
                    .collect(),
            ),
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
        let mut failures = 0;
        loop {
            let failure = match self.ask_once(&parsed, body).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            failures += 1;
            if !failure.may_pass || failures >= HOOK_TRIES_MAX {
                return Err(failure.error);
            }
            tracing::debug!(
                error = failure.error.message,
                failures,
                "asking a hook again"
            );
            tokio::time::sleep(HOOK_BACKOFF.jittered(failures)).await;
        }
    }

    async fn ask_once(&self, url: &reqwest::Url, body: &Value) -> Result<Value, HookFailure> {
        let hook = shown(url);
        let infra = |what: &str, may_pass| HookFailure {
            error: ProbeError {
                class: ErrorClass::Infra,
                message: format!("hook `{hook}` {what}"),
            },
            may_pass,
        };
        let asked = self.client.post(url.clone()).json(body).send().await;
        let response = asked.map_err(|_| infra("did not answer", true))?;
        let status = response.status();
        if !status.is_success() {
            let mut failure = infra(&format!("answered {status}"), true);
            if !may_pass(status) {
                failure.may_pass = false;
                failure.error.class = ErrorClass::Invalid;
            }
            return Err(failure);
        }
        let mut text = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            text.extend_from_slice(&piece.map_err(|_| infra("broke off", true))?);
            if text.len() > HOOK_ANSWER_BYTES_MAX {
                let what = format!("answered more than {HOOK_ANSWER_BYTES_MAX} bytes");
                return Err(infra(&what, false));
            }
        }
        serde_json::from_slice(&text).map_err(|_| infra("did not answer JSON", false))
    }
}

/// Why a hook gave no score, and whether it may give one when it is asked again.
struct HookFailure {
    error: ProbeError,
    may_pass: bool,
}

/// Whether a status speaks of the moment and not of the question.
fn may_pass(status: reqwest::StatusCode) -> bool {
    use reqwest::StatusCode;
    let is_momentary = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
    status.is_server_error() || is_momentary.contains(&status)
}

/// Scheme, host, port and path of an address.
fn shown(url: &reqwest::Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

/// The probes of a rollout whose servers still run.
pub(super) struct Live<'a> {
    pub toolbox: &'a Toolbox,
    pub hooks: &'a Hooks,
    /// When the time for all checks is over.
    pub until: Instant,
}

/// What one probe may still take of the time for all checks. When that is over, a check scores 0: a page can use the
/// time up, and must not be able to have the rollout done again by that.
fn time_for_probe(until: Instant) -> Result<Duration, ProbeError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(came_to_nothing(TIME_OVER.to_owned()));
    }
    Ok(left.min(PROBE_TIMEOUT))
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
        let limit = time_for_probe(self.until)?;
        let answer = self.toolbox.evaluate_page(&call, limit).await;
        answer.map_err(failed)?.map_err(came_to_nothing)
    }

    async fn mcp_tool(
        &self,
        server: &str,
        tool: &str,
        arguments: &Map<String, Value>,
    ) -> Result<String, ProbeError> {
        let limit = time_for_probe(self.until)?;
        let call = self
            .toolbox
            .call_server(server, tool, arguments.clone(), limit);
        text_of(call.await)
    }

    async fn mcp_resource(&self, server: &str, uri: &str) -> Result<String, ProbeError> {
        let limit = time_for_probe(self.until)?;
        text_of(self.toolbox.read_resource(server, uri, limit).await)
    }

    async fn http(&self, url: &str, body: &Value) -> Result<Value, ProbeError> {
        time_for_probe(self.until)?;
        let left = self.until.saturating_duration_since(Instant::now());
        let asked = with_deadline("rollout.hook", left, self.hooks.ask(url, body)).await;
        asked.unwrap_or_else(|_| Err(came_to_nothing(TIME_OVER.to_owned())))
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::http::StatusCode;

    use super::*;

    /// A hook that answers with `status` for the first `failing` times; its address, and how often it was asked.
    async fn hook(status: StatusCode, failing: usize) -> (Hooks, String, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let answer = move || async move {
            let earlier = count.fetch_add(1, Ordering::SeqCst);
            let status = if earlier < failing {
                status
            } else {
                StatusCode::OK
            };
            (status, r#"{"score": 1}"#)
        };
        let router = axum::Router::new().route("/", axum::routing::post(answer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        #[expect(
            clippy::disallowed_methods,
            reason = "the test's own server ends with it"
        )]
        tokio::spawn(async move { axum::serve(listener, router).await });
        let hooks = Hooks::new([host.clone()]).unwrap();
        (hooks, format!("http://{host}/"), asked)
    }

    #[tokio::test]
    async fn a_hook_is_asked_again_while_it_may_answer() {
        for (status, failing, outcome, times) in [
            (StatusCode::SERVICE_UNAVAILABLE, 2, None, 3),
            (StatusCode::TOO_MANY_REQUESTS, 9, Some(ErrorClass::Infra), 3),
            (StatusCode::NOT_FOUND, 9, Some(ErrorClass::Invalid), 1),
        ] {
            let (hooks, url, asked) = hook(status, failing).await;
            let answer = hooks.ask(&url, &Value::Null).await;
            assert_eq!(answer.err().map(|error| error.class), outcome, "{status}");
            assert_eq!(asked.load(Ordering::SeqCst), times, "{status}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_after_the_time_for_checks_scores_nothing() {
        let until = Instant::now() + PROBE_TIMEOUT + Duration::from_secs(1);
        assert_eq!(time_for_probe(until), Ok(PROBE_TIMEOUT));
        tokio::time::advance(PROBE_TIMEOUT).await;
        assert_eq!(time_for_probe(until), Ok(Duration::from_secs(1)));
        tokio::time::advance(Duration::from_secs(1)).await;
        let error = time_for_probe(until).unwrap_err();
        assert_eq!(error.class, ErrorClass::Handler);
        assert_eq!(error.message, TIME_OVER);
    }

    #[tokio::test]
    async fn only_listed_hosts_are_asked() {
        let hooks = Hooks::new(["Judge.Example".to_owned(), "localhost:8080".to_owned()]).unwrap();
        let allows = |url: &str| hooks.allows(&url.parse().unwrap());
        assert!(allows("https://judge.example/score"));
        assert!(allows("https://JUDGE.example/score"));
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
