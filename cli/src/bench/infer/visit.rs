//! What is measured of one server in one visit, from its start to its end.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde::Serialize;

use super::super::percentile;
use super::server::{Arrivals, Kind, SEQUENCES, Server, Setup};
use crate::exit::Problem;

/// The short prompt.
const SHORT_TOKENS: usize = 128;
/// The long one.
pub const LONG_TOKENS: usize = 2048;
/// Tokens of an answer whose rate is measured.
const ANSWER_TOKENS: u32 = 64;
const SHORT_ROUNDS: u64 = 5;
const LONG_ROUNDS: u64 = 2;
const DECODE_ROUNDS: u64 = 2;
/// A conversation: what it begins with, and what each turn adds and is answered with.
const TURNS: u64 = 6;
const OPENING_TOKENS: usize = 1024;
const TURN_TOKENS: usize = 96;
const TURN_ANSWER: u32 = 32;

/// The figures of a visit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Visit {
    /// From the start of the process to the first token.
    pub start_s: f64,
    /// Of a short prompt, median.
    pub first_token_ms: f64,
    /// One answer at a time, median.
    pub decode_1_per_s: f64,
    /// As many as there may be at once.
    pub decode_8_per_s: f64,
    /// The long prompt, best.
    pub prefill_per_s: f64,
    /// All turns of a conversation but the first.
    pub turns_s: f64,
    /// At the end.
    pub pss_mb: f64,
}

/// Token ids that nothing is known of: the same for the same seed.
pub fn ids(seed: u64, count: usize) -> Vec<u32> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Below the control tokens of the vocabulary.
        ((state >> 32) % 151_000) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Starts a server, measures, and hands it out running. Prompts follow from `round`, so both servers get the same.
pub async fn visit(setup: &Setup, kind: Kind, round: u64) -> Result<(Server, Visit), Problem> {
    let server = Server::start(setup, kind).await?;
    let seed = |part: u64, n: u64| (round << 32) + (part << 16) + n;
    server.answer(&ids(seed(0, 0), 16), 1, 0).await?;
    let start_s = server.began().elapsed().as_secs_f64();
    let first_token_ms =
        1e3 * prompts_s(&server, SHORT_TOKENS, SHORT_ROUNDS, seed(1, 0), 0.5).await?;
    let mut rates = Vec::new();
    for n in 0..DECODE_ROUNDS {
        let prompt = ids(seed(2, n), SHORT_TOKENS);
        rates.push(rate(&[server.stream(&prompt, ANSWER_TOKENS).await?]));
    }
    let prompts: Vec<Vec<u32>> = (0..u64::from(SEQUENCES))
        .map(|n| ids(seed(3, n), SHORT_TOKENS))
        .collect();
    let streams = prompts
        .iter()
        .map(|prompt| server.stream(prompt, ANSWER_TOKENS));
    let decode_8_per_s = rate(&try_join_all(streams).await?);
    let long_s = prompts_s(&server, LONG_TOKENS, LONG_ROUNDS, seed(4, 0), 0.0).await?;
    let visit = Visit {
        start_s,
        first_token_ms,
        decode_1_per_s: percentile(rates, 0.5),
        decode_8_per_s,
        prefill_per_s: LONG_TOKENS as f64 / long_s,
        turns_s: converse(&server, seed(5, 0)).await?.as_secs_f64(),
        pss_mb: server.pss_mb().await?,
    };
    Ok((server, visit))
}

/// Seconds to the first token of new prompts, one after the other.
async fn prompts_s(
    server: &Server,
    tokens: usize,
    rounds: u64,
    seed: u64,
    share: f64,
) -> Result<f64, Problem> {
    let mut seconds = Vec::new();
    for n in 0..rounds {
        let answer = server.answer(&ids(seed + n, tokens), 1, 0).await?;
        seconds.push(answer.took.as_secs_f64());
    }
    Ok(percentile(seconds, share))
}

/// Tokens a second of all streams together, while all of them are being answered.
fn rate(streams: &[Arrivals]) -> f64 {
    let firsts = streams.iter().filter_map(|stream| stream.first());
    let lasts = streams.iter().filter_map(|stream| stream.last());
    let from = firsts.map(|(at, _)| *at).max();
    let to = lasts.map(|(at, _)| *at).min();
    let (Some(from), Some(to)) = (from, to) else {
        return 0.0;
    };
    let until = |stream: &Arrivals, end: Instant| {
        let known = stream.partition_point(|(at, _)| *at <= end);
        known.checked_sub(1).map_or(0, |last| stream[last].1)
    };
    let tokens: usize = streams
        .iter()
        .map(|stream| until(stream, to).saturating_sub(until(stream, from)))
        .sum();
    tokens as f64 / to.duration_since(from).as_secs_f64()
}

/// Each turn's prompt is all that was said before and something new.
async fn converse(server: &Server, seed: u64) -> Result<Duration, Problem> {
    let mut said = ids(seed, OPENING_TOKENS);
    let mut took = Duration::ZERO;
    for turn in 0..TURNS {
        said.extend(ids(seed + 1 + turn, TURN_TOKENS));
        let answer = server.answer(&said, TURN_ANSWER, 0).await?;
        said.extend(&answer.ids);
        if turn > 0 {
            took += answer.took;
        }
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_time_when_all_are_answered() {
        let start = Instant::now();
        let at = |ms: u64, count: usize| (start + Duration::from_millis(ms), count);
        let one = vec![at(0, 1), at(100, 2), at(200, 3), at(300, 5)];
        assert!((rate(std::slice::from_ref(&one)) - 4.0 / 0.3).abs() < 1e-9);
        // From 100 ms to 300 ms: three tokens of the first stream, two of the second.
        let other = vec![at(100, 1), at(200, 2), at(300, 3), at(400, 4)];
        assert!((rate(&[one, other]) - 5.0 / 0.2).abs() < 1e-9);
        assert_eq!(rate(&[]), 0.0);
    }

    #[test]
    fn prompts_are_the_same_for_the_same_seed_alone() {
        assert_eq!(ids(3, 50), ids(3, 50));
        assert_ne!(ids(3, 50), ids(4, 50));
        assert!(ids(5, 1000).iter().all(|id| *id < 151_000));
    }
}
