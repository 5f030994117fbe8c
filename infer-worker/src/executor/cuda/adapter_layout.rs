//! How an adapter lies in a place on the device: pure, and made beside the steps that run, so that the engine's thread
//! only copies.

use espalier_kernels::bf16;
use espalier_kernels::cpu::lora::LoraPair;
use espalier_qwen3::{Config, Lora, Site};

use super::super::ExecutorError;

/// One projection of a site: where its columns begin in what the site computes, and how many there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub start: usize,
    pub width: usize,
}

/// Projections of one input.
#[derive(Clone, Debug)]
pub(super) struct SiteShape {
    /// Elements of the input.
    pub depth: usize,
    pub projections: Vec<Columns>,
}

/// Where the numbers of adapters go, for a model and a rank.
#[derive(Clone, Debug)]
pub struct AdapterLayout {
    /// By layer and site; nothing where a layer has experts.
    pub(super) layers: Vec<[Option<SiteShape>; 4]>,
    /// A multiple of 8; adapters of a lower one are filled up with zeroes.
    pub(super) rank: usize,
}

/// An adapter as a place holds it, in the host's memory.
pub struct LaidOut {
    pub(super) layers: Vec<[Option<LaidSite>; 4]>,
}

/// Numbers of one site.
pub(super) struct LaidSite {
    /// `[projections · rank, depth]`.
    pub a: Vec<bf16>,
    /// Of each projection, `[width, rank]`, with the scale in it.
    pub b: Vec<Vec<bf16>>,
}

impl SiteShape {
    fn new(config: &Config, site: Site) -> Self {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let (depth, widths) = match site {
            Site::Qkv => (hidden, vec![q, kv, kv]),
            Site::O => (q, vec![hidden]),
            Site::GateUp => (hidden, vec![wide, wide]),
            Site::Down => (wide, vec![hidden]),
        };
        let mut start = 0;
        let projections = widths.into_iter().map(|width| {
            let columns = Columns { start, width };
            start += width;
            columns
        });
        Self {
            depth,
            projections: projections.collect(),
        }
    }

    /// Columns of what the site computes.
    pub fn columns(&self) -> usize {
        self.projections.iter().map(|p| p.width).sum()
    }

    /// Elements of a place of that rank.
    fn elements(&self, rank: usize) -> usize {
        let of = |projection: &Columns| rank * (self.depth + projection.width);
        self.projections.iter().map(of).sum()
    }

    /// Which projection a pair is for.
    fn index(&self, pair: &LoraPair) -> Option<usize> {
        self.projections
            .iter()
            .position(|p| p.start == pair.offset && p.width == pair.b.outputs())
    }

    fn lay_out(&self, rank: usize, pairs: &[LoraPair]) -> LaidSite {
        let mut a = vec![bf16::ZERO; self.projections.len() * rank * self.depth];
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
        LaidSite { a, b }
    }
}

impl AdapterLayout {
    /// `rank`: the highest that is taken; a multiple of 8.
    pub(super) fn new(config: &Config, rank: usize) -> Self {
        let shape = |layer, site| {
            let has = !config.is_sparse(layer) || matches!(site, Site::Qkv | Site::O);
            has.then(|| SiteShape::new(config, site))
        };
        let layers = (0..config.layers).map(|layer| Site::ALL.map(|site| shape(layer, site)));
        Self {
            layers: layers.collect(),
            rank,
        }
    }

    /// Elements of a place.
    pub(super) fn elements(&self) -> usize {
        let sites = self.layers.iter().flatten().flatten();
        sites.map(|site| site.elements(self.rank)).sum()
    }

    /// Lays an adapter out.
    ///
    /// # Errors
    /// [`ExecutorError::Adapter`]: it does not fit the model, or its rank is too high.
    pub fn lay_out(&self, lora: &Lora) -> Result<LaidOut, ExecutorError> {
        let mut laid = LaidOut { layers: Vec::new() };
        for (layer, shapes) in self.layers.iter().enumerate() {
            let mut sites = [const { None }; 4];
            for (site, shape) in Site::ALL.into_iter().zip(shapes) {
                let pairs = lora.pairs(layer, site);
                for pair in pairs {
                    self.check(shape.as_ref(), pair).map_err(|why| {
                        ExecutorError::Adapter(format!("its {site:?} of layer {layer} {why}"))
                    })?;
                }
                sites[site as usize] = shape.as_ref().map(|s| s.lay_out(self.rank, pairs));
            }
            laid.layers.push(sites);
        }
        Ok(laid)
    }

    fn check(&self, shape: Option<&SiteShape>, pair: &LoraPair) -> Result<(), String> {
        let rank = pair.a.outputs();
        if rank > self.rank {
            return Err(format!(
                "has rank {rank}, and there is room for {}: `--max-lora-rank` sets it",
                self.rank
            ));
        }
        let fits =
            |shape: &SiteShape| shape.depth == pair.a.inputs() && shape.index(pair).is_some();
        if shape.is_some_and(fits) {
            Ok(())
        } else {
            Err("does not fit the model".to_owned())
        }
    }
}

/// `scale · from`, rounded once, at the start of `to`.
fn narrow(from: &[f32], scale: f32, to: &mut [bf16]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = bf16::from_f32(scale * x);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use espalier_kernels::cpu::Pool;

    use super::*;

    fn golden() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qwen3/tests/golden")
    }

    fn config() -> Config {
        let text = std::fs::read_to_string(golden().join("tiny-dense/config.json")).unwrap();
        Config::parse(&text).unwrap()
    }

    fn lora(name: &str) -> Lora {
        Lora::load(&golden().join(name), &config(), &Pool::new(1)).unwrap()
    }

    #[test]
    fn lower_ranks_are_filled_up_and_b_has_the_scale() {
        let lora = lora("lora-rslora");
        let layout = AdapterLayout::new(&config(), 64);
        let laid = layout.lay_out(&lora).unwrap();
        let (pair, site) = (&lora.pairs(0, Site::Qkv)[0], &laid.layers[0][0]);
        let site = site.as_ref().unwrap();
        let (rank, depth) = (pair.a.outputs(), pair.a.inputs());
        let (mut a, mut b) = (vec![0.0; depth], vec![0.0; rank]);
        for row in 0..64 {
            let laid = &site.a[row * depth..][..depth];
            if row < rank {
                pair.a.row_into(row, &mut a);
                assert!(laid.iter().zip(&a).all(|(x, a)| *x == bf16::from_f32(*a)));
            } else {
                assert!(laid.iter().all(|x| *x == bf16::ZERO), "row {row}");
            }
        }
        pair.b.row_into(3, &mut b);
        let scaled = b.iter().map(|b| bf16::from_f32(pair.scale * b));
        let expected: Vec<bf16> = scaled
            .chain(std::iter::repeat(bf16::ZERO))
            .take(64)
            .collect();
        assert_eq!(site.b[0][3 * 64..][..64], expected);
        let sites = laid.layers.iter().flatten().flatten();
        let elements = sites.map(|site| site.a.len() + site.b.iter().map(Vec::len).sum::<usize>());
        assert_eq!(elements.sum::<usize>(), layout.elements());
    }

    #[test]
    fn a_rank_without_room_is_refused() {
        let layout = AdapterLayout::new(&config(), 1);
        let refused = layout
            .lay_out(&lora("lora-plain"))
            .err()
            .unwrap()
            .to_string();
        assert!(refused.contains("--max-lora-rank"), "{refused}");
    }
}
