//! Adapters on the device: so many places of one rank, for every projection of every layer. A step names the place of each
//! token's adapter; what a place holds changes between steps, in the order of the device's stream.

use std::collections::HashMap;

use espalier_kernels::bf16;
use espalier_kernels::cuda::{Buffer, CudaError, Device, LoraExpand, LoraShrink};
use espalier_qwen3::Site;

use super::super::{AdapterSlot, ExecutorError};
use super::adapter_layout::{AdapterLayout, Columns, LaidOut, LaidSite, SiteShape};
use super::device_error;

/// Projections of one input.
struct Adapted {
    shape: SiteShape,
    /// `[places, projections · rank, depth]`.
    a: Buffer<bf16>,
    /// Of each projection, `[places, width, rank]`, with the scale in it.
    b: Vec<Buffer<bf16>>,
}

/// The places.
pub(super) struct Adapters {
    rank: usize,
    /// By layer and site, as the layout has them.
    layers: Vec<[Option<Adapted>; 4]>,
    taken: HashMap<AdapterSlot, u32>,
    free: Vec<u32>,
    /// One for each place: scales are in `b`.
    ones: Buffer<f32>,
    /// `[tokens, 3 rank]`, scratch.
    low: Buffer<f32>,
}

/// Bytes of so many places, and of the scratch for so many tokens.
pub(super) fn bytes(layout: &AdapterLayout, places: usize, tokens: usize) -> usize {
    if places == 0 {
        return 0;
    }
    places * layout.elements() * size_of::<bf16>() + tokens * 3 * layout.rank * size_of::<f32>()
}

impl Adapters {
    /// So many places, none of them taken.
    pub fn new(
        device: &Device,
        layout: &AdapterLayout,
        places: usize,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let adapted = |shape: &Option<SiteShape>| {
            let adapted = |shape| Adapted::new(device, shape, places, layout.rank);
            shape.as_ref().map(adapted).transpose()
        };
        let layers = layout.layers.iter().map(|[qkv, o, gate_up, down]| {
            Ok([
                adapted(qkv)?,
                adapted(o)?,
                adapted(gate_up)?,
                adapted(down)?,
            ])
        });
        Ok(Self {
            layers: layers.collect::<Result<_, CudaError>>()?,
            taken: HashMap::new(),
            free: (0..places as u32).rev().collect(),
            ones: device.copied(&vec![1.0; places])?,
            low: device.zeroed(tokens * 3 * layout.rank)?,
            rank: layout.rank,
        })
    }

    /// The place of each adapter.
    pub fn places(&self) -> &HashMap<AdapterSlot, u32> {
        &self.taken
    }

    /// Gives an adapter a place.
    pub fn load(
        &mut self,
        device: &Device,
        slot: AdapterSlot,
        adapter: &LaidOut,
    ) -> Result<(), ExecutorError> {
        let Some(place) = self.free.pop() else {
            return Err(ExecutorError::Adapter(format!(
                "all {} places are taken; `--max-loras` sets how many there are",
                self.taken.len()
            )));
        };
        self.taken.insert(slot, place);
        self.write(device, place as usize, adapter)
            .map_err(|error| device_error(&error))
    }

    /// Frees a place.
    pub fn forget(&mut self, slot: AdapterSlot) {
        self.free.extend(self.taken.remove(&slot));
    }

    fn write(&mut self, device: &Device, place: usize, from: &LaidOut) -> Result<(), CudaError> {
        let to = self.layers.iter_mut().flatten().flatten();
        for (to, from) in to.zip(from.layers.iter().flatten().flatten()) {
            to.write(device, place, from)?;
        }
        Ok(())
    }

    /// Adds to `y`, what `site` of `layer` computed of `x`, what each token's adapter says.
    #[expect(
        clippy::too_many_arguments,
        reason = "an op's buffers, and where it is"
    )]
    pub fn add(
        &mut self,
        device: &Device,
        layer: usize,
        site: Site,
        slots: &Buffer<u32>,
        x: &Buffer<bf16>,
        y: &mut Buffer<bf16>,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let Some(adapted) = &self.layers[layer][site as usize] else {
            return Ok(());
        };
        let (shape, rank) = (&adapted.shape, self.rank);
        let all = rank * shape.projections.len();
        LoraShrink {
            h: &mut self.low,
            x,
            a: &adapted.a,
            slots,
            tokens,
            depth: shape.depth,
            rank: all,
        }
        .launch(device)?;
        for (index, (&Columns { start, width }, b)) in
            shape.projections.iter().zip(&adapted.b).enumerate()
        {
            LoraExpand {
                y: &mut *y,
                h: &self.low,
                h_stride: all,
                h_start: index * rank,
                b,
                scales: &self.ones,
                slots,
                tokens,
                rank,
                y_stride: shape.columns(),
                start,
                width,
            }
            .launch(device)?;
        }
        Ok(())
    }
}

impl Adapted {
    fn new(
        device: &Device,
        shape: &SiteShape,
        places: usize,
        rank: usize,
    ) -> Result<Self, CudaError> {
        let of = |columns: &Columns| device.zeroed(places * columns.width * rank);
        Ok(Self {
            a: device.zeroed(places * shape.projections.len() * rank * shape.depth)?,
            b: shape.projections.iter().map(of).collect::<Result<_, _>>()?,
            shape: shape.clone(),
        })
    }

    fn write(&mut self, device: &Device, place: usize, from: &LaidSite) -> Result<(), CudaError> {
        device.write(&mut self.a, place * from.a.len(), &from.a)?;
        for (to, from) in self.b.iter_mut().zip(&from.b) {
            device.write(to, place * from.len(), from)?;
        }
        Ok(())
    }
}
