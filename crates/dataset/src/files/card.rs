//! The data card: what the Hub shows of a data set, and how loaders find its files.

use std::fmt::Write;

use espalier_core::dataset::{DatasetSources, TOKENIZER_FILE};
use espalier_qwen3_text::TOKENIZER_SHA256;

use crate::manifest::{Counts, DatasetManifest};
use crate::row::Split;
use crate::tally::Tally;

/// Sources that a card names; the manifest has all.
const SOURCES_SHOWN: usize = 50;

/// What a card is made of.
#[derive(Clone, Copy, Debug)]
pub struct CardFacts<'a> {
    /// The data set's name, with its version where that is known.
    pub name: &'a str,
    /// What others may do with it, by a name that the Hub knows, such as `apache-2.0`; it is its owner who says so.
    pub license: Option<&'a str>,
    /// What it was built from.
    pub sources: &'a DatasetSources,
    /// How it was built, and what came of it.
    pub manifest: &'a DatasetManifest,
    /// How long its rows are.
    pub tally: &'a Tally,
}

/// The text of `README.md`, its YAML header first.
pub fn card(facts: &CardFacts<'_>) -> String {
    let (manifest, counts) = (facts.manifest, &facts.manifest.counts);
    let mut text = header(facts);
    // Writing into a `String` cannot fail.
    let _ = write!(
        text,
        "\n# {}\n\nConversations of agents with tools, made by Espalier: {} rows in Parquet, {} bytes.\n\n",
        plain(facts.name),
        counts.train_rows + counts.eval_rows,
        bytes(manifest),
    );
    let there = there(counts);
    let there = there.map(|(split, rows)| (split.as_str().to_owned(), rows.to_string()));
    text.push_str(&table(["split", "rows"], there));
    if !manifest.models.is_empty() {
        let models: Vec<String> = manifest.models.iter().map(|name| plain(name)).collect();
        let _ = writeln!(text, "\nModels that spoke: {}.", models.join(", "));
    }
    text.push_str(COLUMNS);
    text.push_str("\n## How it was built\n\n");
    text.push_str(&table(["", ""], settings(facts).into_iter()));
    text.push_str("\n## What was kept and dropped\n\n");
    text.push_str(&table(
        ["conversations", "number"],
        kept(counts).into_iter(),
    ));
    text.push_str(&sources(facts.sources));
    text
}

fn header(facts: &CardFacts<'_>) -> String {
    let counts = &facts.manifest.counts;
    let mut text = "---\n".to_owned();
    if let Some(license) = facts.license {
        let _ = writeln!(text, "license: {}", quoted(license));
    }
    let _ = write!(
        text,
        "pretty_name: {name}\ntask_categories:\n- text-generation\ntags:\n- espalier\n- agents\n- tool-use\n\
         size_categories:\n- {size}\nconfigs:\n- config_name: default\n  data_files:\n",
        name = quoted(facts.name),
        size = size_category(counts.train_rows + counts.eval_rows),
    );
    for (split, _) in there(counts) {
        let split = split.as_str();
        let _ = writeln!(text, "  - split: {split}\n    path: data/{split}-*.parquet");
    }
    text + "---\n"
}

/// Splits that have rows.
fn there(counts: &Counts) -> impl Iterator<Item = (Split, usize)> {
    let rows = [counts.train_rows, counts.eval_rows];
    let splits = Split::ALL.into_iter().zip(rows);
    splits.filter(|(_, rows)| *rows > 0)
}

/// Of the files that loaders read.
fn bytes(manifest: &DatasetManifest) -> u64 {
    let files = manifest.files.iter();
    let parquet = files.filter(|file| file.path.ends_with(".parquet"));
    parquet.map(|file| file.size).sum()
}

fn settings(facts: &CardFacts<'_>) -> Vec<(String, String)> {
    let (manifest, settings) = (facts.manifest, &facts.manifest.settings);
    let filter = settings.filter.as_ref();
    let filter = filter.map_or("all".to_owned(), |filter| code(&filter.to_string()));
    let hints = if settings.keep_hints {
        "kept"
    } else {
        "left out"
    };
    let near = if settings.keep_near {
        ", kept"
    } else {
        ", dropped"
    };
    let mut rows = vec![
        ("wanted", filter),
        ("unrolled", code(settings.unroll.as_str())),
        ("hints", hints.to_owned()),
        ("near duplicates", format!("from {}{near}", settings.near)),
        ("held out", format!("{} of the tasks", settings.eval_share)),
        ("seed", settings.seed.to_string()),
        ("longest row", format!("{} tokens", facts.tally.max_length)),
    ];
    if let Some(max) = settings.max_per_kind {
        rows.push(("most of one task kind", max.to_string()));
    }
    rows.extend([
        ("base tokenizer", tokenizer(manifest)),
        ("tokenizer's SHA-256", code(&manifest.tokenizer_sha256)),
        ("chat template's SHA-256", code(&manifest.template_sha256)),
        ("tokens", facts.tally.tokens.to_string()),
        (
            "tokens that are trained",
            facts.tally.supervised_tokens.to_string(),
        ),
    ]);
    let rows = rows.into_iter();
    rows.map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Conversations, by what became of them.
fn kept(counts: &Counts) -> Vec<(String, String)> {
    let all = [
        ("looked at".to_owned(), counts.sources),
        ("kept to train on".to_owned(), counts.train_sources),
        ("kept to measure on".to_owned(), counts.eval_sources),
    ];
    let dropped = counts.dropped.iter();
    let dropped = dropped.map(|(reason, n)| {
        (
            format!("dropped: {}", reason.as_str().replace('_', " ")),
            *n,
        )
    });
    let all = all.into_iter().chain(dropped);
    all.map(|(name, n)| (name, n.to_string())).collect()
}

fn sources(sources: &DatasetSources) -> String {
    let batches = sources
        .batches
        .iter()
        .map(|batch| format!("batch {}", code(batch.as_str())));
    // Of an upload its file says more than the folder, which is named after a digest.
    let file = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
    let uploads = sources
        .uploads
        .iter()
        .map(|name| format!("file {}", code(&file(name.as_str()))));
    let all: Vec<String> = batches.chain(uploads).collect();
    if all.is_empty() {
        return String::new();
    }
    let mut text = "\n## Sources\n\n".to_owned();
    for source in all.iter().take(SOURCES_SHOWN) {
        let _ = writeln!(text, "- {source}");
    }
    if let Some(more) = all
        .len()
        .checked_sub(SOURCES_SHOWN)
        .filter(|more| *more > 0)
    {
        let _ = writeln!(text, "- and {more} more, which `manifest.json` names");
    }
    text
}

fn table(header: [&str; 2], rows: impl Iterator<Item = (String, String)>) -> String {
    let mut text = format!("| {} | {} |\n|---|---|\n", header[0], header[1]);
    for (name, value) in rows {
        // A bar would end the cell.
        let _ = writeln!(text, "| {name} | {} |", value.replace('|', "\\|"));
    }
    text
}

/// Text that ends neither a line nor a span of code.
fn plain(text: &str) -> String {
    text.replace('`', "'").replace(char::is_control, " ")
}

fn code(text: &str) -> String {
    format!("`{}`", plain(text))
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
        1_000_000..10_000_000 => "1M<n<10M",
        _ => "10M<n<100M",
    }
}

fn tokenizer(manifest: &DatasetManifest) -> String {
    let model = manifest.settings.tokenizer.as_deref();
    match model.filter(|_| manifest.tokenizer_sha256 != TOKENIZER_SHA256) {
        None => "Qwen3's".to_owned(),
        Some(model) => format!("that of {}, `{TOKENIZER_FILE}`", code(model)),
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
    use std::collections::BTreeMap;

    use espalier_core::layout::UploadName;
    use espalier_core::time::Timestamp;
    use espalier_core::trace::FileEntry;

    use super::*;
    use crate::build::BuildSpec;
    use crate::manifest::{DropReason, SCHEMA_VERSION};

    fn manifest(train_rows: usize, eval_rows: usize) -> DatasetManifest {
        DatasetManifest {
            schema_version: SCHEMA_VERSION,
            created_at_us: Timestamp(1),
            settings: BuildSpec {
                filter: Some("reward >= 0.9 and model ~ \"a|b\"".parse().unwrap()),
                ..BuildSpec::default()
            },
            template_sha256: "aa".into(),
            tokenizer_sha256: "bb".into(),
            counts: Counts {
                sources: 9,
                train_sources: 5,
                eval_sources: 1,
                train_rows,
                eval_rows,
                dropped: BTreeMap::from([(DropReason::NearDuplicate, 3)]),
                ..Counts::default()
            },
            models: vec!["Qwen/Qwen3-4B".into()],
            files: vec![
                FileEntry::of("a/train-00000.parquet", b"1234567"),
                FileEntry::of("a/train-00000.jsonl", b"1"),
            ],
            sources: Vec::new(),
        }
    }

    fn sources(batches: usize) -> DatasetSources {
        DatasetSources {
            batches: (0..batches)
                .map(|n| format!("b{n}").parse().unwrap())
                .collect(),
            uploads: vec![UploadName::new("ab12/rows.jsonl").unwrap()],
        }
    }

    #[test]
    fn a_card_names_its_files_and_counts() {
        let (manifest, tally, sources) = (manifest(1200, 80), Tally::new(4096), sources(2));
        let facts = CardFacts {
            name: "shop: \"v1\"",
            license: Some("apache-2.0"),
            sources: &sources,
            manifest: &manifest,
            tally: &tally,
        };
        let text = card(&facts);
        let header = "---\nlicense: \"apache-2.0\"\npretty_name: \"shop: \\\"v1\\\"\"\ntask_categories:\n- text-generation\n\
            tags:\n- espalier\n- agents\n- tool-use\nsize_categories:\n- 1K<n<10K\nconfigs:\n- config_name: default\n\
            \x20 data_files:\n  - split: train\n    path: data/train-*.parquet\n  - split: eval\n\
            \x20   path: data/eval-*.parquet\n---\n";
        assert!(text.starts_with(header), "{text}");
        for line in [
            "1280 rows in Parquet, 7 bytes.",
            "| eval | 80 |",
            "Models that spoke: Qwen/Qwen3-4B.",
            "| wanted | `reward >= 0.9 and model ~ \"a\\|b\"` |",
            "| longest row | 4096 tokens |",
            "| base tokenizer | Qwen3's |",
            "| tokenizer's SHA-256 | `bb` |",
            "| kept to train on | 5 |",
            "| dropped: near duplicate | 3 |",
            "- batch `b1`\n- file `rows.jsonl`\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        let mut own = manifest.clone();
        own.settings.tokenizer = Some("me/sapling".into());
        let text = card(&CardFacts {
            manifest: &own,
            ..facts
        });
        let line = "| base tokenizer | that of `me/sapling`, `tokenizer.json` |";
        assert!(text.contains(line), "{text}");
        let unsaid = card(&CardFacts {
            license: None,
            ..facts
        });
        assert!(!unsaid.contains("license"), "{unsaid}");
    }

    #[test]
    fn a_split_without_rows_has_no_files_and_sources_are_bounded() {
        let (manifest, tally, sources) = (manifest(1, 0), Tally::new(1), sources(60));
        let text = card(&CardFacts {
            name: "shop",
            license: None,
            sources: &sources,
            manifest: &manifest,
            tally: &tally,
        });
        assert!(!text.contains("eval-"), "{text}");
        assert!(text.contains("- batch `b49`\n- and 11 more"), "{text}");
    }
}
