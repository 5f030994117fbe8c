//! Reads out of a prompt what the user wants.
//!
//! The practice site's prompts quote their names and hold one address; the address says which part of the site they
//! are about.

use super::super::snapshot::path_of;

/// A prompt, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Goal {
    /// Where the task begins.
    pub url: String,
    pub want: Want,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Price {
        product: String,
    },
    Stock {
        product: String,
    },
    Ranked {
        category: String,
        dear: bool,
        rank: usize,
    },
    Count {
        category: String,
        max: String,
    },
    Booking(Entry),
    Row {
        column: String,
        largest: bool,
        rank: usize,
    },
    Account {
        user: String,
        password: String,
        field: String,
    },
    Notice {
        name: String,
    },
    /// The value of a term on the page itself.
    Fact {
        name: &'static str,
    },
}

/// What is to be booked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    pub guests: String,
    pub day: String,
    pub time: String,
}

impl Goal {
    pub(super) fn parse(prompt: &str) -> Option<Self> {
        let url = url_of(prompt)?;
        let quoted: Vec<&str> = prompt.split('"').skip(1).step_by(2).collect();
        let want = match path_of(&url).split('/').nth(1)? {
            "shop" => shop(prompt, &quoted)?,
            "booking" => booking(&quoted)?,
            "crew" => Want::Row {
                column: (*quoted.first()?).to_owned(),
                largest: prompt.contains("largest first"),
                rank: rank(prompt)?,
            },
            "login" => account(&quoted)?,
            "notices" => Want::Notice {
                name: (*quoted.first()?).to_owned(),
            },
            "slow" => Want::Fact { name: "Total" },
            "late" => Want::Fact { name: "Word" },
            _ => return None,
        };
        Some(Self { url, want })
    }
}

fn url_of(prompt: &str) -> Option<String> {
    let rest = &prompt[prompt.find("http")?..];
    let end = rest.find([' ', '\n', '"']).unwrap_or(rest.len());
    Some(rest[..end].trim_end_matches(['.', ',', '?']).to_owned())
}

fn shop(prompt: &str, quoted: &[&str]) -> Option<Want> {
    let first = (*quoted.first()?).to_owned();
    if prompt.contains("in stock") {
        return Some(Want::Stock { product: first });
    }
    if prompt.contains("cost at most") {
        return Some(Want::Count {
            category: first,
            max: (*quoted.get(1)?).to_owned(),
        });
    }
    if prompt.contains("by price") {
        return Some(Want::Ranked {
            category: first,
            dear: prompt.contains("dearest first"),
            rank: rank(prompt)?,
        });
    }
    Some(Want::Price { product: first })
}

fn booking(quoted: &[&str]) -> Option<Want> {
    let [name, guests, day, time] = quoted.get(..4)? else {
        return None;
    };
    Some(Want::Booking(Entry {
        name: (*name).to_owned(),
        guests: (*guests).to_owned(),
        day: (*day).to_owned(),
        time: (*time).to_owned(),
    }))
}

fn account(quoted: &[&str]) -> Option<Want> {
    let [user, password, field] = quoted.get(..3)? else {
        return None;
    };
    Some(Want::Account {
        user: (*user).to_owned(),
        password: (*password).to_owned(),
        field: (*field).to_owned(),
    })
}

/// The place that "is the third of" asks for, from 1.
fn rank(prompt: &str) -> Option<usize> {
    ["first", "second", "third", "fourth"]
        .iter()
        .position(|word| prompt.contains(&format!("is the {word} of")))
        .map(|place| place + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_practice::tasks::{Split, generate};

    #[test]
    fn every_prompt_of_the_practice_site_is_understood() {
        let mut kinds = std::collections::HashSet::new();
        for task in generate(7, 300, Split::Eval) {
            let prompts = match task["prompt"].as_array() {
                Some(turns) => turns.clone(),
                None => vec![task["prompt"].clone()],
            };
            for prompt in prompts {
                let prompt = prompt.as_str().unwrap();
                let prompt = prompt.replace("${site}", "http://localhost:4310");
                let goal = Goal::parse(&prompt).unwrap_or_else(|| panic!("{prompt}"));
                kinds.insert(std::mem::discriminant(&goal.want));
                assert!(!goal.url.ends_with(['?', '.', ',']), "{}", goal.url);
            }
        }
        assert_eq!(kinds.len(), 9);
    }

    #[test]
    fn other_prompts_are_not_understood() {
        assert_eq!(Goal::parse("What is the capital of France?"), None);
        assert_eq!(
            Goal::parse("Open http://localhost:4310/unknown please"),
            None
        );
    }
}
