//! Attention to long documents by cuDNN.
//!
//! A plan takes a second to make and is for one length, so documents are gathered by lengths rounded up, in batches of a
//! power of two, and a run of training soon has all its plans. The backward keeps a gradient of each score: where that is
//! more than [`backward_bytes`], heads and documents take turns.

#![expect(unsafe_code, reason = "plans run on memory by address")]

use std::collections::HashMap;
use std::error::Error;
use std::ops::Range;

use super::super::{Attended, Attention, Heads, Kind, Mat};
use super::rows::whole;
use super::{BY_OWN_KERNEL, Cuda, count};
use crate::cuda::buffer::{Buffer, Element};
use crate::cuda::compile::{File, Module};
use crate::cuda::cudnn::Cudnn;
use crate::cuda::cudnn::attention::{Attention as Planned, Part, Shape, Strides, TILE};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

/// Tiles of heads of q that run side by side: with half as many a GPU was seen to be a sixth slower.
const TILES: usize = 1024;
/// The most elements of a head that were tried.
const DIM_MAX: usize = 128;
/// Floats and offsets of a part begin at multiples of as many.
const TOGETHER: usize = 4;
/// Room for what a plan takes beside what is counted.
const SPARE_BYTES: usize = 1 << 20;
/// What begins behind something else begins at a multiple.
const ALIGNED_BYTES: usize = 256;

/// cuDNN, with what it has planned.
pub(super) struct Fused {
    /// None: it refused.
    plans: HashMap<Shape, Option<Planned>>,
    batches: Batches,
    /// Behind all that was made with it.
    cudnn: Cudnn,
}

/// Documents of similar length, which run together.
#[derive(Debug, PartialEq, Eq)]
struct Batch {
    longest: usize,
    /// Documents, and empty ones up to a power of two.
    slots: usize,
    /// Where its own begin among the lengths and offsets of all.
    at: usize,
}

/// The documents that were last seen.
#[derive(Default)]
struct Batches {
    documents: Vec<Range<usize>>,
    heads: [usize; 3],
    bytes: usize,
    batches: Vec<Batch>,
    /// First rows of the documents of each batch, then the end of its last.
    starts: Vec<i64>,
    lengths: Option<Buffer<u32>>,
    /// The starts in elements of rows that lie so far apart. Those that are not of these documents have stride 0.
    offsets: Vec<(usize, Buffer<i64>)>,
}

/// The length that a document is planned for: a power of two, or half again as much as one.
fn rounded(tokens: usize) -> usize {
    let above = tokens.next_power_of_two().max(TILE);
    let between = above / 4 * 3;
    match between >= tokens && between.is_multiple_of(TILE) {
        true => between,
        false => above,
    }
}

fn shape(documents: usize, longest: usize, [q, kv, dim]: [usize; 3], kv_heads: usize) -> Shape {
    Shape {
        documents,
        longest,
        heads: [q / kv * kv_heads, kv_heads, dim],
        strides: Strides::default(),
    }
}

/// Heads of k that may be taken at once: equal shares, of which floats begin where they must.
fn shares([q, kv, _]: [usize; 3]) -> impl DoubleEndedIterator<Item = usize> {
    let shared = q / kv;
    (1..=kv).filter(move |heads| {
        let starts_well = (heads * shared).is_multiple_of(TOGETHER) || *heads == kv;
        kv.is_multiple_of(*heads) && starts_well
    })
}

/// Memory that the backward takes at most for a micro-batch of so many tokens: for one document of them, as many heads as
/// fill a GPU.
pub(super) fn backward_bytes(tokens: usize, heads: [usize; 3]) -> usize {
    let longest = rounded(tokens);
    let enough = |kv_heads: &usize| heads[0] / heads[1] * kv_heads * longest / TILE >= TILES;
    let kv_heads = shares(heads).find(enough).unwrap_or(heads[1]);
    let bytes = shape(1, longest, heads, kv_heads).backward_bytes();
    // What cuDNN takes beyond what grows with the shape is small, and differs from version to version.
    bytes + bytes / 256 + SPARE_BYTES
}

/// Room that attention takes for itself, forward and backward: bytes.
pub(super) fn room_bytes(tokens: usize, heads: &Heads, way: Attention) -> u64 {
    let heads_of = [heads.q, heads.kv, heads.dim];
    let is_for = |from| tokens >= from && heads.dim <= DIM_MAX && heads.dim.is_multiple_of(8);
    match way {
        Attention::Cudnn { from } if is_for(from) => {
            (lse_bytes(tokens, heads.q) + backward_bytes(tokens, heads_of)) as u64
        }
        _ => 0,
    }
}

/// Log-sum-exps of all rows.
fn lse_bytes(tokens: usize, q: usize) -> usize {
    (4 * tokens * q).next_multiple_of(ALIGNED_BYTES)
}

/// Heads of k that the backward takes at once within so many bytes.
fn at_once(longest: usize, heads: [usize; 3], bytes: usize) -> usize {
    let fits = |kv_heads: &usize| shape(1, longest, heads, *kv_heads).backward_bytes() <= bytes;
    let least = shares(heads).next().unwrap_or(heads[1]);
    shares(heads).rev().find(fits).unwrap_or(least)
}

/// Documents by batches whose backwards fit so many bytes.
fn batches(
    documents: &[Range<usize>],
    heads: [usize; 3],
    bytes: usize,
) -> Vec<(Batch, Vec<Range<usize>>)> {
    let mut documents = documents.to_vec();
    documents.sort_by_key(|document| std::cmp::Reverse(rounded(document.len())));
    let mut batches = Vec::new();
    let mut at = 0;
    for alike in documents.chunk_by(|a, b| rounded(a.len()) == rounded(b.len())) {
        let longest = rounded(alike[0].len());
        let one = shape(1, longest, heads, heads[1]).backward_bytes();
        // The largest power of two of which all heads fit.
        let most = 1 << (bytes / one).max(1).ilog2();
        for together in alike.chunks(most) {
            let slots = together.len().next_power_of_two();
            let batch = Batch { longest, slots, at };
            at += (slots + 1).next_multiple_of(TOGETHER);
            batches.push((batch, together.to_vec()));
        }
    }
    batches
}

/// A buffer that holds `values`: the old one, if it is long enough.
fn filled<T: Element>(
    device: &Device,
    old: Option<Buffer<T>>,
    values: &[T],
) -> Result<Buffer<T>, CudaError> {
    let mut buffer = match old.filter(|old| old.len() >= values.len()) {
        Some(old) => old,
        None => device.zeroed(values.len().next_power_of_two())?,
    };
    device.write(&mut buffer, 0, values)?;
    Ok(buffer)
}

impl Batches {
    fn of(
        &mut self,
        device: &Device,
        documents: &[Range<usize>],
        heads: [usize; 3],
        bytes: usize,
    ) -> Result<(), CudaError> {
        if self.documents == documents && (self.heads, self.bytes) == (heads, bytes) {
            return Ok(());
        }
        self.documents.clear();
        self.batches.clear();
        self.starts.clear();
        let mut lengths = Vec::new();
        for (batch, together) in batches(documents, heads, bytes) {
            let end = together[together.len() - 1].end;
            let starts = together.iter().map(|document| document.start as i64);
            self.starts.extend(starts);
            lengths.extend(together.iter().map(|document| count(document.len())));
            let filled = batch.at + (batch.slots + 1).next_multiple_of(TOGETHER);
            self.starts.resize(filled, end as i64);
            lengths.resize(filled, 0);
            self.batches.push(batch);
        }
        self.lengths = Some(filled(device, self.lengths.take(), &lengths)?);
        for (stride, _) in &mut self.offsets {
            *stride = 0;
        }
        self.documents = documents.to_vec();
        (self.heads, self.bytes) = (heads, bytes);
        Ok(())
    }

    /// Address of the offsets of rows that lie so far apart.
    fn offsets(&mut self, device: &Device, stride: usize) -> Result<u64, CudaError> {
        if let Some((_, buffer)) = self.offsets.iter().find(|(of, _)| *of == stride) {
            return Ok(buffer.address(device));
        }
        let free = self.offsets.iter().position(|(of, _)| *of == 0);
        let old = free.map(|free| self.offsets.swap_remove(free).1);
        let starts = self.starts.iter().map(|start| start * stride as i64);
        let buffer = filled(device, old, &starts.collect::<Vec<i64>>())?;
        let address = buffer.address(device);
        self.offsets.push((stride, buffer));
        Ok(address)
    }

    fn bytes(&self) -> u64 {
        let lengths = self.lengths.as_ref().map_or(0, Buffer::len);
        let offsets = self.offsets.iter().map(|(_, buffer)| buffer.len());
        4 * lengths as u64 + 8 * offsets.sum::<usize>() as u64
    }
}

/// Whether scratch memory and what is kept beside it fit: another version of cuDNN may want more than was planned for.
fn within(scratch_bytes: usize, shape: &Shape, room: usize) -> Result<(), CudaError> {
    let deltas = (4 * shape.deltas()).next_multiple_of(ALIGNED_BYTES);
    match deltas + scratch_bytes {
        wanted if wanted <= room => Ok(()),
        wanted => Err(CudaError::Shape {
            operation: "attention by cuDNN",
            name: "scratch memory",
            rule: format!("must be at most {room} bytes for {shape:?}"),
            got: wanted,
        }),
    }
}

impl Fused {
    pub(super) fn open(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            plans: HashMap::new(),
            batches: Batches::default(),
            cudnn: Cudnn::open(device)?,
        })
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        self.batches.bytes()
    }

    /// Whether a shape runs in so many bytes of room. It is planned once; that cuDNN refuses it is told then, and that the
    /// room is too small each time.
    fn prepare(&mut self, shape: Shape, room: usize) -> Result<bool, CudaError> {
        if !self.plans.contains_key(&shape) {
            let plan = match shape.strides.d_qkv {
                0 => Planned::forward(&self.cudnn, &shape),
                _ => Planned::backward(&self.cudnn, &shape),
            };
            let (plan, refused) = match plan {
                Ok(plan) => (Some(plan), Ok(())),
                Err(error) => (None, Err(error)),
            };
            self.plans.insert(shape, plan);
            refused?;
        }
        match self.plans.get(&shape) {
            Some(Some(plan)) => within(plan.scratch_bytes(), &shape, room).map(|()| true),
            _ => Ok(false),
        }
    }
}

/// Where an op's matrices are.
struct Places {
    qk: u64,
    v: u64,
    out: u64,
    /// Of d_out and of d_qkv, in the backward.
    grads: Option<[u64; 2]>,
    strides: Strides,
    heads: [usize; 3],
}

impl Places {
    /// Heads of k that run together.
    fn at_once(&self, batch: &Batch, bytes: usize) -> usize {
        match self.grads {
            None => self.heads[1],
            Some(_) => at_once(batch.longest, self.heads, bytes),
        }
    }

    fn shape(&self, batch: &Batch, kv_heads: usize) -> Shape {
        Shape {
            strides: self.strides,
            ..shape(batch.slots, batch.longest, self.heads, kv_heads)
        }
    }
}

/// Documents by rows; empty ones are left out.
fn documents(ends: &[usize]) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let documents = starts.zip(ends).map(|(start, end)| start..*end);
    documents.filter(|document| !document.is_empty()).collect()
}

impl Cuda {
    /// Lets cuDNN attend to the documents that it is for, forward or, where gradients of the mix and room for those of q, k
    /// and v are given, backward. Returns the documents that are left.
    pub(super) fn by_cudnn(
        &mut self,
        heads: &Heads,
        ends: &[usize],
        with: &Attended,
        grads: Option<[Mat; 2]>,
    ) -> Result<Vec<Range<usize>>, CudaError> {
        let all = documents(ends);
        let Attention::Cudnn { from } = self.attention else {
            return Ok(all);
        };
        let (long, short): (Vec<_>, Vec<_>) = all.iter().cloned().partition(|d| d.len() >= from);
        let Some(places) = self.places(heads, with, grads).filter(|_| !long.is_empty()) else {
            return Ok(all);
        };
        let Some(mut fused) = self.fused.take() else {
            return Ok(all);
        };
        let ran = self.run(&mut fused, &places, &long, with);
        self.fused = Some(fused);
        Ok(if ran? { short } else { all })
    }

    /// Where the matrices are, if cuDNN can read them as they lie.
    fn places(&self, heads: &Heads, with: &Attended, grads: Option<[Mat; 2]>) -> Option<Places> {
        let narrow = |mat| self.arena.narrow(&self.device, mat);
        let mut mats = vec![with.qk, with.v, with.out];
        mats.extend(grads.iter().flatten());
        let at: Vec<u64> = mats.iter().map(|mat| narrow(*mat)).collect();
        let fits = heads.dim <= DIM_MAX && whole(heads.dim, &mats, &at) == 1;
        let stride = |i: usize| mats.get(i).map_or(0, |mat| mat.stride);
        fits.then(|| Places {
            qk: at[0],
            v: at[1],
            out: at[2],
            grads: grads.map(|_| [at[3], at[4]]),
            strides: Strides {
                qk: stride(0),
                v: stride(1),
                out: stride(2),
                lse: heads.q,
                d_out: stride(3),
                d_qkv: stride(4),
            },
            heads: [heads.q, heads.kv, heads.dim],
        })
    }

    /// Whether cuDNN has taken the documents: it may refuse, and then does so again.
    fn run(
        &mut self,
        fused: &mut Fused,
        places: &Places,
        documents: &[Range<usize>],
        with: &Attended,
    ) -> Result<bool, CudaError> {
        let tokens = with.qk.rows;
        let [q, ..] = places.heads;
        let bytes = backward_bytes(tokens, places.heads);
        fused
            .batches
            .of(&self.device, documents, places.heads, bytes)?;
        for i in 0..fused.batches.batches.len() {
            let batch = &fused.batches.batches[i];
            let shape = places.shape(batch, places.at_once(batch, bytes));
            match fused.prepare(shape, bytes) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => {
                    if self.refused.is_none() {
                        tracing::warn!(error = &error as &dyn Error, tokens, "{BY_OWN_KERNEL}");
                        self.refused = Some(error);
                    }
                    return Ok(false);
                }
            }
        }
        let lse_bytes = lse_bytes(tokens, q);
        let room = self.room(lse_bytes + bytes)?;
        let lse = self.lse_of(places.heads, with);
        if places.grads.is_some() {
            self.transpose(room, lse, q, tokens)?;
        }
        self.launch_batches(fused, places, bytes, [room, room + lse_bytes as u64])?;
        if places.grads.is_none() {
            self.transpose(lse, room, tokens, q)?;
        }
        Ok(true)
    }

    fn launch_batches(
        &self,
        fused: &mut Fused,
        places: &Places,
        bytes: usize,
        [lse, room]: [u64; 2],
    ) -> Result<(), CudaError> {
        let strides = places.strides;
        let device = &self.device;
        let mut offsets = |stride| match stride {
            0 => Ok(0),
            stride => fused.batches.offsets(device, stride),
        };
        let offsets = [
            offsets(strides.qk)?,
            offsets(strides.v)?,
            offsets(strides.out)?,
            offsets(strides.lse)?,
            offsets(strides.d_out)?,
            offsets(strides.d_qkv)?,
        ];
        let lengths = fused.batches.lengths.as_ref();
        let lengths = lengths.map_or(0, |buffer| buffer.address(device));
        for batch in &fused.batches.batches {
            let kv_heads = places.at_once(batch, bytes);
            let shape = places.shape(batch, kv_heads);
            let Some(plan) = &fused.plans[&shape] else {
                continue;
            };
            let scratch = room + (4 * shape.deltas()).next_multiple_of(ALIGNED_BYTES) as u64;
            for first in (0..places.heads[1]).step_by(kv_heads) {
                let at = At {
                    places,
                    first,
                    lse,
                    lengths: lengths + 4 * batch.at as u64,
                    offsets: offsets.map(|all| all + 8 * batch.at as u64),
                    delta: room,
                };
                // SAFETY: the arena has checked where matrices lie, and documents are rows of them; heads are within the
                // rows; the room holds deltas and scratch of every batch.
                unsafe { plan.run(&fused.cudnn, |part| at.address(part), scratch) }?;
            }
        }
        Ok(())
    }

    /// `to[cols, rows] = from[rows, cols]ᵀ`, floats.
    fn transpose(&self, to: u64, from: u64, rows: usize, cols: usize) -> Result<(), CudaError> {
        let args = [
            Arg::Address(to),
            Arg::Address(from),
            Arg::U32(count(rows)),
            Arg::U32(count(cols)),
        ];
        let grid = (count(cols.div_ceil(32)), count(rows.div_ceil(32)), 1);
        let module = Module::plain(File::TrainRows);
        // SAFETY: the arguments are the kernel's; one is the room, the other log-sum-exps of as many heads and tokens.
        unsafe { self.device.launch(module, "transpose", grid, 256, &args) }
    }

    fn lse_of(&self, heads: [usize; 3], with: &Attended) -> u64 {
        let len = heads[0] * with.qk.rows;
        self.arena.first(&self.device, with.lse, len, Kind::Exact)
    }
}

/// What a launch is given.
struct At<'a> {
    places: &'a Places,
    /// The first head of k.
    first: usize,
    lse: u64,
    lengths: u64,
    /// By rows of q and k, v, the mix, log-sum-exps, its gradient, those of q, k and v.
    offsets: [u64; 6],
    delta: u64,
}

impl At<'_> {
    fn address(&self, part: Part) -> u64 {
        let [q, kv, dim] = self.places.heads;
        let [d_out, d_qkv] = self.places.grads.unwrap_or_default();
        let first_q = self.first * (q / kv);
        let head = |of: u64, head: usize| of + 2 * (head * dim) as u64;
        match part {
            Part::Q => head(self.places.qk, first_q),
            Part::K => head(self.places.qk, q + self.first),
            Part::V => head(self.places.v, self.first),
            Part::Out => head(self.places.out, first_q),
            Part::Lse => self.lse + 4 * first_q as u64,
            Part::Lengths => self.lengths,
            Part::QkOffsets => self.offsets[0],
            Part::VOffsets => self.offsets[1],
            Part::OutOffsets => self.offsets[2],
            Part::LseOffsets => self.offsets[3],
            Part::DOutOffsets => self.offsets[4],
            Part::DQkvOffsets => self.offsets[5],
            Part::DOut => head(d_out, first_q),
            Part::DQ => head(d_qkv, first_q),
            Part::DK => head(d_qkv, q + self.first),
            Part::DV => head(d_qkv, q + kv + self.first),
            Part::Delta => self.delta,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN: [usize; 3] = [32, 8, 128];

    #[test]
    fn lengths_are_rounded_to_few() {
        let rounded: Vec<usize> = [1, 128, 129, 257, 385, 1025, 1537, 20_000, 32_768]
            .into_iter()
            .map(rounded)
            .collect();
        assert_eq!(
            rounded,
            [128, 128, 256, 384, 512, 1536, 2048, 24_576, 32_768]
        );
    }

    #[test]
    fn the_longest_document_takes_turns_by_heads() {
        let turns = |tokens| {
            let bytes = backward_bytes(tokens, QWEN);
            (at_once(rounded(tokens), QWEN, bytes), bytes >> 20)
        };
        assert_eq!(turns(3000), (8, 627));
        assert_eq!(turns(8192), (4, 2121));
        assert_eq!(turns(32_768), (1, 8289));
        // A share of two heads would begin its floats at 8 bytes.
        assert_eq!(shares([16, 8, 128]).collect::<Vec<_>>(), [2, 4, 8]);
    }

    #[test]
    fn a_plan_runs_only_where_its_scratch_memory_fits() {
        let shape = shape(1, 8192, QWEN, 4);
        let room = backward_bytes(8192, QWEN);
        let deltas = 4 * shape.deltas();
        within(room - deltas, &shape, room).unwrap();
        let error = within(room - deltas + 1, &shape, room).unwrap_err();
        assert!(error.to_string().contains("scratch memory"), "{error}");
    }

    #[test]
    fn every_batch_fits_what_one_document_takes() {
        for tokens in [1024, 3000, 8192, 20_000, 65_536] {
            let bytes = backward_bytes(tokens, QWEN);
            for parts in [1, 2, 3, 7, 40] {
                let len = tokens / parts;
                let ends: Vec<usize> = (1..=parts).map(|i| i * len).collect();
                for (batch, of) in batches(&documents(&ends), QWEN, bytes) {
                    let kv_heads = at_once(batch.longest, QWEN, bytes);
                    let taken = shape(batch.slots, batch.longest, QWEN, kv_heads).backward_bytes();
                    assert!(taken <= bytes, "{parts} of {tokens}: {batch:?}");
                    assert!(of.len() <= batch.slots && of.iter().all(|d| d.len() <= batch.longest));
                }
            }
        }
    }

    #[test]
    fn documents_of_a_length_run_together() {
        let ends = [3000, 3000, 3100, 3200, 5200, 5290];
        let bytes = backward_bytes(8192, QWEN);
        let batches = batches(&documents(&ends), QWEN, bytes);
        let seen: Vec<_> = batches
            .iter()
            .map(|(batch, of)| (batch.longest, batch.slots, batch.at, of.len()))
            .collect();
        assert_eq!(seen, [(3072, 1, 0, 1), (2048, 1, 4, 1), (128, 4, 8, 3)]);
    }
}
