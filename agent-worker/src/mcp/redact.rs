//! Takes secrets out of what a server wrote, before it can reach a log or an error.

use std::fmt;

/// Shortest value that is replaced inside of words too. Shorter ones (`1`, `on`, `en`) stand in ordinary words
/// everywhere and are replaced only where they stand alone.
const INSIDE_WORDS_BYTES_MIN: usize = 4;
/// Shortest part of a value that counts as a secret by itself: a line that holds a brace tells nothing.
const PART_BYTES_MIN: usize = 4;
/// What stands in place of a secret.
const MASK: &str = "***";

/// The values that must not be shown.
#[derive(Clone, Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    /// Every one of `values`, and what may be quoted of it alone: its lines, what follows `=` or the first space, and
    /// of an address the path, the password and the query.
    pub(super) fn new<'a>(values: impl IntoIterator<Item = &'a String>) -> Self {
        let mut secrets = Vec::new();
        for value in values {
            secrets.push(value.trim().to_owned());
            let mut parts = parts_of(value);
            parts.retain(|part| part.len() >= PART_BYTES_MIN);
            secrets.append(&mut parts);
        }
        secrets.retain(|secret| !secret.is_empty());
        secrets.sort();
        secrets.dedup();
        Self(secrets)
    }

    /// The values of an environment or of headers, and `args` without those that are plainly none: names of options,
    /// and files of this machine.
    pub(super) fn of_command<'a>(
        args: &'a [String],
        values: impl IntoIterator<Item = &'a String>,
    ) -> Self {
        let args = args.iter().filter(|arg| may_be_secret(arg));
        Self::new(args.chain(values))
    }

    /// `text` with each secret replaced.
    pub(super) fn redact(&self, text: &str) -> String {
        self.redact_from(text, 0)
    }

    /// `text` from the byte `from` on with each secret replaced, also one that begins before.
    pub(super) fn redact_from(&self, text: &str, from: usize) -> String {
        let hidden = self.hidden(text);
        let mut shown = String::with_capacity(text.len().saturating_sub(from));
        let mut is_masked = false;
        for (at, character) in text.char_indices().filter(|(at, _)| *at >= from) {
            match hidden[at] {
                true if is_masked => {}
                true => shown.push_str(MASK),
                false => shown.push(character),
            }
            is_masked = hidden[at];
        }
        shown
    }

    /// Bytes of the longest.
    pub(super) fn longest(&self) -> usize {
        self.0.iter().map(String::len).max().unwrap_or(0)
    }

    /// Which bytes belong to a secret. Secrets may overlap.
    fn hidden(&self, text: &str) -> Vec<bool> {
        let mut hidden = vec![false; text.len()];
        for secret in &self.0 {
            for (at, found) in text.match_indices(secret.as_str()) {
                let range = at..at + found.len();
                if secret.len() >= INSIDE_WORDS_BYTES_MIN || stands_alone(text, &range) {
                    hidden[range].fill(true);
                }
            }
        }
        hidden
    }
}

/// What may be quoted of `value` alone.
fn parts_of(value: &str) -> Vec<String> {
    let mut parts: Vec<String> = value.lines().map(|line| line.trim().to_owned()).collect();
    for separator in ['=', ' '] {
        if let Some((_, rest)) = value.split_once(separator) {
            parts.push(rest.trim().to_owned());
        }
    }
    if let Ok(address) = reqwest::Url::parse(value)
        && address.has_host()
    {
        parts.push(address.to_string());
        parts.push(address.path().to_owned());
        parts.extend(address.password().map(str::to_owned));
        parts.extend(address.query().map(str::to_owned));
        let values = address.query_pairs().map(|(_, value)| value.into_owned());
        parts.extend(values);
    }
    parts
}

fn may_be_secret(arg: &str) -> bool {
    let is_option = arg.starts_with("--")
        && arg
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
        || arg.len() == 2 && arg.starts_with('-');
    let is_file = arg.starts_with('/') && std::path::Path::new(arg).exists();
    !is_option && !is_file
}

fn stands_alone(text: &str, range: &std::ops::Range<usize>) -> bool {
    let before = text[..range.start].chars().next_back();
    let after = text[range.end..].chars().next();
    ![before, after]
        .into_iter()
        .flatten()
        .any(char::is_alphanumeric)
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(values: &[&str]) -> Secrets {
        let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        Secrets::new(&values)
    }

    #[test]
    fn a_secret_within_another_leaves_nothing_of_it() {
        let secrets = secrets(&["abcdef", "abcdefgh"]);
        assert_eq!(secrets.redact("on abcdefgh abcdef"), "on *** ***");
        assert!(!format!("{secrets:?}").contains("abc"));
    }

    #[test]
    fn short_values_are_replaced_where_they_stand_alone() {
        let secrets = secrets(&["on", "12345", ""]);
        assert_eq!(
            secrets.redact("on pin=12345: not one"),
            "*** pin=***: not one"
        );
        assert_eq!(secrets.redact("pin12345x"), "pin***x");
    }

    #[test]
    fn each_line_and_each_part_of_a_value_is_a_secret() {
        let key = secrets(&[
            "-----BEGIN KEY-----\nfirsthalf\nsecondhalf\n",
            "Bearer hunter2",
        ]);
        assert_eq!(
            key.redact("bad line secondhalf of hunter2"),
            "bad line *** of ***"
        );
        let address = secrets(&["postgres://me:hunter2@db/x?key=hunter3&a=1"]);
        assert_eq!(
            address.redact("hunter2 or hunter3 fails"),
            "*** or *** fails"
        );
    }

    #[test]
    fn arguments_are_secrets_but_for_options_and_files() {
        let args = ["--token", "hunter2", "--key=hunter3", "-c", "/bin/sh"].map(str::to_owned);
        let secrets = Secrets::of_command(&args, []);
        let said = "/bin/sh -c --token hunter2 and hunter3";
        assert_eq!(secrets.redact(said), "/bin/sh -c --token *** and ***");
    }

    #[test]
    fn a_secret_that_begins_before_the_cut_is_replaced() {
        let secrets = secrets(&["hunter2"]);
        assert_eq!(secrets.redact_from("é hunter2 x", 6), "*** x");
        assert_eq!(secrets.redact_from("é", 1), "");
    }
}
