//! How much memory there is, and how much of it keys and values may have.

use espalier_kernels::cpu::Form;
use espalier_qwen3::Config;

use crate::executor::BLOCK_TOKENS;

/// Most memory for keys and values that is taken without being told to.
const KV_BYTES_CAP: u64 = 16 << 30;
/// Of the memory that is left beside the model, keys and values take this share without being told to: the machine is
/// not ours alone.
const KV_SHARE: f64 = 0.5;
/// A model that cannot even do this much is of no use.
const CONTEXT_TOKENS_MIN: usize = 256;

/// Why a model is not started.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum MemoryError {
    /// Not even the weights.
    #[error(
        "the weights take {needed} as {form}, and {available} of memory are available; as q8 they would take {as_q8}"
    )]
    Weights {
        needed: Gib,
        form: &'static str,
        available: Gib,
        as_q8: Gib,
    },
    /// A context that was asked for.
    #[error(
        "`--max-model-len` of {asked} tokens does not fit: {budget} for keys and values hold {fits} tokens. Set it to at \
         most {fits}, or give more with `--kv-cache-memory-bytes`"
    )]
    Context {
        asked: usize,
        budget: Gib,
        fits: usize,
    },
    /// Any context.
    #[error(
        "{budget} for keys and values hold {fits} tokens, and at least {CONTEXT_TOKENS_MIN} are needed, which take \
         {needed}: free some memory, or give it with `--kv-cache-memory-bytes`"
    )]
    TooLittle {
        budget: Gib,
        fits: usize,
        needed: Gib,
    },
}

/// Bytes, shown in GiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Gib(pub u64);

impl std::fmt::Display for Gib {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} GiB", self.0 as f64 / (1_u64 << 30) as f64)
    }
}

/// What is asked for of the memory for keys and values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    /// Bytes, if somebody said.
    pub kv_bytes: Option<u64>,
    /// Tokens of prompt and answer, if somebody said.
    pub context_tokens: Option<usize>,
    /// Sequences at once.
    pub sequences: usize,
    /// Tokens of a step.
    pub step_tokens: usize,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub kv_blocks: u32,
    pub context_tokens: usize,
}

/// Whether weights of that form fit at all: said before they are read.
pub(super) fn check_weights(
    config: &Config,
    form: Form,
    available: u64,
) -> Result<(), MemoryError> {
    let needed = weight_bytes(config, form);
    if needed <= available {
        return Ok(());
    }
    Err(MemoryError::Weights {
        needed: Gib(needed),
        form: form_name(form),
        available: Gib(available),
        as_q8: Gib(weight_bytes(config, Form::Q8)),
    })
}

/// What options call a form of weights.
pub(super) fn form_name(form: Form) -> &'static str {
    match form {
        Form::F32 => "f32",
        Form::Bf16 | Form::Bf16Pairs => "bf16",
        Form::Q8 => "q8",
    }
}

/// Blocks and context, where `block_bytes` is one block over all layers and `available` what is left beside the weights.
pub(super) fn plan(
    config: &Config,
    block_bytes: u64,
    wish: Wish,
    available: u64,
) -> Result<Plan, MemoryError> {
    let context_most = config.max_positions;
    let asked = wish.context_tokens.unwrap_or(context_most);
    let blocks_of = |tokens: usize| tokens.div_ceil(BLOCK_TOKENS) as u64;
    let most = blocks_of(asked).saturating_mul(wish.sequences as u64);
    let budget = wish.kv_bytes.unwrap_or_else(|| {
        let left = available.saturating_sub(step_bytes(config, wish));
        KV_BYTES_CAP.min((left as f64 * KV_SHARE) as u64)
    });
    let blocks = (budget / block_bytes.max(1))
        .min(most)
        .min(u64::from(u32::MAX));
    let fits = blocks as usize * BLOCK_TOKENS;
    let context_tokens = match wish.context_tokens {
        Some(asked) if asked > fits => {
            return Err(MemoryError::Context {
                asked,
                budget: Gib(budget),
                fits,
            });
        }
        _ => asked.min(fits),
    };
    if context_tokens < CONTEXT_TOKENS_MIN.min(asked) {
        return Err(MemoryError::TooLittle {
            budget: Gib(budget),
            fits,
            needed: Gib(blocks_of(CONTEXT_TOKENS_MIN) * block_bytes),
        });
    }
    Ok(Plan {
        kv_blocks: blocks as u32,
        context_tokens,
    })
}

/// Bytes of all weights.
fn weight_bytes(config: &Config, form: Form) -> u64 {
    let hidden = config.hidden_size as u64;
    let heads = if config.tied { 1 } else { 2 };
    let vocabulary = config.vocab_size as u64 * hidden * heads;
    let attention = (config.qkv_width() + config.heads * config.head_dim) as u64 * hidden;
    let dense = 3 * config.intermediate_size as u64 * hidden;
    let mlp = |layer: usize| match &config.moe {
        Some(moe) if config.is_sparse(layer) => {
            let expert = 3 * moe.intermediate_size as u64 * hidden;
            moe.experts as u64 * (expert + hidden)
        }
        _ => dense,
    };
    let layers: u64 = (0..config.layers).map(|layer| attention + mlp(layer)).sum();
    let count = vocabulary + layers;
    match form {
        Form::F32 => count * 4,
        Form::Bf16 | Form::Bf16Pairs => count * 2,
        // A scale of two bytes for each block of 32.
        Form::Q8 => count + count / 16,
    }
}

/// Bytes that a step works in: what its tokens have in a layer, and the logits of its rows.
fn step_bytes(config: &Config, wish: Wish) -> u64 {
    let wide = match &config.moe {
        Some(moe) => config
            .intermediate_size
            .max(moe.intermediate_size * moe.top_k),
        None => config.intermediate_size,
    };
    let token = 4 * config.hidden_size + 2 * config.qkv_width() + 3 * wide;
    4 * (token * wish.step_tokens + config.vocab_size * wish.sequences) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::parse(
            r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": true}"#,
        )
        .unwrap()
    }

    const BLOCK: u64 = 28 * 8 * 128 * 16 * 2 * 4;

    fn wish(kv_bytes: Option<u64>, context_tokens: Option<usize>) -> Wish {
        Wish {
            kv_bytes,
            context_tokens,
            sequences: 8,
            step_tokens: 512,
        }
    }

    #[test]
    fn the_weights_of_the_smallest_are_as_known() {
        let bytes = weight_bytes(&config(), Form::Bf16);
        // 596,049,920 parameters, of which 65,536 or so are norms.
        assert!(bytes.abs_diff(2 * 596_049_920) < 300_000, "{bytes}");
        let error = check_weights(&config(), Form::Bf16, 1 << 30)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("take 1.11 GiB as bf16, and 1.00 GiB"),
            "{error}"
        );
        assert_eq!(check_weights(&config(), Form::Q8, 1 << 30), Ok(()));
    }

    #[test]
    fn a_context_that_nobody_asked_for_is_cut_to_what_fits() {
        let given = Some(100 * BLOCK + 5);
        let fits = Plan {
            kv_blocks: 100,
            context_tokens: 1600,
        };
        assert_eq!(plan(&config(), BLOCK, wish(given, None), 0), Ok(fits));
        let error = plan(&config(), BLOCK, wish(given, Some(1601)), 0).unwrap_err();
        assert!(error.to_string().contains("at most 1600"), "{error}");
        let error = plan(&config(), BLOCK, wish(Some(5 * BLOCK), None), 0).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("hold 80 tokens, and at least 256"),
            "{error}"
        );
        let short = plan(&config(), BLOCK, wish(given, Some(64)), 0).unwrap();
        assert_eq!(
            (short.context_tokens, short.kv_blocks),
            (64, 4 * 8),
            "no more than can ever be used"
        );
    }

    #[test]
    fn keys_and_values_take_a_share_of_what_is_left() {
        let half = |available: u64| {
            plan(&config(), BLOCK, wish(None, Some(1024)), available).map(|plan| plan.kv_blocks)
        };
        assert_eq!(half(64 << 30), Ok(64 * 8));
        let blocks = half(1 << 30).unwrap();
        assert!((100..150).contains(&blocks), "{blocks}");
    }
}
