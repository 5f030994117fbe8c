//! Where models are served, as a coordinator tells its workers. Parsed at the edge: what is here can be called.

use espalier_proto::v1;

/// Largest weight, as the protocol says.
const WEIGHT_MAX: u32 = 1_000;

/// An endpoint that a coordinator told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Its name, by which rollouts are spread.
    pub name: String,
    /// The model that it serves.
    pub model: String,
    /// Up to and including the version.
    pub base_url: String,
    /// Name of its key among the worker's own.
    pub api_key_name: Option<String>,
    /// Its share of the rollouts.
    pub weight: u32,
    /// Whether it is known to work.
    pub healthy: bool,
    /// Whether it takes what vLLM adds to OpenAI's API.
    pub vllm_extensions: bool,
    /// Whether calls ask it for the log-probability of each sampled token.
    pub logprobs: bool,
    /// The project whose model it is; none: it is nobody's.
    pub project: Option<String>,
}

impl Served {
    /// None, with a line in the log: a name is missing. The address is judged where it is used.
    pub fn from_wire(wire: v1::ModelEndpoint) -> Option<Self> {
        if wire.name.is_empty() || wire.model.is_empty() {
            tracing::warn!(
                name = wire.name,
                model = wire.model,
                "a model endpoint without name or model"
            );
            return None;
        }
        Some(Self {
            name: wire.name,
            model: wire.model,
            base_url: wire.url,
            api_key_name: Some(wire.api_key_name).filter(|name| !name.is_empty()),
            weight: wire.weight.clamp(1, WEIGHT_MAX),
            healthy: wire.healthy,
            vllm_extensions: wire.vllm_extensions,
            logprobs: wire.logprobs,
            project: Some(wire.project).filter(|project| !project.is_empty()),
        })
    }
}
