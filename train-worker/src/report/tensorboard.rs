//! Event files as TensorBoard reads them: TFRecord frames around `Event` messages, of which only scalars are written.
//!
//! A frame is the length (`u64`), the masked CRC-32C of these eight bytes, the message, and its masked CRC-32C, all
//! little-endian. The mask is `rotate_right(crc, 15) + 0xa282ead8`. Sources: TensorFlow's `core/lib/io/record_writer.h`,
//! `core/lib/hash/crc32c.h`, `core/util/event.proto` and `core/framework/summary.proto`, whose field numbers stand below.
//! `tools/read-events.py` reads what is written here with Python's `tensorboard`.

use prost::Message;

/// What a reader expects as the first event.
const FILE_VERSION: &str = "brain.Event:2";

/// `tensorflow.Event`.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since the epoch.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`, a scalar.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// A file of events.
#[derive(Clone, Debug)]
pub struct EventFile(Vec<u8>);

impl EventFile {
    /// A file that begins at `wall_s`, in seconds since the epoch.
    pub fn new(wall_s: f64) -> Self {
        let mut file = Self(Vec::new());
        file.push(&Event {
            wall_time: wall_s,
            file_version: Some(FILE_VERSION.to_owned()),
            ..Event::default()
        });
        file
    }

    /// Adds the values of `step`, each under its tag.
    pub fn scalars(&mut self, wall_s: f64, step: u64, values: &[(&str, f64)]) {
        let value = |(tag, value): &(&str, f64)| Value {
            tag: (*tag).to_owned(),
            simple_value: Some(*value as f32),
        };
        self.push(&Event {
            wall_time: wall_s,
            step: i64::try_from(step).unwrap_or(i64::MAX),
            file_version: None,
            summary: Some(Summary {
                value: values.iter().map(value).collect(),
            }),
        });
    }

    /// Its bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn push(&mut self, event: &Event) {
        let message = event.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        self.0.extend_from_slice(&length);
        self.0.extend_from_slice(&masked_crc(&length).to_le_bytes());
        self.0.extend_from_slice(&message);
        self.0
            .extend_from_slice(&masked_crc(&message).to_le_bytes());
    }
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected, bytes through a table.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    let step = |crc: u32, byte: &u8| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    !bytes.iter().fold(!0, step)
}

const fn table() -> [u32; 256] {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let (mut crc, mut bit) = (n as u32, 0);
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read with `tools/read-events.py`, which says what stands in the test.
    const GOLDEN: &[u8] = include_bytes!("golden/events.tfevents");

    #[test]
    fn the_checksum_is_castagnolis() {
        // The check value of the catalogue, and the vectors of RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn the_file_is_the_one_that_tensorboard_was_seen_to_read() {
        let mut file = EventFile::new(1_750_000_000.25);
        file.scalars(
            1_750_000_001.5,
            1,
            &[("train/loss", 2.5), ("train/lr", 1e-4)],
        );
        file.scalars(1_750_000_002.5, 2, &[("eval/loss", 3.25)]);
        assert_eq!(file.into_bytes(), GOLDEN);
    }

    #[test]
    fn a_frame_holds_its_message_between_two_checksums() {
        let file = EventFile::new(0.5).into_bytes();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert_eq!(file.len(), length + 16);
        let event = Event::decode(&file[12..12 + length]).unwrap();
        assert_eq!(event.file_version.as_deref(), Some(FILE_VERSION));
    }
}
