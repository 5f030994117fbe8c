//! The closed loop as one pipeline: real coordinator, workers and trainer, the command that people use, killed on the way, given
//! twice at once, and given what it cannot learn from.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::time::Duration;

use espalier_core::adapter::Agreement;
use espalier_core::pipeline::{StepOutput, StepRecord};
use espalier_proto::v1::{self, JobState};
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::{self, sum_job};
use espalier_tests::harness::pipeline::{Pipeline, output, said};
use espalier_tests::harness::process::Process;
use espalier_tests::harness::serving::Serving;
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);
/// It errs in half of its turns.
const CARELESS: &str = "scripted:0.5";
/// Every step of a round that leaves a record.
const STEPS: [&str; 8] = [
    "baseline",
    "comparison",
    "dataset",
    "evaluation",
    "probe",
    "publish",
    "rollouts",
    "train",
];

/// Tasks of two kinds: `train` of them to learn, `eval` to be measured on.
fn tasks(train: usize, eval: usize, verify: Option<&Value>) -> String {
    let one = |n: usize| {
        let mut job = sum_job(&format!("sum-{n:02}"), n);
        job["task_kind"] = json!(if n.is_multiple_of(2) { "even" } else { "odd" });
        job["split"] = json!(if n < train { "train" } else { "eval" });
        job["hints"] = json!("Add one.");
        job["prompt"] = json!(job["prompt"].as_str().unwrap().replace("Do it", "${what}"));
        if let Some(verify) = verify {
            job["verify"] = verify.clone();
        }
        job.to_string() + "\n"
    };
    (0..train + eval).map(one).collect()
}

/// A cluster whose coordinator knows one scripted model as the careless one and as each of these versions, which do not err.
async fn cluster(versions: &[&str]) -> Cluster {
    let url = model::start().await;
    let endpoint = |name: &&str| {
        format!(
            "[[model_endpoints]]\nname = {name:?}\nmodel = {name:?}\nurl = {url:?}\nvllm_extensions = false\n"
        )
    };
    let models = [&[CARELESS], versions].concat();
    Cluster::start_with(Setup {
        more: models.iter().map(endpoint).collect(),
        // A worker that is killed is missed soon.
        lease_ttl_ms: 5_000,
        ..Setup::new("embedded", "")
    })
    .await
}

/// What stands in every pipeline's file; `more` of a test comes behind.
fn head() -> String {
    format!(
        "model = \"{CARELESS}\"\n[tasks]\ntrain = \"tasks.jsonl\"\neval = \"tasks.jsonl\"\nvars = {{ what = \"Do it\" }}\n\
         [train]\nrank = 4\nbatch = 2\naccumulation = 1\n[dataset]\nkeep_near = true\neval_share = 0\n\
         tokenizer = \"qwen3\"\n"
    )
}

fn shop<'a>(cluster: &'a Cluster, tasks: &str, more: &str) -> Pipeline<'a> {
    Pipeline::new(cluster, tasks, &head(), more)
}

const PROBED: &str = "[probe]\nsamples = 2\n[rollouts]\nsamples = 4\n[evaluate]\nprices = { prompt = 1.0, completion = 2.0 }\n\
                      [gate]\nmin_tasks = 8\n";

#[tokio::test]
async fn a_model_learns_from_what_it_solved_and_takes_the_place_of_the_one_before() {
    let cluster = cluster(&["shop@v1", "shop@v2"]).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let _trainer = cluster.train_worker("trainer");
    let pipeline = shop(&cluster, &tasks(6, 10, None), PROBED);

    let dry = pipeline.run(&["--dry-run"]).await;
    assert!(dry.status.success(), "{}", said(&dry));
    assert!(
        said(&dry).contains("○ rollouts    24 at most"),
        "{}",
        said(&dry)
    );
    assert!(pipeline.batches().await.is_empty() && pipeline.steps().is_empty());

    let (code, events, report) = pipeline.json().await;
    assert_eq!(code, Some(0), "{report:#}");
    assert_eq!(pipeline.steps(), STEPS);
    assert_eq!(report["published"], "shop@v1");
    let begun = events.iter().filter(|event| event["state"] == "begun");
    assert_eq!(begun.count(), 7);
    let records = pipeline.records();
    let record = |step: &str| records.iter().find(|r| r.step.as_str() == step).unwrap();
    let StepOutput::Probe { tasks, dropped } = &record("probe").output else {
        panic!()
    };
    assert_eq!(tasks.always + tasks.sometimes + tasks.never, 6);
    let left = 6 - dropped.len() as u64;
    assert_eq!(record("rollouts").counts.jobs, left * 4);
    let counts = record("baseline").counts;
    assert!(
        counts.solved < counts.judged && counts.judged == 10,
        "{counts:?}"
    );
    assert_eq!(record("evaluation").counts.solved, 10);
    assert!(matches!(
        &record("comparison").output,
        StepOutput::Comparison { passed: true, tasks: 10, difference, .. } if difference.low > 0.0
    ));
    let entry = &pipeline.latest()[0];
    assert_eq!((entry.version, pipeline.latest().len()), (1, 1));
    let rollouts = record("rollouts").batch.as_ref().unwrap();
    // The scripted model gives no ids, and what was looked at are its rollouts.
    let why = unmeasured(record("train"));
    assert!(
        why.contains(rollouts.as_str()) && why.contains("its endpoint gave none"),
        "{why}"
    );
    assert!(hints_are_in_the_rollouts_alone(&cluster, rollouts.as_str()).await);
    report_is_whole(&pipeline.out());

    // The same again finds everything done.
    let batches = pipeline.batches().await;
    assert_eq!(batches.len(), 7);
    let again = pipeline.run(&[]).await;
    let told = said(&again);
    assert!(again.status.success(), "{told}");
    for part in [
        "done before",
        "shop@v1 is latest",
        "espalier lineage shop@v1",
        "espalier adapters rollback shop",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(pipeline.batches().await, batches);
    assert_eq!(
        (pipeline.latest().len(), pipeline.records()),
        (1, records.clone())
    );

    // Another price makes another report, and publishes nothing again.
    pipeline.write(&PROBED.replace("prompt = 1.0", "prompt = 3.0"));
    let (code, _, report) = pipeline.json().await;
    assert_eq!(
        (code, &report["published"]),
        (Some(0), &json!("shop@v1")),
        "{report:#}"
    );
    assert_eq!(
        (pipeline.records().len(), pipeline.latest().len()),
        (records.len() + 1, 1)
    );

    // A change of what is asked of the comparison compares again and decides again, and nothing else.
    pipeline.write(&PROBED.replace("min_tasks = 8", "min_tasks = 30"));
    let (code, _, report) = pipeline.json().await;
    assert_eq!(
        (code, &report["end"]),
        (Some(1), &json!("complete")),
        "{report:#}"
    );
    assert!(
        report["verdict"]
            .as_str()
            .unwrap()
            .contains("`min_tasks` is 30"),
        "{report:#}"
    );
    assert_eq!(pipeline.records().len(), records.len() + 3);
    assert_eq!(
        (pipeline.batches().await.len(), pipeline.latest().len()),
        (9, 1)
    );

    // Who looks on sees the same end.
    let mut watch = cluster.user();
    watch.args(["watch", "shop", "--store", &cluster.store_url()]);
    let watched = output(watch).await;
    assert_eq!(watched.status.code(), Some(1), "{}", said(&watched));
    assert!(said(&watched).contains("comparison"), "{}", said(&watched));
    let mut once = cluster.user();
    once.args(["watch", "shop", "--once", "--store", &cluster.store_url()]);
    let once = output(once).await;
    assert!(once.status.success(), "{}", said(&once));
    assert!(said(&once).contains("publish"), "{}", said(&once));

    // A version that was measured against the first model alone does not take the place of another one.
    pipeline.write(PROBED);
    let anew = pipeline.run(&["--again", "train"]).await;
    let told = said(&anew);
    assert!(anew.status.success(), "{told}");
    for part in [
        "The gate passes",
        "Nothing was published: shop@v1 is latest, and shop@v2 was measured against",
        "espalier adapters promote shop@v2 --comparison",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(pipeline.latest().len(), 1);
    worker.terminate(DEADLINE).await;
}

/// Why a training was not held against serving.
fn unmeasured(record: &StepRecord) -> &str {
    match &record.output {
        StepOutput::Adapter {
            agreement: Some(Agreement::Unmeasured { unmeasured }),
            ..
        } => unmeasured,
        output => panic!("{output:?}"),
    }
}

/// Whether the traces that are learned from have hints, and those that are measured do not.
async fn hints_are_in_the_rollouts_alone(cluster: &Cluster, rollouts: &str) -> bool {
    let mut client = cluster.client().await;
    let request = v1::ListJobsRequest {
        batch: rollouts.to_owned(),
        ..v1::ListJobsRequest::default()
    };
    let jobs = client
        .jobs
        .list_jobs(request)
        .await
        .unwrap()
        .into_inner()
        .jobs;
    let done = jobs.iter().find(|job| job.state() == JobState::Succeeded);
    let trace = client.trace(rollouts, &done.unwrap().id).await;
    let listed = client
        .jobs
        .list_batches(v1::ListBatchesRequest::default())
        .await;
    let batches = listed.unwrap().into_inner().batches;
    let measured = batches
        .iter()
        .find(|b| b.batch.contains(".baseline."))
        .unwrap();
    let other = client.trace(&measured.batch, "sum-06.s0").await;
    let has = |trace: &espalier_core::trace::Trace| {
        trace
            .messages
            .iter()
            .any(|m| m.content().contains("Add one."))
    };
    has(&trace) && !has(&other)
}

fn report_is_whole(folder: &Path) {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let (page, text) = (read("report.html"), read("report.md"));
    for part in [
        "Pipeline shop",
        "Difficulty of the training tasks",
        "Traces side by side",
        "USD",
        "agreement not measured",
        "its endpoint gave none",
        "· adapter ",
        "data set ",
        "✓ trace ",
        "0 broken",
    ] {
        assert!(page.contains(part) && text.contains(part), "{part}");
    }
    assert_eq!(page.matches("<body>").count(), 1);
    assert!(page.matches("<svg").count() >= 4 && page.ends_with("</body></html>\n"));
    for bad in ["<script", "src=", "href=", "http-equiv=\"refresh"] {
        assert!(!page.contains(bad), "{bad}");
    }
    let report: Value = serde_json::from_str(&read("report.json")).unwrap();
    let report = &report["report"];
    assert_eq!(report["published"], "shop@v1");
    assert_eq!(report["lineage"]["kind"], "adapter");
    assert!(
        !report["comparison"]["sources"]
            .as_array()
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn whoever_is_killed_costs_nothing_that_has_ended() {
    let mut cluster = cluster(&["shop@v1"]).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 2);
    let trainer = cluster.train_worker("trainer");
    let more = "[rollouts]\nsamples = 4\n[gate]\nmin_tasks = 8\n";
    let tasks = tasks(6, 10, None);
    let pipeline = shop(&cluster, &tasks, more);

    // The client goes while its rollouts run, then a worker with some of them, then the coordinator.
    let mut first = Process::start("run", pipeline.command(&[]), cluster.folder.path());
    let rollouts = wait_for("some rollouts", DEADLINE, || async {
        let batches = pipeline.batches().await;
        let counts = |batch: &v1::Batch| batch.counts.unwrap_or_default();
        let found = batches
            .iter()
            .find(|batch| batch.batch.contains(".rollouts."));
        let found = found.filter(|batch| counts(batch).succeeded > 0).cloned();
        found.ok_or(batches)
    })
    .await;
    first.kill();
    worker.kill(DEADLINE).await;
    cluster.coordinators[0].process.kill();
    cluster.restart_coordinator(0).await;
    let pipeline = shop(&cluster, &tasks, more);
    let mut worker = cluster.worker_with_cpu_slots("b", 4);

    // The second client goes when the training has begun, and the trainer with it.
    let mut second = Process::start("again", pipeline.command(&[]), cluster.folder.path());
    wait_for("the training", DEADLINE, || {
        let ended = second.ended();
        assert!(ended.is_none(), "{ended:?} {}", second.log());
        let is_there = trainer.log().contains("shop@v1, train");
        async move { is_there.then_some(()).ok_or(()) }
    })
    .await;
    second.kill();
    drop(trainer);
    let _trainer = cluster.train_worker("other");

    let (code, events, report) = pipeline.json().await;
    assert_eq!(code, Some(0), "{report:#}");
    let is_earlier = |step: &str| {
        events
            .iter()
            .any(|event| event["step"] == step && event["is_earlier"] == json!(true))
    };
    assert!(
        is_earlier("rollouts") && is_earlier("dataset"),
        "{events:#?}"
    );
    let attached = events.iter().find(|event| event["state"] == "attached");
    assert_eq!(attached.unwrap()["step"], "train");
    let batches = pipeline.batches().await;
    assert_eq!(batches.len(), 6, "{batches:#?}");
    let same = batches.iter().find(|batch| batch.batch == rollouts.batch);
    assert_eq!(same.unwrap().created_at_us, rollouts.created_at_us);
    assert_eq!((pipeline.steps().len(), pipeline.latest().len()), (7, 1));
    worker.terminate(DEADLINE).await;
}

#[tokio::test]
async fn two_at_once_do_everything_once_over_two_rounds() {
    let cluster = cluster(&["shop@v1", "shop@v2"]).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let _trainer = cluster.train_worker("trainer");
    // Whatever is not worse passes.
    let more = "[rollouts]\nsamples = 4\n[gate]\nmin_tasks = 8\nmin_difference = -0.9\n";
    let pipeline = shop(&cluster, &tasks(6, 10, None), more);
    let rounds = ["--rounds", "2", "--json"];
    let one = pipeline.command(&rounds);
    let two = pipeline.command_with(&pipeline.folder.join("other"), &rounds);
    let (first, second) = tokio::join!(output(one), async {
        wait_for("the first to begin", DEADLINE, || async {
            let begun = pipeline.batches().await.len();
            (begun > 0).then_some(()).ok_or(begun)
        })
        .await;
        output(two).await
    });
    for output in [&first, &second] {
        assert_eq!(
            output.status.code(),
            Some(0),
            "a gate passed: {}",
            said(output)
        );
        // The second round's model solves all that the first one's does.
        assert!(
            said(output).contains("the data carry no signal"),
            "{}",
            said(output)
        );
    }
    assert!(
        said(&second).contains("\"state\":\"attached\""),
        "{}",
        said(&second)
    );
    let batches = pipeline.batches().await;
    let of = |step: &str| {
        let named = |batch: &&v1::Batch| batch.batch.contains(&format!(".{step}."));
        batches.iter().filter(named).count()
    };
    let found = [
        "baseline",
        "rollouts",
        "dataset",
        "train",
        "evaluation",
        "comparison",
    ]
    .map(of);
    assert_eq!(found, [1, 2, 2, 2, 2, 2], "{batches:#?}");
    let versions: Vec<u32> = pipeline
        .latest()
        .iter()
        .map(|entry| entry.version)
        .collect();
    assert_eq!(versions, [1], "the second round shows nothing");
    let records = pipeline.records();
    let second = |step: &str| {
        records
            .iter()
            .find(|r| r.step.as_str() == step && r.round == 2)
    };
    assert!(matches!(
        second("dataset").unwrap().output,
        StepOutput::Dataset { ref dataset, .. } if dataset.version == 2
    ));
    assert_eq!(second("baseline"), None);
    worker.terminate(DEADLINE).await;
}

#[tokio::test]
async fn every_mistake_is_named_and_nothing_is_submitted() {
    let cluster = cluster(&[]).await;
    let bad = tasks(2, 2, None) + "{\"id\":\"x\",\"split\":\"train\",\"promt\":\"y\"}\n";
    let pipeline = shop(&cluster, &bad, "");
    let text = std::fs::read_to_string(pipeline.file()).unwrap();
    let text = text.replace("rank = 4", "rnak = 4\nlr = 7")
        + "where = \"reward >=\"\n[gate]\nmin_tasks = 0\n";
    std::fs::write(pipeline.file(), text).unwrap();
    let output = pipeline.run(&[]).await;
    let told = said(&output);
    assert_eq!(output.status.code(), Some(2), "{told}");
    for part in [
        "train.rnak",
        "did you mean `rank`?",
        "train.lr",
        "must be in (0, 1]",
        "dataset.where",
        "gate.min_tasks",
        "tasks.jsonl:5",
        "did you mean `prompt`?",
        "breaks 5 rules; nothing was submitted",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let output = pipeline.run(&["--json"]).await;
    let faults: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(faults["faults"].as_array().unwrap().len(), 5, "{faults:#}");
    assert!(pipeline.batches().await.is_empty());
    assert!(!cluster.object("default/pipelines").exists() && !pipeline.out().exists());
}

#[tokio::test]
async fn checks_that_always_say_no_leave_nothing_to_learn() {
    let cluster = cluster(&[]).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let no = json!({"answer": {"equals": "never said"}});
    let pipeline = shop(&cluster, &tasks(2, 3, Some(&no)), "");
    let (code, events, report) = pipeline.json().await;
    assert_eq!(
        (code, &report["end"]),
        (Some(1), &json!("no_signal")),
        "{report:#}"
    );
    let verdict = report["verdict"].as_str().unwrap();
    for part in [
        "the data carry no signal",
        "no conversation is left to train on",
        "Nothing was published",
    ] {
        assert!(verdict.contains(part), "{part}: {verdict}");
    }
    assert!(
        events
            .iter()
            .any(|event| event["state"] == "stopped" && event["step"] == "dataset")
    );
    assert!(!cluster.object("default/adapters").exists());
    let text = std::fs::read_to_string(pipeline.out().join("report.md")).unwrap();
    assert!(text.contains("the data carry no signal"), "{text}");
    // Again it says the same, and tries no task again.
    let before = pipeline.batches().await.len();
    let (code, _, again) = pipeline.json().await;
    assert_eq!((code, &again["verdict"]), (Some(1), &report["verdict"]));
    assert_eq!(pipeline.batches().await.len(), before);
    worker.terminate(DEADLINE).await;
}

#[tokio::test]
async fn a_version_is_waited_for_and_checks_that_always_say_yes_publish_nothing() {
    let cluster = cluster(&[]).await;
    let mut worker = cluster.worker_with_cpu_slots("a", 6);
    let _trainer = cluster.train_worker("trainer");
    let yes = json!({"answer": {"regex": "(?s).*"}});
    let more = "[serve]\ndeadline_s = 1\n[rollouts]\nsamples = 2\n[gate]\nmin_tasks = 2\n\
                [evaluate]\nsampling = { completion_tokens = 400 }\n";
    let tasks = tasks(3, 4, Some(&yes));
    let pipeline = shop(&cluster, &tasks, more);
    let output = pipeline.run(&[]).await;
    let told = said(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    for part in [
        "nobody served shop@v1 within 1 s (`serve.deadline_s`)",
        "--follow default/shop",
        "espalier-infer-worker --model",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(pipeline.steps().contains(&"train") && !pipeline.steps().contains(&"evaluation"));

    // Somebody does, and the pipeline goes on: how long it may take is no part of a step. Who serves is killed while the
    // version is measured, and another takes over.
    pipeline.write(&more.replace("deadline_s = 1", "deadline_s = 120"));
    let (options, environment) = cluster.answering();
    let mut options: Vec<&str> = options.iter().map(String::as_str).collect();
    options.extend(["--follow", "shop", "--follow-every", "1"]);
    let base = pipeline.folder.join("base").display().to_string();
    let serve = || {
        let folder = tempfile::TempDir::new().unwrap();
        Serving::start_on(folder, &base, &options, &environment)
    };
    let run = Process::start("run", pipeline.command(&[]), cluster.folder.path());
    let mut killed = serve().await;
    wait_for("rollouts of the version", DEADLINE, || async {
        let batches = pipeline.batches().await;
        let is_under_way = |batch: &v1::Batch| {
            let leased = batch.counts.unwrap_or_default().leased;
            batch.batch.contains(".evaluation.") && leased > 0
        };
        let found = batches.iter().any(is_under_way);
        found.then_some(()).ok_or(batches)
    })
    .await;
    killed.process.kill();
    let (_serving, (code, events, report)) = tokio::join!(serve(), pipeline.json());
    drop(run);
    assert_eq!(
        (code, &report["end"]),
        (Some(1), &json!("complete")),
        "{report:#}"
    );
    let verdict = report["verdict"].as_str().unwrap();
    assert!(verdict.contains("the data carry no signal"), "{verdict}");
    let trained = events
        .iter()
        .find(|event| event["step"] == "train")
        .unwrap();
    assert_eq!(trained["is_earlier"], json!(true));
    assert_eq!(pipeline.steps().len(), 7);
    assert!(pipeline.latest().is_empty());
    worker.terminate(DEADLINE).await;
}
