//! Attention over the paged KV cache, and the op that fills it.
//!
//! A cache of one layer is two buffers, keys and values, `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`. `tables` is
//! `[.., table_blocks]`: the blocks of a row of the step, in the order of positions.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use half::bf16;

use super::{BLOCK_TOKENS, need, rule, small};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::{File, GROUPS, HEAD_DIMS, Module};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

fn heads_fit(
    op: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<(), CudaError> {
    let divides = kv_heads > 0 && heads.is_multiple_of(kv_heads);
    rule(
        op,
        "heads",
        heads,
        &format!("must be a multiple of the {kv_heads} KV heads"),
        divides,
    )?;
    let known = HEAD_DIMS.iter().any(|d| *d as usize == head_dim);
    rule(
        op,
        "head_dim",
        head_dim,
        &format!("must be one of {HEAD_DIMS:?}"),
        known,
    )
}

/// `tables` from lists of blocks that lie one behind the other: what a step uploads is as long as its rows.
pub struct SpreadTables<'a> {
    /// `[rows, table_blocks]`; past the end of a row's list it stays as it is.
    pub tables: &'a mut Buffer<u32>,
    /// `[rows + 1]`: where the list of a row begins, and where it ends.
    pub starts: &'a Buffer<u32>,
    /// The lists.
    pub blocks: &'a Buffer<u32>,
    /// Rows.
    pub rows: usize,
    /// Length of a row of `tables`.
    pub table_blocks: usize,
}

impl SpreadTables<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "spread_tables";
        need(
            op,
            "tables",
            self.tables.len(),
            self.rows * self.table_blocks,
        )?;
        need(op, "starts", self.starts.len(), self.rows + 1)?;
        let args = [
            Arg::Address(self.tables.address(device)),
            Arg::Address(self.starts.address(device)),
            Arg::Address(self.blocks.address(device)),
            Arg::U32(small(op, "table_blocks", self.table_blocks)?),
        ];
        let grid = (small(op, "rows", self.rows)?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked; where lists lie is the caller's.
        unsafe {
            device.launch(
                Module::plain(File::Tables),
                "spread_tables",
                grid,
                128,
                &args,
            )
        }
    }
}

/// RMSNorm of each head of q and k, RoPE, and the writing of k and v to the cache.
pub struct QkNormRopeStore<'a> {
    /// `[tokens, heads, head_dim]`, written.
    pub q: &'a mut Buffer<bf16>,
    /// Keys of the layer.
    pub k_cache: &'a mut Buffer<bf16>,
    /// Values of the layer.
    pub v_cache: &'a mut Buffer<bf16>,
    /// `[tokens, heads + 2 kv_heads, head_dim]`.
    pub qkv: &'a Buffer<bf16>,
    /// `[head_dim]`.
    pub q_weight: &'a Buffer<bf16>,
    /// `[head_dim]`.
    pub k_weight: &'a Buffer<bf16>,
    /// `[positions, head_dim]`: of each position `head_dim / 2` cosines, then as many sines.
    pub turns: &'a Buffer<f32>,
    /// Row of `tables`, by token; [`super::NONE`]: the token is left out.
    pub rows: &'a Buffer<u32>,
    /// Position, by token.
    pub positions: &'a Buffer<u32>,
    /// Blocks of each row.
    pub tables: &'a Buffer<u32>,
    /// Length of a row of `tables`.
    pub table_blocks: usize,
    /// Tokens of the step.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Of the norms.
    pub eps: f32,
}

impl QkNormRopeStore<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "qk_norm_rope_store";
        heads_fit(op, self.heads, self.kv_heads, self.head_dim)?;
        let all = self.heads + 2 * self.kv_heads;
        need(
            op,
            "q",
            self.q.len(),
            self.tokens * self.heads * self.head_dim,
        )?;
        need(op, "v_cache", self.v_cache.len(), self.k_cache.len())?;
        need(op, "qkv", self.qkv.len(), self.tokens * all * self.head_dim)?;
        need(op, "q_weight", self.q_weight.len(), self.head_dim)?;
        need(op, "k_weight", self.k_weight.len(), self.head_dim)?;
        need(op, "rows", self.rows.len(), self.tokens)?;
        need(op, "positions", self.positions.len(), self.tokens)?;
        let args = [
            Arg::Address(self.q.address(device)),
            Arg::Address(self.k_cache.address(device)),
            Arg::Address(self.v_cache.address(device)),
            Arg::Address(self.qkv.address(device)),
            Arg::Address(self.q_weight.address(device)),
            Arg::Address(self.k_weight.address(device)),
            Arg::Address(self.turns.address(device)),
            Arg::Address(self.rows.address(device)),
            Arg::Address(self.positions.address(device)),
            Arg::Address(self.tables.address(device)),
            Arg::U32(small(op, "table_blocks", self.table_blocks)?),
            Arg::U32(small(op, "tokens", self.tokens)?),
            Arg::U32(self.heads as u32),
            Arg::U32(self.kv_heads as u32),
            Arg::U32(self.head_dim as u32),
            Arg::F32(self.eps),
        ];
        let grid = (small(op, "tokens", (self.tokens * all).div_ceil(4))?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked; places in the cache are the caller's.
        unsafe {
            device.launch(
                Module::plain(File::Norm),
                "qk_norm_rope_store",
                grid,
                128,
                &args,
            )
        }
    }
}

/// Into how many parts the attention of a row is split: so that the device is full twice over, each part has a block of
/// the KV cache for every warp, and no more than 32.
pub fn decode_splits(device: &Device, rows: usize, kv_heads: usize, positions_max: usize) -> usize {
    let wanted = (2 * device.multiprocessors() as usize).div_ceil((rows * kv_heads).max(1));
    wanted
        .min(positions_max.div_ceil(4 * BLOCK_TOKENS))
        .clamp(1, 32)
}

/// What attention reads, whatever it is of: queries, keys and values of a layer, and where those of each row lie.
#[derive(Clone, Copy)]
pub struct Paged<'a> {
    /// `[tokens, heads, head_dim]`.
    pub q: &'a Buffer<bf16>,
    /// Keys of the layer, those of the new tokens among them.
    pub k_cache: &'a Buffer<bf16>,
    /// Values of the layer.
    pub v_cache: &'a Buffer<bf16>,
    /// Blocks of each row.
    pub tables: &'a Buffer<u32>,
    /// Length of a row of `tables`.
    pub table_blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl Paged<'_> {
    /// Refuses buffers that are too short for `tokens` queries, whose answers go to `out`.
    fn fit(&self, op: &'static str, out: &Buffer<bf16>, tokens: usize) -> Result<(), CudaError> {
        heads_fit(op, self.heads, self.kv_heads, self.head_dim)?;
        let elements = tokens * self.heads * self.head_dim;
        need(op, "out", out.len(), elements)?;
        need(op, "q", self.q.len(), elements)?;
        need(op, "v_cache", self.v_cache.len(), self.k_cache.len())
    }

    /// Addresses of q, keys and values.
    fn addresses(&self, device: &Device) -> [Arg; 3] {
        [self.q, self.k_cache, self.v_cache].map(|buffer| Arg::Address(buffer.address(device)))
    }

    fn table_args(&self, op: &'static str, device: &Device) -> Result<[Arg; 2], CudaError> {
        Ok([
            Arg::Address(self.tables.address(device)),
            Arg::U32(small(op, "table_blocks", self.table_blocks)?),
        ])
    }

    /// What scores are multiplied with.
    fn scale(&self) -> Arg {
        Arg::F32(1.0 / (self.head_dim as f32).sqrt())
    }
}

/// Attention of one token a row: split over the length, then merged.
pub struct DecodeAttention<'a> {
    /// `[rows, heads, head_dim]`. A row of length 0 gets zeroes.
    pub out: &'a mut Buffer<bf16>,
    /// Scratch, `[rows, heads, splits, head_dim]`.
    pub parts: &'a mut Buffer<f32>,
    /// Scratch, `[rows, heads, splits]`.
    pub lse: &'a mut Buffer<f32>,
    /// Queries, keys and values; the first `rows` tokens are those of the rows.
    pub paged: Paged<'a>,
    /// Positions that a row sees: its own and all before; 0: no token.
    pub lengths: &'a Buffer<u32>,
    /// Rows.
    pub rows: usize,
    /// Parts, see [`decode_splits`].
    pub splits: usize,
}

impl DecodeAttention<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit, or there is no kernel for these heads.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "decode_attention";
        let (paged, rows) = (self.paged, self.rows);
        let (heads, kv_heads, head_dim) = (paged.heads, paged.kv_heads, paged.head_dim);
        paged.fit(op, self.out, rows)?;
        let group = heads / kv_heads;
        let known = GROUPS.iter().any(|g| *g as usize == group);
        let say = format!("must be {GROUPS:?} times the {kv_heads} KV heads");
        rule(op, "heads", heads, &say, known)?;
        let possible = (1..=1024).contains(&self.splits);
        rule(op, "splits", self.splits, "must be 1 to 1024", possible)?;
        let parts = rows * heads * self.splits;
        need(op, "parts", self.parts.len(), parts * head_dim)?;
        need(op, "lse", self.lse.len(), parts)?;
        need(op, "lengths", self.lengths.len(), rows)?;
        need(op, "tables", paged.tables.len(), rows * paged.table_blocks)?;
        let module = Module {
            file: File::Decode,
            head_dim: head_dim as u32,
            group: group as u32,
        };
        let (parts, lse) = (self.parts.address(device), self.lse.address(device));
        let [q, keys, values] = paged.addresses(device);
        let [tables, table_blocks] = paged.table_args(op, device)?;
        let args = [
            Arg::Address(parts),
            Arg::Address(lse),
            q,
            keys,
            values,
            Arg::Address(self.lengths.address(device)),
            tables,
            table_blocks,
            Arg::U32(kv_heads as u32),
            Arg::U32(self.splits as u32),
            paged.scale(),
        ];
        let grid = (
            small(op, "rows", rows)?,
            kv_heads as u32,
            self.splits as u32,
        );
        // SAFETY: the arguments are the kernel's, and the lengths were checked; blocks in the tables are the caller's.
        unsafe { device.launch(module, "decode_split", grid, 128, &args) }?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(parts),
            Arg::Address(lse),
            Arg::U32(self.splits as u32),
        ];
        let grid = (small(op, "rows", rows * heads)?, 1, 1);
        // SAFETY: as above.
        unsafe { device.launch(module, "decode_merge", grid, head_dim as u32, &args) }
    }
}

/// Attention of many tokens a row, each over the positions up to its own.
pub struct PrefillAttention<'a> {
    /// `[tokens, heads, head_dim]`; tokens of no tile stay as they are.
    pub out: &'a mut Buffer<bf16>,
    /// Queries, keys and values.
    pub paged: Paged<'a>,
    /// See [`Self::tiles_of`]; unused ones begin with [`super::NONE`].
    pub tiles: &'a Buffer<[u32; 4]>,
    /// Tiles.
    pub count: usize,
    /// Tokens of `q` and `out`.
    pub tokens: usize,
}

impl PrefillAttention<'_> {
    /// Tokens of a tile at most.
    pub const TILE: u32 = 64;

    /// Tiles of a row whose tokens begin at `first` of the step and at `position` of the row.
    pub fn tiles_of(
        row: u32,
        first: u32,
        tokens: u32,
        position: u32,
    ) -> impl Iterator<Item = [u32; 4]> {
        let starts = (0..tokens).step_by(Self::TILE as usize);
        starts.map(move |start| {
            [
                row,
                first + start,
                (tokens - start).min(Self::TILE),
                position + start,
            ]
        })
    }

    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit, or there is no kernel for these heads.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "prefill_attention";
        let paged = self.paged;
        paged.fit(op, self.out, self.tokens)?;
        need(op, "tiles", self.tiles.len(), self.count)?;
        let [q, keys, values] = paged.addresses(device);
        let [tables, table_blocks] = paged.table_args(op, device)?;
        let args = [
            Arg::Address(self.out.address(device)),
            q,
            keys,
            values,
            Arg::Address(self.tiles.address(device)),
            tables,
            table_blocks,
            Arg::U32(paged.heads as u32),
            Arg::U32(paged.kv_heads as u32),
            paged.scale(),
        ];
        let module = Module {
            file: File::Prefill,
            head_dim: paged.head_dim as u32,
            group: 0,
        };
        let grid = (small(op, "count", self.count)?, paged.heads as u32, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked; tiles and tables are the caller's.
        unsafe { device.launch(module, "prefill", grid, 128, &args) }
    }
}
