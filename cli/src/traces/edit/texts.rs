//! Texts on the command line: the text itself, or a file that holds it.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use espalier_core::error::FieldError;
use espalier_core::trace::edits::TEXT_BYTES_MAX;

/// A text, `@FILE`, `@-` for standard input, or `@@…` for a text that begins with `@`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// The text.
    Given(String),
    /// A file's name.
    File(String),
    /// What standard input holds.
    Stdin,
}

impl FromStr for Text {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.strip_prefix('@') {
            None => Self::Given(text.to_owned()),
            Some("-") => Self::Stdin,
            Some(rest) if rest.starts_with('@') => Self::Given(rest.to_owned()),
            Some(file) => Self::File(file.to_owned()),
        })
    }
}

impl Text {
    /// The text. One that was read is without the line end at its end, which editors add.
    pub fn read(&self, field: &str) -> Result<String, FieldError> {
        match self {
            Self::Given(text) => Ok(text.clone()),
            Self::Stdin => read(field, "-", io::stdin().lock()),
            Self::File(name) => {
                let rule = |error: io::Error| format!("must be a file that can be read: {error}");
                let file = File::open(name).map_err(|e| FieldError::new(field, name, rule(e)))?;
                read(field, name, file)
            }
        }
    }
}

/// Reads a text of at most [`TEXT_BYTES_MAX`] bytes.
fn read(field: &str, name: &str, from: impl Read) -> Result<String, FieldError> {
    let refuse = |rule: String| FieldError::new(field, name, rule);
    let mut text = String::new();
    from.take(TEXT_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|error| refuse(format!("must be readable as UTF-8: {error}")))?;
    if text.len() > TEXT_BYTES_MAX {
        return Err(refuse(format!("must have at most {TEXT_BYTES_MAX} bytes")));
    }
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_given_or_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("answer.txt");
        std::fs::write(&file, "it is 5\n").unwrap();
        let read = |text: &str| text.parse::<Text>().unwrap().read("answer");
        assert_eq!(read("5").unwrap(), "5");
        assert_eq!(read("@@home").unwrap(), "@home");
        assert_eq!(read(&format!("@{}", file.display())).unwrap(), "it is 5");
        assert_eq!(read("@/not/there").unwrap_err().field, "answer");
        std::fs::write(&file, [0xff]).unwrap();
        let error = read(&format!("@{}", file.display())).unwrap_err();
        assert!(error.rule.contains("UTF-8"), "{error}");
    }
}
