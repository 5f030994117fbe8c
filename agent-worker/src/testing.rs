//! What tests of this crate stand on: a model endpoint that plays a script, a small MCP server, a store in memory.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use espalier_core::spec::{JobDraft, JobSpec, parse_line};
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::clock::SystemClock;
use espalier_runtime::model::{ModelClient, ModelEndpoint};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{OnFailure, Tasks};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::mcp::{McpConfig, McpHost, McpHostConfig};
use crate::record::{RecordContext, Spool};
use crate::rollout::{Hooks, Services};

/// A stdio server with tools that do well and badly.
const TOY_SERVER: &str = r#"
const tool = (name) => ({name, description: name, inputSchema: {type: 'object', properties: {text: {type: 'string'}}}});
const names = ['echo', 'add', 'fail', 'empty', 'long', 'sleep', 'die', 'picture', 'block'];
const text = (text, isError) => ({content: [{type: 'text', text}], isError});
const call = async ({name, arguments: args}) => {
  if (name === 'echo') return text(args.text);
  if (name === 'add') return text(String(args.a + args.b));
  if (name === 'fail') return text('no such page', true);
  if (name === 'empty') return {content: []};
  if (name === 'long') return text('word '.repeat(5000));
  if (name === 'picture') return {content: [{type: 'image', data: 'aGk=', mimeType: 'image/png'}]};
  if (name === 'sleep') { await new Promise((done) => setTimeout(done, 60000)); return text('late'); }
  if (name === 'die') process.exit(7);
  if (name === 'block') for (;;);
};
const answer = async ({method, params}) => {
  if (method === 'initialize') return {protocolVersion: params.protocolVersion, capabilities: {tools: {}},
    serverInfo: {name: 'toy', version: '1.2.3'}};
  if (method === 'tools/list') return {tools: names.map(tool)};
  if (method === 'tools/call') return call(params);
  return {};
};
require('readline').createInterface({input: process.stdin}).on('line', async (line) => {
  const request = JSON.parse(line);
  if (request.id === undefined || !request.method) return;
  const result = await answer(request);
  process.stdout.write(JSON.stringify({jsonrpc: '2.0', id: request.id, result}) + '\n');
});
"#;

/// A model endpoint that answers with a script and keeps what it was asked.
#[derive(Clone)]
pub struct FakeModel {
    pub url: String,
    script: Arc<Mutex<VecDeque<Value>>>,
    asked: Arc<Mutex<Vec<Value>>>,
    /// Closed: answers wait.
    gate: Arc<Semaphore>,
}

impl FakeModel {
    async fn start(tasks: &Tasks) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let model = Self {
            url: format!("http://{}/v1", listener.local_addr().unwrap()),
            script: Arc::default(),
            asked: Arc::default(),
            gate: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
        };
        let app = Router::new()
            .route("/v1/chat/completions", post(answer))
            .with_state(model.clone());
        tasks.spawn("test.model", OnFailure::Log, async move {
            axum::serve(listener, app).await
        });
        model
    }

    /// What it answers next, in order; without a word left it fails with 400.
    pub fn will(&self, replies: impl IntoIterator<Item = Value>) {
        self.script.lock().unwrap().extend(replies);
    }

    /// From now on it does not answer.
    pub fn hang(&self) {
        self.gate.forget_permits(Semaphore::MAX_PERMITS);
    }

    /// The bodies of all requests so far.
    pub fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(State(model): State<FakeModel>, Json(body): Json<Value>) -> Response {
    model.asked.lock().unwrap().push(body);
    let _permit = model.gate.acquire().await.unwrap();
    match model.script.lock().unwrap().pop_front() {
        Some(Value::Number(status)) => {
            let status = u16::try_from(status.as_u64().unwrap()).unwrap();
            StatusCode::from_u16(status).unwrap().into_response()
        }
        Some(reply) => Json(reply).into_response(),
        None => StatusCode::BAD_REQUEST.into_response(),
    }
}

fn reply(message: Value, finish_reason: &str) -> Value {
    json!({"id": "r", "model": "served", "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
}

/// The model answers.
pub fn says(text: &str) -> Value {
    reply(json!({"role": "assistant", "content": text}), "stop")
}

/// The model's answer is cut.
pub fn is_cut(text: &str) -> Value {
    reply(json!({"role": "assistant", "content": text}), "length")
}

/// The model thinks and calls tools, each with arguments as text.
pub fn calls(calls: &[(&str, &str)]) -> Value {
    let call = |(n, (name, arguments)): (usize, &(&str, &str))| json!({"id": format!("c{n}-{name}"), "type": "function", "function": {"name": name, "arguments": arguments}});
    let calls: Vec<Value> = calls.iter().enumerate().map(call).collect();
    let message = json!({"role": "assistant", "content": "\n\n", "reasoning_content": "hm", "tool_calls": calls});
    reply(message, "tool_calls")
}

/// Everything that a rollout needs.
pub struct World {
    pub model: FakeModel,
    pub services: Services,
    pub record: RecordContext,
    _dir: TempDir,
}

impl World {
    pub async fn new() -> Self {
        let store = Store::open("memory://").await.unwrap();
        let dir = TempDir::new().unwrap();
        let tasks = Tasks::new(Shutdown::new());
        let model = FakeModel::start(&tasks).await;
        let clock = Arc::new(SystemClock);
        let endpoint = ModelEndpoint {
            max_retries: 1,
            ..ModelEndpoint::new(&model.url)
        };
        let services = Services {
            mcp: mcp_host(dir.path(), &tasks),
            model: ModelClient::new(endpoint).unwrap(),
            model_name: "qwen3".to_owned(),
            extra: Map::new(),
            tokenizer: Tokenizer::shared().unwrap().clone(),
            hooks: Hooks::new([]).unwrap(),
            store: store.clone(),
            clock: clock.clone(),
        };
        let record = RecordContext {
            store,
            spool: Spool::open(&dir.path().join("data")).await.unwrap(),
            clock,
            tasks,
        };
        Self {
            model,
            services,
            record,
            _dir: dir,
        }
    }
}

fn mcp_host(dir: &Path, tasks: &Tasks) -> McpHost {
    let script = dir.join("toy.cjs");
    std::fs::write(&script, TOY_SERVER).unwrap();
    let servers = json!({"mcpServers": {"toy": {"command": "node", "args": [script]}}});
    let env: BTreeMap<String, String> = std::env::vars().collect();
    McpHost::new(McpHostConfig {
        servers: McpConfig::parse(&servers.to_string(), &env).unwrap(),
        allow_inline: false,
        playwright_dir: None,
        temp_dir: std::env::temp_dir(),
        env,
        tasks: tasks.clone(),
    })
    .unwrap()
}

/// A job over the toy server.
pub fn job(fields: Value) -> (JobDraft, JobSpec) {
    let mut job = json!({"mcp": ["toy"], "prompt": "do it"});
    for (key, value) in fields.as_object().unwrap() {
        job[key] = value.clone();
    }
    let draft = parse_line(job.to_string().as_bytes()).unwrap();
    let spec = draft.check().unwrap();
    (draft, spec)
}
