//! What verifiers ask of a live rollout: its browser, its servers, and hooks on hosts that the worker allows.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::spec::{Verify, VerifyDraft};
use espalier_runtime::backoff::Backoff;
use espalier_runtime::tasks::with_deadline;
use futures::StreamExt;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::world::World;
use crate::mcp::{McpError, ToolOutcome, Toolbox};
use crate::verify::{ProbeError, Probes};

/// Longest that one question may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer of a hook: a score and a reason.
const HOOK_ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The reason of a check that there was no time for.
const TIME_OVER: &str = "the time for checks was over";
/// How a hook is asked again. Asking is cheap beside the rollout that would be lost: one that is away is asked for as
/// long as there is time for checks.
const HOOK_PACE: Pace = Pace {
    backoff: Backoff {
        first: Duration::from_millis(500),
        max: Duration::from_secs(5),
    },
    // While a hook is deployed anew, what stands before it has no route to it or no key for it.
    refused: Duration::from_secs(30),
};

/// The waits between and over the tries of a hook.
#[derive(Clone, Copy, Debug)]
struct Pace {
    backoff: Backoff,
    /// How long a hook is asked that answers as if it were not there, or as if the worker were not allowed to ask.
    refused: Duration,
}

/// Asks HTTP hooks, of allowed hosts only: a job must not make the worker call into its own network.
#[derive(Clone, Debug)]
pub struct Hooks {
    client: reqwest::Client,
    hosts: Arc<BTreeSet<String>>,
    pace: Pace,
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
            pace: HOOK_PACE,
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

    /// Asks until `until` at the latest.
    ///
    /// Whatever a hook does wrong is `Infra`: the rollout is done, a hook that cannot judge says nothing about it, and
    /// another attempt may meet a hook that can.
    async fn ask(&self, url: &str, body: &Value, until: Instant) -> Result<Value, ProbeError> {
        let parsed = self.checked(url)?;
        let began = Instant::now();
        let mut failures = 0;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let asked = with_deadline("rollout.hook", left, self.ask_once(&parsed, body)).await;
            let failure = match asked {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => failure,
                Err(_) => HookFailure::new(&parsed, "did not answer in time", Passing::Never),
            };
            failures += 1;
            let ends = match failure.passing {
                Passing::Soon => until,
                Passing::Perhaps => until.min(began + self.pace.refused),
                Passing::Never => began,
            };
            let pause = self.pace.backoff.jittered(failures);
            if Instant::now() + pause >= ends {
                return Err(failure.error);
            }
            tracing::debug!(
                error = failure.error.message,
                failures,
                "asking a hook again"
            );
            tokio::time::sleep(pause).await;
        }
    }

    async fn ask_once(&self, url: &reqwest::Url, body: &Value) -> Result<Value, HookFailure> {
        let failed = |what: &str, passing| HookFailure::new(url, what, passing);
        let asked = self.client.post(url.clone()).json(body).send().await;
        let response = asked.map_err(|_| failed("did not answer", Passing::Soon))?;
        let status = response.status();
        if !status.is_success() {
            return Err(failed(&format!("answered {status}"), passing(status)));
        }
        let mut text = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            text.extend_from_slice(&piece.map_err(|_| failed("broke off", Passing::Soon))?);
            if text.len() > HOOK_ANSWER_BYTES_MAX {
                let what = format!("answered more than {HOOK_ANSWER_BYTES_MAX} bytes");
                return Err(failed(&what, Passing::Never));
            }
        }
        serde_json::from_slice(&text).map_err(|_| failed("did not answer JSON", Passing::Never))
    }
}

/// Why a hook gave no score.
struct HookFailure {
    error: ProbeError,
    passing: Passing,
}

impl HookFailure {
    fn new(url: &reqwest::Url, what: &str, passing: Passing) -> Self {
        let error = ProbeError {
            class: ErrorClass::Infra,
            message: format!("hook `{}` {what}", shown(url)),
        };
        Self { error, passing }
    }
}

/// Whether a hook may answer when it is asked again.
#[derive(Clone, Copy)]
enum Passing {
    /// It is away or overloaded.
    Soon,
    /// It is refused, which passes if it is just being deployed.
    Perhaps,
    /// It answered, and this is its answer to the question.
    Never,
}

/// Whether a status speaks of the moment or of the question.
fn passing(status: reqwest::StatusCode) -> Passing {
    use reqwest::StatusCode as S;
    match status {
        S::REQUEST_TIMEOUT | S::TOO_MANY_REQUESTS => Passing::Soon,
        S::UNAUTHORIZED | S::FORBIDDEN | S::NOT_FOUND => Passing::Perhaps,
        status if status.is_server_error() => Passing::Soon,
        _ => Passing::Never,
    }
}

/// How a rollout was asked to be judged, as its trace keeps it: without the queries of hooks and what else of an address
/// may hold a key.
pub(super) fn without_queries(verify: VerifyDraft) -> VerifyDraft {
    let each = |list: Vec<VerifyDraft>| list.into_iter().map(without_queries).collect();
    match verify {
        VerifyDraft::Http(mut hook) => {
            hook.url =
                reqwest::Url::parse(&hook.url).map_or_else(|_| String::new(), |url| shown(&url));
            VerifyDraft::Http(hook)
        }
        VerifyDraft::All(list) => VerifyDraft::All(each(list)),
        VerifyDraft::Any(list) => VerifyDraft::Any(each(list)),
        VerifyDraft::Weighted(mut list) => {
            for share in &mut list {
                share.check = without_queries(share.check.clone());
            }
            VerifyDraft::Weighted(list)
        }
        other => other,
    }
}

/// Scheme, host, port and path of an address.
fn shown(url: &reqwest::Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

/// The probes of a rollout whose servers still run.
pub(super) struct Live<'a> {
    pub toolbox: &'a Toolbox,
    pub hooks: Asked<'a>,
}

/// Services that are asked while there is time.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub hooks: &'a Hooks,
    /// When the time for all checks is over.
    pub until: Instant,
}

impl Asked<'_> {
    pub(super) async fn ask(&self, url: &str, body: &Value) -> Result<Value, ProbeError> {
        time_for_probe(self.until)?;
        self.hooks.ask(url, body, self.until).await
    }
}

/// What one probe may still take of the time for all checks. When that is over before a check begins, it scores 0: a page
/// can use the time up, and must not be able to have the rollout done again by that. A hook that uses it up itself is
/// not the page's doing and ends the attempt.
fn time_for_probe(until: Instant) -> Result<Duration, ProbeError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(came_to_nothing(TIME_OVER.to_owned()));
    }
    Ok(left.min(PROBE_TIMEOUT))
}

/// Refuses checks that a rollout in `world` can never answer, before it has cost anything.
pub(super) fn check(verify: &Verify, world: &World, hooks: &Hooks) -> Result<(), ProbeError> {
    for leaf in verify.leaves() {
        match (leaf, world) {
            (Verify::Http(hook), _) => drop(hooks.checked(&hook.url)?),
            (Verify::Page { .. }, World::Live(toolbox)) => {
                toolbox.check_browser().map_err(failed)?;
            }
            _ => {}
        }
    }
    Ok(())
}

impl Probes for Live<'_> {
    async fn page(&self, script: &str) -> Result<Value, ProbeError> {
        // The script is a function; the toolbox evaluates an expression. The line break ends a comment at its end.
        let call = format!("({script}\n)()");
        let limit = time_for_probe(self.hooks.until)?;
        let answer = self.toolbox.evaluate_page(&call, limit).await;
        answer.map_err(failed)?.map_err(came_to_nothing)
    }

    async fn mcp_tool(
        &self,
        server: &str,
        tool: &str,
        arguments: &Map<String, Value>,
    ) -> Result<String, ProbeError> {
        let limit = time_for_probe(self.hooks.until)?;
        let call = self
            .toolbox
            .call_server(server, tool, arguments.clone(), limit);
        text_of(call.await)
    }

    async fn mcp_resource(&self, server: &str, uri: &str) -> Result<String, ProbeError> {
        let limit = time_for_probe(self.hooks.until)?;
        text_of(self.toolbox.read_resource(server, uri, limit).await)
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
pub(super) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::http::StatusCode;

    use super::*;

    /// A hook that answers with `status` for the first `failing` times; its address, and how often it was asked.
    pub(in crate::rollout) async fn hook(
        status: StatusCode,
        failing: usize,
    ) -> (Hooks, String, Arc<AtomicUsize>) {
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
        let mut hooks = Hooks::new([host.clone()]).unwrap();
        hooks.pace = Pace {
            backoff: Backoff {
                first: Duration::from_millis(5),
                max: Duration::from_millis(5),
            },
            refused: Duration::from_millis(500),
        };
        (hooks, format!("http://{host}/"), asked)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[tokio::test]
    async fn a_hook_is_asked_again_while_it_may_answer() {
        for status in [
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::NOT_FOUND,
            StatusCode::UNAUTHORIZED,
        ] {
            let (hooks, url, asked) = hook(status, 6).await;
            let answer = hooks.ask(&url, &Value::Null, soon()).await;
            assert!(answer.is_ok(), "{status}: {answer:?}");
            assert_eq!(asked.load(Ordering::SeqCst), 7, "{status}");
        }
    }

    #[tokio::test]
    async fn a_hook_that_cannot_judge_is_no_fault_of_the_job() {
        for status in [StatusCode::NOT_FOUND, StatusCode::UNPROCESSABLE_ENTITY] {
            let (hooks, url, asked) = hook(status, usize::MAX).await;
            let error = hooks.ask(&url, &Value::Null, soon()).await.unwrap_err();
            assert_eq!(error.class, ErrorClass::Infra, "{error}");
            assert!(error.message.contains(status.as_str()), "{error}");
            let again = asked.load(Ordering::SeqCst) > 1;
            assert_eq!(again, status == StatusCode::NOT_FOUND, "{error}");
        }
    }

    #[tokio::test]
    async fn a_hook_that_is_away_until_the_end_is_no_answer_of_the_model() {
        let (hooks, url, _) = hook(StatusCode::SERVICE_UNAVAILABLE, usize::MAX).await;
        let until = Instant::now() + Duration::from_millis(200);
        let error = hooks.ask(&url, &Value::Null, until).await.unwrap_err();
        assert_eq!(error.class, ErrorClass::Infra, "{error}");
    }

    #[test]
    fn a_trace_keeps_no_query_of_a_hook() {
        let verify = serde_json::json!({"all": [
            {"http": {"url": "https://me:hunter2@judge.example/score?key=hunter3"}},
            {"weighted": [{"weight": 1.0, "check": {"http": {"url": "http://j/?key=hunter4"}}}]},
        ]});
        let verify: VerifyDraft = serde_json::from_value(verify).unwrap();
        let kept = serde_json::to_string(&without_queries(verify)).unwrap();
        assert!(kept.contains("https://judge.example/score"), "{kept}");
        assert!(!kept.contains("hunter"), "{kept}");
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
            .ask("http://169.254.169.254/?key=hunter2", &Value::Null, soon())
            .await
            .unwrap_err();
        assert_eq!(error.class, ErrorClass::Invalid);
        assert!(error.message.contains("http_hook_hosts"), "{error}");
        assert!(!error.message.contains("hunter2"), "{error}");
    }
}
