//! The MCP host against a real stdio server that behaves and misbehaves, and against the end of the host itself.

#![expect(clippy::unwrap_used, reason = "the servers are part of the tests")]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Json;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use espalier_agent_worker::mcp::{
    McpConfig, McpError, McpHost, McpHostConfig, ToolOutcome, Toolbox,
};
use espalier_core::error::ErrorClass;
use espalier_core::id::ProjectId;
use espalier_core::spec::{McpServer, McpUse, ToolPolicy};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

const TOY: &str = env!("CARGO_BIN_EXE_toy-mcp");
const LONG: Duration = Duration::from_secs(20);

fn host(servers: Value, allow_inline: bool) -> McpHost {
    let file = json!({ "mcpServers": servers }).to_string();
    let env: BTreeMap<String, String> = [
        ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
        ("TOY_TOKEN".to_owned(), "hunter2-secret".to_owned()),
    ]
    .into();
    McpHost::new(McpHostConfig {
        servers: McpConfig::parse(&file, &env).unwrap(),
        allow_inline,
        playwright_dir: None,
        temp_dir: std::env::temp_dir(),
        env,
        tasks: Tasks::new(Shutdown::new()),
    })
    .unwrap()
}

fn toy_host() -> McpHost {
    host(
        json!({"toy": {"command": TOY, "env": {"TOKEN": "${TOY_TOKEN}"}}}),
        false,
    )
}

async fn connect(
    host: &McpHost,
    uses: &[McpUse],
    policy: &ToolPolicy,
) -> Result<Toolbox, McpError> {
    let project = ProjectId::new("p").unwrap();
    host.connect(&project, "r", uses, policy, CancellationToken::new())
        .await
}

async fn toolbox(host: &McpHost) -> Toolbox {
    connect(host, &[McpUse::Named("toy".into())], &ToolPolicy::default())
        .await
        .unwrap()
}

fn arguments(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

async fn call(toolbox: &Toolbox, name: &str, value: Value) -> Result<ToolOutcome, McpError> {
    toolbox.call(name, arguments(value), LONG).await
}

fn is_running(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits until `done`, and says what was waited for if it does not come.
async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {LONG:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn tools_answer_fail_and_are_described() {
    let host = toy_host();
    let toolbox = toolbox(&host).await;
    assert_eq!(
        call(&toolbox, "echo", json!({"text": "hé"}))
            .await
            .unwrap()
            .text,
        "hé"
    );
    assert_eq!(
        call(&toolbox, "add", json!({"a": 1.5, "b": 2}))
            .await
            .unwrap()
            .text,
        "3.5"
    );

    let failed = call(&toolbox, "fail", json!({"message": "no"}))
        .await
        .unwrap();
    assert!(failed.is_error && failed.text == "no");
    let refused = call(&toolbox, "add", json!({"a": "x"})).await.unwrap();
    assert!(
        refused.is_error && refused.text.contains("must be numbers"),
        "{refused:?}"
    );
    let unknown = call(&toolbox, "nope", json!({})).await.unwrap_err();
    assert!(matches!(unknown, McpError::UnknownTool { .. }), "{unknown}");

    call(&toolbox, "note_write", json!({"name": "n", "text": "kept"}))
        .await
        .unwrap();
    let note = toolbox
        .read_resource("toy", "note://n", LONG)
        .await
        .unwrap();
    assert_eq!((note.text.as_str(), note.is_error), ("kept", false));
    let missing = toolbox
        .read_resource("toy", "note://m", LONG)
        .await
        .unwrap();
    assert!(missing.is_error);

    let servers = serde_json::to_value(toolbox.servers()).unwrap();
    assert_eq!(servers[0]["title"], "toy-mcp");
    assert_eq!(servers[0]["version"], "1.0.0");
    assert_eq!(toolbox.tool_list_digest().len(), 64);
    toolbox.close().await;
    assert!(host.process_ids().is_empty(), "close ends the server");
    assert!(host.shutdown(LONG).await);
}

#[tokio::test]
async fn each_rollout_has_a_server_of_its_own() {
    let host = toy_host();
    let (one, two) = (toolbox(&host).await, toolbox(&host).await);
    assert_eq!(host.process_ids().len(), 2);
    call(&one, "note_write", json!({"name": "n", "text": "x"}))
        .await
        .unwrap();
    assert!(
        call(&two, "note_read", json!({"name": "n"}))
            .await
            .unwrap()
            .is_error
    );
    assert_eq!(one.tool_list_digest(), two.tool_list_digest());
    assert!(host.shutdown(LONG).await);
    assert!(host.process_ids().is_empty());
    let error = call(&one, "echo", json!({"text": "x"})).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Preempted, "{error}");
}

#[tokio::test]
async fn two_servers_with_the_same_tools_and_a_policy() {
    let host = host(
        json!({"a": {"command": TOY}, "b": {"command": TOY, "espalier": {"deny_default": ["*note*"]}}}),
        false,
    );
    let uses = [McpUse::Named("a".into()), McpUse::Named("b".into())];
    let policy = ToolPolicy {
        ask: vec!["*__note_write".into()],
        deny: vec!["b__die".into(), "*__flood".into()],
        ..ToolPolicy::default()
    };
    let toolbox = connect(&host, &uses, &policy).await.unwrap();
    let names: Vec<_> = toolbox.tools().iter().map(|tool| tool.name()).collect();
    assert!(
        names.contains(&"a__echo") && names.contains(&"b__echo") && names.contains(&"a__die"),
        "{names:?}"
    );
    assert!(
        !names.contains(&"b__die")
            && !names.contains(&"a__flood")
            && !names.contains(&"b__note_read"),
        "{names:?}"
    );
    let asked: Vec<_> = toolbox
        .tools()
        .iter()
        .filter(|tool| tool.needs_approval)
        .map(|tool| tool.name())
        .collect();
    assert_eq!(asked, ["a__note_write"]);
    assert_eq!(
        call(&toolbox, "b__echo", json!({"text": "b"}))
            .await
            .unwrap()
            .text,
        "b"
    );
    // A verifier is not bound by the policy.
    let outcome = toolbox
        .call_server("b", "note_read", arguments(json!({"name": "x"})), LONG)
        .await
        .unwrap();
    assert!(outcome.is_error);
    assert!(host.shutdown(LONG).await);
}

#[tokio::test]
async fn a_server_that_dies_is_an_infrastructure_error_with_its_last_words() {
    let host = toy_host();
    let toolbox = toolbox(&host).await;
    let error = call(
        &toolbox,
        "die",
        json!({"message": "out of ink hunter2-secret"}),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, McpError::Crashed { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(error.to_string().contains("exit status: 7"), "{error}");
    // The message goes into logs and telemetry; what the server says does not.
    assert!(!error.to_string().contains("out of ink"), "{error}");
    let words = error.last_words().unwrap_or_default();
    assert!(words.contains("out of ink ***"), "{words}");
    let error = call(&toolbox, "echo", json!({"text": "x"}))
        .await
        .unwrap_err();
    assert!(matches!(error, McpError::Crashed { .. }), "{error}");
    assert!(host.shutdown(LONG).await);
}

#[tokio::test]
async fn a_hang_ends_at_the_deadline() {
    let host = toy_host();
    let toolbox = toolbox(&host).await;
    let started = Instant::now();
    let call = toolbox.call(
        "sleep",
        arguments(json!({"ms": 600_000})),
        Duration::from_millis(300),
    );
    let error = call.await.unwrap_err();
    assert!(matches!(error, McpError::Deadline { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(started.elapsed() < LONG, "{:?}", started.elapsed());
    toolbox.close().await;
    assert!(host.process_ids().is_empty(), "a hung server is killed");
    assert!(host.shutdown(LONG).await);
}

#[tokio::test]
async fn five_megabytes_are_an_answer_and_a_flood_is_not() {
    let host = toy_host();
    let toolbox = toolbox(&host).await;
    let big = call(&toolbox, "big", json!({"bytes": 5_000_000}))
        .await
        .unwrap();
    assert_eq!(big.text.len(), 5_000_000);
    for _ in 0..6 {
        call(&toolbox, "big", json!({"bytes": 5_000_000}))
            .await
            .expect("the limit is for one answer");
    }
    let started = Instant::now();
    let error = call(&toolbox, "flood", json!({})).await.unwrap_err();
    assert!(matches!(error, McpError::TooLarge { .. }), "{error}");
    assert!(
        started.elapsed() < LONG,
        "a flood does not wait for the deadline"
    );
    wait_until("the end of the flooding server", || {
        host.process_ids().is_empty()
    })
    .await;
    assert!(host.shutdown(LONG).await);
}

#[tokio::test]
async fn a_cancelled_rollout_stops_waiting() {
    let host = toy_host();
    let cancel = CancellationToken::new();
    let uses = [McpUse::Named("toy".into())];
    let project = ProjectId::new("p").unwrap();
    let toolbox = host
        .connect(&project, "r", &uses, &ToolPolicy::default(), cancel.clone())
        .await
        .unwrap();
    let (result, ()) = tokio::join!(call(&toolbox, "sleep", json!({"ms": 600_000})), async {
        cancel.cancel()
    });
    assert_eq!(result.unwrap_err().class(), ErrorClass::Cancelled);
    drop(toolbox);
    wait_until("the end of the dropped server", || {
        host.process_ids().is_empty()
    })
    .await;
    assert!(host.shutdown(LONG).await);
}

#[tokio::test]
async fn what_a_job_may_not_ask_for_is_refused_with_field_value_and_rule() {
    let toy = McpServer {
        command: Some(TOY.into()),
        ..McpServer::default()
    };
    let inline = |server: &McpServer| McpUse::Inline {
        name: "own".into(),
        server: server.clone(),
    };
    let missing = McpServer {
        command: Some("no-such-program".into()),
        ..McpServer::default()
    };
    let (closed, open) = (toy_host(), host(json!({}), true));
    for (host, uses, part) in [
        (
            &closed,
            vec![McpUse::Named("nobody".into())],
            "`mcp[0].server` must be a server of this worker (toy), got `nobody`",
        ),
        (&closed, vec![inline(&toy)], "allow_inline_mcp"),
        (
            &closed,
            vec![McpUse::Named("toy".into()), McpUse::Named("toy".into())],
            "`mcp[1]` must be named once",
        ),
        (
            &open,
            vec![inline(&missing)],
            "`mcp[0].command` must be a program that the worker can find, got `no-such-program`",
        ),
    ] {
        let error = connect(host, &uses, &ToolPolicy::default())
            .await
            .err()
            .unwrap();
        assert_eq!(error.class(), ErrorClass::Invalid);
        assert!(error.to_string().contains(part), "{error}");
    }
    let own = connect(&open, &[inline(&toy)], &ToolPolicy::default())
        .await
        .unwrap();
    let token = call(&own, "env", json!({"name": "TOY_TOKEN"}))
        .await
        .unwrap();
    assert_eq!(
        token.text, "",
        "a server does not see the worker's environment"
    );
    assert!(closed.shutdown(LONG).await && open.shutdown(LONG).await);
}

#[tokio::test]
async fn servers_that_do_not_start_say_why() {
    let servers = json!({
        "ends": {"command": "sh", "args": ["-c", "echo broken config >&2; exit 4"]},
        "hangs": {"command": "sleep", "args": ["600"], "espalier": {"start_timeout_s": 1}},
        "absent": {"command": "no-such-program"},
        "nobody": {"url": "http://127.0.0.1:1/mcp"},
    });
    let host = host(servers, false);
    for (name, parts) in [
        ("ends", ["exit status: 4", "broken config"]),
        ("hangs", ["hangs", "no handshake in time"]),
        ("absent", ["no-such-program", "cannot be started here"]),
        ("nobody", ["nobody", "could not be reached"]),
    ] {
        let error = connect(&host, &[McpUse::Named(name.into())], &ToolPolicy::default())
            .await
            .err()
            .unwrap();
        assert_eq!(error.class(), ErrorClass::Infra, "{error}");
        // What a server wrote is told to whoever looks at the job, and is in no message that may be logged.
        let told = format!("{error} {}", error.last_words().unwrap_or_default());
        for part in parts {
            assert!(told.contains(part), "{name}: {told}");
        }
        assert!(!error.to_string().contains("broken config"), "{error}");
    }
    wait_until("the end of what did not start", || {
        host.process_ids().is_empty()
    })
    .await;
    assert!(host.shutdown(LONG).await);
}

/// Runs in a process of its own, which the next test kills.
#[tokio::test]
#[ignore = "part of `kill_9_leaves_nothing`"]
async fn hold_two_servers_until_killed() {
    let host = toy_host();
    let _held = [toolbox(&host).await, toolbox(&host).await];
    println!("PIDS {:?}", host.process_ids());
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn kill_9_leaves_nothing() {
    use std::io::BufRead;
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "mcp_host::hold_two_servers_until_killed",
            "--ignored",
            "--nocapture",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(holder.stdout.take().unwrap()).lines();
    let pids = loop {
        let line = lines.next().expect("the holder tells its servers").unwrap();
        if let Some((_, pids)) = line.split_once("PIDS ") {
            break serde_json::from_str::<Vec<i32>>(pids).unwrap();
        }
    };
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|pid| is_running(*pid)));
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait_until("the end of all servers", || {
        !pids.iter().any(|pid| is_running(*pid))
    })
    .await;
}

/// A streamable HTTP server that forgets its session on request.
#[derive(Clone, Default)]
struct Forgetful {
    forgotten: Arc<AtomicBool>,
    handshakes: Arc<AtomicUsize>,
}

impl Forgetful {
    async fn serve(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/mcp", listener.local_addr().unwrap());
        let server = self.clone();
        let answer = move |headers: HeaderMap, Json(request): Json<Value>| async move {
            server.answer(&headers, &request)
        };
        let router = axum::Router::new().route("/mcp", post(answer));
        Tasks::new(Shutdown::new()).spawn("test.mcp", OnFailure::Log, async move {
            axum::serve(listener, router).await
        });
        url
    }

    fn answer(&self, headers: &HeaderMap, request: &Value) -> Response {
        if headers
            .get("authorization")
            .is_none_or(|value| value != "Bearer hunter2-secret")
        {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        let result = match request["method"].as_str().unwrap() {
            "initialize" => {
                self.handshakes.fetch_add(1, Ordering::SeqCst);
                json!({"protocolVersion": request["params"]["protocolVersion"], "capabilities": {"tools": {}},
                       "serverInfo": {"name": "forgetful", "version": "1"}})
            }
            _ if self.forgotten.load(Ordering::SeqCst) => {
                return StatusCode::NOT_FOUND.into_response();
            }
            "tools/list" => {
                json!({"tools": [{"name": "state", "inputSchema": {"type": "object"}}]})
            }
            "tools/call" => json!({"content": [{"type": "text", "text": "kept"}]}),
            _ => return StatusCode::ACCEPTED.into_response(),
        };
        let reply = Json(json!({"jsonrpc": "2.0", "id": request["id"], "result": result}));
        ([("mcp-session-id", "s1")], reply).into_response()
    }
}

#[tokio::test]
async fn a_forgotten_session_is_an_error_and_never_begun_again() {
    let server = Forgetful::default();
    let url = server.serve().await;
    let servers = json!({
        "http": {"url": url, "headers": {"Authorization": "Bearer ${TOY_TOKEN}"}},
        "stranger": {"url": url, "headers": {"Authorization": "Bearer other-secret"}},
    });
    let host = host(servers, false);
    let toolbox = connect(
        &host,
        &[McpUse::Named("http".into())],
        &ToolPolicy::default(),
    )
    .await
    .unwrap();
    assert_eq!(
        call(&toolbox, "state", json!({})).await.unwrap().text,
        "kept"
    );
    server.forgotten.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let error = call(&toolbox, "state", json!({})).await.unwrap_err();
        assert!(matches!(error, McpError::ContextLost { .. }), "{error}");
        assert_eq!(error.class(), ErrorClass::Infra);
    }
    assert_eq!(server.handshakes.load(Ordering::SeqCst), 1);

    let error = connect(
        &host,
        &[McpUse::Named("stranger".into())],
        &ToolPolicy::default(),
    )
    .await
    .err()
    .unwrap();
    assert!(matches!(error, McpError::Start { .. }), "{error}");
    assert!(!format!("{error:?}").contains("other-secret"), "{error:?}");
    assert!(host.shutdown(LONG).await);
}
