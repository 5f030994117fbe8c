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
    /// What was seen. Complete: a sequence with penalties has no id in flight.
    pub seen: History,
}

/// An id that penalties are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The id.
    pub id: u32,
    /// How often it is in the answer so far. 0: it is in the prompt only.
    pub in_answer: u32,
}

/// The ids that a sequence has seen: those of its prompt, which answers share, and those of its answer, which are few.
/// Each id once, ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    prompt: Arc<[u32]>,
    answer: Arc<Vec<Seen>>,
    /// How many of the answer are not in the prompt.
    new: usize,
}

impl History {
    /// Of no answer yet. `prompt`: its ids, each once, ascending.
    #[must_use]
    pub fn new(prompt: Arc<[u32]>) -> Self {
        Self {
            prompt,
            ..Self::default()
        }
    }

    /// An id was drawn.
    pub fn add(&mut self, id: u32) {
        let answer = Arc::make_mut(&mut self.answer);
        match answer.binary_search_by_key(&id, |seen| seen.id) {
            Ok(at) => answer[at].in_answer += 1,
            Err(at) => {
                answer.insert(at, Seen { id, in_answer: 1 });
                self.new += usize::from(self.prompt.binary_search(&id).is_err());
            }
        }
    }

    /// How many ids it has.
    #[must_use]
    pub fn count(&self) -> usize {
        self.prompt.len() + self.new
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Seen> {
        let mut prompt = self.prompt.iter().copied().peekable();
        let mut answer = self.answer.iter().copied().peekable();
        std::iter::from_fn(move || match (prompt.peek(), answer.peek()) {
            (Some(id), Some(seen)) if *id >= seen.id => {
                prompt.next_if_eq(&seen.id);
                answer.next()
            }
            (None, _) => answer.next(),
            (Some(_), _) => prompt.next().map(|id| Seen { id, in_answer: 0 }),
        })
    }
}

/// In any order, each id once.
impl FromIterator<Seen> for History {
    fn from_iter<T: IntoIterator<Item = Seen>>(seen: T) -> Self {
        let mut seen: Vec<Seen> = seen.into_iter().collect();
        seen.sort_unstable_by_key(|seen| seen.id);
        let (answer, prompt): (Vec<_>, Vec<_>) = seen.into_iter().partition(|s| s.in_answer > 0);
        Self {
            prompt: prompt.into_iter().map(|seen| seen.id).collect(),
            new: answer.len(),
            answer: Arc::new(answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_was_seen_is_each_id_once_with_its_count() {
        let prompt = [2, 3, 5, 8, 13];
        let mut history = History::new(prompt.into());
        let mut expected: BTreeMap<u32, u32> = prompt.iter().map(|id| (*id, 0)).collect();
        for id in [5, 1, 20, 5, 13, 2, 4, 20, 20, 2, 14, 0] {
            history.add(id);
            *expected.entry(id).or_default() += 1;
            let seen = history.iter().map(|seen| (seen.id, seen.in_answer));
            assert!(seen.eq(expected.iter().map(|(id, count)| (*id, *count))));
            assert_eq!(history.count(), expected.len());
        }
        let seen: Vec<Seen> = history.iter().collect();
        let again: History = seen.iter().rev().copied().collect();
        assert!(again.iter().eq(seen));
        assert_eq!(again.count(), history.count());
    }
}
