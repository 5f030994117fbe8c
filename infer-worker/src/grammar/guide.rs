//! llguidance behind the [`Constraint`] trait: grammars over a vocabulary of bytes.

use std::fmt::Write as _;
use std::sync::Arc;

use espalier_core::error::shorten;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::json;

use super::compiled::Compiled;
use super::masks::{Pending, Threads};
use super::{CallGrammar, Constraint, Grammar, GrammarError, Thoughts, arguments, weight};

/// Largest schema, in bytes of its text.
const SCHEMA_BYTES_MAX: usize = 64 << 10;
/// Largest grammar, in bytes of its text: all tools together.
const GRAMMAR_BYTES_MAX: usize = 256 << 10;
/// Most that is copied while a grammar is compiled, in bytes of its text: llguidance takes some tens of bytes for each.
const COPIED_BYTES_MAX: u64 = 4 << 20;

/// What a mask may cost, in llguidance's units: 14,000 a millisecond.
const LEXER_FUEL: u64 = 40_000;
/// The same for items of its parser, of which it makes 20,000 a millisecond.
const ITEMS_MAX: usize = 20_000;
/// States that an answer may need, of 1 to 2 kB each: every answer has its own.
const LEXER_STATES_MAX: usize = 10_000;

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
    compiled: Compiled<State>,
    threads: Threads,
    marks: Marks,
}

/// Where an answer is in its grammar, and what may come next.
struct State {
    matcher: Matcher,
    mask: Arc<[u32]>,
}

impl State {
    fn new(mut matcher: Matcher) -> anyhow::Result<Self> {
        let mask = matcher.compute_mask_or_eos()?.as_slice().into();
        Ok(Self { matcher, mask })
    }

    /// What comes after the end of the grammar is the end of the answer.
    fn after(mut self, id: u32) -> Result<Self, GrammarError> {
        if self.matcher.is_stopped() {
            return Ok(self);
        }
        self.matcher.consume_token(id).map_err(run_error)?;
        Self::new(self.matcher).map_err(run_error)
    }
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
        let limits = factory.limits_mut();
        // An error's text would else hold the answer so far.
        limits.verbose_errors = false;
        limits.step_lexer_fuel = LEXER_FUEL;
        limits.step_max_items = ITEMS_MAX;
        limits.max_lexer_states = LEXER_STATES_MAX;
        Ok(Self {
            factory,
            compiled: Compiled::default(),
            threads: Threads::start().map_err(compile_error)?,
            marks,
        })
    }

    /// The state of an answer that has not begun. What it may begin with is known then.
    ///
    /// # Errors
    /// A schema does not compile, or others are compiled for too long.
    pub fn constrain(
        &self,
        grammar: &Grammar,
        thoughts: Thoughts,
    ) -> Result<Box<dyn Constraint>, GrammarError> {
        check_sizes(grammar)?;
        let text = lark(grammar, self.marks.call);
        check_size("the grammar", text.len(), GRAMMAR_BYTES_MAX)?;
        let begun = self.compiled.get(&text, || self.compile(&text))?;
        let state = State {
            matcher: begun.matcher.deep_clone(),
            mask: Arc::clone(&begun.mask),
        };
        Ok(Box::new(Guide {
            next: Next::Known(state),
            threads: self.threads.clone(),
            marks: self.marks.clone(),
            thoughts,
        }))
    }

    fn compile(&self, text: &str) -> Result<State, GrammarError> {
        let grammar = TopLevelGrammar::from_lark(text.to_owned());
        let parser = self.factory.create_parser(grammar).map_err(compile_error)?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(reason) => Err(compile_error(reason)),
            None => State::new(matcher).map_err(compile_error),
        }
    }
}

/// Refuses what would take too long or too much to compile.
fn check_sizes(grammar: &Grammar) -> Result<(), GrammarError> {
    let (schema, calls) = match grammar {
        Grammar::Json { schema } => (Some(schema), &[][..]),
        Grammar::Calls { calls, .. } => (None, &calls[..]),
        Grammar::JsonOrCalls { schema, calls, .. } => (Some(schema), &calls[..]),
    };
    let arguments = calls.iter().map(|call| &call.arguments);
    let mut copied = 0_u64;
    for schema in schema.into_iter().chain(arguments) {
        check_size("a schema", schema.to_string().len(), SCHEMA_BYTES_MAX)?;
        copied = copied.saturating_add(weight::copied_bytes(schema));
    }
    if copied <= COPIED_BYTES_MAX {
        return Ok(());
    }
    Err(compile_error(format!(
        "with all that stands beside alternatives repeated for each, it must have at most {COPIED_BYTES_MAX} bytes, got {copied}"
    )))
}

fn check_size(what: &str, bytes: usize, bytes_max: usize) -> Result<(), GrammarError> {
    if bytes <= bytes_max {
        return Ok(());
    }
    Err(compile_error(format!(
        "{what} must have at most {bytes_max} bytes, got {bytes}"
    )))
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
    next: Next,
    threads: Threads,
    marks: Marks,
    thoughts: Thoughts,
}

/// Where the answer is in its grammar.
#[expect(
    clippy::large_enum_variant,
    reason = "one for each answer, and mostly this one"
)]
enum Next {
    Known(State),
    Coming(Pending<Result<State, GrammarError>>),
    /// It failed, and the answer with it.
    Ended,
}

impl Guide {
    /// Waits for the state, which the caller puts back.
    fn take(&mut self) -> Result<State, GrammarError> {
        match std::mem::replace(&mut self.next, Next::Ended) {
            Next::Known(state) => Ok(state),
            Next::Coming(state) => state.wait().flatten(),
            Next::Ended => Err(run_error("it failed before")),
        }
    }
}

impl Constraint for Guide {
    fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        if self.thoughts == Thoughts::Open {
            return Ok(Arc::clone(&self.marks.in_thought));
        }
        let state = self.take()?;
        let mut allowed = Arc::clone(&state.mask);
        self.next = Next::Known(state);
        if self.thoughts == Thoughts::Possible {
            let id = self.marks.thought.0;
            Arc::make_mut(&mut allowed)[id as usize / 32] |= 1 << (id % 32);
        }
        Ok(allowed)
    }

    fn push(&mut self, id: u32) -> Result<(), GrammarError> {
        match self.thoughts {
            Thoughts::Open if id == self.marks.thought.1 => self.thoughts = Thoughts::Over,
            Thoughts::Open => {}
            Thoughts::Possible if id == self.marks.thought.0 => self.thoughts = Thoughts::Open,
            Thoughts::Possible | Thoughts::Over => {
                self.thoughts = Thoughts::Over;
                let state = self.take()?;
                self.next = Next::Coming(self.threads.begin(move || state.after(id)));
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
