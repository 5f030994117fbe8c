//! Tells the control texts that a template writes from those that its content spells.
//!
//! The template's source gets a mark before each control text that it may write; literals that it compares with or
//! passes to methods (`'</think>' in message.content`) get none, because there they stand for content. Where a mark
//! is in the marked text and not in the plain one, the template wrote what follows. The mark may occur in content: it
//! is then in both texts.

use std::ops::Range;

use crate::ids::{control_at, find_control};

/// A noncharacter of Unicode, for use inside of programs.
const MARK: char = '\u{FDD0}';

/// `source` with marks.
pub(super) fn mark_source(source: &str) -> String {
    let mut out = String::with_capacity(source.len() * 2);
    let mut rest = source;
    while let Some((at, open)) = next_tag(rest) {
        push_marked(&rest[..at], &mut out);
        let close = match open {
            "{{" => "}}",
            "{%" => "%}",
            _ => "#}",
        };
        let body = &rest[at + open.len()..];
        let end = match open {
            "{#" => body.find(close).unwrap_or(body.len()),
            _ => end_of_code(body, close),
        };
        out.push_str(open);
        if open == "{#" {
            out.push_str(&body[..end]);
        } else {
            push_code(&body[..end], &mut out);
        }
        rest = &body[end..];
        if rest.starts_with(close) {
            out.push_str(close);
            rest = &rest[close.len()..];
        }
    }
    push_marked(rest, &mut out);
    out
}

/// Where the first tag opens, and with what.
fn next_tag(text: &str) -> Option<(usize, &'static str)> {
    text.match_indices('{').find_map(|(at, _)| {
        let tags = ["{{", "{%", "{#"];
        let open = tags.into_iter().find(|open| text[at..].starts_with(open))?;
        Some((at, open))
    })
}

/// Where the code of a tag ends: at the first `close` outside of a literal.
fn end_of_code(body: &str, close: &str) -> usize {
    let mut at = 0;
    while let Some(next) = body[at..].chars().next() {
        if body[at..].starts_with(close) {
            break;
        }
        at += match next {
            '\'' | '"' => literal_len(&body[at..]),
            other => other.len_utf8(),
        };
    }
    at
}

/// The length of the literal that `text` starts with, quotes included.
fn literal_len(text: &str) -> usize {
    let mut characters = text.char_indices();
    let quote = characters.next().map(|(_, quote)| quote);
    while let Some((at, character)) = characters.next() {
        if character == '\\' {
            characters.next();
        } else if Some(character) == quote {
            return at + character.len_utf8();
        }
    }
    text.len()
}

/// Writes code, its literals with marks where their text may be written.
fn push_code(code: &str, out: &mut String) {
    let tokens = tokens(code);
    // For each open bracket, whether it holds the arguments of a call or an index.
    let mut brackets = Vec::new();
    let mut previous = "";
    for (n, token) in tokens.iter().enumerate() {
        match token.chars().next() {
            Some('\'' | '"') => {
                let next = tokens[n + 1..].iter().find(|token| !is_blank(token));
                let compared = compares(previous) || next.is_some_and(|next| compares(next));
                if compared || brackets.contains(&true) {
                    out.push_str(token);
                } else {
                    push_marked(token, out);
                }
            }
            Some('(' | '[') => brackets.push(ends_a_value(previous)),
            Some(')' | ']') => drop(brackets.pop()),
            _ => {}
        }
        if !matches!(token.chars().next(), Some('\'' | '"')) {
            out.push_str(token);
        }
        if !is_blank(token) {
            previous = token;
        }
    }
}

/// The code in pieces: literals, words, runs of blanks, `==` and `!=`, other characters one by one.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let run = |of: fn(char) -> bool| rest.find(|c| !of(c)).unwrap_or(rest.len());
        let len = match first {
            '\'' | '"' => literal_len(rest),
            _ if is_of_word(first) => run(is_of_word),
            _ if first.is_whitespace() => run(char::is_whitespace),
            _ if rest.starts_with("==") || rest.starts_with("!=") => 2,
            _ => first.len_utf8(),
        };
        let (token, after) = rest.split_at(len);
        tokens.push(token);
        rest = after;
    }
    tokens
}

fn is_of_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

fn is_blank(token: &str) -> bool {
    token.trim().is_empty()
}

/// Whether a literal beside this token is only compared.
fn compares(token: &str) -> bool {
    matches!(token, "==" | "!=" | "in" | "not" | "is" | "if" | "<" | ">")
}

/// Whether a bracket after this token is a call or an index, not a group or a list.
fn ends_a_value(token: &str) -> bool {
    let keyword = matches!(
        token,
        "" | "in" | "not" | "and" | "or" | "if" | "elif" | "else" | "is" | "set" | "for"
    );
    let last = token.chars().next_back();
    !keyword && last.is_some_and(|c| is_of_word(c) || c == ')' || c == ']')
}

/// Writes `text` with a mark before each control text.
fn push_marked(text: &str, out: &mut String) {
    let mut rest = text;
    while let Some((at, _, control)) = find_control(rest) {
        out.push_str(&rest[..at]);
        out.push(MARK);
        out.push_str(control);
        rest = &rest[at + control.len()..];
    }
    out.push_str(rest);
}

/// Where the marked control texts are in `plain`. Fails, and names the control text at which they part, when the two
/// are not the same text but for marks.
pub(super) fn align(plain: &str, marked: &str) -> Result<Vec<Range<usize>>, &'static str> {
    let mut controls = Vec::new();
    let (mut plain_at, mut rest) = (0, marked);
    let mut last = "";
    while let Some(at) = rest.find(MARK) {
        let same = &rest[..at];
        if !plain[plain_at..].starts_with(same) {
            return Err(last);
        }
        plain_at += at;
        rest = &rest[at + MARK.len_utf8()..];
        if plain[plain_at..].starts_with(MARK) {
            // Content's own: a mark of the template stands before a control text in both.
            plain_at += MARK.len_utf8();
            continue;
        }
        let Some((_, control)) = control_at(rest) else {
            return Err(last);
        };
        if !plain[plain_at..].starts_with(control) {
            return Err(control);
        }
        controls.push(plain_at..plain_at + control.len());
        plain_at += control.len();
        rest = &rest[control.len()..];
        last = control;
    }
    match &plain[plain_at..] == rest {
        true => Ok(controls),
        false => Err(last),
    }
}

/// The control texts of `text` that are not at `controls`.
pub(super) fn outside<'t>(
    text: &'t str,
    controls: &'t [Range<usize>],
) -> impl Iterator<Item = &'static str> + 't {
    let starts = controls.iter().map(|range| range.end);
    let ends = controls.iter().map(|range| range.start);
    let gaps = std::iter::once(0)
        .chain(starts)
        .zip(ends.chain([text.len()]));
    gaps.flat_map(|(start, end)| {
        let mut rest = &text[start..end];
        std::iter::from_fn(move || {
            let (at, _, control) = find_control(rest)?;
            rest = &rest[at + control.len()..];
            Some(control)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(source: &str) -> String {
        mark_source(source).replace(MARK, "@")
    }

    #[test]
    fn what_may_be_written_is_marked_and_what_is_compared_is_not() {
        for (source, marked) in [
            ("<think>{{ x }}<think>", "@<think>{{ x }}@<think>"),
            (
                "{{- '<|im_end|>' + \"\\n<think>\" }}",
                "{{- '@<|im_end|>' + \"\\n@<think>\" }}",
            ),
            ("{% if '<think>' in x %}", "{% if '<think>' in x %}"),
            (
                "{% if x == '<think>' or '<think>' != x %}",
                "{% if x == '<think>' or '<think>' != x %}",
            ),
            (
                "{{ x.split('<think>')[-1] + '<think>' }}",
                "{{ x.split('<think>')[-1] + '@<think>' }}",
            ),
            (
                "{{ ('<think>' + x) ~ ['<think>'][0] }}",
                "{{ ('@<think>' + x) ~ ['@<think>'][0] }}",
            ),
            ("{% set a = '<think>' %}", "{% set a = '@<think>' %}"),
            ("{# <think> ' #}<think>", "{# <think> ' #}@<think>"),
            ("{{ '}}<think>' }}", "{{ '}}@<think>' }}"),
            ("{{ 'it\\'s <think>' }}", "{{ 'it\\'s @<think>' }}"),
            ("{{ '<think>", "{{ '@<think>"),
            ("{", "{"),
        ] {
            assert_eq!(shown(source), marked);
        }
    }

    /// Start and end of each control text; a mark is written `@`.
    fn aligned(plain: &str, marked: &str) -> Result<Vec<(usize, usize)>, &'static str> {
        let real = |text: &str| text.replace('@', "\u{FDD0}");
        let controls = align(&real(plain), &real(marked))?;
        Ok(controls.into_iter().map(|r| (r.start, r.end)).collect())
    }

    #[test]
    fn marks_are_found_beside_marks_of_content() {
        assert_eq!(aligned("<think>", "@<think>"), Ok(vec![(0, 7)]));
        assert_eq!(aligned("<think>", "<think>"), Ok(vec![]));
        // A mark has three bytes.
        assert_eq!(aligned("@<think>", "@<think>"), Ok(vec![]));
        assert_eq!(aligned("@<think>", "@@<think>"), Ok(vec![(3, 10)]));
        assert_eq!(aligned("@@x<think>", "@@x@<think>"), Ok(vec![(7, 14)]));
    }

    #[test]
    fn texts_that_differ_in_more_than_marks_are_refused() {
        assert_eq!(aligned("a", "b"), Err(""));
        assert_eq!(aligned("<think>a", "@<think>b"), Err("<think>"));
        assert_eq!(aligned("a", "@<think>"), Err("<think>"));
        assert_eq!(aligned("ab", "a@b"), Err(""));
        assert_eq!(aligned("<think>a", "@<think>"), Err("<think>"));
    }

    #[test]
    fn control_texts_outside_of_ranges_are_found() {
        let text = "<think>a<tool_call><think>";
        let found: Vec<_> = outside(text, std::slice::from_ref(&(0..7))).collect();
        assert_eq!(found, ["<tool_call>", "<think>"]);
        assert_eq!(outside(text, &[0..7, 8..19, 19..26]).count(), 0);
    }
}
