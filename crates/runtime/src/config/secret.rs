//! Values that must not show up in logs, errors or dumps of a configuration.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Environment;

/// Largest secret, in bytes: a chain of certificates fits.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// What stands where the secret would.
const REDACTED: &str = "[redacted]";

/// A password, token or key. Read from a literal, from `{ file = "/run/secrets/key" }` (without the line end at its
/// end), or from `{ env = "OPENAI_API_KEY" }`, which works inside [`load`](super::load) only. Never empty.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<str>);

impl Secret {
    /// Takes a value that is known to be usable.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into().into())
    }

    /// What a file holds, without the line end at its end.
    ///
    /// # Errors
    /// It cannot be read, or holds nothing. The message names the file and never its content.
    pub fn of_file(file: &Path) -> Result<Self, String> {
        match read_secret_file(file)?.trim() {
            "" => Err(format!("file `{}` must not be empty", file.display())),
            value => Ok(Self::new(value)),
        }
    }

    /// The value itself. Callers hand it to the one thing that needs it and to nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A visitor of its own, because the messages of an untagged enum do not say what would be accepted.
        let source = Source::deserialize(deserializer).map_err(|_| {
            serde::de::Error::custom("must be text, `{ file = \"…\" }` or `{ env = \"NAME\" }`")
        })?;
        source.read().map_err(serde::de::Error::custom)
    }
}

#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Source {
    Literal(String),
    File { file: Box<Path> },
    Environment { env: String },
}

impl Source {
    /// The errors name the place and never its content.
    fn read(self) -> Result<Secret, String> {
        let value = match &self {
            Self::Literal(value) => value.clone(),
            Self::File { file } => read_secret_file(file)?,
            Self::Environment { env } => OFFERED.with_borrow(|offered| {
                let environment = offered
                    .as_ref()
                    .ok_or("`env` can be used in a process's configuration only")?;
                environment
                    .get(env)
                    .cloned()
                    .ok_or(format!("environment variable `{env}` is not set"))
            })?,
        };
        if value.is_empty() {
            return Err("must not be empty".to_owned());
        }
        Ok(Secret::new(value))
    }
}

fn read_secret_file(file: &Path) -> Result<String, String> {
    let fail = |error: std::io::Error| format!("file `{}` cannot be read: {error}", file.display());
    let mut text = String::new();
    File::open(file)
        .map_err(fail)?
        .take(SECRET_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(fail)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(format!(
            "file `{}` must be at most {SECRET_BYTES_MAX} bytes",
            file.display()
        ));
    }
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

thread_local! {
    /// The environment that `{ env = … }` reads from while a configuration is parsed. `Deserialize` has no way to
    /// be handed one, and reading the process's own here would go around the environment that `load` was given.
    static OFFERED: RefCell<Option<Environment>> = const { RefCell::new(None) };
}

/// Makes `environment` readable to secrets on this thread until the guard is dropped.
pub(super) fn offer_environment(environment: &Environment) -> Offered {
    OFFERED.set(Some(environment.clone()));
    Offered(PhantomData)
}

/// Bound to its thread.
pub(super) struct Offered(PhantomData<*const ()>);

impl Drop for Offered {
    fn drop(&mut self) {
        OFFERED.set(None);
    }
}
