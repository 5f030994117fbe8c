//! The sampler: one id a row from fp32 logits. The order of its steps is in `sampler.cu`.

#![expect(
    unsafe_code,
    reason = "kernels are launched by address, and rows are copied to the device as they are"
)]

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

use super::{NONE, need, rule, small};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::{File, Module};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

/// Most likely ids that a row can be told of.
pub const TOP_MAX: usize = 20;

/// How a row is drawn. `struct Row` of `sampler.cu`, field by field.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct SampleRow {
    /// 0: the most likely id; below 0: the row is left out and its id is [`NONE`].
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// 1: all.
    pub top_p: f32,
    /// 0: all.
    pub min_p: f32,
    /// Low half of the seed.
    pub seed_low: u32,
    /// High half of the seed.
    pub seed_high: u32,
    /// Counter: seed and step alone say which random number is used.
    pub step: u32,
    /// How many of the most likely ids are wanted: at most [`TOP_MAX`].
    pub top_count: u32,
    /// 1: none. Over ids of the prompt and of the answer.
    pub repetition: f32,
    /// Taken from the logits of ids that the answer has.
    pub presence: f32,
    /// The same, for each time.
    pub frequency: f32,
    /// First of its pairs of an id that was seen, and how often the answer has it. No id has two.
    pub seen_from: u32,
    /// Past the last of them.
    pub seen_to: u32,
    /// Row of `masks`, or [`NONE`].
    pub mask: u32,
    /// First of its pairs of an id and its bias, the bits of a float. No id has two.
    pub bias_from: u32,
    /// Past the last of them.
    pub bias_to: u32,
    /// Place in `drawn` that gets the id, or [`NONE`].
    pub feed: u32,
}

// SAFETY: 17 words without padding, as the kernel has them.
unsafe impl DeviceRepr for SampleRow {}
// SAFETY: floats and integers, of which zero is a value.
unsafe impl ValidAsZeroBits for SampleRow {}

impl SampleRow {
    /// 32-bit words that it has.
    pub const WORDS: usize = size_of::<Self>() / size_of::<u32>();
    /// A row that is left out.
    pub const IDLE: Self = Self {
        temperature: -1.0,
        ..Self::GREEDY
    };
    /// The most likely id, of the model's own logits.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed_low: 0,
        seed_high: 0,
        step: 0,
        top_count: 0,
        repetition: 1.0,
        presence: 0.0,
        frequency: 0.0,
        seen_from: 0,
        seen_to: 0,
        mask: NONE,
        bias_from: 0,
        bias_to: 0,
        feed: NONE,
    };

    /// As the device has it: for buffers that hold words of several kinds.
    #[must_use]
    pub fn words(&self) -> [u32; Self::WORDS] {
        [
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.seed_low,
            self.seed_high,
            self.step,
            self.top_count,
            self.repetition.to_bits(),
            self.presence.to_bits(),
            self.frequency.to_bits(),
            self.seen_from,
            self.seen_to,
            self.mask,
            self.bias_from,
            self.bias_to,
            self.feed,
        ]
    }

    /// With a seed.
    #[must_use]
    pub fn seeded(self, seed: u64, step: u32) -> Self {
        Self {
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            step,
            ..self
        }
    }
}

/// Draws one id a row.
pub struct Sample<'a> {
    /// `[rows]`; [`NONE`] where no id can be drawn: all are masked, or a logit is NaN.
    pub ids: &'a mut Buffer<u32>,
    /// `[rows]`: of the drawn ids, by the model's own logits, what pads the table left out.
    pub logprobs: &'a mut Buffer<f32>,
    /// `[rows, TOP_MAX]`, most likely first.
    pub top_ids: &'a mut Buffer<u32>,
    /// `[rows, TOP_MAX]`.
    pub top_logprobs: &'a mut Buffer<f32>,
    /// By place: what [`super::Embed`] reads in the next step.
    pub drawn: &'a mut Buffer<u32>,
    /// Scratch, `[rows, columns]`.
    pub work: &'a mut Buffer<f32>,
    /// `[rows, columns]`.
    pub logits: &'a Buffer<f32>,
    /// `[rows]`.
    pub how: &'a Buffer<SampleRow>,
    /// `[.., columns / 32 rounded up]`: bit `id % 32` of word `id / 32` says that it may be drawn.
    pub masks: &'a Buffer<u32>,
    /// Ids that were seen, and ids with a bias: see [`SampleRow`].
    pub pairs: &'a Buffer<[u32; 2]>,
    /// Rows.
    pub rows: usize,
    /// Columns of the logits.
    pub columns: usize,
    /// Past the last id that may be drawn: what follows pads the table.
    pub ids_end: usize,
}

impl Sample<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "sample";
        let some = self.ids_end > 0 && self.ids_end <= self.columns;
        rule(
            op,
            "ids_end",
            self.ids_end,
            &format!("must be 1 to {}", self.columns),
            some,
        )?;
        need(op, "ids", self.ids.len(), self.rows)?;
        need(op, "logprobs", self.logprobs.len(), self.rows)?;
        need(op, "top_ids", self.top_ids.len(), self.rows * TOP_MAX)?;
        need(
            op,
            "top_logprobs",
            self.top_logprobs.len(),
            self.rows * TOP_MAX,
        )?;
        need(op, "work", self.work.len(), self.rows * self.columns)?;
        need(op, "logits", self.logits.len(), self.rows * self.columns)?;
        need(op, "how", self.how.len(), self.rows)?;
        let args = [
            Arg::Address(self.ids.address(device)),
            Arg::Address(self.logprobs.address(device)),
            Arg::Address(self.top_ids.address(device)),
            Arg::Address(self.top_logprobs.address(device)),
            Arg::Address(self.drawn.address(device)),
            Arg::Address(self.work.address(device)),
            Arg::Address(self.logits.address(device)),
            Arg::Address(self.how.address(device)),
            Arg::Address(self.masks.address(device)),
            Arg::Address(self.pairs.address(device)),
            Arg::U32(small(op, "columns", self.columns)?),
            Arg::U32(small(op, "ids_end", self.ids_end)?),
        ];
        let grid = (small(op, "rows", self.rows)?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked; what the rows name is the caller's.
        unsafe { device.launch(Module::plain(File::Sampler), "sample", grid, 1024, &args) }
    }
}
