//! `config.json` of a Qwen3 checkpoint, dense or mixture of experts, as transformers 4 and 5 write it.

use serde::Deserialize;
use serde_json::{Map, Value};

/// Ids from here on are padding: Qwen3's tokenizer does not have them, whatever a checkpoint's rows were rounded up to. They
/// are never sampled.
const REAL_VOCABULARY: usize = 151_669;

/// What a checkpoint's numbers mean.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Ids that the tokenizer has: others are padding. A configuration does not say how many; at most as many as Qwen3's,
    /// until whoever reads the model's own tokenizer sets it.
    pub real_vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Of all norms.
    pub rms_norm_eps: f32,
    /// The LM head is the embedding.
    pub tied: bool,
    /// Positions that the model was made for, YaRN included.
    pub max_positions: usize,
    /// Rotary embedding.
    pub rope: Rope,
    /// Experts, where there are any.
    pub moe: Option<Moe>,
}

/// Rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Stretching to longer contexts.
    pub yarn: Option<Yarn>,
}

/// YaRN (Peng et al. 2023), as transformers computes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times longer than `original_positions`.
    pub factor: f64,
    /// Positions before stretching.
    pub original_positions: usize,
    /// Turns above which a frequency is left as it is.
    pub beta_fast: f64,
    /// Turns below which a frequency is divided by the factor.
    pub beta_slow: f64,
    /// What cosines and sines are multiplied with.
    pub attention_factor: f64,
}

/// Mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// The chosen weights are divided by their sum.
    pub renormalise: bool,
    /// Which layers have experts.
    pub sparse: Vec<bool>,
}

/// Why a `config.json` is refused: the field, its value, and the rule.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON.
    #[error("config.json is not JSON")]
    Json(#[source] serde_json::Error),
    /// A field's value cannot be served.
    #[error("config.json: `{field}` {rule}, got {value}")]
    Field {
        /// Its name.
        field: String,
        /// What it holds; `nothing` when it is missing.
        value: String,
        /// What it must be.
        rule: String,
    },
}

/// Reads fields by name, and names them in errors.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn refuse<T>(&self, name: &str, rule: impl Into<String>) -> Result<T, ConfigError> {
        let value = self.get(name);
        Err(ConfigError::Field {
            field: name.to_owned(),
            value: value.map_or_else(|| "nothing".to_owned(), Value::to_string),
            rule: rule.into(),
        })
    }

    fn optional<T: for<'de> Deserialize<'de>>(
        &self,
        name: &str,
        rule: &str,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match T::deserialize(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => self.refuse(name, rule),
            },
        }
    }

    /// A whole number of at least 1 and at most 2^24, which no Qwen3 reaches.
    fn size(&self, name: &str) -> Result<usize, ConfigError> {
        self.optional_size(name)?
            .map_or_else(|| self.refuse(name, SIZE), Ok)
    }

    fn optional_size(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        match self.optional::<usize>(name, SIZE)? {
            Some(size) if !(1..=1 << 24).contains(&size) => self.refuse(name, SIZE),
            size => Ok(size),
        }
    }

    /// How many there are of something that each takes memory before any weight of it is read.
    fn count(&self, name: &str) -> Result<usize, ConfigError> {
        match self.size(name)? {
            count if count > COUNT_MAX => self.refuse(
                name,
                format!("must be a whole number from 1 to {COUNT_MAX}"),
            ),
            count => Ok(count),
        }
    }

    fn positive(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        let rule = "must be a finite number above 0";
        match self.optional::<f64>(name, rule)? {
            Some(number) if !(number.is_finite() && number > 0.0) => self.refuse(name, rule),
            number => Ok(number),
        }
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self
            .optional(name, "must be true or false")?
            .unwrap_or(default))
    }
}

/// Most layers, and most experts of one: several times what the largest Qwen3 has.
const COUNT_MAX: usize = 1024;
const SIZE: &str = "must be a whole number from 1 to 16777216";

impl Config {
    /// Parses and checks.
    ///
    /// # Errors
    /// When it is not JSON, of another architecture, quantised, incomplete or contradicts itself.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let map: Map<String, Value> = serde_json::from_str(json).map_err(ConfigError::Json)?;
        let fields = Fields(&map);
        let is_moe = architecture(&fields)?;
        refuse_unsupported(&fields)?;
        let layers = fields.count("num_hidden_layers")?;
        let heads = fields.size("num_attention_heads")?;
        let kv_heads = fields
            .optional_size("num_key_value_heads")?
            .unwrap_or(heads);
        if heads % kv_heads != 0 {
            return fields.refuse(
                "num_key_value_heads",
                format!("must divide num_attention_heads ({heads})"),
            );
        }
        // Qwen3's default, which is not hidden_size / heads.
        let head_dim = fields.optional_size("head_dim")?.unwrap_or(128);
        if head_dim % 16 != 0 || head_dim > 512 {
            return fields.refuse("head_dim", "must be a multiple of 16, at most 512");
        }
        let vocab_size = fields.size("vocab_size")?;
        let eps = fields.positive("rms_norm_eps")?.unwrap_or(1e-6);
        let max_positions = fields.size("max_position_embeddings")?;
        let rope = rope(&fields, max_positions)?;
        let stretched = rope
            .yarn
            .map_or(0.0, |y| y.factor * y.original_positions as f64);
        Ok(Self {
            vocab_size,
            real_vocab_size: vocab_size.min(REAL_VOCABULARY),
            hidden_size: fields.size("hidden_size")?,
            intermediate_size: fields.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: eps as f32,
            tied: fields.flag("tie_word_embeddings", false)?,
            max_positions: max_positions.max(stretched as usize),
            rope,
            moe: if is_moe {
                Some(moe(&fields, layers)?)
            } else {
                None
            },
        })
    }

    /// Whether layer `layer` has experts.
    #[must_use]
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|moe| moe.sparse[layer])
    }

    /// Width of a row of q, k and v side by side.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Whether it is a mixture of experts.
fn architecture(fields: &Fields<'_>) -> Result<bool, ConfigError> {
    let rule = "must be \"qwen3\" or \"qwen3_moe\"";
    let is_moe = match fields.optional::<String>("model_type", rule)?.as_deref() {
        Some("qwen3") => false,
        Some("qwen3_moe") => true,
        _ => return fields.refuse("model_type", rule),
    };
    let name = if is_moe {
        "Qwen3MoeForCausalLM"
    } else {
        "Qwen3ForCausalLM"
    };
    let rule = format!("must be [\"{name}\"]");
    match fields.optional::<Vec<String>>("architectures", &rule)? {
        Some(names) if names != [name] => fields.refuse("architectures", rule),
        _ => Ok(is_moe),
    }
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    for name in ["quantization_config", "compression_config"] {
        if fields.get(name).is_some() {
            return fields.refuse(
                name,
                "must be absent: quantised checkpoints are not read; give the bf16 checkpoint and choose the form of \
                 weights when it is loaded",
            );
        }
    }
    if fields.flag("attention_bias", false)? {
        return fields.refuse("attention_bias", "must be false");
    }
    if fields.flag("use_sliding_window", false)? {
        return fields.refuse("use_sliding_window", "must be false");
    }
    let rule = "must be \"silu\"";
    if fields
        .optional::<String>("hidden_act", rule)?
        .is_some_and(|act| act != "silu")
    {
        return fields.refuse("hidden_act", rule);
    }
    let rule = "must name \"full_attention\" for every layer";
    let types = fields.optional::<Vec<String>>("layer_types", rule)?;
    if types.is_some_and(|types| types.iter().any(|t| t != "full_attention")) {
        return fields.refuse("layer_types", rule);
    }
    Ok(())
}

/// transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters` with both.
fn rope(fields: &Fields<'_>, max_positions: usize) -> Result<Rope, ConfigError> {
    let rule = "must be an object";
    let new = fields.optional::<Map<String, Value>>("rope_parameters", rule)?;
    let old = fields.optional::<Map<String, Value>>("rope_scaling", rule)?;
    if new.is_some() && old.is_some() && new != old {
        return fields.refuse("rope_scaling", "must be absent beside `rope_parameters`");
    }
    let scaling = new.or(old).unwrap_or_default();
    let scaling = Fields(&scaling);
    let theta = match (
        scaling.positive("rope_theta")?,
        fields.positive("rope_theta")?,
    ) {
        (Some(a), Some(b)) if a != b => {
            return fields.refuse(
                "rope_theta",
                format!("must be that of `rope_parameters` ({a})"),
            );
        }
        (Some(theta), _) | (None, Some(theta)) => theta,
        (None, None) => return fields.refuse("rope_theta", "must be a finite number above 0"),
    };
    let rule = "must be \"default\" or \"yarn\"";
    let name = if scaling.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let yarn = match scaling.optional::<String>(name, rule)?.as_deref() {
        None | Some("default") => None,
        Some("yarn") => Some(yarn(&scaling, max_positions)?),
        Some(_) => return scaling.refuse(name, rule),
    };
    Ok(Rope { theta, yarn })
}

fn yarn(fields: &Fields<'_>, max_positions: usize) -> Result<Yarn, ConfigError> {
    let rule = "must be a number of at least 1";
    let factor = match fields.positive("factor")? {
        Some(factor) if factor >= 1.0 => factor,
        _ => return fields.refuse("factor", rule),
    };
    for name in ["mscale", "mscale_all_dim"] {
        if fields.get(name).is_some() {
            return fields.refuse(name, "must be absent");
        }
    }
    let beta_fast = fields.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = fields.positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast <= beta_slow {
        return fields.refuse(
            "beta_fast",
            format!("must be above beta_slow ({beta_slow})"),
        );
    }
    Ok(Yarn {
        factor,
        original_positions: fields
            .optional_size("original_max_position_embeddings")?
            .unwrap_or(max_positions),
        beta_fast,
        beta_slow,
        attention_factor: fields
            .positive("attention_factor")?
            .unwrap_or(0.1 * factor.ln() + 1.0),
    })
}

fn moe(fields: &Fields<'_>, layers: usize) -> Result<Moe, ConfigError> {
    // transformers 5 writes `num_local_experts`.
    let experts = match (
        fields.optional_size("num_experts")?,
        fields.optional_size("num_local_experts")?,
    ) {
        (Some(a), Some(b)) if a != b => {
            return fields.refuse("num_local_experts", format!("must equal num_experts ({a})"));
        }
        (Some(experts), _) | (None, Some(experts)) => experts,
        (None, None) => return fields.refuse("num_experts", SIZE),
    };
    if experts > COUNT_MAX {
        let rule = format!("must be a whole number from 1 to {COUNT_MAX}");
        return fields.refuse("num_experts", rule);
    }
    let top_k = fields.size("num_experts_per_tok")?;
    if top_k > experts {
        return fields.refuse(
            "num_experts_per_tok",
            format!("must be at most the number of experts ({experts})"),
        );
    }
    let step = fields.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let rule = format!("must name layers below {layers}");
    let dense = fields
        .optional::<Vec<usize>>("mlp_only_layers", &rule)?
        .unwrap_or_default();
    if dense.iter().any(|layer| *layer >= layers) {
        return fields.refuse("mlp_only_layers", rule);
    }
    Ok(Moe {
        experts,
        top_k,
        intermediate_size: fields.size("moe_intermediate_size")?,
        renormalise: fields.flag("norm_topk_prob", false)?,
        sparse: (0..layers)
            .map(|layer| (layer + 1) % step == 0 && !dense.contains(&layer))
            .collect(),
    })
}

#[cfg(test)]
mod tests;
