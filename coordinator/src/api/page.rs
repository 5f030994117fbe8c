//! Page tokens: where a list goes on, bound to the list that it came from.
//!
//! A token carries the last name of its page and a digest over that name, the caller's project and the filters. The
//! digest is no secret: whoever makes up a valid token sees nothing that the same call without it would not show.
//! It catches tokens that were cut, mixed up between lists, or used with other filters.
//!
//! A page ends at the number of rows that was asked for, or before its bytes would be more than a client takes.

use std::fmt::Write;

use espalier_core::error::FieldError;
use prost::Message;
use sha2::{Digest, Sha256};

/// Bytes of the digest that a token carries: enough against accidents.
const DIGEST_BYTES: usize = 8;
/// Rows of a page where the request names no number.
const ROWS_DEFAULT: u32 = 100;
/// Most rows of a page.
const ROWS_MAX: u32 = 1_000;
/// Most bytes of rows in one answer: with room below the 4 MiB that gRPC clients take unless they are told otherwise.
const BYTES_MAX: usize = 3 << 20;

/// The list that a token belongs to: the call, the project, the filters.
#[derive(Debug)]
pub struct List(Sha256);

impl List {
    /// A list of `call` with nothing else said.
    pub fn of(call: &str) -> Self {
        Self(Sha256::new()).with(call)
    }

    /// The list as `part` narrows it.
    pub fn with(mut self, part: &str) -> Self {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    fn digest(&self, after: &str) -> String {
        let digest = Self(self.0.clone()).with(after).0.finalize();
        let mut hex = String::with_capacity(2 * DIGEST_BYTES);
        for byte in &digest[..DIGEST_BYTES] {
            // Writing into a `String` cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        hex
    }

    /// The token of a page that ends with `after`.
    pub fn token(&self, after: &str) -> String {
        format!("{}{after}", self.digest(after))
    }

    /// The last name of the page before; none at the beginning.
    pub fn after<'a>(&self, token: &'a str) -> Result<Option<&'a str>, FieldError> {
        if token.is_empty() {
            return Ok(None);
        }
        match token.split_at_checked(2 * DIGEST_BYTES) {
            Some((digest, after)) if digest == self.digest(after) => Ok(Some(after)),
            _ => Err(FieldError::new(
                "page_token",
                token,
                "must be the `next_page_token` of the same call with the same filters",
            )),
        }
    }
}

/// The number of rows that a request asks for.
pub fn size(page_size: u32) -> Result<usize, FieldError> {
    match page_size {
        0 => Ok(ROWS_DEFAULT as usize),
        1..=ROWS_MAX => Ok(page_size as usize),
        _ => Err(FieldError::new(
            "page_size",
            page_size,
            format!("must be at most {ROWS_MAX}"),
        )),
    }
}

/// The first of `rows`, as many as fit into one answer, and at least one.
pub fn fitting<M: Message>(rows: impl IntoIterator<Item = M>) -> Vec<M> {
    let mut bytes = 0;
    let mut fitting = Vec::new();
    for row in rows {
        bytes += row.encoded_len();
        if bytes > BYTES_MAX && !fitting.is_empty() {
            break;
        }
        fitting.push(row);
    }
    fitting
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_on_in_its_own_list_only() {
        let list = || List::of("ListJobs").with("shop").with("b1");
        let token = list().token("job-7");
        assert_eq!(list().after(&token).unwrap(), Some("job-7"));
        assert_eq!(list().after("").unwrap(), None);

        let elsewhere = [
            List::of("ListBatches").with("shop").with("b1"),
            List::of("ListJobs").with("bank").with("b1"),
            List::of("ListJobs").with("shopb").with("1"),
            list().with("state"),
        ];
        for other in elsewhere {
            assert_eq!(other.after(&token).unwrap_err().field, "page_token");
        }
        for broken in ["x", &token[1..], &format!("{token}1"), "ééééééééééééé"] {
            assert!(list().after(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_page_has_a_size() {
        assert_eq!((size(0).unwrap(), size(1_000).unwrap()), (100, 1_000));
        assert_eq!(size(1_001).unwrap_err().field, "page_size");
    }
}
