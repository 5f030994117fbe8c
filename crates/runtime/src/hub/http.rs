//! One request to the hub or to its storage: a deadline, retries with the waits that it asks for, and what its answer
//! means.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::shorten;
use reqwest::header::{DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, Client, Method, RequestBuilder, Response, redirect};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::{HubError, Refusal};
use super::{HubSettings, Meter};
use crate::backoff::Backoff;
use crate::clock::{Clock, SystemClock};
use crate::config::Secret;
use crate::model::retry::{read_retry_after, wait};
use crate::tasks::with_deadline;

/// How long the hub may take to answer a question.
pub(super) const ASK_MAX: Duration = Duration::from_secs(30);
/// How long nothing may move of a file.
pub(super) const STALL_MAX: Duration = Duration::from_secs(60);
/// Tries of one request.
const TRIES_MAX: u32 = 5;
/// The waits between them, where the hub asks for no other.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(500),
    max: Duration::from_secs(20),
};
/// Largest answer that is read, in bytes: a list of 100,000 files.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// As much of an answer is looked at for what the hub says of a refusal.
const SAYS_BYTES_MAX: usize = 64 << 10;

/// Requests to one hub.
#[derive(Clone, Debug)]
pub(super) struct Http {
    /// Shows the token.
    hub: Client,
    /// The same, but stays at the hub where it sends elsewhere: what it says of a file stands in that answer.
    staying: Client,
    /// Shows nothing: for addresses that the hub gives.
    storage: Client,
    backoff: Backoff,
}

/// What a request is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// The hub.
    Hub,
    /// The hub, whose redirections to elsewhere are answers.
    HubItself,
    /// An address that the hub gave.
    Storage,
}

impl Http {
    pub(super) fn new(settings: &HubSettings) -> Result<Self, HubError> {
        let authorities = match &settings.ca {
            Some(path) => read_authorities(path)?,
            None => Vec::new(),
        };
        let client = |headers: HeaderMap, policy: redirect::Policy| {
            let builder = Client::builder()
                .user_agent(concat!("espalier/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(Duration::from_secs(10))
                .default_headers(headers)
                .redirect(policy);
            let builder = match authorities.is_empty() {
                true => builder,
                false => builder.tls_certs_merge(authorities.iter().cloned()),
            };
            builder.build().map_err(HubError::Client)
        };
        let shown = authorization(settings.token.as_ref())?;
        let staying = redirect::Policy::custom(|attempt| {
            let stays = match attempt.previous() {
                all @ [.., last] => all.len() < 5 && last.origin() == attempt.url().origin(),
                [] => true,
            };
            match stays {
                true => attempt.follow(),
                false => attempt.stop(),
            }
        });
        Ok(Self {
            hub: client(shown.clone(), redirect::Policy::default())?,
            staying: client(shown, staying)?,
            storage: client(HeaderMap::new(), redirect::Policy::default())?,
            backoff: BACKOFF,
        })
    }

    pub(super) fn with_first_wait(mut self, wait: Duration) -> Self {
        self.backoff.first = wait;
        self
    }

    /// A request, for [`Http::send`].
    pub(super) fn request(&self, to: To, method: Method, url: &str) -> RequestBuilder {
        let client = match to {
            To::Hub => &self.hub,
            To::HubItself => &self.staying,
            To::Storage => &self.storage,
        };
        client.request(method, url)
    }

    /// Sends what `build` makes until it is answered in a way that does not pass. `what` names it in errors.
    pub(super) async fn send(
        &self,
        what: &str,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, HubError> {
        let once = || async {
            let sent = with_deadline("hub.ask", ASK_MAX, build().send()).await?;
            answered(what, sent).await
        };
        self.again(what, once).await
    }

    /// Does `once` until it succeeds or fails for good.
    pub(super) async fn again<T, F>(&self, what: &str, once: impl Fn() -> F) -> Result<T, HubError>
    where
        F: Future<Output = Result<T, Failed>>,
    {
        let mut failures = 0;
        loop {
            let failed = match once().await {
                Ok(done) => return Ok(done),
                Err(failed) => failed,
            };
            failures += 1;
            if !failed.passes || failures >= TRIES_MAX {
                return Err(failed.error);
            }
            let wait = wait(self.backoff, failures, failed.retry_after, rand::random());
            tracing::debug!(
                what,
                failures,
                wait_ms = wait.as_millis() as u64,
                "asks the hub again"
            );
            tokio::time::sleep(wait).await;
        }
    }

    /// [`Http::send`], and its answer as JSON.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        what: &str,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<T, HubError> {
        let response = self.send(what, build).await?;
        let read = read_at_most(response, ANSWER_BYTES_MAX);
        let read = with_deadline("hub.answer", ASK_MAX, read).await?;
        let malformed = |rule: String| HubError::Malformed {
            what: what.to_owned(),
            rule,
        };
        let bytes = read.map_err(|source| unreachable(what, source))?;
        let bytes = bytes
            .ok_or_else(|| malformed(format!("must have at most {ANSWER_BYTES_MAX} bytes")))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| malformed(format!("cannot be read: {error}")))
    }
}

/// One try that failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) error: HubError,
    /// Whether another one may succeed.
    pub(super) passes: bool,
    /// After how long, if the hub says.
    retry_after: Option<Duration>,
}

impl Failed {
    pub(super) fn passing(error: HubError) -> Self {
        Self {
            error,
            passes: true,
            retry_after: None,
        }
    }

    pub(super) fn for_good(error: HubError) -> Self {
        Self {
            error,
            passes: false,
            retry_after: None,
        }
    }
}

impl From<crate::tasks::DeadlineExceeded> for Failed {
    fn from(late: crate::tasks::DeadlineExceeded) -> Self {
        Self::passing(late.into())
    }
}

/// What an answer means.
pub(super) async fn answered(
    what: &str,
    sent: Result<Response, reqwest::Error>,
) -> Result<Response, Failed> {
    let response = sent.map_err(|source| {
        // What cannot be sent at all is not sent better later; a certificate is refused again.
        match source.is_builder() || source.is_redirect() {
            true => Failed::for_good(unreachable(what, source)),
            false => Failed::passing(unreachable(what, source)),
        }
    })?;
    let status = response.status();
    if status.is_success() || status.is_redirection() {
        return Ok(response);
    }
    let text = |name| response.headers().get(name)?.to_str().ok();
    let now = SystemClock.now();
    let retry_after = text(RETRY_AFTER).and_then(|asked| read_retry_after(asked, text(DATE), now));
    let message = text(reqwest::header::HeaderName::from_static("x-error-message"));
    let message = message.map(str::to_owned);
    let refusal = Refusal::of(status.as_u16());
    let says = match message {
        Some(message) => message,
        None => said(response).await,
    };
    Err(Failed {
        error: HubError::Refused {
            what: what.to_owned(),
            status: status.as_u16(),
            refusal,
            says: shorten(&says),
        },
        passes: refusal == Refusal::Busy,
        retry_after,
    })
}

/// What the body of a refusal says: `{"error": …}`; nothing else of it is shown.
async fn said(response: Response) -> String {
    let read = read_at_most(response, SAYS_BYTES_MAX);
    let Ok(Ok(Some(body))) = with_deadline("hub.refusal", ASK_MAX, read).await else {
        return String::new();
    };
    let json: Value = serde_json::from_slice(&body).unwrap_or_default();
    json["error"].as_str().unwrap_or_default().to_owned()
}

/// The body, or none if it is larger.
async fn read_at_most(
    mut response: Response,
    bytes_max: usize,
) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > bytes_max {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}

/// Without the address, which may be signed.
pub(super) fn unreachable(what: &str, source: reqwest::Error) -> HubError {
    HubError::Unreachable {
        what: what.to_owned(),
        source: source.without_url(),
    }
}

/// Ends when nothing has moved for [`STALL_MAX`].
pub(super) async fn stalled(meter: &Arc<Meter>) {
    let mut before = u64::MAX;
    loop {
        let now = meter.done();
        if now == before {
            return;
        }
        before = now;
        tokio::time::sleep(STALL_MAX).await;
    }
}

fn authorization(token: Option<&Secret>) -> Result<HeaderMap, HubError> {
    let mut headers = HeaderMap::new();
    if let Some(token) = token {
        let shown = format!("Bearer {}", token.expose());
        let mut shown = HeaderValue::from_str(&shown).map_err(|_| HubError::Token)?;
        shown.set_sensitive(true);
        headers.insert(reqwest::header::AUTHORIZATION, shown);
    }
    Ok(headers)
}

fn read_authorities(path: &std::path::Path) -> Result<Vec<Certificate>, HubError> {
    let pem = std::fs::read(path).map_err(|source| HubError::File {
        path: path.to_owned(),
        source,
    })?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(authorities) if !authorities.is_empty() => Ok(authorities),
        _ => Err(HubError::Ca {
            path: path.to_owned(),
        }),
    }
}
