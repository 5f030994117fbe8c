//! Qwen3's text side: conversations to prompts, text to token ids and back, answers to reasoning, content and calls.
//!
//! Qwen3's tokenizer is in the binary; a model may bring another one of its kind, with ids of its own for the same control
//! texts.
//!
//! What it is not: it holds no weights and runs no model, so that a process which only counts tokens needs neither
//! candle nor CUDA. The agent worker calls it to keep what a model is shown within a budget of tokens; the inference
//! worker calls all of it on the way in and out.
//!
//! ```
//! let tokenizer = espalier_qwen3_text::Tokenizer::shared()?;
//! assert_eq!(tokenizer.encode_ordinary("Hello, world!"), [9707, 11, 1879, 0]);
//! # Ok::<(), &espalier_qwen3_text::LoadError>(())
//! ```

mod asset;
mod bytes;
mod detokenizer;
mod file;
mod fuzz;
mod ids;
mod learn;
mod output;
mod template;
mod tokenizer;

pub use asset::{LoadError, TOKENIZER_SHA256};
pub use detokenizer::Detokenizer;
pub use file::TokenizerError;
pub use fuzz::fuzz_output_parser;
pub use ids::Ids;
pub use learn::{LearnError, learn};
pub use output::{CallError, Delta, OutputParser, ParserOptions};
pub use template::{
    CHAT_TEMPLATE_SHA256, ChatTemplate, Conversation, Mended, Prompt, TemplateError,
};
pub use tokenizer::{TOKENIZER_BYTES_MAX, Tokenizer, UnknownId};
