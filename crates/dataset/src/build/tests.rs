use espalier_core::chat::Message;
use espalier_core::time::Timestamp;
use espalier_core::trace::FileEntry;

use super::*;
use crate::manifest::DatasetManifest;
use crate::source::Facts;

fn tokenizer() -> &'static Tokenizer {
    Tokenizer::shared().unwrap()
}

/// A conversation about a subject of its own.
fn source(task: &str, kind: &str, subject: usize) -> Source {
    let word = |n| sha256_hex(format!("{subject} {n}").as_bytes())[..6].to_owned();
    let words: Vec<String> = (0..60).map(word).collect();
    let asked = Message::User {
        content: format!("Tell of {}.", words[..10].join(" ")),
    };
    Source {
        id: format!("{task}-{subject}"),
        timestamp: String::new(),
        model: "m".into(),
        messages: vec![asked, Message::assistant(words.join(" "), None, vec![])],
        tools: vec![],
        facts: Facts {
            reward: Some(1.0),
            task_id: Some(task.into()),
            task_kind: Some(kind.into()),
            ..Facts::default()
        },
        thinking: true,
        keep_hints: None,
        calls: vec![],
    }
}

fn build(spec: &BuildSpec, sources: &[Source]) -> (Vec<Row>, DatasetManifest) {
    let mut builder = Builder::new(spec.clone(), tokenizer()).unwrap();
    for source in sources {
        builder
            .offer(&format!("trace/{}", source.id), source)
            .unwrap();
    }
    let mut chosen = builder.choose();
    let mut renderer = Renderer::new(tokenizer());
    let rows = sources.iter().enumerate();
    let rows = rows
        .flat_map(|(n, source)| chosen.rows(n, source, &mut renderer))
        .collect();
    (rows, chosen.manifest(vec![], vec![], Timestamp(0)))
}

fn fates(manifest: &DatasetManifest) -> Vec<String> {
    let fate = |entry: &SourceEntry| match (entry.split, entry.dropped) {
        (Some(split), None) => split.as_str().to_owned(),
        (None, Some(reason)) => format!("{reason:?} {}", entry.detail).trim().to_owned(),
        both => panic!("{both:?}"),
    };
    manifest.sources.iter().map(fate).collect()
}

fn all_train() -> BuildSpec {
    BuildSpec {
        eval_share: 0.0,
        ..BuildSpec::default()
    }
}

#[test]
fn every_source_has_a_fate_and_a_reason() {
    let mut unsolved = source("b", "shop", 2);
    unsolved.facts.reward = Some(0.0);
    let mut near = source("d", "shop", 1);
    near.messages.push(Message::User {
        content: "Thanks.".into(),
    });
    let mut silent = source("e", "shop", 5);
    silent.messages.pop();
    let mut again = source("a", "shop", 1);
    again.id = "again".into();
    let mut rejected = source("g", "shop", 7);
    rejected.facts.rejected = true;
    let sources = [
        source("a", "shop", 1),
        unsolved,
        again,
        near,
        silent,
        source("f", "shop", 6),
        rejected,
    ];
    let spec = BuildSpec {
        filter: Some("solved".parse().unwrap()),
        ..all_train()
    };
    let (rows, manifest) = build(&spec, &sources);
    let expected = [
        "train",
        "Filtered",
        "Duplicate trace/a-1",
        "NearDuplicate trace/a-1",
        "NothingTrained",
        "train",
        "Rejected",
    ];
    assert_eq!(fates(&manifest), expected);
    assert_eq!(rows.len(), 2);
    assert_eq!(manifest.counts.train_rows, 2);
    assert_eq!(manifest.counts.dropped.values().sum::<usize>(), 5);
}

#[test]
fn a_task_is_on_one_side_and_so_is_what_is_like_it() {
    let mut sources: Vec<Source> = (0..120)
        .map(|n| source(&format!("t{}", n % 40), "shop", n))
        .collect();
    // Of two tasks with the same subject, kept both.
    for task in 0..20 {
        let mut twin = source(&format!("twin{task}"), "shop", task);
        twin.messages.push(Message::User {
            content: "ok".into(),
        });
        sources.push(twin);
    }
    let spec = BuildSpec {
        keep_near: true,
        eval_share: 0.3,
        ..BuildSpec::default()
    };
    let (rows, manifest) = build(&spec, &sources);
    assert_eq!(rows.len(), 140);
    let mut sides: HashMap<&str, Split> = HashMap::new();
    for row in &rows {
        let task = row.task_id.as_deref().unwrap();
        let known = *sides.entry(task).or_insert(row.split);
        assert_eq!(known, row.split, "{task}");
    }
    for task in 0..20 {
        let (one, other) = (format!("t{task}"), format!("twin{task}"));
        assert_eq!(sides[one.as_str()], sides[other.as_str()], "{task}");
    }
    let counts = &manifest.counts;
    assert_eq!(
        counts.train_tasks + counts.eval_tasks,
        40,
        "twins are one group"
    );
    assert!(
        (5..20).contains(&counts.eval_tasks),
        "{}",
        counts.eval_tasks
    );
    assert_eq!(counts.train_rows + counts.eval_rows, 140);
}

#[test]
fn a_task_keeps_its_side_when_others_come() {
    let few: Vec<Source> = (0..30)
        .map(|n| source(&format!("t{n}"), "shop", n))
        .collect();
    let many: Vec<Source> = (0..60)
        .map(|n| source(&format!("t{n}"), "shop", n))
        .collect();
    let spec = BuildSpec {
        eval_share: 0.4,
        ..BuildSpec::default()
    };
    let (few, many) = (build(&spec, &few).1, build(&spec, &many).1);
    assert_eq!(fates(&few), fates(&many)[..30]);
    let other = BuildSpec { seed: 1, ..spec };
    let sources: Vec<Source> = (0..30)
        .map(|n| source(&format!("t{n}"), "shop", n))
        .collect();
    assert_ne!(fates(&build(&other, &sources).1), fates(&few));
}

#[test]
fn something_is_held_out_where_it_was_asked_for() {
    let spec = BuildSpec {
        eval_share: 1e-9,
        ..BuildSpec::default()
    };
    let sources = [source("a", "k", 1), source("b", "k", 2)];
    assert_eq!(build(&spec, &sources).1.counts.eval_tasks, 1);
    assert_eq!(
        build(&spec, &sources[..1]).1.counts.eval_tasks,
        0,
        "the only task is trained on"
    );
    assert_eq!(build(&all_train(), &sources).1.counts.eval_tasks, 0);
    let mut named = sources;
    named[0].facts.split = Some(Split::Eval);
    named[1].facts.split = Some(Split::Train);
    assert_eq!(fates(&build(&all_train(), &named).1), ["eval", "train"]);
}

#[test]
fn kinds_are_balanced_whatever_the_order() {
    let mut sources: Vec<Source> = (0..10).map(|n| source("a", "shop", n)).collect();
    sources.push(source("b", "bank", 11));
    let spec = BuildSpec {
        max_per_kind: Some(3),
        ..all_train()
    };
    let kept = |sources: &[Source]| {
        let (rows, manifest) = build(&spec, sources);
        assert_eq!(manifest.counts.dropped, [(DropReason::OverKind, 7)].into());
        let mut ids: Vec<String> = rows.into_iter().map(|row| row.id).collect();
        ids.sort();
        ids
    };
    let first = kept(&sources);
    assert_eq!(first.len(), 4);
    sources.reverse();
    assert_eq!(kept(&sources), first);
}

#[test]
fn what_cannot_be_read_or_rendered_is_named() {
    let mut builder = Builder::new(all_train(), tokenizer()).unwrap();
    builder.offer_unreadable("gone", "no such object").unwrap();
    builder.offer("one", &source("a", "k", 1)).unwrap();
    let mut chosen = builder.choose();
    assert_eq!(
        (chosen.split(0), chosen.split(1), chosen.split(2)),
        (None, Some(Split::Train), None)
    );
    chosen.unreadable(1, "gone meanwhile");
    let manifest = chosen.manifest(vec![], vec![], Timestamp(0));
    assert_eq!(
        fates(&manifest),
        ["Unreadable no such object", "Unreadable gone meanwhile"]
    );
}

#[test]
fn settings_obey_their_rules() {
    for (spec, error) in [
        (
            BuildSpec {
                eval_share: 1.0,
                ..BuildSpec::default()
            },
            "`eval_share` must be in [0, 1), got `1`",
        ),
        (
            BuildSpec {
                near: 0.2,
                ..BuildSpec::default()
            },
            "`near` must be in [0.5, 1], got `0.2`",
        ),
        (
            BuildSpec {
                max_per_kind: Some(0),
                ..BuildSpec::default()
            },
            "`max_per_kind` must be at least 1, got `0`",
        ),
    ] {
        assert_eq!(spec.check().unwrap_err().to_string(), error);
    }
    let error = serde_json::from_str::<BuildSpec>(r#"{"where": "x"}"#).unwrap_err();
    assert!(error.to_string().contains("at column 1"), "{error}");
    assert!(serde_json::from_str::<BuildSpec>(r#"{"wher": ""}"#).is_err());
    assert_eq!(
        serde_json::from_str::<BuildSpec>("{}").unwrap(),
        BuildSpec::default()
    );
}

/// Version 1 of the manifest, as it lies in stores.
#[test]
fn the_manifest_is_written_and_read_as_its_golden() {
    let golden = include_str!("golden/manifest-v1.json");
    let mut sources: Vec<Source> = (0..4)
        .map(|n| source(&format!("t{n}"), "shop", n))
        .collect();
    sources.push(source("t0", "shop", 0));
    let spec = BuildSpec {
        filter: Some("reward >= 0.9".parse().unwrap()),
        max_per_kind: Some(3),
        eval_share: 0.5,
        ..BuildSpec::default()
    };
    let mut built = build(&spec, &sources).1;
    built.created_at_us = Timestamp(1_750_000_000_000_000);
    built.files = vec![FileEntry::of(
        "p/batches/b/jobs/j/a-1/data/train-00000-of-00001.parquet",
        b"x",
    )];
    let written = serde_json::to_string_pretty(&built).unwrap() + "\n";
    assert_eq!(written, golden);
    assert_eq!(DatasetManifest::parse(golden.as_bytes()).unwrap(), built);
    let newer = golden.replace("\"schema_version\": 1", "\"schema_version\": 2");
    let error = DatasetManifest::parse(newer.as_bytes())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "`schema_version` must be 1, got `2`");
}
