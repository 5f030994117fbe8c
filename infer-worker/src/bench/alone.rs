//! The executor on the CPU without anything around it: what a server's times are held against.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_kernels::cpu::{Form, Pool};
use espalier_qwen3::Model;

use super::BenchError;
use crate::executor::cpu::{CpuConfig, CpuExecutor};
use crate::executor::{BLOCK_TOKENS, BlockId, Executor, Input, Row, Sampling, SeqId, Step};

/// Tokens of an answer with its prompt.
const TOKENS_MAX: u32 = 512;
/// How long a step may take.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// A model, its threads and room for one answer.
pub struct Alone {
    executor: CpuExecutor,
}

impl Alone {
    /// Loads a checkpoint's folder, in bf16.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn load(folder: &Path, threads: usize) -> Result<Self, BenchError> {
        let model = Model::load(folder, Form::bf16(), Arc::new(Pool::new(threads)))?;
        let config = CpuConfig {
            kv_blocks: TOKENS_MAX / BLOCK_TOKENS as u32,
            tokens: TOKENS_MAX,
            rows: 1,
            steps_in_flight: 1,
            adapters: 0,
        };
        let executor = CpuExecutor::start(model, config).map_err(BenchError::Memory)?;
        Ok(Self { executor })
    }

    /// The time of a greedy answer of `tokens` tokens to a prompt of `prompt` others.
    ///
    /// # Errors
    /// When it is longer than there is room, or a step fails.
    pub fn answer(&mut self, prompt: u32, tokens: u32) -> Result<Duration, BenchError> {
        if prompt == 0 || prompt + tokens > TOKENS_MAX {
            return Err(BenchError::Answer(format!(
                "`prompt` and `tokens` must be at most {TOKENS_MAX} together, got {prompt} and {tokens}"
            )));
        }
        let began = Instant::now();
        for drawn in 0..tokens {
            let (input, start) = match drawn {
                0 => (Input::Ids((1000..1000 + prompt).collect()), 0),
                _ => (Input::Sampled, prompt + drawn - 1),
            };
            let end = start as usize + input.tokens();
            let row = Row {
                seq: SeqId(0),
                input,
                start,
                blocks: (0..end.div_ceil(BLOCK_TOKENS) as u32)
                    .map(BlockId)
                    .collect(),
                adapter: None,
                sample: Some(Sampling::default()),
            };
            self.executor.submit(Step { rows: vec![row] })?;
            let done = self.executor.poll(STEP_LIMIT)?;
            done.ok_or_else(|| BenchError::Answer("a step did not end".to_owned()))?;
        }
        Ok(began.elapsed())
    }
}
