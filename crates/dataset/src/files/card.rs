//! The data card: what the Hub shows of a data set, and how loaders find its files.

use std::fmt::Write;

use crate::row::Split;

/// What a card says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CardFacts {
    /// The data set's name.
    pub name: String,
    /// Rows of each split, in the order of [`Split::ALL`].
    pub rows: [usize; 2],
    /// Bytes of all files.
    pub bytes: u64,
    /// How it was unrolled.
    pub unroll: String,
    /// Models that spoke in it.
    pub models: Vec<String>,
    /// The form of its files, `parquet` or `jsonl`.
    pub form: String,
}

/// The text of `README.md`, its YAML header first.
pub fn card(facts: &CardFacts) -> String {
    let rows: usize = facts.rows.iter().sum();
    let mut text = format!(
        "---\npretty_name: {name}\ntask_categories:\n- text-generation\ntags:\n- espalier\n- agents\n- tool-use\n\
         size_categories:\n- {size}\nconfigs:\n- config_name: default\n  data_files:\n",
        name = quoted(&facts.name),
        size = size_category(rows),
    );
    let splits = Split::ALL.into_iter().zip(facts.rows);
    let there: Vec<(Split, usize)> = splits.filter(|(_, rows)| *rows > 0).collect();
    for (split, _) in &there {
        let (split, form) = (split.as_str(), &facts.form);
        // Writing into a `String` cannot fail.
        let _ = writeln!(text, "  - split: {split}\n    path: data/{split}-*.{form}");
    }
    let _ = writeln!(text, "---\n\n# {}\n", facts.name);
    let _ = writeln!(
        text,
        "Conversations of agents with tools, made by Espalier: {rows} rows, {} bytes, unrolled `{}`.\n",
        facts.bytes, facts.unroll
    );
    text.push_str("| split | rows |\n|---|---|\n");
    for (split, rows) in there {
        let _ = writeln!(text, "| {} | {rows} |", split.as_str());
    }
    if !facts.models.is_empty() {
        let _ = writeln!(text, "\nModels that spoke: {}.", facts.models.join(", "));
    }
    text.push_str(COLUMNS);
    text
}

/// A name in YAML, whatever is in it: JSON strings are YAML.
fn quoted(name: &str) -> String {
    serde_json::Value::from(name).to_string()
}

fn size_category(rows: usize) -> &'static str {
    match rows {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        _ => "1M<n<10M",
    }
}

const COLUMNS: &str = "
| column | what it is |
|---|---|
| `id`, `original_id`, `truncation_point` | the row; the conversation that it is the beginning of; its last assistant turn, from 1 |
| `timestamp`, `model` | when the conversation began, and who spoke |
| `messages`, `tools` | JSON in a string: OpenAI's chat format, `arguments` as objects |
| `truncated` | whether the conversation goes on after the row |
| `task_id`, `task_kind`, `split`, `reward` | what it was a try at, where it belongs, how it was judged |
| `trained_turns` | assistant turns that are trained, from 0 |
| `ids`, `supervised` | token ids as they were sampled, and the ranges that are trained; absent where they are unknown |
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_names_its_files_and_counts() {
        let text = card(&CardFacts {
            name: "shop: \"v1\"".into(),
            rows: [1200, 80],
            bytes: 7,
            unroll: "per_user_turn".into(),
            models: vec!["Qwen/Qwen3-4B".into()],
            form: "parquet".into(),
        });
        let header = "---\npretty_name: \"shop: \\\"v1\\\"\"\ntask_categories:\n- text-generation\ntags:\n- espalier\n\
            - agents\n- tool-use\nsize_categories:\n- 1K<n<10K\nconfigs:\n- config_name: default\n  data_files:\n\
            \x20 - split: train\n    path: data/train-*.parquet\n  - split: eval\n    path: data/eval-*.parquet\n---\n";
        assert!(text.starts_with(header), "{text}");
        assert!(text.contains("1280 rows, 7 bytes, unrolled `per_user_turn`"));
        assert!(text.contains("| eval | 80 |"));
    }

    #[test]
    fn a_split_without_rows_has_no_files() {
        let facts = CardFacts {
            rows: [1, 0],
            form: "jsonl".into(),
            ..CardFacts::default()
        };
        assert!(!card(&facts).contains("eval-"), "{}", card(&facts));
    }
}
