//! What was trained, under the names that others load: an adapter as PEFT writes it, or a checkpoint's weights.

use std::borrow::Cow;
use std::collections::HashMap;

use espalier_kernels::train::{Backend, Slice};
use espalier_qwen3::Config;
use half::bf16;
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};

use super::settings::{LoraSettings, Projection, Trained};
use super::step::Trainer;

/// An export.
#[derive(Debug, Clone, PartialEq)]
pub struct Export {
    /// All that was trained.
    pub tensors: Vec<ExportTensor>,
    /// `adapter_config.json`, of an adapter; `base_model_name_or_path` is for the caller to set.
    pub adapter_config: Option<Value>,
}

/// One of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportTensor {
    /// As PEFT or the checkpoint names it.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its numbers: masters.
    pub values: Vec<f32>,
}

/// How numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportType {
    /// As they are.
    F32,
    /// Rounded to nearest even.
    Bf16,
}

/// A tensor as bytes.
struct Written<'a> {
    shape: &'a [usize],
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl Export {
    /// The bytes of a safetensors file, with the metadata that transformers looks for.
    ///
    /// # Errors
    /// When two tensors have one name, or a shape is not that of its numbers.
    pub fn to_safetensors(&self, to: ExportType) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = self.tensors.iter().map(|tensor| {
            let (dtype, bytes) = match to {
                ExportType::F32 => {
                    let bytes = tensor.values.iter().flat_map(|value| value.to_le_bytes());
                    (Dtype::F32, bytes.collect())
                }
                ExportType::Bf16 => {
                    let rounded = tensor.values.iter().map(|value| bf16::from_f32(*value));
                    let bytes = rounded.flat_map(bf16::to_le_bytes);
                    (Dtype::BF16, bytes.collect())
                }
            };
            let shape = &tensor.shape;
            (
                &tensor.name,
                Written {
                    shape,
                    dtype,
                    bytes,
                },
            )
        });
        safetensors::serialize(tensors, Some(metadata))
    }
}

impl<B: Backend> Trainer<B> {
    pub(crate) fn read_export(&mut self) -> Export {
        let values = self.model.flat.values;
        let backend = &mut self.backend;
        let tensors = self
            .layout
            .parameters
            .iter()
            .map(|parameter| ExportTensor {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
                values: backend.read(Slice::new(values, parameter.start, parameter.len)),
            })
            .collect();
        Export {
            tensors,
            adapter_config: match &self.settings.trained {
                Trained::Lora(lora) => Some(adapter_config(lora, &self.config)),
                Trained::Full => None,
            },
        }
    }
}

/// What PEFT needs to load the adapter.
fn adapter_config(lora: &LoraSettings, config: &Config) -> Value {
    let dense = (0..config.layers).any(|layer| !config.is_sparse(layer));
    let adapts = |target: &&Projection| target.module() == "self_attn" || dense;
    let targets = lora.targets.iter().filter(adapts);
    let targets: Vec<&str> = targets.map(|target| target.name()).collect();
    let whole = lora.alpha.fract() == 0.0;
    let alpha = if whole {
        json!(lora.alpha as u64)
    } else {
        json!(lora.alpha)
    };
    json!({
        "alpha_pattern": {},
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": lora.rslora,
    })
}
