//! Configuration: one TOML file and the environment, merged and parsed once into the process's own struct.
//!
//! Every key of the file can be set by a variable: the prefix, then the path of the key in capitals, with two
//! underscores where the file has a dot. With the prefix `ESPALIER_UP_`, `ESPALIER_UP_MODEL__NAME` is `model.name`
//! and `ESPALIER_UP_SLOTS` is `slots` at the top. The prefix is the process's own, so that what is set for one process
//! says nothing to another, nor to the clients, which read `ESPALIER_TOKEN` and the like. A value is read as TOML (`5`, `true`, `["a", "b"]`, `{ file = "/run/key" }`) and, where
//! that fails or does not fit the key, as plain text. The environment wins over the file. Keys with capitals or with
//! double underscores in them can only be set in the file.
//!
//! Unknown keys are refused wherever they come from, which needs `#[serde(deny_unknown_fields)]` on the structs.
//! This module knows no key of any process; `main` calls [`environment`] and [`load`] and nothing else reads either.

mod secret;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

pub use secret::Secret;

use espalier_core::error::shorten;

/// The variables of a process, read once.
pub type Environment = BTreeMap<String, String>;

/// The prefix of every variable that is ours.
pub const ENV_PREFIX: &str = "ESPALIER_";

/// What follows a process's prefix in the variable that names its file, and so is no key.
const FILE_SUFFIX: &str = "CONFIG";

/// Largest configuration file, in bytes: a thousand times what a person writes.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Why a configuration was refused. None of the messages holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("configuration file `{}` cannot be read", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too large to be a configuration.
    #[error("configuration file `{}` must be at most {FILE_BYTES_MAX} bytes, is {bytes}", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not TOML.
    #[error("configuration file `{}` is not valid TOML: {reason}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// The parser's message, with line and column but without the text of the line.
        reason: String,
    },
    /// A variable of ours has a name or a value that can mean no key.
    #[error("environment variable `{variable}` {rule}")]
    Variable {
        /// Its name.
        variable: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// A key that has no default is nowhere.
    #[error("`{key}` is missing: set it in {place}")]
    Missing {
        /// The path of the key, such as `model.base_url`.
        key: String,
        /// The file, and the variable that would do as well.
        place: String,
    },
    /// A key is unknown, or holds what it must not.
    #[error("`{key}` {rule}, got `{value}` (from {origin})")]
    Key {
        /// The path of the key, such as `model.base_url`.
        key: String,
        /// What it holds, shortened; `[redacted]` where the name of the key speaks of secrets.
        value: String,
        /// What would have been accepted.
        rule: String,
        /// The file or the variable that it came from.
        origin: String,
    },
}

/// Reads the process's environment, once, in `main`. Variables that are not UTF-8 are dropped, except ours, which
/// are refused.
pub fn environment() -> Result<Environment, ConfigError> {
    readable(std::env::vars_os())
}

fn readable(
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Environment, ConfigError> {
    let mut environment = Environment::new();
    for (name, value) in variables {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => {
                environment.insert(name, value);
            }
            (Ok(name), Err(_)) if name.starts_with(ENV_PREFIX) => {
                return Err(ConfigError::Variable {
                    variable: name,
                    rule: "must be UTF-8".to_owned(),
                });
            }
            _ => {}
        }
    }
    Ok(environment)
}

/// Parses `file`, overlays the variables of `environment` that begin with `prefix`, and reads the result as `T`.
/// Without a file, the variables and the defaults of `T` are all there is.
pub fn load<T: DeserializeOwned>(
    file: Option<&Path>,
    prefix: &str,
    environment: &Environment,
) -> Result<T, ConfigError> {
    let mut merged = match file {
        Some(file) => read_file(file)?,
        None => Table::new(),
    };
    let mut overlays = overlays(prefix, environment)?;
    for overlay in overlays.values() {
        overlay.apply(&mut merged)?;
    }
    let _readable = secret::offer_environment(environment);
    // Each round turns one variable from TOML to text, so there are at most as many rounds as variables.
    loop {
        let refused = match parse::<T>(&merged) {
            Ok(config) => return Ok(config),
            Err(refused) => refused,
        };
        let Some(overlay) = overlays
            .get_mut(&refused.key)
            .filter(|overlay| overlay.can_be_text())
        else {
            return Err(refused.into_error(&merged, file, prefix, &overlays));
        };
        overlay.value = Value::String(overlay.text.clone());
        overlay.apply(&mut merged)?;
    }
}

/// One key that a variable sets.
struct Overlay {
    variable: String,
    path: Vec<String>,
    text: String,
    value: Value,
}

impl Overlay {
    fn new(prefix: &str, variable: &str, text: &str) -> Result<Self, ConfigError> {
        let refuse = |rule: &str| ConfigError::Variable {
            variable: variable.to_owned(),
            rule: rule.to_owned(),
        };
        let suffix = &variable[prefix.len()..];
        if suffix.is_empty() || suffix.bytes().any(|byte| byte.is_ascii_lowercase()) {
            return Err(refuse("must be a key in capitals after the prefix"));
        }
        let path: Vec<String> = suffix.split("__").map(str::to_ascii_lowercase).collect();
        if path.iter().any(String::is_empty) {
            return Err(refuse("must have a key on each side of `__`"));
        }
        Ok(Self {
            variable: variable.to_owned(),
            path,
            text: text.to_owned(),
            value: read_value(text),
        })
    }

    /// Sets the key, making the tables on its path.
    fn apply(&self, root: &mut Table) -> Result<(), ConfigError> {
        let Some((last, parents)) = self.path.split_last() else {
            return Ok(());
        };
        let mut table = root;
        for parent in parents {
            table = table
                .entry(parent.clone())
                .or_insert_with(|| Value::Table(Table::new()))
                .as_table_mut()
                .ok_or_else(|| ConfigError::Variable {
                    variable: self.variable.clone(),
                    rule: format!("must name a key, but `{parent}` is a value and not a section"),
                })?;
        }
        table.insert(last.clone(), self.value.clone());
        Ok(())
    }

    fn can_be_text(&self) -> bool {
        !self.value.is_str()
    }
}

/// By the path of the key.
fn overlays(
    prefix: &str,
    environment: &Environment,
) -> Result<BTreeMap<String, Overlay>, ConfigError> {
    environment
        .iter()
        .filter(|(name, _)| name.starts_with(prefix))
        .filter(|(name, _)| name[prefix.len()..] != *FILE_SUFFIX)
        .map(|(name, text)| {
            let overlay = Overlay::new(prefix, name, text)?;
            Ok((overlay.path.join("."), overlay))
        })
        .collect()
}

/// A TOML value, or else the text itself. Text that would add keys of its own is text.
fn read_value(text: &str) -> Value {
    let parsed = format!("v = {text}").parse::<Table>();
    match parsed {
        Ok(mut table) if table.len() == 1 => table.remove("v"),
        _ => None,
    }
    .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn read_file(file: &Path) -> Result<Table, ConfigError> {
    let read_error = |source| ConfigError::Read {
        file: file.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(file).map_err(read_error)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge {
            file: file.to_owned(),
            bytes,
        });
    }
    let text = std::fs::read_to_string(file).map_err(read_error)?;
    text.parse::<Table>().map_err(|error| ConfigError::Syntax {
        file: file.to_owned(),
        reason: describe_syntax(&text, &error),
    })
}

/// Line, column and message. The parser's own rendering quotes the line, which may hold a secret.
fn describe_syntax(text: &str, error: &toml::de::Error) -> String {
    let Some(span) = error.span() else {
        return error.message().to_owned();
    };
    let before = text.get(..span.start).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("line {line}, column {column}: {}", error.message())
}

/// `text` with each `${NAME}` replaced by the variable of that name.
///
/// # Errors
/// The name that is not set.
pub fn expand(text: &str, environment: &Environment) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            break;
        };
        out.push_str(before);
        out.push_str(environment.get(name).ok_or_else(|| name.to_owned())?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// How the deserializer begins to say that a key is missing.
const MISSING_FIELD: &str = "missing field `";

/// A refusal of the merged table, before its value and origin are looked up.
struct Refused {
    key: String,
    message: String,
}

fn parse<T: DeserializeOwned>(merged: &Table) -> Result<T, Refused> {
    serde_path_to_error::deserialize(Value::Table(merged.clone())).map_err(|error| {
        let message = error.inner().message().to_owned();
        let mut key = error.path().to_string();
        // For a key that is unknown or missing the path may end at its parent; the message names it.
        let named = quoted_after(&message, "unknown field `")
            .or_else(|| quoted_after(&message, MISSING_FIELD));
        if let Some(name) = named
            && key.rsplit('.').next() != Some(name)
        {
            key = if key == "." {
                name.to_owned()
            } else {
                format!("{key}.{name}")
            };
        }
        Refused { key, message }
    })
}

impl Refused {
    fn into_error(
        self,
        merged: &Table,
        file: Option<&Path>,
        prefix: &str,
        overlays: &BTreeMap<String, Overlay>,
    ) -> ConfigError {
        if self.message.starts_with(MISSING_FIELD) {
            let mut place = file.map_or("a configuration file".to_owned(), |file| {
                format!("file {}", file.display())
            });
            // What stands in a list has no variable of its own.
            if !self.key.contains('[') {
                let path = self.key.to_uppercase().replace('.', "__");
                place = format!("{place}, or in environment variable {prefix}{path}");
            }
            let key = self.key;
            return ConfigError::Missing { key, place };
        }
        let secret = speaks_of_secrets(&self.key);
        let value = match lookup(merged, &self.key) {
            Some(_) if secret => "[redacted]".to_owned(),
            Some(value) => shorten(&value.to_string()),
            None => "nothing".to_owned(),
        };
        // These messages of the deserializer repeat the value, so a secret's is replaced.
        let repeats_value = ["invalid type", "invalid value", "unknown variant"]
            .iter()
            .any(|start| self.message.starts_with(start));
        let rule = if secret && repeats_value {
            "is refused: it does not hold what this key takes".to_owned()
        } else if self.message.starts_with("unknown field") {
            format!("is not known: {}", self.message)
        } else {
            format!("is refused: {}", self.message)
        };
        let origin = overlays
            .get(&self.key)
            .map(|overlay| format!("environment variable {}", overlay.variable))
            .or_else(|| file.map(|file| format!("file {}", file.display())))
            .unwrap_or_else(|| "the environment and the defaults".to_owned());
        ConfigError::Key {
            key: self.key,
            value,
            rule,
            origin,
        }
    }
}

fn quoted_after<'a>(message: &'a str, marker: &str) -> Option<&'a str> {
    let rest = &message[message.find(marker)? + marker.len()..];
    rest.split('`').next()
}

fn speaks_of_secrets(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key).to_ascii_lowercase();
    ["secret", "token", "password", "key", "credential"]
        .iter()
        .any(|word| last.contains(word))
}

/// Follows a path such as `a.b[2].c`.
fn lookup<'a>(root: &'a Table, path: &str) -> Option<&'a Value> {
    let mut steps = path
        .split(['.', '['])
        .map(|step| step.trim_end_matches(']'));
    let mut value = root.get(steps.next()?)?;
    for step in steps {
        value = match value {
            Value::Array(items) => items.get(step.parse::<usize>().ok()?)?,
            other => other.get(step)?,
        };
    }
    Some(value)
}

#[cfg(test)]
mod tests;
