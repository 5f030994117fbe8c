//! The workloads of the baseline: `bench` (256 requests of mixed length), `b1` (one request), `agent` (64 conversations
//! over one prefix); and where the time of a step goes.

use std::collections::BTreeMap;
use std::time::Instant;

use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use super::random::Python;
use super::{BenchError, Ceilings, MODEL_LEN, Plan, Shape};
use crate::engine::{Engine, Event, FinishReason, Request};
use crate::executor::cuda::CudaExecutor;
use crate::executor::{BlockId, Input, Row, Sampling, SeqId, Step};

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// 256 requests at once, 100–1024 tokens in and out, at temperature 0.6.
    Bench,
    /// One request after the other, 128 in, 256 out, greedy.
    B1,
    /// 64 conversations over a prefix of 4,000 tokens: 6 turns of 800 in, 150 out, at temperature 1.
    Agent,
}

impl Workload {
    /// By its name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "bench" => Some(Self::Bench),
            "b1" => Some(Self::B1),
            "agent" => Some(Self::Agent),
            _ => None,
        }
    }

    pub(super) async fn run(
        self,
        engine: &Engine,
        plan: &Plan,
        ceilings: &Ceilings,
    ) -> Result<Vec<Value>, BenchError> {
        match self {
            Self::Bench => bench(engine, plan, ceilings).await,
            Self::B1 => Ok(vec![b1(engine, plan.shape, ceilings).await?]),
            Self::Agent => agent(engine, plan).await,
        }
    }
}

fn request(prompt: Vec<u32>, tokens: u32, temperature: f32, seed: u64) -> Request {
    Request {
        sampling: Sampling {
            temperature,
            seed,
            ..Sampling::default()
        },
        ..Request::new(prompt, tokens)
    }
}

/// An answer, and how many tokens of its prompt were cached.
async fn answer(mut events: Receiver<Event>, tokens: u32) -> Result<(Vec<u32>, u32), BenchError> {
    let mut ids = Vec::with_capacity(tokens as usize);
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { id, .. } => ids.push(id),
            Event::Finished {
                reason: FinishReason::Length,
                cached_tokens,
            } if ids.len() == tokens as usize => return Ok((ids, cached_tokens)),
            Event::Finished { reason, .. } => {
                let got = ids.len();
                return Err(BenchError::Answer(format!(
                    "{reason:?} after {got} of {tokens} ids"
                )));
            }
        }
    }
    Err(BenchError::Answer(engine_died()))
}

fn engine_died() -> String {
    "the engine ended".to_owned()
}

/// Answers to requests that are submitted at once, with their numbers of ids.
async fn generate(
    engine: &Engine,
    requests: Vec<(Request, u32)>,
) -> Result<Vec<(Vec<u32>, u32)>, BenchError> {
    let (requests, tokens): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
    let receivers = engine
        .submit_all(requests)
        .await
        .map_err(|error| BenchError::Answer(error.to_string()))?;
    let answers = receivers.into_iter().zip(tokens);
    try_join_all(answers.map(|(events, tokens)| answer(events, tokens))).await
}

fn prompt(random: &mut Python, tokens: u32, last_id: u32) -> Vec<u32> {
    (0..tokens).map(|_| random.randint(0, last_id)).collect()
}

/// Seconds that these requests take at least, all at once: weights and caches read once a step, products at full rate.
fn floor_s(shape: Shape, ceilings: &Ceilings, lengths: &[(usize, u32)]) -> f64 {
    let weights = 2.0 * shape.parameters();
    let prompts: usize = lengths.iter().map(|(prompt, _)| prompt).sum();
    let mut seconds = weights * prompts as f64 / ceilings.flop_per_s;
    let most = lengths.iter().map(|(_, tokens)| *tokens).max().unwrap_or(0);
    for drawn in 1..most {
        let running = lengths.iter().filter(|(_, tokens)| *tokens > drawn);
        let (mut rows, mut positions) = (0.0, 0.0);
        for (prompt, _) in running {
            rows += 1.0;
            positions += *prompt as f64 + f64::from(drawn);
        }
        let read = weights / ceilings.bytes_per_s;
        let computed = weights * rows / ceilings.flop_per_s;
        seconds += read.max(computed) + positions * shape.kv_bytes() / ceilings.bytes_per_s;
    }
    seconds
}

async fn bench(
    engine: &Engine,
    plan: &Plan,
    ceilings: &Ceilings,
) -> Result<Vec<Value>, BenchError> {
    let mut random = Python::new(0);
    generate(engine, vec![(request(vec![1, 2, 3, 4], 16, 0.6, 0), 16)]).await?;
    let mut lines = Vec::new();
    for repeat in 0..plan.repeats {
        let prompts: Vec<Vec<u32>> = (0..256)
            .map(|_| {
                let tokens = random.randint(100, 1024);
                prompt(&mut random, tokens, 10_000)
            })
            .collect();
        let tokens: Vec<u32> = (0..256).map(|_| random.randint(100, 1024)).collect();
        let lengths: Vec<_> = prompts.iter().map(Vec::len).zip(tokens.clone()).collect();
        let requests = prompts.into_iter().zip(&tokens).enumerate();
        let requests = requests
            .map(|(i, (prompt, tokens))| (request(prompt, *tokens, 0.6, i as u64), *tokens))
            .collect();
        let before = engine.snapshot().scheduler.steps;
        let began = Instant::now();
        let answers = generate(engine, requests).await?;
        let seconds = began.elapsed().as_secs_f64();
        let ids: usize = answers.iter().map(|(ids, _)| ids.len()).sum();
        let floor = floor_s(plan.shape, ceilings, &lengths);
        lines.push(json!({
            "test": "bench",
            "model": plan.shape.name(),
            "repeat": repeat,
            "total_s": seconds,
            "prompt_tokens": lengths.iter().map(|(prompt, _)| prompt).sum::<usize>(),
            "output_tokens": ids,
            "output_tokens_per_s": ids as f64 / seconds,
            "steps": engine.snapshot().scheduler.steps - before,
            "floor_s": floor,
            "share_of_roofline": floor / seconds,
        }));
    }
    Ok(lines)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn b1(engine: &Engine, shape: Shape, ceilings: &Ceilings) -> Result<Value, BenchError> {
    let mut random = Python::new(1);
    let (mut full, mut first) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let warm = request(prompt(&mut random, 128, 10_000), 64, 0.0, 0);
        generate(engine, vec![(warm, 64)]).await?;
    }
    for _ in 0..5 {
        for (tokens, seconds) in [(1, &mut first), (256, &mut full)] {
            let one = request(prompt(&mut random, 128, 10_000), tokens, 0.0, 0);
            let began = Instant::now();
            generate(engine, vec![(one, tokens)]).await?;
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    let (full, first) = (median(full), median(first));
    let per_token = (full - first) / 255.0;
    let read = 2.0 * shape.parameters() + 256.0 * shape.kv_bytes();
    Ok(json!({
        "test": "b1",
        "model": shape.name(),
        "total_s": full,
        "first_token_s": first,
        "tokens_per_s": 256.0 / full,
        "decode_tokens_per_s": 1.0 / per_token,
        "ms_per_token": per_token * 1e3,
        "share_of_roofline": read / ceilings.bytes_per_s / per_token,
    }))
}

const CONVERSATIONS: usize = 64;
const TURNS: usize = 6;
const TURN_OUT: u32 = 150;

async fn agent(engine: &Engine, plan: &Plan) -> Result<Vec<Value>, BenchError> {
    let mut lines = Vec::new();
    for repeat in 0..plan.repeats {
        let mut random = Python::new(100 + repeat);
        let prefix = prompt(&mut random, 4_000, 100_000);
        let conversations: Vec<Vec<Vec<u32>>> = (0..CONVERSATIONS)
            .map(|_| {
                (0..TURNS)
                    .map(|_| prompt(&mut random, 800, 100_000))
                    .collect()
            })
            .collect();
        let began = Instant::now();
        let all = conversations
            .iter()
            .zip(0..)
            .map(|(turns, seed)| converse(engine, &prefix, turns, seed));
        let ended = try_join_all(all).await?;
        let seconds = began.elapsed().as_secs_f64();
        let sum = |of: fn(&Conversation) -> usize| ended.iter().map(of).sum::<usize>();
        let latencies = ended.iter().flat_map(|c| c.latencies.iter().copied());
        let drawn = sum(|c| c.drawn);
        lines.push(json!({
            "test": "agent",
            "model": plan.shape.name(),
            "repeat": repeat,
            "total_s": seconds,
            "output_tokens": drawn,
            "output_tokens_per_s": drawn as f64 / seconds,
            "prompt_tokens": sum(|c| c.prompt_tokens),
            "cached_tokens": sum(|c| c.cached_tokens),
            "turn_latency_median_s": median(latencies.collect()),
        }));
    }
    Ok(lines)
}

#[derive(Default)]
struct Conversation {
    drawn: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    latencies: Vec<f64>,
}

async fn converse(
    engine: &Engine,
    prefix: &[u32],
    turns: &[Vec<u32>],
    seed: u64,
) -> Result<Conversation, BenchError> {
    let mut conversation = Conversation::default();
    let mut history = prefix.to_vec();
    for turn in turns {
        history.extend(turn);
        let one = request(history.clone(), TURN_OUT, 1.0, seed);
        let began = Instant::now();
        let (ids, cached) = generate(engine, vec![(one, TURN_OUT)])
            .await?
            .pop()
            .ok_or_else(|| BenchError::Answer(engine_died()))?;
        conversation.latencies.push(began.elapsed().as_secs_f64());
        conversation.drawn += ids.len();
        conversation.prompt_tokens += history.len();
        conversation.cached_tokens += cached as usize;
        history.extend(ids);
    }
    Ok(conversation)
}

/// Prompts for the comparison of graphs and launches.
pub(super) fn check_prompts() -> Vec<Vec<u32>> {
    let mut random = Python::new(9);
    (0..5)
        .map(|i| prompt(&mut random, 20 + 90 * i, 100_000))
        .collect()
}

/// A step of `rows` rows of `tokens` tokens after `start` others.
fn step(rows: u32, start: u32, tokens: u32) -> Step {
    let blocks = (start + tokens).div_ceil(16);
    let row = |i: u32| Row {
        seq: SeqId(u64::from(i)),
        input: Input::Ids(vec![1000 + i; tokens as usize]),
        start,
        blocks: (i * blocks..(i + 1) * blocks).map(BlockId).collect(),
        adapter: None,
        sample: Some(Sampling {
            temperature: 0.6,
            ..Sampling::default()
        }),
    };
    Step {
        rows: (0..rows).map(row).collect(),
    }
}

/// Milliseconds by kind of op, of steps of several kinds.
pub(super) fn op_times(
    executor: &mut CudaExecutor,
    shape: Shape,
    ceilings: &Ceilings,
) -> Result<Vec<Value>, BenchError> {
    let mut lines = Vec::new();
    let kinds = [
        ("decode of 1 at 256", step(1, 255, 1)),
        ("decode of 64 at 1024", step(64, 1023, 1)),
        ("decode of 256 at 600", step(256, 599, 1)),
        ("prompts of 8 × 1024", step(8, 0, 1024)),
        ("prompt of 8192", step(1, 0, 8192)),
    ];
    const { assert!(MODEL_LEN >= 8192) };
    for (name, step) in kinds {
        executor.time_ops(&step)?;
        let mut by_kind: BTreeMap<&str, f64> = BTreeMap::new();
        for (kind, ms) in executor.time_ops(&step)? {
            *by_kind.entry(kind).or_default() += f64::from(ms);
        }
        let all: f64 = by_kind.values().sum();
        let tokens: usize = step.rows.iter().map(|row| row.input.tokens()).sum();
        let positions: usize = step.rows.iter().map(|row| row.start as usize).sum();
        let weights = 2.0 * shape.parameters();
        let read = (weights + positions as f64 * shape.kv_bytes()) / ceilings.bytes_per_s;
        let computed = weights * tokens as f64 / ceilings.flop_per_s;
        lines.push(json!({
            "test": "op times",
            "model": shape.name(),
            "step": name,
            "ms": all,
            "floor_ms": read.max(computed) * 1e3,
            "share_of_roofline": read.max(computed) * 1e3 / all,
            "ms_by_op": by_kind,
        }));
    }
    Ok(lines)
}
