//! PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use espalier_kernels::cpu::lora::LoraPair;
use espalier_kernels::cpu::{Form, PackedLinear, Pool, RowSource};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::checkpoint::{Checkpoint, CheckpointError, TensorSource};
use crate::config::Config;

/// Largest `adapter_config.json`, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why an adapter is refused.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any adapter's.
    #[error("{path} must have at most {bytes_max} bytes")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// How many it may have.
        bytes_max: u64,
    },
    /// Its files are not of one version.
    #[error("{0} was replaced while the weights were read: load it again")]
    Replaced(PathBuf),
    /// The configuration is not JSON.
    #[error("adapter_config.json is not JSON")]
    Json(#[source] serde_json::Error),
    /// A field's value cannot be served.
    #[error("adapter_config.json: `{field}` {rule}, got {value}")]
    Field {
        /// Its name.
        field: String,
        /// What it holds.
        value: String,
        /// What it must be.
        rule: String,
    },
    /// The weights are refused: another base, a missing tensor, a broken file.
    #[error("adapter_model.safetensors")]
    Weights(#[from] CheckpointError),
    /// A tensor that adapts nothing of this model.
    #[error("adapter tensor {0} adapts no projection of this model")]
    Unknown(String),
    /// A tensor with NaN or infinities.
    #[error("adapter tensor {0} holds values that are not finite")]
    NotFinite(String),
    /// It holds nothing.
    #[error("the adapter has no tensors")]
    Empty,
}

/// Places of a layer that are adapted: projections of one input are packed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// q, k and v.
    Qkv,
    /// From heads to the residual stream.
    O,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
}

impl Site {
    /// All of a layer.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

/// A loaded adapter.
pub struct Lora {
    layers: Vec<[Vec<LoraPair>; 4]>,
    digest: [u8; 32],
    rank: usize,
    base: Option<String>,
}

/// A projection: its name, its place, inputs, outputs, and where its outputs start in the packed row.
struct Target {
    name: &'static str,
    site: Site,
    inputs: usize,
    outputs: usize,
    offset: usize,
}

fn targets(config: &Config) -> [Target; 7] {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let target = |name, site, inputs, outputs, offset| Target {
        name,
        site,
        inputs,
        outputs,
        offset,
    };
    [
        target("self_attn.q_proj", Site::Qkv, hidden, q, 0),
        target("self_attn.k_proj", Site::Qkv, hidden, kv, q),
        target("self_attn.v_proj", Site::Qkv, hidden, kv, q + kv),
        target("self_attn.o_proj", Site::O, q, hidden, 0),
        target("mlp.gate_proj", Site::GateUp, hidden, wide, 0),
        target("mlp.up_proj", Site::GateUp, hidden, wide, wide),
        target("mlp.down_proj", Site::Down, wide, hidden, 0),
    ]
}

impl Lora {
    /// Largest `adapter_model.safetensors`, in bytes: rank 256 for every projection of the largest dense Qwen3 is 4 GiB.
    pub const FILE_BYTES_MAX: u64 = 8 << 30;

    /// Loads a folder that PEFT (or Espalier's trainer) wrote, for a model of `base`.
    ///
    /// # Errors
    /// When a file is missing or broken, a setting is not plain LoRA, or a tensor does not fit the base.
    pub fn load(folder: &Path, base: &Config, pool: &Pool) -> Result<Self, LoraError> {
        let file = LoraFile::read(folder)?;
        let mut lora = Self {
            layers: Vec::new(),
            digest: file.digest,
            rank: 0,
            base: file.settings.base.clone(),
        };
        let mut found = 0;
        for layer in 0..base.layers {
            let mut sites = [const { Vec::new() }; 4];
            for target in targets(base) {
                if base.is_sparse(layer) && target.name.starts_with("mlp.") {
                    continue;
                }
                if let Some(pair) = file.pair(layer, &target, pool)? {
                    lora.rank = lora.rank.max(pair.a.outputs());
                    sites[target.site as usize].push(pair);
                    found += 2;
                }
            }
            lora.layers.push(sites);
        }
        if found < file.weights.names().count() {
            return Err(LoraError::Unknown(unknown(&file.weights, base)));
        }
        if found == 0 {
            return Err(LoraError::Empty);
        }
        Ok(lora)
    }

    /// SHA-256 of what it computes with: settings and weights. Names the adapter's content in caches and traces.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The model that its configuration says it was made for: a repository, a folder, whatever its trainer called it.
    #[must_use]
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// The largest rank of a projection.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What it adds at a place of a layer: a pair for each projection that it adapts.
    ///
    /// # Panics
    /// When the base has no such layer.
    #[must_use]
    pub fn pairs(&self, layer: usize, site: Site) -> &[LoraPair] {
        &self.layers[layer][site as usize]
    }
}

/// The bytes of a file, at most so many.
fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, LoraError> {
    let too_large = || LoraError::TooLarge {
        path: path.to_owned(),
        bytes_max,
    };
    let failed = |source| LoraError::Read {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    if len > bytes_max {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(len as usize + 1);
    reserved.map_err(|error| failed(io::Error::other(error)))?;
    // It may grow while it is read.
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        return Err(too_large());
    }
    Ok(bytes)
}

pub(crate) fn tensor_name(module: &str, which: &str) -> String {
    format!("base_model.model.{module}.{which}.weight")
}

/// The first name that no projection of the base has.
fn unknown(weights: &Checkpoint, base: &Config) -> String {
    let known = |name: &str| {
        (0..base.layers).any(|layer| {
            targets(base)
                .iter()
                .filter(|t| !(base.is_sparse(layer) && t.name.starts_with("mlp.")))
                .any(|t| {
                    let module = format!("model.layers.{layer}.{}", t.name);
                    ["lora_A", "lora_B"]
                        .iter()
                        .any(|which| tensor_name(&module, which) == name)
                })
        })
    };
    let mut names: Vec<&str> = weights.names().filter(|name| !known(name)).collect();
    names.sort_unstable();
    names
        .first()
        .map_or_else(String::new, |name| (*name).to_owned())
}

/// The digest of an adapter's content while it is made: of its settings, then of the bytes of its weights.
pub struct ContentDigest(Sha256);

impl ContentDigest {
    /// Largest `adapter_config.json`, in bytes.
    pub const SETTINGS_BYTES_MAX: u64 = CONFIG_BYTES_MAX;

    /// Begins with what `adapter_config.json` says.
    ///
    /// # Errors
    /// It is not JSON, or not of plain LoRA.
    pub fn of_settings(config: &[u8]) -> Result<Self, LoraError> {
        Ok(Self::begin(&Settings::parse(config)?))
    }

    fn begin(settings: &Settings) -> Self {
        Self(Sha256::new().chain_update(settings.digest_text()))
    }

    /// Goes on with bytes of `adapter_model.safetensors`.
    #[must_use]
    pub fn update(self, bytes: &[u8]) -> Self {
        Self(self.0.chain_update(bytes))
    }

    /// What [`Lora::digest`] says of the same files.
    #[must_use]
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

struct Settings {
    base: Option<String>,
    r: f64,
    alpha: f64,
    rslora: bool,
    rank_pattern: Vec<(String, f64)>,
    alpha_pattern: Vec<(String, f64)>,
}

/// Settings that make it something else than plain LoRA, unless they are absent, null, false, empty or `"none"`.
const REFUSED: [&str; 13] = [
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
];

/// How PEFT may have begun: others change the base's weights, whose adapter alone is not what was trained.
const INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Largest rank: several times what any adapter of such a model needs.
const RANK_MAX: f64 = 1024.0;

fn refuse<T>(field: &str, value: Option<&Value>, rule: &str) -> Result<T, LoraError> {
    Err(LoraError::Field {
        field: field.to_owned(),
        value: value.map_or_else(|| "nothing".to_owned(), Value::to_string),
        rule: rule.to_owned(),
    })
}

/// What a number of the settings must be.
struct Rule {
    holds: fn(f64) -> bool,
    text: &'static str,
}

const RANK: Rule = Rule {
    holds: |r| r.fract() == 0.0 && (1.0..=RANK_MAX).contains(&r),
    text: "must be a whole number from 1 to 1024",
};
/// Scales are computed with in f32.
const ALPHA: Rule = Rule {
    holds: |alpha| alpha > 0.0 && alpha <= 1e6,
    text: "must be a number above 0, at most 1000000",
};

impl Rule {
    fn check(&self, field: &str, value: Option<&Value>) -> Result<f64, LoraError> {
        match value.and_then(Value::as_f64) {
            Some(number) if (self.holds)(number) => Ok(number),
            _ => refuse(field, value, self.text),
        }
    }
}

impl Settings {
    fn parse(text: &[u8]) -> Result<Self, LoraError> {
        let map: Map<String, Value> = serde_json::from_slice(text).map_err(LoraError::Json)?;
        if map.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return refuse("peft_type", map.get("peft_type"), "must be \"LORA\"");
        }
        for name in REFUSED {
            let off = match map.get(name) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::String(text)) => text.is_empty() || text == "none",
                Some(Value::Array(items)) => items.is_empty(),
                Some(Value::Object(items)) => items.is_empty(),
                Some(_) => false,
            };
            if !off {
                return refuse(name, map.get(name), "must be off: plain LoRA is served");
            }
        }
        match map.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(init)) if INITS.contains(&init.as_str()) => {}
            other => {
                let rule = "must leave the base's weights as they are: convert the adapter to plain LoRA when it is saved \
                            (PEFT: `path_initial_model_for_weight_conversion`)";
                return refuse("init_lora_weights", other, rule);
            }
        }
        let rslora = match map.get("use_rslora") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => *flag,
            other => return refuse("use_rslora", other, "must be true or false"),
        };
        let base = map.get("base_model_name_or_path").and_then(Value::as_str);
        Ok(Self {
            base: base.map(str::to_owned),
            r: RANK.check("r", map.get("r"))?,
            alpha: ALPHA.check("lora_alpha", map.get("lora_alpha"))?,
            rslora,
            rank_pattern: pattern(&map, "rank_pattern", &RANK)?,
            alpha_pattern: pattern(&map, "alpha_pattern", &ALPHA)?,
        })
    }

    /// What of the settings changes the numbers.
    fn digest_text(&self) -> String {
        format!(
            "{} {} {} {:?} {:?}\n",
            self.r, self.alpha, self.rslora, self.rank_pattern, self.alpha_pattern
        )
    }
}

/// An adapter's files as they were read.
pub(crate) struct LoraFile {
    settings: Settings,
    weights: Checkpoint,
    digest: [u8; 32],
}

/// What is added to one matrix: `scale · b · a`.
pub(crate) struct Factors {
    /// `[rank, inputs]`.
    pub(crate) a: Vec<f32>,
    /// `[outputs, rank]`.
    pub(crate) b: Vec<f32>,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl LoraFile {
    pub(crate) fn read(folder: &Path) -> Result<Self, LoraError> {
        let config = folder.join("adapter_config.json");
        let text = read(&config, CONFIG_BYTES_MAX)?;
        let settings = Settings::parse(&text)?;
        let path = folder.join("adapter_model.safetensors");
        // Read once: the digest must be that of the numbers that are computed with, also where somebody replaces the
        // file meanwhile, and one that is cut short under a map would end the process.
        let bytes = read(&path, Lora::FILE_BYTES_MAX)?;
        if read(&config, CONFIG_BYTES_MAX)? != text {
            return Err(LoraError::Replaced(config));
        }
        let digest = ContentDigest::begin(&settings).update(&bytes).finish();
        Ok(Self {
            settings,
            digest,
            weights: Checkpoint::read(&path, bytes)?,
        })
    }

    /// The names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.names()
    }

    /// What is added to the matrix `[outputs, inputs]` of a module such as `model.layers.0.self_attn.q_proj`, if the file
    /// has something for it.
    pub(crate) fn factors(
        &self,
        module: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Option<Factors>, LoraError> {
        let names = [tensor_name(module, "lora_A"), tensor_name(module, "lora_B")];
        if !names.iter().any(|name| self.weights.has(name)) {
            return Ok(None);
        }
        let settings = &self.settings;
        let r = matching(&settings.rank_pattern, module).unwrap_or(settings.r);
        let alpha = matching(&settings.alpha_pattern, module).unwrap_or(settings.alpha);
        let rank = r as usize;
        let numbers = |name: &str, shape: [usize; 2]| {
            let values = self.weights.tensor(name, &shape)?.to_vec();
            match values.iter().all(|value| value.is_finite()) {
                true => Ok(values),
                false => Err(LoraError::NotFinite(name.to_owned())),
            }
        };
        Ok(Some(Factors {
            a: numbers(&names[0], [rank, inputs])?,
            b: numbers(&names[1], [outputs, rank])?,
            rank,
            scale: (alpha / if settings.rslora { r.sqrt() } else { r }) as f32,
        }))
    }

    /// The pair for a projection, if the file has one.
    fn pair(
        &self,
        layer: usize,
        target: &Target,
        pool: &Pool,
    ) -> Result<Option<LoraPair>, LoraError> {
        let module = format!("model.layers.{layer}.{}", target.name);
        let Some(factors) = self.factors(&module, target.outputs, target.inputs)? else {
            return Ok(None);
        };
        let pack = |which: &str, k: usize, values: &[f32]| {
            PackedLinear::pack(pool, Form::F32, k, &[RowSource::F32(values)]).map_err(|source| {
                CheckpointError::Memory {
                    what: tensor_name(&module, which),
                    source,
                }
            })
        };
        Ok(Some(LoraPair {
            a: pack("lora_A", target.inputs, &factors.a)?,
            b: pack("lora_B", factors.rank, &factors.b)?,
            scale: factors.scale,
            offset: target.offset,
        }))
    }
}

/// Ranks or alphas by module, in the file's order: the first that matches counts.
fn pattern(
    map: &Map<String, Value>,
    name: &str,
    rule: &Rule,
) -> Result<Vec<(String, f64)>, LoraError> {
    let items = match map.get(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(items)) => items,
        other => return refuse(name, other, "must be an object of numbers"),
    };
    let mut pattern = Vec::new();
    for (module, value) in items {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if !module.chars().all(plain) {
            return refuse(
                name,
                map.get(name),
                "must name modules, without regular expressions",
            );
        }
        let number = rule.check(&format!("{name}.{module}"), Some(value))?;
        pattern.push((module.clone(), number));
    }
    Ok(pattern)
}

/// PEFT's rule: a pattern is the end of the module's name, from a dot on.
fn matching(pattern: &[(String, f64)], module: &str) -> Option<f64> {
    let matches = |name: &str| {
        module
            .strip_suffix(name)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    pattern
        .iter()
        .find(|(name, _)| matches(name))
        .map(|(_, number)| *number)
}
