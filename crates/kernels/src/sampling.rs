//! How an id is drawn, for whoever draws it: the CPU's sampler, CUDA's, and the server that takes it from requests.

use std::sync::Arc;

/// How one id is drawn. Drawn from the same logits with the same values, it is the same id, whatever else runs.
///
/// In this order: penalties, bias, mask, temperature, `top_k`, `top_p`, `min_p`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Below [`GREEDY_BELOW`]: the most likely id, the lowest of equals. Finite and not negative.
    pub temperature: f32,
    /// Only so many of the most likely. 0: all.
    pub top_k: u32,
    /// Only the most likely whose probabilities first add up to this. In (0, 1].
    pub top_p: f32,
    /// Only ids at least this likely relative to the most likely. In [0, 1].
    pub min_p: f32,
    /// Key of the counter-based random numbers (Philox).
    pub seed: u64,
    /// Their counter: how many ids the sequence drew before.
    pub step: u32,
    /// Against repeating.
    pub penalties: Option<Penalties>,
    /// Added to logits: ids and values.
    pub bias: Option<Arc<[(u32, f32)]>>,
    /// Which ids are allowed: bit `id % 32` of word `id / 32`. Ids beyond its end are not. `None`: all.
    pub allowed: Option<Arc<[u32]>>,
    /// How many of the most likely ids to report beside the drawn one. `None` and 0: none.
    pub logprobs: Option<u8>,
}

/// Temperatures below this are 0: divided by less, logits are no numbers any more.
pub const GREEDY_BELOW: f32 = 1e-5;

impl Sampling {
    /// The temperature that a sampler goes by: 0, or one by which logits can be divided.
    #[must_use]
    pub fn effective_temperature(&self) -> f32 {
        if self.temperature < GREEDY_BELOW {
            0.0
        } else {
            self.temperature
        }
    }
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            step: 0,
            penalties: None,
            bias: None,
            allowed: None,
            logprobs: None,
        }
    }
}

/// Penalties on ids that were seen, as OpenAI (presence, frequency) and CTRL (repetition) define them.
#[derive(Clone, Debug, PartialEq)]
pub struct Penalties {
    /// Subtracted once from the logit of each id in the answer so far.
    pub presence: f32,
    /// Subtracted as often as the id is in the answer so far.
    pub frequency: f32,
    /// Positive logits of ids in prompt or answer are divided by it, negative ones multiplied. 1: none.
    pub repetition: f32,
    /// What was seen, each id once. Complete: a sequence with penalties has no id in flight.
    pub seen: Arc<[Seen]>,
}

/// An id that penalties are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The id.
    pub id: u32,
    /// How often it is in the answer so far. 0: it is in the prompt only.
    pub in_answer: u32,
}
