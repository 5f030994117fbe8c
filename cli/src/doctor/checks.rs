//! The checks themselves. Each has a deadline, changes nothing that it does not take back, and returns what it saw.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use espalier_core::chat::Message;
use espalier_core::spec::{JobDraft, PromptDraft};
use espalier_proto::v1;
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::model::{ChatRequest, ModelClient, ModelEndpoint};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{Tasks, blocking, with_deadline};
use espalier_runtime::telemetry::error_chain;
use serde_json::{Map, Value};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::{Doctor, Finding};
use crate::context::Context;
use crate::exit::{Exit, Problem};
use crate::output::{count, cut};
use crate::servers::{self, Servers};

/// Below this, a batch of browser rollouts may fill the disk.
const DISK_WARN_BYTES: u64 = 5 << 30;
/// Below this, it will.
const DISK_FAIL_BYTES: u64 = 1 << 30;
/// Longest that a program may take to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest that a connection, or a short answer over one, may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that a model may take for a few tokens: it may have to be loaded first.
const CHAT_TIMEOUT: Duration = Duration::from_secs(120);
/// Largest list of models that is read.
const MODELS_BYTES_MAX: usize = 1 << 20;
/// Longest that servers may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Whether the data folder can be written, and how much room there is.
pub fn data_dir(context: &Context) -> Vec<Finding> {
    let folder = match context.data_dir() {
        Ok(folder) => folder,
        Err(problem) => return vec![refused("data folder", &problem)],
    };
    let shown = folder.display().to_string();
    let probe = folder.join(format!(".doctor-{}", std::process::id()));
    let written = std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&probe, "x"))
        .and_then(|()| std::fs::remove_file(&probe));
    if let Err(error) = written {
        let fix = "make it writable, or name another folder with --data-dir";
        return vec![Finding::fail(
            "data folder",
            format!("{shown}: {error}"),
            fix,
        )];
    }
    vec![Finding::ok("data folder", shown), disk(&folder)]
}

fn disk(folder: &Path) -> Finding {
    let free = match rustix::fs::statvfs(folder) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => return Finding::warn("disk", error.to_string(), "look with `df`"),
    };
    let seen = format!("{:.1} GiB free", free as f64 / f64::from(1 << 30));
    let fix = "make room, or name a folder on another disk with --data-dir";
    match free {
        0..DISK_FAIL_BYTES => Finding::fail("disk", seen, fix),
        DISK_FAIL_BYTES..DISK_WARN_BYTES => Finding::warn("disk", seen, fix),
        _ => Finding::ok("disk", seen),
    }
}

/// Whether the built-in tokenizer can be read.
pub async fn tokenizer() -> Finding {
    let loaded = blocking("doctor.tokenizer", || {
        Tokenizer::shared()
            .map(|tokenizer| tokenizer.count("Hello, world!"))
            .map_err(|error| error_chain(error))
    });
    match loaded.await {
        Ok(Ok(4)) => Finding::ok("tokenizer", "Qwen3's, built in"),
        Ok(Ok(tokens)) => Finding::fail(
            "tokenizer",
            format!("counts {tokens} tokens where there are 4"),
            "install Espalier again",
        ),
        Ok(Err(error)) => Finding::fail("tokenizer", error, "install Espalier again"),
        Err(error) => Finding::fail("tokenizer", error.to_string(), "install Espalier again"),
    }
}

/// Oldest major version of Node.js that Playwright runs on.
const NODE_MAJOR_MIN: u32 = 20;
/// The names under which Chromium is installed.
const BROWSERS: [&str; 4] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
];

/// The versions of what the browser preset needs.
pub async fn programs(environment: &Environment) -> Vec<Finding> {
    vec![
        node(version("node", environment).await.as_deref()),
        browser(environment).await,
    ]
}

fn node(version: Option<&str>) -> Finding {
    let fix = "run `make setup`, and put what it brings, target/node/node_modules/.bin, into PATH; or install a newer Node.js";
    let Some(version) = version else {
        return Finding::warn("node", "`node` does not answer; browsers need it", fix);
    };
    let major = version.trim_start_matches('v').split('.').next();
    let major: Option<u32> = major.and_then(|text| text.parse().ok());
    match major {
        Some(major) if major < NODE_MAJOR_MIN => {
            let seen = format!("{version}; browsers need {NODE_MAJOR_MIN} or newer");
            Finding::warn("node", seen, fix)
        }
        _ => Finding::ok("node", version),
    }
}

async fn browser(environment: &Environment) -> Finding {
    for name in BROWSERS {
        if let Some(version) = version(name, environment).await {
            return Finding::ok("chromium", format!("{name}: {version}"));
        }
    }
    let seen = format!("none of {} answers; browsers need it", BROWSERS.join(", "));
    let fix = "run `make setup`, or install it with the system's package manager";
    Finding::warn("chromium", seen, fix)
}

async fn version(program: &str, environment: &Environment) -> Option<String> {
    let path = environment.get("PATH").cloned().unwrap_or_default();
    let home = environment.get("HOME").cloned().unwrap_or_default();
    let asking = Command::new(program)
        .arg("--version")
        .env_clear()
        .env("PATH", path)
        .env("HOME", home)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = with_deadline("doctor.version", VERSION_TIMEOUT, asking)
        .await
        .ok()?
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then(|| cut(&text, 100))
}

/// Whether each MCP server starts and lists its tools.
pub async fn servers(context: &Context, args: &Doctor) -> Vec<Finding> {
    let asked = match Servers::load(args.mcp.as_deref(), false, &context.environment) {
        Ok(asked) => asked,
        Err(problem) => return vec![refused("MCP servers", &problem)],
    };
    let playwright_dir =
        servers::playwright_dir(args.playwright_dir.as_deref(), &context.environment);
    let tasks = Tasks::new(Shutdown::new());
    let host = match servers::host(
        asked.config.clone(),
        playwright_dir,
        &context.environment,
        &tasks,
    ) {
        Ok(host) => host,
        Err(problem) => return vec![refused("MCP servers", &problem)],
    };
    let mut findings = Vec::new();
    for name in asked.names() {
        let what = format!("server {name}");
        findings.push(match servers::probe(&host, &name).await {
            Ok(probed) => Finding::ok(what, probed.text()),
            Err(error) if asked.built_in => Finding::warn(
                what,
                error.to_string(),
                "needed for browser tasks only: run `make setup`",
            ),
            Err(error) => Finding::fail(
                what,
                error.to_string(),
                "correct its entry, or install what is missing",
            ),
        });
    }
    host.shutdown(END_LIMIT).await;
    findings
}

/// Whether a coordinator answers and takes the token.
pub async fn coordinator(context: &Context) -> Finding {
    let connected = async {
        let client = context.client().await?;
        let operator = context.operator().await?;
        let info = operator.admin().get_info(v1::GetInfoRequest {}).await;
        Ok::<_, Problem>((
            client.url.clone(),
            info.ok().map(tonic::Response::into_inner),
        ))
    };
    match connected.await {
        Ok((url, Some(info))) => Finding::ok(
            "coordinator",
            format!("{url}: version {}, {} queue", info.version, info.queue),
        ),
        Ok((url, None)) => Finding::ok("coordinator", format!("{url}: takes the token")),
        // Nothing is configured and nothing runs: that is how a new machine looks.
        Err(problem) if problem.message.starts_with("no coordinator is known") => Finding::warn(
            "coordinator",
            "none runs here",
            "start one with `espalier up`",
        ),
        Err(problem) => refused("coordinator", &problem),
    }
}

/// Whether the model endpoint lists the model and answers.
pub async fn model(context: &Context, args: &Doctor) -> Vec<Finding> {
    let Some(url) = &args.model_url else {
        return vec![Finding::warn(
            "model",
            "not checked",
            "name an endpoint with --model-url",
        )];
    };
    let mut endpoint = ModelEndpoint::new(url.as_str());
    endpoint.max_retries = 0;
    if let Some(variable) = &args.api_key_env {
        match context
            .environment
            .get(variable)
            .filter(|key| !key.is_empty())
        {
            Some(key) => endpoint.api_key = Some(Secret::new(key)),
            None => {
                return vec![Finding::fail(
                    "model",
                    format!("{variable} is not set"),
                    "set it to the endpoint's API key",
                )];
            }
        }
    }
    let models = match list_models(&endpoint).await {
        Ok(models) => models,
        Err(error) => {
            let fix = "check --model-url: it ends with the version, as in http://localhost:8000/v1";
            return vec![Finding::fail("model list", error, fix)];
        }
    };
    let shown = models
        .iter()
        .take(5)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    let mut findings = vec![Finding::ok(
        "model list",
        format!("{} models: {shown}", models.len()),
    )];
    let name = args.model.clone().or_else(|| models.first().cloned());
    findings.push(match name {
        None => Finding::fail(
            "model",
            "the endpoint lists no model",
            "name one with --model",
        ),
        Some(name) => chat(endpoint, &name, &models).await,
    });
    findings
}

async fn list_models(endpoint: &ModelEndpoint) -> Result<Vec<String>, String> {
    let url = format!("{}/models", endpoint.base_url.trim_end_matches('/'));
    let asking = async {
        let mut request = reqwest::Client::new().get(&url);
        if let Some(key) = &endpoint.api_key {
            request = request.bearer_auth(key.expose());
        }
        let response = request.send().await?.error_for_status()?;
        response.bytes().await
    };
    let body = with_deadline("doctor.models", ANSWER_TIMEOUT, asking)
        .await
        .map_err(|timeout| format!("{url}: {timeout}"))?
        .map_err(|error| error_chain(&error))?;
    if body.len() > MODELS_BYTES_MAX {
        return Err(format!(
            "{url} answers with {} bytes",
            count(body.len() as u64)
        ));
    }
    let value: Value =
        serde_json::from_slice(&body).map_err(|error| format!("{url} answers no JSON: {error}"))?;
    let models = value["data"]
        .as_array()
        .ok_or(format!("{url} answers without `data`"))?;
    Ok(models
        .iter()
        .filter_map(|model| model["id"].as_str())
        .map(str::to_owned)
        .collect())
}

async fn chat(endpoint: ModelEndpoint, model: &str, models: &[String]) -> Finding {
    let fix = "check the endpoint's log; `--model` must be a name that it lists";
    match try_chat(endpoint, model).await {
        Err(error) => Finding::fail("model", format!("{model}: {error}"), fix),
        Ok(seen) if !models.iter().any(|known| known == model) => Finding::warn(
            "model",
            format!("{model}: {seen}, though it is not listed"),
            fix,
        ),
        Ok(seen) => Finding::ok("model", format!("{model}: {seen}")),
    }
}

async fn try_chat(endpoint: ModelEndpoint, model: &str) -> Result<String, String> {
    let client = ModelClient::new(endpoint).map_err(|error| error_chain(&error))?;
    let draft = JobDraft {
        prompt: PromptDraft::One("Say hello.".to_owned()),
        ..JobDraft::default()
    };
    let spec = draft.check().ok();
    let sampling = spec.and_then(|spec| Some(spec.rollout()?.sampling.clone()));
    let mut sampling = sampling.ok_or("the default job is refused")?;
    sampling.completion_tokens_max = 16;
    let messages = [Message::User {
        content: "Say hello.".to_owned(),
    }];
    let request = ChatRequest {
        model,
        messages: &messages,
        tools: &[],
        sampling: &sampling,
        extra: &Map::new(),
        vllm_extra: &Map::new(),
        affinity: "doctor",
        project: "",
    };
    let cancel = CancellationToken::new();
    let turn = with_deadline("doctor.chat", CHAT_TIMEOUT, client.chat(&request, &cancel))
        .await
        .map_err(|timeout| timeout.to_string())?
        .map_err(|error| error_chain(&error))?;
    Ok(format!("answered in {:.1} s", turn.latency.as_secs_f64()))
}

/// Whether something listens where telemetry goes.
pub async fn telemetry(context: &Context) -> Finding {
    let Some(endpoint) = context
        .environment
        .get("OTEL_EXPORTER_OTLP_ENDPOINT")
        .filter(|text| !text.is_empty())
    else {
        return Finding::ok(
            "telemetry",
            "goes nowhere: OTEL_EXPORTER_OTLP_ENDPOINT is not set",
        );
    };
    let fix =
        "start the collector, or unset OTEL_EXPORTER_OTLP_ENDPOINT; nothing else depends on it";
    let Some(address) = endpoint
        .strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'))
    else {
        return Finding::fail(
            "telemetry",
            format!("{endpoint} must begin with http://"),
            fix,
        );
    };
    match with_deadline("doctor.otlp", ANSWER_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Finding::ok("telemetry", format!("{endpoint} listens")),
        Ok(Err(error)) => Finding::warn("telemetry", format!("{endpoint}: {error}"), fix),
        Err(timeout) => Finding::warn("telemetry", format!("{endpoint}: {timeout}"), fix),
    }
}

/// What a problem looks like here.
pub fn refused(what: &str, problem: &Problem) -> Finding {
    let fix = problem.fix.clone().unwrap_or_default();
    match problem.exit {
        Exit::Ok => Finding::ok(what, problem.message.clone()),
        _ => Finding::fail(what, problem.message.clone(), fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[tokio::test]
    async fn the_tokenizer_counts() {
        assert_eq!(tokenizer().await.level, Level::Ok);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_has_no_version() {
        let environment = Environment::from([("PATH".to_owned(), "/nowhere".to_owned())]);
        assert_eq!(version("node", &environment).await, None);
    }

    #[tokio::test]
    async fn an_endpoint_that_is_away_is_a_fault() {
        let endpoint = ModelEndpoint::new("http://127.0.0.1:1/v1");
        assert!(list_models(&endpoint).await.is_err());
    }

    #[test]
    fn an_old_node_is_a_warning() {
        assert!(matches!(node(Some("v18.20.4")).level, Level::Warn));
        assert!(matches!(node(Some("v20.0.0")).level, Level::Ok));
        assert!(matches!(node(None).level, Level::Warn));
    }
}
