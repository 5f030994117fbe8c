//! S3 and what speaks like it: how a bucket is opened, and what its refusals mean. Only the store uses it.
//!
//! Every answer that is no success becomes a [`Refusal`] before the library sees it, so that one table here decides
//! by status and code. Of the server's text only the code and the message stay: the rest may repeat tokens.

use std::error::Error;

use futures::StreamExt;
use object_store::RetryConfig;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as Key, S3ConditionalPut};
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpService, ReqwestConnector,
};
use object_store::path::Path;

use espalier_core::error::shorten;

use super::backend::Backend;
use super::error::{StoreError, StoreErrorKind, transient};

/// Largest explanation that is read of a refusal, in bytes; S3's are below 1 KiB.
const EXPLANATION_BYTES_MAX: usize = 16 << 10;
/// Longer than any try, whose deadline the store keeps itself.
const REQUEST_TIMEOUT: &str = "1 hour";

/// What the usual variables say: keys, session token, region, endpoint, roles.
pub(super) fn from_environment() -> AmazonS3Builder {
    AmazonS3Builder::from_env()
}

/// Opens `s3://bucket/prefix` with what `settings` say of the server.
pub(super) fn open(url: &str, settings: AmazonS3Builder) -> Result<Backend, StoreError> {
    let (bucket, prefix) = parse(url)?;
    let endpoint = settings
        .get_config_value(&Key::S3Endpoint)
        .or_else(|| settings.get_config_value(&Key::Endpoint));
    if endpoint.as_deref().is_some_and(|e| e.contains('@')) {
        let rule = "must hold no credentials: they have variables of their own";
        return Err(StoreError::refused("open", "AWS_ENDPOINT_URL", rule));
    }
    let unreachable_rule = unreachable_rule(endpoint.as_deref(), &settings);
    // Encryption is asked for by the endpoint: what begins with `http://` is meant so.
    let plain = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
    let store = settings
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // Not every server has the request that deletes many; the store deletes one at a time.
        .with_disable_bulk_delete(true)
        .with_allow_http(plain)
        .with_config(
            Key::Client("timeout".parse().map_err(|error| invalid(url, error))?),
            REQUEST_TIMEOUT,
        )
        // The store retries, and nobody below it: tries and deadlines would multiply.
        .with_retry(RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        })
        .with_http_connector(Connector)
        .build()
        .map_err(|error| invalid(url, error))?;
    Ok(Backend::bucket(store, prefix, unreachable_rule))
}

/// The bucket and the prefix of a URL. One that holds more than that may hold a secret, and is not repeated.
fn parse(url: &str) -> Result<(&str, Path), StoreError> {
    const RULE: &str = "must be `s3://bucket` or `s3://bucket/prefix`, without credentials, port or query: those of \
                        the server come from `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_ENDPOINT_URL`";
    let refused = || StoreError::refused("open", "store_url", RULE);
    let rest = url.strip_prefix("s3://").ok_or_else(refused)?;
    if rest.contains(['@', '?', '#', ':']) {
        return Err(refused());
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let named = (3..=63).contains(&bucket.len())
        && bucket
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b));
    if !named {
        return Err(refused());
    }
    let prefix = Path::parse(prefix).map_err(|_| refused())?;
    Ok((bucket, prefix))
}

fn invalid(url: &str, error: object_store::Error) -> StoreError {
    StoreError::from_source("open", url, StoreErrorKind::Invalid, error)
}

fn unreachable_rule(endpoint: Option<&str>, settings: &AmazonS3Builder) -> String {
    let offered = [
        Key::AccessKeyId,
        Key::WebIdentityTokenFile,
        Key::ContainerCredentialsRelativeUri,
        Key::ContainerCredentialsFullUri,
    ];
    if offered
        .iter()
        .all(|key| settings.get_config_value(key).is_none())
    {
        return "no credentials were found: set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or run where the \
                platform gives a role"
            .to_owned();
    }
    let endpoint = endpoint.unwrap_or("AWS, because no endpoint is set");
    format!(
        "no useful answer from {endpoint}: check `AWS_ENDPOINT_URL`, `AWS_REGION` and the network, and that the \
         server runs"
    )
}

/// What a server answered in place of what was asked.
#[derive(Debug, thiserror::Error)]
#[error("the server answered {status} {code}: {message}")]
pub(super) struct Refusal {
    status: u16,
    code: String,
    message: String,
}

impl Refusal {
    /// The refusal that led to `error`, if one did.
    pub fn behind<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(refusal) = error.downcast_ref() {
                return Some(refusal);
            }
            cause = error.source();
        }
        None
    }

    /// Whether the condition of a create was not met. A 409 is none: there, another request was under way, which may
    /// yet fail.
    pub fn says_exists(&self) -> bool {
        self.status == 412
    }

    /// Whether the object is not there. HEAD has no code.
    pub fn says_missing(&self) -> bool {
        self.status == 404 && self.code != "NoSuchBucket"
    }

    /// Its class and, where there is one, what to do about it.
    pub fn meaning(&self) -> (StoreErrorKind, Option<&'static str>) {
        match (self.status, self.code.as_str()) {
            (404, "NoSuchBucket") => (
                StoreErrorKind::Invalid,
                Some("the bucket does not exist: create it, or name another in `store_url`"),
            ),
            (404, _) => (StoreErrorKind::NotFound, None),
            (301 | 302 | 307 | 308, _)
            | (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => (
                StoreErrorKind::Invalid,
                Some(
                    "the bucket is elsewhere: set `AWS_REGION` to its region, or `AWS_ENDPOINT_URL`",
                ),
            ),
            (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull") => (StoreErrorKind::Full, None),
            (400, "ExpiredToken" | "InvalidToken") | (401 | 403, _) => {
                (StoreErrorKind::Denied, Some(self.denied()))
            }
            (405 | 501, _) => (
                StoreErrorKind::Invalid,
                Some("the server cannot do what Espalier needs of a store"),
            ),
            (408 | 409 | 425 | 429 | 500.., _) => (transient(), None),
            _ => (StoreErrorKind::Invalid, None),
        }
    }

    fn denied(&self) -> &'static str {
        match self.code.as_str() {
            "InvalidAccessKeyId" => {
                "permission denied: the server does not know the access key, check `AWS_ACCESS_KEY_ID`"
            }
            "SignatureDoesNotMatch" => {
                "permission denied: the signature is wrong, check `AWS_SECRET_ACCESS_KEY` and `AWS_REGION`"
            }
            "RequestTimeTooSkewed" => {
                "permission denied: the clock of this machine is too far from the server's"
            }
            "ExpiredToken" | "InvalidToken" => {
                "permission denied: the session token is not valid any more, renew `AWS_SESSION_TOKEN`"
            }
            _ => {
                "permission denied: the credentials need rights to get, put, delete and list objects of the bucket"
            }
        }
    }

    /// Reads the answer's explanation.
    async fn read(response: HttpResponse) -> Self {
        let status = response.status();
        let mut stream = response.into_body().bytes_stream();
        let mut text = Vec::new();
        while let Some(Ok(chunk)) = stream.next().await {
            text.extend_from_slice(&chunk);
            if text.len() > EXPLANATION_BYTES_MAX {
                break;
            }
        }
        let text = String::from_utf8_lossy(&text);
        let code = element(&text, "Code").unwrap_or(status.canonical_reason().unwrap_or("unknown"));
        Self {
            status: status.as_u16(),
            code: shorten(code),
            message: shorten(element(&text, "Message").unwrap_or("no message")),
        }
    }
}

/// The text of the first element `name`.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let start = xml.find(&format!("<{name}>"))? + name.len() + 2;
    let length = xml[start..].find(&format!("</{name}>"))?;
    Some(&xml[start..start + length])
}

/// The library's own HTTP client, whose answers that are no success are errors.
#[derive(Debug)]
struct Connector;

#[derive(Debug)]
struct Refusing(HttpClient);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Refusing(client)))
    }
}

#[tonic::async_trait]
impl HttpService for Refusing {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = self.0.execute(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let refusal = Refusal::read(response).await;
        Err(HttpError::new(HttpErrorKind::Unknown, refusal))
    }
}

#[cfg(test)]
mod tests;
