//! A model and its adapter as one model in bf16: the same files with the same tensors in the same places.
//!
//! A matrix that is adapted becomes `W + scale · (B·A)`, computed in f32 and rounded once; what is not adapted is copied
//! byte for byte where it is bf16, and rounded once where it is not. Files are written one after the other and matrices
//! in blocks of rows, so that the largest model takes little memory: the adapter and some megabytes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use espalier_kernels::cpu::{Form, PackedLinear, Pool, RowSource, linear};
use half::bf16;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, CheckpointError, ShardFile, StoredTensor};
use crate::config::{Config, ConfigError};
use crate::lora::{Factors, LoraError, LoraFile, tensor_name};
use crate::tensors::{Gated, Matrix, MlpTensors};

/// Elements that are computed at once: 16 MiB of products.
const BLOCK_ELEMENTS: usize = 4 << 20;
/// Bytes that are copied at once.
const COPY_BYTES: usize = 8 << 20;
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

/// Why a model and an adapter do not become one.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The adapter is refused, or does not fit the model.
    #[error("the adapter")]
    Adapter(#[from] LoraError),
    /// The model's weights are refused.
    #[error("the base model")]
    Base(#[from] CheckpointError),
    /// The model's configuration is refused.
    #[error("the base model")]
    Config(#[from] ConfigError),
    /// A matrix is not as the configuration says.
    #[error("tensor {name} of the base model must be {expected:?}, is {found:?}")]
    Shape {
        /// Which.
        name: String,
        /// By the configuration.
        expected: [usize; 2],
        /// In the file; none: it is in no file.
        found: Option<Vec<usize>>,
    },
    /// A file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that is not the JSON that it should be.
    #[error("{} is not the JSON that it should be", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Whoever watched wanted no more.
    #[error("stopped before it was whole")]
    Stopped,
}

/// What is merged, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Merge<'a> {
    /// Folder of the model.
    pub base: &'a Path,
    /// Folder of the adapter.
    pub adapter: &'a Path,
    /// Folder that the files are written to; it is there, and empty.
    pub to: &'a Path,
    /// Small files that are copied where the base has them, such as the tokenizer's.
    pub companions: &'a [&'a str],
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Names of the files that were written.
    pub files: Vec<String>,
    /// Matrices that were changed.
    pub adapted: usize,
    /// Bytes of all weights.
    pub bytes: u64,
}

/// A matrix that an adapter can change.
struct Module {
    name: String,
    outputs: usize,
    inputs: usize,
}

/// The weights of the merged model on their way.
struct Merging<'a> {
    adapter: LoraFile,
    /// By the name of the base's tensor.
    adapted: HashMap<String, Module>,
    pool: &'a Pool,
    watch: &'a dyn Fn(u64, u64) -> ControlFlow<()>,
    done: u64,
    total: u64,
}

impl Merge<'_> {
    /// Computes and writes all of it. `watch` is told, every some megabytes, how many bytes of weights are written and how
    /// many there are, and can end the work.
    ///
    /// # Errors
    /// Either side is broken, or they do not fit: then nothing is written. A file cannot be written.
    pub fn run(
        &self,
        pool: &Pool,
        watch: &dyn Fn(u64, u64) -> ControlFlow<()>,
    ) -> Result<Merged, MergeError> {
        let config = self.read(CONFIG)?;
        let base = Checkpoint::open(self.base)?;
        let adapter = LoraFile::read(self.adapter)?;
        let adapted = fitting(&Config::parse(&config)?, &base, &adapter)?;
        let files = base.files();
        for tensor in files.iter().flat_map(|file| &file.tensors) {
            tensor.rows()?;
        }
        let total = files
            .iter()
            .flat_map(|file| &file.tensors)
            .map(bytes_of)
            .sum();
        let count = adapted.len();
        let mut merging = Merging {
            adapter,
            adapted,
            pool,
            watch,
            done: 0,
            total,
        };
        let mut written = Vec::new();
        for file in &files {
            merging.write_shard(file, &self.to.join(file.name))?;
            written.push(file.name.to_owned());
        }
        self.write_texts(&config, total, &mut written)?;
        Ok(Merged {
            files: written,
            adapted: count,
            bytes: total,
        })
    }

    fn read(&self, file: &str) -> Result<String, MergeError> {
        let path = self.base.join(file);
        std::fs::read_to_string(&path).map_err(|source| MergeError::File { path, source })
    }

    /// Everything but weights.
    fn write_texts(
        &self,
        config: &str,
        bytes: u64,
        written: &mut Vec<String>,
    ) -> Result<(), MergeError> {
        let mut write = |name: &str, content: &[u8]| {
            let path = self.to.join(name);
            written.push(name.to_owned());
            std::fs::write(&path, content).map_err(|source| MergeError::File { path, source })
        };
        let says_bf16 = |config: &mut Map<String, Value>| {
            for key in ["dtype", "torch_dtype"] {
                if let Some(dtype) = config.get_mut(key) {
                    *dtype = "bfloat16".into();
                }
            }
        };
        write(
            CONFIG,
            edited(config, &self.base.join(CONFIG), says_bf16)?.as_bytes(),
        )?;
        if self.base.join(INDEX).exists() {
            let says_bytes = |index: &mut Map<String, Value>| {
                let size = index
                    .get_mut("metadata")
                    .and_then(|meta| meta.get_mut("total_size"));
                if let Some(size) = size {
                    *size = bytes.into();
                }
            };
            let index = self.read(INDEX)?;
            write(
                INDEX,
                edited(&index, &self.base.join(INDEX), says_bytes)?.as_bytes(),
            )?;
        }
        for name in self.companions {
            let path = self.base.join(name);
            match std::fs::read(&path) {
                Ok(content) => write(name, &content)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(MergeError::File { path, source }),
            }
        }
        Ok(())
    }
}

/// A JSON object with a change, or the same bytes where that changes nothing.
fn edited(
    text: &str,
    path: &Path,
    edit: impl FnOnce(&mut Map<String, Value>),
) -> Result<String, MergeError> {
    let json = |source| MergeError::Json {
        path: path.to_owned(),
        source,
    };
    let before: Map<String, Value> = serde_json::from_str(text).map_err(json)?;
    let mut after = before.clone();
    edit(&mut after);
    match after == before {
        true => Ok(text.to_owned()),
        false => Ok(format!("{:#}\n", Value::Object(after))),
    }
}

/// What the adapter changes, by the name of the base's tensor: all of it must fit.
fn fitting(
    config: &Config,
    base: &Checkpoint,
    adapter: &LoraFile,
) -> Result<HashMap<String, Module>, MergeError> {
    let mut adapted = HashMap::new();
    let mut left: Vec<&str> = adapter.names().collect();
    if left.is_empty() {
        return Err(LoraError::Empty.into());
    }
    left.sort_unstable();
    for module in modules(config) {
        let Some(_) = adapter.factors(&module.name, module.outputs, module.inputs)? else {
            continue;
        };
        let name = format!("{}.weight", module.name);
        let expected = [module.outputs, module.inputs];
        let found = base.shape(&name);
        if found != Some(&expected[..]) {
            let found = found.map(<[usize]>::to_vec);
            return Err(MergeError::Shape {
                name,
                expected,
                found,
            });
        }
        for which in ["lora_A", "lora_B"] {
            if let Ok(at) = left.binary_search(&tensor_name(&module.name, which).as_str()) {
                left.remove(at);
            }
        }
        adapted.insert(name, module);
    }
    match left.first() {
        Some(name) => Err(LoraError::Unknown((*name).to_owned()).into()),
        None => Ok(adapted),
    }
}

/// The projections of all layers, those of experts among them.
fn modules(config: &Config) -> Vec<Module> {
    let mut modules = Vec::new();
    for layer in 0..config.layers {
        let tensors = config.layer_tensors(layer);
        let mut add = |matrix: &Matrix| {
            modules.extend(matrix.parts.iter().map(|(name, outputs)| Module {
                name: name.trim_end_matches(".weight").to_owned(),
                outputs: *outputs,
                inputs: matrix.inputs,
            }));
        };
        add(&tensors.qkv);
        add(&tensors.o);
        let mut add_gated = |gated: &Gated| {
            add(&gated.gate_up);
            add(&gated.down);
        };
        match &tensors.mlp {
            MlpTensors::Dense(gated) => add_gated(gated),
            MlpTensors::Sparse { experts, .. } => experts.iter().for_each(add_gated),
        }
    }
    modules
}

fn count_of(tensor: &StoredTensor<'_>) -> usize {
    tensor.shape.iter().product()
}

/// Bytes of it in bf16.
fn bytes_of(tensor: &StoredTensor<'_>) -> u64 {
    count_of(tensor) as u64 * 2
}

impl Merging<'_> {
    fn write_shard(&mut self, file: &ShardFile<'_>, path: &Path) -> Result<(), MergeError> {
        let at_file = |source| MergeError::File {
            path: path.to_owned(),
            source,
        };
        let header = header(file).map_err(|source| MergeError::Json {
            path: path.to_owned(),
            source,
        })?;
        let mut out = File::create(path).map_err(at_file)?;
        let begun = out
            .write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(&header));
        begun.map_err(at_file)?;
        for tensor in &file.tensors {
            let module = self.adapted.remove(&tensor.name);
            let factors = match &module {
                Some(m) => self.adapter.factors(&m.name, m.outputs, m.inputs)?,
                None => None,
            };
            let mut write = |bytes: &[u8]| {
                out.write_all(bytes).map_err(at_file)?;
                self.done += bytes.len() as u64;
                match (self.watch)(self.done, self.total) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(MergeError::Stopped),
                }
            };
            match factors {
                Some(factors) => merge(self.pool, tensor, &factors, &mut write)?,
                None if tensor.dtype == Dtype::BF16 => {
                    tensor.bytes.chunks(COPY_BYTES).try_for_each(&mut write)?;
                }
                None => round(tensor, &mut write)?,
            }
        }
        out.sync_all().map_err(at_file)
    }
}

/// The header of the file with all tensors in bf16; the same bytes where they are.
fn header(file: &ShardFile<'_>) -> Result<Vec<u8>, serde_json::Error> {
    if file
        .tensors
        .iter()
        .all(|tensor| tensor.dtype == Dtype::BF16)
    {
        return Ok(file.header.to_vec());
    }
    let before: Map<String, Value> = serde_json::from_slice(file.header)?;
    let mut after = Map::new();
    if let Some(metadata) = before.get("__metadata__") {
        after.insert("__metadata__".to_owned(), metadata.clone());
    }
    let mut start = 0;
    for tensor in &file.tensors {
        let end = start + bytes_of(tensor);
        let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
        after.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = serde_json::to_vec(&after)?;
    // Data begins at a multiple of 8.
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}

/// Writes a tensor that is not adapted and not in bf16.
fn round(
    tensor: &StoredTensor<'_>,
    write: &mut dyn FnMut(&[u8]) -> Result<(), MergeError>,
) -> Result<(), MergeError> {
    let (rows, count) = (tensor.rows()?, count_of(tensor));
    let mut rounded = vec![bf16::ZERO; count.min(BLOCK_ELEMENTS)];
    for start in (0..count).step_by(BLOCK_ELEMENTS) {
        let rounded = &mut rounded[..BLOCK_ELEMENTS.min(count - start)];
        rows.bf16_into(start, rounded);
        let bytes: Vec<u8> = rounded.iter().flat_map(|x| x.to_le_bytes()).collect();
        write(&bytes)?;
    }
    Ok(())
}

/// Writes `W + scale · (B·A)`, some rows at a time.
fn merge(
    pool: &Pool,
    tensor: &StoredTensor<'_>,
    factors: &Factors,
    write: &mut dyn FnMut(&[u8]) -> Result<(), MergeError>,
) -> Result<(), MergeError> {
    let [outputs, inputs] = tensor.shape[..] else {
        return Ok(());
    };
    let (rank, weights) = (factors.rank, tensor.rows()?);
    let mut transposed = vec![0.0; inputs * rank];
    for (r, row) in factors.a.chunks_exact(inputs).enumerate() {
        for (i, value) in row.iter().enumerate() {
            transposed[i * rank + r] = *value;
        }
    }
    let packed = PackedLinear::pack(pool, Form::F32, rank, &[RowSource::F32(&transposed)]);
    let packed = packed.map_err(|source| CheckpointError::Memory {
        what: tensor.name.clone(),
        source,
    })?;
    let rows = (BLOCK_ELEMENTS / inputs).clamp(1, outputs.max(1));
    let mut product = vec![0.0; rows * inputs];
    let mut bytes = vec![0; rows * inputs * 2];
    for start in (0..outputs).step_by(rows) {
        let rows = rows.min(outputs - start);
        let product = &mut product[..rows * inputs];
        let bytes = &mut bytes[..rows * inputs * 2];
        linear(
            pool,
            &factors.b[start * rank..][..rows * rank],
            &packed,
            product,
        );
        add(pool, weights, start, inputs, factors.scale, product, bytes);
        write(bytes)?;
    }
    Ok(())
}

/// `W + scale · product` of the rows from `start` on, in bf16: each thread has rows of its own.
fn add(
    pool: &Pool,
    weights: RowSource<'_>,
    start: usize,
    inputs: usize,
    scale: f32,
    product: &[f32],
    bytes: &mut [u8],
) {
    let rows = (product.len() / inputs).div_ceil(pool.threads()).max(1);
    let parts: Vec<_> = product
        .chunks(rows * inputs)
        .zip(bytes.chunks_mut(rows * inputs * 2))
        .map(Mutex::new)
        .collect();
    pool.split(parts.len(), &|range| {
        let mut row_of_base = vec![0.0; inputs];
        for part in range {
            let Ok(mut of_thread) = parts[part].lock() else {
                continue;
            };
            let (product, bytes) = &mut *of_thread;
            let both = product.chunks(inputs).zip(bytes.chunks_mut(inputs * 2));
            for (row, (product, bytes)) in both.enumerate() {
                weights.row_into(start + part * rows + row, &mut row_of_base);
                let (pairs, _) = bytes.as_chunks_mut::<2>();
                for ((pair, w), p) in pairs.iter_mut().zip(&row_of_base).zip(product) {
                    *pair = bf16::from_f32(w + scale * p).to_le_bytes();
                }
            }
        }
    });
}
