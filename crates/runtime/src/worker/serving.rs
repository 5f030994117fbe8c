//! What a worker serves to others, and what may be said of it: workers keep to the rules that coordinators check.

use std::collections::BTreeMap;

use espalier_core::error::FieldError;
use espalier_proto::v1;
use tonic::transport::Uri;

/// Longest text, in bytes.
const TEXT_BYTES_MAX: usize = 1_024;
/// Most models of one worker, as the protocol says.
const MODELS_MAX: usize = 256;
/// Most bytes of the names of one worker's models: what coordinators show each other of a worker is bounded.
const MODELS_BYTES_MAX: usize = 32 * 1024;

/// What a worker serves to others, over HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serving {
    /// Up to and including the version, as other workers reach it; without credentials.
    pub url: String,
    /// What requests call the models, adapters among them.
    pub models: Vec<String>,
    /// Name of the key in the configuration of those who ask.
    pub api_key_name: Option<String>,
    /// Of models that are of one project, as adapters of its store are: the project.
    pub projects: BTreeMap<String, String>,
}

impl Serving {
    pub(super) fn to_wire(&self) -> v1::Serving {
        v1::Serving {
            url: self.url.clone(),
            models: self.models.clone(),
            api_key_name: self.api_key_name.clone().unwrap_or_default(),
            projects: self.projects.clone(),
        }
    }

    /// Reads a message.
    #[must_use]
    pub fn from_wire(serving: v1::Serving) -> Self {
        Self {
            url: serving.url,
            models: serving.models,
            api_key_name: Some(serving.api_key_name).filter(|name| !name.is_empty()),
            projects: serving.projects,
        }
    }

    /// Checks what coordinators check before they tell others. Without models there is nothing to check.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn check(&self) -> Result<(), FieldError> {
        if self.models.is_empty() {
            return Ok(());
        }
        if self.models.len() > MODELS_MAX {
            let rule = format!("must have at most {MODELS_MAX} entries");
            return Err(FieldError::new("models", self.models.len(), rule));
        }
        for (i, model) in self.models.iter().enumerate() {
            check_text(&format!("models[{i}]"), model)?;
        }
        if let Some(name) = &self.api_key_name {
            check_text("api_key_name", name)?;
        }
        for (model, project) in &self.projects {
            if !self.models.contains(model) {
                let rule = "must be one of `models`";
                return Err(FieldError::new("projects", model, rule));
            }
            check_text("projects", project)?;
        }
        let all = self.models.iter();
        let all = all.chain(
            self.projects
                .iter()
                .flat_map(|(model, project)| [model, project]),
        );
        let bytes: usize = all.map(String::len).sum();
        if bytes > MODELS_BYTES_MAX {
            let rule = format!("must have at most {MODELS_BYTES_MAX} bytes together");
            return Err(FieldError::new("models", format!("{bytes} bytes"), rule));
        }
        check_url(&self.url)
    }
}

/// Checks a name that goes to every worker.
///
/// # Errors
/// It is empty, too long, or holds control characters.
pub fn check_text(field: &str, text: &str) -> Result<(), FieldError> {
    let is_good = !text.is_empty() && text.len() <= TEXT_BYTES_MAX;
    if is_good && !text.contains(char::is_control) {
        return Ok(());
    }
    let rule = format!("must be printable text of 1..={TEXT_BYTES_MAX} bytes");
    Err(FieldError::new(field, text, rule))
}

/// Checks the address of an endpoint, which goes to every worker and into their logs.
///
/// # Errors
/// It is no address, or holds credentials; the error does not repeat them.
pub fn check_url(url: &str) -> Result<(), FieldError> {
    let uri = url.parse::<Uri>().ok();
    let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
    let authority = uri.as_ref().and_then(|uri| uri.authority());
    let Some(authority) = authority.filter(|_| url.len() <= TEXT_BYTES_MAX) else {
        let rule = "must be `http://host:port/v1` or `https://…`";
        return Err(FieldError::new("url", "what is written", rule));
    };
    if authority.as_str().contains('@') || url.contains('?') {
        let rule = "must hold no credentials and no query: use `api_key_name`";
        return Err(FieldError::new("url", "[redacted]", rule));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(models: &[&str]) -> Serving {
        Serving {
            url: "http://10.0.0.9:8000/v1".to_owned(),
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            api_key_name: None,
            projects: BTreeMap::new(),
        }
    }

    #[test]
    fn what_a_worker_serves_is_checked() {
        serving(&["qwen3"]).check().unwrap();
        Serving::default().check().unwrap();
        let long = "m".repeat(1_000);
        for (wrong, field) in [
            (serving(&["m"; 257]), "models"),
            (serving(&[long.as_str(); 40]), "models"),
            (serving(&["m", ""]), "models[1]"),
            (
                Serving {
                    url: "http://me:hunter2@a/v1".to_owned(),
                    ..serving(&["m"])
                },
                "url",
            ),
            (
                Serving {
                    url: "10.0.0.7:8000/v1".to_owned(),
                    ..serving(&["m"])
                },
                "url",
            ),
        ] {
            let error = wrong.check().unwrap_err();
            assert_eq!(error.field, field);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
