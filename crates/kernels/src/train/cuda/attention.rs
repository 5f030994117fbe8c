//! Launches of attention, and the tiles that the own kernel walks through. cuDNN goes first, where it is for a document.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use std::ops::Range;

use super::super::{Attended, Heads, Kind, Mat};
use super::rows::whole;
use super::{Cuda, count};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::{File, Module, TRAIN_HEAD_DIMS};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

/// Rows of a tile.
const TILE: usize = 64;

/// Tiles of the documents that were last seen: by queries, then by keys, the longest work first.
#[derive(Default)]
pub(super) struct Tiles {
    documents: Vec<Range<usize>>,
    buffer: Option<Buffer<[u32; 4]>>,
    count: usize,
}

/// Tiles as the kernels read them: first row, rows, first row of the document, its end.
fn tiles(documents: &[Range<usize>]) -> Vec<[u32; 4]> {
    let mut tiles = Vec::new();
    for Range { start, end } in documents.iter().cloned() {
        for first in (start..end).step_by(TILE) {
            let rows = TILE.min(end - first);
            tiles.push([first, rows, start, end].map(count));
        }
    }
    tiles
}

impl Tiles {
    /// Makes the tiles of other documents.
    fn of(&mut self, device: &Device, documents: &[Range<usize>]) -> Result<(), CudaError> {
        if self.documents == documents {
            return Ok(());
        }
        let mut all = tiles(documents);
        self.count = all.len();
        let mut by_keys = all.clone();
        all.sort_by_key(|tile| std::cmp::Reverse(tile[0] - tile[2]));
        by_keys.sort_by_key(|tile| std::cmp::Reverse(tile[3] - tile[0]));
        all.extend(by_keys);
        let buffer = match &mut self.buffer {
            Some(buffer) if buffer.len() >= all.len() => buffer,
            buffer => buffer.insert(device.zeroed(all.len().next_power_of_two())?),
        };
        device.write(buffer, 0, &all)?;
        self.documents = documents.to_vec();
        Ok(())
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        16 * self.buffer.as_ref().map_or(0, Buffer::len) as u64
    }
}

/// Room that the backward takes for itself: bytes.
pub(super) fn room_bytes(tokens: usize, heads: usize) -> u64 {
    4 * (tokens * heads) as u64
}

/// What both directions are given.
struct Given {
    module: Module,
    qk: u64,
    v: u64,
    /// Of queries, and of keys.
    tiles: [u64; 2],
    /// Heads of q and of k by tiles.
    grid: [(u32, u32, u32); 2],
    /// tokens, heads of q, heads of k, elements of a head.
    sizes: [u32; 4],
}

impl Given {
    /// Bytes of so many tiles in shared memory.
    fn shared_tiles(&self, tiles: u32) -> u32 {
        2 * tiles * count(TILE) * (self.module.head_dim + 8)
    }
}

impl Cuda {
    fn given(
        &mut self,
        heads: &Heads,
        documents: &[Range<usize>],
        with: &Attended,
    ) -> Result<Given, CudaError> {
        let tokens = with.qk.rows;
        let mut compiled = TRAIN_HEAD_DIMS.iter();
        let compiled = compiled.find(|dim| **dim as usize >= heads.dim);
        let Some(compiled) = compiled else {
            return Err(CudaError::Shape {
                operation: "attention",
                name: "dim",
                rule: format!(
                    "must be at most {}",
                    TRAIN_HEAD_DIMS[TRAIN_HEAD_DIMS.len() - 1]
                ),
                got: heads.dim,
            });
        };
        self.tiles.of(&self.device, documents)?;
        let tiles = self.tiles.buffer.as_ref();
        let tiles = tiles.map_or(0, |buffer| buffer.address(&self.device));
        let blocks = count(self.tiles.count);
        Ok(Given {
            module: Module::of_heads(File::TrainAttention, *compiled),
            qk: self.arena.narrow(&self.device, with.qk),
            v: self.arena.narrow(&self.device, with.v),
            tiles: [tiles, tiles + 16 * u64::from(blocks)],
            grid: [heads.q, heads.kv].map(|heads| (count(heads), blocks, 1)),
            sizes: [tokens, heads.q, heads.kv, heads.dim].map(count),
        })
    }

    fn lse(&self, heads: &Heads, with: &Attended) -> u64 {
        let len = heads.q * with.qk.rows;
        self.arena.first(&self.device, with.lse, len, Kind::Exact)
    }

    pub(super) fn attend(
        &mut self,
        heads: &Heads,
        ends: &[usize],
        with: &Attended,
    ) -> Result<(), CudaError> {
        check(heads, ends, with);
        let left = self.by_cudnn(heads, ends, with, None)?;
        if left.is_empty() {
            return Ok(());
        }
        let given = self.given(heads, &left, with)?;
        let out = self.arena.narrow(&self.device, with.out);
        let lse = self.lse(heads, with);
        let at = [out, lse, given.qk, given.v, given.tiles[0]];
        let strides = [with.out.stride, with.qk.stride, with.v.stride];
        let moved = whole(
            heads.dim,
            &[with.out, with.qk, with.v],
            &[out, given.qk, given.v],
        );
        let args = arguments(heads, &at, &given.sizes, &strides, moved);
        // SAFETY: the arguments are the kernel's; the arena has checked where they lie, and tiles are of these rows.
        unsafe {
            let shared = given.shared_tiles(4);
            self.device
                .launch_sharing(given.module, "attention", given.grid[0], 128, shared, &args)
        }
    }

    pub(super) fn attend_grad(
        &mut self,
        heads: &Heads,
        ends: &[usize],
        with: &Attended,
        [d_out, d_qkv]: [Mat; 2],
    ) -> Result<(), CudaError> {
        let tokens = with.qk.rows;
        assert!(d_out.cols == heads.q_width() && d_out.rows == tokens);
        assert!(d_qkv.cols == heads.qkv_width() && d_qkv.rows == tokens);
        check(heads, ends, with);
        let left = self.by_cudnn(heads, ends, with, Some([d_out, d_qkv]))?;
        if left.is_empty() {
            return Ok(());
        }
        let delta = self.room(4 * tokens * heads.q)?;
        let given = self.given(heads, &left, with)?;
        let lse = self.lse(heads, with);
        let d_qkv_at = self.arena.narrow(&self.device, d_qkv);
        let d_out_at = self.arena.narrow(&self.device, d_out);
        let out = self.arena.narrow(&self.device, with.out);
        let mut args: Vec<Arg> = [delta, out, d_out_at].map(Arg::Address).into();
        for number in [tokens, heads.q, heads.dim, with.out.stride, d_out.stride] {
            args.push(Arg::U32(count(number)));
        }
        let grid = (count((tokens * heads.q).div_ceil(4)), 1, 1);
        // SAFETY: the arguments are the kernel's, and the arena has checked where they lie.
        unsafe {
            self.device
                .launch(given.module, "attention_delta", grid, 128, &args)
        }?;
        let strides = [d_qkv, with.qk, with.v, d_out].map(|mat| mat.stride);
        let moved = whole(
            heads.dim,
            &[d_qkv, with.qk, with.v, d_out],
            &[d_qkv_at, given.qk, given.v, d_out_at],
        );
        // Two tiles of 64 sums and of 64 deltas, beside those of rows.
        let sums = 4 * 4 * count(TILE);
        // Where a block may have less, the next tiles are not brought meanwhile.
        let ahead = given.shared_tiles(6) + sums <= self.device.shared_bytes_max();
        let d_kv = given.shared_tiles(if ahead { 6 } else { 4 }) + sums;
        let kernels = [
            ("attention_d_q", given.shared_tiles(4)),
            ("attention_d_kv", d_kv),
        ];
        for (i, (name, shared)) in kernels.into_iter().enumerate() {
            let at = [
                d_qkv_at,
                given.qk,
                given.v,
                d_out_at,
                lse,
                delta,
                given.tiles[i],
            ];
            let mut args = arguments(heads, &at, &given.sizes, &strides, moved);
            if name == "attention_d_kv" {
                args.push(Arg::U32(u32::from(ahead)));
            }
            // SAFETY: as above.
            unsafe {
                self.device
                    .launch_sharing(given.module, name, given.grid[i], 128, shared, &args)
            }?;
        }
        Ok(())
    }
}

fn check(heads: &Heads, ends: &[usize], with: &Attended) {
    let tokens = with.qk.rows;
    assert_eq!(ends.last(), Some(&tokens));
    assert!(ends.is_sorted() && with.v.rows == tokens);
    assert!(with.qk.cols == heads.qk_width() && with.v.cols == heads.kv * heads.dim);
    assert!(with.out.cols == heads.q_width() && with.out.rows == tokens);
}

/// Addresses, sizes and strides, then the scale of scores and how elements are moved.
fn arguments(
    heads: &Heads,
    addresses: &[u64],
    sizes: &[u32],
    strides: &[usize],
    moved: u32,
) -> Vec<Arg> {
    let addresses = addresses.iter().map(|address| Arg::Address(*address));
    let sizes = sizes.iter().map(|size| Arg::U32(*size));
    let strides = strides.iter().map(|stride| Arg::U32(count(*stride)));
    let scale = 1.0 / (heads.dim as f64).sqrt();
    let last = [Arg::F32(scale as f32), Arg::U32(moved)];
    addresses.chain(sizes).chain(strides).chain(last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_begin_anew_with_each_document() {
        let all = tiles(&[0..64, 64..65, 65..200]);
        assert_eq!(
            all,
            [
                [0, 64, 0, 64],
                [64, 1, 64, 65],
                [65, 64, 65, 200],
                [129, 64, 65, 200],
                [193, 7, 65, 200]
            ]
        );
    }
}
