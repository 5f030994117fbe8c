//! A Qwen3 of two small layers over the whole vocabulary or over a small one of its own, and adapters for it, drawn from
//! seeds: what it says means nothing, but it says the same each time.

use std::path::Path;

use espalier_qwen3::{Draw, hashed};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 64;
const WIDE: usize = 128;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const VOCABULARY: usize = 151_936;
/// Twelve more than [`SMALL_TOKENIZER`] has.
const SMALL_VOCABULARY: usize = 2112;
const RANK: usize = 4;

/// A tensor of a file, as bytes of `dtype`.
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The tokenizer of the model with a small vocabulary, of 2,100 ids: `<|im_end|>` is 23, `<|endoftext|>` 25.
pub const SMALL_TOKENIZER: &str =
    include_str!("../../../crates/qwen3-text/tests/golden/small/tokenizer.json");

/// Writes a model in two shards.
pub fn write_model(folder: &Path) {
    write_over(folder, VOCABULARY, [151_645, 151_643]);
}

/// Writes a model that brings [`SMALL_TOKENIZER`].
pub fn write_small_model(folder: &Path) {
    write_over(folder, SMALL_VOCABULARY, [23, 25]);
    write(folder, "tokenizer.json", SMALL_TOKENIZER.as_bytes());
}

/// A model over so many ids, of which these end an answer.
fn write_over(folder: &Path, vocabulary: usize, ends: [u32; 2]) {
    std::fs::create_dir_all(folder).expect("a folder of the test's");
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocabulary,
        "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "max_position_embeddings": 4096,
        "tie_word_embeddings": true, "eos_token_id": ends[0], "torch_dtype": "bfloat16",
    });
    write(folder, "config.json", config.to_string().as_bytes());
    let generation = json!({"eos_token_id": ends, "temperature": 0.6, "top_k": 20, "top_p": 0.95});
    write(
        folder,
        "generation_config.json",
        generation.to_string().as_bytes(),
    );
    let mut first = vec![matrix("model.embed_tokens.weight", &[vocabulary, HIDDEN])];
    let mut second = vec![matrix("model.norm.weight", &[HIDDEN])];
    for layer in 0..LAYERS {
        let shard = if layer == 0 { &mut first } else { &mut second };
        shard.extend(layer_tensors(layer));
    }
    let mut places = Map::new();
    for (file, tensors) in [(SHARDS[0], &first), (SHARDS[1], &second)] {
        write(folder, file, &safetensors(tensors));
        places.extend(
            tensors
                .iter()
                .map(|tensor| (tensor.name.clone(), json!(file))),
        );
    }
    let index = json!({"metadata": {}, "weight_map": places});
    write(
        folder,
        "model.safetensors.index.json",
        index.to_string().as_bytes(),
    );
}

/// The files of its weights.
pub const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

/// Writes an adapter for it, whose numbers follow from `seed` and change what it says.
pub fn write_adapter(folder: &Path, seed: u64) {
    write_adapter_of(folder, seed, HIDDEN, None);
}

/// An adapter for a model of another width.
pub fn write_adapter_of_another(folder: &Path) {
    write_adapter_of(folder, 1, HIDDEN + 32, None);
}

/// An adapter that also changes the module `name`.
pub fn write_adapter_with(folder: &Path, name: &str) {
    write_adapter_of(folder, 1, HIDDEN, Some(name));
}

/// Makes an adapter say that it was made for the model `base`.
pub fn say_base(folder: &Path, base: &str) {
    let path = folder.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("an adapter of the test's");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["base_model_name_or_path"] = json!(base);
    write(folder, "adapter_config.json", config.to_string().as_bytes());
}

fn write_adapter_of(folder: &Path, seed: u64, hidden: usize, more: Option<&str>) {
    std::fs::create_dir_all(folder).expect("a folder of the test's");
    let config = json!({
        "peft_type": "LORA", "r": RANK, "lora_alpha": 16, "use_rslora": true, "target_modules": ["q_proj", "o_proj"],
        "bias": "none", "base_model_name_or_path": "tiny",
    });
    write(folder, "adapter_config.json", config.to_string().as_bytes());
    let attention = HEADS * HEAD_DIM;
    let mut tensors = Vec::new();
    for layer in 0..LAYERS {
        for (module, inputs, outputs) in
            [("q_proj", hidden, attention), ("o_proj", attention, hidden)]
        {
            let name = format!("base_model.model.model.layers.{layer}.self_attn.{module}");
            tensors.push(float(
                &format!("{name}.lora_A.weight"),
                &[RANK, inputs],
                seed,
            ));
            tensors.push(float(
                &format!("{name}.lora_B.weight"),
                &[outputs, RANK],
                seed,
            ));
        }
    }
    if let Some(module) = more {
        let name = format!("base_model.model.{module}.lora_A.weight");
        tensors.push(float(&name, &[RANK, hidden], seed));
    }
    write(folder, "adapter_model.safetensors", &safetensors(&tensors));
}

fn layer_tensors(layer: usize) -> Vec<Tensor> {
    let attention = HEADS * HEAD_DIM;
    let kv = KV_HEADS * HEAD_DIM;
    let of =
        |name: &str, shape: &[usize]| matrix(&format!("model.layers.{layer}.{name}.weight"), shape);
    vec![
        of("input_layernorm", &[HIDDEN]),
        of("self_attn.q_proj", &[attention, HIDDEN]),
        of("self_attn.k_proj", &[kv, HIDDEN]),
        of("self_attn.v_proj", &[kv, HIDDEN]),
        of("self_attn.o_proj", &[HIDDEN, attention]),
        of("self_attn.q_norm", &[HEAD_DIM]),
        of("self_attn.k_norm", &[HEAD_DIM]),
        of("post_attention_layernorm", &[HIDDEN]),
        of("mlp.gate_proj", &[WIDE, HIDDEN]),
        of("mlp.up_proj", &[WIDE, HIDDEN]),
        of("mlp.down_proj", &[HIDDEN, WIDE]),
    ]
}

/// Numbers of a size that keeps activations near one, in bf16.
fn matrix(name: &str, shape: &[usize]) -> Tensor {
    let norm = name.contains("norm");
    let inputs = *shape.last().unwrap_or(&1) as f32;
    let scale = if norm { 0.25 } else { 2.0 / inputs.sqrt() };
    let values = drawn(name, shape, 1, scale, if norm { 1.0 } else { 0.0 });
    // Drawn numbers are exact in bf16; a norm's offset is cut, which is as good a number.
    let bytes = values
        .iter()
        .flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes());
    Tensor {
        name: name.to_owned(),
        dtype: "BF16",
        shape: shape.to_vec(),
        bytes: bytes.collect(),
    }
}

fn float(name: &str, shape: &[usize], seed: u64) -> Tensor {
    let values = drawn(name, shape, seed, 0.5, 0.0);
    Tensor {
        name: name.to_owned(),
        dtype: "F32",
        shape: shape.to_vec(),
        bytes: values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

fn drawn(name: &str, shape: &[usize], seed: u64, scale: f32, offset: f32) -> Vec<f32> {
    let named = name
        .bytes()
        .fold(seed, |seed, byte| seed.wrapping_mul(31) + u64::from(byte));
    let draw = Draw {
        seed: named % (1 << 24),
        start: 0,
        scale,
        offset,
    };
    hashed(draw, shape.iter().product())
}

/// The file format: the length of the header, the header, the numbers.
fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry: Value = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

fn write(folder: &Path, file: &str, content: &[u8]) {
    std::fs::write(folder.join(file), content).expect("a folder of the test's");
}
