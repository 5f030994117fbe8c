//! What the queue keeps of a job's spec: the encoded fields of the job itself, or where they lie if they are many.
//!
//! The first byte says which; it is the version of the format as well.

use bytes::{BufMut, Bytes, BytesMut};

/// Specs above this size lie in object storage, in bytes: the queue's file holds what is hot.
pub const INLINE_BYTES_MAX: usize = 4 * 1024;

const INLINE: u8 = 0;
const BLOB: u8 = 1;

/// A stored spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredSpec {
    /// The job's own fields, encoded; the batch's defaults go before them.
    Inline(Bytes),
    /// Object path of the whole encoded spec, defaults included.
    Blob(String),
}

impl StoredSpec {
    /// The bytes that the queue keeps.
    pub fn encode(&self) -> Bytes {
        let (tag, payload) = match self {
            Self::Inline(own) => (INLINE, own.as_ref()),
            Self::Blob(path) => (BLOB, path.as_bytes()),
        };
        let mut bytes = BytesMut::with_capacity(1 + payload.len());
        bytes.put_u8(tag);
        bytes.put_slice(payload);
        bytes.freeze()
    }

    /// Reads them back; none for bytes that this version did not write.
    pub fn decode(bytes: &Bytes) -> Option<Self> {
        match *bytes.first()? {
            INLINE => Some(Self::Inline(bytes.slice(1..))),
            BLOB => Some(Self::Blob(String::from_utf8(bytes[1..].to_vec()).ok()?)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let inline = StoredSpec::Inline(Bytes::from_static(b"\x0a\x01a"));
        assert_eq!(&inline.encode()[..], b"\x00\x0a\x01a");
        let blob = StoredSpec::Blob("shop/blobs/ab".to_owned());
        assert_eq!(&blob.encode()[..], b"\x01shop/blobs/ab");
        for stored in [inline, blob] {
            assert_eq!(StoredSpec::decode(&stored.encode()), Some(stored));
        }
        assert_eq!(StoredSpec::decode(&Bytes::new()), None);
        assert_eq!(StoredSpec::decode(&Bytes::from_static(b"\x02x")), None);
    }
}
