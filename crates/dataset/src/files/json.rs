//! Rows as JSON, one a line.

use std::io::{BufRead, Read, Write};

use espalier_core::error::FieldError;
use serde_json::Value;

use super::flat::Flat;
use super::{FileError, Records};
use crate::row::Row;

/// Longest line that is read, in bytes: the longest trace is shorter.
pub const LINE_BYTES_MAX: usize = 512 << 20;

/// Writes one row a line.
#[derive(Debug)]
pub struct JsonlWriter<W> {
    out: W,
}

impl<W: Write> JsonlWriter<W> {
    /// Writes to `out`, which buffers.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Writes a row.
    ///
    /// # Errors
    /// `out` fails.
    pub fn write(&mut self, row: &Row) -> Result<(), FileError> {
        let mut line =
            serde_json::to_vec(&Flat::of(row)).map_err(|e| FileError::Write(e.into()))?;
        line.push(b'\n');
        self.out
            .write_all(&line)
            .map_err(|e| FileError::Write(e.into()))
    }

    /// Ends the file.
    ///
    /// # Errors
    /// `out` fails.
    pub fn finish(mut self) -> Result<W, FileError> {
        self.out.flush().map_err(|e| FileError::Write(e.into()))?;
        Ok(self.out)
    }
}

/// The records of JSON lines; empty ones are passed over. A line that is no JSON is refused and the next ones are read.
pub fn jsonl_records(file: impl Into<String>, mut from: impl BufRead + Send + 'static) -> Records {
    let (file, mut row, mut ended) = (file.into(), 0, false);
    Box::new(std::iter::from_fn(move || {
        while !ended {
            let mut line = Vec::new();
            let longest = LINE_BYTES_MAX as u64 + 1;
            let read = from.by_ref().take(longest).read_until(b'\n', &mut line);
            let failed = |source: Box<dyn std::error::Error + Send + Sync>| FileError::Read {
                file: file.clone(),
                row,
                source,
            };
            match read {
                Err(error) => {
                    ended = true;
                    return Some(Err(failed(error.into())));
                }
                Ok(_) if line.len() > LINE_BYTES_MAX => {
                    ended = true;
                    let rule = format!("a line must have at most {LINE_BYTES_MAX} bytes");
                    return Some(Err(failed(rule.into())));
                }
                Ok(0) => ended = true,
                Ok(_) if line.iter().all(u8::is_ascii_whitespace) => {}
                Ok(_) => {
                    row += 1;
                    return Some(parse(&file, row - 1, &line));
                }
            }
        }
        None
    }))
}

fn parse(file: &str, row: usize, line: &[u8]) -> Result<Value, FileError> {
    serde_json::from_slice(line).map_err(|error| FileError::Row {
        file: file.to_owned(),
        row,
        source: FieldError::new(
            "row",
            String::from_utf8_lossy(line),
            format!("must be JSON: {error}"),
        ),
    })
}
