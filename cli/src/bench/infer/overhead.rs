//! What serving costs beyond the executor: HTTP, template, tokenizer, scheduler and stream. Measured on a model so small
//! that it shows: the same prompts and answers over HTTP and by the executor alone, in turns.

use std::time::Duration;

use espalier_infer_worker::bench::Alone;
use espalier_runtime::tasks::blocking;
use serde_json::{Value, json};

use super::super::figures::{Bound, Figures, Headline};
use super::super::percentile_ms;
use super::server::{Kind, Server, Setup};
use super::wire::Wire;
use crate::exit::Problem;

/// The bounds of the issue.
const REQUEST_MAX_MS: f64 = 1.0;
const TOKEN_MAX_MS: f64 = 0.1;
/// Answers of one token, and of as many as this.
const ANSWER_TOKENS: u32 = 129;
const ROUNDS: usize = 20;
/// Words of a question: a prompt of about 128 tokens.
const WORDS: usize = 11;

/// Times of one round: of short answers and long ones.
struct Times {
    short: Vec<Duration>,
    long: Vec<Duration>,
}

impl Times {
    /// Milliseconds of a request with one token, and of each token more.
    fn split_ms(&self) -> (f64, f64) {
        let (short, long) = (
            percentile_ms(&self.short, 0.5),
            percentile_ms(&self.long, 0.5),
        );
        (short, (long - short) / f64::from(ANSWER_TOKENS - 1))
    }
}

/// Measures with the small model of `setup`.
pub async fn measure(setup: &Setup) -> Result<Figures, Problem> {
    let server = Server::start(setup, Kind::Espalier).await?;
    let mut wire = server.wire()?;
    let (folder, threads) = (setup.model.join("espalier"), setup.threads);
    let load = blocking("bench.load", move || Alone::load(&folder, threads)).await;
    let failed = |error: &dyn std::error::Error| Problem::failed(error.to_string());
    let mut alone = load
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))?;
    let empty = || Times {
        short: Vec::new(),
        long: Vec::new(),
    };
    let (mut served, mut computed) = (empty(), empty());
    let mut prompt_tokens = 0;
    for round in 0..ROUNDS {
        for tokens in [1, ANSWER_TOKENS] {
            let asked = move || {
                let answered = chat(&mut wire, &question(round, tokens), tokens);
                (wire, answered)
            };
            let asked = blocking("bench.ask", asked).await;
            let (back, answered) = asked.map_err(|error| failed(&error))?;
            wire = back;
            let (took, prompt) = answered?;
            prompt_tokens = prompt;
            let run = blocking("bench.alone", move || {
                let took = alone.answer(prompt, tokens);
                (alone, took)
            });
            let (back, took_alone) = run.await.map_err(|error| failed(&error))?;
            alone = back;
            let took_alone = took_alone.map_err(|error| failed(&error))?;
            let (of_served, of_computed) = match tokens {
                1 => (&mut served.short, &mut computed.short),
                _ => (&mut served.long, &mut computed.long),
            };
            of_served.push(took);
            of_computed.push(took_alone);
        }
    }
    server.end().await?;
    Ok(figures(&served, &computed, prompt_tokens))
}

fn figures(served: &Times, computed: &Times, prompt_tokens: u32) -> Figures {
    let (request, token) = served.split_ms();
    let (request_alone, token_alone) = computed.split_ms();
    let beyond = [request - request_alone, token - token_alone];
    let whole = (beyond[0] + beyond[1] * f64::from(ANSWER_TOKENS - 1))
        / (REQUEST_MAX_MS + TOKEN_MAX_MS * f64::from(ANSWER_TOKENS));
    Figures {
        values: json!({
            "prompt_tokens": prompt_tokens,
            "answer_tokens": ANSWER_TOKENS,
            "request_ms": request,
            "request_alone_ms": request_alone,
            "token_ms": token,
            "token_alone_ms": token_alone,
        }),
        headlines: vec![
            Headline::new("serving, beyond the executor: a request", beyond[0], "ms")
                .bound(Bound::AtMost(REQUEST_MAX_MS + TOKEN_MAX_MS)),
            Headline::new("serving, beyond the executor: a token", beyond[1], "ms")
                .bound(Bound::AtMost(TOKEN_MAX_MS)),
            Headline::new(
                format!("the same of {ANSWER_TOKENS} tokens, in times of 1 ms + 0.1 ms a token"),
                whole,
                "",
            )
            .bound(Bound::AtMost(1.0)),
        ],
    }
}

/// A question that no other one begins like.
fn question(round: usize, tokens: u32) -> String {
    let words = (0..WORDS).map(|n| format!("word-{round}-{tokens}-{n}"));
    words.collect::<Vec<_>>().join(" ")
}

/// A streamed answer: how long it took, and how many tokens its prompt had.
fn chat(wire: &mut Wire, question: &str, tokens: u32) -> Result<(Duration, u32), Problem> {
    let body = json!({
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let (took, text) = wire.post("/v1/chat/completions", &body)?;
    let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let usage = events
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .find_map(|event| event["usage"]["prompt_tokens"].as_u64());
    let prompt = usage.and_then(|tokens| u32::try_from(tokens).ok());
    let missing = || Problem::failed("a stream did not tell its tokens");
    Ok((took, prompt.ok_or_else(missing)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_executor_is_the_difference() {
        let times = |short, long| Times {
            short: vec![Duration::from_millis(short)],
            long: vec![Duration::from_millis(long)],
        };
        let figures = figures(&times(10, 266), &times(9, 137), 128);
        let values: Vec<f64> = figures.headlines.iter().map(|one| one.value).collect();
        assert_eq!(values[..2], [1.0, 1.0]);
        let holds: Vec<_> = figures.headlines.iter().map(|one| one.holds).collect();
        assert_eq!(holds, [Some(true), Some(false), Some(false)]);
    }
}
