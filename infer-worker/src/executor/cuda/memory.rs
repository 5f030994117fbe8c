//! Where a device's memory goes, and what to change where it is too little.

use std::fmt;

use super::room::LOGITS_ROWS;
use super::{CudaOptions, adapters, room, weights};
use espalier_kernels::cuda::BLOCK_TOKENS;
use espalier_qwen3::Config;

/// Kept for the driver's copies of recorded graphs, which are made after the KV cache.
pub(super) const GRAPHS_BYTES: usize = 256 << 20;

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// The model.
    pub weights: usize,
    /// What a step of the largest size writes, and recorded graphs.
    pub steps: usize,
    /// Places of adapters.
    pub adapters: usize,
    /// A KV block of 16 tokens.
    pub block: usize,
    /// KV blocks. Of a plan: those of one sequence of full length.
    pub blocks: usize,
}

impl MemoryUse {
    /// What is needed at least.
    pub(super) fn least(
        config: &Config,
        options: &CudaOptions,
        largest: &room::Largest,
        arena_words: usize,
    ) -> Self {
        let positions = largest.table_blocks * BLOCK_TOKENS;
        let turns = positions * config.head_dim * size_of::<f32>();
        let graphs = if options.graphs { GRAPHS_BYTES } else { 0 };
        Self {
            weights: weights::bytes(config).0,
            steps: room::bytes(config, largest)
                + arena_words * size_of::<u32>()
                + turns
                + options.device.workspace_bytes
                + graphs,
            adapters: adapters::bytes(
                &options.adapter_layout(config),
                options.adapter_places() as usize,
                largest.tokens,
            ),
            block: room::block_bytes(config),
            blocks: largest.table_blocks,
        }
    }

    fn without_kv(&self) -> usize {
        self.weights + self.steps + self.adapters
    }

    fn all(&self) -> usize {
        self.without_kv() + self.blocks * self.block
    }

    /// Refuses what does not fit, and says what would.
    pub(super) fn fit(&self, have: Have) -> Result<(), Shortage> {
        if self.all() <= have.usable() {
            return Ok(());
        }
        Err(Shortage {
            needs: *self,
            have,
            usable: have.usable(),
        })
    }

    /// That after the largest step only so many bytes are left for keys and values.
    pub(super) fn short_of(&self, have: Have, left: usize) -> Shortage {
        Shortage {
            needs: *self,
            have,
            usable: self.without_kv() + left,
        }
    }
}

/// What a device has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Have {
    /// All of its memory.
    pub total: usize,
    /// What nobody uses yet.
    pub free: usize,
    /// Which share of the total this process and all others may use.
    pub share: f64,
}

impl Have {
    fn usable(&self) -> usize {
        let others = self.total - self.free.min(self.total);
        ((self.share * self.total as f64) as usize).saturating_sub(others)
    }
}

/// Too little memory.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub struct Shortage {
    needs: MemoryUse,
    have: Have,
    /// What may be used of it.
    usable: usize,
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (needs, have, usable) = (&self.needs, &self.have, self.usable);
        let positions = needs.blocks * BLOCK_TOKENS;
        write!(
            f,
            "{:.2} GiB are needed and {:.2} may be used (`--gpu-memory-utilization` {} of {:.2} GiB, of which others use \
             {:.2}): weights {:.2}, steps {:.2}, adapters {:.2}, keys and values of {positions} tokens {:.2}; ",
            gib(needs.all()),
            gib(usable),
            have.share,
            gib(have.total),
            gib(have.total - have.free.min(have.total)),
            gib(needs.weights),
            gib(needs.steps),
            gib(needs.adapters),
            gib(needs.blocks * needs.block),
        )?;
        let left = usable.saturating_sub(needs.without_kv());
        let fits = left / needs.block.max(1) * BLOCK_TOKENS;
        if needs.weights > usable {
            f.write_str("the weights alone do not fit")
        } else if fits > 0 {
            write!(f, "a `--max-model-len` of at most {fits} would fit")
        } else {
            write!(
                f,
                "lower `--max-num-batched-tokens`, `--max-num-seqs` (below {LOGITS_ROWS}), `--max-loras` or \
                 `--max-lora-rank`"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    fn needs() -> MemoryUse {
        MemoryUse {
            weights: 8 * GIB,
            steps: 2 * GIB,
            adapters: GIB,
            block: GIB / 256,
            blocks: 256,
        }
    }

    fn have(total: usize, free: usize) -> Have {
        Have {
            total: total * GIB,
            free: free * GIB,
            share: 0.75,
        }
    }

    #[test]
    fn what_fits_is_taken() {
        assert_eq!(needs().fit(have(16, 16)), Ok(()));
        // Others use 1 GiB.
        assert!(needs().fit(have(16, 15)).is_err());
    }

    #[test]
    fn a_shortage_says_what_would_fit() {
        let text = |total, free| {
            let shortage = needs().fit(have(total, free)).unwrap_err();
            shortage.to_string()
        };
        let most = text(20, 16);
        assert!(
            most.starts_with(
                "12.00 GiB are needed and 11.00 may be used (`--gpu-memory-utilization` 0.75 of 20.00 GiB, of which \
                 others use 4.00): weights 8.00, steps 2.00, adapters 1.00, keys and values of 4096 tokens 1.00; "
            ),
            "{most}"
        );
        assert!(most.contains("lower `--max-num-batched-tokens`"), "{most}");
        // Half a GiB is left for keys and values: 128 blocks.
        let mut needs = needs();
        needs.adapters = GIB / 2;
        let text_of = needs.fit(have(20, 16)).unwrap_err().to_string();
        assert!(
            text_of.ends_with("a `--max-model-len` of at most 2048 would fit"),
            "{text_of}"
        );
        assert!(text(8, 8).ends_with("the weights alone do not fit"));
    }
}
