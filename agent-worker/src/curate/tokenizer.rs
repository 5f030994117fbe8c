//! The tokenizer of a data set: Qwen3's, or the one that a model brings.

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::spec::CurateSpec;
use espalier_qwen3_text::{TOKENIZER_BYTES_MAX, Tokenizer, TokenizerError};
use espalier_runtime::fetch::{FetchError, Fetcher, Source, Wanted};
use espalier_runtime::tasks::blocking;

use super::error::CurateError;

/// Where tokenizers come from.
pub(super) struct Tokenizers {
    pub(super) fetcher: Fetcher,
    /// Whether jobs may name folders of this machine.
    pub(super) allow_folders: bool,
}

/// What tokens of a data set mean.
pub(super) struct Tokens {
    pub(super) tokenizer: Tokenizer,
    /// Its file, which belongs to the data set; none where everybody has it.
    pub(super) file: Option<Bytes>,
}

impl Tokenizers {
    /// The tokenizer that a job names.
    pub(super) async fn of(&self, curate: &CurateSpec) -> Result<Tokens, CurateError> {
        let Some(name) = &curate.tokenizer else {
            let shared = || Tokenizer::shared().cloned().map_err(TokenizerError::Own);
            let tokenizer = blocking("tokenizer.load", shared).await??;
            let file = None;
            return Ok(Tokens { tokenizer, file });
        };
        let source = Source::parse(name, None).await?;
        if matches!(source, Source::Folder(_)) && !self.allow_folders {
            let rule = "must be a repository of the hub or s3://…: this worker reads no folders (`allow_base_folders`)";
            return Err(FieldError::new("curate.tokenizer", name, rule).into());
        }
        let wanted = Wanted::Tokenizer {
            bytes_max: TOKENIZER_BYTES_MAX,
        };
        let folder = self.fetcher.fetch(&source, wanted).await?;
        let read = move || -> Result<_, CurateError> {
            let missing = || FetchError::Missing {
                place: folder.display().to_string(),
                file: "tokenizer.json".to_owned(),
            };
            let json = Tokenizer::file_of(&folder)?.ok_or_else(missing)?;
            let tokenizer = Tokenizer::from_json(&json)?;
            let file = (!tokenizer.is_qwen3()).then(|| Bytes::from(json));
            Ok(Tokens { tokenizer, file })
        };
        blocking("tokenizer.load", read).await?
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use espalier_core::error::ErrorClass;
    use espalier_core::spec::parse_line;
    use espalier_runtime::config::Environment;
    use espalier_runtime::telemetry::error_chain;

    use super::*;

    const SMALL: &str =
        include_str!("../../../crates/qwen3-text/tests/golden/small/tokenizer.json");

    async fn of(tokenizer: Option<&Path>, allow_folders: bool) -> Result<Tokens, CurateError> {
        let tokenizer = tokenizer.map(|name| format!(",\"tokenizer\":{name:?}"));
        let more = tokenizer.unwrap_or_default();
        let line = format!(r#"{{"curate":{{"batches":["b"],"dataset":"d"{more}}}}}"#);
        let job = parse_line(line.as_bytes()).unwrap().check().unwrap();
        let tokenizers = Tokenizers {
            fetcher: Fetcher::new(&Environment::default(), None),
            allow_folders,
        };
        tokenizers.of(job.curate().unwrap()).await
    }

    async fn refused(folder: &Path, allow_folders: bool) -> String {
        let refused = of(Some(folder), allow_folders).await;
        let Err(error) = refused else {
            panic!("{} is taken", folder.display());
        };
        assert_eq!(error.class(), ErrorClass::Invalid);
        error_chain(&error)
    }

    #[tokio::test]
    async fn only_a_tokenizer_that_not_everybody_has_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let qwen3 = of(None, false).await.unwrap();
        assert!(qwen3.tokenizer.is_qwen3() && qwen3.file.is_none());
        std::fs::write(folder.path().join("tokenizer.json"), SMALL).unwrap();
        let small = of(Some(folder.path()), true).await.unwrap();
        assert_eq!(small.tokenizer.vocabulary(), 2100);
        assert_eq!(small.file.unwrap(), SMALL);
    }

    #[tokio::test]
    async fn what_cannot_be_a_tokenizer_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let said = refused(folder.path(), false).await;
        assert!(
            said.starts_with("`curate.tokenizer` must be a repository of the hub or s3://…"),
            "{said}"
        );
        let said = refused(folder.path(), true).await;
        assert!(said.contains("has no tokenizer.json"), "{said}");
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        let said = refused(folder.path(), true).await;
        assert!(
            said.starts_with("the tokenizer cannot be used: it is no tokenizer of byte pairs: "),
            "{said}"
        );
    }
}
