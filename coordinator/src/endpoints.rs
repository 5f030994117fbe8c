//! Model endpoints that the configuration names, and how workers are told of them. The coordinator itself never calls
//! a model.

use std::collections::BTreeSet;

use espalier_core::error::FieldError;
use espalier_proto::v1;
use serde::Deserialize;

/// Most endpoints, as the protocol says.
const ENDPOINTS_MAX: usize = 1_000;
/// Largest weight, as the protocol says.
const WEIGHT_MAX: u32 = 1_000;
/// Longest text, in bytes.
const TEXT_BYTES_MAX: usize = 1_024;

/// An OpenAI-compatible endpoint that workers may use.
///
/// ```toml
/// [[model_endpoints]]
/// name = "pod-a"
/// model = "Qwen/Qwen3-4B"
/// url = "http://10.0.0.7:8000/v1"
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelEndpoint {
    /// Its name, unique. Rollouts are spread by it: an endpoint that keeps its name keeps its rollouts.
    pub name: String,
    /// The model that it serves, as jobs name it.
    pub model: String,
    /// Up to and including the version.
    pub url: String,
    /// Name of its key in the workers' `model_keys`; absent: it needs none.
    #[serde(default)]
    pub api_key_name: String,
    /// Its share of the rollouts beside others of the same model, from 1 to 1,000.
    #[serde(default = "one")]
    pub weight: u32,
    /// Whether it takes what vLLM adds to OpenAI's API.
    #[serde(default = "yes")]
    pub vllm_extensions: bool,
}

fn one() -> u32 {
    1
}

fn yes() -> bool {
    true
}

/// Checks what the types cannot say.
pub fn validate(endpoints: &[ModelEndpoint]) -> Result<(), FieldError> {
    if endpoints.len() > ENDPOINTS_MAX {
        let rule = format!("must have at most {ENDPOINTS_MAX} entries");
        return Err(FieldError::new("model_endpoints", endpoints.len(), rule));
    }
    let mut names = BTreeSet::new();
    for (i, endpoint) in endpoints.iter().enumerate() {
        let checked = check(endpoint).and_then(|()| match names.insert(&endpoint.name) {
            true => Ok(()),
            false => Err(FieldError::new("name", &endpoint.name, "must be unique")),
        });
        checked.map_err(|error| error.under(&format!("model_endpoints[{i}]")))?;
    }
    Ok(())
}

fn check(endpoint: &ModelEndpoint) -> Result<(), FieldError> {
    for (field, text) in [("name", &endpoint.name), ("model", &endpoint.model)] {
        let is_good = !text.is_empty() && text.len() <= TEXT_BYTES_MAX;
        if !is_good || text.contains(char::is_control) {
            let rule = format!("must be printable text of 1..={TEXT_BYTES_MAX} bytes");
            return Err(FieldError::new(field, text, rule));
        }
    }
    check_url(&endpoint.url)?;
    if !(1..=WEIGHT_MAX).contains(&endpoint.weight) {
        let rule = format!("must be in 1..={WEIGHT_MAX}");
        return Err(FieldError::new("weight", endpoint.weight, rule));
    }
    Ok(())
}

/// The address goes to every worker and into their logs.
fn check_url(url: &str) -> Result<(), FieldError> {
    let uri = url.parse::<tonic::transport::Uri>().ok();
    let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
    let authority = uri.as_ref().and_then(|uri| uri.authority());
    let Some(authority) = authority.filter(|_| url.len() <= TEXT_BYTES_MAX) else {
        let rule = "must be `http://host:port/v1` or `https://…`";
        return Err(FieldError::new("url", "what is written", rule));
    };
    if authority.as_str().contains('@') || url.contains('?') {
        let rule = "must hold no credentials and no query: use `api_key_name`";
        return Err(FieldError::new("url", "[redacted]", rule));
    }
    Ok(())
}

/// The list as workers read it.
pub fn to_wire(endpoints: &[ModelEndpoint]) -> v1::Endpoints {
    let one = |endpoint: &ModelEndpoint| v1::ModelEndpoint {
        name: endpoint.name.clone(),
        model: endpoint.model.clone(),
        url: endpoint.url.clone(),
        api_key_name: endpoint.api_key_name.clone(),
        weight: endpoint.weight,
        // Nobody watches an endpoint of the configuration; each worker finds out for itself.
        healthy: true,
        vllm_extensions: endpoint.vllm_extensions,
    };
    v1::Endpoints {
        endpoints: endpoints.iter().map(one).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(name: &str) -> ModelEndpoint {
        ModelEndpoint {
            name: name.to_owned(),
            model: "qwen3".to_owned(),
            url: "http://10.0.0.7:8000/v1".to_owned(),
            api_key_name: String::new(),
            weight: 1,
            vllm_extensions: true,
        }
    }

    #[test]
    fn an_endpoint_that_cannot_be_used_is_named() {
        validate(&[endpoint("a"), endpoint("b")]).unwrap();
        let refused = |change: fn(&mut ModelEndpoint)| {
            let mut second = endpoint("b");
            change(&mut second);
            let error = validate(&[endpoint("a"), second]).unwrap_err();
            (error.field.clone(), error.to_string())
        };
        for (change, field) in [
            (
                (|e| e.name = "a".to_owned()) as fn(&mut ModelEndpoint),
                "name",
            ),
            (|e| e.name.clear(), "name"),
            (|e| e.model.clear(), "model"),
            (|e| e.weight = 0, "weight"),
            (|e| e.url = "10.0.0.7:8000".to_owned(), "url"),
            (|e| e.url = "ftp://a/v1".to_owned(), "url"),
            (|e| e.url = "http://me:hunter2@a/v1".to_owned(), "url"),
            (|e| e.url = "http://a/v1?key=hunter2".to_owned(), "url"),
        ] {
            let (found, text) = refused(change);
            assert_eq!(found, format!("model_endpoints[1].{field}"));
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}
