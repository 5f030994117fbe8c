//! A client of RunPod's REST v2: pods and the catalogue of GPUs. It decides nothing.
//!
//! Every request has a deadline. What may be asked twice is asked again where RunPod fails; a creation never is, because a reply
//! that is lost says nothing. After a 429 no request leaves before the time that RunPod named.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use espalier_core::error::shorten;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::config::Secret;
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::error_chain;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::config::{Cloud, check_url};
use super::error::ApiError;
use super::wire::{GpuType, GpuTypes, NewPod, Pod, Pods, Problem};

/// How long one request may take; RunPod looks for a machine meanwhile. Less than the scaler waits for an instance.
const ANSWER_MAX: Duration = Duration::from_secs(45);
/// How long a connection may take to come up.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Largest answer that is read, in bytes: thousands of pods.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Tries of what may be asked twice.
const TRIES_MAX: u32 = 3;
/// The waits between them.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(500),
    max: Duration::from_secs(5),
};
/// The wait after a 429 that names none.
const WAIT_DEFAULT: Duration = Duration::from_secs(15);
/// No wait is longer, whatever the API asks for: its longest window but one is an hour.
const WAIT_MAX: Duration = Duration::from_secs(3_600);

/// Speaks to one account.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Secret,
    answer_max: Duration,
    /// No request leaves before.
    quiet_until: Mutex<Option<Instant>>,
}

impl Client {
    /// A client of the API at `url`, such as `https://api.runpod.io`, also with `/v2` at its end.
    ///
    /// # Errors
    /// The key cannot be a header, or others might read it on its way to `url`.
    pub fn new(url: &str, key: &Secret) -> Result<Self, ApiError> {
        check_url(url).map_err(|error| ApiError::Client(error.to_string()))?;
        let shown = format!("Bearer {}", key.expose());
        let mut shown = HeaderValue::from_str(&shown)
            .map_err(|_| ApiError::Client("the key must be printable ASCII".to_owned()))?;
        shown.set_sensitive(true);
        let http = reqwest::Client::builder()
            .user_agent(concat!("espalier/", env!("CARGO_PKG_VERSION")))
            .default_headers(HeaderMap::from_iter([(AUTHORIZATION, shown)]))
            .connect_timeout(CONNECT_MAX)
            // A redirect would carry the key to a host that nobody configured.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| ApiError::Client(error_chain(&error)))?;
        Ok(Self {
            http,
            base: base(url).to_owned(),
            key: key.clone(),
            answer_max: ANSWER_MAX,
            quiet_until: Mutex::default(),
        })
    }

    /// With another deadline of a request.
    #[cfg(test)]
    pub(super) fn with_deadline(mut self, answer_max: Duration) -> Self {
        self.answer_max = answer_max;
        self
    }

    /// All pods of the account, of whichever owner; those of clusters are not among them.
    ///
    /// # Errors
    /// RunPod did not say.
    pub async fn pods(&self) -> Result<Vec<Pod>, ApiError> {
        const WHAT: &str = "listing pods";
        let list = || self.request(Method::GET, "/v2/pods");
        let body = self.again(WHAT, list).await?;
        Ok(parse::<Pods>(WHAT, &body)?.pods)
    }

    /// One pod, if there is one of that id.
    ///
    /// # Errors
    /// RunPod did not say.
    pub async fn pod(&self, id: &str) -> Result<Option<Pod>, ApiError> {
        const WHAT: &str = "looking at a pod";
        let path = pod_path(WHAT, id)?;
        match self.again(WHAT, || self.request(Method::GET, &path)).await {
            Err(ApiError::Refused { status: 404, .. }) => Ok(None),
            body => parse(WHAT, &body?).map(Some),
        }
    }

    /// Makes a pod. It is asked once: where [`ApiError::may_be_done`], only the list of pods tells whether there is one.
    ///
    /// # Errors
    /// RunPod refused it, or its answer was lost.
    pub async fn create(&self, pod: &NewPod) -> Result<Pod, ApiError> {
        const WHAT: &str = "creating a pod";
        let request = self.request(Method::POST, "/v2/pods").json(pod);
        let secrets = pod.env.values().collect();
        let body = self.once(WHAT, request, secrets).await?;
        parse(WHAT, &body)
    }

    /// Ends a pod for ever. One that is gone is no error.
    ///
    /// # Errors
    /// RunPod refused it, or did not say.
    pub async fn delete(&self, id: &str) -> Result<(), ApiError> {
        const WHAT: &str = "ending a pod";
        let path = pod_path(WHAT, id)?;
        match self
            .again(WHAT, || self.request(Method::DELETE, &path))
            .await
        {
            Ok(_) | Err(ApiError::Refused { status: 404, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The types of GPU, with what `count` of them in one pod of `cloud` find now.
    ///
    /// # Errors
    /// RunPod did not say.
    pub async fn gpus(&self, count: u32, cloud: Cloud) -> Result<Vec<GpuType>, ApiError> {
        const WHAT: &str = "reading the catalogue of GPUs";
        let path = format!(
            "/v2/catalog/gpus?include=AVAILABILITY&product=POD&count={count}&cloud={}",
            cloud.as_str()
        );
        let body = self
            .again(WHAT, || self.request(Method::GET, &path))
            .await?;
        Ok(parse::<GpuTypes>(WHAT, &body)?.gpus)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// Asks until it is answered in a way that does not pass.
    async fn again(
        &self,
        what: &'static str,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Vec<u8>, ApiError> {
        let mut failures = 0;
        loop {
            let error = match self.once(what, build(), Vec::new()).await {
                Ok(body) => return Ok(body),
                Err(error) => error,
            };
            failures += 1;
            if !error.passes() || failures >= TRIES_MAX {
                return Err(error);
            }
            tracing::debug!(what, failures, error = %error_chain(&error), "asks RunPod again");
            tokio::time::sleep(BACKOFF.jittered(failures)).await;
        }
    }

    /// `secrets` are in the request beside the key, and in no error.
    async fn once(
        &self,
        what: &'static str,
        request: RequestBuilder,
        secrets: Vec<&Secret>,
    ) -> Result<Vec<u8>, ApiError> {
        self.check_quiet(what)?;
        let asked = self.answer(what, request, secrets);
        with_deadline("scaler.runpod", self.answer_max, asked)
            .await
            .map_err(|source| ApiError::Late { what, source })?
    }

    async fn answer(
        &self,
        what: &'static str,
        request: RequestBuilder,
        mut secrets: Vec<&Secret>,
    ) -> Result<Vec<u8>, ApiError> {
        let unreachable = |source: reqwest::Error| ApiError::Unreachable {
            what,
            at: self.base.clone(),
            source: source.without_url(),
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let asked = asked_to_wait(&response);
        let body = read(response).await.map_err(unreachable)?;
        let Some(body) = body else {
            let rule = format!("must have at most {ANSWER_BYTES_MAX} bytes");
            return Err(ApiError::Malformed { what, rule });
        };
        match status {
            StatusCode::TOO_MANY_REQUESTS => Err(self.keep_quiet(what, asked)),
            status if status.is_success() => Ok(body),
            status => {
                let problem: Problem = serde_json::from_slice(&body).unwrap_or_default();
                secrets.push(&self.key);
                // Before it is shortened, which may cut a secret in two.
                let says = redacted(problem.says(), secrets);
                Err(ApiError::Refused {
                    what,
                    status: status.as_u16(),
                    says: shorten(&says),
                })
            }
        }
    }

    fn check_quiet(&self, what: &'static str) -> Result<(), ApiError> {
        let until = *self
            .quiet_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        match left.filter(|left| !left.is_zero()) {
            Some(retry_after) => Err(ApiError::RateLimited { what, retry_after }),
            None => Ok(()),
        }
    }

    fn keep_quiet(&self, what: &'static str, asked: Option<Duration>) -> ApiError {
        let retry_after = asked.unwrap_or(WAIT_DEFAULT).min(WAIT_MAX);
        let mut until = self
            .quiet_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *until = Some(Instant::now() + retry_after);
        ApiError::RateLimited { what, retry_after }
    }
}

/// The address without the version, which others write into it.
fn base(url: &str) -> &str {
    let url = url.trim_end_matches('/');
    url.strip_suffix("/v2").unwrap_or(url)
}

/// The wait that RunPod asks for, which it gives in seconds.
fn asked_to_wait(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// The body, or none if it is larger than what is read.
async fn read(mut response: Response) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}

/// The path of a pod, whose id comes from an answer and must stay one part of it.
fn pod_path(what: &'static str, id: &str) -> Result<String, ApiError> {
    let is_id = !id.is_empty()
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    match is_id {
        true => Ok(format!("/v2/pods/{id}")),
        false => Err(ApiError::Malformed {
            what,
            rule: format!("must have ids of letters and digits, has `{}`", shorten(id)),
        }),
    }
}

fn parse<T: DeserializeOwned>(what: &'static str, body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::Malformed {
        what,
        rule: format!("cannot be read: {error}"),
    })
}

/// `text` without the values that nobody may see. Short ones hide nothing and would cut words.
pub(super) fn redacted<'a>(text: String, values: impl IntoIterator<Item = &'a Secret>) -> String {
    const SECRET_BYTES_MIN: usize = 8;
    let values = values.into_iter().map(Secret::expose);
    let hidden = values.filter(|value| value.len() >= SECRET_BYTES_MIN);
    hidden.fold(text, |text, value| text.replace(value, "[redacted]"))
}
