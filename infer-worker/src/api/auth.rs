//! The API key: one for the whole server, as a bearer token.

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use espalier_runtime::config::Secret;
use sha2::{Digest, Sha256};

use super::error::ApiError;

/// Keeps only the key's digest. Digests are compared to the last byte, and how long that takes tells nothing of the key.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Option<[u8; 32]>);

impl Gate {
    /// Without a key everybody may pass.
    pub(super) fn new(key: Option<&Secret>) -> Self {
        Self(key.map(|key| digest(key.expose().as_bytes())))
    }

    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(expected) = &self.0 else {
            return Ok(());
        };
        let given = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let token = given.and_then(bearer).ok_or_else(ApiError::unauthorized)?;
        let differs = digest(token)
            .iter()
            .zip(expected)
            .fold(0, |differs, (a, b)| differs | (a ^ b));
        match std::hint::black_box(differs) {
            0 => Ok(()),
            _ => Err(ApiError::unauthorized()),
        }
    }
}

fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked("Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then_some(token.trim_ascii())
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(gate: &Gate, header: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(AUTHORIZATION, header.parse().unwrap());
        }
        gate.check(&headers).is_ok()
    }

    #[test]
    fn only_the_key_opens() {
        let gate = Gate::new(Some(&Secret::new("sk-1")));
        assert!(allows(&gate, Some("Bearer sk-1")));
        assert!(allows(&gate, Some("bearer sk-1")));
        for wrong in [
            None,
            Some("sk-1"),
            Some("Bearer"),
            Some("Bearer "),
            Some("Bearer sk-12"),
            Some("Basic sk-1"),
        ] {
            assert!(!allows(&gate, wrong), "{wrong:?}");
        }
        assert!(allows(&Gate::new(None), None));
    }
}
