//! Reading a table so that one mistake hides no other: each key is tried by itself, and all that is wrong is named. Pure.

use espalier_core::error::FieldError;
use espalier_core::spec::from_value;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::submit::suggest;

/// Keys and values of a section.
pub type Section = Map<String, Value>;

/// What is wrong with a file and with the files that it names.
#[derive(Debug, Default)]
pub struct Faults(pub Vec<Fault>);

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The line of a file of tasks, as `tasks.jsonl:3`; empty: the pipeline's own file.
    pub place: String,
    /// What is wrong there.
    pub error: FieldError,
}

impl Faults {
    /// Adds one of the pipeline's own file.
    pub fn add(&mut self, error: FieldError) {
        self.add_at(String::new(), error);
    }

    /// Adds one at a place, once.
    pub fn add_at(&mut self, place: String, error: FieldError) {
        let fault = Fault { place, error };
        if !self.0.contains(&fault) {
            self.0.push(fault);
        }
    }

    /// Whether something is wrong with this field of the pipeline's own file.
    pub fn has(&self, field: &str) -> bool {
        let mut own = self.0.iter().filter(|fault| fault.place.is_empty());
        own.any(|fault| fault.error.field == field)
    }

    /// Keeps what is right.
    pub fn keep<T>(&mut self, result: Result<T, FieldError>) -> Option<T> {
        result.map_err(|error| self.add(error)).ok()
    }

    /// `value` in `range`, or `default` where there is none.
    pub fn number(
        &mut self,
        field: &str,
        value: Option<i64>,
        range: std::ops::RangeInclusive<u32>,
        default: u32,
    ) -> u32 {
        let Some(value) = value else { return default };
        match u32::try_from(value).ok().filter(|n| range.contains(n)) {
            Some(value) => value,
            None => {
                let rule = format!("must be in {}..={}", range.start(), range.end());
                self.add(FieldError::new(field, value, rule));
                default
            }
        }
    }
}

/// Reads a section whose every key may be absent. Keys that are wrong are as if they were absent.
pub fn section<T: DeserializeOwned + Default>(
    parent: &str,
    section: Section,
    faults: &mut Faults,
) -> T {
    let mut good = Section::new();
    for (key, value) in section {
        let alone = Section::from_iter([(key.clone(), value.clone())]);
        match from_value::<T>(Value::Object(alone)) {
            Ok(_) => {
                good.insert(key, value);
            }
            Err(error) => faults.add(under(suggest::improve(error), parent)),
        }
    }
    let read = from_value(Value::Object(good));
    faults
        .keep(read.map_err(|error| under(error, parent)))
        .unwrap_or_default()
}

/// The error as seen from the section's parent, which is empty for the file itself.
fn under(error: FieldError, parent: &str) -> FieldError {
    match parent {
        "" => error,
        parent => error.under(parent),
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::TrainSettingsDraft;
    use serde_json::json;

    use super::*;

    #[test]
    fn every_wrong_key_is_named_and_the_others_are_read() {
        let table = json!({"rnak": 8, "lr": "fast", "batch": 2, "epochs": [1]});
        let mut faults = Faults::default();
        let read: TrainSettingsDraft =
            section("train", table.as_object().unwrap().clone(), &mut faults);
        assert_eq!(
            read,
            TrainSettingsDraft {
                batch: Some(2),
                ..TrainSettingsDraft::default()
            }
        );
        let mut fields: Vec<&str> = faults.0.iter().map(|f| f.error.field.as_str()).collect();
        fields.sort_unstable();
        assert_eq!(fields, ["train.epochs", "train.lr", "train.rnak"]);
        let unknown = faults.0.iter().find(|f| f.error.field == "train.rnak");
        assert_eq!(
            unknown.unwrap().error.rule,
            "is no known key; did you mean `rank`?"
        );
    }

    #[test]
    fn a_fault_is_named_once_and_a_number_out_of_range_takes_its_default() {
        let mut faults = Faults::default();
        for value in [0, 0, 9] {
            assert_eq!(faults.number("rounds", Some(value), 1..=3, 2), 2);
        }
        assert_eq!(faults.number("rounds", Some(3), 1..=3, 2), 3);
        assert_eq!(faults.number("rounds", None, 1..=3, 2), 2);
        assert_eq!(faults.0.len(), 2);
    }
}
