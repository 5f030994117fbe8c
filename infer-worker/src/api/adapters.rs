//! `/v1/adapters` and `/v1/models`: what is served, and changing it.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::backend::{AdapterError, AdapterSource, Following, Model};
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
    let following = app.backend.following();
    let following: Vec<Value> = following.iter().map(followed).collect();
    Json(json!({"object": "list", "data": data, "following": following}))
}

fn followed(following: &Following) -> Value {
    let candidate = following.candidate.as_ref();
    json!({
        "id": following.name,
        "project": following.project,
        "served": following.served,
        "latest": following.latest,
        "canary": following.canary,
        "candidate": candidate.map(|it| json!({"version": it.version, "error": it.error})),
        "error": following.error,
    })
}

/// Loads one, or a new version of one. What is sent twice is loaded twice: its content may have changed.
pub(super) async fn load(
    State(app): State<App>,
    body: axum::body::Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = read(&app, body).await?;
    let source = source(&mut fields, "name", "path")?;
    refuse_more(fields)?;
    let model = app.backend.load_adapter(source).await.map_err(refusal)?;
    Ok(Json(shown(&model).unwrap_or_default()))
}

/// The same under vLLM's names.
pub(super) async fn load_as_vllm(
    State(app): State<App>,
    body: axum::body::Body,
) -> Result<String, ApiError> {
    let mut fields = read(&app, body).await?;
    let source = source(&mut fields, "lora_name", "lora_path")?;
    // A version in the place of one that is there is what happens anyway.
    fields.flag("load_inplace")?;
    refuse_more(fields)?;
    let model = app.backend.load_adapter(source).await.map_err(refusal)?;
    let name = model.name;
    Ok(format!(
        "Success: LoRA adapter '{name}' added successfully."
    ))
}

/// Takes one out, under vLLM's names.
pub(super) async fn unload_as_vllm(
    State(app): State<App>,
    body: axum::body::Body,
) -> Result<String, ApiError> {
    let mut fields = read(&app, body).await?;
    let name = fields.text("lora_name")?.unwrap_or_default();
    app.backend.unload_adapter(&name).await.map_err(refusal)?;
    Ok(format!(
        "Success: LoRA adapter '{name}' removed successfully."
    ))
}

async fn read(app: &App, body: axum::body::Body) -> Result<Fields, ApiError> {
    let body = app.bodies.read(body, limits::ADAPTER_BODY_BYTES_MAX);
    Fields::parse(&body.await?)
}

fn source(
    fields: &mut Fields,
    name_field: &str,
    path_field: &str,
) -> Result<AdapterSource, ApiError> {
    let name = fields.text(name_field)?.unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
        let rule =
            format!("must be 1 to {NAME_BYTES_MAX} letters, digits, or characters of `._-/:@`");
        return Err(ApiError::field(name_field, &rule, &json!(name)));
    }
    let path = fields.text(path_field)?.unwrap_or_default();
    if path.is_empty() || path.contains('\0') {
        return Err(ApiError::field(
            path_field,
            "must name a folder, `s3://…` or a hub repository",
            &json!(path),
        ));
    }
    Ok(AdapterSource { name, path })
}

/// Unlike for a completion, a setting that means nothing here would change what is served.
fn refuse_more(fields: Fields) -> Result<(), ApiError> {
    let mut unknown = fields.into_rest().into_iter();
    match unknown.find(|(_, value)| !value.is_null()) {
        Some((key, value)) => Err(ApiError::field(key, "is no field of an adapter", &value)),
        None => Ok(()),
    }
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
    let mut shown = json!({
        "id": model.name,
        "object": "adapter",
        "created": model.created_s,
        "path": adapter.path,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "version": adapter.version,
    });
    if let Some(doubt) = &adapter.doubt {
        shown["warning"] = json!(doubt);
    }
    Some(shown)
}

fn refusal(error: AdapterError) -> ApiError {
    match error {
        AdapterError::Refused { .. } => ApiError::about("path", error.to_string()),
        AdapterError::NameTaken { .. } | AdapterError::Followed { .. } => {
            ApiError::conflict("name", error.to_string())
        }
        AdapterError::Unknown { name } => ApiError::unknown_model(&name),
        AdapterError::Open => ApiError::forbidden(error.to_string()),
        AdapterError::Stopped => ApiError::stopped(),
    }
}
