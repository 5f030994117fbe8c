//! A model's folder, but for its weights: configuration, tokenizer, chat template, and how it wants to be sampled.

use std::io;
use std::path::{Path, PathBuf};

use espalier_qwen3::{Config, ConfigError};
use espalier_qwen3_text::{ChatTemplate, Conversation, TemplateError, Tokenizer, TokenizerError};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::backend::Sampling;

/// Largest file that is read whole, in bytes: far more than templates and settings have.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Why a folder is no model that can be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file that is not the JSON that it should be.
    #[error("{file} is not what it should be")]
    Json {
        /// Which.
        file: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A value that breaks a rule.
    #[error("{file}: `{field}` {rule}, got {value}")]
    Field {
        /// Of which file.
        file: &'static str,
        /// Its name.
        field: &'static str,
        /// What it must be.
        rule: String,
        /// What it is.
        value: String,
    },
    /// A tokenizer of another kind.
    #[error("tokenizer.json cannot be used")]
    Tokenizer(#[source] TokenizerError),
    /// A template that cannot be used.
    #[error("the chat template of the model cannot be used")]
    Template(#[source] TemplateError),
}

/// What a model's folder says.
#[derive(Debug)]
pub struct ModelFiles {
    /// Where it is.
    pub folder: PathBuf,
    /// What its numbers mean.
    pub config: Config,
    /// Its own, or Qwen3's where it brings none.
    pub tokenizer: Tokenizer,
    /// How it reads conversations. None: as all of Qwen3 do.
    pub template: Option<ChatTemplate>,
    /// Ids that end its answers, the usual one first.
    pub eos: Vec<u32>,
    /// How it is sampled where a request leaves it open.
    pub sampling: Sampling,
}

impl ModelFiles {
    /// Reads and checks. Takes some tenths of a second.
    ///
    /// # Errors
    /// What is missing, broken, or of another kind of model.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let missing = |source| ModelError::Read { path, source };
        let text = read(folder, "config.json")?
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
            .map_err(missing)?;
        let mut config = Config::parse(&text)?;
        let tokenizer = Tokenizer::of_folder(folder).map_err(ModelError::Tokenizer)?;
        check_vocabulary(&config, &tokenizer)?;
        config.real_vocab_size = tokenizer.vocabulary() as usize;
        let own: Eos = parse("config.json", &text)?;
        let generation = read(folder, "generation_config.json")?;
        let generation: Generation = match &generation {
            Some(text) => parse("generation_config.json", text)?,
            None => Generation::default(),
        };
        let eos_token_id = generation
            .eos_token_id
            .as_ref()
            .or(own.eos_token_id.as_ref());
        Ok(Self {
            folder: folder.to_owned(),
            template: template(folder)?,
            eos: eos(eos_token_id, &tokenizer)?,
            sampling: generation.sampling()?,
            tokenizer,
            config,
        })
    }

    /// Its chat template.
    pub fn template(&self) -> &ChatTemplate {
        self.template
            .as_ref()
            .unwrap_or_else(|| ChatTemplate::qwen3())
    }
}

/// Text of a file; none if there is none.
fn read(folder: &Path, file: &str) -> Result<Option<String>, ModelError> {
    let path = folder.join(file);
    let read = || {
        let bytes = std::fs::metadata(&path)?.len();
        if bytes > FILE_BYTES_MAX {
            let rule = format!("must have at most {FILE_BYTES_MAX} bytes, has {bytes}");
            return Err(io::Error::other(rule));
        }
        std::fs::read_to_string(&path)
    };
    match read() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::Read { path, source }),
    }
}

fn parse<T: for<'de> Deserialize<'de>>(file: &'static str, text: &str) -> Result<T, ModelError> {
    serde_json::from_str(text).map_err(|source| ModelError::Json { file, source })
}

/// Ids that the tokenizer gives must have rows in the embedding.
fn check_vocabulary(config: &Config, tokenizer: &Tokenizer) -> Result<(), ModelError> {
    let needed = tokenizer.vocabulary() as usize;
    if config.vocab_size >= needed {
        return Ok(());
    }
    let whose = match tokenizer.is_qwen3() {
        true => "Qwen3's",
        false => "the model's",
    };
    Err(ModelError::Field {
        file: "config.json",
        field: "vocab_size",
        rule: format!("must be at least {needed}, which is what {whose} tokenizer has"),
        value: config.vocab_size.to_string(),
    })
}

fn template(folder: &Path) -> Result<Option<ChatTemplate>, ModelError> {
    let source = match read(folder, "chat_template.jinja")? {
        Some(source) => Some(source),
        None => template_of_tokenizer(folder)?,
    };
    let Some(source) = source else {
        return Ok(None);
    };
    let template = ChatTemplate::parse(&source).map_err(ModelError::Template)?;
    let hello = Conversation {
        messages: vec![json!({"role": "user", "content": "hello"})],
        add_generation_prompt: true,
        ..Conversation::default()
    };
    template.prompt(&hello).map_err(ModelError::Template)?;
    Ok(Some(template))
}

/// Older folders have it as a field: the text, or a list of named texts.
fn template_of_tokenizer(folder: &Path) -> Result<Option<String>, ModelError> {
    const FILE: &str = "tokenizer_config.json";
    let Some(text) = read(folder, FILE)? else {
        return Ok(None);
    };
    let fields: Value = parse(FILE, &text)?;
    let named = |list: &Vec<Value>| {
        let default = list.iter().find(|entry| entry["name"] == "default");
        default.and_then(|entry| entry["template"].as_str().map(str::to_owned))
    };
    Ok(match &fields["chat_template"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => named(list),
        _ => None,
    })
}

#[derive(Deserialize)]
struct Eos {
    eos_token_id: Option<Value>,
}

/// The fields that vLLM takes from it too.
#[derive(Default, Deserialize)]
struct Generation {
    eos_token_id: Option<Value>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

/// One id or a list of them.
fn eos(value: Option<&Value>, tokenizer: &Tokenizer) -> Result<Vec<u32>, ModelError> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(vec![tokenizer.ids().turn_close]);
    };
    let list = match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    let id = |value: &Value| {
        value
            .as_u64()
            .filter(|id| *id < tokenizer.vocabulary().into())
    };
    let known: Option<Vec<u32>> = list
        .iter()
        .map(|value| id(value).map(|id| id as u32))
        .collect();
    known
        .filter(|known| !known.is_empty())
        .ok_or_else(|| ModelError::Field {
            file: "generation_config.json",
            field: "eos_token_id",
            rule: "must be an id of the vocabulary, or a list of such ids".to_owned(),
            value: value.to_string(),
        })
}

impl Generation {
    fn sampling(&self) -> Result<Sampling, ModelError> {
        let number =
            |field, value: Option<f32>, default, rule: &str, holds: fn(f32) -> bool| match value {
                None => Ok(default),
                Some(value) if holds(value) => Ok(value),
                Some(value) => Err(ModelError::Field {
                    file: "generation_config.json",
                    field,
                    rule: rule.to_owned(),
                    value: value.to_string(),
                }),
            };
        let (unit, positive) = ("must be in (0, 1]", "must be above 0");
        Ok(Sampling {
            temperature: number(
                "temperature",
                self.temperature,
                1.0,
                "must be 0 or more",
                |t| t.is_finite() && t >= 0.0,
            )?,
            top_p: number("top_p", self.top_p, 1.0, unit, |p| p > 0.0 && p <= 1.0)?,
            top_k: self.top_k.map_or(0, |k| u32::try_from(k).unwrap_or(0)),
            min_p: number("min_p", self.min_p, 0.0, "must be in [0, 1]", |p| {
                (0.0..=1.0).contains(&p)
            })?,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: number(
                "repetition_penalty",
                self.repetition_penalty,
                1.0,
                positive,
                |p| p.is_finite() && p > 0.0,
            )?,
            bias: Vec::new(),
            seed: 0,
            logprobs: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const CONFIG: &str = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "rope_theta": 1000000, "max_position_embeddings": 64, "eos_token_id": 151645}"#;

    fn folder(files: &[(&str, &str)]) -> TempDir {
        let folder = TempDir::new().unwrap();
        for (file, text) in files {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        folder
    }

    fn refused(files: &[(&str, &str)]) -> String {
        let error = ModelFiles::read(folder(files).path()).unwrap_err();
        espalier_runtime::telemetry::error_chain(&error)
    }

    #[test]
    fn sampling_and_ends_are_the_models() {
        let generation =
            r#"{"eos_token_id": [151645, 151643], "temperature": 0.6, "top_k": 20, "top_p": 0.95}"#;
        let folder = folder(&[
            ("config.json", CONFIG),
            ("generation_config.json", generation),
        ]);
        let files = ModelFiles::read(folder.path()).unwrap();
        assert_eq!(files.eos, [151_645, 151_643]);
        let sampling = &files.sampling;
        assert_eq!(
            (sampling.temperature, sampling.top_k, sampling.top_p),
            (0.6, 20, 0.95)
        );
        assert_eq!((sampling.min_p, sampling.repetition_penalty), (0.0, 1.0));
        assert!(files.template.is_none());
    }

    #[test]
    fn the_template_of_the_folder_is_used() {
        let of_config = r#"{"chat_template": "A{{ messages[0].content }}"}"#;
        let files = [
            ("config.json", CONFIG),
            ("tokenizer_config.json", of_config),
        ];
        let read = |files: &[(&str, &str)]| {
            let files = ModelFiles::read(folder(files).path()).unwrap();
            let hello = Conversation {
                messages: vec![json!({"role": "user", "content": "x"})],
                ..Conversation::default()
            };
            files.template().render(&hello).unwrap()
        };
        assert_eq!(read(&files), "Ax");
        let own = ("chat_template.jinja", "B{{ messages[0].content }}");
        assert_eq!(read(&[files[0], files[1], own]), "Bx");
    }

    #[test]
    fn what_is_wrong_is_said_with_file_field_and_rule() {
        for (files, words) in [
            (vec![], "cannot read"),
            (vec![("config.json", "{")], "config.json is not JSON"),
            (
                vec![("config.json", r#"{"model_type": "llama"}"#)],
                "`model_type` must be \"qwen3\" or \"qwen3_moe\", got \"llama\"",
            ),
            (
                vec![
                    ("config.json", CONFIG),
                    ("generation_config.json", r#"{"top_p": 0}"#),
                ],
                "generation_config.json: `top_p` must be in (0, 1], got 0",
            ),
            (
                vec![
                    ("config.json", CONFIG),
                    ("generation_config.json", r#"{"eos_token_id": "x"}"#),
                ],
                "`eos_token_id` must be an id",
            ),
            (
                vec![("config.json", CONFIG), ("chat_template.jinja", "{% if %}")],
                "chat template does not parse",
            ),
            (
                vec![("config.json", CONFIG), ("tokenizer.json", "{}")],
                "tokenizer.json cannot be used: it is no tokenizer of byte pairs: ",
            ),
        ] {
            let error = refused(&files);
            assert!(error.contains(words), "{files:?}: {error}");
        }
        let small = CONFIG.replace("151936", "512");
        let error = refused(&[("config.json", &small)]);
        assert!(
            error.contains("`vocab_size` must be at least 151669"),
            "{error}"
        );
    }

    #[test]
    fn a_model_may_bring_its_own_tokenizer() {
        const SMALL: &str =
            include_str!("../../crates/qwen3-text/tests/golden/small/tokenizer.json");
        let config = |rows: &str, eos: &str| {
            let config = CONFIG.replace("151936", rows);
            config.replace(", \"eos_token_id\": 151645", eos)
        };
        let read = |config: &str| {
            let files = [("config.json", config), ("tokenizer.json", SMALL)];
            ModelFiles::read(folder(&files).path())
        };
        let files = read(&config("2112", "")).unwrap();
        assert_eq!(files.tokenizer.vocabulary(), 2100);
        let (rows, ids) = (files.config.vocab_size, files.config.real_vocab_size);
        assert_eq!((rows, ids), (2112, 2100));
        assert_eq!(files.eos, [23], "`<|im_end|>`");
        let files = read(&config("2100", ", \"eos_token_id\": [25]")).unwrap();
        assert_eq!(files.eos, [25]);
        for (rows, eos, words) in [
            (
                "2099",
                "",
                "`vocab_size` must be at least 2100, which is what the model's tokenizer has, got 2099",
            ),
            (
                "2112",
                ", \"eos_token_id\": 2100",
                "`eos_token_id` must be an id of the vocabulary",
            ),
        ] {
            let error = read(&config(rows, eos)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
