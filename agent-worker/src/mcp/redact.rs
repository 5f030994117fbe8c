//! Takes secrets out of what a server wrote, before it can reach a log or an error.

use std::fmt;

/// Shortest value that counts as a secret: shorter ones (`1`, `on`, `en`) stand in ordinary text everywhere.
const SECRET_BYTES_MIN: usize = 6;

/// The values that must not be shown.
#[derive(Clone, Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    /// Every one of `values` that is long enough to be a secret.
    pub(super) fn new<'a>(values: impl IntoIterator<Item = &'a String>) -> Self {
        let mut secrets: Vec<String> = values
            .into_iter()
            .filter(|value| value.len() >= SECRET_BYTES_MIN)
            .cloned()
            .collect();
        // A secret may be part of another: the longest goes first.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(secrets)
    }

    /// `text` with each secret replaced.
    pub(super) fn redact(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.0 {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), "***");
            }
        }
        text
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_replaced_longest_first() {
        let secrets = Secrets::new(&["abcdef".to_owned(), "abcdefgh".to_owned(), "on".to_owned()]);
        assert_eq!(secrets.redact("on abcdefgh abcdef"), "on *** ***");
        assert!(!format!("{secrets:?}").contains("abc"));
    }
}
