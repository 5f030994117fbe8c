//! Tensors of a checkpoint: one `model.safetensors`, or shards with an index. Files are mapped, or were read by the caller,
//! and checked before a tensor is read.

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use espalier_kernels::buffer::MappedFile;
use espalier_kernels::cpu::RowSource;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde::Deserialize;

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Neither weights nor an index.
    #[error("{0} has neither model.safetensors nor model.safetensors.index.json")]
    NoWeights(PathBuf),
    /// The index is no index.
    #[error("{path} is not an index of shards")]
    Index {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The index names a file that is not there, or a file outside of the folder.
    #[error("the index puts {tensor} into {file}, which is not in the folder")]
    MissingShard {
        /// A tensor of it.
        tensor: String,
        /// The file.
        file: String,
    },
    /// Not safetensors, or cut short.
    #[error("{path} is truncated or not safetensors ({len} bytes)")]
    Broken {
        /// Which.
        path: PathBuf,
        /// Its length.
        len: usize,
        /// Why.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A tensor is in no file.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor of another shape than the configuration says.
    #[error("tensor {name} has shape {found:?}, the configuration says {expected:?}")]
    Shape {
        /// Which.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// What it must be.
        expected: Vec<usize>,
    },
    /// A tensor of numbers that are not read.
    #[error("tensor {name} is {found:?}; BF16, F16 and F32 are read")]
    Dtype {
        /// Which.
        name: String,
        /// What it holds.
        found: Dtype,
    },
    /// No memory for weights.
    #[error("no memory for {what}")]
    Memory {
        /// Of what.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Something that has tensors by name: files, or numbers drawn from a seed.
pub trait TensorSource {
    /// Tensor `name`, which must have the given shape.
    ///
    /// # Errors
    /// When it is missing or another.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError>;

    /// Whether there is such a tensor.
    fn has(&self, name: &str) -> bool;
}

/// A tensor's numbers, where they lie.
pub enum Tensor<'a> {
    /// Among the bytes of a file, which is mapped as a rule.
    Mapped(RowSource<'a>),
    /// In memory of its own.
    Owned(Vec<f32>),
}

impl Tensor<'_> {
    /// To read them.
    #[must_use]
    pub fn rows(&self) -> RowSource<'_> {
        match self {
            Self::Mapped(rows) => *rows,
            Self::Owned(values) => RowSource::F32(values),
        }
    }

    /// All of them as f32.
    #[must_use]
    pub fn to_vec(&self) -> Vec<f32> {
        let rows = self.rows();
        let mut out = vec![0.0; rows.count()];
        rows.row_into(0, &mut out);
        out
    }
}

/// The bytes of a file.
enum Bytes {
    /// Where they lie, so that a large model takes no memory twice.
    Mapped(MappedFile),
    /// As they were when they were read: whatever happens to the file, they stay.
    Read(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

struct Shard {
    /// The name of its file.
    file: String,
    bytes: Bytes,
    /// Where tensors start.
    data: usize,
    metadata: Metadata,
}

/// The files of a checkpoint.
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// Which shard has a tensor.
    tensors: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights of a folder.
    ///
    /// # Errors
    /// When files are missing, cut short or of another format.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let index = folder.join("model.safetensors.index.json");
        if index.exists() {
            return Self::open_sharded(folder, &index);
        }
        let single = folder.join("model.safetensors");
        if !single.exists() {
            return Err(CheckpointError::NoWeights(folder.to_owned()));
        }
        Self::open_file(&single)
    }

    /// Opens one file.
    ///
    /// # Errors
    /// When it is missing, cut short or of another format.
    pub fn open_file(path: &Path) -> Result<Self, CheckpointError> {
        Ok(Self::of(Shard::open(path)?))
    }

    /// The tensors of a file that was read; `path` is what messages call it.
    ///
    /// # Errors
    /// When it is cut short or of another format.
    pub fn read(path: &Path, bytes: Vec<u8>) -> Result<Self, CheckpointError> {
        Ok(Self::of(Shard::new(path, Bytes::Read(bytes))?))
    }

    fn of(shard: Shard) -> Self {
        let names = shard.metadata.offset_keys();
        Self {
            tensors: names.into_iter().map(|name| (name, 0)).collect(),
            shards: vec![shard],
        }
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<Self, CheckpointError> {
        let read = |source| CheckpointError::Read {
            path: index.to_owned(),
            source,
        };
        let text = std::fs::read_to_string(index).map_err(read)?;
        let Index { weight_map } =
            serde_json::from_str(&text).map_err(|source| CheckpointError::Index {
                path: index.to_owned(),
                source,
            })?;
        let mut files: BTreeMap<&str, usize> = BTreeMap::new();
        let mut found = Self {
            shards: Vec::new(),
            tensors: HashMap::new(),
        };
        for (tensor, file) in &weight_map {
            let at = match files.get(file.as_str()) {
                Some(at) => *at,
                None => {
                    let missing = || CheckpointError::MissingShard {
                        tensor: tensor.clone(),
                        file: file.clone(),
                    };
                    // A plain name: an index leads nowhere else.
                    let plain = Path::new(file)
                        .file_name()
                        .is_some_and(|name| name == file.as_str());
                    if !plain || !folder.join(file).exists() {
                        return Err(missing());
                    }
                    found.shards.push(Shard::open(&folder.join(file))?);
                    files.insert(file, found.shards.len() - 1);
                    found.shards.len() - 1
                }
            };
            if found.shards[at].metadata.info(tensor).is_some() {
                found.tensors.insert(tensor.clone(), at);
            }
        }
        Ok(found)
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let shard = &self.shards[*self.tensors.get(name)?];
        shard.metadata.info(name).map(|info| info.shape.as_slice())
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self, CheckpointError> {
        let map = MappedFile::open(path).map_err(|source| CheckpointError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::new(path, Bytes::Mapped(map))
    }

    fn new(path: &Path, bytes: Bytes) -> Result<Self, CheckpointError> {
        let broken = |source| CheckpointError::Broken {
            path: path.to_owned(),
            len: bytes.len(),
            source,
        };
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let data = header + 8;
        if metadata.data_len() > bytes.len() - data {
            return Err(broken(
                safetensors::SafeTensorError::MetadataIncompleteBuffer,
            ));
        }
        let file = path.file_name().unwrap_or_default();
        Ok(Self {
            file: file.to_string_lossy().into_owned(),
            bytes,
            data,
            metadata,
        })
    }
}

/// A file of a checkpoint as it lies there.
pub(crate) struct ShardFile<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// The header's JSON, with the spaces at its end.
    pub(crate) header: &'a [u8],
    /// In the order in which they lie, one behind the other.
    pub(crate) tensors: Vec<StoredTensor<'a>>,
}

/// A tensor as it lies in its file.
pub(crate) struct StoredTensor<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: &'a [u8],
}

impl StoredTensor<'_> {
    /// Its numbers.
    pub(crate) fn rows(&self) -> Result<RowSource<'_>, CheckpointError> {
        rows(&self.name, self.dtype, self.bytes)
    }
}

impl Checkpoint {
    /// Its files, by name.
    pub(crate) fn files(&self) -> Vec<ShardFile<'_>> {
        let mut files: Vec<ShardFile<'_>> = self.shards.iter().map(Shard::as_stored).collect();
        files.sort_unstable_by(|a, b| a.name.cmp(b.name));
        files
    }
}

impl Shard {
    fn as_stored(&self) -> ShardFile<'_> {
        let tensor = |name: String| {
            let info = self.metadata.info(&name)?;
            let (start, end) = info.data_offsets;
            Some(StoredTensor {
                name,
                dtype: info.dtype,
                shape: &info.shape,
                bytes: &self.bytes[self.data + start..self.data + end],
            })
        };
        ShardFile {
            name: &self.file,
            header: &self.bytes[8..self.data],
            tensors: self
                .metadata
                .offset_keys()
                .into_iter()
                .filter_map(tensor)
                .collect(),
        }
    }
}

fn rows<'a>(name: &str, dtype: Dtype, bytes: &'a [u8]) -> Result<RowSource<'a>, CheckpointError> {
    match dtype {
        Dtype::BF16 => Ok(RowSource::Bf16Bytes(bytes)),
        Dtype::F16 => Ok(RowSource::F16Bytes(bytes)),
        Dtype::F32 => Ok(RowSource::F32Bytes(bytes)),
        found => Err(CheckpointError::Dtype {
            name: name.to_owned(),
            found,
        }),
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        let missing = || CheckpointError::MissingTensor(name.to_owned());
        let shard = &self.shards[*self.tensors.get(name).ok_or_else(missing)?];
        let info = shard.metadata.info(name).ok_or_else(missing)?;
        if info.shape != shape {
            return Err(CheckpointError::Shape {
                name: name.to_owned(),
                found: info.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        let (start, end) = info.data_offsets;
        let bytes = &shard.bytes[shard.data + start..shard.data + end];
        Ok(Tensor::Mapped(rows(name, info.dtype, bytes)?))
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
