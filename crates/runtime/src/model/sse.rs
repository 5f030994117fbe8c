//! Server-sent events, as far as chat streams use them: the data of each event.
//!
//! Written here and not taken from a crate, because the ones at hand scan an unfinished line again with every chunk:
//! an endpoint that sends one endless line would cost the square of its length. Format: WHATWG HTML, *Server-sent
//! events*, without `id` and `retry`, which chat streams do not use.

use std::collections::VecDeque;

/// Turns bytes, however they are cut, into events. The caller bounds how many bytes come.
#[derive(Debug, Default)]
pub struct EventParser {
    line: Vec<u8>,
    after_return: bool,
    data: Vec<u8>,
    has_data: bool,
    ready: VecDeque<Vec<u8>>,
}

impl EventParser {
    /// Takes the next bytes of the stream.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let newline = bytes[end];
            // The second half of a `\r\n` ends no line of its own.
            let continues = newline == b'\n' && end == 0 && self.after_return;
            self.line.extend_from_slice(&bytes[..end]);
            self.after_return = newline == b'\r';
            bytes = &bytes[end + 1..];
            if !continues {
                self.end_line();
            }
        }
        if !bytes.is_empty() {
            self.after_return = false;
            self.line.extend_from_slice(bytes);
        }
    }

    /// The data of the next complete event.
    pub fn next_event(&mut self) -> Option<Vec<u8>> {
        self.ready.pop_front()
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                self.ready.push_back(std::mem::take(&mut self.data));
            }
            return;
        }
        let Some(value) = line.strip_prefix(b"data") else {
            return;
        };
        let value = match value {
            [] => value,
            [b':', b' ', value @ ..] | [b':', value @ ..] => value,
            _ => return,
        };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = EventParser::default();
        for chunk in chunks {
            parser.push(chunk);
        }
        std::iter::from_fn(|| parser.next_event())
            .map(|event| String::from_utf8(event).unwrap())
            .collect()
    }

    const STREAM: &[u8] =
        b": hello\n\ndata: {\"a\":1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\nid: 5\n\ndata: \xc3\xa9\n\ndata: cut";

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let whole = events(&[STREAM]);
        assert_eq!(whole, ["{\"a\":1}", "two\nlines", "é"]);
        for cut in 1..STREAM.len() {
            assert_eq!(
                events(&[&STREAM[..cut], &STREAM[cut..]]),
                whole,
                "cut at {cut}"
            );
        }
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(events(&bytes), whole);
    }

    #[test]
    fn other_fields_and_empty_events_are_nothing() {
        assert_eq!(events(&[b"\n\n\nretry: 5\n\ndatax: 1\n\n"]), [""; 0]);
        assert_eq!(events(&[b"data\n\ndata:\n\n"]), ["", ""]);
    }
}
