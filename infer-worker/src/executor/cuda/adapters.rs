//! Adapters on the device: so many places of one rank, for every projection of every layer. A step names the place of each
//! token's adapter; what a place holds changes between steps, in the order of the device's stream.

use std::collections::HashMap;

use espalier_kernels::bf16;
use espalier_kernels::cpu::lora::LoraPair;
use espalier_kernels::cuda::{Buffer, CudaError, Device, LoraExpand, LoraShrink};
use espalier_qwen3::{Config, Lora, Site};

use super::super::{AdapterSlot, ExecutorError};
use super::device_error;

/// One projection of a site.
struct Projection {
    /// `[places, width, rank]`, with the scale in it.
    b: Buffer<bf16>,
    /// Where its columns begin in what the site computes.
    start: usize,
    width: usize,
}

/// Projections of one input.
struct Adapted {
    /// `[places, projections · rank, depth]`.
    a: Buffer<bf16>,
    depth: usize,
    projections: Vec<Projection>,
    /// Columns of what the site computes.
    columns: usize,
}

/// The places.
pub(super) struct Adapters {
    /// By layer and site; nothing where a layer has experts.
    layers: Vec<[Option<Adapted>; 4]>,
    rank: usize,
    taken: HashMap<AdapterSlot, u32>,
    free: Vec<u32>,
    /// One for each place: scales are in `b`.
    ones: Buffer<f32>,
    /// `[tokens, 3 rank]`, scratch.
    low: Buffer<f32>,
}

/// Inputs of a site, and first column and width of its projections.
fn site_of(config: &Config, site: Site) -> (usize, Vec<(usize, usize)>) {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    match site {
        Site::Qkv => (hidden, vec![(0, q), (q, kv), (q + kv, kv)]),
        Site::O => (q, vec![(0, hidden)]),
        Site::GateUp => (hidden, vec![(0, wide), (wide, wide)]),
        Site::Down => (wide, vec![(0, hidden)]),
    }
}

fn has_site(config: &Config, layer: usize, site: Site) -> bool {
    !config.is_sparse(layer) || matches!(site, Site::Qkv | Site::O)
}

/// Bytes of so many places of that rank, and of the scratch for so many tokens.
pub(super) fn bytes(config: &Config, places: usize, rank: usize, tokens: usize) -> usize {
    if places == 0 {
        return 0;
    }
    let site = |layer, site| {
        let (depth, projections) = site_of(config, site);
        let elements = projections
            .iter()
            .map(|(_, width)| rank * (depth + width))
            .sum();
        if has_site(config, layer, site) {
            elements
        } else {
            0
        }
    };
    let sites = (0..config.layers).flat_map(|layer| Site::ALL.map(|s| site(layer, s)));
    places * sites.sum::<usize>() * size_of::<bf16>() + tokens * 3 * rank * size_of::<f32>()
}

impl Adapters {
    /// `rank`: a multiple of 8; adapters of a lower one are filled up with zeroes.
    pub fn new(
        device: &Device,
        config: &Config,
        places: usize,
        rank: usize,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let adapted = |layer, site| {
            if !has_site(config, layer, site) {
                return Ok(None);
            }
            let (depth, projections) = site_of(config, site);
            Ok(Some(Adapted {
                a: device.zeroed(places * projections.len() * rank * depth)?,
                depth,
                columns: projections.iter().map(|(_, width)| width).sum(),
                projections: projections
                    .into_iter()
                    .map(|(start, width)| {
                        let b = device.zeroed(places * width * rank)?;
                        Ok(Projection { b, start, width })
                    })
                    .collect::<Result<_, CudaError>>()?,
            }))
        };
        let layers = (0..config.layers).map(|layer| {
            let [qkv, o, gate_up, down] = Site::ALL.map(|site| adapted(layer, site));
            Ok([qkv?, o?, gate_up?, down?])
        });
        Ok(Self {
            layers: layers.collect::<Result<_, CudaError>>()?,
            rank,
            taken: HashMap::new(),
            free: (0..places as u32).rev().collect(),
            ones: device.copied(&vec![1.0; places])?,
            low: device.zeroed(tokens * 3 * rank)?,
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
        lora: &Lora,
    ) -> Result<(), ExecutorError> {
        self.check(lora)?;
        let Some(place) = self.free.pop() else {
            return Err(ExecutorError::Adapter(format!(
                "all {} places are taken; `--max-loras` sets how many there are",
                self.taken.len()
            )));
        };
        self.taken.insert(slot, place);
        self.write(device, place as usize, lora)
            .map_err(|error| device_error(&error))
    }

    /// Frees a place.
    pub fn forget(&mut self, slot: AdapterSlot) {
        self.free.extend(self.taken.remove(&slot));
    }

    fn check(&self, lora: &Lora) -> Result<(), ExecutorError> {
        for (layer, sites) in self.layers.iter().enumerate() {
            for (site, adapted) in Site::ALL.into_iter().zip(sites) {
                for pair in lora.pairs(layer, site) {
                    let rank = pair.a.outputs();
                    if rank > self.rank {
                        return Err(ExecutorError::Adapter(format!(
                            "its rank is {rank}, and there is room for {}: `--max-lora-rank` sets it",
                            self.rank
                        )));
                    }
                    let fits = adapted.as_ref().is_some_and(|adapted| {
                        adapted.depth == pair.a.inputs() && adapted.index(pair).is_some()
                    });
                    if !fits {
                        return Err(ExecutorError::Adapter(format!(
                            "its {site:?} of layer {layer} does not fit the model"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, device: &Device, place: usize, lora: &Lora) -> Result<(), CudaError> {
        for (layer, sites) in self.layers.iter_mut().enumerate() {
            for (site, adapted) in Site::ALL.into_iter().zip(sites) {
                if let Some(adapted) = adapted {
                    adapted.write(device, place, self.rank, lora.pairs(layer, site))?;
                }
            }
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
        let (rank, all) = (self.rank, self.rank * adapted.projections.len());
        LoraShrink {
            h: &mut self.low,
            x,
            a: &adapted.a,
            slots,
            tokens,
            depth: adapted.depth,
            rank: all,
        }
        .launch(device)?;
        for (index, projection) in adapted.projections.iter().enumerate() {
            LoraExpand {
                y: &mut *y,
                h: &self.low,
                h_stride: all,
                h_start: index * rank,
                b: &projection.b,
                scales: &self.ones,
                slots,
                tokens,
                rank,
                y_stride: adapted.columns,
                start: projection.start,
                width: projection.width,
            }
            .launch(device)?;
        }
        Ok(())
    }
}

impl Adapted {
    /// Which projection a pair is for.
    fn index(&self, pair: &LoraPair) -> Option<usize> {
        self.projections
            .iter()
            .position(|p| p.start == pair.offset && p.width == pair.b.outputs())
    }

    fn write(
        &mut self,
        device: &Device,
        place: usize,
        rank: usize,
        pairs: &[LoraPair],
    ) -> Result<(), CudaError> {
        let count = self.projections.len();
        let mut a = vec![bf16::ZERO; count * rank * self.depth];
        let mut b: Vec<Vec<bf16>> = self
            .projections
            .iter()
            .map(|projection| vec![bf16::ZERO; projection.width * rank])
            .collect();
        for pair in pairs {
            let Some(index) = self.index(pair) else {
                continue;
            };
            let mut row = vec![0.0; self.depth];
            let to = a[index * rank * self.depth..].chunks_mut(self.depth);
            for (r, to) in (0..pair.a.outputs()).zip(to) {
                pair.a.row_into(r, &mut row);
                narrow(&row, 1.0, to);
            }
            let mut row = vec![0.0; pair.b.inputs()];
            for (column, to) in b[index].chunks_mut(rank).enumerate() {
                pair.b.row_into(column, &mut row);
                narrow(&row, pair.scale, to);
            }
        }
        device.write(&mut self.a, place * a.len(), &a)?;
        for (projection, b) in self.projections.iter_mut().zip(&b) {
            device.write(&mut projection.b, place * b.len(), b)?;
        }
        Ok(())
    }
}

/// `scale · from`, rounded once, at the start of `to`.
fn narrow(from: &[f32], scale: f32, to: &mut [bf16]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = bf16::from_f32(scale * x);
    }
}
