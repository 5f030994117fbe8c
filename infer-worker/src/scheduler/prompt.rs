//! A prompt, and what is made of it once for all answers to it.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::blocks::{BlockHash, HashChain};

/// The ids of a prompt. Several answers to it share what is made of them: the names of its blocks, and the ids that it
/// has for penalties. Either takes a while for a long prompt, and is made when it is first asked for: by whoever submits
/// requests, so that the engine's thread finds it.
#[derive(Debug)]
pub struct Prompt {
    ids: Arc<[u32]>,
    largest: Option<u32>,
    /// Names under the first root that was asked for: requests of one submission have the same.
    names: OnceLock<(BlockHash, Arc<[BlockHash]>)>,
    distinct: OnceLock<Arc<[u32]>>,
}

impl Prompt {
    /// Of these ids.
    pub fn new(ids: impl Into<Arc<[u32]>>) -> Self {
        let ids = ids.into();
        Self {
            largest: ids.iter().copied().max(),
            ids,
            names: OnceLock::new(),
            distinct: OnceLock::new(),
        }
    }

    /// Its ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The first id that a vocabulary of so many does not have.
    pub fn unknown(&self, vocab: u32) -> Option<u32> {
        self.largest.filter(|largest| *largest >= vocab)?;
        self.ids.iter().copied().find(|id| *id >= vocab)
    }

    /// The names of its full blocks.
    pub fn names(&self, root: BlockHash) -> HashChain {
        let make = || HashChain::names(root, &self.ids);
        let (known, names) = self.names.get_or_init(|| (root, make()));
        let names = match *known == root {
            true => Arc::clone(names),
            false => make(),
        };
        HashChain::new(root, names)
    }

    /// Its ids, each once, ascending.
    pub fn distinct(&self) -> Arc<[u32]> {
        let distinct = self.distinct.get_or_init(|| {
            let mut ids = self.ids.to_vec();
            ids.sort_unstable();
            ids.dedup();
            ids.into()
        });
        Arc::clone(distinct)
    }
}

/// A prompt and the answer so far.
pub struct Tokens {
    prompt: Arc<Prompt>,
    answer: Vec<u32>,
}

impl Tokens {
    pub fn new(prompt: Arc<Prompt>) -> Self {
        Self {
            prompt,
            answer: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.prompt.ids.len() + self.answer.len()
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt.ids.len()
    }

    pub fn push(&mut self, id: u32) {
        self.answer.push(id);
    }

    /// The ids of these positions, if all are known.
    pub fn get(&self, at: Range<usize>) -> Option<Vec<u32>> {
        if at.end > self.len() {
            return None;
        }
        let prompt = self.prompt.ids();
        let border = prompt.len();
        let of_prompt = prompt.get(at.start..at.end.min(border));
        let of_answer = at.start.max(border) - border..at.end.max(border) - border;
        Some([of_prompt.unwrap_or_default(), &self.answer[of_answer]].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_those_of_prompt_and_answer_in_a_row() {
        let mut tokens = Tokens::new(Arc::new(Prompt::new(vec![0, 1, 2])));
        let all: Vec<u32> = (0..6).collect();
        all[3..].iter().for_each(|id| tokens.push(*id));
        for start in 0..=6 {
            for end in start..=6 {
                let got = tokens.get(start..end);
                assert_eq!(got.as_deref(), Some(&all[start..end]), "{start}..{end}");
            }
        }
        assert_eq!(
            (tokens.get(5..7), tokens.len(), tokens.prompt_len()),
            (None, 6, 3)
        );
    }

    #[test]
    fn answers_share_what_is_made_of_their_prompt() {
        let prompt = Prompt::new((0..100).rev().chain(40..60).collect::<Vec<_>>());
        let (one, two) = (BlockHash::root(1, None), BlockHash::root(2, None));
        let names = |root| {
            let chain = prompt.names(root);
            (0..chain.len()).map(|i| *chain.get(i)).collect::<Vec<_>>()
        };
        assert_eq!(names(one), names(one));
        assert_eq!(names(one), &*HashChain::names(one, prompt.ids()));
        assert_eq!(names(two), &*HashChain::names(two, prompt.ids()));
        assert!(Arc::ptr_eq(&prompt.distinct(), &prompt.distinct()));
        assert!(prompt.distinct().iter().copied().eq(0..100));
        assert_eq!((prompt.unknown(100), prompt.unknown(50)), (None, Some(99)));
    }
}
