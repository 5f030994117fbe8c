//! `y = x · Wᵀ`, with weights in f32, bf16 or 8 bits.
//!
//! Weights are packed in panels of 64 outputs: for each k the 64 weights lie side by side, so that a decode step reads
//! them once, in a stream, and vectors run over outputs. Each output is one chain of fused multiply-adds over k. A
//! weight in bf16 or 8 bits stands for exactly one f32 (8 bits: value × scale, rounded once), and the sum is that of f32.
//!
//! Machines that multiply bf16 in pairs have a form of weights for that, with which inputs are rounded too: see [`pairs`].
//!
//! With many rows a panel's weights are turned into f32 once per 240 rows and 512 k, which stay in the core's cache.

#![expect(
    clippy::needless_range_loop,
    reason = "one index names a row or register of several arrays"
)]
#![expect(unsafe_code, reason = "tiles read and write through pointers")]

use std::io;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::kv::KvForm;
use super::pool::{Parts, Pool, share};
use super::simd::{Kernel, Lanes, dispatch};
use crate::buffer::Buffer;

mod pairs;

/// Outputs in a panel.
const PANEL: usize = 64;
/// Values of k that share a scale in the 8-bit form.
const SCALE_K: usize = 32;
/// Up to here, tiles read packed weights; above, weights are turned into f32 first.
const DIRECT_ROWS: usize = 12;
const BLOCK_ROWS: usize = 240;
const BLOCK_K: usize = 512;

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight, rounded to nearest even.
    Bf16,
    /// The same weights, and inputs rounded to bf16 as well, as GPUs do it: twice the products in an instruction, on
    /// machines that have it ([`Form::bf16`]).
    Bf16Pairs,
    /// 8 bits and a bf16 scale per row and 32 columns: 8.5 bits a weight. Scale = max |w| / 127, rounded up.
    Q8,
}

impl Form {
    /// Weights in bf16, as this machine computes with them fastest.
    #[must_use]
    pub fn bf16() -> Self {
        if pairs::are_available() {
            Self::Bf16Pairs
        } else {
            Self::Bf16
        }
    }

    /// How keys and values are kept beside such weights: rounded where weights are.
    #[must_use]
    pub fn kv(self) -> KvForm {
        match self {
            Self::Bf16 | Self::Bf16Pairs | Self::Q8 => KvForm::Bf16,
            Self::F32 => KvForm::F32,
        }
    }
}

enum Data {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
    Pairs(Buffer<u16>),
    Q8 {
        quants: Buffer<i8>,
        scales: Buffer<u16>,
    },
}

/// A matrix of `n` outputs by `k` inputs, packed.
pub struct PackedLinear {
    n: usize,
    k: usize,
    data: Data,
}

/// Rows of a matrix as they lie in a file: row-major, little-endian.
#[derive(Clone, Copy)]
pub enum RowSource<'a> {
    /// Numbers in memory.
    F32(&'a [f32]),
    /// Bytes of f32.
    F32Bytes(&'a [u8]),
    /// Bytes of bf16.
    Bf16Bytes(&'a [u8]),
    /// Bytes of IEEE half precision.
    F16Bytes(&'a [u8]),
}

impl RowSource<'_> {
    /// How many numbers it holds.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F32Bytes(bytes) => bytes.len() / 4,
            Self::Bf16Bytes(bytes) | Self::F16Bytes(bytes) => bytes.len() / 2,
        }
    }

    /// Copies row `row` of width `out.len()`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        let range = row * out.len()..(row + 1) * out.len();
        let halves = |bytes: &[u8], out: &mut [f32], convert: &dyn Fn([u8; 2]) -> f32| {
            let (pairs, _) = bytes[range.start * 2..range.end * 2].as_chunks::<2>();
            for (out, pair) in out.iter_mut().zip(pairs) {
                *out = convert(*pair);
            }
        };
        match self {
            Self::F32(values) => out.copy_from_slice(&values[range]),
            Self::F32Bytes(bytes) => {
                let (words, _) = bytes[range.start * 4..range.end * 4].as_chunks::<4>();
                for (out, word) in out.iter_mut().zip(words) {
                    *out = f32::from_le_bytes(*word);
                }
            }
            Self::Bf16Bytes(bytes) => {
                halves(bytes, out, &|pair| bf16::from_le_bytes(pair).to_f32());
            }
            Self::F16Bytes(bytes) => halves(bytes, out, &|pair| f16::from_le_bytes(pair).to_f32()),
        }
    }
}

impl RowSource<'_> {
    /// Copies numbers from `start` on, rounded to bf16 where they are wider.
    ///
    /// # Panics
    /// When there are fewer than `out` takes.
    pub fn bf16_into(&self, start: usize, out: &mut [bf16]) {
        let range = start..start + out.len();
        match self {
            Self::F32(values) => out.convert_from_f32_slice(&values[range]),
            Self::F32Bytes(bytes) => {
                let (words, _) = bytes[range.start * 4..range.end * 4].as_chunks::<4>();
                for (out, word) in out.iter_mut().zip(words) {
                    *out = bf16::from_f32(f32::from_le_bytes(*word));
                }
            }
            Self::Bf16Bytes(bytes) => {
                // As they are: a loop that is seen to be a copy.
                let (pairs, _) = bytes[range.start * 2..range.end * 2].as_chunks::<2>();
                for (out, pair) in out.iter_mut().zip(pairs) {
                    *out = bf16::from_le_bytes(*pair);
                }
            }
            Self::F16Bytes(bytes) => {
                let (pairs, _) = bytes[range.start * 2..range.end * 2].as_chunks::<2>();
                for (out, pair) in out.iter_mut().zip(pairs) {
                    *out = bf16::from_f32(f16::from_le_bytes(*pair).to_f32());
                }
            }
        }
    }
}

impl PackedLinear {
    /// Packs the rows of `parts`, one under the other, each `k` wide.
    ///
    /// # Errors
    /// When the system has no memory for them.
    ///
    /// # Panics
    /// When a part is not whole rows, or the machine does not have the form.
    pub fn pack(pool: &Pool, form: Form, k: usize, parts: &[RowSource<'_>]) -> io::Result<Self> {
        assert!(form != Form::Bf16Pairs || pairs::are_available());
        assert!(k > 0 && parts.iter().all(|part| part.count() % k == 0));
        let n = parts.iter().map(|part| part.count() / k).sum::<usize>();
        let panels = n.div_ceil(PANEL);
        let blocks = k.div_ceil(SCALE_K);
        let mut data = match form {
            Form::F32 => Data::F32(Buffer::zeroed(panels * k * PANEL)?),
            Form::Bf16Pairs => Data::Pairs(Buffer::zeroed(panels * pairs::panel_len(k))?),
            Form::Bf16 => Data::Bf16(Buffer::zeroed(panels * k * PANEL)?),
            Form::Q8 => Data::Q8 {
                quants: Buffer::zeroed(panels * k * PANEL)?,
                scales: Buffer::zeroed(panels * blocks * PANEL)?,
            },
        };
        let rows_of = |panel: usize, rows: &mut [f32]| {
            for (row, out) in (panel * PANEL..n.min((panel + 1) * PANEL)).zip(rows.chunks_mut(k)) {
                read_row(parts, row, out);
            }
        };
        match &mut data {
            Data::F32(to) => pack_panels(pool, to, k, panels, &rows_of, &|w| w),
            Data::Bf16(to) => {
                pack_panels(pool, to, k, panels, &rows_of, &|w| {
                    bf16::from_f32(w).to_bits()
                });
                weave(pool, to);
            }
            Data::Pairs(to) => pairs::pack(pool, to, k, panels, &rows_of),
            Data::Q8 { quants, scales } => {
                pack_q8(pool, quants, scales, k, panels, &rows_of);
                weave(pool, scales);
            }
        }
        Ok(Self { n, k, data })
    }

    /// Outputs.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.n
    }

    /// Inputs.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.k
    }

    fn is_in_pairs(&self) -> bool {
        matches!(self.data, Data::Pairs(_))
    }

    /// Bytes that one pass over the weights reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(data) => data.len() * 4,
            Data::Bf16(data) | Data::Pairs(data) => data.len() * 2,
            Data::Q8 { quants, scales } => quants.len() + scales.len() * 2,
        }
    }

    /// The weights of output `row`: an embedding that shares the matrix of the LM head.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.n && out.len() == self.k,
            "row {row} of {}",
            self.n
        );
        let (panel, column) = (row / PANEL, row % PANEL);
        let at = panel * self.k * PANEL;
        match &self.data {
            Data::F32(data) => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = data[at + k * PANEL + column];
                }
            }
            Data::Bf16(data) => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = from_bf16(data[at + k * PANEL + woven(column)]);
                }
            }
            Data::Pairs(data) => {
                let data = &data[panel * pairs::panel_len(self.k)..];
                for (k, out) in out.iter_mut().enumerate() {
                    *out = from_bf16(data[pairs::place(column, k)]);
                }
            }
            Data::Q8 { quants, scales } => {
                let scales = &scales[panel * self.k.div_ceil(SCALE_K) * PANEL..];
                for (k, out) in out.iter_mut().enumerate() {
                    let scale = from_bf16(scales[k / SCALE_K * PANEL + woven(column)]);
                    *out = f32::from(quants[at + k * PANEL + column]) * scale;
                }
            }
        }
    }
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Where column `column` of a panel lies in the woven order: of 32, the first 16 at even places, the others at odd ones.
fn woven(column: usize) -> usize {
    let (half, lane) = (column / 16, column % 16);
    half / 2 * 32 + lane * 2 + half % 2
}

fn read_row(parts: &[RowSource<'_>], mut row: usize, out: &mut [f32]) {
    for part in parts {
        let rows = part.count() / out.len();
        if row < rows {
            return part.row_into(row, out);
        }
        row -= rows;
    }
}

type RowsOf<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

fn pack_panels<T: crate::buffer::Plain>(
    pool: &Pool,
    to: &mut [T],
    k: usize,
    panels: usize,
    rows_of: &RowsOf<'_>,
    convert: &(dyn Fn(f32) -> T + Sync),
) {
    let to = Parts::new(to);
    pool.split(panels, &|range| {
        let mut rows = vec![0.0; PANEL * k];
        for panel in range {
            rows.fill(0.0);
            rows_of(panel, &mut rows);
            // SAFETY: each panel is one thread's.
            let to = unsafe { to.part(panel * k * PANEL..(panel + 1) * k * PANEL) };
            for (k_at, to) in to.chunks_mut(PANEL).enumerate() {
                for (column, to) in to.iter_mut().enumerate() {
                    *to = convert(rows[column * k + k_at]);
                }
            }
        }
    });
}

/// Puts each 64 numbers into the order that [`Lanes::load_bf16`] reads.
fn weave(pool: &Pool, numbers: &mut [u16]) {
    let groups = numbers.len() / PANEL;
    let numbers = Parts::new(numbers);
    pool.split(groups, &|range| {
        for group in range {
            // SAFETY: each group is one thread's.
            let group = unsafe { numbers.part(group * PANEL..(group + 1) * PANEL) };
            let mut out = [0; PANEL];
            for (column, value) in group.iter().enumerate() {
                out[woven(column)] = *value;
            }
            group.copy_from_slice(&out);
        }
    });
}

fn pack_q8(
    pool: &Pool,
    quants: &mut [i8],
    scales: &mut [u16],
    k: usize,
    panels: usize,
    rows_of: &RowsOf<'_>,
) {
    let blocks = k.div_ceil(SCALE_K);
    let (quants, scales) = (Parts::new(quants), Parts::new(scales));
    pool.split(panels, &|range| {
        let mut rows = vec![0.0; PANEL * k];
        for panel in range {
            rows.fill(0.0);
            rows_of(panel, &mut rows);
            // SAFETY: each panel is one thread's.
            let (quants, scales) = unsafe {
                (
                    quants.part(panel * k * PANEL..(panel + 1) * k * PANEL),
                    scales.part(panel * blocks * PANEL..(panel + 1) * blocks * PANEL),
                )
            };
            for (column, row) in rows.chunks(k).enumerate() {
                for (block, weights) in row.chunks(SCALE_K).enumerate() {
                    let scale = scale_of(weights);
                    scales[block * PANEL + column] = scale.to_bits();
                    for (i, weight) in weights.iter().enumerate() {
                        quants[(block * SCALE_K + i) * PANEL + column] = quantum(*weight, scale);
                    }
                }
            }
        }
    });
}

/// max |w| / 127, rounded up to bf16, so that no value falls outside ±127. Of weights that are no numbers, no number: what
/// they make is none either, as in the other forms.
fn scale_of(weights: &[f32]) -> bf16 {
    if !weights.iter().all(|w| w.is_finite()) {
        return bf16::NAN;
    }
    let most = weights.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
    let exact = most / 127.0;
    let near = bf16::from_f32(exact);
    if near.to_f32() < exact {
        bf16::from_bits(near.to_bits() + 1)
    } else {
        near
    }
}

fn quantum(weight: f32, scale: bf16) -> i8 {
    let scale = scale.to_f32();
    if scale == 0.0 {
        return 0;
    }
    (weight / scale).round_ties_even().clamp(-127.0, 127.0) as i8
}

/// One matrix of a grouped call: its rows of `x` and `y`.
pub struct Group<'a> {
    /// The matrix.
    pub weights: &'a PackedLinear,
    /// The rows that it is for.
    pub rows: Range<usize>,
}

/// `y[r] = W · x[r]` for every row: `x` is `[rows, k]`, `y` is `[rows, n]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn linear(pool: &Pool, x: &[f32], weights: &PackedLinear, y: &mut [f32]) {
    let rows = x.len() / weights.k;
    linear_grouped(
        pool,
        x,
        &[Group {
            weights,
            rows: 0..rows,
        }],
        y,
    );
}

/// As [`linear`], with a matrix of its own (all of one shape) for each group of rows. Groups do not overlap; rows of no
/// group are left as they are.
///
/// # Panics
/// When the lengths do not fit or groups are not in order.
pub fn linear_grouped(pool: &Pool, x: &[f32], groups: &[Group<'_>], y: &mut [f32]) {
    let Some(first) = groups.first() else { return };
    let (n, k) = (first.weights.n, first.weights.k);
    let rows = x.len() / k;
    assert_eq!(
        (x.len(), y.len()),
        (rows * k, rows * n),
        "{rows} rows of {k} to {n}"
    );
    let mut end = 0;
    for group in groups {
        assert_eq!(
            (group.weights.n, group.weights.k),
            (n, k),
            "groups are of one shape"
        );
        assert!(
            group.rows.start >= end && group.rows.start <= group.rows.end && group.rows.end <= rows,
            "groups are in order"
        );
        end = group.rows.end;
    }
    let panels = n.div_ceil(PANEL);
    let work: Vec<&Group<'_>> = groups.iter().filter(|g| !g.rows.is_empty()).collect();
    let in_pairs = work.iter().any(|group| group.weights.is_in_pairs());
    let inputs = in_pairs.then(|| pairs::Inputs::of(pool, x, k));
    let y = Parts::new(y);
    pool.run(&|index| {
        let mine = share(work.len() * panels, index, pool.threads());
        let mut scratch = Vec::new();
        for (at, group) in work.iter().enumerate() {
            let start = mine.start.clamp(at * panels, (at + 1) * panels) - at * panels;
            let end = mine.end.clamp(at * panels, (at + 1) * panels) - at * panels;
            if start == end {
                continue;
            }
            if let (Data::Pairs(weights), Some(inputs)) = (&group.weights.data, &inputs) {
                let panels = pairs::Panels {
                    weights,
                    n,
                    inputs,
                    rows: group.rows.clone(),
                    panels: start..end,
                    y: &y,
                };
                // SAFETY: weights are packed so only where the machine has it, and panels are shared out to threads.
                unsafe { panels.run() };
                continue;
            }
            dispatch(
                pool.isa(),
                Panels {
                    group,
                    x,
                    y: &y,
                    panels: start..end,
                    scratch: &mut scratch,
                },
            );
        }
    });
}

/// One thread's panels of one group.
struct Panels<'a> {
    group: &'a Group<'a>,
    x: &'a [f32],
    y: &'a Parts<'a, f32>,
    panels: Range<usize>,
    scratch: &'a mut Vec<f32>,
}

impl Kernel for Panels<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        if self.group.rows.len() <= DIRECT_ROWS {
            self.direct(lanes);
        } else {
            self.blocked(lanes);
        }
    }
}

impl Panels<'_> {
    #[inline(always)]
    fn direct<L: Lanes>(&self, lanes: L) {
        let weights = self.group.weights;
        for panel in self.panels.clone() {
            let area = Area {
                rows: self.group.rows.clone(),
                k: 0..weights.k,
                panel,
                goes_on: false,
            };
            match &weights.data {
                Data::F32(data) => {
                    let at = &data[panel * weights.k * PANEL..];
                    self.tiles(lanes, &area, F32Panel(at.as_ptr()));
                }
                Data::Bf16(data) => {
                    let at = &data[panel * weights.k * PANEL..];
                    self.tiles(lanes, &area, Bf16Panel(at.as_ptr()));
                }
                // They have a kernel of their own.
                Data::Pairs(_) => {}
                Data::Q8 { quants, scales } => {
                    let at = &quants[panel * weights.k * PANEL..];
                    let scales = &scales[panel * weights.k.div_ceil(SCALE_K) * PANEL..];
                    self.tiles(lanes, &area, Q8Panel(at.as_ptr(), scales.as_ptr()));
                }
            }
        }
    }

    #[inline(always)]
    fn blocked<L: Lanes>(self, lanes: L) {
        let weights = self.group.weights;
        let rows = self.group.rows.clone();
        let mut scratch = std::mem::take(self.scratch);
        scratch.resize(BLOCK_K * PANEL, 0.0);
        for row in rows.clone().step_by(BLOCK_ROWS) {
            for k in (0..weights.k).step_by(BLOCK_K) {
                for panel in self.panels.clone() {
                    let area = Area {
                        rows: row..rows.end.min(row + BLOCK_ROWS),
                        k: k..weights.k.min(k + BLOCK_K),
                        panel,
                        goes_on: k > 0,
                    };
                    unpack(lanes, weights, panel, area.k.clone(), &mut scratch);
                    self.tiles(lanes, &area, F32Panel(scratch.as_ptr()));
                }
            }
        }
        *self.scratch = scratch;
    }

    /// All rows of an area against one panel, a few rows at a time.
    #[inline(always)]
    fn tiles<L: Lanes, P: Panel>(&self, lanes: L, area: &Area, panel: P) {
        let most = L::ROWS;
        let count = area.rows.len();
        let tiles = count.div_ceil(most);
        for tile in 0..tiles {
            let part = share(count, tile, tiles);
            let rows = area.rows.start + part.start..area.rows.start + part.end;
            match rows.len() {
                1 => self.tile::<L, P, 1>(lanes, area, rows.start, panel),
                2 if L::ROWS >= 2 => self.tile::<L, P, 2>(lanes, area, rows.start, panel),
                3 if L::ROWS >= 3 => self.tile::<L, P, 3>(lanes, area, rows.start, panel),
                4 if L::ROWS >= 4 => self.tile::<L, P, 4>(lanes, area, rows.start, panel),
                5 if L::ROWS >= 5 => self.tile::<L, P, 5>(lanes, area, rows.start, panel),
                6 if L::ROWS >= 6 => self.tile::<L, P, 6>(lanes, area, rows.start, panel),
                // Tiles have at least one row and at most `L::ROWS`.
                _ => {}
            }
        }
    }

    #[inline(always)]
    fn tile<L: Lanes, P: Panel, const ROWS: usize>(
        &self,
        lanes: L,
        area: &Area,
        row: usize,
        panel: P,
    ) {
        let (n, k) = (self.group.weights.n, self.group.weights.k);
        let column = area.panel * PANEL;
        let width = (n - column).min(PANEL);
        let x = &self.x[row * k + area.k.start..(row + ROWS - 1) * k + area.k.end];
        let depth = area.k.len();
        let mut edge = [0.0; 6 * PANEL];
        // SAFETY: `x` holds `ROWS` rows, `k` apart, each `depth` long from its start; the panel holds `depth` × 64
        // weights; `y` is this thread's where panels and rows are, and a narrow panel goes through `edge`.
        unsafe {
            let y = self.y.start().add(row * n + column);
            let narrow = width < PANEL;
            let (to, stride) = if narrow {
                (edge.as_mut_ptr(), PANEL)
            } else {
                (y, n)
            };
            if narrow {
                for r in 0..ROWS {
                    std::ptr::copy_nonoverlapping(y.add(r * n), to.add(r * PANEL), width);
                }
            }
            let x = x.as_ptr();
            over_columns::<L, P, ROWS>(lanes, x, k, depth, panel, to, stride, area.goes_on);
            if !narrow {
                return;
            }
            for r in 0..ROWS {
                std::ptr::copy_nonoverlapping(edge.as_ptr().add(r * PANEL), y.add(r * n), width);
            }
        }
    }
}

struct Area {
    rows: Range<usize>,
    k: Range<usize>,
    panel: usize,
    /// The sum so far is in `y`.
    goes_on: bool,
}

/// A panel's weights in some form, from which 32 columns are loaded at a time.
trait Panel: Copy {
    /// What is prepared once per [`SCALE_K`] values of k.
    type Scales;
    /// # Safety
    /// `k` is inside the panel.
    unsafe fn scales<L: Lanes>(self, lanes: L, k: usize) -> Self::Scales;
    /// Columns `32 · pair` to `32 · pair + 31` at `k`.
    ///
    /// # Safety
    /// `k` is inside the panel, `pair` is 0 or 1, `scales` is of this `k`.
    unsafe fn pair<L: Lanes>(
        self,
        lanes: L,
        k: usize,
        pair: usize,
        scales: &Self::Scales,
    ) -> (L::V, L::V);
}

#[derive(Clone, Copy)]
struct F32Panel(*const f32);
#[derive(Clone, Copy)]
struct Bf16Panel(*const u16);
#[derive(Clone, Copy)]
struct Q8Panel(*const i8, *const u16);

impl Panel for F32Panel {
    type Scales = ();
    #[inline(always)]
    unsafe fn scales<L: Lanes>(self, _: L, _: usize) {}
    #[inline(always)]
    unsafe fn pair<L: Lanes>(self, lanes: L, k: usize, pair: usize, (): &()) -> (L::V, L::V) {
        // SAFETY: by contract.
        unsafe {
            let at = self.0.add(k * PANEL + pair * 32);
            (lanes.load(at), lanes.load(at.add(16)))
        }
    }
}

impl Panel for Bf16Panel {
    type Scales = ();
    #[inline(always)]
    unsafe fn scales<L: Lanes>(self, _: L, _: usize) {}
    #[inline(always)]
    unsafe fn pair<L: Lanes>(self, lanes: L, k: usize, pair: usize, (): &()) -> (L::V, L::V) {
        // SAFETY: by contract.
        unsafe { lanes.load_bf16(self.0.add(k * PANEL + pair * 32)) }
    }
}

impl Panel for Q8Panel {
    type Scales = [f32; PANEL];
    #[inline(always)]
    unsafe fn scales<L: Lanes>(self, lanes: L, k: usize) -> [f32; PANEL] {
        let mut out = [0.0_f32; PANEL];
        for pair in 0..2 {
            // SAFETY: by contract, and `out` holds 64.
            unsafe {
                let at = self.1.add(k / SCALE_K * PANEL + pair * 32);
                let (low, high) = lanes.load_bf16(at);
                lanes.store(out.as_mut_ptr().add(pair * 32), low);
                lanes.store(out.as_mut_ptr().add(pair * 32 + 16), high);
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn pair<L: Lanes>(
        self,
        lanes: L,
        k: usize,
        pair: usize,
        scales: &[f32; PANEL],
    ) -> (L::V, L::V) {
        // SAFETY: by contract.
        unsafe {
            let at = self.0.add(k * PANEL + pair * 32);
            let scale = scales.as_ptr().add(pair * 32);
            (
                lanes.mul(lanes.load_i8(at), lanes.load(scale)),
                lanes.mul(lanes.load_i8(at.add(16)), lanes.load(scale.add(16))),
            )
        }
    }
}

/// All 64 columns: at once where registers allow, else in halves.
///
/// # Safety
/// As [`sum`].
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "a tile is its addresses and strides"
)]
unsafe fn over_columns<L: Lanes, P: Panel, const ROWS: usize>(
    lanes: L,
    x: *const f32,
    x_stride: usize,
    depth: usize,
    panel: P,
    y: *mut f32,
    y_stride: usize,
    goes_on: bool,
) {
    // SAFETY: by contract.
    unsafe {
        if L::WIDE {
            sum::<L, P, ROWS, 2>(lanes, x, x_stride, depth, panel, 0, y, y_stride, goes_on);
        } else {
            sum::<L, P, ROWS, 1>(lanes, x, x_stride, depth, panel, 0, y, y_stride, goes_on);
            sum::<L, P, ROWS, 1>(lanes, x, x_stride, depth, panel, 1, y, y_stride, goes_on);
        }
    }
}

/// The chains of `ROWS` rows and `PAIRS` times 32 columns, over `depth` values of k.
///
/// # Safety
/// `x` has `ROWS` rows of `depth` floats, `x_stride` apart; the panel has `depth` values of k; `y` has `ROWS` rows of 64
/// floats, `y_stride` apart, that no one else touches.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "a tile is its addresses and strides"
)]
unsafe fn sum<L: Lanes, P: Panel, const ROWS: usize, const PAIRS: usize>(
    lanes: L,
    x: *const f32,
    x_stride: usize,
    depth: usize,
    panel: P,
    first_pair: usize,
    y: *mut f32,
    y_stride: usize,
    goes_on: bool,
) {
    // SAFETY: by contract, all addresses below are inside what it names.
    unsafe {
        let mut acc = [[(lanes.zero(), lanes.zero()); PAIRS]; ROWS];
        let at = |r: usize, p: usize| y.add(r * y_stride + (first_pair + p) * 32);
        if goes_on {
            for r in 0..ROWS {
                for p in 0..PAIRS {
                    acc[r][p] = (lanes.load(at(r, p)), lanes.load(at(r, p).add(16)));
                }
            }
        }
        let mut k = 0;
        while k < depth {
            let scales = panel.scales(lanes, k);
            let end = depth.min(k + SCALE_K);
            while k < end {
                let mut w = [(lanes.zero(), lanes.zero()); PAIRS];
                for (p, w) in w.iter_mut().enumerate() {
                    *w = panel.pair(lanes, k, first_pair + p, &scales);
                }
                for r in 0..ROWS {
                    let x = lanes.splat(*x.add(r * x_stride + k));
                    for p in 0..PAIRS {
                        acc[r][p].0 = lanes.fma(x, w[p].0, acc[r][p].0);
                        acc[r][p].1 = lanes.fma(x, w[p].1, acc[r][p].1);
                    }
                }
                k += 1;
            }
        }
        for r in 0..ROWS {
            for p in 0..PAIRS {
                lanes.store(at(r, p), acc[r][p].0);
                lanes.store(at(r, p).add(16), acc[r][p].1);
            }
        }
    }
}

/// Turns `k` of a panel into f32, `[k, 64]`.
#[inline(always)]
fn unpack<L: Lanes>(
    lanes: L,
    weights: &PackedLinear,
    panel: usize,
    k: Range<usize>,
    out: &mut [f32],
) {
    let at = (panel * weights.k + k.start) * PANEL;
    let end = (panel * weights.k + k.end) * PANEL;
    match &weights.data {
        Data::F32(data) => out[..end - at].copy_from_slice(&data[at..end]),
        Data::Bf16(data) => copy_panel(lanes, Bf16Panel(data[at..end].as_ptr()), k.len(), out),
        // They are not unpacked.
        Data::Pairs(_) => {}
        Data::Q8 { quants, scales } => {
            // `BLOCK_K` is a multiple of `SCALE_K`, so a block's scales start at its first k.
            let first = panel * weights.k.div_ceil(SCALE_K) + k.start / SCALE_K;
            let scales = &scales[first * PANEL..];
            let panel = Q8Panel(quants[at..end].as_ptr(), scales.as_ptr());
            copy_panel(lanes, panel, k.len(), out);
        }
    }
}

#[inline(always)]
fn copy_panel<L: Lanes, P: Panel>(lanes: L, panel: P, depth: usize, out: &mut [f32]) {
    assert!(out.len() >= depth * PANEL);
    // SAFETY: the panel has `depth` values of k, and `out` room for them.
    unsafe {
        let mut k = 0;
        while k < depth {
            let scales = panel.scales(lanes, k);
            let end = depth.min(k + SCALE_K);
            while k < end {
                for pair in 0..2 {
                    let (low, high) = panel.pair(lanes, k, pair, &scales);
                    let to = out.as_mut_ptr().add(k * PANEL + pair * 32);
                    lanes.store(to, low);
                    lanes.store(to.add(16), high);
                }
                k += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
