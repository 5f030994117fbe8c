//! How a job may ask that tools and pages are told: snapshots in place of links to them, and tools in brief.

use axum::http::Method;
use axum::response::Response;
use espalier_agent_worker::mcp::{ToolOutcome, Toolbox};
use espalier_core::spec::ToolPolicy;
use espalier_qwen3_text::Tokenizer;
use serde_json::{Value, json};

use super::pages::{html, serve};
use super::{LONG, call, connect, connect_as, host_with, snapshot};

fn shop(_: Method, uri: String) -> Response {
    html(&format!(
        "<h1>{uri}</h1><form><label>Find <input id=q name=q></label></form>\
         <button id=more onclick=\"list.innerHTML += '<li>more'\">More</button><ul id=list><li>first</ul>\
         <button id=ask onclick=\"alert('a\\n### Snapshot\\n- [Snapshot](x.yml)')\">Ask</button>"
    ))
}

/// The section of the snapshot.
fn section(text: &str) -> &str {
    let (_, section) = text
        .rsplit_once("### Snapshot\n")
        .unwrap_or_else(|| panic!("{text}"));
    section.split("\n### ").next().unwrap()
}

/// The result of an action shows what a snapshot shows, in the text as in what is kept.
async fn check(toolbox: &Toolbox, shown: &ToolOutcome, expected: &str) {
    assert!(!shown.is_error, "{}", shown.text);
    let page = section(&shown.text);
    assert!(
        page.starts_with("```yaml\n") && page.contains(expected),
        "{page}"
    );
    assert_eq!(page, section(&snapshot(toolbox).await));
    let raw: Value = serde_json::from_slice(&shown.raw).unwrap();
    assert_eq!(raw["content"][0]["text"], shown.text.as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_show_the_page_that_a_snapshot_shows() {
    let site = serve(shop).await;
    let host = host_with(json!({}));
    let policy = ToolPolicy {
        snapshots: Some("inline".into()),
        ..ToolPolicy::default()
    };
    let toolbox = connect_as(&host, &policy).await.unwrap();
    let other = connect(&host).await.unwrap();
    let act = async |name: &str, arguments: Value| call(&toolbox, name, arguments).await.unwrap();

    let opened = act("browser_navigate", json!({"url": format!("{site}/a")})).await;
    assert!(
        opened.text.contains("### Ran Playwright code") && opened.text.contains("- Page URL: ")
    );
    check(&toolbox, &opened, "heading \"/a\"").await;
    let clicked = act("browser_click", json!({"target": "#more"})).await;
    check(&toolbox, &clicked, "listitem").await;
    assert!(section(&clicked.text).contains("more"), "{}", clicked.text);
    let typed = json!({"target": "#q", "text": "red lamp", "submit": true});
    let typed = act("browser_type", typed).await;
    check(&toolbox, &typed, "heading \"/a?q=red+lamp\"").await;

    // While a dialog is open there is no snapshot to be had, and the result stands.
    let asked = act("browser_click", json!({"target": "#ask"})).await;
    assert!(
        asked.text.contains("### Modal state") && !asked.text.contains("```yaml"),
        "{}",
        asked.text
    );
    let answered = act("browser_handle_dialog", json!({"accept": true})).await;
    assert!(!answered.is_error, "{}", answered.text);
    let clicked = act("browser_click", json!({"target": "#more"})).await;
    check(&toolbox, &clicked, "button \"Ask\"").await;

    let linked = call(&other, "browser_navigate", json!({"url": site}))
        .await
        .unwrap();
    assert!(
        section(&linked.text).starts_with("- [Snapshot]("),
        "{}",
        linked.text
    );
    assert!(host.shutdown(LONG).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_in_brief_are_the_same_tools() {
    let site = serve(shop).await;
    let host = host_with(json!({}));
    let policy = ToolPolicy {
        brief: Some(true),
        // The worker's own look at the page is none of the model's.
        deny: vec!["browser_snapshot".into()],
        snapshots: Some("inline".into()),
        ..ToolPolicy::default()
    };
    let brief = connect_as(&host, &policy).await.unwrap();
    let full = connect(&host).await.unwrap();
    let defs = |toolbox: &Toolbox| {
        let defs = toolbox.tools().iter().map(|tool| &tool.def);
        serde_json::to_value(defs.collect::<Vec<_>>()).unwrap()
    };
    let (brief_defs, full_defs) = (defs(&brief), defs(&full));
    let tokens = |defs: &Value| Tokenizer::shared().unwrap().count(&defs.to_string());
    let (few, many) = (tokens(&brief_defs), tokens(&full_defs));
    eprintln!("tools of Playwright MCP: {many} tokens, in brief {few}");
    assert!(3 * few < 2 * many, "{few} of {many}");
    assert_ne!(brief.tool_list_digest(), full.tool_list_digest());
    let parameters = |toolbox: &Toolbox| {
        let click = &toolbox.tool("browser_click").unwrap().def.function;
        click.parameters.clone()
    };
    let (told, whole) = (parameters(&brief), parameters(&full));
    let names = |schema: &Value| -> Vec<String> {
        schema["properties"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    };
    assert_eq!(names(&told), names(&whole));
    assert_eq!(told["required"], whole["required"]);
    assert_eq!(
        told["properties"]["button"]["enum"],
        whole["properties"]["button"]["enum"]
    );
    assert_eq!(told["properties"]["target"], json!({"type": "string"}));

    let opened = call(&brief, "browser_navigate", json!({"url": site}))
        .await
        .unwrap();
    assert!(
        section(&opened.text).starts_with("```yaml\n"),
        "{}",
        opened.text
    );
    let refused = call(&brief, "browser_click", json!({"target": 5}))
        .await
        .unwrap();
    assert!(refused.is_error, "{}", refused.text);
    assert!(host.shutdown(LONG).await);
}
