//! Requests of batches: read, checked and answered as over HTTP, but nobody holds a connection open for them, so that
//! they yield to those for whom somebody does.

use std::sync::Arc;
use std::time::Instant;

use axum::http::HeaderMap;
use bytes::Bytes;
use espalier_core::answers::Endpoint;
use serde_json::Value;
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

impl Offline {
    pub(super) fn new(app: App) -> Self {
        let preparing = Arc::new(Semaphore::new(limits::PREPARING_OFFLINE_MAX));
        Self(App { preparing, ..app })
    }

    /// The body that a client would get for `body`.
    ///
    /// # Errors
    /// What a client would be told in its place.
    pub async fn answer(&self, endpoint: Endpoint, body: Bytes) -> Result<Value, ApiError> {
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
    ) -> Result<Value, ApiError> {
        let prepared = self.0.prepare(body, dialect).await?.offline();
        observed.named(prepared.model());
        let answers = self.0.submit(prepared, began, observed.clone()).await?;
        answers.whole().await?.into_json().await
    }
}
