//! A model before it has learned anything.

use std::collections::BTreeMap;
use std::path::Path;

use espalier_core::chat::Message;
use espalier_practice::draw::Draw;
use espalier_qwen3::Config;
use espalier_qwen3_text::{Tokenizer, learn};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::Failed;
use crate::lessons::{Lessons, tools};

/// Lessons that the vocabulary is learned from.
const LESSONS: usize = 3_000;
/// Tokens of the vocabulary, control tokens aside.
const VOCABULARY: usize = 2_000;
/// Words of letters; digits, line breaks and spaces on their own; what stands between words together. So a name is the
/// same tokens wherever it stands.
const WORDS: &str = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*\n*|\n+| ";
/// Deviation of the first weights.
const DEVIATION: f32 = 0.02;

const HIDDEN: usize = 256;
const LAYERS: usize = 6;
const HEADS: usize = 8;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 32;
const MLP: usize = 768;

/// Writes vocabulary, configuration and drawn weights.
///
/// # Errors
/// What cannot be learned or written.
pub fn write(folder: &Path) -> Result<(), Failed> {
    std::fs::create_dir_all(folder)?;
    let own = Tokenizer::shared().map_err(Failed::Own)?;
    let mut lessons = Lessons::new(0, 1, own);
    let texts: Result<Vec<String>, Failed> = (0..LESSONS)
        .map(|_| text(&lessons.next()?.messages))
        .collect();
    let vocabulary = learn(texts?.iter().map(String::as_str), WORDS, VOCABULARY)?;
    let tokens = Tokenizer::from_json(&vocabulary)?.vocabulary() as usize;
    std::fs::write(folder.join("tokenizer.json"), &vocabulary)?;
    let config = config(tokens.next_multiple_of(64));
    std::fs::write(folder.join("config.json"), &config)?;
    weights(&Config::parse(&config)?, folder)
}

/// A conversation as its prompt.
///
/// # Errors
/// The template refuses it.
pub fn text(messages: &[Message]) -> Result<String, Failed> {
    let own = Tokenizer::shared().map_err(Failed::Own)?;
    let prompt = espalier_dataset::Renderer::new(own).prompt(messages, &tools(), true)?;
    Ok(prompt.text().to_owned())
}

fn config(vocab_size: usize) -> String {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    format!("{config:#}\n")
}

fn weights(config: &Config, folder: &Path) -> Result<(), Failed> {
    let (hidden, queries, keys) = (HIDDEN, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        (
            "model.embed_tokens.weight".into(),
            vec![config.vocab_size, hidden],
        ),
        ("model.norm.weight".into(), vec![hidden]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_norm", vec![HEAD_DIM]),
            ("self_attn.k_norm", vec![HEAD_DIM]),
            ("self_attn.q_proj", vec![queries, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, queries]),
            ("mlp.gate_proj", vec![MLP, hidden]),
            ("mlp.up_proj", vec![MLP, hidden]),
            ("mlp.down_proj", vec![hidden, MLP]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let bytes: BTreeMap<String, Vec<u8>> = shapes
        .iter()
        .map(|(name, shape)| (name.clone(), drawn(name, shape.iter().product())))
        .collect();
    let mut views = BTreeMap::new();
    for (name, shape) in shapes {
        let view = TensorView::new(Dtype::BF16, shape, &bytes[&name])?;
        views.insert(name, view);
    }
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(())
}

/// Little-endian bf16: norms are one, the others a sum of four uniform draws, which is near enough to a normal one. What
/// adds to the residual stream is smaller by the root of how often that happens.
fn drawn(name: &str, count: usize) -> Vec<u8> {
    if name.contains("norm") {
        return [0x80, 0x3F].repeat(count);
    }
    let adds = name.contains("o_proj") || name.contains("down_proj");
    let scale = if adds {
        (2.0 * LAYERS as f32).sqrt().recip()
    } else {
        1.0
    };
    let mut draw = Draw::new(1, name);
    let mut bytes = Vec::with_capacity(2 * count);
    for _ in 0..count {
        let bits = draw.bits();
        let unit: f32 = (0..4)
            .map(|n| (bits >> (16 * n)) as u16)
            .map(|u| f32::from(u) / 65_536.0 - 0.5)
            .sum();
        // Of four uniform draws of width 1 the deviation is the root of a third.
        let value = unit * 3f32.sqrt() * DEVIATION * scale;
        bytes.extend_from_slice(&value.to_bits().to_le_bytes()[2..]);
    }
    bytes
}
