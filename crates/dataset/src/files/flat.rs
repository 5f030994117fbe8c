//! A row as its columns.

use std::ops::Range;

use espalier_core::chat::{Message, read_messages};
use espalier_core::error::FieldError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::row::{Recorded, Row, Split};

/// The columns of a row, in their order in files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Flat {
    pub(super) id: String,
    pub(super) timestamp: String,
    pub(super) model: String,
    pub(super) messages: String,
    pub(super) tools: String,
    pub(super) truncated: bool,
    pub(super) original_id: Option<String>,
    pub(super) truncation_point: Option<u32>,
    pub(super) task_id: Option<String>,
    pub(super) task_kind: Option<String>,
    pub(super) split: Split,
    pub(super) reward: Option<f64>,
    pub(super) trained_turns: Vec<u32>,
    pub(super) ids: Option<Vec<u32>>,
    pub(super) supervised: Option<Vec<Range<u32>>>,
}

impl Flat {
    pub(super) fn of(row: &Row) -> Self {
        let recorded = row.recorded.clone();
        let (ids, supervised) = recorded.map(|r| (r.ids, r.supervised)).unzip();
        Self {
            id: row.id.clone(),
            timestamp: row.timestamp.clone(),
            model: row.model.clone(),
            messages: json!(row.messages).to_string(),
            tools: json!(row.tools).to_string(),
            truncated: row.truncated,
            original_id: row.original_id.clone(),
            truncation_point: row.truncation_point,
            task_id: row.task_id.clone(),
            task_kind: row.task_kind.clone(),
            split: row.split,
            reward: row.reward,
            trained_turns: row.trained_turns.clone(),
            ids,
            supervised,
        }
    }

    /// Memory that it takes, in bytes, nearly.
    pub(super) fn bytes(&self) -> usize {
        let ids = self.ids.as_ref().map_or(0, Vec::len);
        self.messages.len() + self.tools.len() + 4 * ids + 256
    }

    /// The row of a record.
    pub(super) fn read(record: Value) -> Result<Row, FieldError> {
        let flat: Self = serde_json::from_value(record).map_err(|error| {
            FieldError::new("row", error, "must have the columns of a data set")
        })?;
        let recorded = match (flat.ids, flat.supervised) {
            (Some(ids), Some(supervised)) => Some(Recorded { ids, supervised }),
            (None, None) => None,
            _ => {
                let rule = "must both be there, or neither";
                return Err(FieldError::new("ids, supervised", "one of them", rule));
            }
        };
        Ok(Row {
            id: flat.id,
            timestamp: flat.timestamp,
            model: flat.model,
            messages: read_column(&flat.messages)?,
            tools: parse("tools", &flat.tools)?,
            truncated: flat.truncated,
            original_id: flat.original_id,
            truncation_point: flat.truncation_point,
            task_id: flat.task_id,
            task_kind: flat.task_kind,
            split: flat.split,
            reward: flat.reward,
            trained_turns: flat.trained_turns,
            recorded,
        })
    }
}

fn read_column(messages: &str) -> Result<Vec<Message>, FieldError> {
    read_messages(&parse("messages", messages)?)
}

fn parse<T: for<'de> Deserialize<'de>>(column: &str, text: &str) -> Result<T, FieldError> {
    let refuse = |error| FieldError::new(column, text, format!("must be a JSON list: {error}"));
    serde_json::from_str(text).map_err(refuse)
}
