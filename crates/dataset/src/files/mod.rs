//! Data sets as files: Parquet and JSON lines, written and read in bounded memory, and the card beside them.
//!
//! Both have the same columns. `messages` and `tools` are JSON in a string: as nested columns, every call would get
//! the arguments of every other one, as nulls, and the chat template would write them.

mod card;
mod flat;
mod json;
mod parquet;

use crate::row::{Row, Split};

pub use card::{CardFacts, card};
pub use json::{JsonlWriter, LINE_BYTES_MAX, jsonl_records};
pub use parquet::{ParquetWriter, parquet_records};

use flat::Flat;
use serde_json::Value;

/// What a file holds, row by row.
pub type Records = Box<dyn Iterator<Item = Result<Value, FileError>> + Send>;

/// Why a file, or a row of it, cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read any further.
    #[error("`{file}` cannot be read at row {row}")]
    Read {
        /// Its name.
        file: String,
        /// The row, from 0.
        row: usize,
        /// What the reader said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// One row breaks a rule; those after it can be read.
    #[error("row {row} of `{file}` is refused")]
    Row {
        /// The file.
        file: String,
        /// The row, from 0.
        row: usize,
        /// Which field, and why.
        source: espalier_core::error::FieldError,
    },
    /// Nothing more can be written.
    #[error("rows cannot be written")]
    Write(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl FileError {
    /// Whether rows after this one can be read.
    pub fn goes_on(&self) -> bool {
        matches!(self, Self::Row { .. })
    }
}

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Columns, in row groups.
    Parquet,
    /// One JSON object a line.
    Jsonl,
    /// One JSON document: an object is one row, a list is many.
    Json,
}

impl Format {
    /// That of a file, by the end of its name.
    pub fn of(name: &str) -> Option<Self> {
        let (_, end) = name.rsplit_once('.')?;
        match end.to_ascii_lowercase().as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// The name of one of `of` files of a split, in the folder and form in which loaders look for it.
pub fn file_name(split: Split, n: usize, of: usize, format: Format) -> String {
    let end = match format {
        Format::Parquet => "parquet",
        Format::Jsonl => "jsonl",
        Format::Json => "json",
    };
    format!("data/{}-{n:05}-of-{of:05}.{end}", split.as_str())
}

/// The rows of a file that was written here.
pub fn read_rows(
    file: impl Into<String>,
    records: Records,
) -> impl Iterator<Item = Result<Row, FileError>> {
    let file = file.into();
    records.enumerate().map(move |(row, record)| {
        let refused = |source| FileError::Row {
            file: file.clone(),
            row,
            source,
        };
        Flat::read(record?).map_err(refused)
    })
}

#[cfg(test)]
mod tests;
