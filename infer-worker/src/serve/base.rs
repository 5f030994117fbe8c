//! The model that is served, as adapters name the one that they were made for.

use std::path::PathBuf;
use std::time::Duration;

use espalier_adapters::{AdaptersError, base_digest};
use espalier_core::adapter::BaseModel;
use espalier_core::error::shorten;
use espalier_runtime::tasks::{DeadlineExceeded, with_deadline};
use tokio::sync::OnceCell;

/// How long hashing its weights may take: the largest have some hundred GiB.
const DIGEST_LIMIT: Duration = Duration::from_secs(1800);

/// The model that is served.
pub(super) struct Base {
    /// What requests call it.
    pub(super) name: String,
    /// What whoever started the worker calls it: a folder, a repository, a place in a bucket.
    source: String,
    /// Where its files lie.
    folder: PathBuf,
    /// Their digest, once somebody asked for it.
    digest: OnceCell<String>,
}

/// Why the digest of its files is not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum DigestError {
    #[error("the served model cannot be hashed")]
    Files(#[from] AdaptersError),
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
}

impl Base {
    pub(super) fn new(name: &str, source: &str, folder: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            source: source.to_owned(),
            folder,
            digest: OnceCell::new(),
        }
    }

    /// Whether it is the one that a record names: by its digest, or by its name where the record has none. The first
    /// digest that is asked for reads all weights.
    pub(super) async fn is(&self, other: &BaseModel) -> Result<bool, DigestError> {
        if other.sha256.is_empty() {
            return Ok(self.is_called(&other.name));
        }
        let digest = self.digest.get_or_try_init(|| async {
            let digest = base_digest(&self.folder);
            let digest = with_deadline("infer.base_digest", DIGEST_LIMIT, digest).await??;
            Ok::<_, DigestError>(digest)
        });
        Ok(*digest.await? == other.sha256)
    }

    /// What speaks against an adapter that says it was made for `made_for`. Shapes were compared before: so this is a doubt
    /// and no refusal.
    pub(super) fn doubt(&self, made_for: Option<&str>) -> Option<String> {
        let made_for = made_for.filter(|name| !name.trim_matches('/').is_empty())?;
        if self.is_called(made_for) {
            return None;
        }
        Some(format!(
            "adapter_config.json says `base_model_name_or_path` is `{}`, and `{}` is served here: the shapes fit, but it \
             may have been made for another model",
            shorten(made_for),
            self.name
        ))
    }

    /// Copies and mirrors of a model have the last part of its name, more or less.
    fn is_called(&self, other: &str) -> bool {
        let own = [&self.name, &self.source];
        own.iter().any(|own| model_of(own) == model_of(other))
    }
}

/// The last part of a model's name or path. The hub's cache keeps it in the name of a folder further up.
fn model_of(path: &str) -> String {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let cached = parts
        .clone()
        .find_map(|part| part.strip_prefix("models--")?.rsplit("--").next());
    let last = cached.or(parts.next_back()).unwrap_or_default();
    last.to_lowercase()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn copies_of_a_model_are_no_other_model() {
        let base = Base::new("served", "s3://models/Qwen3-4B/", PathBuf::new());
        for same in [
            None,
            Some(""),
            Some("/"),
            Some("served"),
            Some("Qwen/Qwen3-4B"),
            Some("qwen3-4b"),
            Some("/home/me/models/Qwen3-4B/"),
            Some("/root/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7"),
        ] {
            assert_eq!(base.doubt(same), None, "{same:?}");
        }
        for other in [
            "Qwen/Qwen3-4B-Base",
            "Qwen/Qwen3-8B",
            "meta/llama",
            "Qwen3-4B/x",
        ] {
            let doubt = base.doubt(Some(other)).unwrap();
            assert!(
                doubt.contains(other) && doubt.contains("`served`"),
                "{doubt}"
            );
        }
    }

    #[tokio::test]
    async fn a_record_names_it_by_digest_or_else_by_name() {
        let folder = TempDir::new().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::write(folder.path().join(file), file).unwrap();
        }
        let digest = base_digest(folder.path()).await.unwrap();
        let base = Base::new("m", "Qwen/Qwen3-4B", folder.path().to_owned());
        for (name, sha256, expected) in [
            ("Qwen/Qwen3-4B", "", true),
            ("Qwen/Qwen3-8B", "", false),
            ("a-copy", digest.as_str(), true),
            // Another checkpoint under the same name.
            ("Qwen/Qwen3-4B", "9f86", false),
        ] {
            let record = BaseModel {
                name: name.to_owned(),
                revision: None,
                sha256: sha256.to_owned(),
            };
            assert_eq!(base.is(&record).await.unwrap(), expected, "{name} {sha256}");
        }
    }
}
