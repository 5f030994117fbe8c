//! A pipeline of a test: its files, how `espalier run` is given them, and what it leaves in the store.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use espalier_core::adapter::LatestEntry;
use espalier_core::layout;
use espalier_core::pipeline::StepRecord;
use espalier_proto::v1;
use serde_json::Value;

use super::cluster::Cluster;
use super::tiny;

/// What it, its adapter and its data set are called.
const NAME: &str = "shop";
const WRITABLE: &str = "the test's folder is writable";

/// A file of a pipeline, and how it is run.
#[derive(Debug)]
pub struct Pipeline<'a> {
    cluster: &'a Cluster,
    /// Where its files are.
    pub folder: PathBuf,
    head: String,
}

impl<'a> Pipeline<'a> {
    /// Writes the files, with a tiny model as the base. `head` and, behind it, `more` follow its name and its base.
    pub fn new(cluster: &'a Cluster, tasks: &str, head: &str, more: &str) -> Self {
        let pipeline = Self::written(cluster, head);
        std::fs::create_dir_all(&pipeline.folder).expect(WRITABLE);
        if !pipeline.base().exists() {
            tiny::write_model(&pipeline.base());
        }
        std::fs::write(pipeline.folder.join("tasks.jsonl"), tasks).expect(WRITABLE);
        pipeline.write(more);
        pipeline
    }

    /// The one whose files `new` has written; who runs it may be reading them.
    pub fn written(cluster: &'a Cluster, head: &str) -> Self {
        Self {
            cluster,
            folder: cluster.folder.path().join("pipeline"),
            head: head.to_owned(),
        }
    }

    /// Writes its file anew.
    pub fn write(&self, more: &str) {
        let text = format!(
            "name = {NAME:?}\nbase = {:?}\n{}{more}",
            self.base(),
            self.head
        );
        std::fs::write(self.file(), text).expect(WRITABLE);
    }

    /// The folder of the base model.
    pub fn base(&self) -> PathBuf {
        self.folder.join("base")
    }

    /// The pipeline's file.
    pub fn file(&self) -> PathBuf {
        self.folder.join("improve.toml")
    }

    /// Where its report goes.
    pub fn out(&self) -> PathBuf {
        self.folder.join("report")
    }

    /// `espalier run` on it.
    pub fn command(&self, more: &[&str]) -> Command {
        self.command_with(&self.out(), more)
    }

    /// The same with a report elsewhere.
    pub fn command_with(&self, out: &Path, more: &[&str]) -> Command {
        let mut command = self.cluster.user();
        command.arg("run").arg(self.file());
        command.args(["--store", &self.cluster.store_url()]);
        command.arg("--out").arg(out).args(more);
        command
    }

    /// Runs it to its end.
    pub async fn run(&self, more: &[&str]) -> Output {
        output(self.command(more)).await
    }

    /// Runs it for programs; gives the exit code, the events and the report.
    pub async fn json(&self) -> (Option<i32>, Vec<Value>, Value) {
        let output = self.run(&["--json"]).await;
        let said = String::from_utf8_lossy(&output.stderr);
        let lines = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect();
        let report = lines
            .last()
            .map_or(Value::Null, |last| last["report"].clone());
        assert!(report.is_object(), "{lines:#?} {said}");
        let events = lines.iter().map(|line| line["event"].clone()).collect();
        (output.status.code(), events, report)
    }

    /// The records of its steps, by the name of the step.
    pub fn records(&self) -> Vec<StepRecord> {
        let project = "default".parse().expect("a name");
        let name = NAME.parse().expect("a name");
        let folder = self
            .cluster
            .object(&layout::pipeline_steps(&project, &name));
        let read = |entry: std::fs::DirEntry| {
            let bytes = std::fs::read(entry.path()).expect("a record");
            let file = entry.file_name().into_string().expect("UTF-8");
            let digest = file
                .strip_suffix(".json")
                .and_then(|digest| digest.parse().ok());
            StepRecord::parse(&bytes, &name, &digest.expect("a digest")).expect("a record")
        };
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut records: Vec<StepRecord> = entries.map(read).collect();
        records.sort_by_key(|record| (record.step.as_str(), record.round));
        records
    }

    /// The steps that have a record, by name.
    pub fn steps(&self) -> Vec<&'static str> {
        self.records()
            .iter()
            .map(|record| record.step.as_str())
            .collect()
    }

    /// What became `latest`, in order.
    pub fn latest(&self) -> Vec<LatestEntry> {
        let project = "default".parse().expect("a name");
        let name = NAME.parse().expect("a name");
        let read = |seq| {
            let path = layout::adapter_latest(&project, &name, seq);
            let bytes = std::fs::read(self.cluster.object(&path)).ok()?;
            Some(LatestEntry::parse(&bytes, &name, seq).expect("an entry"))
        };
        (1..).map_while(read).collect()
    }

    /// The batches of the coordinator, which must be those of the records.
    pub async fn batches(&self) -> Vec<v1::Batch> {
        let mut client = self.cluster.client().await;
        let request = v1::ListBatchesRequest::default();
        let listed = client.jobs.list_batches(request).await.expect("it answers");
        let mut batches = listed.into_inner().batches;
        batches.sort_by(|a, b| a.batch.cmp(&b.batch));
        batches
    }
}

/// Runs it to its end.
pub async fn output(mut command: Command) -> Output {
    let run = tokio::task::spawn_blocking(move || command.output());
    let run = run.await.expect("the command is awaited");
    run.expect("the command was built with the tests")
}

/// All that it said.
pub fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}
