//! The executor on a GPU: every buffer static, decode steps as recorded graphs, two steps in flight.
//!
//! - *A step* is one upload, one graph (or its launches one by one), one download and an event. Ids that the step before
//!   draws are read where the sampler left them, so a step is launched before the host has seen the one before.
//! - *Graphs* are recorded once a size of batch, with and without adapters, down to the sampler; a smaller batch is filled
//!   up with rows that do nothing. Steps with chunks of prompts are launched one by one.
//! - *Memory* is taken once, at the start: weights, what the largest step writes, places for adapters, and of what
//!   `--gpu-memory-utilization` leaves after such a step has run, keys and values.
//! - *A device that fails* fails every later call with the same reason.

mod adapter_layout;
mod adapters;
mod forward;
mod inputs;
mod memory;
mod room;
mod weights;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::error::Error;
use std::time::{Duration, Instant};

use espalier_kernels::cuda::{
    BLOCK_TOKENS, Buffer, CudaError, Device, Graph, Options, Pinned, Readback,
};
use espalier_qwen3::{CheckpointError, Config, TensorSource};

pub use memory::{MemoryUse, Shortage};

use super::{
    AdapterSlot, BlockId, Done, Drawn, Executor, ExecutorError, Input, Limits, Row, Sampling,
    SeqId, Step, Ticket,
};
pub use adapter_layout::{AdapterLayout, LaidOut};
use adapters::Adapters;
use forward::{Forward, Probe};
use inputs::{Bounds, Due, Inputs, Layout, Results, Shape, Sorted, write_idle};
use memory::{GRAPHS_BYTES, Have};
use room::{Cache, Largest, Room};
use weights::Weights;

/// Sizes of batches that graphs are recorded for. Above them a decode step is launched op by op, and takes long enough
/// for that.
const BATCHES: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// Steps that may be in flight: one runs while the next is prepared.
const IN_FLIGHT: usize = 2;

/// Words that the lists of varying length have at most before a step brings them in memory of their own.
const TAIL_WORDS_MAX: usize = 4 << 20;

/// How long a result is waited for without giving up the processor for more than a moment.
const EAGER_WAIT: Duration = Duration::from_millis(2);

/// How often a result is looked for after that.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// What the executor keeps to. Names are those of the options that set them.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Which device, and where its libraries are.
    pub device: Options,
    /// Tokens of prompt and answer together.
    pub max_model_len: u32,
    /// Rows of a step.
    pub max_num_seqs: u32,
    /// Tokens of a step.
    pub max_num_batched_tokens: u32,
    /// Share of the device's memory that may be used, by others too. In (0, 1].
    pub gpu_memory_utilization: f64,
    /// Adapters that are loaded at once. There is a place more, so that a new version can be loaded beside the one whose
    /// name it takes.
    pub max_loras: u32,
    /// Rank of an adapter.
    pub max_lora_rank: u32,
    /// So many KV blocks, instead of what the memory has room for.
    pub kv_blocks: Option<u32>,
    /// Whether decode steps are recorded.
    pub graphs: bool,
}

impl CudaOptions {
    /// The defaults, for sequences of at most so many tokens.
    #[must_use]
    pub fn new(max_model_len: u32) -> Self {
        Self {
            device: Options::default(),
            max_model_len,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            gpu_memory_utilization: 0.9,
            max_loras: 8,
            max_lora_rank: 64,
            kv_blocks: None,
            graphs: true,
        }
    }

    /// How adapters lie in their places.
    fn adapter_layout(&self, config: &Config) -> AdapterLayout {
        AdapterLayout::new(config, self.max_lora_rank.next_multiple_of(8) as usize)
    }

    /// Places for versions of adapters: none where none are wanted.
    fn adapter_places(&self) -> u32 {
        match self.max_loras {
            0 => 0,
            max => max.saturating_add(1),
        }
    }
}

/// Why the executor cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no device that can run it.
    #[error("the GPU cannot run the model")]
    Device(#[from] CudaError),
    /// The weights are refused.
    #[error("the weights cannot be loaded")]
    Weights(#[from] CheckpointError),
    /// Too little memory.
    #[error("the model does not fit into the GPU's memory")]
    Memory(#[from] Shortage),
    /// An option that cannot be kept.
    #[error("`{option}` {rule}, got {got}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What it must be.
        rule: String,
        /// What it is.
        got: u32,
    },
    /// The first step, which tells how much memory steps take, failed.
    #[error("the largest step does not run")]
    FirstStep(#[source] ExecutorError),
}

/// Memory of the host for a step in flight.
struct Stage {
    inputs: Pinned<u32>,
    results: Readback<u32>,
}

/// A step in flight.
struct Flight {
    ticket: Ticket,
    stage: usize,
    due: Vec<Due>,
    results: Results,
}

/// Runs a model on a GPU.
pub struct CudaExecutor {
    limits: Limits,
    bounds: Bounds,
    memory: MemoryUse,
    adapter_layout: AdapterLayout,
    /// By whether there are adapters, and by size. Before the buffers that they name.
    graphs: BTreeMap<(bool, usize), Graph>,
    use_graphs: bool,
    forward: Forward,
    arena: Buffer<u32>,
    results: Buffer<u32>,
    stages: [Stage; IN_FLIGHT],
    flights: VecDeque<Flight>,
    tickets: u64,
    /// What the step before draws: places.
    drawn: HashMap<SeqId, u32>,
    failed: Option<String>,
    /// Last, so that all that is on it goes first.
    device: Device,
}

/// An error with all that caused it, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn device_error(error: &CudaError) -> ExecutorError {
    ExecutorError::Device(chain(error))
}

impl From<CudaError> for ExecutorError {
    fn from(error: CudaError) -> Self {
        device_error(&error)
    }
}

/// The size that a decode step of so many rows is filled up to.
fn batch_of(rows: usize) -> usize {
    let recorded = BATCHES.into_iter().find(|batch| *batch >= rows);
    recorded.unwrap_or_else(|| rows.next_multiple_of(64))
}

/// The tokens that a step is filled up to: products are prepared once a size, so there must not be too many sizes.
fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of(if tokens <= 256 { 16 } else { 64 })
}

fn check(options: &CudaOptions) -> Result<(), LoadError> {
    let refuse = |option, rule: String, got| Err(LoadError::Option { option, rule, got });
    let rows = options.max_num_seqs;
    for (option, got) in [
        ("max_num_seqs", rows),
        ("max_model_len", options.max_model_len),
    ] {
        if got == 0 {
            return refuse(option, "must be at least 1".to_owned(), got);
        }
    }
    let tokens = options.max_num_batched_tokens;
    if tokens < rows {
        let rule = format!("must be at least `max_num_seqs` ({rows})");
        return refuse("max_num_batched_tokens", rule, tokens);
    }
    Ok(())
}

/// The largest of everything.
fn largest(device: &Device, config: &Config, options: &CudaOptions) -> Largest {
    let table_blocks = (options.max_model_len as usize).div_ceil(BLOCK_TOKENS);
    let rows = batch_of(options.max_num_seqs as usize);
    let splits = (1..=rows).map(|rows| rows * room::splits(device, config, rows, table_blocks));
    Largest {
        tokens: padded(options.max_num_batched_tokens as usize).max(rows),
        rows,
        splits: splits.max().unwrap_or(1),
        table_blocks,
    }
}

/// Words of the inputs of the largest step, its tail included.
fn arena_words(largest: &Largest, mask_words: usize) -> usize {
    let shape = Shape {
        tokens: largest.tokens,
        rows: largest.rows,
        decodes: largest.rows,
        tiles: largest.tokens / 64 + largest.rows,
        draws: largest.rows,
    };
    let tail = largest.rows * (largest.table_blocks + mask_words);
    Layout::new(shape).tail + (tail + (1 << 18)).min(TAIL_WORDS_MAX)
}

impl CudaExecutor {
    /// Opens the device, uploads the weights, runs the largest step, takes memory for keys and values, records graphs.
    ///
    /// # Errors
    /// A library or the device is missing, the weights do not fit the configuration, or the memory does not do: the error
    /// says what would.
    pub fn load(
        config: &Config,
        source: &dyn TensorSource,
        options: &CudaOptions,
    ) -> Result<Self, LoadError> {
        check(options)?;
        let device = Device::open(&options.device)?;
        let largest = largest(&device, config, options);
        let mask_words = config.vocab_size.div_ceil(32);
        let words = arena_words(&largest, mask_words);
        let (free, total) = device.memory()?;
        let share = options.gpu_memory_utilization;
        let mut memory = MemoryUse::least(config, options, &largest, words);
        if let Some(blocks) = options.kv_blocks {
            memory.blocks = blocks as usize;
        }
        memory.fit(Have { total, free, share })?;
        let adapter_layout = options.adapter_layout(config);
        let forward = Forward {
            weights: Weights::load(&device, config, source)?,
            room: Room::new(&device, config, &largest)?,
            // Of one block, until it is known how many there is room for.
            caches: Cache::all(&device, config, 1)?,
            adapters: match options.adapter_places() {
                0 => None,
                places => Some(Adapters::new(
                    &device,
                    &adapter_layout,
                    places as usize,
                    largest.tokens,
                )?),
            },
            turns: device.copied(&config.turns(largest.table_blocks * BLOCK_TOKENS))?,
            drawn: device.zeroed(largest.rows)?,
            table_blocks: largest.table_blocks,
            config: config.clone(),
        };
        let results = Results::new(largest.rows).end;
        let stage = || -> Result<Stage, CudaError> {
            Ok(Stage {
                inputs: device.pinned(words)?,
                results: device.readback(results)?,
            })
        };
        let mut executor = Self {
            limits: Limits {
                kv_blocks: 1,
                tokens: options.max_num_batched_tokens,
                rows: options.max_num_seqs,
                vocab: config.real_vocab_size as u32,
                steps_in_flight: IN_FLIGHT as u32,
                adapters: options.adapter_places(),
            },
            bounds: Bounds {
                rows: options.max_num_seqs as usize,
                tokens: options.max_num_batched_tokens as usize,
                positions: largest.table_blocks * BLOCK_TOKENS,
                kv_blocks: 1,
                mask_words,
            },
            memory,
            adapter_layout,
            graphs: BTreeMap::new(),
            use_graphs: options.graphs,
            forward,
            arena: device.zeroed(words)?,
            results: device.zeroed(results)?,
            stages: [stage()?, stage()?],
            flights: VecDeque::new(),
            tickets: 0,
            drawn: HashMap::new(),
            failed: None,
            device,
        };
        executor.run_largest().map_err(LoadError::FirstStep)?;
        executor.take_cache(options)?;
        if options.graphs {
            executor.record()?;
        }
        Ok(executor)
    }

    /// What its kernels are compiled for, such as `sm_90a`.
    #[must_use]
    pub fn kernels(&self) -> &str {
        self.device.architecture()
    }

    /// How adapters are to be laid out for [`Executor::load_adapter`].
    #[must_use]
    pub fn adapter_layout(&self) -> AdapterLayout {
        self.adapter_layout.clone()
    }

    /// Where the device's memory went.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.memory
    }

    /// Whether decode steps are replayed from graphs, where these were recorded, or launched op by op: for comparisons.
    pub fn use_graphs(&mut self, on: bool) {
        self.use_graphs = on;
    }

    /// Runs a step alone, op by op, and gives the milliseconds of each op in their order: for measurements. The device is
    /// kept busy while the host launches, so that the times are the device's.
    ///
    /// # Errors
    /// As for [`Executor::submit`].
    pub fn time_ops(&mut self, step: &Step) -> Result<Vec<(&'static str, f32)>, ExecutorError> {
        let sorted = Sorted::new(step, &self.bounds)?;
        let layout = Layout::new(shape_of(&sorted));
        let inputs = self.upload(&sorted, &layout)?;
        self.device.synchronize()?;
        let busy = 100;
        self.forward
            .keep_busy(&self.device, busy, self.bounds.rows)?;
        let mut probe = Probe::on(&self.device)?;
        self.forward.launch(
            &self.device,
            &inputs,
            &self.results,
            sorted.is_adapted,
            &mut probe,
        )?;
        self.device.synchronize()?;
        Ok(probe.times()?)
    }

    /// Runs a step that takes as much memory as any.
    fn run_largest(&mut self) -> Result<(), ExecutorError> {
        let step = largest_step(&self.limits, self.bounds.positions);
        let wait = Duration::from_secs(60);
        self.submit(step)?;
        let done = self.poll(wait)?;
        done.map(drop)
            .ok_or_else(|| ExecutorError::Device(format!("it did not end within {wait:?}")))
    }

    /// Takes the memory that is left for keys and values.
    fn take_cache(&mut self, options: &CudaOptions) -> Result<(), LoadError> {
        self.device.synchronize()?;
        let (free, total) = self.device.memory()?;
        let graphs = if options.graphs { GRAPHS_BYTES } else { 0 };
        let used = total - free.min(total) + graphs;
        let share = options.gpu_memory_utilization;
        let left = ((share * total as f64) as usize).saturating_sub(used);
        let blocks = match options.kv_blocks {
            Some(blocks) => blocks as usize,
            None => left / self.memory.block,
        };
        if options.kv_blocks.is_none() && blocks < self.memory.blocks {
            return Err(LoadError::Memory(
                self.memory.short_of(Have { total, free, share }, left),
            ));
        }
        let blocks = blocks.min(u32::MAX as usize);
        self.forward.caches = Vec::new();
        self.forward.caches = Cache::all(&self.device, &self.forward.config, blocks)?;
        self.memory.blocks = blocks;
        self.bounds.kv_blocks = blocks;
        self.limits.kv_blocks = blocks as u32;
        self.drawn.clear();
        Ok(())
    }

    /// Records decode steps of every size that may come.
    fn record(&mut self) -> Result<(), LoadError> {
        let most = batch_of(self.bounds.rows);
        for batch in BATCHES.into_iter().filter(|batch| *batch <= most) {
            let layout = Layout::new(Shape::decode(batch));
            let stage = &mut self.stages[0];
            write_idle(stage.inputs.values()?, &layout);
            self.device
                .upload(&mut self.arena, 0, &stage.inputs, layout.tail)?;
            let inputs = Inputs::new(&self.arena, &layout, None)?;
            for is_adapted in [false, true] {
                if is_adapted && self.forward.adapters.is_none() {
                    continue;
                }
                let (forward, results) = (&mut self.forward, &self.results);
                let graph = self.device.record(|device| {
                    forward.launch(device, &inputs, results, is_adapted, &mut Probe::off())
                })?;
                self.graphs.insert((is_adapted, batch), graph);
            }
        }
        Ok(())
    }

    /// Brings a step's lists to the device.
    fn upload(&mut self, sorted: &Sorted<'_>, layout: &Layout) -> Result<Inputs, ExecutorError> {
        let stage = &mut self.stages[self.tickets as usize % IN_FLIGHT];
        let words = stage.inputs.values()?;
        let none = HashMap::new();
        let places = self.forward.adapters.as_ref().map(Adapters::places);
        let tail = sorted.write(
            words,
            layout,
            &self.bounds,
            &self.drawn,
            places.unwrap_or(&none),
        )?;
        let end = layout.tail + tail.len();
        let own = if end <= words.len() {
            words[layout.tail..end].copy_from_slice(&tail);
            self.device.upload(&mut self.arena, 0, &stage.inputs, end)?;
            None
        } else {
            self.device
                .upload(&mut self.arena, 0, &stage.inputs, layout.tail)?;
            Some(self.device.copied(&tail)?)
        };
        Ok(Inputs::new(&self.arena, layout, own)?)
    }

    fn begin(&mut self, step: &Step) -> Result<Flight, ExecutorError> {
        let sorted = Sorted::new(step, &self.bounds)?;
        let layout = Layout::new(shape_of(&sorted));
        let inputs = self.upload(&sorted, &layout)?;
        let shape = layout.shape;
        let graph = self.graphs.get(&(sorted.is_adapted, shape.tokens));
        // A tail of its own is not where the graph looks.
        let in_arena = inputs.tail.len() == self.arena.len() - layout.tail;
        match graph.filter(|_| self.use_graphs && sorted.is_decode() && in_arena) {
            Some(graph) => graph.replay()?,
            None => self.forward.launch(
                &self.device,
                &inputs,
                &self.results,
                sorted.is_adapted,
                &mut Probe::off(),
            )?,
        }
        let stage = self.tickets as usize % IN_FLIGHT;
        let results = Results::new(shape.draws);
        let words = results.words(sorted.due.iter().any(|due| due.top > 0));
        self.device
            .download(&mut self.stages[stage].results, &self.results, words)?;
        let drawn = sorted.due.iter().map(|due| (due.seq, due.place as u32));
        self.drawn = drawn.collect();
        Ok(Flight {
            ticket: Ticket(self.tickets),
            stage,
            due: sorted.due,
            results,
        })
    }

    /// Whether the oldest step has ended, at the latest after `wait`.
    fn has_ended(&self, stage: usize, wait: Duration) -> Result<bool, CudaError> {
        let began = Instant::now();
        while !self.stages[stage].results.is_ready()? {
            let waited = began.elapsed();
            if waited >= wait {
                return Ok(false);
            }
            if waited < EAGER_WAIT {
                std::thread::yield_now();
            } else {
                std::thread::park_timeout(LOOK_EVERY);
            }
        }
        Ok(true)
    }

    fn take(&mut self, wait: Duration) -> Result<Option<Done>, CudaError> {
        let Some(stage) = self.flights.front().map(|flight| flight.stage) else {
            return Ok(None);
        };
        if !self.has_ended(stage, wait)? {
            return Ok(None);
        }
        let words = self.stages[stage].results.wait()?;
        let done = self.flights.pop_front().map(|flight| Done {
            ticket: flight.ticket,
            drawn: flight
                .due
                .iter()
                .map(|due| drawn_of(words, &flight.results, due))
                .collect(),
        });
        Ok(done)
    }

    fn fail(&mut self, error: ExecutorError) -> ExecutorError {
        if let ExecutorError::Device(reason) = &error {
            self.failed = Some(reason.clone());
            self.flights.clear();
        }
        error
    }

    fn working(&self) -> Result<(), ExecutorError> {
        match &self.failed {
            Some(reason) => Err(ExecutorError::Device(reason.clone())),
            None => Ok(()),
        }
    }
}

/// The shape that a step is filled up to.
fn shape_of(sorted: &Sorted<'_>) -> Shape {
    if sorted.is_decode() {
        Shape::decode(batch_of(sorted.singles))
    } else {
        sorted.shape(padded(sorted.tokens))
    }
}

/// As many rows and tokens as there may be, all in block 0.
fn largest_step(limits: &Limits, positions: usize) -> Step {
    let row = |seq: u32, tokens: usize| Row {
        seq: SeqId(u64::from(seq)),
        input: Input::Ids(vec![0; tokens]),
        start: 0,
        blocks: vec![BlockId(0); tokens.div_ceil(BLOCK_TOKENS)],
        adapter: None,
        sample: Some(Sampling::default()),
    };
    let mut left = (limits.tokens - limits.rows) as usize;
    let rows = (0..limits.rows).map(|seq| {
        let more = left.min(positions - 1);
        left -= more;
        row(seq, 1 + more)
    });
    Step {
        rows: rows.collect(),
    }
}

/// An id that was due, from what a step left.
fn drawn_of(words: &[u32], results: &Results, due: &Due) -> Drawn {
    let id = words[due.place];
    if id == espalier_kernels::cuda::NONE {
        // No id can be drawn: this sequence alone ends with an error.
        return Drawn {
            seq: due.seq,
            id: 0,
            logprob: f32::NAN,
            top: Vec::new(),
        };
    }
    let first = due.place * espalier_kernels::cuda::TOP_MAX;
    let top = (first..first + due.top).map(|i| {
        let (id, logprob) = (words[results.top_ids + i], words[results.top_logprobs + i]);
        (id, f32::from_bits(logprob))
    });
    Drawn {
        seq: due.seq,
        id,
        logprob: f32::from_bits(words[results.logprobs + due.place]),
        // Fewer ids than were asked for: the rest is none.
        top: top
            .take_while(|(id, _)| *id != espalier_kernels::cuda::NONE)
            .collect(),
    }
}

impl Executor for CudaExecutor {
    type Adapter = LaidOut;

    fn limits(&self) -> Limits {
        self.limits
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, ExecutorError> {
        self.working()?;
        if self.flights.len() == IN_FLIGHT {
            let reason = format!("{IN_FLIGHT} steps are in flight already");
            return Err(self.fail(ExecutorError::Device(reason)));
        }
        let flight = self.begin(&step).map_err(|error| self.fail(error))?;
        let ticket = flight.ticket;
        self.flights.push_back(flight);
        self.tickets += 1;
        Ok(ticket)
    }

    fn poll(&mut self, wait: Duration) -> Result<Option<Done>, ExecutorError> {
        self.working()?;
        self.take(wait)
            .map_err(|error| self.fail(device_error(&error)))
    }

    fn load_adapter(&mut self, slot: AdapterSlot, adapter: LaidOut) -> Result<(), ExecutorError> {
        self.working()?;
        let Some(adapters) = &mut self.forward.adapters else {
            let reason = "there are no places for adapters: `--max-loras` is 0";
            return Err(ExecutorError::Adapter(reason.to_owned()));
        };
        adapters
            .load(&self.device, slot, &adapter)
            .map_err(|error| self.fail(error))
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), ExecutorError> {
        self.working()?;
        if let Some(adapters) = &mut self.forward.adapters {
            adapters.forget(slot);
        }
        Ok(())
    }
}
