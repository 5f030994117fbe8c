//! Memory that steps write and overwrite, as long as the largest step, and how much of the device everything takes.

use espalier_kernels::bf16;
use espalier_kernels::cuda::{BLOCK_TOKENS, Buffer, CudaError, Device, decode_splits};
use espalier_qwen3::Config;

/// Rows of which logits are in memory at once: those of a larger step are drawn in turns.
pub(super) const LOGITS_ROWS: usize = 256;

/// How large a step may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Largest {
    /// Tokens, those included that only fill a step up.
    pub tokens: usize,
    /// Rows, likewise.
    pub rows: usize,
    /// Rows × parts of the attention of single tokens.
    pub splits: usize,
    /// Blocks of a sequence of full length.
    pub table_blocks: usize,
}

/// How the attention of so many single tokens is split.
pub(super) fn splits(device: &Device, config: &Config, rows: usize, table_blocks: usize) -> usize {
    decode_splits(device, rows, config.kv_heads, table_blocks * BLOCK_TOKENS)
}

/// Elements of each buffer.
struct Lengths {
    hidden: usize,
    qkv: usize,
    heads: usize,
    gate_up: usize,
    mixed: usize,
    pairs: usize,
    pairs_hidden: usize,
    router: usize,
    experts: usize,
    last: usize,
    logits: usize,
    tables: usize,
    parts: usize,
    lse: usize,
}

impl Lengths {
    fn new(config: &Config, largest: &Largest) -> Self {
        let tokens = largest.tokens;
        let (experts, pairs, expert_width) = config.moe.as_ref().map_or((0, 0, 0), |moe| {
            (moe.experts, tokens * moe.top_k, moe.intermediate_size)
        });
        let has_dense = (0..config.layers).any(|layer| !config.is_sparse(layer));
        let dense = if has_dense {
            tokens * config.intermediate_size
        } else {
            0
        };
        let mixed = dense.max(pairs * expert_width);
        let logits_rows = largest.rows.min(LOGITS_ROWS);
        let parts = largest.splits * config.heads;
        Self {
            hidden: tokens * config.hidden_size,
            qkv: tokens * config.qkv_width(),
            heads: tokens * config.heads * config.head_dim,
            gate_up: 2 * mixed,
            mixed,
            pairs,
            pairs_hidden: pairs * config.hidden_size,
            router: tokens * experts,
            experts,
            last: largest.rows * config.hidden_size,
            logits: logits_rows * config.vocab_size,
            tables: largest.rows * largest.table_blocks,
            parts: parts * config.head_dim,
            lse: parts,
        }
    }
}

/// Bytes of a [`Room`].
pub(super) fn bytes(config: &Config, largest: &Largest) -> usize {
    let l = Lengths::new(config, largest);
    let narrow = 3 * l.hidden + l.qkv + 2 * l.heads + l.gate_up + l.mixed + l.pairs_hidden + l.last;
    let wide = 4 * l.pairs + l.router + l.experts + 1 + 2 * l.logits + l.tables + l.parts + l.lse;
    2 * narrow + 4 * wide
}

/// What ops leave for one another.
pub(super) struct Room {
    /// The residual stream.
    pub x: Buffer<bf16>,
    pub normed: Buffer<bf16>,
    pub delta: Buffer<bf16>,
    pub qkv: Buffer<bf16>,
    pub q: Buffer<bf16>,
    /// What attention gives.
    pub heads: Buffer<bf16>,
    pub gate_up: Buffer<bf16>,
    pub mixed: Buffer<bf16>,
    /// Of experts: each pair's answer.
    pub answers: Buffer<bf16>,
    pub router: Buffer<f32>,
    pub expert_ids: Buffer<u32>,
    pub expert_weights: Buffer<f32>,
    pub offsets: Buffer<u32>,
    pub order: Buffer<u32>,
    pub places: Buffer<u32>,
    /// The rows of which logits are wanted.
    pub last: Buffer<bf16>,
    pub logits: Buffer<f32>,
    pub work: Buffer<f32>,
    pub tables: Buffer<u32>,
    pub parts: Buffer<f32>,
    pub lse: Buffer<f32>,
}

impl Room {
    pub fn new(device: &Device, config: &Config, largest: &Largest) -> Result<Self, CudaError> {
        let l = Lengths::new(config, largest);
        Ok(Self {
            x: device.zeroed(l.hidden)?,
            normed: device.zeroed(l.hidden)?,
            delta: device.zeroed(l.hidden)?,
            qkv: device.zeroed(l.qkv)?,
            q: device.zeroed(l.heads)?,
            heads: device.zeroed(l.heads)?,
            gate_up: device.zeroed(l.gate_up)?,
            mixed: device.zeroed(l.mixed)?,
            answers: device.zeroed(l.pairs_hidden)?,
            router: device.zeroed(l.router)?,
            expert_ids: device.zeroed(l.pairs)?,
            expert_weights: device.zeroed(l.pairs)?,
            offsets: device.zeroed(l.experts + 1)?,
            order: device.zeroed(l.pairs)?,
            places: device.zeroed(l.pairs)?,
            last: device.zeroed(l.last)?,
            logits: device.zeroed(l.logits)?,
            work: device.zeroed(l.logits)?,
            tables: device.zeroed(l.tables)?,
            parts: device.zeroed(l.parts)?,
            lse: device.zeroed(l.lse)?,
        })
    }
}

/// Keys and values of a layer, `[blocks, kv_heads, BLOCK_TOKENS, head_dim]` each.
pub(super) struct Cache {
    pub keys: Buffer<bf16>,
    pub values: Buffer<bf16>,
}

/// Bytes of a KV block over all layers.
pub(super) fn block_bytes(config: &Config) -> usize {
    2 * config.layers * block_len(config) * size_of::<bf16>()
}

fn block_len(config: &Config) -> usize {
    config.kv_heads * BLOCK_TOKENS * config.head_dim
}

impl Cache {
    /// Of all layers.
    pub fn all(device: &Device, config: &Config, blocks: usize) -> Result<Vec<Self>, CudaError> {
        let len = blocks * block_len(config);
        let cache = |_| {
            Ok(Self {
                keys: device.zeroed(len)?,
                values: device.zeroed(len)?,
            })
        };
        (0..config.layers).map(cache).collect()
    }
}
