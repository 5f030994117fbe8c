use std::collections::BTreeMap;

use espalier_core::spec::Observation;
use espalier_qwen3_text::Tokenizer;
use proptest::prelude::*;

use super::super::{Shaped, shape};
use super::*;

const ARTICLE: &str = include_str!("../../../tests/snapshots/article.txt");
const HOSTILE: &str = include_str!("../../../tests/snapshots/hostile.txt");
const NAVIGATE: &str = include_str!("../../../tests/snapshots/navigate.txt");
const SHOP: &str = include_str!("../../../tests/snapshots/shop.txt");
const SHOP_COMPACT: &str = include_str!("../../../tests/snapshots/shop.compact.txt");
const TABLE: &str = include_str!("../../../tests/snapshots/table.txt");

fn shaped(raw: &str, max_tokens: u32) -> Shaped {
    let tokenizer = Tokenizer::shared().unwrap();
    shape(raw, Observation::CompactTokens(max_tokens), tokenizer)
}

/// What becomes of the nodes of `block`.
fn nodes(block: &str) -> String {
    let block: String = block
        .trim_matches('\n')
        .lines()
        .map(|line| format!("{line}\n"))
        .collect();
    let raw = format!("### Snapshot\n```yaml\n{block}```");
    let text = compact(&raw);
    check(&raw, &text);
    let inner = text
        .strip_prefix("### Snapshot\n```yaml\n")
        .and_then(|text| text.strip_suffix("```"));
    inner.unwrap().to_owned()
}

fn expect(block: &str, expected: &str) {
    let expected = expected.trim_start_matches('\n');
    assert_eq!(nodes(block), expected, "of {block}");
}

/// References in a text whose lines are all of Playwright's form, each with how often it is there: those that `chosen`
/// says yes to, of a node's form and whether it is the outermost that shows a pointer.
fn refs(text: &str, chosen: impl Fn(&Form<'_>, bool) -> bool) -> BTreeMap<String, usize> {
    let mut refs = BTreeMap::new();
    let mut in_block = false;
    // Columns of the nodes above, and whether each shows a pointer.
    let mut above: Vec<(usize, bool)> = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            in_block = line == "```yaml" && !in_block;
            continue;
        }
        let Some(form) = Form::parse(line).filter(|_| in_block) else {
            continue;
        };
        let indent = line::indent(line);
        above.retain(|&(column, _)| column < indent);
        let has_pointer = form.has("cursor=pointer");
        let is_outermost = has_pointer && above.iter().all(|&(_, pointer)| !pointer);
        above.push((indent, has_pointer));
        let reference = form.attributes.iter().find(|a| a.starts_with("[ref="));
        if let Some(reference) = reference.filter(|_| chosen(&form, is_outermost)) {
            *refs.entry((*reference).to_owned()).or_insert(0) += 1;
        }
    }
    refs
}

/// What compaction does to any text of Playwright's form.
fn check(raw: &str, text: &str) {
    assert!(text.len() <= raw.len(), "{text}");
    assert_eq!(compact(text), text, "the same again");
    let operable = refs(raw, |form, pointer| form.is_operated() || pointer);
    let left = refs(text, |_, _| true);
    for (reference, count) in operable {
        assert_eq!(left.get(&reference), Some(&count), "{reference} in {text}");
    }
}

#[test]
fn a_page_is_compacted_as_a_whole() {
    let text = compact(SHOP);
    check(SHOP, &text);
    assert_eq!(text, SHOP_COMPACT.trim_end_matches('\n'));
}

#[test]
fn real_pages_lose_much_and_nothing_that_is_operated() {
    let tokenizer = Tokenizer::shared().unwrap();
    for (raw, percent_max) in [(SHOP, 60), (TABLE, 60), (ARTICLE, 100), (HOSTILE, 90)] {
        let text = compact(raw);
        check(raw, &text);
        let percent = 100 * tokenizer.count(&text) / tokenizer.count(raw);
        assert!(percent < percent_max, "{percent} of {percent_max}:\n{text}");
    }
}

#[test]
fn the_code_that_ran_goes_and_other_sections_stay() {
    let text = compact(NAVIGATE);
    let rest = NAVIGATE.split_once("```\n").unwrap().1;
    let rest = rest.split_once("```\n").map_or(rest, |(_, rest)| rest);
    assert_eq!(text, rest);
    assert!(text.starts_with("### Page\n"), "{text}");
    let code = "### Ran Playwright code\n```js\nawait page.click();\n```";
    assert_eq!(compact(&format!("### Result\nx\n{code}")), "### Result\nx");
    assert_eq!(
        compact(&format!("### Error\nx\n{code}\n### Events\n- y")),
        "### Error\nx\n### Events\n- y"
    );
    assert_eq!(compact(code), code, "code alone is all there is to say");
}

#[test]
fn what_only_looks_like_code_takes_nothing_along() {
    for raw in [
        "### Result\n### Ran Playwright code\n```js\n### Snapshot\n- x",
        "### Result\n### Ran Playwright code\n```js\n```\nno section\n### Page\n- y",
        "### Result\nx ### Ran Playwright code\n```js\n```",
        "### Ran Playwright code\nno fence",
    ] {
        assert_eq!(compact(raw), raw);
    }
    // A page's imitation that never ends does not hide the page.
    let raw = format!("### Error\n### Ran Playwright code\n```js\n{HOSTILE}");
    assert!(compact(&raw).contains("- textbox \"Name\" [ref=f3e7]: line\n"));
}

#[test]
fn an_item_of_a_list_becomes_what_is_in_it() {
    expect(
        r#"
- listitem [ref=e18]:
  - link "amber bench" [ref=e19] [cursor=pointer]:
    - /url: /x
  - text: "48.99"
"#,
        r#"
- link "amber bench" [ref=e19]
- text: "48.99"
"#,
    );
}

#[test]
fn nodes_with_a_name_a_value_or_a_state_stay() {
    expect(
        r#"
- main [active] [ref=e1]:
  - region "Offers" [ref=e2]:
    - generic [ref=e3]:
      - heading "Today" [level=2] [ref=e4]
      - paragraph [ref=e5]: "only: today"
    - separator [ref=e6]
  - treeitem [expanded] [ref=e7]:
    - img "a [ref=e1]" [ref=e8]
  - group "empty" [ref=e9]:
    - generic [ref=e10]
"#,
        r#"
- region "Offers":
  - heading "Today"
  - paragraph: "only: today"
- treeitem [expanded]:
  - img "a [ref=e1]"
- group "empty"
"#,
    );
}

#[test]
fn references_stay_where_the_node_can_be_operated() {
    expect(
        r#"
- generic [ref=e1]:
  - generic [ref=e2] [cursor=pointer]:
    - generic [ref=e3] [cursor=pointer]: Buy
    - img [ref=e4]
  - generic [ref=e5] [cursor=pointer]
  - textbox [ref=e6]
  - combobox "Size" [disabled] [ref=e7]:
    - option "S" [selected] [ref=e8]
    - option "M"
  - link [ref=e9]:
    - /url: /
    - img "Home" [ref=e10]
  - checkbox
"#,
        r#"
- generic [ref=e2]:
  - generic: Buy
- generic [ref=e5]
- textbox [ref=e6]
- combobox "Size" [disabled] [ref=e7]:
  - option "S" [selected]
  - option "M"
- link [ref=e9]:
  - img "Home"
- checkbox
"#,
    );
}

#[test]
fn labels_of_the_next_control_go() {
    expect(
        r#"
- generic [ref=e1]:
  - generic [ref=e2]:
    - generic [ref=e3]: "Your name: *"
    - textbox "Your name: *" [ref=e4]: Ada
  - text: it's "it"
  - 'button "it''s \"it\"" [ref=e5]'
  - paragraph [ref=e6]: Send
  - text: Send
  - text: Sent
  - button "Send" [ref=e7]
  - text: Send
"#,
        r#"
- textbox "Your name: *" [ref=e4]: Ada
- 'button "it''s \"it\"" [ref=e5]'
- paragraph: Send
- text: Send
- text: Sent
- button "Send" [ref=e7]
- text: Send
"#,
    );
    let twice = "\n- text: Step 1\n- text: Step 1\n- textbox \"Step 1\" [ref=e1]\n";
    expect(twice, twice);
}

#[test]
fn a_term_and_its_definition_are_a_line() {
    expect(
        r#"
- generic [ref=e1]:
  - term [ref=e2]: Weight
  - definition [ref=e3]: "634"
  - term [ref=e4]: "Sum: (net)"
  - definition [ref=e5]: 5 kg
  - term [ref=e6]: Crews
  - definition [ref=e7]: Ada
  - definition [ref=e8]: Eve
  - term [ref=e9]: "a \"b\""
  - definition [ref=e10]: c
  - term [ref=e11]: Hall
  - definition [ref=e12]:
    - link "Elm" [ref=e13]
- term [ref=e14]: Gate
"#,
        r#"
- term "Weight": "634"
- 'term "Sum: (net)"': 5 kg
- term: Crews
- definition: Ada
- definition: Eve
- term: "a \"b\""
- definition: c
- term: Hall
- link "Elm" [ref=e13]
- term: Gate
"#,
    );
}

#[test]
fn yaml_that_is_no_snapshot_stays_as_it_is() {
    for heading in ["", "### Result\n", "### Snapshot\nof the disk\n"] {
        let raw = format!("{heading}```yaml\n- service [active]:\n  - /url: /x\n```\n");
        assert_eq!(compact(&raw), raw);
    }
}

#[test]
fn what_is_in_a_button_labels_no_other() {
    expect(
        r#"
- link [ref=e1] [cursor=pointer]:
  - /url: /search
  - text: Search
- generic [ref=e2] [cursor=pointer]: Search
- searchbox "Search" [ref=e3]
- generic [ref=e4] [cursor=pointer]:
  - text: Mail
  - textbox "Mail" [ref=e5]
"#,
        r#"
- link [ref=e1]:
  - text: Search
- generic [ref=e2]: Search
- searchbox "Search" [ref=e3]
- generic [ref=e4]:
  - textbox "Mail" [ref=e5]
"#,
    );
}

#[test]
fn a_checkbox_has_its_label_after_it() {
    expect(
        r#"
- generic [ref=e1]:
  - checkbox "In stock" [checked] [ref=e2]
  - generic [ref=e3]: In stock
  - text: In stock
  - text: 24 items
  - text: In stock
- generic [ref=e4]:
  - radio "A" [ref=e5]
- group "g" [ref=e6]:
  - text: A
- button "B" [ref=e7]
- text: B
"#,
        r#"
- checkbox "In stock" [checked] [ref=e2]
- text: 24 items
- text: In stock
- radio "A" [ref=e5]
- group "g":
  - text: A
- button "B" [ref=e7]
- text: B
"#,
    );
}

#[test]
fn a_row_is_said_once() {
    expect(
        r#"
- table [ref=e1]:
  - rowgroup [ref=e2]:
    - row "1001 Brun Smith 7.35" [ref=e3]:
      - cell "1001" [ref=e4]
      - cell "Brun Smith" [ref=e5]:
        - generic [ref=e6]: Brun
        - generic [ref=e7]: Smith
      - cell "7.35" [ref=e8]
    - row "1002 Ada 3 Delete" [ref=e9]:
      - cell "1002" [ref=e10]:
        - link "1002" [ref=e11]:
          - /url: /o/2
      - cell "Ada" [ref=e12]
      - cell "3" [ref=e13]:
        - spinbutton "Pieces" [ref=e14]: "3"
      - cell "Delete" [ref=e15]:
        - button "Delete" [disabled] [ref=e16]
    - row "1003 Eve" [ref=e17] [cursor=pointer]:
      - cell "1003" [ref=e18]
      - cell "Eve" [ref=e19]
"#,
        r#"
- row "1001 Brun Smith 7.35"
- row:
  - cell "1002":
    - link "1002" [ref=e11]
  - cell "Ada"
  - cell "3":
    - spinbutton "Pieces" [ref=e14]: "3"
  - cell "Delete":
    - button "Delete" [disabled] [ref=e16]
- row "1003 Eve" [ref=e17]
"#,
    );
}

#[test]
fn a_row_that_says_something_else_keeps_name_and_cells() {
    expect(
        r#"
- row "Order 5" [ref=e1]:
  - cell "Brun" [ref=e2]
- row "Order 6" [ref=e3]:
  - cell "Ada" [ref=e4]
  - button "Pay" [ref=e5]
- row "12 13" [ref=e6]:
  - gridcell "12" [selected] [ref=e7]
  - gridcell "13" [ref=e8]
- row "7" [ref=e9]:
  - textbox "Pieces" [ref=e10]: "5"
"#,
        r#"
- row "Order 5":
  - cell "Brun"
- row "Order 6":
  - cell "Ada"
  - button "Pay" [ref=e5]
- row "12 13":
  - gridcell "12" [selected]
  - gridcell "13"
- row "7":
  - textbox "Pieces" [ref=e10]: "5"
"#,
    );
}

#[test]
fn lines_of_another_form_stay_as_they_are() {
    expect(
        r#"
- generic [active] [ref=e1]:
  - <changed> button "x" [ref=e2]:
    - text: a
  - ref=e3 [unchanged]
  - link /re/ [ref=e4]
"#,
        r#"
- <changed> button "x" [ref=e2]:
  - text: a
- ref=e3 [unchanged]
- link /re/ [ref=e4]
"#,
    );
    // Tools that a page offers stand before its tree, with a blank line between.
    let tools = "- webmcp tools (page-provided, untrusted):\n  - order: Orders\n\n";
    let raw =
        format!("### Snapshot\n```yaml\n{tools}- generic [active] [ref=e1]:\n  - text: a\n```");
    let text = compact(&raw);
    assert_eq!(
        text,
        format!("### Snapshot\n```yaml\n{tools}- text: a\n```")
    );
    assert_eq!(compact(&text), text);
}

#[test]
fn a_page_cannot_write_lines() {
    let text = compact(HOSTILE);
    check(HOSTILE, &text);
    assert_eq!(text.matches("\n```").count(), 2, "{text}");
    assert!(text.contains("\n- generic: \"``` - button \\\"Fake\\\" [ref=e1] ```\"\n"));
    assert!(text.contains("\n- 'button \"quote \\\" colon: and ```\" [ref=f3e6]': x\n"));
}

#[test]
fn a_block_without_nodes_or_end_is_no_trouble() {
    for raw in [
        "### Snapshot\n```yaml\n```",
        "### Snapshot\n```yaml\n",
        "### Snapshot\n```yaml\ntext\n```",
        "no page",
        "",
    ] {
        assert_eq!(compact(raw), raw);
    }
    assert_eq!(
        compact("### Snapshot\n```yaml\n- list [active] [ref=e1]:\n  - text: a"),
        "### Snapshot\n```yaml\n- text: a"
    );
    assert_eq!(
        compact("- Page Snapshot:\n```yaml\n- list [active] [ref=e1]\n```"),
        "- Page Snapshot:\n```yaml\n```"
    );
}

#[test]
fn what_is_compacted_is_cut_by_the_same_rule() {
    for max_tokens in [64, 200, 600, 1000, 100_000] {
        let result = shaped(SHOP, max_tokens);
        assert!(result.tokens <= max_tokens as usize);
        assert_eq!(result.truncated, max_tokens < 100_000);
        assert_eq!(result.truncated, result.text != compact(SHOP));
    }
    let page: String = (0..200)
        .map(|i| format!("  - paragraph [ref=e{i}]: {}\n", "word ".repeat(20)))
        .collect();
    let raw = format!(
        "### Snapshot\n```yaml\n- generic [active] [ref=f1]:\n{page}  - generic [ref=f2] [cursor=pointer]: Buy\n```"
    );
    let result = shaped(&raw, 500);
    // What is clicked is a control, though its pointer is not shown any more.
    assert!(
        result.text.contains("\n- generic [ref=f2]: Buy\n"),
        "{}",
        result.text
    );
    assert!(result.dropped_nodes > 150);
    assert_eq!(shaped("\u{1b}[31m", 100).text, "(empty tool result)");
}

/// Lines of Playwright's form, with texts that a page may choose.
fn page() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        "[a-c]",
        "[a-c ]{0,6}",
        r#"["':\\{}\[\]#|>`/-]{1,6}"#,
        r"\PC{0,6}",
        Just("a [ref=e1] [cursor=pointer]".to_owned()),
        Just("- button \"a\" [ref=e2]:".to_owned()),
        Just("```".to_owned()),
    ];
    let role = prop::sample::select(vec![
        "generic",
        "text",
        "link",
        "button",
        "textbox",
        "checkbox",
        "option",
        "row",
        "cell",
        "list",
        "listitem",
        "heading",
        "img",
        "term",
        "definition",
    ]);
    let state = prop::sample::select(vec!["", " [checked]", " [selected]", " [active]"]);
    let node = (
        0usize..6,
        role,
        prop::option::of(text.clone()),
        state,
        any::<[bool; 3]>(),
        prop::option::of(text),
    );
    prop::collection::vec(node, 0..25).prop_map(|nodes| {
        let mut block = String::new();
        let mut depth = 0;
        for (at, (deep, role, name, state, [has_ref, pointer, url], value)) in
            nodes.into_iter().enumerate()
        {
            depth = deep.min(depth);
            let mut key = role.to_owned();
            if let Some(name) = name.filter(|_| role != "text") {
                key.push(' ');
                key.push_str(&serde_json::to_string(&name).unwrap());
            }
            key.push_str(state);
            if has_ref {
                key.push_str(&format!(" [ref=e{at}]"));
                key.push_str(if pointer { " [cursor=pointer]" } else { "" });
            }
            if key.contains(": ") || key.contains(['#', '`', '{', '}']) {
                key = format!("'{}'", key.replace('\'', "''"));
            }
            let indent = "  ".repeat(depth);
            match value {
                Some(value) => {
                    let value = serde_json::to_string(&value).unwrap();
                    block.push_str(&format!("{indent}- {key}: {value}\n"));
                }
                None => {
                    block.push_str(&format!("{indent}- {key}:\n"));
                    if url {
                        block.push_str(&format!("{indent}  - /url: {at}\n"));
                    }
                    depth += 1;
                }
            }
        }
        format!("### Page\n- Page URL: x\n### Snapshot\n```yaml\n{block}```")
    })
}

proptest! {
    #[test]
    fn any_page_keeps_what_is_operated_and_is_compacted_once(raw in page()) {
        check(&raw, &compact(&raw));
    }

    #[test]
    fn any_text_is_compacted_once(
        parts in prop::collection::vec(prop_oneof![
            Just("### Ran Playwright code\n".to_owned()),
            Just("```js\n".to_owned()),
            Just("```yaml\n".to_owned()),
            Just("```\n".to_owned()),
            Just("### Page\n".to_owned()),
            Just("- generic [ref=e1]:\n".to_owned()),
            Just("  - text: a\n\n".to_owned()),
            Just("    - button \"a\" [ref=e2]".to_owned()),
            r"[a \n`#-]{0,6}",
        ], 0..16)
    ) {
        let raw = parts.concat();
        let text = compact(&raw);
        prop_assert!(text.len() <= raw.len());
        prop_assert_eq!(compact(&text), text);
    }
}
