//! How fast conversations become samples: rendered, tokenized and masked.

use std::time::Instant;

use espalier_dataset::{Facts, Renderer, Row, RowsOptions, Source, Split, rows, samples};
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::telemetry::error_chain;
use serde_json::{Value, json};

use super::words::Words;
use crate::exit::Problem;

const CONVERSATIONS: usize = 200;

/// Makes samples on all threads, over and over; the best counts. First of conversations that all offer the same tools, as
/// those of a data set do, then of such as have no text in common.
pub fn measure(threads: usize, rounds: usize, tell: &mut dyn FnMut(Value)) -> Result<(), Problem> {
    let tokenizer = Tokenizer::shared().map_err(|error| Problem::failed(error_chain(error)))?;
    tell(json!({"threads": threads}));
    for (tools_are_shared, prefix) in [(true, ""), (false, "own_tools_")] {
        let rows = made_up(CONVERSATIONS, tools_are_shared, tokenizer)?;
        let mut best = f64::INFINITY;
        for _ in 0..rounds {
            let (tokens, supervised, seconds) = once(&rows, threads, tokenizer)?;
            best = best.min(seconds);
            let mut fact = serde_json::Map::new();
            for (name, value) in [
                ("rows", json!(rows.len())),
                ("tokens", json!(tokens)),
                ("supervised_tokens", json!(supervised)),
                ("seconds", json!(best)),
                ("tokens_per_s", json!(tokens as f64 / best)),
            ] {
                fact.insert(format!("{prefix}{name}"), value);
            }
            tell(Value::Object(fact));
        }
    }
    Ok(())
}

/// All tokens, those that are trained, and the seconds that they took.
fn once(
    rows: &[Row],
    threads: usize,
    tokenizer: &'static Tokenizer,
) -> Result<(usize, usize, f64), Problem> {
    let began = Instant::now();
    let samples = samples(rows, usize::MAX, threads, tokenizer);
    let seconds = began.elapsed().as_secs_f64();
    let (mut tokens, mut supervised) = (0, 0);
    for sample in samples {
        let sample = sample.map_err(|error| Problem::failed(error_chain(&error)))?;
        tokens += sample.ids.len();
        supervised += sample.supervised_tokens();
    }
    Ok((tokens, supervised, seconds))
}

fn made_up(
    conversations: usize,
    tools_are_shared: bool,
    tokenizer: &'static Tokenizer,
) -> Result<Vec<Row>, Problem> {
    let mut words = Words::new(1);
    let tools = words.tools();
    let mut renderer = Renderer::new(tokenizer);
    let mut all = Vec::new();
    for n in 0..conversations {
        let source = Source {
            id: n.to_string(),
            timestamp: String::new(),
            model: String::new(),
            messages: words.conversation(),
            tools: match tools_are_shared {
                true => tools.clone(),
                false => words.tools(),
            },
            facts: Facts::default(),
            thinking: true,
            keep_hints: None,
            calls: vec![],
        };
        let made = rows(&source, RowsOptions::default(), Split::Train, &mut renderer);
        let (made, _) = made.map_err(|error| Problem::failed(error_chain(&error)))?;
        all.extend(made);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_become_samples_of_which_a_part_is_trained() {
        let tokenizer = Tokenizer::shared().unwrap();
        for tools_are_shared in [true, false] {
            let rows = made_up(2, tools_are_shared, tokenizer).unwrap();
            let (tokens, supervised, seconds) = once(&rows, 2, tokenizer).unwrap();
            assert!(rows.len() >= 2 && seconds > 0.0);
            assert!(
                supervised > 500 && supervised < tokens / 2,
                "{supervised} of {tokens}"
            );
        }
    }
}
