//! Whole attempts over a store in memory: with a trainer that computes next to nothing, but exactly, and with the engine
//! on a tiny model.

mod agreement;
mod datasets;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use espalier_core::error::ErrorClass;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::{JobDraft, SpecDigest, TrainSettings, parse_line};
use espalier_core::trace::Manifest;
use espalier_kernels::train::DeviceFailed;
use espalier_qwen3::Config;
use espalier_runtime::clock::SystemClock;
use espalier_runtime::config::Environment;
use espalier_runtime::publish::NoLease;
use serde_json::Value;

use super::*;
use crate::config::DeviceChoice;
use crate::engine::{
    DocumentLoss, Documents, EngineError, Export, ExportTensor, State, StateTensor, StateValues,
    StepReport,
};
use crate::trainer::EngineLoader;

/// A trainer whose weights are four numbers.
struct Fake {
    weights: Vec<f32>,
    moments: Vec<f32>,
    step: u64,
    fail_at: u64,
    /// The step after which the device does not go on; 0: none.
    lose_at: u64,
    is_lost: bool,
    drain_at: Option<(u64, Shutdown)>,
}

struct FakeLoader {
    /// The step whose loss is no number; 0: none.
    fail_at: AtomicU64,
    /// The step after which the device does not go on; 0: none.
    lose_at: AtomicU64,
    is_lost: AtomicBool,
    /// The step during which the process is told to end.
    drain_at: Mutex<Option<(u64, Shutdown)>>,
}

impl Load for FakeLoader {
    fn load(
        &self,
        _folder: &Path,
        _config: &Config,
        _settings: &TrainSettings,
        _tokens: usize,
    ) -> Result<Box<dyn Trainer>, EngineError> {
        Ok(Box::new(Fake {
            weights: vec![0.5, -0.25, 0.125, 1.0],
            moments: vec![0.0; 4],
            step: 0,
            fail_at: self.fail_at.load(Ordering::SeqCst),
            lose_at: self.lose_at.load(Ordering::SeqCst),
            is_lost: self.is_lost.load(Ordering::SeqCst),
            drain_at: self.drain_at.lock().unwrap().clone(),
        }))
    }

    fn peak_flops(&self) -> Option<f64> {
        Some(1e9)
    }
}

impl Fake {
    fn loss(&self, ids: &[u32]) -> f64 {
        let each = ids.iter().enumerate();
        let sum: f32 = each
            .map(|(n, id)| (self.weights[n % 4] * *id as f32).sin())
            .sum();
        f64::from(sum.abs()) + 0.1
    }
}

impl Trainer for Fake {
    fn step(&mut self, micros: &[Documents<'_>], lr: f64) -> Result<StepReport, EngineError> {
        if self.step + 1 == self.fail_at {
            return Err(EngineError::LossNotFinite {
                micro: 0,
                document: 0,
                loss: f64::NAN,
            });
        }
        let supervised = micros
            .iter()
            .flat_map(|m| m.supervised)
            .filter(|s| **s)
            .count();
        let loss = micros.iter().map(|micro| self.loss(micro.ids)).sum::<f64>();
        for (n, weight) in self.weights.iter_mut().enumerate() {
            self.moments[n] = 0.9 * self.moments[n] + (loss as f32 * (n as f32 + 1.0)).cos();
            *weight -= lr as f32 * 100.0 * self.moments[n];
        }
        self.step += 1;
        if let Some((step, shutdown)) = &self.drain_at
            && *step == self.step
        {
            shutdown.drain();
        }
        Ok(StepReport {
            loss,
            supervised_tokens: supervised as u64,
            tokens: micros.iter().map(|micro| micro.ids.len() as u64).sum(),
            grad_norm: f64::from(self.moments[0].abs()),
            flops: 1_000,
        })
    }

    fn evaluate(&mut self, documents: Documents<'_>) -> Result<Vec<DocumentLoss>, EngineError> {
        // Best in the middle.
        let sum = (self.step as f64 - 6.0).abs() + 1.0;
        let loss = DocumentLoss { sum, tokens: 1 };
        Ok(vec![loss; documents.ends.len()])
    }

    fn token_losses(&mut self, documents: Documents<'_>) -> Result<Vec<f32>, EngineError> {
        if let Some((0, shutdown)) = &self.drain_at {
            assert!(!shutdown.is_draining(), "the process was told to end");
            shutdown.drain();
        }
        let supervised = documents.supervised.iter().filter(|target| **target);
        Ok(vec![0.5; supervised.count()])
    }

    fn state(&mut self) -> Result<State, EngineError> {
        if self.step == self.lose_at {
            return Err(EngineError::Device(DeviceFailed {
                source: "it does not go on".into(),
                is_lost: self.is_lost,
            }));
        }
        let tensor = |name: &str, values: &Vec<f32>| StateTensor {
            name: name.to_owned(),
            shape: vec![4],
            values: StateValues::F32(values.clone()),
        };
        Ok(State {
            step: self.step,
            tensors: vec![tensor("w", &self.weights), tensor("w.m", &self.moments)],
        })
    }

    fn restore(&mut self, state: State) -> Result<(), EngineError> {
        let values = |n: usize| match &state.tensors[n].values {
            StateValues::F32(values) => values.clone(),
            StateValues::U8(_) => Vec::new(),
        };
        (self.weights, self.moments, self.step) = (values(0), values(1), state.step);
        Ok(())
    }

    fn export(&mut self) -> Result<Export, EngineError> {
        Ok(Export {
            tensors: vec![ExportTensor {
                name: "w".to_owned(),
                shape: vec![4],
                values: self.weights.clone(),
            }],
            adapter_config: Some(serde_json::json!({"r": 4, "base_model_name_or_path": null})),
        })
    }

    fn memory(&self) -> u64 {
        32 << 20
    }
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qwen3/tests/golden/tiny-dense")
}

fn rows(count: usize) -> String {
    let row = |n: usize| {
        let ids: Vec<usize> = (0..6 + n % 5).map(|k| (n * 7 + k * 3) % 500).collect();
        format!(
            "{{\"id\":\"s{n}\",\"ids\":{ids:?},\"supervised\":[[2,{}]]}}\n",
            ids.len()
        )
    };
    (0..count).map(row).collect()
}

/// A job of ten steps over twenty samples, with these settings beside its own.
fn job(settings: &str) -> JobDraft {
    let base = model().display().to_string();
    let line = format!(
        r#"{{"train":{{"base":{base:?},"rows":"rows.jsonl","eval_rows":"held-out.jsonl","adapter":"shop","settings":{{
        "batch":1,"accumulation":4,"epochs":2,"lr":1e-3,"warmup_steps":0,"eval_every":2,"checkpoint_every":3,
        "rank":4{settings}}}}}}}"#
    );
    parse_line(line.as_bytes()).unwrap()
}

async fn store() -> Store {
    let store = Store::open("memory://").await.unwrap();
    for (name, rows) in [("rows.jsonl", rows(20)), ("held-out.jsonl", rows(3))] {
        let path = format!("p/uploads/{name}");
        store.put(&path, Bytes::from(rows)).await.unwrap();
    }
    store
}

fn fake() -> Arc<FakeLoader> {
    Arc::new(FakeLoader {
        fail_at: AtomicU64::new(0),
        lose_at: AtomicU64::new(0),
        is_lost: AtomicBool::new(true),
        drain_at: Mutex::new(None),
    })
}

fn workshop(store: &Store, loader: Arc<dyn Load>) -> Workshop {
    Workshop {
        store: store.clone(),
        clock: Arc::new(SystemClock),
        fetcher: Fetcher::new(&Environment::default(), None),
        loader,
        allow_local_models: true,
        shutdown: Shutdown::new(),
        device_lost: Arc::default(),
        machine: Arc::new(Semaphore::new(1)),
    }
}

/// An attempt under `fence`, as the handler does it.
async fn attempt(
    workshop: &Workshop,
    draft: &JobDraft,
    fence: u64,
) -> Result<Published, TrainError> {
    let grant = Grant {
        key: "p/b/j".parse().unwrap(),
        fence: Fence(fence),
        attempt: 1,
        spec: draft.check().unwrap(),
        draft: draft.clone(),
    };
    let train = grant.spec.train().unwrap();
    let digest = SpecDigest::of(draft);
    let claim = Claim {
        key: &grant.key,
        fence: grant.fence,
        spec: Some(&digest),
    };
    let told = |text: &str| assert!(text.len() < 200, "{text}");
    let mut training = workshop.prepare(&grant, train, &digest, &told).await?;
    workshop.run(&mut training, &told).await?;
    workshop.publish(&grant, training, claim, &NoLease).await
}

fn key() -> JobKey {
    "p/b/j".parse().unwrap()
}

/// What steps came to, bit for bit: the text of their losses, norms and rates.
async fn steps(store: &Store, fence: u64) -> Vec<(String, String, String)> {
    let lines = store
        .get(&layout::training_steps(&key(), Fence(fence)))
        .await
        .unwrap();
    let text = String::from_utf8(lines.to_vec()).unwrap();
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| row[name].to_string();
        (field("loss"), field("grad_norm"), field("lr"))
    };
    text.lines().map(row).collect()
}

async fn manifest(store: &Store) -> Manifest {
    let bytes = store.get(&layout::manifest(&key())).await.unwrap();
    Manifest::parse(&bytes, &key()).unwrap()
}

/// Fences and steps of all checkpoints that are there.
async fn checkpoints(store: &Store) -> Vec<(u64, u64)> {
    let objects = store.list("p/batches", None, 1000).await.unwrap();
    let records = objects
        .iter()
        .filter_map(|o| layout::checkpoint_of_record(&o.path));
    records.map(|(_, fence, step)| (fence.0, step)).collect()
}

#[tokio::test]
async fn a_training_publishes_the_best_weights_as_the_next_version() {
    let store = store().await;
    let workshop = workshop(&store, fake());
    let published = attempt(&workshop, &job(""), 7).await.unwrap();
    let summary = published.summary.train().unwrap().clone();
    assert_eq!(
        (summary.steps, summary.best_step, summary.eval_loss),
        (10, 6, Some(1.0))
    );
    let manifest = manifest(&store).await;
    for file in &manifest.files {
        assert!(
            file.holds(&store.get(&file.path).await.unwrap()),
            "{}",
            file.path
        );
    }
    let names: Vec<&str> = manifest
        .files
        .iter()
        .map(|f| f.path.rsplit_once("a-7/").unwrap().1)
        .collect();
    assert_eq!(
        names,
        [
            "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json",
            "metrics.jsonl",
            "loss.svg",
            "tensorboard/events.out.tfevents"
        ]
    );
    assert_eq!(manifest.parents[1], "p/uploads/rows.jsonl");
    // The weights are those after step 6: what a training of six steps ends with.
    let weights = store.get(&manifest.files[0].path).await.unwrap();
    let other = self::store().await;
    let six = job(r#","keep_checkpoints":1,"max_steps":6"#);
    let six = JobDraft {
        train: six.train.map(|mut train| {
            train.settings.epochs = None;
            train
        }),
        ..JobDraft::default()
    };
    let short = self::workshop(&other, fake());
    attempt(&short, &six, 7).await.unwrap();
    let expected = other.get(&manifest.files[0].path).await.unwrap();
    assert_eq!(weights, expected);
    assert_eq!(
        checkpoints(&store).await,
        [(7, 6), (7, 9), (7, 10)],
        "best and last"
    );
    // A second job of the same name takes the next number, a repetition none.
    let record = store.get("p/adapters/shop/v1.json").await.unwrap();
    let record =
        espalier_core::adapter::AdapterVersion::parse(&record, &"shop".parse().unwrap(), 1)
            .unwrap();
    assert_eq!((record.fence, record.files.len()), (Fence(7), 2));
    assert_eq!(record.base.sha256.len(), 64);
    let grant = Grant {
        key: key(),
        fence: Fence(8),
        attempt: 2,
        spec: job("").check().unwrap(),
        draft: job(""),
    };
    workshop
        .version_of_adopted(&grant, grant.spec.train().unwrap())
        .await
        .unwrap();
    assert!(
        store
            .get("p/adapters/shop/v2.json")
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn a_loss_that_is_no_number_stops_and_names_the_sample_and_the_next_attempt_goes_on() {
    let whole = store().await;
    attempt(&workshop(&whole, fake()), &job(""), 1)
        .await
        .unwrap();
    let store = store().await;
    let loader = fake();
    loader.fail_at.store(6, Ordering::SeqCst);
    let error = attempt(&workshop(&store, loader), &job(""), 1)
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Invalid);
    let said = error.to_string();
    let expected = "step 6 has a loss or gradient that is not finite, at sample `s";
    assert!(
        said.starts_with(expected) && said.ends_with("; the checkpoint of step 4 is kept"),
        "{said}"
    );
    let resumed = workshop(&store, fake());
    attempt(&resumed, &job(""), 2).await.unwrap();
    assert_eq!(steps(&store, 2).await, steps(&whole, 1).await);
    let summary = manifest(&store).await.summary.train().cloned().unwrap();
    assert_eq!((summary.best_step, summary.steps), (6, 10));
}

#[tokio::test]
async fn a_process_that_ends_stores_the_step_that_it_is_at() {
    let whole = store().await;
    attempt(&workshop(&whole, fake()), &job(""), 1)
        .await
        .unwrap();
    let store = store().await;
    let loader = fake();
    let draining = workshop(&store, loader.clone());
    *loader.drain_at.lock().unwrap() = Some((5, draining.shutdown.clone()));
    let error = attempt(&draining, &job(""), 1).await.unwrap_err();
    assert!(
        matches!(error, TrainError::Preempted { step: 5 }),
        "{error}"
    );
    assert_eq!(error.class(), ErrorClass::Preempted);
    assert!(checkpoints(&store).await.contains(&(1, 5)));
    attempt(&workshop(&store, fake()), &job(""), 2)
        .await
        .unwrap();
    assert_eq!(steps(&store, 2).await, steps(&whole, 1).await);
}

#[tokio::test]
async fn a_device_that_is_lost_leaves_what_was_stored_before_and_ends_the_worker() {
    let whole = store().await;
    attempt(&workshop(&whole, fake()), &job(""), 1)
        .await
        .unwrap();
    let store = store().await;
    let loader = fake();
    loader.lose_at.store(6, Ordering::SeqCst);
    let lost = workshop(&store, loader);
    let error = attempt(&lost, &job(""), 1).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(error.is_of_device(), "{error}");
    let of = checkpoints(&store).await;
    assert!(of.contains(&(1, 4)) && !of.contains(&(1, 6)), "{of:?}");
    attempt(&workshop(&store, fake()), &job(""), 2)
        .await
        .unwrap();
    assert_eq!(steps(&store, 2).await, steps(&whole, 1).await);
}

#[tokio::test]
async fn what_an_op_refuses_is_for_another_worker_and_does_not_end_this_one() {
    let loader = fake();
    loader.lose_at.store(6, Ordering::SeqCst);
    loader.is_lost.store(false, Ordering::SeqCst);
    let refused = workshop(&store().await, loader);
    let error = attempt(&refused, &job(""), 1).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Handler);
    assert!(!error.is_of_device(), "{error}");
}

#[tokio::test]
async fn checkpoints_of_other_settings_are_no_beginning() {
    let store = store().await;
    let loader = fake();
    loader.fail_at.store(6, Ordering::SeqCst);
    attempt(&workshop(&store, loader), &job(""), 1)
        .await
        .unwrap_err();
    let other = job(r#","seed":1"#);
    attempt(&workshop(&store, fake()), &other, 2).await.unwrap();
    let fresh = self::store().await;
    attempt(&workshop(&fresh, fake()), &other, 2).await.unwrap();
    assert_eq!(steps(&store, 2).await, steps(&fresh, 2).await);
}

#[tokio::test]
async fn what_cannot_be_trained_is_said_before_the_first_step() {
    for (settings, rows, said) in [
        (
            r#","max_length":513"#,
            rows(20),
            "`train.settings.max_length` must be at most 512, the model's, got `513`",
        ),
        (
            "",
            String::new(),
            "`p/uploads/rows.jsonl` must have at least one sample, and it is empty",
        ),
        (
            "",
            r#"{"id":"a","ids":[1,512],"supervised":[[1,2]]}"#.to_owned(),
            "sample `a` (line 1 of `p/uploads/rows.jsonl`): `ids` must be below the model's vocabulary, 512, got 512 at 1",
        ),
    ] {
        let store = store().await;
        store
            .put("p/uploads/rows.jsonl", Bytes::from(rows))
            .await
            .unwrap();
        let error = attempt(&workshop(&store, fake()), &job(settings), 1)
            .await
            .unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.class()),
            (said, ErrorClass::Invalid)
        );
        assert!(checkpoints(&store).await.is_empty());
    }
    let store = store().await;
    store.delete("p/uploads/rows.jsonl").await.unwrap();
    let error = attempt(&workshop(&store, fake()), &job(""), 1)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no file of rows at `p/uploads/rows.jsonl` in the object store"
    );
    let closed = Workshop {
        allow_local_models: false,
        ..workshop(&store, fake())
    };
    let error = attempt(&closed, &job(""), 1).await.unwrap_err();
    assert!(
        error.to_string().contains("this worker reads no folders"),
        "{error}"
    );
}

fn engine() -> Arc<EngineLoader> {
    let loader = EngineLoader::open(DeviceChoice::Cpu, Some(2), Some(1e12));
    Arc::new(loader.unwrap())
}

#[tokio::test]
async fn the_engine_goes_on_bit_for_bit() {
    let whole = store().await;
    let job = || job(r#","keep_checkpoints":100"#);
    attempt(&workshop(&whole, engine()), &job(), 1)
        .await
        .unwrap();
    let all = steps(&whole, 1).await;
    assert_eq!(all.len(), 10);
    let adapter = manifest(&whole).await;
    // Only what the first four steps left is there for the second attempt.
    let store = store().await;
    let objects = whole.list("p/batches", None, 1000).await.unwrap();
    for object in objects
        .iter()
        .filter(|o| o.path.contains("/step-0000000004/"))
    {
        let bytes = whole.get(&object.path).await.unwrap();
        store.put(&object.path, bytes).await.unwrap();
    }
    assert_eq!(checkpoints(&store).await.len(), 1, "{objects:?}");
    attempt(&workshop(&store, engine()), &job(), 2)
        .await
        .unwrap();
    assert_eq!(steps(&store, 2).await, all);
    let again = manifest(&store).await;
    assert_eq!(
        again.files[0].sha256, adapter.files[0].sha256,
        "the adapter is the same"
    );
}

#[tokio::test]
async fn the_engine_says_what_does_not_fit() {
    let store = store().await;
    let little = job(r#","memory_budget_mib":1"#);
    let error = attempt(&workshop(&store, engine()), &little, 1).await;
    if let Err(error) = error {
        let said = espalier_runtime::telemetry::error_chain(&error);
        assert!(
            said.contains("`memory_budget_mib` must be at least"),
            "{said}"
        );
        assert_eq!(error.class(), ErrorClass::Invalid);
    } else {
        panic!("a megabyte is not enough for three layers and their optimizer");
    }
}
