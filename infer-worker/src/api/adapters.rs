//! `/v1/adapters` and `/v1/models`: what is served, and changing it.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::backend::{AdapterError, AdapterSource, Model};
use super::error::ApiError;
use super::fields::Fields;
use super::{App, limits};

/// Longest name of an adapter, in bytes.
const NAME_BYTES_MAX: usize = 256;

pub(super) async fn models(State(app): State<App>) -> Json<Value> {
    let served = app.backend.models();
    let base = served
        .first()
        .map(|base| base.name.clone())
        .unwrap_or_default();
    let context = app.backend.context_tokens();
    let entry = |model: &Model| {
        json!({
            "id": model.name,
            "object": "model",
            "created": model.created_s,
            "owned_by": "espalier",
            "root": model.adapter.as_ref().map_or(&model.name, |adapter| &adapter.path),
            "parent": model.adapter.as_ref().map(|_| &base),
            "max_model_len": context,
        })
    };
    let data: Vec<Value> = served.iter().map(entry).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(super) async fn list(State(app): State<App>) -> Json<Value> {
    let served = app.backend.models();
    let data: Vec<Value> = served.iter().filter_map(shown).collect();
    Json(json!({"object": "list", "data": data}))
}

/// Loads one, or a new version of one. What is sent twice is loaded twice: its content may have changed.
pub(super) async fn load(
    State(app): State<App>,
    body: axum::body::Body,
) -> Result<Json<Value>, ApiError> {
    let body = limits::read(body, limits::ADAPTER_BODY_BYTES_MAX).await?;
    let mut fields = Fields::parse(&body)?;
    let name = fields.text("name")?.unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
        let rule =
            format!("must be 1 to {NAME_BYTES_MAX} letters, digits, or characters of `._-/:@`");
        return Err(ApiError::field("name", &rule, &json!(name)));
    }
    let path = fields.text("path")?.unwrap_or_default();
    if path.is_empty() || path.contains('\0') {
        return Err(ApiError::field(
            "path",
            "must name a folder, `s3://…` or a hub repository",
            &json!(path),
        ));
    }
    // Unlike for a completion, a setting that means nothing here would change what is served.
    let unknown = fields.into_rest();
    if let Some((key, value)) = unknown.into_iter().find(|(_, value)| !value.is_null()) {
        return Err(ApiError::field(key, "is no field of an adapter", &value));
    }
    let source = AdapterSource { name, path };
    let model = app.backend.load_adapter(source).await.map_err(refusal)?;
    Ok(Json(shown(&model).unwrap_or_default()))
}

pub(super) async fn unload(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    app.backend.unload_adapter(&name).await.map_err(refusal)?;
    Ok((
        StatusCode::OK,
        Json(json!({"id": name, "object": "adapter", "deleted": true})),
    ))
}

fn shown(model: &Model) -> Option<Value> {
    let adapter = model.adapter.as_ref()?;
    Some(json!({
        "id": model.name,
        "object": "adapter",
        "created": model.created_s,
        "path": adapter.path,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "version": adapter.version,
    }))
}

fn refusal(error: AdapterError) -> ApiError {
    match error {
        AdapterError::Refused { .. } => ApiError::about("path", error.to_string()),
        AdapterError::NameTaken { .. } => ApiError::conflict("name", error.to_string()),
        AdapterError::Unknown { name } => ApiError::unknown_model(&name),
        AdapterError::Stopped => ApiError::stopped(),
    }
}
