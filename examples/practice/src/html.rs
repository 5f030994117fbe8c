//! Writes a page model as HTML.
//!
//! The only place that knows tags, attributes and styles. Everything that is not written here is escaped. Called by
//! the site for every answer.

use std::fmt::Write as _;

use crate::page::{Block, Fact, Field, Form, Input, Late, Link, Method, Page, Table};

const STYLE: &str = "\
body{font:16px/1.5 system-ui,sans-serif;margin:0;background:#f6f5f1;color:#23302a}\
nav{background:#2f5d46;padding:.7rem 1.5rem}nav a{color:#fff;text-decoration:none;font-weight:600}\
main{max-width:42rem;margin:1.5rem auto;padding:1rem 2rem 2rem;background:#fff;border:1px solid #dcd9d0;border-radius:8px}\
h1{font-size:1.5rem}a{color:#24704b}ul{list-style:none;padding:0}li{padding:.25rem 0;border-bottom:1px solid #eeece5}\
form{display:grid;grid-template-columns:8rem 1fr;gap:.6rem;align-items:center;margin:1rem 0}\
input,select{font:inherit;padding:.3rem .5rem;border:1px solid #b9b5a8;border-radius:4px;justify-self:start}\
button{grid-column:2;justify-self:start;font:inherit;padding:.35rem 1.2rem;border:0;border-radius:4px;background:#2f5d46;color:#fff}\
dl{display:grid;grid-template-columns:8rem 1fr}dt{color:#6b6f69}dd{margin:0;font-weight:600}\
table{border-collapse:collapse;width:100%}caption{text-align:left;color:#6b6f69}th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #eeece5}\
[role=alert]{background:#fbe6e3;border-left:4px solid #b3402e;padding:.4rem .8rem}[role=status]{color:#6b6f69}";

/// The whole document of `page`.
pub fn render(page: &Page) -> String {
    let mut out = String::with_capacity(4096);
    let title = escape(&page.title);
    out.push_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width\">\n");
    // An empty icon keeps the browser from asking for one, which would show as an error in its console.
    out.push_str("<link rel=\"icon\" href=\"data:,\">\n");
    push(
        &mut out,
        format_args!("<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"),
    );
    out.push_str("<body>\n<nav><a href=\"/\">Home</a></nav>\n<main>\n");
    push(&mut out, format_args!("<h1>{title}</h1>\n"));
    for block in &page.blocks {
        render_block(&mut out, block);
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

/// Makes `text` safe between tags and inside quoted attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

/// Writing to a `String` cannot fail, so the result carries nothing.
fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

fn render_block(out: &mut String, block: &Block) {
    match block {
        Block::Text(text) => push(out, format_args!("<p>{}</p>\n", escape(text))),
        Block::Status(text) => push(
            out,
            format_args!("<p role=\"status\">{}</p>\n", escape(text)),
        ),
        Block::Alert(text) => push(
            out,
            format_args!("<p role=\"alert\">{}</p>\n", escape(text)),
        ),
        Block::Links(links) => render_links(out, links),
        Block::Facts(facts) => render_facts(out, facts),
        Block::Table(table) => render_table(out, table),
        Block::Form(form) => render_form(out, form),
        Block::Late(late) => render_late(out, late),
    }
}

fn render_links(out: &mut String, links: &[Link]) {
    out.push_str("<ul>\n");
    for link in links {
        let target = if link.new_tab {
            " target=\"_blank\" rel=\"noopener\""
        } else {
            ""
        };
        push(
            out,
            format_args!(
                "<li><a href=\"{}\"{target}>{}</a>",
                escape(&link.href),
                escape(&link.text)
            ),
        );
        if !link.note.is_empty() {
            push(out, format_args!(" {}", escape(&link.note)));
        }
        out.push_str("</li>\n");
    }
    out.push_str("</ul>\n");
}

fn render_facts(out: &mut String, facts: &[Fact]) {
    out.push_str("<dl>\n");
    for fact in facts {
        push(
            out,
            format_args!(
                "<dt>{}</dt><dd id=\"{}\">{}</dd>\n",
                escape(fact.name),
                fact.id,
                escape(&fact.value)
            ),
        );
    }
    out.push_str("</dl>\n");
}

fn render_table(out: &mut String, table: &Table) {
    push(
        out,
        format_args!(
            "<table>\n<caption>{}</caption>\n<thead><tr>",
            escape(&table.caption)
        ),
    );
    for (label, href) in &table.columns {
        match href {
            Some(href) => push(
                out,
                format_args!(
                    "<th scope=\"col\"><a href=\"{}\">{}</a></th>",
                    escape(href),
                    escape(label)
                ),
            ),
            None => push(
                out,
                format_args!("<th scope=\"col\">{}</th>", escape(label)),
            ),
        }
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        out.push_str("<tr>");
        for cell in row {
            push(out, format_args!("<td>{}</td>", escape(cell)));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n");
}

fn render_form(out: &mut String, form: &Form) {
    let method = match form.method {
        Method::Get => "get",
        Method::Post => "post",
    };
    // The browser's own checks are off and its memory of earlier input too: errors come from the server, in the page.
    push(
        out,
        format_args!(
            "<form action=\"{}\" method=\"{method}\" novalidate autocomplete=\"off\">\n",
            form.action
        ),
    );
    for (name, value) in &form.hidden {
        push(
            out,
            format_args!(
                "<input type=\"hidden\" name=\"{name}\" value=\"{}\">\n",
                escape(value)
            ),
        );
    }
    // Browsers complain in their console about a login whose fields do not say what they are.
    let is_login = form.fields.iter().any(|f| f.input == Input::Password);
    let hint = if is_login {
        " autocomplete=\"username\""
    } else {
        ""
    };
    for field in &form.fields {
        render_field(out, field, hint);
    }
    push(
        out,
        format_args!(
            "<button type=\"submit\">{}</button>\n</form>\n",
            form.button
        ),
    );
}

/// `hint` is one more attribute of text fields.
fn render_field(out: &mut String, field: &Field, hint: &str) {
    let Field { label, name, input } = field;
    push(out, format_args!("<label for=\"{name}\">{label}</label> "));
    match input {
        Input::Text(value) => push(
            out,
            format_args!(
                "<input type=\"text\" id=\"{name}\" name=\"{name}\" value=\"{}\"{hint}>\n",
                escape(value)
            ),
        ),
        Input::Password => push(
            out,
            format_args!(
                "<input type=\"password\" id=\"{name}\" name=\"{name}\" autocomplete=\"current-password\">\n"
            ),
        ),
        Input::Checkbox => push(
            out,
            format_args!("<input type=\"checkbox\" id=\"{name}\" name=\"{name}\" value=\"yes\">\n"),
        ),
        Input::Select { options, chosen } => {
            push(out, format_args!("<select id=\"{name}\" name=\"{name}\">"));
            for (value, text) in options {
                let selected = if value == chosen { " selected" } else { "" };
                push(
                    out,
                    format_args!(
                        "<option value=\"{}\"{selected}>{}</option>",
                        escape(value),
                        escape(text)
                    ),
                );
            }
            out.push_str("</select>\n");
        }
    }
}

/// The later content waits in a `<template>`, which neither shows nor enters the accessibility tree.
fn render_late(out: &mut String, late: &Late) {
    push(
        out,
        format_args!(
            "<div id=\"late\"><p role=\"status\">{}</p></div>\n<template id=\"after\">\n",
            escape(&late.before)
        ),
    );
    render_facts(out, std::slice::from_ref(&late.after));
    push(
        out,
        format_args!(
            "</template>\n<script>setTimeout(()=>document.getElementById('late').replaceChildren(\
             document.getElementById('after').content),{});</script>\n",
            late.delay_ms
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_visitor_typed_is_escaped_everywhere() {
        let evil = "\"><script>alert('x')</script>&";
        let page = Page::new(evil)
            .with(Block::Alert(evil.into()))
            .with(Block::Links(vec![Link {
                note: evil.into(),
                ..Link::new(evil, evil)
            }]))
            .with(Block::Form(Form {
                action: "/shop",
                method: Method::Get,
                hidden: vec![("name", evil.into())],
                fields: vec![Field {
                    label: "Search",
                    name: "q",
                    input: Input::Text(evil.into()),
                }],
                button: "Find",
            }));
        let html = render(&page);
        assert!(!html.contains("<script>"));
        assert_eq!(html.matches("&quot;&gt;&lt;script&gt;").count(), 8);
    }

    #[test]
    fn every_field_has_a_label_that_points_at_it() {
        let page = Page::new("Form").with(Block::Form(Form {
            action: "/x",
            method: Method::Post,
            hidden: vec![],
            fields: vec![
                Field {
                    label: "Password",
                    name: "password",
                    input: Input::Password,
                },
                Field {
                    label: "I agree",
                    name: "agree",
                    input: Input::Checkbox,
                },
            ],
            button: "Send",
        }));
        let html = render(&page);
        assert!(html.contains(
            "<label for=\"password\">Password</label> <input type=\"password\" id=\"password\""
        ));
        assert!(html.contains(
            "<label for=\"agree\">I agree</label> <input type=\"checkbox\" id=\"agree\""
        ));
    }
}
