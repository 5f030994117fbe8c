//! llguidance behind the [`Constraint`] trait: grammars over a vocabulary of bytes.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use espalier_core::error::shorten;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::json;

use super::{CallGrammar, Constraint, Grammar, GrammarError, Thoughts, arguments};

/// Grammars that are kept compiled: agents send the same tools again and again.
const COMPILED_MAX: usize = 64;
/// Largest grammar, in bytes of its text.
const GRAMMAR_BYTES_MAX: usize = 1 << 20;

/// Blanks between two parts of JSON: lines that are indented ten levels deep.
const JSON_BLANKS: &str = r"[ \n\r\t]{1,40}";
/// The same in arguments of calls, which models are taught to write in one line.
const CALL_BLANKS: &str = r"[ \n]{1,4}";

/// What the ids of a model stand for.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// The bytes of each id, from 0 without gaps. Ids beyond are never allowed.
    pub words: Vec<Vec<u8>>,
    /// Ids that are no text: they are allowed only where a grammar names them.
    pub control: Vec<u32>,
    /// Ends the answer.
    pub end: u32,
    /// Begins and ends a call.
    pub call: (u32, u32),
    /// Begins and ends a thought.
    pub thought: (u32, u32),
}

/// Compiles grammars for one vocabulary. Making one takes some tenths of a second: one serves all requests.
pub struct Guides {
    factory: ParserFactory,
    compiled: Mutex<VecDeque<(Arc<str>, Matcher)>>,
    marks: Marks,
}

/// The ids that a constraint itself knows.
#[derive(Clone)]
struct Marks {
    call: (u32, u32),
    thought: (u32, u32),
    /// Everything but the end of the answer and what belongs outside a thought.
    in_thought: Arc<[u32]>,
}

impl Guides {
    /// # Errors
    /// The vocabulary has no ids, or not those that it names.
    pub fn new(vocabulary: Vocabulary) -> Result<Self, GrammarError> {
        let ids = vocabulary.words.len() as u32;
        let named = [
            vocabulary.end,
            vocabulary.call.0,
            vocabulary.call.1,
            vocabulary.thought.0,
            vocabulary.thought.1,
        ];
        if let Some(id) = named
            .iter()
            .chain(&vocabulary.control)
            .find(|id| **id >= ids)
        {
            let reason = format!("id {id} must be below the vocabulary's size, {ids}");
            return Err(GrammarError::Compile { reason });
        }
        let marks = Marks::new(&vocabulary);
        let mut words = vocabulary.words;
        for &id in vocabulary.control.iter().chain(&named) {
            let word = &mut words[id as usize];
            if word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let trie = TokTrie::from(&TokRxInfo::new(ids, vocabulary.end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(compile_error)?;
        factory.quiet();
        // An error's text would else hold the answer so far.
        factory.limits_mut().verbose_errors = false;
        Ok(Self {
            factory,
            compiled: Mutex::default(),
            marks,
        })
    }

    /// The state of an answer that has not begun.
    ///
    /// # Errors
    /// A schema does not compile.
    pub fn constrain(
        &self,
        grammar: &Grammar,
        thoughts: Thoughts,
    ) -> Result<Box<dyn Constraint>, GrammarError> {
        Ok(Box::new(Guide {
            matcher: self.matcher(grammar)?,
            marks: self.marks.clone(),
            thoughts,
        }))
    }

    fn matcher(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let text = lark(grammar, self.marks.call);
        if text.len() > GRAMMAR_BYTES_MAX {
            let reason = format!(
                "it must have at most {GRAMMAR_BYTES_MAX} bytes, got {}",
                text.len()
            );
            return Err(GrammarError::Compile { reason });
        }
        if let Some(known) = self.known(&text) {
            return Ok(known);
        }
        let parser = self
            .factory
            .create_parser(TopLevelGrammar::from_lark(text.clone()));
        let matcher = Matcher::new(Ok(parser.map_err(compile_error)?));
        if let Some(reason) = matcher.get_error() {
            return Err(GrammarError::Compile {
                reason: shorten(&reason),
            });
        }
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.truncate(COMPILED_MAX - 1);
        compiled.push_front((text.into(), matcher.deep_clone()));
        Ok(matcher)
    }

    /// A copy of what was compiled before, which then counts as used last.
    fn known(&self, text: &str) -> Option<Matcher> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let at = compiled.iter().position(|(known, _)| **known == *text)?;
        let entry = compiled.remove(at)?;
        let matcher = entry.1.deep_clone();
        compiled.push_front(entry);
        Some(matcher)
    }
}

impl Marks {
    fn new(vocabulary: &Vocabulary) -> Self {
        let ids = vocabulary.words.len();
        let mut mask = vec![u32::MAX; ids.div_ceil(32)];
        let beyond = ids..mask.len() * 32;
        let outside = vocabulary
            .control
            .iter()
            .copied()
            .filter(|id| *id != vocabulary.thought.1);
        let outside = outside.chain([vocabulary.end]).map(|id| id as usize);
        for id in beyond.chain(outside) {
            mask[id / 32] &= !(1 << (id % 32));
        }
        Self {
            call: vocabulary.call,
            thought: vocabulary.thought,
            in_thought: mask.into(),
        }
    }
}

fn compile_error(error: impl std::fmt::Display) -> GrammarError {
    let reason = shorten(&error.to_string());
    GrammarError::Compile { reason }
}

struct Guide {
    matcher: Matcher,
    marks: Marks,
    thoughts: Thoughts,
}

impl Constraint for Guide {
    fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        if self.thoughts == Thoughts::Open {
            return Ok(Arc::clone(&self.marks.in_thought));
        }
        let mut allowed = self.matcher.compute_mask_or_eos().map_err(run_error)?;
        if self.thoughts == Thoughts::Possible {
            allowed.allow_token(self.marks.thought.0);
        }
        Ok(allowed.as_slice().into())
    }

    fn push(&mut self, id: u32) -> Result<(), GrammarError> {
        match self.thoughts {
            Thoughts::Open if id == self.marks.thought.1 => self.thoughts = Thoughts::Over,
            Thoughts::Open => {}
            Thoughts::Possible if id == self.marks.thought.0 => self.thoughts = Thoughts::Open,
            Thoughts::Possible | Thoughts::Over => {
                self.thoughts = Thoughts::Over;
                // What comes after the end of the grammar is the end of the answer.
                if !self.matcher.is_stopped() {
                    self.matcher.consume_token(id).map_err(run_error)?;
                }
            }
        }
        Ok(())
    }
}

fn run_error(error: impl std::fmt::Display) -> GrammarError {
    let reason = shorten(&error.to_string());
    GrammarError::Run { reason }
}

/// The grammar in llguidance's form. Schemas stay whole, so that references within them keep their meaning.
fn lark(grammar: &Grammar, call: (u32, u32)) -> String {
    let mut text = String::from("BLANK: /[ \\n]{1,4}/\n");
    let (start, schema, calls) = match grammar {
        Grammar::Json { schema } => ("json", Some(schema), None),
        Grammar::Calls { calls, several } => ("calls", None, Some((calls, *several))),
        Grammar::JsonOrCalls {
            schema,
            calls,
            several,
        } => ("(json | calls)", Some(schema), Some((calls, *several))),
    };
    // A `String` takes all that is written.
    let _ = writeln!(text, "start: BLANK? {start}");
    if let Some(schema) = schema {
        let _ = writeln!(text, "json: %json {}", bounded(schema, JSON_BLANKS));
    }
    if let Some((calls, several)) = calls {
        let more = if several { " (\"\\n\" call)*" } else { "" };
        let _ = writeln!(text, "calls: call{more}");
        let names: Vec<String> = (0..calls.len()).map(|i| format!("call_{i}")).collect();
        let (open, close) = call;
        let _ = writeln!(
            text,
            "call: <[{open}]> \"\\n\" ({}) \"\\n\" <[{close}]>",
            names.join(" | ")
        );
        for (name, call) in names.iter().zip(calls) {
            write_call(&mut text, name, call);
        }
    }
    text
}

fn write_call(text: &mut String, name: &str, call: &CallGrammar) {
    let head = format!("{{\"name\": {}, \"arguments\": ", json!(call.name));
    let schema = bounded(&arguments::bound(&call.arguments), CALL_BLANKS);
    let _ = writeln!(text, "{name}: {} %json {schema} \"}}\"", json!(head));
}

/// The schema with a bound on the blanks between two of its parts: without one they are allowed without end, and a model
/// that likes them does nothing else. Takes the place of whatever the schema itself says to llguidance.
fn bounded(schema: &serde_json::Value, blanks: &str) -> serde_json::Value {
    let mut schema = match schema {
        serde_json::Value::Object(_) => schema.clone(),
        // `true`, the other schema there is, allows what the empty one does.
        _ => json!({}),
    };
    schema["x-guidance"] = json!({"whitespace_pattern": blanks});
    schema
}

#[cfg(test)]
mod tests;
