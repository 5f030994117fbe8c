//! Exports: which version of an adapter goes where, and in what form.
//!
//! A spec holds no token: whoever does the job has one of its own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::check::Faults;
use crate::error::FieldError;
use crate::id::AdapterName;
use crate::layout::UploadName;

/// See [`ExportSpec`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportDraft {
    /// The version that goes out, as `NAME@vN`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Whether it goes out as a whole model in 16 bits; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merged: Option<bool>,
    /// The repository of the hub that it goes to, as `owner/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// Whether everybody may see the repository, if it is made; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public: Option<bool>,
    /// The folder among the project's uploads that it goes to, in place of a repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
}

/// A version of an adapter that goes out, valid in every field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// The version.
    pub adapter: AdapterRef,
    /// Whether as a whole model in 16 bits.
    pub merged: bool,
    /// Where to.
    pub to: ExportTarget,
}

/// Where a version goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportTarget {
    /// A repository of the hub.
    Hub {
        /// `owner/name`.
        repo: String,
        /// Whether everybody may see it, if it is made.
        public: bool,
    },
    /// A folder among the project's uploads.
    Uploads(UploadName),
}

impl fmt::Display for ExportTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repo, .. } => f.write_str(repo),
            Self::Uploads(folder) => write!(f, "uploads/{folder}"),
        }
    }
}

/// A version of an adapter, written `name@v3`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AdapterRef {
    /// The adapter.
    pub name: AdapterName,
    /// Its version, from 1.
    pub version: u32,
}

impl FromStr for AdapterRef {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let refuse = || FieldError::new("adapter", text, "must be NAME@vN, such as shop@v1");
        let (name, version) = text.split_once("@v").ok_or_else(refuse)?;
        let is_plain = version.bytes().all(|b| b.is_ascii_digit()) && !version.starts_with('0');
        let version = version.parse().ok().filter(|_| is_plain);
        Ok(Self {
            name: name.parse().map_err(|_| refuse())?,
            version: version.ok_or_else(refuse)?,
        })
    }
}

impl TryFrom<String> for AdapterRef {
    type Error = FieldError;

    fn try_from(text: String) -> Result<Self, FieldError> {
        text.parse()
    }
}

impl From<AdapterRef> for String {
    fn from(reference: AdapterRef) -> Self {
        reference.to_string()
    }
}

impl fmt::Display for AdapterRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@v{}", self.name, self.version)
    }
}

/// What came of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSummary {
    /// Where it is: a repository of the hub, or a folder of the object store.
    pub exported_to: String,
    /// The commit of the repository; absent for a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// How many files it has there.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
}

/// Whether `name` is `owner/name` of the characters that the hub allows, neither of which leads elsewhere.
pub fn is_hub_repo(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_step = |part: &str| {
        (1..=96).contains(&part.len()) && part.chars().all(plain) && !part.starts_with('.')
    };
    let parts: Vec<&str> = name.split('/').collect();
    parts.len() == 2 && parts.iter().all(|part| is_step(part))
}

impl ExportDraft {
    /// The job, or every rule that the draft breaks.
    pub(super) fn check(&self) -> Result<ExportSpec, Vec<FieldError>> {
        let mut faults = Faults::default();
        let adapter = self.adapter.as_deref().unwrap_or_default();
        let adapter = faults.keep("adapter", adapter.parse());
        let to = self.check_target(&mut faults);
        match (adapter, to) {
            (Some(adapter), Some(to)) => faults.or(ExportSpec {
                adapter,
                merged: self.merged.unwrap_or(false),
                to,
            }),
            _ => Err(faults.0),
        }
    }

    fn check_target(&self, faults: &mut Faults) -> Option<ExportTarget> {
        match (&self.repo, &self.folder) {
            (Some(repo), None) if is_hub_repo(repo) => Some(ExportTarget::Hub {
                repo: repo.clone(),
                public: self.public.unwrap_or(false),
            }),
            (Some(repo), None) => {
                faults.add("repo", repo, "must be `owner/name`, of A-Z a-z 0-9 . _ -");
                None
            }
            (None, Some(folder)) => {
                if let Some(public) = self.public {
                    faults.add("public", public, "must be absent where `folder` is given");
                }
                let folder = faults.keep("folder", UploadName::new(folder));
                folder.map(ExportTarget::Uploads)
            }
            (None, None) => {
                faults.add("repo", "", "must be given, or `folder`");
                None
            }
            (Some(_), Some(folder)) => {
                faults.add("folder", folder, "must be absent where `repo` is given");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::parse_line;
    use super::*;

    fn checked(line: &str) -> Result<ExportSpec, Vec<String>> {
        let job = parse_line(line.as_bytes()).unwrap().check();
        let job = job.map_err(|errors| errors.into_iter().map(|e| e.field).collect::<Vec<_>>())?;
        Ok(job.export().unwrap().clone())
    }

    #[test]
    fn an_export_names_a_version_and_a_place() {
        let spec = checked(r#"{"export":{"adapter":"shop@v3","merged":true,"repo":"me/shop"}}"#);
        let spec = spec.unwrap();
        assert_eq!(
            (spec.adapter.to_string(), spec.merged),
            ("shop@v3".to_owned(), true)
        );
        let to = ExportTarget::Hub {
            repo: "me/shop".to_owned(),
            public: false,
        };
        assert_eq!(spec.to, to, "private unless it is asked for");
        let spec = checked(r#"{"export":{"adapter":"shop@v3","folder":"out/shop"}}"#).unwrap();
        assert_eq!(spec.to.to_string(), "uploads/out/shop");
    }

    #[test]
    fn what_breaks_a_rule_is_named_by_field() {
        for (line, fields) in [
            (r#"{"export":{}}"#, &["export.adapter", "export.repo"][..]),
            (
                r#"{"export":{"adapter":"shop","repo":"me/x"}}"#,
                &["export.adapter"],
            ),
            (
                r#"{"export":{"adapter":"shop@v0","repo":"me/x"}}"#,
                &["export.adapter"],
            ),
            (
                r#"{"export":{"adapter":"a@v1","repo":"x"}}"#,
                &["export.repo"],
            ),
            (
                r#"{"export":{"adapter":"a@v1","repo":"../x"}}"#,
                &["export.repo"],
            ),
            (
                r#"{"export":{"adapter":"a@v1","folder":"../x"}}"#,
                &["export.folder"],
            ),
            (
                r#"{"export":{"adapter":"a@v1","folder":"x","public":true}}"#,
                &["export.public"],
            ),
            (
                r#"{"export":{"adapter":"a@v1","folder":"x","repo":"me/x"}}"#,
                &["export.folder"],
            ),
            (
                r#"{"export":{"adapter":"a@v1","repo":"me/x"},"prompt":"y"}"#,
                &["prompt"],
            ),
        ] {
            assert_eq!(checked(line).unwrap_err(), fields, "{line}");
        }
    }
}
