//! The stored formats, version 1, as they lie in object stores. These files must never change; a new version gets files
//! of its own, and the old ones must still be read or refused by version.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;

use espalier_core::adapter::{AdapterKind, AdapterVersion, LatestEntry};
use espalier_core::answers::Piece;
use espalier_core::compare::{REPORT_FILE, Report};
use espalier_core::dataset::DatasetVersion;
use espalier_core::id::{AdapterName, DatasetName, JobKey, PipelineName};
use espalier_core::layout;
use espalier_core::pipeline::{self, PipelinePlan, StepDigest, StepRecord};
use espalier_core::trace::edits::Patch;
use espalier_core::trace::{Manifest, Step, Trace, TraceError};
use serde::Serialize;
use serde::de::DeserializeOwned;

const TRACE: &str = include_str!("golden/trace-v1.json");
const STEPS: &str = include_str!("golden/steps-v1.jsonl");
const MANIFEST_OF_ANSWERS: &str = include_str!("golden/manifest-generate-v1.json");
const MANIFEST_OF_AN_EXPORT: &str = include_str!("golden/manifest-export-v1.json");
const MANIFEST_OF_A_COMPARISON: &str = include_str!("golden/manifest-compare-v1.json");
const REPORT: &str = include_str!("golden/report-v1.json");
const LATEST: &str = include_str!("golden/latest-v1.json");
const PIECE: &str = include_str!("golden/piece-v1.json");
const PATCHES: &str = include_str!("golden/patches-v1.jsonl");
const DATASET: &str = include_str!("golden/dataset-v1.json");
const ADAPTER: &str = include_str!("golden/adapter-v1.json");
const PIPELINE_STEPS: &str = include_str!("golden/pipeline-steps-v1.jsonl");
const PIPELINE_PLAN: &str = include_str!("golden/pipeline-plan-v1.json");
const MANIFEST: &str = include_str!("golden/manifest-v1.json");

/// Reads `text` and writes it again, byte by byte the same.
fn reads_and_writes<T: DeserializeOwned + Serialize>(text: &str) -> T {
    let value: T = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string_pretty(&value).unwrap() + "\n", text);
    value
}

#[test]
fn a_trace_of_version_1() {
    let trace: Trace = reads_and_writes(TRACE);
    assert_eq!(Trace::from_json(TRACE.as_bytes()).unwrap(), trace);
    assert_eq!(trace.answer(), "The red lamp costs 24.50 €.");
    assert_eq!(trace.reward(), Some(0.5));
    assert_eq!(trace.summary().reason, "it ends at the cart");
}

#[test]
fn steps_of_version_1_add_up_to_the_trace() {
    for line in STEPS.lines() {
        let step: Step = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&step).unwrap(), line);
    }
    let trace: Trace = serde_json::from_str(TRACE).unwrap();
    assert_eq!(Trace::from_lines(STEPS).unwrap(), trace);
}

#[test]
fn steps_that_were_cut_off_say_how_far_they_came() {
    let cut: Vec<&str> = STEPS.lines().take(4).collect();
    let error = Trace::from_lines(&cut.join("\n")).unwrap_err();
    assert_eq!(error, TraceError::NoOutcome { messages: 3 });
    let torn = &STEPS[..STEPS.len() / 2];
    assert!(matches!(
        Trace::from_lines(torn),
        Err(TraceError::Line { .. })
    ));
}

#[test]
fn a_manifest_of_version_1() {
    let manifest: Manifest = reads_and_writes(MANIFEST);
    let job: JobKey = "shop/b1/lamp".parse().unwrap();
    assert_eq!(
        Manifest::parse(MANIFEST.as_bytes(), &job).unwrap(),
        manifest
    );
    assert_eq!(manifest.trace_file().unwrap().size, 2048);
    assert_eq!(manifest.summary.rollout().unwrap().solved(), Some(false));
}

#[test]
fn a_manifest_of_answers_and_the_record_of_a_piece_of_version_1() {
    let manifest: Manifest = reads_and_writes(MANIFEST_OF_ANSWERS);
    let job: JobKey = "shop/b1/night".parse().unwrap();
    let parse = |text: &str| Manifest::parse(text.as_bytes(), &job);
    assert_eq!(parse(MANIFEST_OF_ANSWERS).unwrap(), manifest);
    assert_eq!(manifest.trace_file(), None);
    assert_eq!(manifest.summary.generate().unwrap().lines, 12);
    let disordered = MANIFEST_OF_ANSWERS.replacen("answers-00001", "answers-00002", 1);
    assert_eq!(parse(&disordered).unwrap_err().field, "manifest.files");

    let piece: Piece = reads_and_writes(PIECE);
    assert_eq!(Piece::parse(PIECE.as_bytes()), Some(piece));
    let later = PIECE.replacen("\"version\": 1", "\"version\": 2", 1);
    assert_eq!(Piece::parse(later.as_bytes()), None);
}

#[test]
fn an_export_of_version_1() {
    let manifest: Manifest = reads_and_writes(MANIFEST_OF_AN_EXPORT);
    let job: JobKey = "shop/b1/out".parse().unwrap();
    assert_eq!(
        Manifest::parse(MANIFEST_OF_AN_EXPORT.as_bytes(), &job).unwrap(),
        manifest
    );
    assert_eq!(
        manifest.files[0].path,
        layout::export_record(&job, manifest.fence)
    );
    assert_eq!(manifest.summary.export().unwrap().exported_to, "me/shop");
}

#[test]
fn a_comparison_of_version_1() {
    let manifest: Manifest = reads_and_writes(MANIFEST_OF_A_COMPARISON);
    let job: JobKey = "shop/eval/compare".parse().unwrap();
    let path = format!(
        "{}{REPORT_FILE}",
        layout::report_files(&job, manifest.fence)
    );
    assert_eq!(manifest.files[0].path, path);
    let report: Report = reads_and_writes(REPORT);
    assert_eq!(Report::parse(REPORT.as_bytes()).unwrap(), report);
    assert_eq!(manifest.summary.compare(), Some(&report.summary()));
    let newer = REPORT.replacen("\"report_version\": 1", "\"report_version\": 2", 1);
    let error = Report::parse(newer.as_bytes()).unwrap_err();
    assert_eq!(error.field, "report.report_version");
}

#[test]
fn an_entry_of_version_1_says_what_is_latest() {
    let entry: LatestEntry = reads_and_writes(LATEST);
    let name: AdapterName = "shop".parse().unwrap();
    assert_eq!(
        LatestEntry::parse(LATEST.as_bytes(), &name, 2).unwrap(),
        entry
    );
}

#[test]
fn a_manifest_that_points_elsewhere_is_refused() {
    let job: JobKey = "shop/b1/lamp".parse().unwrap();
    let refused = |from: &str, to: &str| {
        let text = MANIFEST.replacen(from, to, 1);
        assert_ne!(text, MANIFEST, "{from}");
        Manifest::parse(text.as_bytes(), &job).unwrap_err().field
    };
    assert_eq!(
        refused("\"schema_version\": 1", "\"schema_version\": 2"),
        "manifest.schema_version"
    );
    assert_eq!(
        refused("\"job\": \"shop/b1/lamp\"", "\"job\": \"shop/b1/other\""),
        "manifest.job"
    );
    assert_eq!(
        refused("\"path\": \"shop/blobs/", "\"path\": \"bank/blobs/"),
        "manifest.files"
    );
    assert_eq!(
        refused("\"path\": \"shop/blobs/", "\"path\": \"shop/blobs/../"),
        "manifest.files"
    );
    assert_eq!(
        refused("a-7/trace.json.zst", "a-7/other.json.zst"),
        "manifest.files"
    );
}

#[test]
fn another_version_is_refused_by_its_number() {
    let later = TRACE.replacen("\"schema_version\": 1", "\"schema_version\": 2", 1);
    assert_eq!(
        Trace::from_json(later.as_bytes()),
        Err(TraceError::Version { found: 2 })
    );
}

/// Every kind of patch, and each kind of edit.
#[test]
fn patches_of_version_1() {
    let mut kinds = BTreeSet::new();
    for line in PATCHES.lines() {
        let patch = Patch::parse(line.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&patch).unwrap(), line);
        kinds.insert(patch.change.kind());
    }
    assert_eq!(kinds.len(), 8, "{kinds:?}");
    let newer = PATCHES.replace("\"schema_version\":1", "\"schema_version\":2");
    let error = Patch::parse(newer.lines().next().unwrap().as_bytes()).unwrap_err();
    assert_eq!(error, "`schema_version` must be 1, got `2`");
}

#[test]
fn a_version_of_an_adapter_of_version_1() {
    let record: AdapterVersion = reads_and_writes(ADAPTER);
    let name: AdapterName = "shop".parse().unwrap();
    let parse = |text: &str, n| AdapterVersion::parse(text.as_bytes(), &name, n);
    assert_eq!(parse(ADAPTER, 3).unwrap(), record);
    assert_eq!(record.kind, AdapterKind::Lora);
    for (from, to, field) in [
        (
            "\"record_version\": 1",
            "\"record_version\": 2",
            "record_version",
        ),
        ("\"name\": \"shop\"", "\"name\": \"other\"", "name"),
        (
            "a-42/adapter/adapter_model",
            "a-42/adapter/x/adapter_model",
            "files",
        ),
        (
            "a-42/adapter/adapter_model",
            "a-41/adapter/adapter_model",
            "files",
        ),
        ("adapter/adapter_config.json", "adapter/..", "files"),
    ] {
        let changed = ADAPTER.replacen(from, to, 1);
        assert_ne!(changed, ADAPTER);
        let error = parse(&changed, 3).unwrap_err();
        assert_eq!(error.field, format!("adapter.{field}"), "{to}");
    }
    assert_eq!(parse(ADAPTER, 4).unwrap_err().field, "adapter.n");
    // What came later is read where it is there.
    assert_eq!(record.training.agreement, None);
    let told =
        r#""wall_ms": 360000, "agreement": {"traces": 2, "tokens": 9, "mean": 1e-7, "max": 3e-7}"#;
    let compared = ADAPTER.replacen("\"wall_ms\": 360000", told, 1);
    let agreement = parse(&compared, 3).unwrap().training.agreement.unwrap();
    let difference = agreement.difference().unwrap();
    assert_eq!((difference.tokens, difference.mean), (9, 1e-7));
}

#[test]
fn a_version_of_a_data_set_of_version_1() {
    let record: DatasetVersion = reads_and_writes(DATASET);
    let name: DatasetName = "clicks".parse().unwrap();
    let parse = |text: &str, n| DatasetVersion::parse(text.as_bytes(), &name, n);
    assert_eq!(parse(DATASET, 2).unwrap(), record);
    assert_eq!(record.rows("train", "parquet"), [&record.files[0]]);
    assert_eq!(record.rows("eval", "jsonl"), [] as [&_; 0]);
    for (from, to, field) in [
        (
            "\"record_version\": 1",
            "\"record_version\": 2",
            "record_version",
        ),
        ("\"name\": \"clicks\"", "\"name\": \"other\"", "name"),
        ("a-42/dataset/train", "a-42/dataset/x/train", "files"),
        ("a-42/dataset/train", "a-41/dataset/train", "files"),
        ("dataset/manifest.json", "dataset/other.json", "files"),
    ] {
        let changed = DATASET.replacen(from, to, 1);
        assert_ne!(changed, DATASET);
        let error = parse(&changed, 2).unwrap_err();
        assert_eq!(error.field, format!("dataset.{field}"), "{to}");
    }
    assert_eq!(parse(DATASET, 3).unwrap_err().field, "dataset.n");
}

/// Every kind of step that leaves a record.
#[test]
fn steps_of_a_pipeline_of_version_1() {
    let name: PipelineName = "shop".parse().unwrap();
    let digest: StepDigest = "0123456789ab".parse().unwrap();
    let parse = |line: &str| StepRecord::parse(line.as_bytes(), &name, &digest);
    for line in PIPELINE_STEPS.lines() {
        let record = parse(line).unwrap();
        assert_eq!(serde_json::to_string(&record).unwrap(), line);
        for (from, to, field) in [
            (
                "\"record_version\":1",
                "\"record_version\":2",
                "record_version",
            ),
            ("\"pipeline\":\"shop\"", "\"pipeline\":\"bank\"", "pipeline"),
            ("\"digest\":\"0123", "\"digest\":\"1123", "digest"),
        ] {
            let error = parse(&line.replacen(from, to, 1)).unwrap_err();
            assert_eq!(error.field, format!("step.{field}"), "{line}");
        }
        let other = match record.step {
            pipeline::Step::Publish => "train",
            _ => "publish",
        };
        let from = format!("\"step\":\"{}\"", record.step);
        let changed = line.replacen(&from, &format!("\"step\":\"{other}\""), 1);
        assert_eq!(parse(&changed).unwrap_err().field, "step.output", "{line}");
    }
}

#[test]
fn a_plan_of_a_pipeline_of_version_1() {
    let plan: PipelinePlan = reads_and_writes(PIPELINE_PLAN);
    let name: PipelineName = "shop".parse().unwrap();
    let parse = |text: &str| PipelinePlan::parse(text.as_bytes(), &name);
    assert_eq!(parse(PIPELINE_PLAN).unwrap(), plan);
    assert_eq!(plan.step(pipeline::Step::Rollouts).unwrap().jobs, 480);
    assert_eq!(plan.step(pipeline::Step::Probe), None);
    for (from, to, field) in [
        ("\"plan_version\": 1", "\"plan_version\": 2", "plan_version"),
        (
            "\"pipeline\": \"shop\"",
            "\"pipeline\": \"bank\"",
            "pipeline",
        ),
        ("\"rounds\": 2", "\"rounds\": 0", "rounds"),
    ] {
        let error = parse(&PIPELINE_PLAN.replacen(from, to, 1)).unwrap_err();
        assert_eq!(error.field, format!("plan.{field}"));
    }
}
