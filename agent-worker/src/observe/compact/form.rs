//! One line of a snapshot in its parts: `- role "name" [attribute]: value`, each as it is written.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::super::line::CONTROLS;

/// The parts of a node's line. Names and values keep their quotes and escapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Form<'t> {
    /// Letters and hyphens.
    pub role: &'t str,
    /// With its double quotes.
    pub name: Option<&'t str>,
    /// Each with its brackets.
    pub attributes: Vec<&'t str>,
    /// What follows the colon.
    pub value: Option<&'t str>,
    /// Whether the key, which is all before the colon, is within single quotes.
    is_quoted: bool,
    /// Whether it ends in a colon.
    is_open: bool,
}

impl<'t> Form<'t> {
    /// The parts of a line without its line break; `None` where it is not of that form.
    pub(super) fn parse(line: &'t str) -> Option<Self> {
        let key = line.trim_start_matches(' ').strip_prefix("- ")?;
        let (is_quoted, key) = match key.strip_prefix('\'') {
            Some(key) => (true, key),
            None => (false, key),
        };
        let is_role = |b: &u8| b.is_ascii_alphabetic() || *b == b'-';
        let (role, mut rest) = key.split_at(key.bytes().take_while(is_role).count());
        if role.is_empty() {
            return None;
        }
        let mut name = None;
        if rest.starts_with(" \"") {
            let (text, after) = rest[1..].split_at(string_len(&rest[1..])?);
            (name, rest) = (Some(text), after);
        }
        let mut attributes = Vec::new();
        while rest.starts_with(" [") {
            let (attribute, after) = rest[1..].split_at(rest.find(']')?);
            attributes.push(attribute);
            rest = after;
        }
        if is_quoted {
            rest = rest.strip_prefix('\'')?;
        }
        let value = match rest {
            "" | ":" => None,
            _ => Some(rest.strip_prefix(": ")?),
        };
        Some(Self {
            role,
            name,
            attributes,
            value,
            is_quoted,
            is_open: rest == ":",
        })
    }

    /// Whether the attribute is there; without its brackets.
    pub(super) fn has(&self, attribute: &str) -> bool {
        self.attributes.iter().any(|a| inner(a) == attribute)
    }

    /// Whether there is a reference.
    pub(super) fn has_ref(&self) -> bool {
        self.attributes.iter().any(|a| is_ref(a))
    }

    /// Whether it says more of the node than what and where it is: checked, selected, expanded and the like.
    pub(super) fn has_state(&self) -> bool {
        let place = |a: &str| a == "aria-hidden" || a.starts_with("box=");
        let mut kept = self.attributes.iter().filter(|a| is_kept(a));
        kept.any(|a| !is_ref(a) && !place(inner(a)))
    }

    /// Whether the role is one that takes a choice, a click or text. An option is chosen through what it is an option of.
    pub(super) fn is_control(&self) -> bool {
        self.role != "option" && CONTROLS.contains(&self.role)
    }

    /// Whether the role alone says that the model may want to do something with the node.
    pub(super) fn is_operated(&self) -> bool {
        self.role == "link" || self.is_control()
    }

    /// What the name says.
    pub(super) fn name_text(&self) -> Option<Cow<'t, str>> {
        let text = unquote(self.name?);
        if self.is_quoted && text.contains("''") {
            return Some(text.replace("''", "'").into());
        }
        Some(text)
    }

    /// What the value says.
    pub(super) fn value_text(&self) -> Option<Cow<'t, str>> {
        self.value.map(unquote)
    }

    /// Whether it is a text and nothing else.
    pub(super) fn is_text(&self) -> bool {
        self.name.is_none() && self.value.is_some() && !self.has_state()
    }

    /// Whether its text can be a name as it is.
    pub(super) fn is_plain(&self) -> bool {
        let is_escaped = |c: char| c.is_control() || matches!(c, '"' | '\\' | '\'');
        let text = self.value_text();
        text.is_some_and(|text| !text.is_empty() && !text.contains(is_escaped))
    }

    /// The line of a term whose text is plain, with its definition.
    pub(super) fn write_fact(&self, out: &mut String, definition: &str) {
        let text = self.value_text().unwrap_or_default();
        let is_word = |c: char| c.is_alphanumeric() || c == ' ' || c == '-';
        let quote = if text.chars().all(is_word) { "" } else { "'" };
        let _ = write!(
            out,
            "- {quote}{} \"{text}\"{quote}: {definition}",
            self.role
        );
    }

    /// The line without indentation and line break, with those attributes that are kept.
    pub(super) fn write(&self, out: &mut String, has_name: bool, has_ref: bool, is_parent: bool) {
        let name = self.name.filter(|_| has_name);
        // Only a name makes a key need quotes.
        let quote = if self.is_quoted && name.is_some() {
            "'"
        } else {
            ""
        };
        out.push_str("- ");
        out.push_str(quote);
        out.push_str(self.role);
        let kept = self.attributes.iter().copied();
        let kept = kept.filter(|a| is_kept(a) && (has_ref || !is_ref(a)));
        for part in name.into_iter().chain(kept) {
            out.push(' ');
            out.push_str(part);
        }
        out.push_str(quote);
        match self.value {
            Some(value) => {
                out.push_str(": ");
                out.push_str(value);
            }
            None if self.is_open && is_parent => out.push(':'),
            None => {}
        }
    }
}

fn inner(attribute: &str) -> &str {
    attribute.trim_matches(['[', ']'])
}

fn is_ref(attribute: &str) -> bool {
    attribute.starts_with("[ref=")
}

/// All but where the focus is, that the pointer changes its form, and how deep a heading is.
fn is_kept(attribute: &str) -> bool {
    let text = inner(attribute);
    text != "active" && text != "cursor=pointer" && !text.starts_with("level=")
}

/// The length of the string in double quotes at the start of `text`.
fn string_len(text: &str) -> Option<usize> {
    let mut bytes = text.bytes().enumerate().skip(1);
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// What a text in double quotes, or in none, says. An escape that is none stays as it is.
fn unquote(text: &str) -> Cow<'_, str> {
    let quoted = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    let Some(inner) = quoted else {
        return text.into();
    };
    if !inner.contains('\\') {
        return inner.into();
    }
    let mut out = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let (said, len) = escape(&rest[at..]);
        out.push_str(&said);
        rest = &rest[at + len..];
    }
    out.push_str(rest);
    out.into()
}

/// What the escape at the start of `text` says, and its length in bytes.
fn escape(text: &str) -> (Cow<'_, str>, usize) {
    let coded = |digits: usize| {
        let hex = text.get(2..2 + digits)?;
        let code = u32::from_str_radix(hex, 16).ok()?;
        Some((char::from_u32(code)?.to_string().into(), 2 + digits))
    };
    let plain = |said: &'static str| Some((said.into(), 2));
    let found = match text.as_bytes().get(1) {
        Some(b'b') => plain("\u{8}"),
        Some(b'f') => plain("\u{c}"),
        Some(b'n') => plain("\n"),
        Some(b'r') => plain("\r"),
        Some(b't') => plain("\t"),
        Some(b'"') => plain("\""),
        Some(b'\\') => plain("\\"),
        Some(b'x') => coded(2),
        Some(b'u') => coded(4),
        _ => None,
    };
    found.unwrap_or(("\\".into(), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(line: &str) -> String {
        let mut out = String::new();
        let form = Form::parse(line).unwrap();
        form.write(&mut out, true, true, line.ends_with(':'));
        out
    }

    #[test]
    fn a_line_is_its_parts() {
        for line in [
            r#"- link "a: b [ref=e1]" [ref=e2]"#,
            r#"- 'button "it''s \" : x" [disabled] [ref=e2]': "y: z""#,
            r#"- 'row "a: b" [selected]':"#,
            "- generic [ref=e5]:",
            "- text: a: b",
            r#"- text: """#,
            "- img",
        ] {
            assert_eq!(written(line), line);
        }
        assert_eq!(
            written(r#"    - heading "A" [level=2] [active] [ref=e2] [cursor=pointer]"#),
            r#"- heading "A" [ref=e2]"#
        );
    }

    #[test]
    fn what_is_no_such_line_is_none() {
        for line in [
            "- ",
            "- /url: x",
            "- ref=e5 [unchanged]",
            "- <changed> button",
            "- link \"open",
            "- link [open",
            "- link /a/",
            "- 'link \"a\": b",
            "- link:b",
            "text",
            "- link \"a\"b",
        ] {
            assert_eq!(Form::parse(line), None, "{line}");
        }
    }

    #[test]
    fn texts_say_what_the_page_said() {
        let form =
            Form::parse(r#"- 'textbox "it''s \"a\": \u00e9\\" [ref=e1]': "b: \x07\t\q""#).unwrap();
        assert_eq!(form.name_text().unwrap(), "it's \"a\": é\\");
        assert_eq!(form.value_text().unwrap(), "b: \u{7}\t\\q");
        let form = Form::parse(r#"- text: it''s "a" \n"#).unwrap();
        assert_eq!(form.value_text().unwrap(), r#"it''s "a" \n"#);
        for broken in [r#"- text: "\""#, r#"- text: "\u12""#, r#"- text: "\x""#] {
            assert!(Form::parse(broken).unwrap().value_text().is_some());
        }
    }

    #[test]
    fn a_state_is_more_than_place_and_kind() {
        let cases = [
            ("- option \"a\" [selected]", true),
            ("- checkbox [checked=mixed] [ref=e1]", true),
            (
                "- row [level=2] [active] [ref=e1] [cursor=pointer] [box=1,2,3,4]",
                false,
            ),
            ("- generic [aria-hidden] [ref=e1]", false),
            ("- generic", false),
        ];
        for (line, expected) in cases {
            assert_eq!(Form::parse(line).unwrap().has_state(), expected, "{line}");
        }
    }
}
