//! The two servers: our worker and llama.cpp's, as processes on the same cores, and how each is asked.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use espalier_infer_worker::config::Dtype;
use espalier_runtime::model::EventParser;
use espalier_runtime::tasks::with_deadline;
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::process::Command;

use super::super::memory;
use super::super::process::{Process, free_port};
use super::wire::Wire;
use crate::exit::Problem;

/// Tokens that all sequences together may have: what the workloads need.
pub const CONTEXT_TOKENS: u32 = 4096;
/// Sequences at once.
pub const SEQUENCES: u32 = 8;
/// Numbers of a token's keys and values: layers, heads, elements, keys and values.
const KV_NUMBERS: usize = 28 * 8 * 128 * 2;
/// How long a server may take to be ready, and to answer.
const READY_LIMIT: Duration = Duration::from_secs(120);
pub const ANSWER_LIMIT: Duration = Duration::from_secs(300);

/// Whose server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Espalier,
    Llama,
}

/// How weights are held, by both alike.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As in the checkpoint
    Bf16,
    /// 8 bits and a scale for each 32 (llama.cpp: Q8_0)
    Q8,
}

impl Form {
    /// As options call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::Bf16,
            Self::Q8 => Dtype::Q8,
        }
    }

    fn gguf(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16.gguf",
            Self::Q8 => "q8_0.gguf",
        }
    }
}

/// What the servers are started with.
#[derive(Clone)]
pub struct Setup {
    pub worker: PathBuf,
    pub llama: PathBuf,
    /// The folder with our checkpoint and llama.cpp's files.
    pub model: PathBuf,
    pub form: Form,
    pub threads: usize,
    /// For logs.
    pub folder: PathBuf,
    /// llama.cpp names the instructions that it uses only where it says more than usual.
    pub verbose: bool,
}

impl Setup {
    fn command(&self, kind: Kind, port: u16) -> Command {
        let (port, threads) = (port.to_string(), self.threads.to_string());
        let context = CONTEXT_TOKENS.to_string();
        let sequences = SEQUENCES.to_string();
        let mut command;
        match kind {
            Kind::Espalier => {
                let number_bytes = self.form.dtype().on_cpu().kv().bytes();
                let kv_bytes = CONTEXT_TOKENS as usize * KV_NUMBERS * number_bytes;
                command = Command::new(&self.worker);
                command.arg("--model").arg(self.model.join("espalier"));
                command.args(["--device", "cpu", "--dtype", self.form.name()]);
                command.args(["--port", &port, "--cpu-threads", &threads]);
                command.args(["--max-model-len", &context, "--max-num-seqs", &sequences]);
                command.args(["--kv-cache-memory-bytes", &kv_bytes.to_string()]);
            }
            Kind::Llama => {
                command = Command::new(&self.llama);
                command
                    .arg("--model")
                    .arg(self.model.join(self.form.gguf()));
                command.args(["--host", "127.0.0.1", "--port", &port]);
                command.args(["--threads", &threads, "--threads-batch", &threads]);
                command.args(["--ctx-size", &context, "--parallel", &sequences]);
                // One memory for all sequences, as ours is, and no copies of it: each is held against us in memory.
                command.args(["--kv-unified", "--cache-ram", "0"]);
                if self.verbose {
                    command.args(["--verbosity", "4"]);
                }
            }
        }
        command
    }
}

/// A server that runs.
pub struct Server {
    kind: Kind,
    process: Process,
    url: String,
    client: reqwest::Client,
    began: Instant,
}

/// An answer as a whole.
pub struct Answer {
    pub ids: Vec<u32>,
    /// From the call to the end of the answer.
    pub took: Duration,
    /// llama.cpp's most likely ids at each place with their log-probabilities, where they were asked for.
    pub likely: Vec<Vec<(u32, f64)>>,
}

/// How many tokens had come when, in order.
pub type Arrivals = Vec<(Instant, usize)>;

impl Server {
    /// Starts one and waits until it answers.
    pub async fn start(setup: &Setup, kind: Kind) -> Result<Self, Problem> {
        let (name, log) = match kind {
            Kind::Espalier => ("espalier-infer-worker", "ours.log"),
            Kind::Llama => ("llama-server", "llama.log"),
        };
        let port = free_port()?;
        let began = Instant::now();
        let process = Process::start(name, setup.command(kind, port), setup.folder.join(log))?;
        // A connection for each request: llama.cpp closes them without a word after a stream.
        let builder = reqwest::Client::builder().no_proxy();
        let client = builder.pool_max_idle_per_host(0).build().map_err(failed)?;
        let url = format!("http://127.0.0.1:{port}");
        let mut server = Self {
            kind,
            process,
            url,
            client,
            began,
        };
        let (client, health) = (server.client.clone(), format!("{}/health", server.url));
        let serves = async || {
            let asked = client.get(&health).timeout(READY_LIMIT).send().await;
            asked.is_ok_and(|response| response.status().is_success())
        };
        server.process.wait_until(READY_LIMIT, serves).await?;
        Ok(server)
    }

    /// A connection of its own, that stays open.
    pub fn wire(&self) -> Result<Wire, Problem> {
        let host = self.url.trim_start_matches("http://").to_owned();
        Ok(Wire::open(host)?)
    }

    /// When its process was started.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Its proportional size, in megabytes.
    pub async fn pss_mb(&self) -> Result<f64, Problem> {
        match self.process.pid() {
            Some(pid) => Ok(memory::look(pid).await?.own_pss_mb),
            None => Err(Problem::failed("a server ended")),
        }
    }

    /// What it says of the instructions that it uses.
    pub fn instructions(&self) -> Option<String> {
        instructions(self.kind, &self.process.log())
    }

    /// Ends it.
    pub async fn end(self) -> Result<(), Problem> {
        self.process.end().await
    }

    /// The most likely `tokens` ids after `prompt`; from llama.cpp with `likely` others beside each.
    pub async fn answer(
        &self,
        prompt: &[u32],
        tokens: u32,
        likely: u32,
    ) -> Result<Answer, Problem> {
        let began = Instant::now();
        let whole = async {
            let response = self.ask(prompt, tokens, likely, false).await?;
            response.json::<Value>().await.map_err(failed)
        };
        let reply = limited(whole).await?;
        let took = began.elapsed();
        let ids = ids_of(self.kind, &reply);
        if ids.len() != tokens as usize {
            let kind = self.kind;
            let got = ids.len();
            return Err(Problem::failed(format!(
                "{kind:?} gave {got} of {tokens} tokens"
            )));
        }
        Ok(Answer {
            ids,
            took,
            likely: likely_of(&reply),
        })
    }

    /// As [`Server::answer`], token by token.
    pub async fn stream(&self, prompt: &[u32], tokens: u32) -> Result<Arrivals, Problem> {
        limited(async {
            let response = self.ask(prompt, tokens, 0, true).await?;
            let mut body = response.bytes_stream();
            let mut parser = EventParser::default();
            let mut arrivals = Arrivals::new();
            while let Some(bytes) = body.next().await {
                parser.push(&bytes.map_err(failed)?);
                let now = Instant::now();
                while let Some(event) = parser.next_event() {
                    let known = arrivals.last().map_or(0, |(_, count)| *count);
                    let count = count_of(self.kind, &event, known)?;
                    if count > known {
                        arrivals.push((now, count));
                    }
                }
            }
            match arrivals.last() {
                Some((_, count)) if *count == tokens as usize => Ok(arrivals),
                last => Err(Problem::failed(format!(
                    "{:?} streamed {last:?} of {tokens} tokens",
                    self.kind
                ))),
            }
        })
        .await
    }

    async fn ask(
        &self,
        prompt: &[u32],
        tokens: u32,
        likely: u32,
        stream: bool,
    ) -> Result<reqwest::Response, Problem> {
        let (path, body) = match self.kind {
            Kind::Espalier => (
                "/v1/completions",
                json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
                    "return_token_ids": true, "stream": stream}),
            ),
            Kind::Llama => (
                "/completion",
                json!({"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": true,
                    "return_tokens": true, "cache_prompt": true, "n_probs": likely, "stream": stream}),
            ),
        };
        let url = format!("{}{path}", self.url);
        let response = self.client.post(url).json(&body).send().await;
        response
            .and_then(reqwest::Response::error_for_status)
            .map_err(failed)
    }
}

/// Within the time that an answer may take.
async fn limited<T>(answer: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    let ended = with_deadline("bench.answer", ANSWER_LIMIT, answer).await;
    ended.map_err(|timeout| Problem::failed(timeout.to_string()))?
}

fn failed(error: reqwest::Error) -> Problem {
    Problem::failed(espalier_runtime::telemetry::error_chain(&error))
}

/// From a log: what ours says when the model is loaded, the rest of a line of llama.cpp's.
fn instructions(kind: Kind, log: &str) -> Option<String> {
    match kind {
        Kind::Espalier => log.lines().find_map(|line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let (kernels, products) = (line["kernels"].as_str()?, line["products"].as_str()?);
            Some(format!("{kernels}; products: {products}"))
        }),
        Kind::Llama => {
            let line = log.lines().find(|line| line.contains("system_info:"))?;
            let (_, features) = line.split_once("CPU : ")?;
            Some(features.trim_end_matches([' ', '|']).to_owned())
        }
    }
}

fn ids_of(kind: Kind, reply: &Value) -> Vec<u32> {
    let ids = match kind {
        Kind::Espalier => &reply["choices"][0]["token_ids"],
        Kind::Llama => &reply["tokens"],
    };
    let ids = ids.as_array().into_iter().flatten();
    ids.filter_map(|id| u32::try_from(id.as_u64()?).ok())
        .collect()
}

/// llama.cpp's form.
fn likely_of(reply: &Value) -> Vec<Vec<(u32, f64)>> {
    let one = |one: &Value| {
        Some((
            u32::try_from(one["id"].as_u64()?).ok()?,
            one["logprob"].as_f64()?,
        ))
    };
    let place = |place: &Value| {
        let top = place["top_logprobs"].as_array();
        top.into_iter().flatten().filter_map(one).collect()
    };
    let places = reply["completion_probabilities"].as_array();
    places.into_iter().flatten().map(place).collect()
}

/// How many tokens there are after an event. llama.cpp keeps tokens back whose text is not whole, and tells their number.
fn count_of(kind: Kind, event: &[u8], known: usize) -> Result<usize, Problem> {
    if event == b"[DONE]" {
        return Ok(known);
    }
    let event: Value = serde_json::from_slice(event)
        .map_err(|error| Problem::failed(format!("an event is no JSON: {error}")))?;
    Ok(match kind {
        Kind::Espalier => known + ids_of(kind, &event).len(),
        Kind::Llama => event["tokens_predicted"]
            .as_u64()
            .map_or(known, |count| count as usize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_both_servers_are_counted() {
        let ours = br#"{"choices":[{"index":0,"text":"ab","token_ids":[7,8]}]}"#;
        assert_eq!(count_of(Kind::Espalier, ours, 3).unwrap(), 5);
        assert_eq!(
            count_of(Kind::Espalier, br#"{"choices":[]}"#, 3).unwrap(),
            3
        );
        assert_eq!(count_of(Kind::Espalier, b"[DONE]", 3).unwrap(), 3);
        let theirs = br#"{"content":"","tokens":[9],"tokens_predicted":6,"stop":false}"#;
        assert_eq!(count_of(Kind::Llama, theirs, 3).unwrap(), 6);
        assert!(count_of(Kind::Llama, b"oops", 3).is_err());
    }

    #[test]
    fn instructions_are_found_in_logs() {
        let ours = "listening\n{\"message\":\"model loaded\",\"kernels\":\"avx512\",\"products\":\"f32\"}\n";
        let found = instructions(Kind::Espalier, ours);
        assert_eq!(found.as_deref(), Some("avx512; products: f32"));
        let theirs =
            "0.1 I cmn: system_info: n_threads = 2 / 2 | CPU : AVX2 = 1 | LLAMAFILE = 1 | \n";
        let found = instructions(Kind::Llama, theirs);
        assert_eq!(found.as_deref(), Some("AVX2 = 1 | LLAMAFILE = 1"));
        assert_eq!(instructions(Kind::Llama, ours), None);
    }

    #[test]
    fn likely_ids_are_read() {
        let top = json!([{"id": 5, "logprob": -1.5}, {"id": 6, "logprob": -1.75}]);
        let reply =
            json!({"tokens": [5], "completion_probabilities": [{"id": 5, "top_logprobs": top}]});
        assert_eq!(likely_of(&reply), [vec![(5, -1.5), (6, -1.75)]]);
        assert_eq!(ids_of(Kind::Llama, &reply), [5]);
    }
}
