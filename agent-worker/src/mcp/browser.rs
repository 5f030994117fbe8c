//! What the host knows about Playwright MCP's tools: which calls never reach it, how a lost context shows, and how the
//! worker looks at the page itself. Pure.

use serde_json::{Map, Value, json};

/// The tool that tells about tabs; it acts on nothing, but makes the server open its context.
pub(super) const TABS_TOOL: &str = "browser_tabs";
/// The tool through which the worker runs JavaScript in the page.
pub(super) const EVALUATE_TOOL: &str = "browser_evaluate";

/// Tools that the preset never offers. `browser_close` throws away the pages, cookies and storage of the rollout, and
/// the next call goes on with an empty browser: the attempt could only be given up.
pub(super) const NEVER_OFFERED: &[&str] = &["browser_close"];

/// Whether a configured command starts some Playwright MCP, as the files of desktop programs do (`npx
/// @playwright/mcp@latest`).
pub(super) fn is_playwright(command: &str, args: &[String]) -> bool {
    let mut words = std::iter::once(command).chain(args.iter().map(String::as_str));
    words.any(|word| word.contains("@playwright/mcp") || word.contains("playwright-mcp"))
}

/// Whether a server that was not started here offers what Playwright MCP does.
pub(super) fn offers_browser<'a>(tools: impl Iterator<Item = &'a str>) -> bool {
    let mut wanted = vec![TABS_TOOL, EVALUATE_TOOL];
    for tool in tools {
        wanted.retain(|name| *name != tool);
    }
    wanted.is_empty()
}

/// Arguments with which [`TABS_TOOL`] only tells.
pub(super) fn list_tabs() -> Map<String, Value> {
    json!({"action": "list"})
        .as_object()
        .cloned()
        .unwrap_or_default()
}

/// Why a call must not reach the server. The text is for the model.
///
/// `chrome://` pages command the whole browser (`chrome://quit` ends it for every rollout on it), the others show
/// files. Only arguments named `url` can open an address.
pub(super) fn refusal(arguments: &Map<String, Value>) -> Option<String> {
    let url = arguments.get("url")?.as_str()?;
    // As browsers read addresses: without space and control characters around, tabs and line breaks anywhere.
    let url: String = url
        .trim_matches(|c: char| c <= ' ')
        .chars()
        .filter(|c| !matches!(c, '\t' | '\n' | '\r'))
        .collect();
    let (scheme, rest) = url.split_once(':')?;
    let scheme = scheme.to_ascii_lowercase();
    let refused = match scheme.as_str() {
        "about" => !matches!(rest, "blank" | "srcdoc"),
        "file" | "filesystem" | "javascript" | "view-source" | "devtools" | "edge" => true,
        other => other.starts_with("chrome"),
    };
    refused.then(|| format!("### Error\nAddresses that begin with {scheme}: are not opened here."))
}

/// Whether the text of a failed call may mean that the context is gone. A page that closes itself reads the same, so
/// this only says that the server has to be asked.
pub(super) fn may_mean_loss(error: &str) -> bool {
    let error = error.to_ascii_lowercase();
    [
        "has been closed",
        "have been closed",
        "target closed",
        "browser closed",
        "crash",
        "disconnected",
        "not connected",
    ]
    .iter()
    .any(|sign| error.contains(sign))
}

/// Arguments that evaluate the JavaScript expression `script`, which may be a promise.
pub(super) fn evaluate(script: &str) -> Map<String, Value> {
    // The line break ends a comment at the end of the script.
    let function = format!("async () => {{ return (\n{script}\n); }}");
    Map::from_iter([("function".to_owned(), Value::String(function))])
}

/// The value in the text that [`EVALUATE_TOOL`] returns. JSON has no raw line breaks within strings, so no value can
/// hold the line that ends it.
pub(super) fn evaluated(text: &str) -> Option<Value> {
    let (_, result) = text.split_once("### Result\n")?;
    let result = result.split("\n### ").next().unwrap_or(result).trim();
    if result == "undefined" {
        return Some(Value::Null);
    }
    serde_json::from_str(result).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_refused(url: &str) -> bool {
        let arguments = Map::from_iter([("url".to_owned(), Value::String(url.to_owned()))]);
        refusal(&arguments).is_some()
    }

    #[test]
    fn addresses_that_command_the_browser_are_refused() {
        for url in [
            "chrome://quit",
            " CHROME://restart",
            "chr\tome://crash",
            "\u{1}chrome-untrusted://x",
            "file:///etc/passwd",
            "view-source:http://x",
            "javascript:alert(1)",
            "about:crash",
            "devtools://x",
            "chrome-extension://x",
        ] {
            assert!(is_refused(url), "{url}");
        }
        for url in [
            "http://localhost:1/",
            "https://x",
            "localhost:8080/a",
            "example.com",
            "about:blank",
            "data:text/html,x",
            "",
        ] {
            assert!(!is_refused(url), "{url}");
        }
        assert!(refusal(&Map::new()).is_none());
    }

    #[test]
    fn a_browser_elsewhere_is_known_by_its_tools() {
        assert!(offers_browser(
            ["a", "browser_evaluate", "browser_tabs"].into_iter()
        ));
        assert!(!offers_browser(
            ["browser_tabs", "browser_close"].into_iter()
        ));
    }

    #[test]
    fn reads_what_evaluate_returns() {
        let text =
            "### Result\n{\n  \"a\": \"x\\n### Ran\"\n}\n### Ran Playwright code\n```js\nx\n```";
        assert_eq!(evaluated(text), Some(json!({"a": "x\n### Ran"})));
        assert_eq!(
            evaluated("### Result\nundefined\n### Ran"),
            Some(Value::Null)
        );
        assert_eq!(evaluated("### Result\n\"x\""), Some(json!("x")));
        assert_eq!(evaluated("### Error\nno"), None);
    }
}
