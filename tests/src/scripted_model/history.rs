//! What a conversation has come to: the page in view, or what has to happen before there is one.
//!
//! Pure reading of messages. The policies ask it first, so that they only ever decide on a fresh page.

use super::chat::{Message, Request, Role};
use super::snapshot::Snapshot;

/// Where a conversation about a browser stands.
#[derive(Debug)]
pub(super) enum View {
    /// No page was opened yet, or the last attempt to look at it failed.
    Nothing,
    /// Something was done since the last look, or the user spoke.
    Stale,
    /// The newest message shows the page.
    Page(Box<Snapshot>),
}

/// Reads where `request` stands.
pub(super) fn view(request: &Request) -> View {
    let newest = request.messages.last();
    if let Some(Message {
        role: Role::Tool,
        content,
        ..
    }) = newest
        && let Some(page) = Snapshot::parse(content)
    {
        return View::Page(Box::new(page));
    }
    let opened = request
        .messages
        .iter()
        .any(|m| m.role == Role::Tool && m.content.contains("Page URL: http"));
    if opened && !last_look_failed(request) {
        View::Stale
    } else {
        View::Nothing
    }
}

/// Whether the newest assistant turn asked for nothing but a snapshot; as no snapshot came, asking again is no use.
fn last_look_failed(request: &Request) -> bool {
    let newest_is_tool = request
        .messages
        .last()
        .is_some_and(|m| m.role == Role::Tool);
    let asked = request
        .messages
        .iter()
        .rev()
        .find(|m| m.role == Role::Assistant);
    newest_is_tool
        && asked.is_some_and(|m| {
            !m.called.is_empty() && m.called.iter().all(|t| t.ends_with("browser_snapshot"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const PAGE: &str = "- Page URL: http://x/shop\n- main [ref=e1]:";

    fn at(messages: Value) -> View {
        view(&Request::parse(&json!({"messages": messages})))
    }

    fn asked(tool: &str) -> Value {
        json!({"role": "assistant", "tool_calls": [{"function": {"name": tool}}]})
    }

    #[test]
    fn a_page_counts_only_while_nothing_happened_since() {
        let user = json!({"role": "user", "content": "go"});
        let page = json!({"role": "tool", "content": PAGE});
        let done = json!({"role": "tool", "content": "### Page\n- Page URL: http://x/shop"});
        assert!(matches!(at(json!([user])), View::Nothing));
        assert!(matches!(
            at(json!([user, asked("browser_navigate"), done])),
            View::Stale
        ));
        assert!(matches!(
            at(json!([user, asked("browser_snapshot"), page])),
            View::Page(_)
        ));
        assert!(matches!(
            at(json!([user, asked("browser_snapshot"), page, user])),
            View::Stale
        ));
    }

    #[test]
    fn a_snapshot_that_failed_means_to_begin_anew() {
        let user = json!({"role": "user", "content": "go"});
        let done = json!({"role": "tool", "content": "### Page\n- Page URL: http://x/shop"});
        let failed = json!({"role": "tool", "content": "### Error\nno page"});
        let view = at(json!([
            user,
            asked("browser_navigate"),
            done,
            asked("browser_snapshot"),
            failed
        ]));
        assert!(matches!(view, View::Nothing));
    }
}
