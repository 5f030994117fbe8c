//! A client that costs next to nothing: one connection, one thread that waits for it. What it measures is the server,
//! also where both share two cores.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::server::ANSWER_LIMIT;

/// The end of a body in chunks.
const END: &[u8] = b"\r\n0\r\n\r\n";

/// The beginning of an answer that is a success.
const GOOD: &[u8] = b"HTTP/1.1 200 ";

/// A connection that stays open.
pub struct Wire {
    stream: TcpStream,
    host: String,
}

impl Wire {
    /// To `host`, with its port.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn open(host: String) -> std::io::Result<Self> {
        let stream = TcpStream::connect(&host)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { stream, host })
    }

    /// Posts JSON, and reads the answer to its end: head and body as they came, and how long that took.
    ///
    /// # Errors
    /// The connection ends or is silent, or the answer is no success.
    pub fn post(&mut self, path: &str, body: &Value) -> std::io::Result<(Duration, String)> {
        let body = body.to_string();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.host,
            body.len()
        );
        let began = Instant::now();
        self.stream.write_all(request.as_bytes())?;
        let (mut answer, mut part) = (Vec::new(), [0; 16 * 1024]);
        while !answer.ends_with(END) {
            match self.stream.read(&mut part)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => answer.extend_from_slice(&part[..read]),
            }
            // A refusal need not come in chunks: what came with its first line is told.
            if answer.len() >= GOOD.len() && !answer.starts_with(GOOD) {
                return Err(std::io::Error::other(String::from_utf8_lossy(&answer)));
            }
        }
        let took = began.elapsed();
        Ok((took, String::from_utf8_lossy(&answer).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Answers one request with `parts`, each sent on its own.
    fn answering(parts: Vec<&'static str>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]).unwrap();
            for part in parts {
                stream.write_all(part.as_bytes()).unwrap();
                stream.flush().unwrap();
            }
        });
        host
    }

    #[test]
    fn an_answer_is_read_to_its_end_and_no_further() {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let host = answering(vec![head, "5\r\ndata:\r", "\n0\r\n\r", "\n"]);
        let (_, text) = Wire::open(host).unwrap().post("/", &Value::Null).unwrap();
        assert!(text.ends_with("data:\r\n0\r\n\r\n"), "{text}");
    }

    #[test]
    fn a_refusal_and_an_end_in_the_middle_are_errors() {
        for parts in [
            vec!["HTTP/1.1 429 Too Many\r\ncontent-length: 2\r\n\r\nno"],
            vec!["HTTP/1.1 200 OK\r\n\r\n2\r\nno"],
        ] {
            let mut wire = Wire::open(answering(parts)).unwrap();
            assert!(wire.post("/", &Value::Null).is_err());
        }
    }
}
