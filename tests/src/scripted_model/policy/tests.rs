//! Policies on pages as Playwright MCP shows them: each case is a prompt, the newest snapshot, and the move it calls for.

use serde_json::{Value, json};

use super::super::chat::{Reply, Request};
use super::decide;

const PRICE: &str =
    "What does the \"red cap\" cost in the shop at http://h:1/shop? Answer with the price only.";
const NOTICE: &str =
    "Which word does the notice \"oak bay\" on the board at http://h:1/notices/bay show?";
const ROW: &str = "Sort the table at http://h:1/crew/oak by \"Pay\", largest first. Who is the second of the table?";
const LOGIN: &str = "Log in at http://h:1/login as \"ada-hill\" with the password \"red-fox\" and read the \"plan\" of it.";
const ROOM: &str = "Which word does the room at http://h:1/late/oak-bay show once it is loaded?";

/// The reply to `prompt` when the newest snapshot is of `url` with `nodes`.
fn seeing(prompt: &str, url: &str, nodes: &str) -> Reply {
    let page = format!("### Page\n- Page URL: {url}\n- main [ref=e1]:\n{nodes}");
    reply(&json!([
        {"role": "user", "content": prompt},
        {"role": "assistant", "tool_calls": [{"function": {"name": "browser_snapshot"}}]},
        {"role": "tool", "content": page},
    ]))
}

fn reply(messages: &Value) -> Reply {
    decide(&Request::parse(&json!({"messages": messages})))
}

/// The tool that is called and one of its arguments.
fn call<'a>(reply: &'a Reply, argument: &str) -> (&'a str, Value) {
    let arguments: Value = serde_json::from_str(&reply.calls[0].arguments).unwrap();
    (&reply.calls[0].tool, arguments[argument].clone())
}

#[test]
fn a_task_begins_at_its_address_and_then_looks() {
    let user = json!({"role": "user", "content": PRICE});
    let first = reply(&json!([user]));
    assert_eq!(
        call(&first, "url"),
        ("browser_navigate", json!("http://h:1/shop"))
    );
    let asked =
        json!({"role": "assistant", "tool_calls": [{"function": {"name": "browser_navigate"}}]});
    let result = json!({"role": "tool", "content": "### Page\n- Page URL: http://h:1/shop"});
    let second = reply(&json!([user, asked, result]));
    assert_eq!(second.calls[0].tool, "browser_snapshot");
}

#[test]
fn a_price_is_searched_and_read() {
    let empty = "  - textbox \"Search\" [ref=e8]\n  - button \"Find\" [ref=e9]";
    let typed = seeing(PRICE, "http://h:1/shop", empty);
    assert_eq!(call(&typed, "target"), ("browser_type", json!("e8")));
    assert_eq!(call(&typed, "text").1, "red cap");
    let found = "  - textbox \"Search\" [ref=e8]: red cap\n  - link \"red cap\" [ref=e9]:\n    - /url: /x\n  - text: \"3.42\"";
    assert_eq!(
        seeing(PRICE, "http://h:1/shop?q=red+cap", found).content,
        "3.42"
    );
}

#[test]
fn a_wrong_page_leads_back_to_the_beginning() {
    for prompt in [PRICE, NOTICE, ROW, LOGIN, ROOM] {
        let lost = seeing(prompt, "http://h:1/", "  - link \"Shop\" [ref=e2]");
        assert_eq!(lost.calls[0].tool, "browser_navigate", "{prompt}");
    }
}

#[test]
fn a_table_is_sorted_until_its_caption_says_so() {
    let header = "  - link \"Pay\" [ref=e5]\n  - row [ref=e6]:\n    - cell \"Ann\" [ref=e7]\n  - row [ref=e8]:\n    - cell \"Bob\" [ref=e9]";
    let at = |caption: &str| {
        let nodes = format!("  - caption [ref=e4]: {caption}\n{header}");
        seeing(ROW, "http://h:1/crew/oak", &nodes)
    };
    assert_eq!(
        call(&at("Sorted by Pay, smallest first"), "target"),
        ("browser_click", json!("e5"))
    );
    assert_eq!(at("Sorted by Pay, largest first").content, "Bob");
}

#[test]
fn a_notice_is_read_in_its_own_tab() {
    let link = "  - link \"oak bay\" [ref=e5]:\n    - /url: /notices/bay/oak-bay";
    let board = "http://h:1/notices/bay";
    assert_eq!(
        call(&seeing(NOTICE, board, link), "target"),
        ("browser_click", json!("e5"))
    );
    let tabs = format!("{link}\n- 0: (current) [Board]({board})\n- 1: [oak bay]({board}/oak-bay)");
    assert_eq!(
        call(&seeing(NOTICE, board, &tabs), "index"),
        ("browser_tabs", json!(1))
    );
    let word = "  - term [ref=e2]: Word\n  - definition [ref=e3]: red-fox";
    assert_eq!(
        seeing(NOTICE, &format!("{board}/oak-bay"), word).content,
        "red-fox"
    );
}

#[test]
fn a_login_types_both_fields_and_answers_in_json() {
    let fields = |user: &str| {
        format!("  - textbox \"User\" [ref=e5]{user}\n  - textbox \"Password\" [ref=e6]")
    };
    let url = "http://h:1/login";
    assert_eq!(call(&seeing(LOGIN, url, &fields("")), "text").1, "ada-hill");
    let password = seeing(LOGIN, url, &fields(": ada-hill"));
    assert_eq!(call(&password, "text").1, "red-fox");
    assert_eq!(call(&password, "submit").1, true);
    let account = "  - term [ref=e1]: User\n  - definition [ref=e2]: ada-hill\n  - term [ref=e3]: Plan\n  - definition [ref=e4]: basic";
    assert_eq!(
        seeing(LOGIN, "http://h:1/account", account).content,
        "{\"plan\":\"basic\"}"
    );
}

#[test]
fn what_is_not_there_yet_is_waited_for() {
    let url = "http://h:1/late/oak-bay";
    let loading = seeing(ROOM, url, "  - status [ref=e7]: Loading the word");
    assert_eq!(loading.calls[0].tool, "browser_wait_for");
}

#[test]
fn a_task_that_leads_nowhere_is_given_up() {
    let mut messages = vec![json!({"role": "user", "content": PRICE})];
    messages.extend((0..60).map(|_| json!({"role": "assistant", "content": ""})));
    assert_eq!(reply(&json!(messages)).content, "I give up.");
}
