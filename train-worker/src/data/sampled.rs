//! What traces recorded of the tokens that a model sampled, laid out for a forward pass, and how far that is from what the
//! pass computes. Pure.
//!
//! Calls of which each prompt begins with all that came before it are one document: a conversation is computed once, and
//! not once for each of its turns.

use espalier_core::adapter::Difference;
use espalier_core::trace::{ModelCall, PromptError, Trace, prompt_ids};
use espalier_dataset::spells;
use espalier_qwen3_text::Tokenizer;

use super::{DataError, Row, Rules, Samples};
use crate::engine::Documents;

/// Most traces: their thousands of tokens tell what more would tell.
const TRACES_MAX: u64 = 16;
/// Most tokens of all of them, prompts included: the forward pass of a few steps, which is little beside a training.
const TOKENS_MAX: usize = 1 << 15;

/// Why a trace says nothing of what was sampled by the base model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unfit {
    /// The model was another one.
    #[error("the adapter `{0}` answered")]
    Adapter(String),
    /// Prompts are told as changes to what is not there.
    #[error(transparent)]
    Prompts(#[from] PromptError),
    /// The server did not give them.
    #[error(
        "no call has the token ids of its prompt and a log-probability of each sampled one: its endpoint gave none"
    )]
    NotRecorded,
    /// The tokenizer was another one.
    #[error("its token ids do not spell what it says by the base model's tokenizer")]
    Misspelt,
    /// An id that the model does not have.
    #[error("its token ids must be below the base model's vocabulary, {vocabulary}, got {id}")]
    Vocabulary {
        /// The model's.
        vocabulary: usize,
        /// Of the trace.
        id: u32,
    },
    /// It would take more than the training has room for.
    #[error("no token was sampled within the first {0}, and more are not computed at once")]
    TooLong(usize),
    /// Traces before it take the room.
    #[error("no token was sampled within the first {0}, which is the room that other traces leave")]
    NoRoom(usize),
    /// It is no sample.
    #[error(transparent)]
    Data(#[from] DataError),
}

/// Sampled tokens of some traces with the log-probabilities that were recorded.
#[derive(Debug, Default)]
pub struct Sampled {
    samples: Samples,
    /// Of each supervised token of all samples, in their order.
    logprobs: Vec<f32>,
    traces: u64,
}

impl Sampled {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.traces == 0
    }

    /// Whether there are as many as are wanted.
    pub fn is_full(&self) -> bool {
        self.traces == TRACES_MAX || self.samples.tokens() >= TOKENS_MAX
    }

    /// Takes what a trace recorded, of each document the first `rules.max_length` tokens.
    ///
    /// # Errors
    /// The trace says nothing; then nothing was taken.
    pub fn add(&mut self, trace: &Trace, tokenizer: &Tokenizer, rules: Rules) -> Result<(), Unfit> {
        let name = trace.header.job.to_string();
        let mut room = TOKENS_MAX - self.samples.tokens();
        let (mut rows, mut logprobs) = (Vec::new(), Vec::new());
        for document in documents(trace, tokenizer, rules.vocabulary)? {
            if let Some((row, recorded)) = document.row(&name, rules.max_length.min(room)) {
                room -= row.ids.len();
                rows.push(row);
                logprobs.extend(recorded);
            }
        }
        if rows.is_empty() {
            return Err(match room < rules.max_length {
                true => Unfit::NoRoom(room),
                false => Unfit::TooLong(rules.max_length),
            });
        }
        for row in rows {
            self.samples
                .push(row, rules, format_args!("a trace's document"))?;
        }
        self.logprobs.extend(logprobs);
        self.traces += 1;
        Ok(())
    }

    /// How far what was recorded is from what `losses` computes: -log p of each supervised token of documents that have at
    /// most `tokens_max` tokens together. None: a number is not finite.
    ///
    /// # Errors
    /// Those of `losses`.
    pub fn difference<E>(
        &self,
        tokens_max: usize,
        mut losses: impl FnMut(Documents<'_>) -> Result<Vec<f32>, E>,
    ) -> Result<Option<Difference>, E> {
        let mut computed = Vec::with_capacity(self.logprobs.len());
        for indices in self.samples.batches(tokens_max) {
            let packed = self.samples.pack(&indices);
            computed.extend(losses(packed.documents())?.iter().map(|loss| -loss));
        }
        let recorded = self.logprobs.iter().copied();
        Ok(Difference::of(self.traces, recorded.zip(computed)))
    }
}

/// Calls that follow on each other.
struct Document {
    ids: Vec<u32>,
    /// Where sampled tokens begin, and the log-probability of each.
    said: Vec<(usize, Vec<f32>)>,
}

impl Document {
    /// Its first `room` tokens up to the last sampled one, and what was recorded of the sampled ones; none where there are
    /// none of these.
    fn row(self, name: &str, room: usize) -> Option<(Row, Vec<f32>)> {
        let Self { mut ids, said } = self;
        let mut supervised = Vec::new();
        let mut logprobs = Vec::new();
        for (start, of_tokens) in said {
            // The first token is predicted from nothing.
            let (first, end) = (start.max(1), room.min(start + of_tokens.len()));
            if first < end {
                supervised.push([first as u32, end as u32]);
                logprobs.extend_from_slice(&of_tokens[first - start..end - start]);
            }
        }
        let [_, end] = *supervised.last()?;
        ids.truncate(end as usize);
        let row = Row {
            id: name.to_owned(),
            ids,
            supervised,
        };
        Some((row, logprobs))
    }
}

fn documents(
    trace: &Trace,
    tokenizer: &Tokenizer,
    vocabulary: usize,
) -> Result<Vec<Document>, Unfit> {
    let calls = &trace.model_calls;
    if let Some(adapter) = calls.iter().find_map(|call| call.adapter.as_ref()) {
        return Err(Unfit::Adapter(adapter.name.clone()));
    }
    let mut documents: Vec<Document> = Vec::new();
    for (call, prompt) in calls.iter().zip(prompt_ids(calls)?) {
        let Some((prompt, ids, logprobs)) = recorded(call, prompt) else {
            continue;
        };
        let beyond = prompt
            .iter()
            .chain(ids)
            .find(|id| **id as usize >= vocabulary);
        if let Some(&id) = beyond {
            return Err(Unfit::Vocabulary { vocabulary, id });
        }
        let spelt = tokenizer
            .decode(ids)
            .ok()
            .zip(trace.messages.get(call.message));
        if !spelt.is_some_and(|(text, message)| spells(&text, message)) {
            return Err(Unfit::Misspelt);
        }
        let mut document = match documents.pop_if(|last| prompt.starts_with(&last.ids)) {
            Some(last) => Document {
                ids: prompt,
                ..last
            },
            None => Document {
                ids: prompt,
                said: Vec::new(),
            },
        };
        document.said.push((document.ids.len(), logprobs.to_vec()));
        document.ids.extend_from_slice(ids);
        documents.push(document);
    }
    match documents.is_empty() {
        true => Err(Unfit::NotRecorded),
        false => Ok(documents),
    }
}

/// The prompt, the sampled ids and their log-probabilities, where all are known.
fn recorded(call: &ModelCall, prompt: Option<Vec<u32>>) -> Option<(Vec<u32>, &[u32], &[f32])> {
    let ids = call.completion_ids.as_deref()?;
    let logprobs = call.logprobs.as_deref()?;
    let is_whole = !ids.is_empty() && ids.len() == logprobs.len();
    Some((prompt.filter(|_| is_whole)?, ids, logprobs))
}

#[cfg(test)]
mod tests {
    use espalier_core::chat::Message;
    use espalier_core::trace::{AdapterRef, PromptTokens};

    use super::*;

    const RULES: Rules = Rules {
        vocabulary: 151_669,
        max_length: 64,
    };

    fn tokenizer() -> &'static Tokenizer {
        Tokenizer::shared().unwrap()
    }

    /// A trace of two calls, of which the second goes on from the first; the log-probabilities are -1, -2, …
    fn trace() -> Trace {
        let text = include_str!("../../../crates/core/tests/golden/trace-v1.json");
        let mut trace = Trace::from_json(text.as_bytes()).unwrap();
        trace.messages = ["one two", "three"]
            .map(|said| Message::assistant(said.to_owned(), None, vec![]))
            .into();
        let mut known: Option<Vec<u32>> = None;
        let call = |(message, shown, said): (usize, &str, &str)| {
            let mut prompt = known.clone().unwrap_or_default();
            prompt.extend(tokenizer().encode(shown));
            let ids = tokenizer().encode(said);
            let told = PromptTokens::tell(&prompt, known.as_deref().map(|known| (0, known)));
            known = Some([&prompt[..], &ids].concat());
            ModelCall {
                message,
                prompt: Some(told),
                logprobs: Some((1..=ids.len()).map(|n| -(n as f32)).collect()),
                completion_ids: Some(ids),
                ..ModelCall::default()
            }
        };
        let calls = [(0, "a b c", "one two"), (1, " d e", "three<|im_end|>")].map(call);
        trace.model_calls = calls.into();
        trace
    }

    fn unfit(change: impl FnOnce(&mut Trace)) -> Unfit {
        let mut trace = trace();
        change(&mut trace);
        let mut sampled = Sampled::default();
        let error = sampled.add(&trace, tokenizer(), RULES).unwrap_err();
        assert!(sampled.is_empty() && sampled.samples.is_empty());
        error
    }

    #[test]
    fn turns_that_follow_on_each_other_are_one_document() {
        let mut sampled = Sampled::default();
        sampled.add(&trace(), tokenizer(), RULES).unwrap();
        assert_eq!(sampled.samples.lengths(), [3 + 2 + 2 + 2]);
        let mut seen = Vec::new();
        let difference = sampled.difference(RULES.max_length, |documents| {
            seen = documents.supervised.to_vec();
            Ok::<_, ()>(vec![1.0, 2.5, 1.0, 1.0])
        });
        let at = |n: &usize| [3, 4, 7, 8].contains(n);
        assert_eq!(seen, (0..9).map(|n| at(&n)).collect::<Vec<_>>());
        let expected = Difference {
            traces: 1,
            tokens: 4,
            mean: 0.375,
            max: 1.0,
        };
        assert_eq!(difference, Ok(Some(expected)));
        let broken = sampled.difference(RULES.max_length, |_| Ok::<_, ()>(vec![f32::NAN; 4]));
        assert_eq!(broken, Ok(None));
    }

    #[test]
    fn a_prompt_that_breaks_off_begins_another_document() {
        let mut trace = trace();
        trace.model_calls[1].prompt = Some(PromptTokens::tell(&[5, 6], None));
        let mut sampled = Sampled::default();
        sampled.add(&trace, tokenizer(), RULES).unwrap();
        assert_eq!(sampled.samples.lengths(), [5, 4]);
        let mut sizes = Vec::new();
        let difference = sampled.difference(5, |documents| {
            sizes.push(documents.ids.len());
            Ok::<_, ()>(vec![1.0, 2.0])
        });
        assert_eq!((sizes, difference.unwrap().unwrap().max), (vec![5, 4], 0.0));
    }

    #[test]
    fn what_is_too_long_is_cut_and_not_left_out() {
        let mut sampled = Sampled::default();
        let of = |max_length| Rules {
            max_length,
            ..RULES
        };
        sampled.add(&trace(), tokenizer(), of(8)).unwrap();
        assert_eq!(
            (sampled.samples.lengths(), sampled.logprobs.len()),
            (vec![8], 3)
        );
        let error = sampled.add(&trace(), tokenizer(), of(3)).unwrap_err();
        assert_eq!((error, sampled.traces), (Unfit::TooLong(3), 1));
        while !sampled.is_full() {
            sampled.add(&trace(), tokenizer(), RULES).unwrap();
        }
        assert_eq!(sampled.traces, TRACES_MAX);
    }

    #[test]
    fn who_finds_no_room_is_told_so() {
        let mut sampled = Sampled::default();
        let said = TOKENS_MAX - 4;
        let mut long = trace();
        long.model_calls.truncate(1);
        long.messages[0] = Message::assistant(" a".repeat(said), None, vec![]);
        let ids = tokenizer().encode(&" a".repeat(said));
        assert_eq!(ids.len(), said);
        long.model_calls[0].prompt = Some(PromptTokens::tell(&[5], None));
        long.model_calls[0].logprobs = Some(vec![-1.0; said]);
        long.model_calls[0].completion_ids = Some(ids);
        let rules = Rules {
            max_length: TOKENS_MAX,
            ..RULES
        };
        sampled.add(&long, tokenizer(), rules).unwrap();
        let left = TOKENS_MAX - sampled.samples.tokens();
        let error = sampled.add(&trace(), tokenizer(), RULES).unwrap_err();
        assert_eq!((error, sampled.traces), (Unfit::NoRoom(left), 1));
        assert_eq!(sampled.samples.len(), 1);
    }

    #[test]
    fn a_trace_of_another_model_or_without_its_numbers_says_why() {
        let adapter = AdapterRef {
            name: "shop".to_owned(),
            sha256: None,
        };
        let found = unfit(|trace| trace.model_calls[1].adapter = Some(adapter));
        assert_eq!(found, Unfit::Adapter("shop".to_owned()));
        let silent = |trace: &mut Trace| {
            trace.model_calls[0].logprobs = None;
            trace.model_calls[1].completion_ids = None;
        };
        assert_eq!(unfit(silent), Unfit::NotRecorded);
        let fewer = |trace: &mut Trace| {
            trace.model_calls.truncate(1);
            trace.model_calls[0].logprobs = Some(vec![-1.0]);
        };
        assert_eq!(unfit(fewer), Unfit::NotRecorded);
        let other = |trace: &mut Trace| trace.model_calls[0].completion_ids = Some(vec![7, 8]);
        assert_eq!(unfit(other), Unfit::Misspelt);
        let nowhere = |trace: &mut Trace| trace.model_calls[1].message = 9;
        assert_eq!(unfit(nowhere), Unfit::Misspelt);
        let (vocabulary, id) = (RULES.vocabulary, 151_669);
        let beyond = |trace: &mut Trace| {
            trace.model_calls.truncate(1);
            trace.model_calls[0].prompt = Some(PromptTokens::tell(&[id], None));
        };
        assert_eq!(unfit(beyond), Unfit::Vocabulary { vocabulary, id });
        let apart = PromptTokens {
            extends: Some(5),
            keep: 0,
            append: vec![],
        };
        let found = unfit(|trace| trace.model_calls[1].prompt = Some(apart));
        assert!(matches!(found, Unfit::Prompts(_)), "{found}");
    }
}
