//! The MCP host with real browsers: isolation between rollouts, the loss of what is behind a rollout, and what stays
//! behind. Needs Chromium and `npm ci` in `agent-worker/playwright`; without them these tests fail and name the fix.

#![expect(
    clippy::unwrap_used,
    reason = "the pages and processes are part of the tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, LOCATION, SET_COOKIE};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use espalier_agent_worker::mcp::{
    McpConfig, McpError, McpHost, McpHostConfig, ToolOutcome, Toolbox,
};
use espalier_core::error::ErrorClass;
use espalier_core::id::ProjectId;
use espalier_core::spec::{McpUse, ToolPolicy};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(30);

fn host_with(espalier: Value) -> McpHost {
    host_of(json!({"preset": "playwright", "espalier": espalier}))
}

fn host_of(browser: Value) -> McpHost {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("playwright");
    let setup = "run `make setup` first";
    assert!(
        dir.join("node_modules/@playwright/mcp/cli.js").exists(),
        "no Playwright MCP in {dir:?}: {setup}"
    );
    assert!(
        Path::new("/usr/bin/chromium").exists(),
        "no /usr/bin/chromium: {setup}"
    );
    let file = json!({"mcpServers": {"browser": browser}});
    let env: BTreeMap<String, String> = std::env::vars().collect();
    McpHost::new(McpHostConfig {
        servers: McpConfig::parse(&file.to_string(), &env).unwrap(),
        allow_inline: false,
        playwright_dir: Some(dir),
        temp_dir: std::env::temp_dir(),
        env,
        tasks: Tasks::new(Shutdown::new()),
    })
    .unwrap()
}

async fn connect(host: &McpHost) -> Result<Toolbox, McpError> {
    let uses = [McpUse::Named("browser".into())];
    let project = ProjectId::new("p").unwrap();
    host.connect(
        &project,
        "r",
        &uses,
        &ToolPolicy::default(),
        CancellationToken::new(),
    )
    .await
}

async fn call(toolbox: &Toolbox, name: &str, arguments: Value) -> Result<ToolOutcome, McpError> {
    let arguments: Map<String, Value> = arguments.as_object().cloned().unwrap();
    toolbox.call(name, arguments, LONG).await
}

async fn open(toolbox: &Toolbox, url: &str) {
    let opened = call(toolbox, "browser_navigate", json!({"url": url}))
        .await
        .unwrap();
    assert!(!opened.is_error, "{}", opened.text);
}

async fn snapshot(toolbox: &Toolbox) -> String {
    call(toolbox, "browser_snapshot", json!({}))
        .await
        .unwrap()
        .text
}

/// Waits until `done`, and says what was waited for if it does not come.
async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {LONG:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

// ---- processes ----

fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // A zombie has ended.
    (fields.next()? != "Z").then_some(())?;
    fields.next()?.parse().ok()
}

fn running() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// `roots` and everything that descends from them.
fn tree(roots: &[i32]) -> BTreeSet<i32> {
    let mut tree: BTreeSet<i32> = roots
        .iter()
        .copied()
        .filter(|pid| parent_of(*pid).is_some())
        .collect();
    loop {
        let more: Vec<i32> = running()
            .into_iter()
            .filter(|pid| {
                !tree.contains(pid) && parent_of(*pid).is_some_and(|parent| tree.contains(&parent))
            })
            .collect();
        if more.is_empty() {
            return tree;
        }
        tree.extend(more);
    }
}

fn command_line(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

fn kill_where(roots: &[i32], wanted: impl Fn(&str) -> bool) {
    let pids: Vec<i32> = tree(roots)
        .into_iter()
        .filter(|pid| wanted(&command_line(*pid)))
        .collect();
    assert!(!pids.is_empty(), "no such process");
    for pid in pids {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // It may have ended with one that was killed before it.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Ports on which one of `pids` listens.
fn listening_ports(pids: &BTreeSet<i32>) -> BTreeSet<u16> {
    let mut sockets = BTreeSet::new();
    for pid in pids {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        sockets.extend(links.filter_map(|link| {
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse::<u64>().ok()
        }));
    }
    let mut ports = BTreeSet::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(file)
            .unwrap_or_default()
            .lines()
            .skip(1)
        {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (is_listening, inode) = (fields[3] == "0A", fields[9].parse().unwrap());
            if is_listening && sockets.contains(&inode) {
                let (_, port) = fields[1].rsplit_once(':').unwrap();
                ports.insert(u16::from_str_radix(port, 16).unwrap());
            }
        }
    }
    ports
}

// ---- pages ----

/// A web server whose pages are made by `answer`.
async fn serve<A>(answer: A) -> String
where
    A: Fn(Method, String) -> Response + Clone + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    let page = |State(answer): State<A>, method: Method, uri: Uri| async move {
        answer(method, uri.to_string())
    };
    let router = Router::new().fallback(page).with_state(answer);
    let tasks = Tasks::new(Shutdown::new());
    tasks.spawn("test.site", OnFailure::Log, async move {
        axum::serve(listener, router).await
    });
    address
}

fn html(body: &str) -> Response {
    (
        [(CONTENT_TYPE, "text/html")],
        format!("<!doctype html><title>t</title><body>{body}"),
    )
        .into_response()
}

/// `/put/X` leaves X in every kind of storage, `/show` tells what is there.
fn storage_site(_: Method, path: String) -> Response {
    match path.strip_prefix("/put/") {
        Some(marker) => {
            let script = format!(
                "<h1>put {marker}</h1><script>localStorage.m='{marker}';sessionStorage.m='{marker}';window.name='{marker}';\
                 caches.open('{marker}');indexedDB.open('{marker}');</script>"
            );
            ([(SET_COOKIE, format!("m={marker}; Path=/"))], html(&script)).into_response()
        }
        None => html(
            "<p id=o></p><script>(async () => { const dbs = (await indexedDB.databases()).map(d => d.name); \
             o.textContent = ['COOKIE', document.cookie, 'LOCAL', localStorage.m, 'SESSION', sessionStorage.m, \
             'NAME', window.name, 'CACHES', await caches.keys(), 'DBS', dbs, 'END'].join(' '); })()</script>",
        ),
    }
}

// ---- tests ----

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_rollouts_at_once_do_not_see_each_other() {
    const ROLLOUTS: usize = 16;
    let site = serve(storage_site).await;
    let host = host_with(json!({}));
    let written = Barrier::new(ROLLOUTS);
    let servers = Mutex::new(BTreeSet::new());
    let rollout = |i: usize| {
        let (host, site, written, servers) = (&host, &site, &written, &servers);
        async move {
            let toolbox = connect(host).await.unwrap();
            servers.lock().unwrap().extend(host.process_ids());
            let marker = format!("marker{i}x");
            open(&toolbox, &format!("{site}/put/{marker}")).await;
            assert!(snapshot(&toolbox).await.contains(&format!("put {marker}")));
            written.wait().await;
            open(&toolbox, &format!("{site}/show")).await;
            call(&toolbox, "browser_wait_for", json!({"text": "END"}))
                .await
                .unwrap();
            let seen = toolbox
                .evaluate_page("o.textContent", LONG)
                .await
                .unwrap()
                .unwrap();
            let seen = seen.as_str().unwrap().to_owned();
            let m = &marker;
            let expected =
                format!("COOKIE m={m} LOCAL {m} SESSION {m} NAME {m} CACHES {m} DBS {m} END");
            assert_eq!(seen, expected, "rollout {i} sees what is not its own");
            let shown = snapshot(&toolbox).await;
            assert!(shown.contains(&expected), "{shown}");
            assert_eq!(
                toolbox.current_url(LONG).await.unwrap(),
                format!("{site}/show")
            );
            toolbox.close().await;
        }
    };
    futures::future::join_all((0..ROLLOUTS).map(rollout)).await;
    assert_eq!(servers.lock().unwrap().len(), 2, "eight contexts a server");
    let processes = tree(&host.process_ids());
    assert!(host.shutdown(LONG).await);
    wait_until("the end of all browsers", || {
        !processes.iter().any(|pid| parent_of(*pid).is_some())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_is_offered_what_a_user_can_do() {
    let site = serve(storage_site).await;
    let host = host_with(json!({"isolation": "process"}));
    let toolbox = connect(&host).await.unwrap();
    let names: Vec<&str> = toolbox.tools().iter().map(|tool| tool.name()).collect();
    assert_eq!(names.len(), 20, "{names:?}");
    for denied in [
        "browser_close",
        "browser_evaluate",
        "browser_run_code_unsafe",
        "browser_file_upload",
        "browser_drop",
    ] {
        assert!(!names.contains(&denied));
    }
    assert!(toolbox.warnings().is_empty());
    let server = &toolbox.servers()[0];
    assert_eq!(server.package_version.as_deref(), Some("0.0.83"));
    assert!(
        server
            .browser
            .as_deref()
            .is_some_and(|build| build.contains("Chromium")),
        "{server:?}"
    );

    open(&toolbox, &format!("{site}/put/x")).await;
    let refused = call(
        &toolbox,
        "browser_navigate",
        json!({"url": "chrome://quit"}),
    )
    .await
    .unwrap();
    assert!(refused.is_error, "{}", refused.text);
    let refused = call(
        &toolbox,
        "browser_navigate",
        json!({"url": "file:///etc/passwd"}),
    )
    .await
    .unwrap();
    assert!(
        refused.is_error && !refused.text.contains("root:"),
        "{}",
        refused.text
    );
    let failed = call(&toolbox, "browser_click", json!({"target": "#nothing"}))
        .await
        .unwrap();
    assert!(
        failed.is_error && !failed.text.contains('\u{1b}'),
        "{}",
        failed.text
    );

    let shot = call(&toolbox, "browser_take_screenshot", json!({}))
        .await
        .unwrap();
    assert!(
        shot.images
            .iter()
            .any(|(mime, data)| mime.starts_with("image/") && data.len() > 1000)
    );
    let value = toolbox
        .evaluate_page(
            "Promise.resolve({n: [1, null, 'é\\n### Ran']}) // why",
            LONG,
        )
        .await
        .unwrap();
    assert_eq!(value, Ok(json!({"n": [1, null, "é\n### Ran"]})));
    let thrown = toolbox.evaluate_page("nothing.here", LONG).await.unwrap();
    assert!(thrown.unwrap_err().contains("nothing is not defined"));
    toolbox.close().await;
    assert!(host.process_ids().is_empty());
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_cannot_reach_the_server() {
    // The victim is what a server with a port would be: it proves that the ways which the page tries are real ones.
    let hits: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let seen = Arc::clone(&hits);
    let victim = serve(move |method, uri| {
        seen.lock().unwrap().insert(format!("{method} {uri}"));
        html("mcp")
    })
    .await;
    let aim = Arc::new(Mutex::new(victim.clone()));
    let target = Arc::clone(&aim);
    let site = serve(move |_, uri| {
        let aim = target.lock().unwrap().clone();
        match uri.as_str() {
            "/redirect" => {
                (StatusCode::FOUND, [(LOCATION, format!("{aim}/redirected"))]).into_response()
            }
            "/quiet" => html("quiet"),
            _ => html(&attack(&aim)),
        }
    })
    .await;
    let host = host_with(json!({}));
    let toolbox = connect(&host).await.unwrap();
    open(&toolbox, &site).await;
    let ways = [
        "GET /cors",
        "GET /nocors",
        "POST /form",
        "GET /frame",
        "GET /img",
        "GET /ws",
        "GET /redirected",
        "POST /post",
    ];
    wait_until("every attack on the victim", || {
        let hits = hits.lock().unwrap();
        ways.iter().all(|way| hits.contains(*way))
    })
    .await;

    // No port: neither the server nor its browser listens, while the same look finds this process's own ports.
    let processes = tree(&host.process_ids());
    assert!(
        processes
            .iter()
            .any(|pid| command_line(*pid).contains("chromium")),
        "the browser is among them"
    );
    assert_eq!(listening_ports(&processes), BTreeSet::new());
    let own = listening_ports(&BTreeSet::from(
        [i32::try_from(std::process::id()).unwrap()],
    ));
    assert!(
        own.iter().any(|port| site.ends_with(&port.to_string())),
        "{own:?}"
    );

    // Nor do the ways lead anywhere at the address that the server believes to have, or at its socket.
    let socket = unix_sockets(&host.process_ids()).remove(0);
    let addresses = [
        "http://localhost:1".to_owned(),
        format!("file://{}", socket.display()),
    ];
    for address in &addresses {
        open(&toolbox, &format!("{site}/quiet")).await;
        let read = format!("fetch('{address}/mcp').then(r => r.text(), e => 'failed')");
        let read = toolbox.evaluate_page(&read, LONG).await.unwrap();
        assert_eq!(read, Ok(json!("failed")), "{address}");
    }
    *aim.lock().unwrap() = addresses[0].clone();
    open(&toolbox, &site).await;
    for address in &addresses {
        let opened = call(
            &toolbox,
            "browser_navigate",
            json!({"url": format!("{address}/mcp")}),
        );
        let opened = opened.await.unwrap();
        assert!(opened.is_error, "{}", opened.text);
    }
    assert!(host.shutdown(LONG).await);
}

/// A page that tries every way in which a page can send a request.
fn attack(aim: &str) -> String {
    let socket = aim.replacen("http", "ws", 1);
    let initialize = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"initialize\",\"params\":{}}";
    format!(
        "<iframe src='{aim}/frame'></iframe><img src='{aim}/img'><iframe src='/redirect'></iframe>\
         <iframe name=f></iframe><form id=form method=post target=f action='{aim}/form'><input name=x></form><script>\
         fetch('{aim}/cors').catch(() => 0);\
         fetch('{aim}/nocors', {{mode: 'no-cors'}}).catch(() => 0);\
         fetch('{aim}/post', {{method: 'POST', mode: 'no-cors', body: '{initialize}'}}).catch(() => 0);\
         try {{ new WebSocket('{socket}/ws') }} catch (e) {{}}\
         form.submit();</script>"
    )
}

fn unix_sockets(pids: &[i32]) -> Vec<PathBuf> {
    let dirs = pids
        .iter()
        .filter_map(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).ok());
    dirs.map(|dir| dir.join("server.sock"))
        .filter(|path| path.exists())
        .collect()
}

/// Two rollouts on one shared server, each with a page.
async fn two_on_a_page(host: &McpHost) -> (Toolbox, Toolbox, String) {
    let site = serve(storage_site).await;
    let (one, two) = (connect(host).await.unwrap(), connect(host).await.unwrap());
    for toolbox in [&one, &two] {
        open(toolbox, &format!("{site}/put/x")).await;
    }
    assert_eq!(host.process_ids().len(), 1);
    (one, two, site)
}

fn assert_lost(result: Result<ToolOutcome, McpError>) {
    let error = result.expect_err("a lost context must not look like a page");
    assert!(
        matches!(
            error,
            McpError::ContextLost { .. } | McpError::Crashed { .. }
        ),
        "{error}"
    );
    assert_eq!(error.class(), ErrorClass::Infra);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_browser_is_an_error_and_never_a_blank_page() {
    let host = host_with(json!({}));
    let (one, two, site) = two_on_a_page(&host).await;
    let before = host.process_ids();
    kill_where(&before, |line| {
        line.contains("/chromium ") && !line.contains("--type=")
    });
    let started = Instant::now();
    assert_lost(call(&one, "browser_snapshot", json!({})).await);
    assert_lost(
        call(
            &two,
            "browser_navigate",
            json!({"url": format!("{site}/show")}),
        )
        .await,
    );
    assert_lost(call(&two, "browser_snapshot", json!({})).await);
    assert!(
        two.evaluate_page("1", LONG).await.is_err(),
        "a verifier is told as well"
    );
    assert!(started.elapsed() < LONG, "{:?}", started.elapsed());

    let three = connect(&host).await.unwrap();
    assert!(
        host.process_ids().iter().any(|pid| !before.contains(pid)),
        "nobody joins a server in doubt"
    );
    open(&three, &format!("{site}/put/y")).await;
    drop((one, two));
    wait_until("the end of the doubted server", || {
        !host.process_ids().iter().any(|pid| before.contains(pid))
    })
    .await;
    open(&three, &format!("{site}/show")).await;
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_killed_in_the_middle_of_a_call_is_an_error() {
    let host = host_with(json!({}));
    let (one, two, _) = two_on_a_page(&host).await;
    let waiting = call(&one, "browser_wait_for", json!({"time": 5}));
    let killing = async {
        // The other rollout's call shows that the server has taken up the first one.
        snapshot(&two).await;
        kill_where(&host.process_ids(), |line| {
            line.contains("/chromium ") && !line.contains("--type=")
        });
    };
    let (result, ()) = tokio::join!(waiting, killing);
    // The wait itself needs no browser and may end well; the next call cannot.
    if result.is_ok() {
        assert_lost(call(&one, "browser_snapshot", json!({})).await);
    } else {
        assert_lost(result);
    }
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_page_is_an_error_and_never_a_blank_page() {
    let host = host_with(json!({}));
    let (one, two, _) = two_on_a_page(&host).await;
    kill_where(&host.process_ids(), |line| line.contains("--type=renderer"));
    assert_lost(call(&one, "browser_snapshot", json!({})).await);
    assert_lost(call(&two, "browser_tabs", json!({"action": "list"})).await);
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_playwright_of_the_users_own_is_watched_too() {
    let cli = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("playwright/node_modules/@playwright/mcp/cli.js");
    let flags = [
        "--executable-path",
        "/usr/bin/chromium",
        "--headless",
        "--isolated",
        "--no-sandbox",
    ];
    let args: Vec<&str> = [cli.to_str().unwrap()].into_iter().chain(flags).collect();
    let host = host_of(json!({"command": "node", "args": args}));
    let site = serve(storage_site).await;
    let toolbox = connect(&host).await.unwrap();
    open(&toolbox, &format!("{site}/put/x")).await;
    assert_eq!(
        toolbox.evaluate_page("localStorage.m", LONG).await.unwrap(),
        Ok(json!("x"))
    );
    kill_where(&host.process_ids(), |line| {
        line.contains("/chromium ") && !line.contains("--type=")
    });
    assert_lost(call(&toolbox, "browser_snapshot", json!({})).await);
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_an_error_and_takes_its_browser_along() {
    for isolation in ["shared", "process"] {
        let host = host_with(json!({"isolation": isolation}));
        let toolbox = connect(&host).await.unwrap();
        let processes = tree(&host.process_ids());
        kill_where(&host.process_ids(), |line| line.contains("cli.js"));
        let error = call(&toolbox, "browser_snapshot", json!({}))
            .await
            .unwrap_err();
        assert!(
            matches!(error, McpError::Crashed { .. }),
            "{isolation}: {error}"
        );
        wait_until("the end of the browser", || {
            !processes.iter().any(|pid| parent_of(*pid).is_some())
        })
        .await;
        assert!(host.shutdown(LONG).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_an_error_at_the_deadline() {
    let host = host_with(json!({"call_timeout_s": 1}));
    let toolbox = connect(&host).await.unwrap();
    let node = rustix::process::Pid::from_raw(host.process_ids()[0]).unwrap();
    rustix::process::kill_process(node, rustix::process::Signal::STOP).unwrap();
    let error = call(&toolbox, "browser_snapshot", json!({}))
        .await
        .unwrap_err();
    assert!(matches!(error, McpError::Deadline { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(host.shutdown(LONG).await, "even a stopped server ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_hangs_the_tools_costs_a_call_and_not_the_attempt() {
    let site = serve(|_, uri| match uri.as_str() {
        "/hang" => html("<button onclick='for (;;) {}'>hang</button>"),
        _ => html("well"),
    })
    .await;
    let host = host_with(json!({"call_timeout_s": 7}));
    let toolbox = connect(&host).await.unwrap();
    open(&toolbox, &format!("{site}/hang")).await;
    let clicked = call(&toolbox, "browser_click", json!({"target": "button"}))
        .await
        .unwrap();
    let shown = call(&toolbox, "browser_snapshot", json!({})).await.unwrap();
    assert!(
        clicked.is_error || shown.is_error,
        "{} {}",
        clicked.text,
        shown.text
    );
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_recycled_and_do_not_rest_for_ever() {
    let host = host_with(json!({"recycle_after": 2, "idle_stop_s": 1}));
    let first = connect(&host).await.unwrap();
    let spent = host.process_ids();
    first.close().await;
    let second = connect(&host).await.unwrap();
    assert_eq!(host.process_ids(), spent, "a resting server is used again");
    let third = connect(&host).await.unwrap();
    assert_eq!(
        host.process_ids().len(),
        2,
        "the first one has had its two rollouts"
    );
    second.close().await;
    wait_until("the end of the spent server", || {
        !host.process_ids().contains(&spent[0])
    })
    .await;
    third.close().await;
    wait_until("the end of the resting server", || {
        host.process_ids().is_empty()
    })
    .await;
    assert!(host.shutdown(LONG).await);
}

/// Runs in a process of its own, which the next test kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "part of `kill_9_leaves_no_node_and_no_chromium`"]
async fn hold_two_browsers_until_killed() {
    let shared = host_with(json!({}));
    let process = host_with(json!({"isolation": "process"}));
    let _held = [
        connect(&shared).await.unwrap(),
        connect(&process).await.unwrap(),
    ];
    println!(
        "PIDS {:?}",
        [shared.process_ids(), process.process_ids()].concat()
    );
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_leaves_no_node_and_no_chromium() {
    use std::io::BufRead;
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "hold_two_browsers_until_killed",
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
    let processes = tree(&pids);
    let dirs: Vec<PathBuf> = pids
        .iter()
        .map(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap())
        .collect();
    assert!(
        processes.len() > 8,
        "two servers with browsers: {processes:?}"
    );
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait_until("the end of all browsers", || {
        !processes.iter().any(|pid| parent_of(*pid).is_some())
    })
    .await;
    wait_until("the removal of their folders", || {
        !dirs.iter().any(|dir| dir.exists())
    })
    .await;
}

/// Prints start times and memory: `cargo test -p espalier-agent-worker --test browser -- --ignored figures --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn figures() {
    let site = serve(storage_site).await;
    let mut out = Map::new();
    for (isolation, rollouts) in [("shared", 8), ("process", 4)] {
        let host = host_with(json!({"isolation": isolation}));
        let started = Instant::now();
        let mut held = vec![connect(&host).await.unwrap()];
        let first_ms = started.elapsed().as_millis();
        let started = Instant::now();
        held.push(connect(&host).await.unwrap());
        let second_ms = started.elapsed().as_millis();
        while held.len() < rollouts {
            held.push(connect(&host).await.unwrap());
        }
        let mut calls: BTreeMap<&str, Vec<u128>> = BTreeMap::new();
        for toolbox in &held {
            let started = Instant::now();
            open(toolbox, &format!("{site}/put/x")).await;
            calls
                .entry("navigate_us")
                .or_default()
                .push(started.elapsed().as_micros());
            let started = Instant::now();
            snapshot(toolbox).await;
            calls
                .entry("snapshot_us")
                .or_default()
                .push(started.elapsed().as_micros());
        }
        let pss: usize = tree(&host.process_ids())
            .iter()
            .map(|pid| pss_kib(*pid))
            .sum();
        let medians: Map<String, Value> = calls
            .into_iter()
            .map(|(name, mut times)| {
                times.sort_unstable();
                (name.to_owned(), json!(times[times.len() / 2] as u64))
            })
            .collect();
        out.insert(
            isolation.to_owned(),
            json!({"rollouts": rollouts, "first_connect_ms": first_ms as u64, "second_connect_ms": second_ms as u64,
                   "pss_mib_per_rollout": pss / 1024 / rollouts, "median": medians}),
        );
        assert!(host.shutdown(LONG).await);
    }
    println!("{}", serde_json::to_string_pretty(&out).unwrap());
}

fn pss_kib(pid: i32) -> usize {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0)
}
