//! A pipeline whose tools are recorded and whose seeds are fixed says the same whoever is killed on the way: all its processes
//! are, three times, and what it leaves is held against a pipeline that nobody disturbed.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::time::Duration;

use espalier_core::pipeline::{StepOutput, StepRecord};
use espalier_proto::v1::{Counts, JobState};
use espalier_tests::harness::cluster::{Cluster, Setup, Worker};
use espalier_tests::harness::pipeline::Pipeline;
use espalier_tests::harness::process::Process;
use espalier_tests::harness::serving::Serving;
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

use super::replay::{CALLS, drawn, ids, run};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);
/// Tasks to learn from, and all.
const TRAIN: usize = 6;
const TASKS: usize = 16;
/// So little is learned that the version says what its base says: what it calls was recorded.
const HEAD: &str = "model = \"tiny\"\n[tasks]\ntrain = \"tasks.jsonl\"\neval = \"tasks.jsonl\"\n[rollouts]\nsamples = 1\n\
    [dataset]\nkeep_near = true\neval_share = 0\ntokenizer = \"qwen3\"\n\
    [train]\nrank = 4\nbatch = 1\naccumulation = 1\nepochs = 2\nlr = 1e-7\n[gate]\nmin_tasks = 8\nmin_difference = -0.9\n";

/// Half of the tasks to be measured on cannot be solved, so that the data have something to say.
fn verify(n: usize) -> Value {
    match n >= TRAIN && n % 2 == 1 {
        true => json!({"answer": {"equals": "never said"}}),
        false => json!({"tool_called": {"name": "add"}}),
    }
}

fn tasks() -> String {
    let one = |n: usize| {
        let split = if n < TRAIN { "train" } else { "eval" };
        let more = json!({
            "mcp": ["gone"], "replay": [format!("rec/j{n}")], "task_id": format!("t{n}"), "split": split, "verify": verify(n),
        });
        let mut task = drawn(n, &more);
        task.as_object_mut().unwrap().remove("model");
        task.to_string() + "\n"
    };
    (0..TASKS).map(one).collect()
}

/// All processes of a pipeline but its client, and the recordings of its tools.
struct Lab {
    cluster: Cluster,
    serving: Serving,
    worker: Worker,
    trainer: Process,
}

impl Lab {
    async fn start() -> Self {
        let extra = ("ESPALIER_AGENT_WORKER_MODEL_EXTRA", CALLS);
        let cluster = Cluster::start_with(Setup {
            // Who is killed is missed soon, and who waits for a core is not.
            lease_ttl_ms: 5_000,
            environment: vec![(extra.0.to_owned(), extra.1.to_owned())],
            ..Setup::new("embedded", "")
        })
        .await;
        let base = Pipeline::new(&cluster, &tasks(), HEAD, "").base();
        let lab = Self {
            serving: serve(&cluster, &base).await,
            worker: cluster.worker_with_cpu_slots("a", 2),
            trainer: cluster.train_worker("trainer"),
            cluster,
        };
        let recorded = |n| drawn(n, &json!({"verify": verify(n)}));
        let jobs: Vec<Value> = (0..TASKS).map(recorded).collect();
        run(&mut lab.cluster.client().await, "rec", &jobs).await;
        lab
    }

    fn pipeline(&self) -> Pipeline<'_> {
        Pipeline::written(&self.cluster, HEAD)
    }

    fn client(&self, name: &str) -> Process {
        let command = self.pipeline().command(&["--json"]);
        Process::start(name, command, self.cluster.folder.path())
    }

    /// Kills everybody and the client, and starts all but the client again.
    async fn kill_everybody(&mut self, mut client: Process) {
        client.kill();
        self.serving.process.kill();
        self.trainer.kill();
        self.cluster.coordinators[0].process.kill();
        self.worker.kill(DEADLINE).await;
        self.cluster.restart_coordinator(0).await;
        self.serving = serve(&self.cluster, &self.pipeline().base()).await;
        self.worker = self.cluster.worker_with_cpu_slots("a", 2);
        self.trainer = self.cluster.train_worker("trainer");
    }

    /// Waits until a batch of `step` is amid its rollouts: both places of the worker are taken, and more jobs wait.
    async fn amid(&self, step: &str, client: &mut Process) {
        let is_amid =
            |counts: Counts| counts.succeeded > 0 && counts.leased > 1 && counts.ready > 0;
        wait_for(&format!("{step} to be under way"), DEADLINE, || {
            let ended = client.ended();
            assert!(ended.is_none(), "{ended:?} {}", client.log());
            async {
                let batches = self.pipeline().batches().await;
                let mut of_step = batches.iter().filter(|batch| batch.batch.contains(step));
                let found = of_step.any(|batch| is_amid(batch.counts.unwrap_or_default()));
                found.then_some(()).ok_or(batches)
            }
        })
        .await;
    }

    async fn amid_training(&self, client: &mut Process) {
        wait_for("the training", DEADLINE, || {
            let ended = client.ended();
            assert!(ended.is_none(), "{ended:?} {}", client.log());
            let is_there = self.trainer.log().contains("shop@v1, train");
            async move { is_there.then_some(()).ok_or(()) }
        })
        .await;
    }

    /// How often jobs of a batch of `step` were begun anew.
    async fn attempts_lost(&self, step: &str) -> u32 {
        let batches = self.pipeline().batches().await;
        let batch = batches
            .iter()
            .find(|batch| batch.batch.contains(step))
            .unwrap();
        let result = self
            .cluster
            .client()
            .await
            .wait(&batch.batch, DEADLINE)
            .await;
        let jobs = result.jobs.values();
        assert!(
            jobs.clone().all(|job| job.state() == JobState::Succeeded),
            "{:?}",
            result.unsolved()
        );
        jobs.map(|job| job.attempts.saturating_sub(1)).sum()
    }

    /// All that a pipeline came to, without times and names of attempts.
    async fn came_to(&self) -> Value {
        let records = self.pipeline().records();
        let mut steps = Vec::new();
        for record in &records {
            steps.push(json!({
                "step": record.step, "counts": record.counts, "output": output(&self.cluster, record),
                "rollouts": self.rollouts(record).await,
            }));
        }
        let latest = self.pipeline().latest();
        let latest: Vec<u32> = latest.iter().map(|entry| entry.version).collect();
        json!({"steps": steps, "latest": latest})
    }

    async fn rollouts(&self, record: &StepRecord) -> Vec<Value> {
        if record.output != StepOutput::Rollouts {
            return Vec::new();
        }
        let mut client = self.cluster.client().await;
        let batch = record.batch.as_ref().unwrap();
        let result = client.wait(batch.as_str(), DEADLINE).await;
        let mut rollouts = Vec::new();
        for job in result.jobs.keys() {
            rollouts.push(json!([job, ids(&client.trace(batch.as_str(), job).await)]));
        }
        rollouts
    }
}

async fn serve(cluster: &Cluster, base: &Path) -> Serving {
    let (options, environment) = cluster.answering();
    let mut options: Vec<&str> = options.iter().map(String::as_str).collect();
    options.extend(["--dtype", "f32"]);
    options.extend(["--follow", "shop", "--follow-every", "1"]);
    let folder = tempfile::TempDir::new().unwrap();
    Serving::start_on(folder, &base.display().to_string(), &options, &environment).await
}

/// What a step leaves, without what names an attempt; of an adapter, its weights bit for bit.
fn output(cluster: &Cluster, record: &StepRecord) -> Value {
    let mut output = json!(record.output);
    let fields = output.as_object_mut().unwrap();
    fields.remove("sha256");
    fields.remove("report");
    if let StepOutput::Adapter { .. } = record.output {
        let batch = record.batch.as_ref().unwrap();
        let manifest = cluster.manifest(&cluster.key(batch.as_str(), "train"));
        let mut files = manifest.files.iter();
        let weights = files.find(|file| file.path.ends_with("adapter_model.safetensors"));
        fields.insert("weights".to_owned(), json!(weights.unwrap().sha256));
    }
    output
}

#[tokio::test]
async fn nothing_of_a_pipeline_with_recorded_tools_changes_whoever_is_killed() {
    let calm = Lab::start().await;
    let (code, _, report) = calm.pipeline().json().await;
    assert_eq!(
        (code, &report["published"]),
        (Some(0), &json!("shop@v1")),
        "{report:#}"
    );
    let undisturbed = calm.came_to().await;
    drop(calm);

    let mut lab = Lab::start().await;
    let mut first = lab.client("first");
    lab.amid(".baseline.", &mut first).await;
    lab.kill_everybody(first).await;
    let mut second = lab.client("second");
    lab.amid_training(&mut second).await;
    lab.kill_everybody(second).await;
    let mut third = lab.client("third");
    lab.amid(".evaluation.", &mut third).await;
    lab.kill_everybody(third).await;
    let (code, _, report) = lab.pipeline().json().await;
    assert_eq!(
        (code, &report["published"]),
        (Some(0), &json!("shop@v1")),
        "{report:#}"
    );
    for step in [".baseline.", ".train.", ".evaluation."] {
        let lost = lab.attempts_lost(step).await;
        assert!(
            lost > 0,
            "nothing of {step} was under way when all were killed"
        );
    }
    assert_eq!(lab.came_to().await, undisturbed);
}
