//! Rows as files of bounded size: Parquet and JSON lines beside each other, for either split.

use bytes::Bytes;
use espalier_core::trace::FileEntry;
use espalier_dataset::files::{JsonlWriter, ParquetWriter};
use espalier_dataset::{Row, Split};
use tokio::sync::mpsc;

use super::error::CurateError;
use super::passes::Finished;

/// JSON lines after which a file is full, in bytes. It and the Parquet file beside it are in memory until then.
const SHARD_BYTES: usize = 64 << 20;

/// The files that are being written.
pub(super) struct Shards {
    /// Where they lie.
    folder: String,
    to: mpsc::Sender<Finished>,
    splits: [Shard; 2],
}

/// Of one split.
#[derive(Default)]
struct Shard {
    number: usize,
    open: Option<Open>,
}

struct Open {
    parquet: ParquetWriter<Vec<u8>>,
    lines: Vec<u8>,
}

impl Shards {
    pub(super) fn new(folder: String, to: mpsc::Sender<Finished>) -> Self {
        Self {
            folder,
            to,
            splits: Default::default(),
        }
    }

    /// Adds a row to the files of its split.
    pub(super) fn write(&mut self, row: &Row) -> Result<(), CurateError> {
        let shard = &mut self.splits[usize::from(row.split == Split::Eval)];
        let open = match &mut shard.open {
            Some(open) => open,
            closed => closed.insert(Open {
                parquet: ParquetWriter::new(Vec::new())?,
                lines: Vec::new(),
            }),
        };
        open.parquet.write(row)?;
        let mut line = JsonlWriter::new(&mut open.lines);
        line.write(row)?;
        line.finish()?;
        match open.lines.len() >= SHARD_BYTES {
            true => self.close(row.split),
            false => Ok(()),
        }
    }

    /// Ends and hands over what is left.
    pub(super) fn finish(mut self) -> Result<(), CurateError> {
        Split::ALL
            .into_iter()
            .try_for_each(|split| self.close(split))
    }

    fn close(&mut self, split: Split) -> Result<(), CurateError> {
        let shard = &mut self.splits[usize::from(split == Split::Eval)];
        let Some(open) = shard.open.take() else {
            return Ok(());
        };
        let name = format!("{}{}-{:05}", self.folder, split.as_str(), shard.number);
        shard.number += 1;
        let parquet = open.parquet.finish()?;
        self.hand_over(format!("{name}.parquet"), parquet)?;
        self.hand_over(format!("{name}.jsonl"), open.lines)
    }

    fn hand_over(&self, path: String, content: Vec<u8>) -> Result<(), CurateError> {
        let finished = Finished {
            entry: FileEntry::of(path, &content),
            content: Bytes::from(content),
        };
        // Nobody takes it: the attempt has ended.
        let sent = self.to.blocking_send(finished);
        sent.map_err(|_| CurateError::Stopped)
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::chat::Message;
    use espalier_dataset::files::{jsonl_records, parquet_records, read_rows};

    use super::*;

    fn row(n: usize, split: Split) -> Row {
        Row {
            id: n.to_string(),
            timestamp: String::new(),
            model: String::new(),
            messages: vec![Message::assistant("y".repeat(100), None, vec![])],
            tools: vec![],
            truncated: false,
            original_id: None,
            truncation_point: None,
            task_id: None,
            task_kind: None,
            split,
            reward: None,
            trained_turns: vec![0],
            recorded: None,
        }
    }

    #[test]
    fn both_forms_of_a_split_hold_the_same_rows() {
        let (to, mut from) = mpsc::channel(8);
        let mut shards = Shards::new("x/".into(), to);
        for n in 0..5 {
            let split = if n == 3 { Split::Eval } else { Split::Train };
            shards.write(&row(n, split)).unwrap();
        }
        shards.finish().unwrap();
        let mut found = Vec::new();
        while let Some(file) = from.blocking_recv() {
            let path = file.entry.path.clone();
            assert!(file.entry.holds(&file.content));
            let records = match path.ends_with(".parquet") {
                true => parquet_records(path.clone(), file.content).unwrap(),
                false => jsonl_records(path.clone(), std::io::Cursor::new(file.content)),
            };
            let ids: Vec<String> = read_rows(path.clone(), records)
                .map(|r| r.unwrap().id)
                .collect();
            found.push((path, ids.join(" ")));
        }
        let expected = [
            ("x/train-00000.parquet", "0 1 2 4"),
            ("x/train-00000.jsonl", "0 1 2 4"),
            ("x/eval-00000.parquet", "3"),
            ("x/eval-00000.jsonl", "3"),
        ];
        assert_eq!(
            found,
            expected.map(|(path, ids)| (path.to_owned(), ids.to_owned()))
        );
    }
}
