//! Identifiers. Each is a newtype whose only way in is a check, so that a name which came from a client can stand
//! in an object path, a log line or a file name without further thought.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::FieldError;

/// Longest name of any identifier, in bytes: it becomes a path segment, and file systems stop at 255.
pub const NAME_BYTES_MAX: usize = 128;

fn check_name(field: &str, value: &str) -> Result<(), FieldError> {
    let first_ok = value
        .as_bytes()
        .first()
        .is_some_and(u8::is_ascii_alphanumeric);
    let rest_ok = value
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if value.len() <= NAME_BYTES_MAX && first_ok && rest_ok {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        value,
        format!(
            "must be 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ - and begin with a letter or a digit"
        ),
    ))
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Box<str>);

        impl $type {
            /// Checks `value` against the rule of names.
            pub fn new(value: impl AsRef<str>) -> Result<Self, FieldError> {
                check_name($field, value.as_ref())?;
                Ok(Self(value.as_ref().into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = FieldError;
            fn from_str(value: &str) -> Result<Self, FieldError> {
                Self::new(value)
            }
        }

        impl TryFrom<String> for $type {
            type Error = FieldError;
            fn try_from(value: String) -> Result<Self, FieldError> {
                Self::new(value)
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.0.into()
            }
        }
    };
}

name_type!(
    /// A project, which is also the tenant that fairness and access are about.
    ProjectId, "project"
);
name_type!(
    /// A batch of jobs; unique within its project.
    BatchId, "batch"
);
name_type!(
    /// A job; unique within its batch, chosen by the client or given by the coordinator.
    JobId, "id"
);
name_type!(
    /// One worker process. A restarted process has a new id.
    WorkerId, "worker"
);
name_type!(
    /// One coordinator process. A restarted process has a new id.
    CoordinatorId, "coordinator"
);

name_type!(
    /// A data set; unique within its project. Its versions count from 1.
    DatasetName, "dataset"
);
name_type!(
    /// An adapter, or a whole model that was trained; unique within its project. Its versions count from 1.
    AdapterName, "adapter"
);
name_type!(
    /// A pipeline; unique within its project. Its adapter and its data set have the same name.
    PipelineName, "pipeline"
);

/// The full name of a job: `project/batch/job`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobKey {
    /// The tenant.
    pub project: ProjectId,
    /// The batch that the job belongs to.
    pub batch: BatchId,
    /// The job within its batch.
    pub job: JobId,
}

impl JobKey {
    /// Joins three checked names.
    pub fn new(project: ProjectId, batch: BatchId, job: JobId) -> Self {
        Self {
            project,
            batch,
            job,
        }
    }
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.project, self.batch, self.job)
    }
}

impl FromStr for JobKey {
    type Err = FieldError;

    fn from_str(value: &str) -> Result<Self, FieldError> {
        let mut parts = value.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(project), Some(batch), Some(job), None) => Ok(Self {
                project: project.parse()?,
                batch: batch.parse()?,
                job: job.parse()?,
            }),
            _ => Err(FieldError::new(
                "job",
                value,
                "must have the form project/batch/job",
            )),
        }
    }
}

impl TryFrom<String> for JobKey {
    type Error = FieldError;
    fn try_from(value: String) -> Result<Self, FieldError> {
        value.parse()
    }
}

impl From<JobKey> for String {
    fn from(value: JobKey) -> String {
        value.to_string()
    }
}

/// The number of a lease. Fences only grow, over every job of a queue, so that of two holders of one job the later
/// one is known by comparison alone.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Fence(pub u64);

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_path_segments() {
        for good in ["a", "0", "shop-1.v2_x", &"a".repeat(NAME_BYTES_MAX)] {
            assert!(JobId::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "ä",
            "a\n",
            &"a".repeat(NAME_BYTES_MAX + 1),
        ] {
            assert!(JobId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_job_key_reads_back_what_it_writes() {
        let key: JobKey = "shop/b1/j1".parse().unwrap();
        assert_eq!(key.to_string().parse::<JobKey>().unwrap(), key);
        for bad in ["shop/b1", "shop/b1/j1/x", "shop//j1", "/b/j"] {
            assert!(bad.parse::<JobKey>().is_err(), "{bad}");
        }
    }
}
