//! The body of `POST /v1/completions`, checked.

use serde_json::{Value, json};

use super::backend::Sampling;
use super::error::ApiError;
use super::fields::{Fields, ids};
use super::format::{self, Format};
use super::options::{CHOICES_MAX, Options, completion_logprobs};
use super::unserved;

/// A request to go on with texts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CompletionRequest {
    pub(super) options: Options,
    /// At least one; with `n` of each, at most as many answers as a request may have.
    pub(super) prompts: Vec<TextPrompt>,
    /// What binds the answers.
    pub(super) format: Option<Format>,
    /// Names of fields that mean nothing here.
    pub(super) ignored: String,
}

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TextPrompt {
    /// To be encoded.
    Text(String),
    /// Encoded already.
    Ids(Vec<u32>),
}

impl CompletionRequest {
    pub(super) fn parse(
        body: &[u8],
        defaults: &Sampling,
        vocabulary: u32,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut options = Options::take(&mut fields, defaults, vocabulary)?;
        options.sampling.logprobs = completion_logprobs(&mut fields)?;
        if fields.flag("echo")? == Some(true) {
            return Err(ApiError::field("echo", "must be false", &json!(true)));
        }
        if let Some(suffix) = fields.text("suffix")?.filter(|suffix| !suffix.is_empty()) {
            return Err(ApiError::field("suffix", "must be empty", &json!(suffix)));
        }
        let n = options.n as i64;
        let rule = format!("must be {n}, as `n` is");
        fields.whole("best_of", &rule, |best| best == n)?;
        let format = format::take(&mut fields)?;
        let prompts = prompts(&mut fields, vocabulary)?;
        unserved::refuse(&mut fields)?;
        let answers = prompts.len() * options.n;
        if answers as i64 > CHOICES_MAX {
            let message = format!(
                "`prompt` and `n` must ask for at most {CHOICES_MAX} answers, got {answers}"
            );
            return Err(ApiError::about("prompt", message));
        }
        Ok(Self {
            options,
            prompts,
            format,
            ignored: fields.ignored(),
        })
    }

    /// What the conversation begins with: all of it, for nothing says where a turn ends.
    pub(super) fn opening(&self) -> Vec<u8> {
        let bytes = |prompt: &TextPrompt| match prompt {
            TextPrompt::Text(text) => text.clone().into_bytes(),
            TextPrompt::Ids(ids) => bytes_of(ids),
        };
        self.prompts.iter().flat_map(bytes).collect()
    }
}

/// Ids as bytes, for hashing.
pub(super) fn bytes_of(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

fn prompts(fields: &mut Fields, vocabulary: u32) -> Result<Vec<TextPrompt>, ApiError> {
    let rule = "must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty";
    if let Some(ids) = fields
        .ids("prompt_token_ids", vocabulary)?
        .filter(|ids| !ids.is_empty())
    {
        return Ok(vec![TextPrompt::Ids(ids)]);
    }
    let prompt = fields.take("prompt");
    let refuse = |value: &Value| ApiError::field("prompt", rule, value);
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) if !text.is_empty() => Ok(TextPrompt::Text(text)),
        Value::Array(list) if !list.is_empty() => Ok(TextPrompt::Ids(ids(
            &list,
            &format!("prompt[{i}]"),
            vocabulary,
        )?)),
        other => Err(refuse(&other)),
    };
    match prompt {
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => {
            Ok(vec![TextPrompt::Ids(ids(&list, "prompt", vocabulary)?)])
        }
        Some(Value::Array(list)) if !list.is_empty() => {
            list.into_iter().enumerate().map(one).collect()
        }
        Some(text @ Value::String(_)) => Ok(vec![one((0, text))?]),
        other => Err(refuse(&other.unwrap_or_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::tests::defaults;
    use super::*;

    fn read(body: &Value) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::parse(body.to_string().as_bytes(), &defaults(), 1_000)
    }

    #[test]
    fn every_form_of_prompt_is_read() {
        let text = |text: &str| TextPrompt::Text(text.to_owned());
        for (prompt, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![TextPrompt::Ids(vec![1, 2])]),
            (
                json!([[1], [2, 3]]),
                vec![TextPrompt::Ids(vec![1]), TextPrompt::Ids(vec![2, 3])],
            ),
        ] {
            assert_eq!(read(&json!({"prompt": prompt})).unwrap().prompts, expected);
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (body, param) in [
            (json!({}), "prompt"),
            (json!({"prompt": ""}), "prompt"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": [1, "a"]}), "prompt[1]"),
            (json!({"prompt": [[1000]]}), "prompt[0][0]"),
            (json!({"prompt": vec!["a"; 3], "n": 50}), "prompt"),
            (json!({"prompt": "a", "echo": true}), "echo"),
            (json!({"prompt": "a", "suffix": "b"}), "suffix"),
            (json!({"prompt": "a", "best_of": 3}), "best_of"),
            (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
            (json!({"prompt": "a", "guided_regex": "b"}), "guided_regex"),
        ] {
            let error = read(&body).unwrap_err();
            assert_eq!(error.param(), Some(param), "{body}: {error}");
        }
    }
}
