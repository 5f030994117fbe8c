//! A page's snapshot in place of the link to it: Playwright MCP puts the snapshot after an action into a file, which no
//! model can read, and gives it as text only to who asks for it. Pure; `toolbox` asks.
//!
//! Pages choose some of the text before the section of the snapshot (a dialog's message, an error), but none after it.
//! So it is the last section of that name that counts, in either result.

use rmcp::model::{CallToolResult, ContentBlock};

/// The tool that gives the snapshot as text.
pub(super) const SNAPSHOT_TOOL: &str = "browser_snapshot";

const HEADING: &str = "### Snapshot\n";
const LINK: &str = "- [Snapshot](";
const FENCE_OPEN: &str = "```yaml\n";
const FENCE_CLOSE: &str = "\n```";

/// Whether a part of the result links to a snapshot.
pub(super) fn has_link(result: &CallToolResult) -> bool {
    texts(result).any(|text| link(text).is_some())
}

/// Puts the snapshot that `page` has in place of the link of `result`; without one of the two, the result stands.
pub(super) fn put_snapshot(result: &mut CallToolResult, page: &CallToolResult) {
    let Some(block) = texts(page).find_map(block) else {
        return;
    };
    let linked = result.content.iter_mut().find_map(|part| match part {
        ContentBlock::Text(part) => link(&part.text).map(|at| (&mut part.text, at)),
        _ => None,
    });
    if let Some((text, at)) = linked {
        text.replace_range(at, block);
    }
}

fn texts(result: &CallToolResult) -> impl Iterator<Item = &str> {
    result.content.iter().filter_map(|part| match part {
        ContentBlock::Text(part) => Some(part.text.as_str()),
        _ => None,
    })
}

/// Where the link stands, without its line break.
fn link(text: &str) -> Option<std::ops::Range<usize>> {
    let start = section(text, LINK)?;
    let len = text[start..].find('\n').unwrap_or(text.len() - start);
    let ends = text[start..][..len].ends_with(')');
    ends.then_some(start..start + len)
}

/// The snapshot with its fence.
fn block(text: &str) -> Option<&str> {
    let rest = &text[section(text, FENCE_OPEN)?..];
    // An empty page has its closing fence right after the opening one, whose line break is part of both.
    let inner = &rest[FENCE_OPEN.len() - 1..];
    let len = FENCE_OPEN.len() - 1 + inner.find(FENCE_CLOSE)? + FENCE_CLOSE.len();
    Some(&rest[..len])
}

/// Where the content of the last section `Snapshot` stands, if it is one that begins with `start`.
fn section(text: &str, start: &str) -> Option<usize> {
    let is_line = |at: usize| at == 0 || text.as_bytes()[at - 1] == b'\n';
    let mut headings = text.rmatch_indices(HEADING).map(|(at, _)| at);
    let content = headings.find(|&at| is_line(at))? + HEADING.len();
    text[content..].starts_with(start).then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn result(texts: &[&str]) -> CallToolResult {
        let parts: Vec<_> = texts
            .iter()
            .map(|text| json!({"type": "text", "text": text}))
            .collect();
        serde_json::from_value(json!({ "content": parts })).unwrap()
    }

    const PAGE: &str = "### Page\n- Page URL: u2\n### Snapshot\n```yaml\n- text: \"```\"\n- text: b\n```\n### Events\n- e";

    fn put(text: &str, page: &str) -> String {
        let mut linked = result(&["first", text]);
        put_snapshot(&mut linked, &result(&[page]));
        let mut texts = texts(&linked);
        assert_eq!(texts.next(), Some("first"));
        texts.next().unwrap().to_owned()
    }

    #[test]
    fn the_snapshot_stands_where_the_link_stood() {
        let text =
            "### Page\n- Page URL: u\n### Snapshot\n- [Snapshot](out/page-1.yml)\n### Events\n- x";
        assert!(has_link(&result(&["a", text])));
        assert_eq!(
            put(text, PAGE),
            "### Page\n- Page URL: u\n### Snapshot\n```yaml\n- text: \"```\"\n- text: b\n```\n### Events\n- x"
        );
        let last = "### Snapshot\n- [Snapshot](/tmp/a (1).yml)";
        let empty = "### Snapshot\n```yaml\n```";
        assert_eq!(put(last, empty), empty);
    }

    #[test]
    fn without_a_link_or_a_snapshot_the_result_stands() {
        for text in [
            "### Result\n- [Snapshot](a.yml)",
            "### Snapshot\n```yaml\n- text: a\n```",
            "x ### Snapshot\n- [Snapshot](a.yml)",
            "### Snapshot\n- [Snapshot](a.yml",
            "### Snapshot\n",
            "",
        ] {
            assert!(!has_link(&result(&[text])), "{text}");
            assert_eq!(put(text, PAGE), text);
        }
        let text = "### Snapshot\n- [Snapshot](a.yml)";
        for page in [
            "### Error\nno",
            "### Snapshot\n- [Snapshot](b.yml)",
            "### Snapshot\n```yaml\n- a",
        ] {
            assert_eq!(put(text, page), text);
        }
    }

    #[test]
    fn a_page_that_imitates_the_section_changes_nothing_but_its_own_words() {
        let imitation = "### Modal state\n- alert: x\n### Snapshot\n- [Snapshot](y.yml)\n";
        let text = format!("{imitation}### Snapshot\n- [Snapshot](a.yml)");
        assert_eq!(
            put(&text, PAGE),
            format!("{imitation}### Snapshot\n```yaml\n- text: \"```\"\n- text: b\n```")
        );
        let imitation = "### Modal state\n- alert: x\n### Snapshot\n```yaml\n- text: no\n```\n";
        let text = "### Snapshot\n- [Snapshot](a.yml)";
        assert_eq!(put(text, &format!("{imitation}{PAGE}")), put(text, PAGE));
    }
}
