//! Where models are served: at the endpoints that the configuration names, and by workers that say so, wherever they
//! are connected. All workers are told. The coordinator itself never calls a model.

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::error::FieldError;
use espalier_proto::v1;
use espalier_runtime::worker::serving::{check_text, check_url};
use serde::Deserialize;

/// Most endpoints, as the protocol says.
const ENDPOINTS_MAX: usize = 1_000;
/// Largest weight, as the protocol says.
const WEIGHT_MAX: u32 = 1_000;

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
    /// Whether rollouts ask it for the log-probability of each sampled token, which they record. Workers that serve a
    /// model are always asked.
    #[serde(default)]
    pub logprobs: bool,
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
    check_text("name", &endpoint.name)?;
    check_text("model", &endpoint.model)?;
    check_url(&endpoint.url)?;
    if !(1..=WEIGHT_MAX).contains(&endpoint.weight) {
        let rule = format!("must be in 1..={WEIGHT_MAX}");
        return Err(FieldError::new("weight", endpoint.weight, rule));
    }
    Ok(())
}

/// Whether what a worker serves may be told to others: a worker that could name any key would be sent it.
pub fn is_told(serving: &v1::Serving, worker_key_names: &BTreeSet<String>) -> bool {
    serving.api_key_name.is_empty() || worker_key_names.contains(&serving.api_key_name)
}

/// The list as workers read it. Those of the configuration go first, should there be too many. Of a worker that comes
/// twice, the last one counts.
pub fn to_wire<'a>(
    configured: &[ModelEndpoint],
    worker_key_names: &BTreeSet<String>,
    workers: impl Iterator<Item = &'a v1::Worker>,
) -> v1::Endpoints {
    let by_id: BTreeMap<&str, Option<&v1::Serving>> = workers
        .map(|worker| (worker.worker.as_str(), worker.serving.as_ref()))
        .collect();
    let of_workers = by_id
        .into_iter()
        .filter_map(|(worker, serving)| Some((worker, serving?)))
        .filter(|(_, serving)| is_told(serving, worker_key_names))
        .flat_map(|(worker, serving)| served_by(worker, serving));
    let mut endpoints: Vec<_> = configured.iter().map(of_configuration).collect();
    endpoints.extend(of_workers);
    if endpoints.len() > ENDPOINTS_MAX {
        let left_out = endpoints.len() - ENDPOINTS_MAX;
        tracing::warn!(left_out, "more than {ENDPOINTS_MAX} model endpoints");
        endpoints.truncate(ENDPOINTS_MAX);
    }
    v1::Endpoints { endpoints }
}

fn of_configuration(endpoint: &ModelEndpoint) -> v1::ModelEndpoint {
    v1::ModelEndpoint {
        name: endpoint.name.clone(),
        model: endpoint.model.clone(),
        url: endpoint.url.clone(),
        api_key_name: endpoint.api_key_name.clone(),
        weight: endpoint.weight,
        // Nobody watches an endpoint of the configuration; each worker finds out for itself.
        healthy: true,
        vllm_extensions: endpoint.vllm_extensions,
        logprobs: endpoint.logprobs,
        project: String::new(),
    }
}

/// One endpoint a model.
fn served_by<'a>(
    worker: &'a str,
    serving: &'a v1::Serving,
) -> impl Iterator<Item = v1::ModelEndpoint> + 'a {
    serving.models.iter().map(move |model| v1::ModelEndpoint {
        name: format!("{worker}/{model}"),
        model: model.clone(),
        url: serving.url.clone(),
        api_key_name: serving.api_key_name.clone(),
        weight: 1,
        healthy: true,
        vllm_extensions: true,
        logprobs: true,
        project: serving.projects.get(model).cloned().unwrap_or_default(),
    })
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
            logprobs: false,
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

    fn worker(id: &str, models: &[&str]) -> v1::Worker {
        v1::Worker {
            worker: id.to_owned(),
            serving: Some(serving(models)),
            ..v1::Worker::default()
        }
    }

    fn serving(models: &[&str]) -> v1::Serving {
        v1::Serving {
            url: "http://10.0.0.9:8000/v1".to_owned(),
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            api_key_name: String::new(),
            projects: [("shop".to_owned(), "p".to_owned())].into(),
        }
    }

    #[test]
    fn workers_that_serve_stand_beside_the_configuration_once_each() {
        let workers = [
            worker("w2", &["qwen3", "shop"]),
            worker("w1", &["qwen3"]),
            // It has moved to another coordinator, and serves no more.
            worker("w3", &["qwen3"]),
            v1::Worker {
                serving: None,
                ..worker("w3", &[])
            },
        ];
        let told = to_wire(&[endpoint("a")], &BTreeSet::new(), workers.iter());
        let names: Vec<_> = told.endpoints.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["a", "w1/qwen3", "w2/qwen3", "w2/shop"]);
        let asked: Vec<_> = told.endpoints.iter().map(|e| e.logprobs).collect();
        assert_eq!(asked, [false, true, true, true]);
        let projects: Vec<_> = told.endpoints.iter().map(|e| e.project.as_str()).collect();
        assert_eq!(projects, ["", "", "", "p"]);
        let many: Vec<_> = (0..20)
            .map(|n| format!("w{n}"))
            .map(|id| worker(&id, &["m"; 60]))
            .collect();
        assert_eq!(
            to_wire(&[], &BTreeSet::new(), many.iter()).endpoints.len(),
            ENDPOINTS_MAX
        );
    }

    #[test]
    fn workers_name_no_keys_but_those_that_are_theirs() {
        let mut worker = worker("w1", &["qwen3"]);
        if let Some(serving) = &mut worker.serving {
            serving.api_key_name = "pods".to_owned();
        }
        let told = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            to_wire(&[], &names, [&worker].into_iter()).endpoints.len()
        };
        assert_eq!(told(&["openai"]), 0);
        assert_eq!(told(&["openai", "pods"]), 1);
    }
}
