//! Runs requests through a scheduler and the executor, without threads: every step is seen.

use std::collections::HashMap;
use std::time::Duration;

use espalier_infer_worker::executor::cuda::{CudaExecutor, CudaOptions};
use espalier_infer_worker::executor::{Executor, Limits, Sampling};
use espalier_infer_worker::scheduler::{
    Config, Counters, Event, FinishReason, Request, RequestId, Scheduler,
};
use espalier_kernels::cuda::Options;
use espalier_qwen3::{Config as ModelConfig, TensorSource};

use crate::runner;

/// Positions of the small models.
pub const POSITIONS: u32 = 512;

pub fn options() -> CudaOptions {
    CudaOptions {
        device: Options {
            libraries: runner::library_folders(),
            ..Options::default()
        },
        max_num_seqs: 64,
        max_num_batched_tokens: 4096,
        max_lora_rank: 16,
        max_loras: 3,
        kv_blocks: Some(64 * 8),
        ..CudaOptions::new(POSITIONS)
    }
}

pub fn load(
    config: &ModelConfig,
    source: &dyn TensorSource,
    options: &CudaOptions,
) -> CudaExecutor {
    match CudaExecutor::load(config, source, options) {
        Ok(executor) => executor,
        Err(error) => panic!("{}", chain(&error)),
    }
}

pub fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// How requests are run.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// At once.
    pub seqs: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Blocks, if there shall be fewer than the executor has.
    pub blocks: u32,
    pub caching: bool,
}

impl How {
    pub const PLAIN: Self = Self {
        seqs: 64,
        tokens: 4096,
        blocks: u32::MAX,
        caching: false,
    };
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub top: Vec<Vec<(u32, f32)>>,
    pub cached: u32,
    pub reason: Option<FinishReason>,
}

/// Answers in the order of requests.
pub fn serve(
    executor: &mut CudaExecutor,
    how: How,
    requests: Vec<Request>,
) -> (Vec<Answer>, Counters) {
    serve_and_abort(executor, how, requests, &[])
}

/// The same; requests of these numbers are aborted when they have drawn a few ids.
pub fn serve_and_abort(
    executor: &mut CudaExecutor,
    how: How,
    requests: Vec<Request>,
    aborted: &[usize],
) -> (Vec<Answer>, Counters) {
    let limits = executor.limits();
    let limits = Limits {
        kv_blocks: limits.kv_blocks.min(how.blocks),
        ..limits
    };
    let config = Config {
        max_num_seqs: how.seqs,
        max_num_batched_tokens: how.tokens,
        max_model_len: (POSITIONS as usize).min(limits.kv_blocks as usize * 16),
        prefix_caching: how.caching,
        weight_version: 0,
    };
    let mut scheduler = Scheduler::new(config, limits).unwrap();
    let mut answers = vec![Answer::default(); requests.len()];
    let mut of: HashMap<RequestId, usize> = HashMap::new();
    for (index, request) in requests.into_iter().enumerate() {
        of.insert(scheduler.add(request).unwrap(), index);
    }
    while !scheduler.is_idle() {
        while let Some(step) = scheduler.decide() {
            executor.submit(step).unwrap();
        }
        let done = executor.poll(Duration::from_secs(60)).unwrap();
        for (id, event) in scheduler.apply(done.expect("a step did not end")).unwrap() {
            let answer = &mut answers[of[&id]];
            match event {
                Event::Token {
                    id, logprob, top, ..
                } => {
                    answer.ids.push(id);
                    answer.logprobs.push(logprob);
                    answer.top.push(top);
                }
                Event::Finished {
                    reason,
                    cached_tokens,
                } => (answer.reason, answer.cached) = (Some(reason), cached_tokens),
            }
            if aborted.contains(&of[&id]) && answer.ids.len() == 5 {
                scheduler.abort(id);
            }
        }
    }
    let counters = scheduler.counters();
    assert_eq!(counters.kv_blocks_used, 0, "blocks are lost");
    (answers, counters)
}

pub fn request(prompt: &[u32], tokens: u32, sampling: Sampling) -> Request {
    Request {
        sampling,
        ..Request::new(prompt.to_vec(), tokens)
    }
}

pub fn greedy(prompt: &[u32], tokens: u32) -> Request {
    let sampling = Sampling {
        logprobs: Some(20),
        ..Sampling::default()
    };
    request(prompt, tokens, sampling)
}
