//! The executor on the CPU: a thread of its own that runs steps one after the other with `crates/kernels`' pool.
//!
//! Adapters come and go between steps, in the order in which they were asked for. Every number depends on its own
//! sequence only, bit for bit (the numerics contract of `crates/qwen3`), so batches, chunks and cached prefixes change
//! no result.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use espalier_kernels::cpu::sampler::draw;
use espalier_kernels::cpu::{KvCache, Pool};
use espalier_qwen3::{Logits, Lora, Model, Part, Want};

use super::{
    AdapterSlot, Done, Drawn, Executor, ExecutorError, Input, Limits, Row, Sampling, SeqId, Step,
    Ticket,
};

/// Steps and adapters that were handed over and not begun: as many as may be in flight, and a few adapters.
const COMMANDS_MAX: usize = 16;

/// What the executor keeps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuConfig {
    /// KV blocks of 16 tokens. Their memory is taken as they are first written.
    pub kv_blocks: u32,
    /// Tokens of a step.
    pub tokens: u32,
    /// Rows of a step.
    pub rows: u32,
    /// 1: a sequence that ended runs no step too many. 2: the next step is there when one ends. A step takes far longer
    /// here than its preparation, so 1 is the better choice outside tests.
    pub steps_in_flight: u32,
    /// Versions of adapters that are there at once, at most.
    pub adapters: u32,
}

/// Runs a model on the CPU.
pub struct CpuExecutor {
    limits: Limits,
    commands: Option<SyncSender<Command>>,
    results: Receiver<Result<Done, ExecutorError>>,
    tickets: u64,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Step(Ticket, Step),
    Load(AdapterSlot, Box<Lora>),
    Drop(AdapterSlot),
}

impl CpuExecutor {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no room for the KV cache or no thread.
    pub fn start(model: Model, config: CpuConfig) -> io::Result<Self> {
        let limits = Limits {
            kv_blocks: config.kv_blocks,
            tokens: config.tokens,
            rows: config.rows,
            vocab: u32::try_from(model.config().real_vocab_size).map_err(io::Error::other)?,
            steps_in_flight: config.steps_in_flight,
            adapters: config.adapters,
        };
        let cache = KvCache::new(model.kv_shape(config.kv_blocks as usize))?;
        let (commands, received) = sync_channel(COMMANDS_MAX);
        let (send, results) = sync_channel(COMMANDS_MAX);
        let mut worker = Worker {
            model,
            cache,
            adapters: HashMap::new(),
            drawn: HashMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("executor-cpu".to_owned())
            .spawn(move || {
                worker.model.pool().keep_caller();
                for command in received {
                    let ended = match command {
                        Command::Step(ticket, step) => {
                            send.send(worker.run(ticket, &step)).is_err()
                        }
                        Command::Load(slot, lora) => {
                            worker.adapters.insert(slot, *lora);
                            false
                        }
                        Command::Drop(slot) => {
                            worker.adapters.remove(&slot);
                            false
                        }
                    };
                    if ended {
                        return;
                    }
                }
            })?;
        Ok(Self {
            limits,
            commands: Some(commands),
            results,
            tickets: 0,
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) -> Result<(), ExecutorError> {
        let sent = self
            .commands
            .as_ref()
            .map(|commands| commands.send(command));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(gone()),
        }
    }
}

fn gone() -> ExecutorError {
    ExecutorError::Device("the executor's thread ended".to_owned())
}

impl Executor for CpuExecutor {
    type Adapter = Box<Lora>;

    fn limits(&self) -> Limits {
        self.limits
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, ExecutorError> {
        let ticket = Ticket(self.tickets);
        self.send(Command::Step(ticket, step))?;
        self.tickets += 1;
        Ok(ticket)
    }

    fn poll(&mut self, wait: Duration) -> Result<Option<Done>, ExecutorError> {
        match self.results.recv_timeout(wait) {
            Ok(done) => done.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    fn load_adapter(&mut self, slot: AdapterSlot, adapter: Box<Lora>) -> Result<(), ExecutorError> {
        self.send(Command::Load(slot, adapter))
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), ExecutorError> {
        self.send(Command::Drop(slot))
    }
}

impl Drop for CpuExecutor {
    fn drop(&mut self) {
        self.commands = None;
        // Results that nobody reads must not hold the thread.
        while self.results.recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            // A panic was told as a device that failed.
            let _ended = thread.join();
        }
    }
}

struct Worker {
    model: Model,
    cache: KvCache,
    adapters: HashMap<AdapterSlot, Lora>,
    /// What the step before drew.
    drawn: HashMap<SeqId, u32>,
}

/// A row made ready: its ids and blocks.
struct Ready {
    ids: Vec<u32>,
    blocks: Vec<u32>,
}

/// The adapter that a row asks for, if any.
fn lora_of<'a>(
    adapters: &'a HashMap<AdapterSlot, Lora>,
    row: &Row,
) -> Result<Option<&'a Lora>, ExecutorError> {
    let Some(slot) = row.adapter else {
        return Ok(None);
    };
    let missing = || ExecutorError::Device(format!("no adapter is loaded as {slot:?}"));
    adapters.get(&slot).map(Some).ok_or_else(missing)
}

impl Worker {
    fn run(&mut self, ticket: Ticket, step: &Step) -> Result<Done, ExecutorError> {
        let ready = step
            .rows
            .iter()
            .map(|row| self.ready(row))
            .collect::<Result<Vec<_>, _>>()?;
        let mut parts = Vec::with_capacity(ready.len());
        for (row, ready) in step.rows.iter().zip(&ready) {
            parts.push(Part {
                ids: &ready.ids,
                start: row.start as usize,
                blocks: &ready.blocks,
                lora: lora_of(&self.adapters, row)?,
                want: if row.sample.is_some() {
                    Want::Last
                } else {
                    Want::Nothing
                },
            });
        }
        let logits = self.model.forward(&mut self.cache, &parts);
        let mut logits = logits.map_err(|error| ExecutorError::Device(error.to_string()))?;
        let drawn = self.draw(step, &mut logits);
        self.drawn = drawn.iter().map(|drawn| (drawn.seq, drawn.id)).collect();
        Ok(Done { ticket, drawn })
    }

    fn ready(&self, row: &Row) -> Result<Ready, ExecutorError> {
        let ids = match &row.input {
            Input::Ids(ids) => ids.clone(),
            Input::Sampled => {
                let id = self.drawn.get(&row.seq).copied();
                let missing = || {
                    ExecutorError::Device(format!("the step before drew nothing for {:?}", row.seq))
                };
                vec![id.ok_or_else(missing)?]
            }
        };
        Ok(Ready {
            ids,
            blocks: row.blocks.iter().map(|block| block.0).collect(),
        })
    }

    /// Draws for all rows that want it, shared out to the pool's threads.
    fn draw(&self, step: &Step, logits: &mut Logits) -> Vec<Drawn> {
        let pool = self.model.pool();
        let wanted = step
            .rows
            .iter()
            .filter_map(|row| row.sample.as_ref().map(|sampling| (row.seq, sampling)));
        let jobs: Vec<Mutex<Drawing>> = wanted
            .zip(logits.iter_mut())
            .map(|((seq, sampling), logits)| Mutex::new((seq, sampling, logits, None)))
            .collect();
        pool.split(jobs.len(), &|range| {
            for job in &jobs[range] {
                let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
                let (seq, sampling, logits, drawn) = &mut *job;
                *drawn = Some(draw_row(pool, *seq, sampling, logits));
            }
        });
        jobs.into_iter()
            .filter_map(|job| job.into_inner().unwrap_or_else(PoisonError::into_inner).3)
            .collect()
    }
}

/// A row's sequence, how to draw, its logits, and what was drawn.
type Drawing<'a> = (SeqId, &'a Sampling, &'a mut [f32], Option<Drawn>);

/// Draws one id. Where none can be drawn (logits that are no numbers, a mask that allows nothing) the log-probability is
/// NaN, so that this sequence alone ends with an error.
fn draw_row(pool: &Pool, seq: SeqId, sampling: &Sampling, logits: &mut [f32]) -> Drawn {
    match draw(pool, logits, sampling) {
        Ok(drawn) => Drawn {
            seq,
            id: drawn.id,
            logprob: drawn.logprob,
            top: drawn.top,
        },
        Err(_) => Drawn {
            seq,
            id: 0,
            logprob: f32::NAN,
            top: Vec::new(),
        },
    }
}

#[cfg(test)]
mod tests;
