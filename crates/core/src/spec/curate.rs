//! Curation: which conversations become a data set, and how.
//!
//! The filter is checked here as text only; whoever reads it, before it is submitted and where the job runs, knows its
//! language.

use serde::{Deserialize, Serialize};

use super::check::Faults;
use super::train::{BASE_BYTES_MAX, DatasetRef};
use crate::error::FieldError;
use crate::id::{BatchId, DatasetName};
use crate::layout::UploadName;

/// Most batches of one data set, and most files.
pub const SOURCES_EACH_MAX: usize = 1_000;
/// Longest filter, in bytes.
pub const FILTER_BYTES_MAX: usize = 4_096;
/// How conversations may be cut into rows.
pub const UNROLLS: [&str; 3] = ["per_user_turn", "every_assistant", "compat"];
/// The name of the tokenizer that is in the binary.
pub const TOKENIZER: &str = "qwen3";

/// See [`CurateSpec`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `CurateSpec`")]
pub struct CurateDraft {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub uploads: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extends: Option<String>,
    #[serde(rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unroll: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_hints: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub near: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_near: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_kind: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
}

/// A data set that is to be built, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct CurateSpec {
    /// Batches of the project whose traces are sources.
    pub batches: Vec<BatchId>,
    /// Files among the project's uploads, `.jsonl`, `.json` or `.parquet`, whose conversations are sources: rows of data
    /// sets in `messages`/`tools` form, or the workshop's traces.
    pub uploads: Vec<UploadName>,
    /// A version of a data set whose sources come before these.
    pub extends: Option<DatasetRef>,
    /// Which conversations are wanted; absent: all.
    pub filter: Option<String>,
    /// How they become rows: one of [`UNROLLS`]. Default `per_user_turn`.
    pub unroll: String,
    /// Whether hints are left out. Default true.
    pub drop_hints: bool,
    /// How like each other two conversations are, from 0.5 to 1, that count as the same. Default 0.9.
    pub near: f64,
    /// Whether near duplicates stay in. Default false; exact ones never do.
    pub keep_near: bool,
    /// Most conversations of one task kind; absent: any number.
    pub max_per_kind: Option<u64>,
    /// The share of tasks that is held out, in [0, 1). Default 0.1.
    pub eval_share: f64,
    /// Of what is drawn. Default 3407.
    pub seed: u64,
    /// Tokens of the longest sample; what is longer is cut at a whole turn. Default 32,768.
    pub max_length: usize,
    /// The model whose tokenizer the tokens are of, named as the base of a training is; absent: Qwen3's, which is also
    /// called [`TOKENIZER`].
    pub tokenizer: Option<String>,
    /// The name of the data set whose next version this becomes.
    pub dataset: DatasetName,
}

impl CurateDraft {
    /// The job, or every rule that the draft breaks.
    pub(super) fn check(&self) -> Result<CurateSpec, Vec<FieldError>> {
        let mut faults = Faults::default();
        let most = SOURCES_EACH_MAX;
        let batches = each(&mut faults, "batches", &self.batches, most, str::parse);
        let uploads = each(&mut faults, "uploads", &self.uploads, most, check_upload);
        let extends = self.extends.as_deref().map(str::parse);
        let extends = extends.and_then(|extends| faults.keep("extends", extends));
        if self.batches.is_empty() && self.uploads.is_empty() && self.extends.is_none() {
            faults.add("batches", "", "must be given, or `uploads` or `extends`");
        }
        let dataset = DatasetName::new(self.dataset.as_deref().unwrap_or_default());
        let dataset = faults.keep("dataset", dataset);
        check_filter(&mut faults, self.filter.as_deref());
        let unroll = one_of(&mut faults, "unroll", self.unroll.as_deref(), &UNROLLS);
        let tokenizer = self.tokenizer.clone().filter(|name| name != TOKENIZER);
        check_tokenizer(&mut faults, tokenizer.as_deref());
        let near = |v| (0.5..=1.0).contains(&v);
        let share = |v| (0.0..1.0).contains(&v);
        let per_kind = self.max_per_kind;
        let spec = CurateSpec {
            batches,
            uploads,
            extends,
            filter: self.filter.clone(),
            unroll,
            drop_hints: self.drop_hints.unwrap_or(true),
            near: faults.float("near", self.near, 0.9, "must be in [0.5, 1]", near),
            keep_near: self.keep_near.unwrap_or(false),
            max_per_kind: per_kind
                .map(|max| faults.number("max_per_kind", Some(max), 1..=1_000_000, 1)),
            eval_share: faults.float(
                "eval_share",
                self.eval_share,
                0.1,
                "must be in [0, 1)",
                share,
            ),
            seed: faults.number("seed", self.seed, 0..=i64::MAX, 3407),
            max_length: faults.number("max_length", self.max_length, 2..=1 << 20, 32_768),
            tokenizer,
            dataset: match dataset {
                Some(dataset) => dataset,
                None => return Err(faults.0),
            },
        };
        faults.or(spec)
    }
}

/// Every name of a list of at most `most`, those that break a rule named by their place.
pub(super) fn each<T: PartialEq>(
    faults: &mut Faults,
    field: &str,
    names: &[String],
    most: usize,
    read: impl Fn(&str) -> Result<T, FieldError>,
) -> Vec<T> {
    if names.len() > most {
        let rule = format!("must have at most {most} items");
        faults.add(field, names.len(), rule);
        return Vec::new();
    }
    let mut found = Vec::new();
    for (n, name) in names.iter().enumerate() {
        let place = format!("{field}[{n}]");
        let Some(one) = faults.keep(&place, read(name)) else {
            continue;
        };
        match found.contains(&one) {
            true => faults.add(&place, name, "must be named once"),
            false => found.push(one),
        }
    }
    found
}

fn check_upload(name: &str) -> Result<UploadName, FieldError> {
    let (_, end) = name.rsplit_once('.').unwrap_or_default();
    match end.to_ascii_lowercase().as_str() {
        "jsonl" | "ndjson" | "json" | "parquet" => UploadName::new(name),
        _ => Err(FieldError::new(
            "uploads",
            name,
            "must end with .jsonl, .json or .parquet",
        )),
    }
}

pub(super) fn check_filter(faults: &mut Faults, filter: Option<&str>) {
    let Some(text) = filter else { return };
    if text.trim().is_empty() || text.len() > FILTER_BYTES_MAX || text.contains(char::is_control) {
        let rule = format!("must be 1 to {FILTER_BYTES_MAX} bytes of printable text");
        faults.add("where", text, rule);
    }
}

/// Every name of a model has a `/`.
fn check_tokenizer(faults: &mut Faults, tokenizer: Option<&str>) {
    let Some(name) = tokenizer else { return };
    if name.len() > BASE_BYTES_MAX || !name.contains('/') || name.contains(char::is_control) {
        let rule = format!(
            "must be {TOKENIZER}, owner/name of the hub, s3://bucket/prefix or the path of a folder, of at most \
             {BASE_BYTES_MAX} bytes"
        );
        faults.add("tokenizer", name, rule);
    }
}

/// `value`, or the first of `names`.
fn one_of(faults: &mut Faults, field: &str, value: Option<&str>, names: &[&str]) -> String {
    let value = value.unwrap_or(names[0]);
    if !names.contains(&value) {
        faults.add(field, value, format!("must be {}", names.join(", ")));
    }
    value.to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::draft::parse_line;
    use super::*;

    fn checked(line: &str) -> Result<CurateSpec, Vec<String>> {
        let job = parse_line(line.as_bytes()).unwrap().check();
        let job = job.map_err(|errors| errors.into_iter().map(|e| e.field).collect::<Vec<_>>())?;
        Ok(job.curate().unwrap().clone())
    }

    #[test]
    fn silence_is_filled_in() {
        let spec = checked(r#"{"curate":{"batches":["b1"],"dataset":"shop"}}"#).unwrap();
        assert_eq!(spec.batches, ["b1".parse().unwrap()]);
        assert_eq!(
            (spec.unroll.as_str(), spec.drop_hints),
            ("per_user_turn", true)
        );
        assert_eq!((spec.near, spec.eval_share, spec.seed), (0.9, 0.1, 3407));
        assert_eq!((spec.max_length, spec.max_per_kind), (32_768, None));
        let of = |tokenizer: &str| {
            let line = format!(
                r#"{{"curate":{{"batches":["b1"],"dataset":"d","tokenizer":"{tokenizer}"}}}}"#
            );
            checked(&line).unwrap().tokenizer
        };
        assert_eq!((spec.tokenizer, of("qwen3")), (None, None));
        assert_eq!(of("s3://b/sapling").as_deref(), Some("s3://b/sapling"));
        let spec =
            checked(r#"{"curate":{"uploads":["a.jsonl"],"extends":"old@v2","dataset":"d"}}"#);
        assert_eq!(spec.unwrap().extends.unwrap().version, 2);
    }

    #[test]
    fn what_breaks_a_rule_is_named_by_field() {
        for (inner, fields) in [
            ("", &["curate.batches", "curate.dataset"][..]),
            (
                r#""batches":["a","a","/"],"dataset":"d""#,
                &["curate.batches[1]", "curate.batches[2]"],
            ),
            (
                r#""uploads":["a.txt","../b.json"],"dataset":"d""#,
                &["curate.uploads[0]", "curate.uploads[1]"],
            ),
            (
                r#""batches":["a"],"dataset":"d","extends":"x""#,
                &["curate.extends"],
            ),
            (
                r#""batches":["a"],"dataset":"d","where":" ","unroll":"all","tokenizer":"gpt2""#,
                &["curate.where", "curate.unroll", "curate.tokenizer"],
            ),
            (
                r#""batches":["a"],"dataset":"d","near":0.4,"max_per_kind":0,"eval_share":1,"seed":-1,"max_length":1"#,
                &[
                    "curate.near",
                    "curate.max_per_kind",
                    "curate.eval_share",
                    "curate.seed",
                    "curate.max_length",
                ],
            ),
        ] {
            let line = format!(r#"{{"curate":{{{inner}}}}}"#);
            assert_eq!(checked(&line).unwrap_err(), fields, "{line}");
        }
        let both = r#"{"prompt":"x","curate":{"batches":["a"],"dataset":"d"}}"#;
        assert_eq!(checked(both).unwrap_err(), ["prompt"]);
    }
}
