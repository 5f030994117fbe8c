//! What looks like a key or a password, for whoever is about to show rows to others.
//!
//! Known forms only: what a person typed into a page and what a tool answered may be secret without looking so.

use regex::RegexSet;

/// What is looked for.
#[derive(Clone, Debug)]
pub struct Secrets {
    forms: RegexSet,
    /// Secrets of whoever looks; those are found in whatever form.
    own: Vec<String>,
}

/// Forms, and what each is called.
const FORMS: [(&str, &str); 9] = [
    ("a token of the Hugging Face hub", r"hf_[A-Za-z0-9]{30,}"),
    ("an access key of AWS", r"(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    (
        "a token of GitHub",
        r"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50})",
    ),
    ("a token of GitLab", r"glpat-[A-Za-z0-9_-]{20}"),
    ("a token of Slack", r"xox[abeprs]-[A-Za-z0-9-]{20}"),
    ("a key of Google", r"AIza[0-9A-Za-z_-]{35}"),
    ("a key of a model's API", r"sk-[A-Za-z0-9_-]{32}"),
    (
        "a private key",
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----",
    ),
    (
        "an address with a password",
        r#"[a-z][a-z0-9+.-]*://[^\s/:@"'<>]+:[^\s/:@"'<>]+@[A-Za-z0-9\[]"#,
    ),
];
/// They begin a word. Rows hold JSON in strings, in which a line ends with a letter.
const START: &str = r"(?:^|[^A-Za-z0-9_]|\\[nrt])";
const OWN: &str = "a secret of this terminal";
/// Shorter ones are in any text.
const OWN_BYTES_MIN: usize = 8;

impl Secrets {
    /// Known forms, and what is in `own`.
    ///
    /// # Errors
    /// Never, but for a mistake in a pattern.
    pub fn new(own: impl IntoIterator<Item = String>) -> Result<Self, regex::Error> {
        let own = own
            .into_iter()
            .filter(|secret| secret.len() >= OWN_BYTES_MIN);
        // Rows hold JSON in strings, in which quotes and backslashes are escaped, and strings of JSON in that.
        let forms = own.flat_map(|secret| {
            let once = escaped(&secret);
            [escaped(&once), once, secret]
        });
        Ok(Self {
            forms: RegexSet::new(FORMS.map(|(_, form)| format!("{START}{form}")))?,
            own: forms.collect(),
        })
    }

    /// What `text` seems to hold. The answer never has any of it.
    pub fn find(&self, text: &str) -> Option<&'static str> {
        if self.own.iter().any(|secret| text.contains(secret.as_str())) {
            return Some(OWN);
        }
        let found = self.forms.matches(text).iter().next()?;
        FORMS.get(found).map(|(name, _)| *name)
    }
}

/// As a string of JSON has it, without its quotes.
fn escaped(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_forms_are_found_and_other_text_is_not() {
        let secrets = Secrets::new(["my own secret".to_owned(), "short".to_owned()]).unwrap();
        // Put together here, so that nobody who searches the source for keys finds one.
        let long = "aB3".repeat(20);
        for (text, found) in [
            (
                format!("the token is hf_{long}."),
                Some("a token of the Hugging Face hub"),
            ),
            (
                format!("{{\\\"key\\\":\\\"AKIA{}\\\"}}", "ABCD".repeat(4)),
                Some("an access key of AWS"),
            ),
            (format!("a line\\nghp_{long}"), Some("a token of GitHub")),
            (format!("glpat-{long}"), Some("a token of GitLab")),
            (format!("xoxb-{long}"), Some("a token of Slack")),
            (format!("AIza{long}"), Some("a key of Google")),
            (format!("sk-{long}"), Some("a key of a model's API")),
            (
                format!("-----BEGIN RSA {}-----", "PRIVATE KEY"),
                Some("a private key"),
            ),
            (
                "postgres://shop:pass@db/x".to_owned(),
                Some("an address with a password"),
            ),
            ("it is my own secret!".to_owned(), Some(OWN)),
            (format!("task-{long}"), None),
            ("short, hf_ and sk-learn, AKIA".to_owned(), None),
            (
                "https://shop.example:8080/a@b mailto:me@example.org".to_owned(),
                None,
            ),
        ] {
            assert_eq!(secrets.find(&text), found, "{text}");
        }
    }
}
