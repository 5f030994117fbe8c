//! A worker whose device fails in the middle of a step, over real sockets: text, engine and API are the worker's own.

use std::collections::VecDeque;
use std::sync::mpsc;

use espalier_qwen3_text::Tokenizer;
use futures::FutureExt as _;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::adapters::WeightsError;
use super::*;
use crate::engine::{Engine, EngineConfig};
use crate::executor::{AdapterSlot, Done, Drawn, Executor, ExecutorError, Limits, Step, Ticket};
use crate::scheduler;

/// Far longer than all of it takes.
const LIMIT: Duration = Duration::from_secs(60);
/// Far more than is answered before the device is lost.
const CONTEXT: usize = 100_000;
/// The id that is always drawn: `.`.
const DOT: u32 = 13;

/// A device that is lost in the middle of a step. Its steps take as long as they may.
struct LostDevice {
    steps: VecDeque<(Ticket, Step)>,
    submitted: u64,
    lost: mpsc::Receiver<()>,
}

impl Executor for LostDevice {
    type Adapter = ();

    fn limits(&self) -> Limits {
        Limits {
            kv_blocks: 10_000,
            tokens: 512,
            rows: 8,
            vocab: Tokenizer::shared().unwrap().vocabulary(),
            steps_in_flight: 1,
            adapters: 1,
        }
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, ExecutorError> {
        self.submitted += 1;
        self.steps.push_back((Ticket(self.submitted), step));
        Ok(Ticket(self.submitted))
    }

    fn poll(&mut self, wait: Duration) -> Result<Option<Done>, ExecutorError> {
        if self.lost.recv_timeout(wait).is_ok() {
            return Err(ExecutorError::Device("it fell off the bus".to_owned()));
        }
        let Some((ticket, step)) = self.steps.pop_front() else {
            return Ok(None);
        };
        let rows = step.rows.iter().filter(|row| row.sample.is_some());
        let drawn = rows.map(|row| Drawn {
            seq: row.seq,
            id: DOT,
            logprob: -0.5,
            top: Vec::new(),
        });
        Ok(Some(Done {
            ticket,
            drawn: drawn.collect(),
        }))
    }

    fn load_adapter(&mut self, _: AdapterSlot, (): ()) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn drop_adapter(&mut self, _: AdapterSlot) -> Result<(), ExecutorError> {
        Ok(())
    }
}

/// The files of a model but for its weights, which nobody reads here.
fn files(folder: &Path) -> ModelFiles {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": true, "eos_token_id": 151_645, "torch_dtype": "bfloat16",
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    ModelFiles::read(folder).unwrap()
}

/// A worker, and what makes it lose its device.
fn worker(folder: &Path) -> (Worker, mpsc::Sender<()>) {
    let (lose, lost) = mpsc::channel();
    let device = LostDevice {
        steps: VecDeque::new(),
        submitted: 0,
        lost,
    };
    let config = EngineConfig::new(scheduler::Config {
        max_num_seqs: 8,
        max_num_batched_tokens: 512,
        max_model_len: CONTEXT,
        prefix_caching: true,
        weight_version: 1,
    });
    let (engine, _) = Engine::start(device, config).unwrap();
    let none = |_| async { Err(WeightsError::Refused("none".to_owned())) }.boxed();
    let fetcher = Fetcher::new(&Environment::default(), None);
    let clock = Arc::new(SystemClock);
    let known = Arc::new(Base::new("m", "m", folder.to_owned()));
    let served = Served {
        engine,
        text: Text::new(files(folder)).unwrap(),
        adapters: Adapters::new(known, 1, fetcher, Box::new(none), clock),
        follower: None,
        base: Model {
            name: "m".to_owned(),
            created_s: 0,
            adapter: None,
        },
        context_tokens: CONTEXT,
        shutdown: Shutdown::new(),
        open: false,
    };
    let served = Arc::new(served);
    let worker = Worker {
        api: api_of(&served, None, None),
        served,
        drain_limit: Duration::from_secs(3600),
        sequences_max: 8,
        jobs: None,
        advertise_url: None,
        api_key_name: None,
    };
    (worker, lose)
}

fn chat(url: &str, stream: bool) -> reqwest::RequestBuilder {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let body = json!({"model": "m", "messages": messages, "stream": stream});
    let url = format!("{url}/v1/chat/completions");
    reqwest::Client::new().post(url).json(&body)
}

/// Whoever asks is sent elsewhere, and told why.
async fn is_refused(response: reqwest::Result<reqwest::Response>) {
    let response = response.unwrap();
    let retry_after = response.headers().get("retry-after").cloned();
    assert_eq!(
        (response.status().as_u16(), retry_after.is_some()),
        (503, true)
    );
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "engine_failed", "{body}");
}

#[tokio::test]
async fn a_lost_device_fails_what_runs_and_ends_the_process() {
    let folder = TempDir::new().unwrap();
    let (worker, lose) = worker(folder.path());
    let engine = worker.served.engine.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asking = async {
        let mut streamed = chat(&url, true).send().await.unwrap();
        assert_eq!(streamed.status(), 200);
        let mut told = Vec::new();
        while !String::from_utf8_lossy(&told).contains(".\"") {
            told.extend(streamed.chunk().await.unwrap().unwrap());
        }
        let both_run = async {
            while engine.snapshot().requests < 2 {
                tokio::task::yield_now().await;
            }
            lose.send(()).unwrap();
        };
        let (whole, ()) = tokio::join!(chat(&url, false).send(), both_run);
        is_refused(whole).await;
        // Those that come later, and whoever asks how it does.
        let health = reqwest::get(format!("{url}/health"));
        let (later, health) = tokio::join!(chat(&url, false).send(), health);
        is_refused(later).await;
        is_refused(health).await;
        let rest = streamed.text().await.unwrap();
        let (events, _) = rest.trim_end().rsplit_once("data: [DONE]").unwrap();
        let last = events.trim_end().rsplit("data: ").next().unwrap();
        let last: Value = serde_json::from_str(last).unwrap();
        assert_eq!(last["error"]["code"], "engine_failed", "{last}");
    };
    let serving = worker.serve(listener, Shutdown::new());
    let both = async { tokio::join!(serving, asking) };
    let (ended, ()) = tokio::time::timeout(LIMIT, both).await.unwrap();
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("it fell off the bus"), "{error}");
}
