//! One line of a snapshot: `- role "name" [ref=e5] [cursor=pointer]: value`.

/// Names and values of a tree that does not fit are shortened to this many characters: two lines of a screen, enough
/// to tell what a paragraph is about.
pub(super) const TEXT_CHARS_MAX: usize = 160;

/// Roles that take a choice, a click or text.
pub(super) const CONTROLS: [&str; 15] = [
    "button",
    "checkbox",
    "combobox",
    "listbox",
    "menuitem",
    "menuitemcheckbox",
    "menuitemradio",
    "option",
    "radio",
    "searchbox",
    "slider",
    "spinbutton",
    "switch",
    "tab",
    "textbox",
];

/// Roles that lead elsewhere, tell where one is, or tell what happened.
const SIGNPOSTS: [&str; 4] = ["alert", "heading", "link", "status"];

/// How much a node matters to whoever operates the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// A form field, a button, or anything else that is operated in place.
    Control,
    /// A link, a heading or a message.
    Signpost,
    /// What is read.
    Content,
}

/// Columns before the `-`.
pub(super) fn indent(line: &str) -> usize {
    line.len() - line.trim_start_matches(' ').len()
}

/// Whether the line starts a node, and does not continue the one before.
pub(super) fn starts_node(line: &str) -> bool {
    line.trim_start_matches(' ').starts_with("- ")
}

/// The rank that the role gives the node.
pub(super) fn rank(line: &str) -> Rank {
    let node = line.trim_start_matches([' ', '-', '\'']);
    let role = node
        .split(|c: char| !c.is_ascii_alphabetic())
        .next()
        .unwrap_or_default();
    if CONTROLS.contains(&role) {
        Rank::Control
    } else if SIGNPOSTS.contains(&role) {
        Rank::Signpost
    } else {
        Rank::Content
    }
}

/// Whether the page shows a pointer over the node.
pub(super) fn has_pointer(line: &str) -> bool {
    line[..value_start(line).unwrap_or(line.len())].contains("[cursor=pointer]")
}

/// Whether the node has a reference.
pub(super) fn has_ref(line: &str) -> bool {
    let key = &line[..value_start(line).unwrap_or(line.len())];
    // A name may spell one, and stands before the attributes.
    key[key.rfind('"').map_or(0, |at| at + 1)..].contains(" [ref=")
}

/// The line with its name and its value each shortened to [`TEXT_CHARS_MAX`]; role and attributes are kept whole.
pub(super) fn shorten(line: &str) -> Option<String> {
    if line.len() <= TEXT_CHARS_MAX {
        return None;
    }
    let value_at = value_start(line).unwrap_or(line.len());
    let (key, value) = line.split_at(value_at);
    let key = shorten_name(key);
    let value = shorten_value(value);
    (key.is_some() || value.is_some()).then(|| {
        let mut short = key.unwrap_or_else(|| line[..value_at].to_owned());
        short.push_str(&value.unwrap_or_else(|| line[value_at..].to_owned()));
        short
    })
}

/// Where the value starts: after the first `: ` that is not within quotes.
fn value_start(line: &str) -> Option<usize> {
    let key_at = line.find("- ")? + 2;
    let mut in_name = false;
    // A key with special characters is itself within single quotes, where a doubled one stands for one.
    let in_key_quotes = line[key_at..].starts_with('\'');
    let mut bytes = line.bytes().enumerate().skip(key_at).peekable();
    let mut key_quotes = 0;
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' if in_name => {
                bytes.next();
            }
            b'"' => in_name = !in_name,
            b'\'' if in_key_quotes => key_quotes += 1,
            b':' if !in_name && key_quotes % 2 == 0 && line[at..].starts_with(": ") => {
                return Some(at + 2);
            }
            _ => {}
        }
    }
    None
}

/// The key with the text between its first and last double quote shortened.
fn shorten_name(key: &str) -> Option<String> {
    let start = key.find('"')? + 1;
    let end = key.rfind('"').filter(|&end| end > start)?;
    let short = shorten_text(&key[start..end])?;
    Some(format!("{}{short}{}", &key[..start], &key[end..]))
}

fn shorten_value(value: &str) -> Option<String> {
    let text = value.trim_end_matches('\n');
    let end = &value[text.len()..];
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    let short = match inner {
        Some(inner) => format!("\"{}\"", shorten_text(inner)?),
        None => shorten_text(text)?,
    };
    Some(short + end)
}

fn shorten_text(text: &str) -> Option<String> {
    let (end, _) = text.char_indices().nth(TEXT_CHARS_MAX)?;
    // A backslash at the cut would escape the quote that follows.
    Some(format!("{}…", text[..end].trim_end_matches('\\')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_ranks_the_node_whatever_its_texts_say() {
        let cases = [
            (
                "- link \"button\" [ref=e4] [cursor=pointer]:\n",
                Rank::Signpost,
            ),
            (
                "    - heading \"Shop\" [level=1] [ref=e9]\n",
                Rank::Signpost,
            ),
            ("- alert [ref=e3]: Wrong password\n", Rank::Signpost),
            (
                "  - 'button \"a \\\" b: c\" [ref=f3e6]': x\n",
                Rank::Control,
            ),
            ("- textbox [ref=e3]\n", Rank::Control),
            ("- paragraph [ref=e2]: press button \"Go\"\n", Rank::Content),
            ("- text: link\n", Rank::Content),
            ("- /url: /link\n", Rank::Content),
            ("- buttons [ref=e4]\n", Rank::Content),
        ];
        for (line, expected) in cases {
            assert_eq!(rank(line), expected, "{line}");
        }
    }

    #[test]
    fn a_pointer_is_an_attribute_and_not_a_text() {
        assert!(has_pointer("- generic [ref=e4] [cursor=pointer]: Buy\n"));
        assert!(!has_pointer("- generic [ref=e4]: Buy [cursor=pointer]\n"));
    }

    #[test]
    fn a_reference_is_an_attribute_and_not_a_text() {
        assert!(has_ref("  - generic [ref=e4]: Buy\n"));
        assert!(has_ref("- 'row \"a: [x]\" [selected] [ref=e4]':\n"));
        assert!(!has_ref("- generic: Buy [ref=e4]\n"));
        assert!(!has_ref("- row \"Buy [ref=e4]\"\n"));
    }

    fn first_chars(text: &str, n: usize) -> String {
        text.chars().take(n).collect()
    }

    #[test]
    fn long_names_and_values_are_shortened_and_attributes_kept() {
        let long = "ü ".repeat(200);
        let short = first_chars(&long, TEXT_CHARS_MAX);
        let cases = [
            (
                format!("  - row \"{long}\" [ref=e5] [cursor=pointer]:\n"),
                format!("  - row \"{short}…\" [ref=e5] [cursor=pointer]:\n"),
            ),
            (
                format!("- paragraph [ref=e9]: {long}\n"),
                format!("- paragraph [ref=e9]: {short}…\n"),
            ),
            (
                format!("- text: \"a: {long}\"\n"),
                format!(
                    "- text: \"a: {}…\"\n",
                    first_chars(&long, TEXT_CHARS_MAX - 3)
                ),
            ),
            (
                format!("- 'button \"it''s: {long}\" [ref=f3e6]': {long}\n"),
                format!(
                    "- 'button \"it''s: {}…\" [ref=f3e6]': {short}…\n",
                    first_chars(&long, TEXT_CHARS_MAX - 7)
                ),
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(shorten(&line).unwrap(), expected);
        }
        assert_eq!(shorten("- text: short\n"), None);
        assert_eq!(shorten(&format!("- {}\n", "a".repeat(500))), None);
    }

    #[test]
    fn a_cut_never_ends_in_a_backslash() {
        let line = format!("- text: \"{}\"\n", "\\\"".repeat(200));
        let short = shorten(&line).unwrap();
        assert!(short.ends_with("\"…\"\n"), "{short}");
    }
}
