//! What a model sampled is what is trained, token by token: a model that was taught a conversation with calls of tools speaks
//! it at a real inference worker, and its trace is followed into the rows of a data set, and held against the template.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use espalier_core::chat::{Message, ToolCall};
use espalier_core::trace::{FileEntry, ModelCall, StopReason, Trace, prompt_ids};
use espalier_dataset::Renderer;
use espalier_qwen3_text::Tokenizer;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::serving::Serving;
use espalier_tests::harness::tiny;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(120);
/// A model of two layers knows by heart what it has read so often.
const LESSON: &str = "method = \"full\"\nbatch = 4\naccumulation = 1\nlr = 5e-3\noptimizer = \"adamw\"\nmax_steps = 150\n\
    schedule = \"cosine\"\nwarmup_steps = 10\nweight_decay = 0\n";

/// Two questions, with help that training leaves out.
fn rollout(id: &str, sampling: &Value) -> Value {
    json!({
        "id": id, "mcp": ["toy"], "tools": {"allow": ["*echo"]}, "hints": "Let the tool say it.",
        "prompt": ["Say lemon and seven.", "Thank you."], "sampling": sampling,
    })
}

struct World {
    cluster: Cluster,
    tokenizer: Tokenizer,
}

impl World {
    async fn new() -> Self {
        let allow = "ESPALIER_AGENT_WORKER_ALLOW_BASE_FOLDERS";
        let cluster = Cluster::start_with(Setup {
            environment: vec![(allow.to_owned(), "true".to_owned())],
            ..Setup::new("embedded", "")
        });
        let world = Self {
            cluster: cluster.await,
            tokenizer: Tokenizer::from_json(tiny::SMALL_TOKENIZER).unwrap(),
        };
        tiny::write_small_model(&world.path("small"));
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.folder.path().join(name)
    }

    fn text_path(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A worker that serves the model in a folder of the test's.
    async fn serve(&self, model: &str) -> Serving {
        let (mut options, environment) = self.cluster.answering();
        options.extend(["--dtype", "f32"].map(str::to_owned));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let (folder, model) = (TempDir::new().unwrap(), self.text_path(model));
        Serving::start_on(folder, &model, &options, &environment).await
    }

    async fn run(&self, words: &[&str]) -> Output {
        let output = self.cluster.espalier(words).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        output
    }

    async fn roll_out(&self, id: &str, sampling: Value) -> Trace {
        let mut client = self.cluster.client().await;
        client.submit(id, &[rollout(id, &sampling)]).await;
        client.wait(id, DEADLINE).await;
        client.trace(id, id).await
    }

    /// Teaches the small model a conversation: each turn behind the prompt that a server makes of what comes before it.
    async fn teach(&self, messages: &[Message], tools: &[Value]) {
        let mut renderer = Renderer::new(&self.tokenizer);
        let is_said = |at: &usize| messages[*at].role() == "assistant";
        let mut rows = String::new();
        for (turn, at) in (0..messages.len()).filter(is_said).enumerate() {
            let prompt = renderer.prompt(&messages[..at], tools, true).unwrap();
            let start = renderer.encode(&prompt, 0).len();
            let trained = [u32::try_from(turn).unwrap()];
            let said = renderer.render(&messages[..=at], tools, &trained).unwrap();
            let ids = &said.ids[..said.turns[turn].end as usize];
            let supervised = [[start, ids.len()]];
            let row = json!({"id": format!("turn {turn}"), "ids": ids, "supervised": supervised});
            rows.push_str(&format!("{row}\n"));
        }
        let [rows_file, config] = ["rows.jsonl", "lesson.toml"].map(|name| self.text_path(name));
        std::fs::write(&rows_file, rows).unwrap();
        std::fs::write(&config, LESSON).unwrap();
        let (base, out) = (self.text_path("small"), self.text_path("taught"));
        let train = [
            "train", "--name", "taught", "--base", &base, "--rows", &rows_file, "--config", &config,
        ];
        self.run(&train).await;
        self.run(&["adapters", "pull", "taught", "-o", &out]).await;
    }

    /// The rows of a data set of the trace of `batch`.
    async fn rows(&self, batch: &str, hints: &str) -> Vec<Value> {
        let name = &format!("{batch}{hints}");
        let (small, out) = (self.text_path("small"), self.text_path(name));
        let build = [
            "dataset",
            "build",
            "--from",
            batch,
            "--name",
            name,
            "--eval-share",
            "0",
            "--tokenizer",
            &small,
            hints,
        ];
        self.run(&build).await;
        self.run(&["dataset", "pull", name, "-o", &out]).await;
        let file = Path::new(&out).join("data/train-00000-of-00001.jsonl");
        let text = std::fs::read_to_string(file).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// What `traces render --diff` says of a trace, and its exit code.
    async fn differences(&self, batch: &str) -> (Option<i32>, Value) {
        let (name, small) = (format!("{batch}/{batch}"), self.text_path("small"));
        let words = [
            "traces",
            "render",
            &name,
            "--diff",
            "--json",
            "--tokenizer",
            &small,
        ];
        let output = self.cluster.espalier(&words).await;
        let said = String::from_utf8_lossy(&output.stderr);
        let told = serde_json::from_slice(&output.stdout);
        (
            output.status.code(),
            told.unwrap_or_else(|_| panic!("{said}")),
        )
    }

    /// Changes the trace of `batch` in the store, and its manifest so that nothing else is wrong with it.
    fn alter(&self, batch: &str, change: impl FnOnce(&mut Trace)) {
        let key = self.cluster.key(batch, batch);
        let mut manifest = self.cluster.manifest(&key);
        let file = manifest.trace_file().unwrap().path.clone();
        let path = self.cluster.object(&file);
        let text = zstd::decode_all(&*std::fs::read(&path).unwrap()).unwrap();
        let mut trace = Trace::from_json(&text).unwrap();
        change(&mut trace);
        let bytes = zstd::encode_all(&*serde_json::to_vec(&trace).unwrap(), 3).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let entry = manifest.files.iter_mut().find(|entry| entry.path == file);
        *entry.unwrap() = FileEntry::of(file, &bytes);
        let path = self.cluster.object(&espalier_core::layout::manifest(&key));
        std::fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    }
}

/// What is to be said after what the rollout begins with.
fn lesson(begun: &Trace) -> Vec<Message> {
    let is_said = |message: &Message| message.role() == "assistant";
    let first = begun.messages.iter().position(is_said).unwrap();
    let mut messages = begun.messages[..first].to_vec();
    let tool = &begun.header.tools[0].function.name;
    let thought = |text: &str| Some(text.to_owned());
    for (id, word) in [("c1", "lemon"), ("c2", "seven")] {
        let arguments = json!({"text": word}).as_object().cloned().unwrap();
        let call = ToolCall::new(id, tool, arguments);
        let think = thought(&format!("The tool says {word}."));
        messages.push(Message::assistant(String::new(), think, vec![call]));
        messages.push(Message::Tool {
            tool_call_id: id.to_owned(),
            content: word.to_owned(),
        });
    }
    let say =
        |content: &str, think: &str| Message::assistant(content.to_owned(), thought(think), vec![]);
    messages.push(say("lemon and seven", "Both are said."));
    messages.push(Message::User {
        content: "Thank you.".to_owned(),
    });
    messages.push(say("You are welcome.", "They are glad."));
    messages
}

/// Trained tokens of all rows, each range with what stands before it, in order.
fn trained(rows: &[Value]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let ranges = |row: &Value| {
        let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        let place = |range: &Value, name: &str| range[name].as_u64().unwrap() as usize;
        let ranges = row["supervised"].as_array().unwrap().clone();
        ranges.into_iter().map(move |range| {
            let (start, end) = (place(&range, "start"), place(&range, "end"));
            (ids[..start].to_vec(), ids[start..end].to_vec())
        })
    };
    rows.iter().flat_map(ranges).collect()
}

/// What was sampled, in order. Each id has its log-probability.
fn sampled(trace: &Trace) -> Vec<Vec<u32>> {
    let ids = |call: &ModelCall| {
        let ids = call.completion_ids.clone().unwrap();
        assert_eq!(call.logprobs.as_ref().map(Vec::len), Some(ids.len()));
        ids
    };
    trace.model_calls.iter().map(ids).collect()
}

/// Every call is trained once, as it was sampled; where hints stay behind exactly the prompt that the model was shown, and
/// else behind what the template makes of the conversation without them.
async fn check_rows(world: &World, trace: &Trace) {
    let sampled = sampled(trace);
    let batch = trace.header.job.batch.as_str();
    let kept = trained(&world.rows(batch, "--keep-hints").await);
    let prompts = prompt_ids(&trace.model_calls).unwrap();
    let shown: Vec<_> = prompts.into_iter().map(Option::unwrap).collect();
    assert_eq!(
        kept,
        shown.into_iter().zip(sampled.clone()).collect::<Vec<_>>()
    );
    let dropped = trained(&world.rows(batch, "--drop-hints").await);
    let is_hint = |message: &Message| matches!(message, Message::System { hint: true, .. });
    let tools: Vec<Value> = trace.header.tools.iter().map(|tool| json!(tool)).collect();
    let renderer = Renderer::new(&world.tokenizer);
    let expected = trace.model_calls.iter().zip(sampled).map(|(call, said)| {
        let before = trace.messages[..call.message].iter();
        let before: Vec<Message> = before.filter(|m| !is_hint(m)).cloned().collect();
        let prompt = renderer.prompt(&before, &tools, true).unwrap();
        (prompt.text().to_owned(), said)
    });
    let spelt = dropped
        .into_iter()
        .map(|(before, said)| (world.tokenizer.decode(&before).unwrap(), said));
    assert_eq!(spelt.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_sampled_over_turns_and_tools_is_trained_token_by_token() {
    let world = World::new().await;
    let mut worker = world.cluster.worker_with_cpu_slots("a", 2);
    let _trainer = world.cluster.train_worker("trainer");
    // A model of random weights spells nothing as the tokenizer would.
    let serving = world.serve("small").await;
    let wild =
        json!({"temperature": 1, "top_p": 1, "top_k": 0, "seed": 3, "completion_tokens": 40});
    let wild = world.roll_out("wild", wild).await;
    drop(serving);
    let said = &sampled(&wild)[0];
    assert_eq!((said.len(), wild.outcome.stop), (40, StopReason::CutAnswer));
    let text = world.tokenizer.decode(said).unwrap();
    assert_ne!(world.tokenizer.encode(&text), *said);
    check_rows(&world, &wild).await;
    let (code, told) = world.differences("wild").await;
    assert_eq!(
        (code, &told["calls"][0]["difference"]["part"]),
        (Some(1), &json!("completion"))
    );

    let lesson = lesson(&wild);
    let tools: Vec<Value> = wild.header.tools.iter().map(|tool| json!(tool)).collect();
    world.teach(&lesson, &tools).await;
    let _serving = world.serve("taught").await;
    let greedy = json!({"temperature": 0, "completion_tokens": 200});
    let trace = world.roll_out("taught", greedy).await;
    assert_eq!(trace.outcome.stop, StopReason::Answered);
    let texts = |messages: &[Message]| -> Vec<String> {
        messages.iter().map(|m| m.content().to_owned()).collect()
    };
    assert_eq!(
        texts(&trace.messages),
        texts(&lesson),
        "{:#?}",
        trace.messages
    );
    assert_eq!((trace.model_calls.len(), trace.tool_calls.len()), (4, 2));
    check_rows(&world, &trace).await;

    let (code, told) = world.differences("taught").await;
    assert_eq!(
        (code, &told["differing"], &told["unknown"]),
        (Some(0), &json!(0), &json!(0)),
        "{told}"
    );
    let small = world.text_path("small");
    let words = [
        "traces",
        "render",
        "taught/taught",
        "--diff",
        "--tokenizer",
        &small,
    ];
    let table = String::from_utf8(world.run(&words).await.stdout).unwrap();
    assert_eq!(table.matches("the same").count(), 4, "{table}");

    // Another id in the third answer is found at its place.
    let (at, was) = (3, sampled(&trace)[2][3]);
    world.alter("taught", |trace| {
        let said = trace.model_calls[2].completion_ids.as_mut().unwrap();
        said[at] = was - 1;
    });
    let (code, told) = world.differences("taught").await;
    assert_eq!(code, Some(1));
    let found = &told["calls"][2]["difference"];
    assert_eq!(
        (
            &found["part"],
            &found["at"],
            &found["recorded"]["id"],
            &found["rendered"]["id"]
        ),
        (
            &json!("completion"),
            &json!(at),
            &json!(was - 1),
            &json!(was)
        ),
        "{told}"
    );
    assert!(told["calls"][0]["difference"].is_null() && told["calls"][1]["difference"].is_null());
    worker.terminate(DEADLINE).await;
}
