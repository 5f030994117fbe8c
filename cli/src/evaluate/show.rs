//! What an evaluation came to: the tables of its report, of rollouts or of turns, and where the report is.

use std::path::{Path, PathBuf};

use espalier_core::compare::turns::{TurnsReport, agreement_table, arms_table};
use espalier_core::compare::words::{self, Table};
use espalier_core::compare::{MARKDOWN_FILE, PAGE_FILE, REPORT_FILE, Report};
use espalier_core::error::FieldError;
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::trace::Manifest;
use espalier_runtime::store::Store;
use serde_json::{Value, json};

use crate::exit::Problem;
use crate::output::{plain, rows_table};

/// A report that was read and verified.
pub struct Read<R = Report> {
    /// Its numbers.
    pub report: R,
    /// Object path of the folder that it lies in.
    pub folder: String,
    /// SHA-256 of `report.json`, in hex.
    pub sha256: String,
    /// Names and contents.
    pub files: Vec<(String, bytes::Bytes)>,
}

impl<R> Read<R> {
    /// The report of a comparison that has ended well.
    async fn read(
        store: &Store,
        key: &JobKey,
        parse: fn(&[u8]) -> Result<R, FieldError>,
    ) -> Result<Self, Problem> {
        let manifest = store.get(&layout::manifest(key)).await?;
        let manifest = Manifest::parse(&manifest, key)?;
        let folder = layout::report_files(key, manifest.fence);
        let mut files = Vec::new();
        let mut sha256 = String::new();
        for name in [REPORT_FILE, MARKDOWN_FILE, PAGE_FILE] {
            let path = format!("{folder}{name}");
            let entry = manifest.files.iter().find(|file| file.path == path);
            let entry = entry
                .ok_or_else(|| Problem::failed(format!("the manifest of {key} names no {name}")))?;
            let content = store.get(&path).await?;
            if !entry.holds(&content) {
                return Err(Problem::failed(format!(
                    "{path} is not what its manifest names"
                )));
            }
            if name == REPORT_FILE {
                sha256 = entry.sha256.clone();
            }
            files.push((name.to_owned(), content));
        }
        Ok(Self {
            report: parse(&files[0].1)?,
            folder,
            sha256,
            files,
        })
    }

    /// Object path of its numbers.
    pub fn path(&self) -> String {
        format!("{}{REPORT_FILE}", self.folder)
    }

    /// Puts its files into a folder of this machine.
    pub fn write(&self, to: &Path) -> Result<(), Problem> {
        let cannot = |path: &Path, error: std::io::Error| {
            Problem::failed(format!("cannot write {}: {error}", path.display()))
        };
        std::fs::create_dir_all(to).map_err(|error| cannot(to, error))?;
        for (name, content) in &self.files {
            let path = to.join(name);
            std::fs::write(&path, content).map_err(|error| cannot(&path, error))?;
        }
        Ok(())
    }

    /// Where the page is.
    fn place(&self, store: &str, out: Option<&PathBuf>) -> String {
        match out {
            Some(folder) => folder.join(PAGE_FILE).display().to_string(),
            None => format!("{}/{}{PAGE_FILE}", store.trim_end_matches('/'), self.folder),
        }
    }
}

impl Read<TurnsReport> {
    /// The report of a comparison of turns that has ended well.
    pub async fn of_turns(store: &Store, key: &JobKey) -> Result<Self, Problem> {
        Self::read(store, key, TurnsReport::parse).await
    }

    /// For people.
    pub fn to_text(&self, store: &str, out: Option<&PathBuf>) -> String {
        format!(
            "{}\n\n{}\n\nreport: {}",
            in_terminal(&agreement_table(&self.report)),
            in_terminal(&arms_table(&self.report)),
            self.place(store, out)
        )
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let report = &self.report;
        json!({
            "job": report.job,
            "report": self.path(),
            "report_sha256": self.sha256,
            "arms": report.arms,
            "turns": {"pooled": report.pooled, "kinds": report.kinds},
        })
    }
}

impl Read {
    /// The report of a comparison of rollouts that has ended well.
    pub async fn of(store: &Store, key: &JobKey) -> Result<Self, Problem> {
        Self::read(store, key, Report::parse).await
    }

    /// For people.
    pub fn to_text(&self, store: &str, out: Option<&PathBuf>) -> String {
        let report = &self.report;
        let mut tables = vec![
            words::success(report),
            words::effort(report),
            words::difficulty(report),
        ];
        tables.push(words::left_out(report));
        tables.retain(|table| !table.rows.is_empty());
        let tables: Vec<String> = tables.iter().map(in_terminal).collect();
        let passed = if report.gate.passed {
            "passed"
        } else {
            "not passed"
        };
        format!(
            "{}\n\ngate {passed}: {}\nreport: {}",
            tables.join("\n\n"),
            plain(&report.gate.words),
            self.place(store, out)
        )
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let report = &self.report;
        json!({
            "job": report.job,
            "report": self.path(),
            "report_sha256": self.sha256,
            "arms": report.arms,
            "comparison": report.comparison,
            "gate": report.gate,
        })
    }
}

/// A table for a terminal.
pub fn in_terminal(table: &Table) -> String {
    rows_table(&table.header, &table.rows)
}
