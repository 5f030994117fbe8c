//! What `--follow` names.

use std::fmt;
use std::str::FromStr;

use espalier_core::id::{AdapterName, ProjectId};

/// The project of adapters that are named without one.
const PROJECT_DEFAULT: &str = "default";
/// All adapters of a project.
const ALL: &str = "*";

/// What is followed: `NAME`, `PROJECT/NAME`, `*` or `PROJECT/*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// The project.
    pub project: ProjectId,
    /// Its adapters.
    pub which: Which,
}

/// Which adapters of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// This one, which requests call the same.
    One(AdapterName),
    /// All that were trained on the model that is served.
    All,
}

impl Followed {
    /// Its name, where it is one adapter.
    #[must_use]
    pub fn name(&self) -> Option<&AdapterName> {
        match &self.which {
            Which::One(name) => Some(name),
            Which::All => None,
        }
    }
}

impl FromStr for Followed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (project, name) = text.split_once('/').unwrap_or((PROJECT_DEFAULT, text));
        let which = match name {
            ALL => Some(Which::All),
            name => name.parse().ok().map(Which::One),
        };
        let both = project.parse().ok().zip(which);
        let rule = || "must be NAME, PROJECT/NAME, `*` or PROJECT/*".to_owned();
        let (project, which) = both.ok_or_else(rule)?;
        Ok(Self { project, which })
    }
}

impl fmt::Display for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().map_or(ALL, AdapterName::as_str);
        write!(f, "{}/{name}", self.project)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_followed_is_named_with_its_project_or_without() {
        let read = |text: &str| text.parse::<Followed>().map(|f| f.to_string());
        for (text, expected) in [
            ("shop", "default/shop"),
            ("p/shop", "p/shop"),
            ("*", "default/*"),
            ("p/*", "p/*"),
        ] {
            assert_eq!(read(text), Ok(expected.to_owned()));
        }
        for bad in [
            "", "/", "p/", "/shop", "a/b/c", "a b", "*/shop", "sh*", "**",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
