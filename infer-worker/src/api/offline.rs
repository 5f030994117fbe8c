//! Requests of batches: read, checked and answered as over HTTP, but nobody holds a connection open for them, so that
//! they yield to those for whom somebody does.

use std::sync::Arc;
use std::time::Instant;

use axum::http::HeaderMap;
use bytes::Bytes;
use espalier_core::answers::Endpoint;
use tokio::sync::Semaphore;
use tracing::Instrument as _;

use super::App;
use super::error::ApiError;
use super::limits;
use super::observe::Observed;
use super::reply::Dialect;

/// Answers requests of batches. Clones share the few places in which requests are prepared.
#[derive(Clone)]
pub struct Offline(App);

/// An answer to a request of a batch.
#[derive(Clone, Debug)]
pub struct OfflineAnswer {
    /// Its name.
    pub id: String,
    /// Tokens of its prompts.
    pub prompt_tokens: usize,
    /// Tokens that were drawn.
    pub completion_tokens: usize,
    /// The body that a client would get: JSON in one line.
    pub body: Vec<u8>,
}

impl Offline {
    pub(super) fn new(app: App) -> Self {
        let preparing = Arc::new(Semaphore::new(limits::PREPARING_OFFLINE_MAX));
        Self(App {
            preparing,
            logprobs_max: limits::LOGPROBS_OFFLINE_MAX,
            ..app
        })
    }

    /// Answers `body`.
    ///
    /// # Errors
    /// What a client would be told in its place; or that the answer is too long for a batch.
    pub async fn answer(&self, endpoint: Endpoint, body: Bytes) -> Result<OfflineAnswer, ApiError> {
        let began = Instant::now();
        let dialect = match endpoint {
            Endpoint::Chat => Dialect::Chat,
            Endpoint::Completion => Dialect::Completion,
        };
        let mut observed = Observed::begin(dialect, &HeaderMap::new());
        let span = observed.span();
        let work = self.whole(dialect, body, began, &mut observed);
        let answered = work.instrument(span).await;
        if let Err(error) = &answered {
            observed.failed(began.elapsed(), error.status());
            self.0.metrics.failed(error.status().as_u16());
        }
        answered
    }

    async fn whole(
        &self,
        dialect: Dialect,
        body: Bytes,
        began: Instant,
        observed: &mut Observed,
    ) -> Result<OfflineAnswer, ApiError> {
        let prepared = self.0.prepare(body, dialect).await?.offline();
        let (asked, answers) = prepared.model();
        observed.named(asked, answers);
        let answers = self.0.submit(prepared, began, observed.clone()).await?;
        let whole = answers.whole().await?;
        let (id, usage) = (whole.head.id.clone(), whole.usage);
        Ok(OfflineAnswer {
            id,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            body: whole.into_bytes(limits::ANSWER_OFFLINE_BYTES_MAX).await?,
        })
    }
}
