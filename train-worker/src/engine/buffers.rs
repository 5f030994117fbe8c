//! Buffers of activations: which there are under a plan, and how large. One function says it for the device, where they are
//! taken once, and for the planner, which only counts.
//!
//! Lifetimes are known, so that buffers are shared: `narrow` holds a layer's normed input, and in the backward gradients of
//! heads; `middle` holds q and k, and gradients of normed inputs; `wide` holds the MLP's activation, and gradients of q, k
//! and v.

use espalier_kernels::train::Kind;
use espalier_qwen3::Config;

use super::layout::Roles;
use super::model::{head_rows, moe_shape};
use super::plan::Keep;

/// Elements of a chunk of logits, about.
const LOGITS_MAX: usize = 1 << 25;

/// What a layer keeps from forward to backward; what is `None` is computed again, in a buffer of all layers.
pub(crate) struct LayerBuffers<I> {
    pub(crate) input: LayerInput<I>,
    pub(crate) qkv: Option<I>,
    pub(crate) heads: Option<I>,
    pub(crate) lse: Option<I>,
    pub(crate) mid: Option<I>,
    pub(crate) gate_up: Option<I>,
    /// `X · Aᵀ` of all adapters of the layer.
    pub(crate) xa: Option<I>,
}

/// Where a layer's input is.
pub(crate) enum LayerInput<I> {
    Kept(I),
    /// On the host, but in one of two buffers while it is used.
    Offloaded {
        host: I,
        stage: usize,
    },
}

/// For layers that do not keep theirs.
pub(crate) struct Again<I> {
    pub(crate) qkv: I,
    pub(crate) heads: I,
    pub(crate) lse: I,
    pub(crate) mid: I,
    pub(crate) gate_up: I,
}

/// Of the head, for a chunk of rows.
pub(crate) struct HeadBuffers<I> {
    pub(crate) rows: usize,
    pub(crate) input: I,
    pub(crate) normed: I,
    pub(crate) d_normed: I,
    pub(crate) d_input: I,
    pub(crate) logits: I,
}

/// Of experts.
pub(crate) struct MoeBuffers<I> {
    pub(crate) logits: I,
    pub(crate) d_logits: I,
    pub(crate) routes: I,
    pub(crate) weights: I,
    pub(crate) d_weights: I,
    pub(crate) rows: I,
    pub(crate) mixed: I,
}

/// All.
pub(crate) struct Buffers<I> {
    pub(crate) ids: I,
    pub(crate) positions: I,
    /// Rows that predict a target, and the targets.
    pub(crate) rows: I,
    pub(crate) targets: I,
    pub(crate) losses: I,
    pub(crate) turns: I,
    /// What the last layer gives.
    pub(crate) last: I,
    pub(crate) d_x: I,
    pub(crate) narrow: I,
    pub(crate) middle: I,
    pub(crate) wide: I,
    /// Gradients of `X · Aᵀ` of one matrix.
    pub(crate) d_xa: Option<I>,
    pub(crate) again: Option<Again<I>>,
    pub(crate) stages: Option<[I; 2]>,
    pub(crate) layers: Vec<LayerBuffers<I>>,
    pub(crate) head: HeadBuffers<I>,
    pub(crate) moe: Option<MoeBuffers<I>>,
}

/// Where buffers come from: kind, elements, whether on the host.
type Take<'a, I, E> = dyn FnMut(Kind, usize, bool) -> Result<I, E> + 'a;

/// Elements a token, of what a layer makes.
struct Widths<'a> {
    config: &'a Config,
    tokens: usize,
}

impl Widths<'_> {
    fn q(&self) -> usize {
        self.config.heads * self.config.head_dim
    }

    fn gate_up(&self, layer: usize) -> usize {
        match &self.config.moe {
            Some(moe) if moe.sparse[layer] => moe.top_k * 2 * moe.intermediate_size,
            _ => 2 * self.config.intermediate_size,
        }
    }

    fn gate_up_max(&self) -> usize {
        let widths = (0..self.config.layers).map(|layer| self.gate_up(layer));
        widths.max().unwrap_or(0)
    }

    /// The MLP's activation where a layer is dense.
    fn mixed(&self) -> usize {
        let dense = (0..self.config.layers).any(|layer| !self.config.is_sparse(layer));
        if dense {
            self.config.intermediate_size
        } else {
            0
        }
    }
}

impl<I> Buffers<I> {
    /// Takes them all: for `tokens` tokens, with what `keeps` says of each layer.
    pub(crate) fn take<E>(
        config: &Config,
        roles: &Roles,
        keeps: &[Keep],
        tokens: usize,
        take: &mut Take<'_, I, E>,
    ) -> Result<Self, E> {
        use Kind::{Activations, Exact, Ids};
        let widths = Widths { config, tokens };
        let (hidden, q) = (config.hidden_size, widths.q());
        let qk = q + config.kv_heads * config.head_dim;
        let ranks = roles
            .layers
            .iter()
            .flat_map(|layer| layer.matrices().map(|role| role.ranks()));
        let ranks = ranks.max().unwrap_or(0);
        let mut of = |width: usize| take(Activations, width * tokens, false);
        let last = of(hidden)?;
        let d_x = of(hidden)?;
        let narrow = of(hidden.max(q))?;
        let middle = of(hidden.max(qk))?;
        let wide = of(config.qkv_width().max(widths.mixed()))?;
        let d_xa = if ranks > 0 { Some(of(ranks)?) } else { None };
        let staged = keeps.contains(&Keep::Offloaded);
        let stages = match staged {
            true => Some([of(hidden)?, of(hidden)?]),
            false => None,
        };
        let again = match keeps.iter().any(|keep| *keep != Keep::All) {
            true => Some(widths.again(take)?),
            false => None,
        };
        let mut layers = Vec::new();
        for (index, keep) in keeps.iter().enumerate() {
            layers.push(widths.layer(index, *keep, roles.layers[index].ranks(), take)?);
        }
        Ok(Self {
            ids: take(Ids, tokens, false)?,
            positions: take(Ids, tokens, false)?,
            rows: take(Ids, tokens, false)?,
            targets: take(Ids, tokens, false)?,
            losses: take(Exact, tokens, false)?,
            turns: take(Exact, tokens * config.head_dim, false)?,
            last,
            d_x,
            narrow,
            middle,
            wide,
            d_xa,
            again,
            stages,
            layers,
            head: widths.head(take)?,
            moe: widths.moe(take)?,
        })
    }
}

impl Widths<'_> {
    fn again<I, E>(&self, take: &mut Take<'_, I, E>) -> Result<Again<I>, E> {
        let mut of = |width: usize| take(Kind::Activations, width * self.tokens, false);
        Ok(Again {
            qkv: of(self.config.qkv_width())?,
            heads: of(self.q())?,
            mid: of(self.config.hidden_size)?,
            gate_up: of(self.gate_up_max())?,
            lse: take(Kind::Exact, self.config.heads * self.tokens, false)?,
        })
    }

    fn layer<I, E>(
        &self,
        index: usize,
        keep: Keep,
        ranks: usize,
        take: &mut Take<'_, I, E>,
    ) -> Result<LayerBuffers<I>, E> {
        let hidden = self.config.hidden_size * self.tokens;
        let input = match keep {
            Keep::Offloaded => LayerInput::Offloaded {
                host: take(Kind::Activations, hidden, true)?,
                stage: index % 2,
            },
            _ => LayerInput::Kept(take(Kind::Activations, hidden, false)?),
        };
        let mut of = |kept: bool, kind: Kind, width: usize| match kept && width > 0 {
            true => take(kind, width * self.tokens, false).map(Some),
            false => Ok(None),
        };
        let most = matches!(keep, Keep::All | Keep::NoGateUp);
        let heads = most || keep == Keep::Heads;
        Ok(LayerBuffers {
            input,
            qkv: of(most, Kind::Activations, self.config.qkv_width())?,
            heads: of(heads, Kind::Activations, self.q())?,
            lse: of(heads, Kind::Exact, self.config.heads)?,
            mid: of(most, Kind::Activations, self.config.hidden_size)?,
            gate_up: of(keep == Keep::All, Kind::Activations, self.gate_up(index))?,
            xa: of(true, Kind::Activations, ranks)?,
        })
    }

    fn head<I, E>(&self, take: &mut Take<'_, I, E>) -> Result<HeadBuffers<I>, E> {
        let rows = logits_rows(self.config, self.tokens);
        let mut of = |width: usize| take(Kind::Activations, width * rows, false);
        let hidden = self.config.hidden_size;
        Ok(HeadBuffers {
            rows,
            input: of(hidden)?,
            normed: of(hidden)?,
            d_normed: of(hidden)?,
            d_input: of(hidden)?,
            logits: of(head_rows(self.config))?,
        })
    }

    fn moe<I, E>(&self, take: &mut Take<'_, I, E>) -> Result<Option<MoeBuffers<I>>, E> {
        let Some(moe) = moe_shape(self.config) else {
            return Ok(None);
        };
        let slots = moe.top_k * self.tokens;
        Ok(Some(MoeBuffers {
            logits: take(Kind::Exact, moe.experts * self.tokens, false)?,
            d_logits: take(Kind::Activations, moe.experts * self.tokens, false)?,
            routes: take(Kind::Ids, moe.ids_len(self.tokens), false)?,
            weights: take(Kind::Exact, slots, false)?,
            d_weights: take(Kind::Exact, slots, false)?,
            rows: take(Kind::Activations, slots * self.config.hidden_size, false)?,
            mixed: take(Kind::Activations, slots * moe.width, false)?,
        }))
    }
}

/// Rows of logits that are made at a time: neither so few that the product is slow, nor so many that they fill the memory.
fn logits_rows(config: &Config, tokens: usize) -> usize {
    (LOGITS_MAX / config.real_vocab_size)
        .clamp(64, 512)
        .min(tokens)
}
