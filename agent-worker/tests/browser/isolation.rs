//! Rollouts do not see each other, models are offered what users can do, and pages do not reach the server.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::IntoResponse;
use espalier_agent_worker::mcp::Toolbox;
use serde_json::json;
use tokio::sync::Barrier;

use super::pages::{html, serve, storage_site};
use super::processes::{command_line, listening_ports, parent_of, tree};
use super::{LONG, call, connect, host_with, open, snapshot, wait_until};

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
    check_refusals(&toolbox).await;
    check_sights(&toolbox).await;
    toolbox.close().await;
    assert!(host.process_ids().is_empty());
    assert!(host.shutdown(LONG).await);
}

/// Addresses that are no web pages and elements that are not there are refused, in words for a model.
async fn check_refusals(toolbox: &Toolbox) {
    for url in ["chrome://quit", "file:///etc/passwd"] {
        let refused = call(toolbox, "browser_navigate", json!({"url": url})).await;
        let refused = refused.unwrap();
        assert!(
            refused.is_error && !refused.text.contains("root:"),
            "{url}: {}",
            refused.text
        );
    }
    let failed = call(toolbox, "browser_click", json!({"target": "#nothing"})).await;
    let failed = failed.unwrap();
    assert!(
        failed.is_error && !failed.text.contains('\u{1b}'),
        "{}",
        failed.text
    );
}

/// A screenshot is an image, and what a page evaluates to comes back whole, or as its error.
async fn check_sights(toolbox: &Toolbox) {
    let shot = call(toolbox, "browser_take_screenshot", json!({})).await;
    let shot = shot.unwrap();
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
    wait_until("every attack on the victim", || {
        let hits = hits.lock().unwrap();
        WAYS.iter().all(|way| hits.contains(*way))
    })
    .await;
    check_ports(&host.process_ids(), &site);

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

/// No port: neither the server nor its browser listens, while the same look finds this process's own port, of `site`.
fn check_ports(servers: &[i32], site: &str) {
    let processes = tree(servers);
    assert!(
        processes
            .iter()
            .any(|pid| command_line(*pid).contains("chromium")),
        "the browser is among them"
    );
    assert_eq!(listening_ports(&processes), BTreeSet::new());
    let this = i32::try_from(std::process::id()).unwrap();
    let own = listening_ports(&BTreeSet::from([this]));
    assert!(
        own.iter().any(|port| site.ends_with(&port.to_string())),
        "{own:?}"
    );
}

/// The requests by which [`attack`] reaches a server that has a port.
const WAYS: [&str; 8] = [
    "GET /cors",
    "GET /nocors",
    "POST /form",
    "GET /frame",
    "GET /img",
    "GET /ws",
    "GET /redirected",
    "POST /post",
];

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
