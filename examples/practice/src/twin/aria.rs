//! The accessibility snapshot that Playwright makes of a page, written from the page model.
//!
//! Roles, names and the order of references follow from what [`crate::html`] writes; how lines are written, from
//! Playwright's `ariaSnapshotRenderer`. A test holds both to what a real browser shows.

use crate::page::{Block, Field, Form, Input, Link, Page, Table};

/// What can be operated on a page: its reference and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The reference, such as `f1e7`.
    pub id: String,
    /// Its accessible name.
    pub name: String,
    /// What it does.
    pub does: Does,
}

/// What a part does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Does {
    /// Leads to that address.
    Leads(String),
    /// Holds the field of that number of that form.
    Holds(usize, usize),
    /// Sends the form of that number.
    Sends(usize),
}

/// What a visitor has done to a page since it was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Values of fields, by form.
    pub values: Vec<Vec<String>>,
    /// The part that has the focus, by its place among parts; none: the page.
    pub focus: Option<usize>,
}

impl State {
    /// The state of a page as it comes.
    pub fn of(page: &Page) -> Self {
        let value = |field: &Field| match &field.input {
            Input::Text(value) => value.clone(),
            // Where no option has the value, browsers choose the first.
            Input::Select { options, chosen } => {
                let mut keys = options.iter().map(|(key, _)| key);
                let known = keys.clone().find(|key| *key == chosen);
                known.or_else(|| keys.next()).cloned().unwrap_or_default()
            }
            Input::Password | Input::Checkbox => String::new(),
        };
        let values = forms(page).map(|form| form.fields.iter().map(value).collect());
        Self {
            values: values.collect(),
            focus: None,
        }
    }
}

/// The forms of a page, in order.
pub fn forms(page: &Page) -> impl Iterator<Item = &Form> {
    page.blocks.iter().filter_map(|block| match block {
        Block::Form(form) => Some(form),
        _ => None,
    })
}

/// The snapshot of the page that is the `document`-th of its tab, from 0, and the parts that can be operated.
pub fn snapshot(page: &Page, state: &State, document: u64) -> (String, Vec<Part>) {
    let mut tree = Tree {
        out: String::with_capacity(2048),
        parts: Vec::new(),
        prefix: match document {
            0 => "e".to_owned(),
            n => format!("f{n}e"),
        },
        count: 0,
        state,
    };
    let active = if state.focus.is_none() {
        " [active]"
    } else {
        ""
    };
    tree.open(0, &format!("generic{active}"), true);
    tree.open(1, "navigation", true);
    tree.link(2, "Home", "/");
    tree.open(1, "main", true);
    let heading = tree.reference();
    tree.line(
        2,
        &format!("heading {} [level=1] [ref={heading}]", quoted(&page.title)),
    );
    let mut form = 0;
    for block in &page.blocks {
        tree.block(block, form);
        form += usize::from(matches!(block, Block::Form(_)));
    }
    (tree.out, tree.parts)
}

struct Tree<'a> {
    out: String,
    parts: Vec<Part>,
    prefix: String,
    count: u64,
    state: &'a State,
}

impl Tree<'_> {
    fn reference(&mut self) -> String {
        self.count += 1;
        format!("{}{}", self.prefix, self.count)
    }

    fn line(&mut self, depth: usize, text: &str) {
        for _ in 0..depth {
            self.out.push_str("  ");
        }
        self.out.push_str("- ");
        self.out.push_str(text);
        self.out.push('\n');
    }

    /// A node with children, or without.
    fn open(&mut self, depth: usize, role: &str, has_children: bool) {
        let reference = self.reference();
        let colon = if has_children { ":" } else { "" };
        self.line(depth, &format!("{role} [ref={reference}]{colon}"));
    }

    /// A node whose only child is text.
    fn text(&mut self, depth: usize, role: &str, text: &str) {
        let reference = self.reference();
        self.line(depth, &format!("{role} [ref={reference}]: {}", value(text)));
    }

    /// A part that can be operated, with what its line has between name and reference.
    fn part(&mut self, name: &str, does: Does) -> (String, &'static str) {
        let id = self.reference();
        let has_focus = self.state.focus == Some(self.parts.len());
        self.parts.push(Part {
            id: id.clone(),
            name: name.to_owned(),
            does,
        });
        (id, if has_focus { " [active]" } else { "" })
    }

    fn link(&mut self, depth: usize, name: &str, href: &str) {
        let (id, active) = self.part(name, Does::Leads(href.to_owned()));
        let name = quoted(name);
        self.line(
            depth,
            &format!("link {name}{active} [ref={id}] [cursor=pointer]:"),
        );
        self.line(depth + 1, &format!("/url: {}", value(href)));
    }

    fn block(&mut self, block: &Block, form: usize) {
        match block {
            Block::Text(text) => self.text(2, "paragraph", text),
            Block::Status(text) => self.text(2, "status", text),
            Block::Alert(text) => self.text(2, "alert", text),
            Block::Links(links) => self.links(links),
            Block::Facts(facts) => {
                self.open(2, "generic", true);
                for fact in facts {
                    self.text(3, "term", fact.name);
                    self.text(3, "definition", &fact.value);
                }
            }
            Block::Table(table) => self.table(table),
            Block::Form(of) => self.form(of, form),
            Block::Late(late) => {
                self.text(2, "status", &late.before);
            }
        }
    }

    fn links(&mut self, links: &[Link]) {
        self.open(2, "list", !links.is_empty());
        for link in links {
            self.open(3, "listitem", true);
            self.link(4, &link.text, &link.href);
            if !link.note.is_empty() {
                self.line(4, &format!("text: {}", value(&link.note)));
            }
        }
    }

    fn table(&mut self, table: &Table) {
        let row = |cells: &[String]| cells.join(" ");
        self.open(2, &format!("table {}", quoted(&table.caption)), true);
        self.text(3, "caption", &table.caption);
        self.open(3, "rowgroup", true);
        let labels: Vec<String> = table
            .columns
            .iter()
            .map(|(label, _)| label.clone())
            .collect();
        self.open(4, &format!("row {}", quoted(&row(&labels))), true);
        for (label, href) in &table.columns {
            self.open(
                5,
                &format!("columnheader {}", quoted(label)),
                href.is_some(),
            );
            if let Some(href) = href {
                self.link(6, label, href);
            }
        }
        self.open(3, "rowgroup", true);
        for cells in &table.rows {
            self.open(4, &format!("row {}", quoted(&row(cells))), true);
            for cell in cells {
                self.open(5, &format!("cell {}", quoted(cell)), false);
            }
        }
    }

    fn form(&mut self, form: &Form, number: usize) {
        self.open(2, "generic", true);
        for (n, field) in form.fields.iter().enumerate() {
            self.text(3, "generic", field.label);
            self.field(field, (number, n));
        }
        let (id, active) = self.part(form.button, Does::Sends(number));
        self.line(
            3,
            &format!("button {}{active} [ref={id}]", quoted(form.button)),
        );
    }

    fn field(&mut self, field: &Field, (form, n): (usize, usize)) {
        let entered = self.state.values[form][n].clone();
        let (id, active) = self.part(field.label, Does::Holds(form, n));
        let name = quoted(field.label);
        match &field.input {
            Input::Text(_) | Input::Password => {
                let entered = match entered.is_empty() {
                    true => String::new(),
                    false => format!(": {}", value(&entered)),
                };
                self.line(3, &format!("textbox {name}{active} [ref={id}]{entered}"));
            }
            Input::Checkbox => {
                let checked = if entered.is_empty() { "" } else { " [checked]" };
                self.line(3, &format!("checkbox {name}{checked}{active} [ref={id}]"));
            }
            Input::Select { options, .. } => {
                self.line(3, &format!("combobox {name}{active} [ref={id}]:"));
                for (key, text) in options {
                    let selected = if *key == entered { " [selected]" } else { "" };
                    self.line(4, &format!("option {}{selected}", quoted(text)));
                }
            }
        }
    }
}

/// A name as a key has it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A value as YAML has it, in quotes where it would mean something else.
pub fn value(text: &str) -> String {
    match needs_quotes(text) {
        true => quoted(text),
        false => text.to_owned(),
    }
}

fn needs_quotes(text: &str) -> bool {
    const WORDS: [&str; 9] = ["y", "n", "yes", "no", "true", "false", "on", "off", "null"];
    let edges = text.starts_with(char::is_whitespace) || text.ends_with(char::is_whitespace);
    let first = text.starts_with(|c| "-&*],?!>|@\"'#%[".contains(c));
    let within = text.contains(": ") || text.ends_with(':') || text.contains(" #");
    let braces = text.contains(['{', '}', '`']);
    let word = WORDS.contains(&text.to_lowercase().as_str());
    text.is_empty() || edges || first || within || braces || word || text.parse::<f64>().is_ok()
}
