//! A file of requests: checked at the door, and cut into parts between lines.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use espalier_core::answers::{BadLine, BatchRequest, LINE_BYTES_MAX};
use espalier_core::error::FieldError;
use espalier_core::trace::sha256_hex;

use crate::submit::file::Refusal;
use crate::submit::lines::{self, Line};

/// Bytes after which a part ends: large enough for hours of work, small enough for one upload.
const PART_BYTES: u64 = 64 << 20;
/// Refusals that are kept; more say nothing new.
const REFUSALS_MAX: usize = 1_000;

/// A file that was checked.
#[derive(Debug, Default)]
pub struct Requests {
    /// Lines that are not blank.
    pub lines: u64,
    /// Where it is cut.
    pub parts: Vec<Part>,
    /// What is wrong with it.
    pub refusals: Vec<Refusal>,
}

/// Some lines of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The byte at which they begin.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
}

/// Reads the whole file and checks each line. Blocking.
///
/// # Errors
/// It cannot be read, or has no request at all.
pub fn check(file: &Path) -> Result<Requests, FieldError> {
    let fail = |rule: String| FieldError::new("file", file.display(), rule);
    let cannot = |error: io::Error| fail(format!("cannot be read: {error}"));
    let reader = BufReader::with_capacity(1 << 16, File::open(file).map_err(cannot)?);
    let requests = check_lines(reader, PART_BYTES).map_err(cannot)?;
    match requests.lines {
        0 => Err(fail("must have at least one request".to_owned())),
        _ => Ok(requests),
    }
}

fn check_lines(reader: impl BufRead, part_bytes: u64) -> io::Result<Requests> {
    let mut reader = Counted { reader, at: 0 };
    let mut requests = Requests::default();
    let mut seen = HashSet::new();
    let (mut place, mut start, mut has_lines) = (0, 0, false);
    while let Some(line) = lines::next(&mut reader, LINE_BYTES_MAX)? {
        place += 1;
        let is_blank =
            matches!(&line, Line::Bytes(line) if line.iter().all(u8::is_ascii_whitespace));
        if !is_blank {
            requests.lines += 1;
            has_lines = true;
            if let Err(bad) = check_line(&line, &mut seen)
                && requests.refusals.len() < REFUSALS_MAX
            {
                requests.refusals.push(Refusal {
                    place,
                    id: bad.custom_id.unwrap_or_default(),
                    error: bad.error,
                });
            }
        }
        let end = reader.at;
        if has_lines && end - start >= part_bytes {
            requests.parts.push(Part { start, end });
            (start, has_lines) = (end, false);
        }
    }
    if has_lines {
        let end = reader.at;
        requests.parts.push(Part { start, end });
    }
    Ok(requests)
}

/// `seen`: digests of the names so far, which take less memory than long names.
fn check_line(line: &Line, seen: &mut HashSet<String>) -> Result<(), BadLine> {
    let request = match line {
        Line::Bytes(line) => BatchRequest::parse(line)?,
        Line::TooLong(bytes, _) => return Err(BadLine::too_long(*bytes)),
    };
    if seen.insert(sha256_hex(request.custom_id.as_bytes())) {
        return Ok(());
    }
    let rule = "must be unique in the file";
    Err(BadLine {
        error: FieldError::new("custom_id", &request.custom_id, rule),
        custom_id: Some(request.custom_id),
    })
}

/// The bytes of a part. Blocking.
pub fn read(file: &Path, part: &Part) -> io::Result<Vec<u8>> {
    let mut file = File::open(file)?;
    file.seek(SeekFrom::Start(part.start))?;
    let bytes = part.end - part.start;
    let mut content = Vec::new();
    file.take(bytes).read_to_end(&mut content)?;
    match content.len() as u64 == bytes {
        true => Ok(content),
        false => Err(io::Error::other("the file of requests became shorter")),
    }
}

/// Counts what was read.
struct Counted<R> {
    reader: R,
    at: u64,
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.reader.read(buffer)?;
        self.at += bytes as u64;
        Ok(bytes)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.at += bytes as u64;
        self.reader.consume(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str) -> String {
        let url = "/v1/completions";
        format!(r#"{{"custom_id":"{id}","method":"POST","url":"{url}","body":{{"prompt":"x"}}}}"#)
    }

    #[test]
    fn a_file_is_cut_between_lines_and_blank_ones_make_no_part() {
        let one = line("a").len() as u64 + 1;
        let text = format!("{}\n{}\n\n{}\n\n\n", line("a"), line("b"), line("c"));
        let requests = check_lines(text.as_bytes(), 2 * one).unwrap();
        assert_eq!((requests.lines, requests.refusals.len()), (3, 0));
        let part = |start, end| Part { start, end };
        let last = text.len() as u64;
        assert_eq!(
            requests.parts,
            [part(0, 2 * one), part(2 * one, last)],
            "{text}"
        );
        let whole = check_lines(text.as_bytes(), 1 << 20).unwrap();
        assert_eq!(whole.parts, [part(0, last)]);
        assert_eq!(check_lines(&b"\n \n"[..], 1).unwrap().parts, []);
    }

    #[test]
    fn bad_lines_are_named_by_line_field_and_rule() {
        let text = format!("{}\n\n{{}}\n{}\n{}", line("a"), line("a"), line("b"));
        let requests = check_lines(text.as_bytes(), 1 << 20).unwrap();
        let said: Vec<(u64, &str, &str)> = requests
            .refusals
            .iter()
            .map(|refusal| (refusal.place, &*refusal.id, &*refusal.error.field))
            .collect();
        assert_eq!(said, [(3, "", "custom_id"), (4, "a", "custom_id")]);
        assert_eq!(
            requests.refusals[1].error.rule,
            "must be unique in the file"
        );
    }
}
