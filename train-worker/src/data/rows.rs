//! Rows of tokens: one JSON object a line, read in the pieces in which a store gives them.

use serde::Deserialize;

use super::{DataError, Rules, Samples};

/// Longest line, in bytes: a million tokens of seven digits, and then some.
const LINE_BYTES_MAX: usize = 16 << 20;

/// One sample. Further fields beside these mean nothing here.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Row {
    /// Its name, for messages.
    pub id: String,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Ranges of tokens that are learned, ascending: from the first, up to but without the last.
    pub supervised: Vec<[u32; 2]>,
}

/// Reads lines out of pieces of a file.
#[derive(Debug)]
pub struct RowLines {
    path: String,
    rules: Rules,
    rest: Vec<u8>,
    line: usize,
    samples: Samples,
}

impl RowLines {
    /// For the file at `path`, of which messages speak.
    pub fn new(path: &str, rules: Rules) -> Self {
        Self {
            path: path.to_owned(),
            rules,
            rest: Vec::new(),
            line: 0,
            samples: Samples::default(),
        }
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// A line in it is no row, or breaks a rule.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), DataError> {
        let mut pieces = piece.split(|byte| *byte == b'\n');
        let last = pieces.next_back().unwrap_or_default();
        for end in pieces {
            self.rest.extend_from_slice(end);
            let line = std::mem::take(&mut self.rest);
            self.row(&line)?;
        }
        self.rest.extend_from_slice(last);
        match self.rest.len() > LINE_BYTES_MAX {
            true => Err(self.refuse(self.line + 1, "it is too long".to_owned())),
            false => Ok(()),
        }
    }

    /// All samples, after the last piece.
    ///
    /// # Errors
    /// The last line is no row, or there are no samples at all.
    pub fn finish(mut self) -> Result<Samples, DataError> {
        let line = std::mem::take(&mut self.rest);
        self.row(&line)?;
        match self.samples.is_empty() {
            true => Err(DataError::Empty { path: self.path }),
            false => Ok(self.samples),
        }
    }

    fn row(&mut self, line: &[u8]) -> Result<(), DataError> {
        self.line += 1;
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let row = serde_json::from_slice(line);
        let row = row.map_err(|error| self.refuse(self.line, error.to_string()))?;
        let (line, path) = (self.line, &self.path);
        let place = format_args!("line {line} of `{path}`");
        self.samples.push(row, self.rules, place)
    }

    fn refuse(&self, line: usize, reason: String) -> DataError {
        DataError::Line {
            path: self.path.clone(),
            line,
            reason,
        }
    }
}
