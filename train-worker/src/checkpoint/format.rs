//! What a checkpoint consists of: files of tensors, the steps up to it, and a record, written last, that names them.
//!
//! Tensors lie in files of safetensors of at most [`FILE_BYTES`] bytes of numbers. One that is larger lies in pieces of
//! bytes, `name#0`, `name#1`, …, over several files; the record has its type and shape.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use espalier_core::adapter::Agreement;
use espalier_core::id::Fence;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::FileEntry;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Stored, TensorView, serialize};
use serde::{Deserialize, Serialize};

use crate::data::Cursor;
use crate::engine::{StateTensor, StateValues};

/// The version of [`Record`] that this code writes, and the only one that it reads.
pub const RECORD_VERSION: u32 = 1;
/// Numbers of one file, in bytes, a multiple of four: an upload that is broken off costs no more.
pub const FILE_BYTES: usize = 64 << 20;
/// Most bytes of a state: what no machine holds is no checkpoint.
const STATE_BYTES_MAX: u64 = 1 << 42;

/// Why files are no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The record cannot be read.
    #[error("the record is none: {0}")]
    Record(String),
    /// A file of tensors that is none.
    #[error("file {file} is no safetensors")]
    File {
        /// Which, from 0.
        file: usize,
        /// Why.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A tensor that is not whole.
    #[error("tensor `{name}` must have {expected} bytes, {found} are there")]
    Tensor {
        /// Which.
        name: String,
        /// By the record.
        expected: u64,
        /// In the files.
        found: u64,
    },
}

/// What is known of a checkpoint without its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// What the job asked for.
    pub spec_sha256: SpecDigest,
    /// The model that it began with, as `BaseModel` has it.
    pub base_sha256: String,
    /// What it learns from.
    pub data_sha256: String,
    /// Steps that are done.
    pub step: u64,
    /// Where the next step begins.
    pub cursor: Cursor,
    /// Sums over all steps.
    pub totals: Totals,
    /// The best measurement so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// How near training was to serving, before its first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Agreement>,
    /// Everything that training changes.
    pub tensors: Vec<TensorEntry>,
    /// The files that hold it, in order.
    pub files: Vec<FileEntry>,
    /// The steps, one a line.
    pub steps: FileEntry,
}

/// Sums over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Of these, those that it was trained to predict.
    pub supervised_tokens: u64,
    /// Milliseconds of computing.
    pub wall_ms: u64,
}

/// The weights that did best on held-out samples: a checkpoint of this or of an earlier attempt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The attempt that took it.
    pub fence: Fence,
    /// After how many steps.
    pub step: u64,
    /// Mean loss of the held-out samples.
    pub eval_loss: f64,
}

/// A tensor, wherever its bytes lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// How its numbers are held.
    pub dtype: Dtype,
    /// Its extents.
    pub shape: Vec<usize>,
}

/// How numbers are held; the names are those of safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Dtype {
    /// 8-bit integers without a sign.
    U8,
    /// 32-bit floats.
    F32,
}

impl TensorEntry {
    /// The entry of `tensor`.
    pub fn of(tensor: &StateTensor) -> Self {
        Self {
            name: tensor.name.clone(),
            dtype: match tensor.values {
                StateValues::F32(_) => Dtype::F32,
                StateValues::U8(_) => Dtype::U8,
            },
            shape: tensor.shape.clone(),
        }
    }

    /// Bytes of all its numbers; none: more than there can be.
    fn bytes(&self) -> Option<u64> {
        let numbers = |product: u64, extent: &usize| product.checked_mul(*extent as u64);
        let numbers = self.shape.iter().try_fold(1, numbers)?;
        let bytes = numbers.checked_mul(self.dtype.bytes() as u64)?;
        (bytes <= STATE_BYTES_MAX).then_some(bytes)
    }
}

impl Record {
    /// Reads a record that another attempt wrote.
    ///
    /// # Errors
    /// [`FormatError::Record`]: it is broken or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let refuse = |reason: String| FormatError::Record(reason);
        let record: Self = serde_json::from_slice(bytes).map_err(|e| refuse(e.to_string()))?;
        if record.version != RECORD_VERSION {
            let reason = format!("`version` must be {RECORD_VERSION}, got {}", record.version);
            return Err(refuse(reason));
        }
        let sizes: Option<u64> = record.tensors.iter().map(TensorEntry::bytes).sum();
        match sizes {
            Some(bytes) if bytes <= STATE_BYTES_MAX => Ok(record),
            _ => Err(refuse(format!(
                "`tensors` must have at most {STATE_BYTES_MAX} bytes"
            ))),
        }
    }
}

/// A part of a tensor's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the tensor.
    tensor: usize,
    /// Which piece of it; none: all of it.
    number: Option<usize>,
    bytes: Range<usize>,
}

/// Lays tensors out over files of at most `file_bytes` bytes of numbers.
pub fn lay_out(tensors: &[StateTensor], file_bytes: usize) -> Vec<Vec<Piece>> {
    let mut files: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let length = byte_length(&tensor.values);
        let is_whole = length <= file_bytes;
        for (number, start) in (0..length.max(1)).step_by(file_bytes).enumerate() {
            let bytes = start..length.min(start + file_bytes);
            if files.is_empty() || bytes.len() > room {
                files.push(Vec::new());
                room = file_bytes;
            }
            room -= bytes.len();
            let piece = Piece {
                tensor: index,
                number: (!is_whole).then_some(number),
                bytes,
            };
            files
                .last_mut()
                .into_iter()
                .for_each(|file| file.push(piece.clone()));
        }
    }
    files
}

/// The bytes of one file.
///
/// # Errors
/// A tensor whose bytes are not what its shape says.
pub fn encode(
    tensors: &[StateTensor],
    pieces: &[Piece],
) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes = pieces.iter().map(|piece| {
        let values = &tensors[piece.tensor].values;
        bytes_of(values, piece.bytes.clone())
    });
    let bytes: Vec<Cow<'_, [u8]>> = bytes.collect();
    let mut views = Vec::with_capacity(pieces.len());
    for (piece, bytes) in pieces.iter().zip(&bytes) {
        let tensor = &tensors[piece.tensor];
        let (name, dtype, shape) = match piece.number {
            None => (tensor.name.clone(), stored(tensor), tensor.shape.clone()),
            Some(n) => (piece_name(&tensor.name, n), Stored::U8, vec![bytes.len()]),
        };
        views.push((name, TensorView::new(dtype, shape, bytes)?));
    }
    serialize(views, None::<HashMap<String, String>>)
}

fn stored(tensor: &StateTensor) -> Stored {
    match tensor.values {
        StateValues::F32(_) => Stored::F32,
        StateValues::U8(_) => Stored::U8,
    }
}

fn byte_length(values: &StateValues) -> usize {
    match values {
        StateValues::F32(values) => values.len() * 4,
        StateValues::U8(codes) => codes.len(),
    }
}

/// Bytes of a tensor's numbers, little-endian. Ranges begin and end between numbers.
fn bytes_of(values: &StateValues, range: Range<usize>) -> Cow<'_, [u8]> {
    match values {
        StateValues::U8(codes) => Cow::Borrowed(&codes[range]),
        StateValues::F32(values) => {
            let values = &values[range.start / 4..range.end / 4];
            Cow::Owned(
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect(),
            )
        }
    }
}

/// Names of tensors hold no `#`: they are a checkpoint's and an optimizer's.
fn piece_name(name: &str, n: usize) -> String {
    format!("{name}#{n}")
}

/// Puts tensors together again, file by file.
#[derive(Debug)]
pub struct Assembler {
    tensors: Vec<StateTensor>,
    by_name: BTreeMap<String, usize>,
    /// The piece of each tensor that comes next.
    next: Vec<usize>,
    files: usize,
}

impl Assembler {
    /// For the tensors of a record.
    pub fn new(entries: &[TensorEntry]) -> Self {
        let empty = |entry: &TensorEntry| StateTensor {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            values: match entry.dtype {
                Dtype::F32 => StateValues::F32(Vec::new()),
                Dtype::U8 => StateValues::U8(Vec::new()),
            },
        };
        let named = |(n, entry): (usize, &TensorEntry)| (entry.name.clone(), n);
        Self {
            tensors: entries.iter().map(empty).collect(),
            by_name: entries.iter().enumerate().map(named).collect(),
            next: vec![0; entries.len()],
            files: 0,
        }
    }

    /// Takes the next file.
    ///
    /// # Errors
    /// It is no safetensors.
    pub fn push(&mut self, file: &[u8]) -> Result<(), FormatError> {
        let number = self.files;
        self.files += 1;
        let read = SafeTensors::deserialize(file).map_err(|source| FormatError::File {
            file: number,
            source,
        })?;
        let mut pieces: Vec<(usize, usize, &[u8])> = Vec::new();
        for (name, view) in read.tensors() {
            let (name, piece) = match name.split_once('#') {
                Some((name, n)) => (name, n.parse().unwrap_or(usize::MAX)),
                None => (&*name, 0),
            };
            if let Some(index) = self.by_name.get(name) {
                pieces.push((*index, piece, view.data()));
            }
        }
        pieces.sort_unstable_by_key(|(index, piece, _)| (*index, *piece));
        for (index, piece, bytes) in pieces {
            // One that is out of order leaves its tensor short, which the end finds.
            if self.next[index] == piece {
                self.next[index] += 1;
                append(&mut self.tensors[index].values, bytes);
            }
        }
        Ok(())
    }

    /// The tensors, after the last file.
    ///
    /// # Errors
    /// One of them is not whole.
    pub fn finish(self) -> Result<Vec<StateTensor>, FormatError> {
        for tensor in &self.tensors {
            let expected = TensorEntry::of(tensor).bytes().unwrap_or(u64::MAX);
            let found = byte_length(&tensor.values) as u64;
            if found != expected {
                return Err(FormatError::Tensor {
                    name: tensor.name.clone(),
                    expected,
                    found,
                });
            }
        }
        Ok(self.tensors)
    }
}

fn append(values: &mut StateValues, bytes: &[u8]) {
    match values {
        StateValues::U8(codes) => codes.extend_from_slice(bytes),
        StateValues::F32(values) => {
            let (numbers, _) = bytes.as_chunks::<4>();
            values.extend(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
    }
}

impl Dtype {
    /// Bytes of one number.
    fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F32 => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("golden/checkpoint-v1.json");

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> StateTensor {
        let count = shape.iter().product::<usize>();
        StateTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            values: match dtype {
                Dtype::F32 => {
                    StateValues::F32((0..count).map(|n| 1.0 / (n as f32 + 3.0)).collect())
                }
                Dtype::U8 => StateValues::U8((0..count).map(|n| n as u8 ^ 0x5a).collect()),
            },
        }
    }

    fn state() -> Vec<StateTensor> {
        vec![
            tensor("a", Dtype::F32, &[3, 5]),
            tensor("large", Dtype::F32, &[34]),
            tensor("large.1", Dtype::U8, &[9]),
            tensor("none", Dtype::F32, &[0, 4]),
            tensor("one", Dtype::F32, &[]),
        ]
    }

    fn again(state: &[StateTensor], files: &[Vec<u8>]) -> Result<Vec<StateTensor>, FormatError> {
        let entries: Vec<TensorEntry> = state.iter().map(TensorEntry::of).collect();
        let mut assembler = Assembler::new(&entries);
        for file in files {
            assembler.push(file)?;
        }
        assembler.finish()
    }

    fn files(state: &[StateTensor], file_bytes: usize) -> Vec<Vec<u8>> {
        let files = lay_out(state, file_bytes);
        files
            .iter()
            .map(|pieces| encode(state, pieces).unwrap())
            .collect()
    }

    #[test]
    fn a_state_comes_back_whole_from_files_of_any_size() {
        let state = state();
        for file_bytes in [4, 8, 52, 64, 1_000] {
            let files = files(&state, file_bytes);
            assert_eq!(again(&state, &files).unwrap(), state, "{file_bytes}");
        }
        assert_eq!(files(&state, 1_000).len(), 1);
        // Whole tensors are as anybody reads them.
        let read = files(&state, 1_000);
        let read = SafeTensors::deserialize(&read[0]).unwrap();
        assert_eq!(read.tensor("a").unwrap().shape(), [3, 5]);
    }

    #[test]
    fn files_that_are_missing_or_torn_are_told() {
        let state = state();
        let mut files = files(&state, 52);
        let last = files.pop().unwrap();
        assert!(matches!(
            again(&state, &files),
            Err(FormatError::Tensor { .. })
        ));
        files.push(last[..last.len() - 1].to_vec());
        assert!(matches!(
            again(&state, &files),
            Err(FormatError::File { .. })
        ));
        files.swap(0, 1);
        files.pop();
        files.push(last);
        assert!(again(&state, &files).is_err(), "pieces in another order");
    }

    #[test]
    fn the_record_of_version_1() {
        let record = Record::parse(GOLDEN.as_bytes()).unwrap();
        assert_eq!(
            serde_json::to_string_pretty(&record).unwrap() + "\n",
            GOLDEN
        );
        assert_eq!((record.step, record.cursor.position), (150, 40));
        for (from, to) in [
            ("\"version\": 1", "\"version\": 2"),
            ("\"F32\"", "\"F31\""),
            ("2560", "18446744073709551615"),
        ] {
            let other = GOLDEN.replacen(from, to, 1);
            assert_ne!(other, GOLDEN);
            assert!(Record::parse(other.as_bytes()).is_err(), "{to}");
        }
    }
}
