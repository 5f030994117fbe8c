//! Rules of the tree that no compiler checks. Each failure names the place and the rule.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The arrows of ARCHITECTURE.md: what each crate may depend on, of ours.
const ARROWS: [(&str, &[&str]); 17] = [
    ("espalier-core", &[]),
    ("espalier-proto", &["espalier-core"]),
    ("espalier-runtime", &["espalier-core", "espalier-proto"]),
    ("espalier-qwen3-text", &[]),
    ("espalier-kernels", &[]),
    ("espalier-qwen3", &["espalier-kernels"]),
    (
        "espalier-dataset",
        &["espalier-core", "espalier-qwen3-text"],
    ),
    (
        "espalier-adapters",
        &[
            "espalier-core",
            "espalier-kernels",
            "espalier-qwen3",
            "espalier-runtime",
        ],
    ),
    (
        "espalier-infer-worker",
        &[
            "espalier-adapters",
            "espalier-core",
            "espalier-kernels",
            "espalier-proto",
            "espalier-qwen3",
            "espalier-qwen3-text",
            "espalier-runtime",
        ],
    ),
    (
        "espalier-train-worker",
        &[
            "espalier-core",
            "espalier-dataset",
            "espalier-kernels",
            "espalier-proto",
            "espalier-qwen3",
            "espalier-qwen3-text",
            "espalier-runtime",
        ],
    ),
    ("espalier-practice", &[]),
    (
        "espalier-sapling",
        &[
            "espalier-agent-worker",
            "espalier-core",
            "espalier-dataset",
            "espalier-practice",
            "espalier-qwen3",
            "espalier-qwen3-text",
        ],
    ),
    // A dev-dependency of any crate, because it knows none of them.
    ("espalier-testbed", &[]),
    (
        "espalier-coordinator",
        &["espalier-core", "espalier-proto", "espalier-runtime"],
    ),
    (
        "espalier-agent-worker",
        &[
            "espalier-adapters",
            "espalier-core",
            "espalier-dataset",
            "espalier-proto",
            "espalier-qwen3-text",
            "espalier-runtime",
        ],
    ),
    (
        "espalier-cli",
        &[
            "espalier-adapters",
            "espalier-agent-worker",
            "espalier-coordinator",
            "espalier-core",
            "espalier-dataset",
            "espalier-infer-worker",
            "espalier-practice",
            "espalier-proto",
            "espalier-qwen3-text",
            "espalier-runtime",
            "espalier-train-worker",
        ],
    ),
    (
        "espalier-tests",
        &[
            "espalier-agent-worker",
            "espalier-coordinator",
            "espalier-core",
            "espalier-practice",
            "espalier-proto",
            "espalier-qwen3",
            "espalier-runtime",
            "espalier-testbed",
        ],
    ),
];

/// Only these may use these: a backend or a format stays behind its door.
const DOORS: [(&str, &[&str]); 6] = [
    ("redb", &["espalier-coordinator"]),
    ("object_store", &["espalier-runtime"]),
    ("rmcp", &["espalier-agent-worker"]),
    ("tokenizers", &["espalier-qwen3-text"]),
    ("cudarc", &["espalier-kernels"]),
    ("parquet", &["espalier-dataset"]),
];

const LINES_MAX: usize = 900;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn tracked_files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "git ls-files failed: the rules are checked in a checkout"
    );
    let names = String::from_utf8(output.stdout).unwrap();
    let files: Vec<PathBuf> = names
        .split('\0')
        .filter(|n| !n.is_empty())
        .map(|n| root().join(n))
        .collect();
    assert!(files.len() > 50, "only {} tracked files", files.len());
    files.into_iter().filter(|path| path.exists()).collect()
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let files = tracked_files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"));
    files
        .map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--locked",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let normal = package["dependencies"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|d| d["kind"].is_null());
            (name(package), normal.map(name).collect())
        })
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let found = dependencies();
    let known: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    for (package, uses) in &found {
        let allowed = ARROWS.iter().find(|(name, _)| name == package);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{package} has no entry in ARROWS"));
        for used in uses.iter().filter(|used| known.contains(used.as_str())) {
            assert!(
                allowed.contains(&used.as_str()),
                "{package} must not depend on {used}: see ARCHITECTURE.md"
            );
        }
    }
}

#[test]
fn backends_stay_behind_their_doors() {
    for (package, uses) in dependencies() {
        for (library, doors) in DOORS {
            assert!(
                !uses.contains(library) || doors.contains(&package.as_str()),
                "{package} must not depend on {library}: only {doors:?} may"
            );
        }
    }
}

#[test]
fn files_stay_comfortable() {
    let long: Vec<String> = rust_files()
        .iter()
        .filter(|(_, text)| text.lines().count() > LINES_MAX)
        .map(|(path, text)| format!("{}: {} lines", path.display(), text.lines().count()))
        .collect();
    assert!(
        long.is_empty(),
        "more than {LINES_MAX} lines; redesign rather than append: {long:#?}"
    );
}

#[test]
fn modules_say_what_they_are() {
    let silent: Vec<_> = rust_files()
        .into_iter()
        // A file of unit tests belongs to the module that names it, which says what it is.
        .filter(|(path, text)| !path.ends_with("tests.rs") && !text.starts_with("//!"))
        .map(|(path, _)| path)
        .collect();
    assert!(silent.is_empty(), "a module opens with `//!`: {silent:#?}");
}

#[test]
fn nothing_is_left_for_later() {
    // Spelt apart, so that this file does not find itself.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("todo", "!("),
    ];
    for (path, text) in rust_files() {
        for (n, line) in text.lines().enumerate() {
            let found = marks.iter().find(|mark| has_word(line, mark));
            assert!(
                found.is_none(),
                "{}:{}: file an issue in place of {found:?}",
                path.display(),
                n + 1
            );
        }
    }
}

/// Whether `line` holds `word` as a word of its own: `mktemp` takes a row of X.
fn has_word(line: &str, word: &str) -> bool {
    let of_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(start, _)| {
        let (before, after) = (&line[..start], &line[start + word.len()..]);
        let open_end = word.ends_with(of_word) && after.starts_with(of_word);
        !before.ends_with(of_word) && !open_end
    })
}

#[test]
fn words_are_found_whole() {
    for (line, found) in [
        ("a mark", true),
        ("(mark: x)", true),
        ("mark", true),
        ("marks", false),
    ] {
        assert_eq!(has_word(line, "mark"), found, "{line}");
    }
    assert!(!has_word("mktemp -d a-XXXXXX", concat!("XX", "X")));
    assert!(has_word("macro!(x)", "macro!("));
    assert!(!has_word("a_macro!(x)", "macro!("));
}

#[test]
fn links_in_documents_lead_somewhere() {
    let documents = tracked_files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "md"));
    let mut checked = 0;
    for document in documents {
        let text = std::fs::read_to_string(&document).unwrap();
        for target in link_targets(&text) {
            checked += 1;
            let path = document
                .parent()
                .unwrap()
                .join(target.split('#').next().unwrap());
            assert!(
                path.exists(),
                "{}: the link to {target} leads nowhere",
                document.display()
            );
        }
    }
    assert!(
        checked > 5,
        "only {checked} links were found: the search is broken"
    );
}

/// Targets of `[text](target)` that are files of this tree.
fn link_targets(text: &str) -> Vec<&str> {
    let after_brackets = text
        .match_indices("](")
        .map(|(i, mark)| &text[i + mark.len()..]);
    let targets = after_brackets.filter_map(|rest| rest.split(')').next());
    targets
        .filter(|t| !t.is_empty() && !t.contains("://") && !t.starts_with('#') && !t.contains(' '))
        .collect()
}

#[test]
fn spans_attributes_and_metrics_are_named_in_one_file() {
    let names =
        std::fs::read_to_string(root().join("crates/runtime/src/telemetry/names.rs")).unwrap();
    assert!(names.contains("gen_ai."), "the list of names has moved");
    for (path, text) in rust_files() {
        let elsewhere = !path.ends_with("telemetry/names.rs")
            && !path.components().any(|c| c.as_os_str() == "tests");
        for (n, line) in text.lines().enumerate().filter(|_| elsewhere) {
            let literal = [
                "\"gen_ai.",
                "\"espalier.",
                "\"mcp.method",
                "\"mcp.session",
                "\"mcp.client",
                "\"mcp.protocol",
            ]
            .iter()
            .find(|start| line.contains(**start));
            let is_name = literal.is_some()
                && !line.contains("//")
                && !line.contains(".toml\"")
                && !line.contains(".json\"")
                && !line.contains("\"espalier.v1");
            assert!(
                !is_name,
                "{}:{}: name it in telemetry/names.rs: {line}",
                path.display(),
                n + 1
            );
        }
    }
}
