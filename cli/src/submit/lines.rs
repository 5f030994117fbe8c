//! Lines of a file that may hold anything: bytes, not text, and each line bounded.

use std::io::{self, BufRead};

/// One line.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// Its bytes, without the line end.
    Bytes(Vec<u8>),
    /// It is longer than lines may be: its size, and its beginning.
    TooLong(u64, Vec<u8>),
}

/// The next line; none at the end. Never holds more than `bytes_max` bytes, however long the line is.
pub fn next(reader: &mut impl BufRead, bytes_max: usize) -> io::Result<Option<Line>> {
    let (mut line, mut size) = (Vec::new(), 0_u64);
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            let ended = size == 0;
            return Ok((!ended).then(|| finish(line, size, bytes_max)));
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let part = &buffer[..end.unwrap_or(buffer.len())];
        let room = (bytes_max + 1).saturating_sub(line.len());
        line.extend_from_slice(&part[..part.len().min(room)]);
        size += part.len() as u64;
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(Some(finish(line, size, bytes_max)));
        }
    }
}

fn finish(mut line: Vec<u8>, size: u64, bytes_max: usize) -> Line {
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    if size > bytes_max as u64 {
        line.truncate(200);
        return Line::TooLong(size, line);
    }
    Line::Bytes(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    const LINE_BYTES_MAX: usize = 4 << 20;

    fn lines(bytes: &[u8]) -> Vec<Line> {
        // A small buffer, so that lines cross its border.
        let mut reader = BufReader::with_capacity(7, bytes);
        std::iter::from_fn(|| next(&mut reader, LINE_BYTES_MAX).unwrap()).collect()
    }

    #[test]
    fn lines_end_with_any_line_end_or_none() {
        let expected = ["a long line", "", "b"].map(|text| Line::Bytes(text.into()));
        assert_eq!(lines(b"a long line\r\n\nb"), expected);
        assert_eq!(lines(b""), []);
    }

    #[test]
    fn a_line_that_is_too_long_is_measured_and_passed_over() {
        let mut bytes = vec![b'x'; LINE_BYTES_MAX + 5];
        bytes.extend_from_slice(b"\nnext\n");
        let lines = lines(&bytes);
        assert!(
            matches!(&lines[0], Line::TooLong(size, start) if *size == LINE_BYTES_MAX as u64 + 5 && start.len() == 200)
        );
        assert_eq!(lines[1], Line::Bytes(b"next".to_vec()));
    }
}
