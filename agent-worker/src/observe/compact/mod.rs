//! Playwright's results without what a model does not need to operate a page: `Observation::CompactTokens`.
//!
//! The code that Playwright ran is left out, and in a snapshot, line by line:
//!
//! - properties (`- /url: …`), and the attributes `[active]`, `[cursor=pointer]` and `[level=…]`;
//! - the reference of what cannot be operated;
//! - a node without name, value, state and reference: its children take its place;
//! - a text that only labels the control after it, or the checkbox before it;
//! - a row's cells where its name repeats them and none can be operated; its name where one can.
//!
//! A term and its one definition are a line: `- term "Weight": 12 kg`. What is left is in the order and in the words of the page: names and values are as Playwright wrote them. A line
//! that is not of Playwright's form stays as it is, and so does a snapshot that has been compacted before: there nothing
//! has a reference but what can be operated, so that its references are left. Only what stands under the heading of a
//! snapshot is one: other tools write YAML too.

mod form;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::line;
use super::snapshot::{FENCE_OPEN, block_len};
use form::Form;

/// The section of the code that Playwright ran, with the start of its fence.
const CODE_SECTION: &str = "### Ran Playwright code\n```";

/// What all sections start with.
const SECTION: &str = "### ";

/// What stands before the fence of a snapshot, in this version of Playwright's server and in earlier ones.
const SNAPSHOT_HEADINGS: [&str; 2] = ["### Snapshot\n", "- Page Snapshot:\n"];

/// Roles of texts that may label a control.
const LABELS: [&str; 4] = ["generic", "label", "LabelText", "text"];

/// Controls that have their label after them.
const CHECKS: [&str; 3] = ["checkbox", "radio", "switch"];

/// Controls of which a row's name has the value and not the name. Of a list of options it has those that are chosen.
const FIELDS: [&str; 6] = [
    "combobox",
    "listbox",
    "searchbox",
    "slider",
    "spinbutton",
    "textbox",
];

/// Longest name of a row that is compared with its cells: more than Playwright writes (900 characters), and little enough
/// to look for each cell in it.
const ROW_NAME_BYTES_MAX: usize = 4096;

/// `text` compacted; never longer, and the same again for what is compacted already.
pub(super) fn compact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut is_headed = false;
    while !rest.is_empty() {
        if let Some(len) = code_section_len(rest) {
            rest = &rest[len..];
            if rest.is_empty() && out.ends_with('\n') {
                out.pop();
            }
            continue;
        }
        let (line, after) = rest.split_at(line_len(rest));
        out.push_str(line);
        rest = after;
        if line == FENCE_OPEN && is_headed {
            let (block, after) = rest.split_at(block_len(rest));
            out.push_str(&compact_block(block));
            rest = after;
        }
        is_headed = SNAPSHOT_HEADINGS.contains(&line);
    }
    // Code alone says at least that it ran.
    if out.is_empty() { text.to_owned() } else { out }
}

fn line_len(text: &str) -> usize {
    text.find('\n').map_or(text.len(), |at| at + 1)
}

/// The length of the code section at the start of `text`, if it is one, and whole: no text of a page that looks like its
/// beginning takes along what follows.
fn code_section_len(text: &str) -> Option<usize> {
    let rest = text.strip_prefix(CODE_SECTION)?;
    let mut at = text.len() - rest.len() + line_len(rest);
    loop {
        let line = &text[at..][..line_len(&text[at..])];
        at += line.len();
        match line.trim_end_matches('\n') {
            _ if line.is_empty() || line.starts_with(SECTION) => return None,
            "```" => break,
            _ => {}
        }
    }
    let rest = text[at..].trim_start_matches('\n');
    (rest.is_empty() || rest.starts_with(SECTION)).then_some(text.len() - rest.len())
}

fn compact_block(block: &str) -> String {
    let Some(tree) = Tree::parse(block) else {
        return block.to_owned();
    };
    // What Playwright wrote has references within references, and more to leave out than them.
    if tree.may_be_compacted() && tree.write(Operable::WithRef) == block {
        return block.to_owned();
    }
    tree.write(Operable::ByRoleOrPointer)
}

/// How it is known what can be operated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operable {
    /// By its role, or by the pointer that Playwright says it shows.
    ByRoleOrPointer,
    /// As above, and what has a reference: nothing else has one in a compacted snapshot.
    WithRef,
}

/// The nodes of a block, in page order.
struct Tree<'t> {
    nodes: Vec<Node<'t>>,
    /// Whether the block ends with a line break.
    ends_line: bool,
}

struct Node<'t> {
    /// Without indentation and the last line break.
    line: &'t str,
    /// Columns before the line.
    indent: usize,
    parent: Option<usize>,
    /// The first node that is no descendant.
    end: usize,
    kind: Kind<'t>,
}

enum Kind<'t> {
    Element(Form<'t>),
    /// A line that says something about its parent.
    Property,
    /// Not of Playwright's form.
    Other,
}

impl Node<'_> {
    fn form(&self) -> Option<&Form<'_>> {
        match &self.kind {
            Kind::Element(form) => Some(form),
            Kind::Property | Kind::Other => None,
        }
    }
}

/// What is shown of the nodes.
struct Plan {
    kept: Vec<bool>,
    /// Rows that lose their name.
    unnamed: Vec<bool>,
    /// Terms with the definition that they share their line with.
    defined: BTreeMap<usize, usize>,
}

impl<'t> Tree<'t> {
    fn parse(block: &'t str) -> Option<Self> {
        let parsed = super::snapshot::parse_nodes(block)?;
        let mut nodes: Vec<Node<'t>> = Vec::with_capacity(parsed.len());
        for (at, node) in parsed.iter().enumerate() {
            let line = node.line.strip_suffix('\n').unwrap_or(node.line);
            let indent = line::indent(line);
            let line = &line[indent..];
            let kind = match Form::parse(line) {
                // A continued line is none that Playwright writes.
                Some(form) if !line.contains('\n') => Kind::Element(form),
                _ if line.starts_with("- /") && !line.contains('\n') => Kind::Property,
                _ => Kind::Other,
            };
            nodes.push(Node {
                line,
                indent,
                parent: node.parent,
                end: at + 1,
                kind,
            });
        }
        for at in (0..nodes.len()).rev() {
            if let Some(parent) = nodes[at].parent {
                nodes[parent].end = nodes[parent].end.max(nodes[at].end);
            }
        }
        Some(Self {
            nodes,
            ends_line: block.ends_with('\n'),
        })
    }

    fn write(&self, operable: Operable) -> String {
        let operable: Vec<bool> = (0..self.nodes.len())
            .map(|at| self.is_operable(at, operable))
            .collect();
        let plan = self.plan(&operable);
        let parents = self.parents(&plan.kept);
        let mut columns: Vec<usize> = Vec::with_capacity(self.nodes.len());
        let mut out = String::new();
        let mut last = None;
        for (at, node) in self.nodes.iter().enumerate() {
            columns.push(match node.parent {
                None => node.indent,
                Some(parent) if !plan.kept[parent] => columns[parent],
                Some(parent) => columns[parent] + node.indent - self.nodes[parent].indent,
            });
            let is_label = |last| !operable[at] && self.is_label_of_check(last, at, &plan.kept);
            if !plan.kept[at] || last.is_some_and(is_label) {
                continue;
            }
            last = Some(at);
            out.extend(std::iter::repeat_n(' ', columns[at]));
            match &node.kind {
                Kind::Element(form) => match plan.defined.get(&at) {
                    Some(&definition) => self.write_fact(&mut out, form, definition),
                    None => form.write(&mut out, !plan.unnamed[at], operable[at], parents[at]),
                },
                Kind::Property | Kind::Other => out.push_str(node.line),
            }
            out.push('\n');
        }
        if !self.ends_line && out.ends_with('\n') {
            out.pop();
        }
        out
    }

    fn write_fact(&self, out: &mut String, term: &Form<'_>, definition: usize) {
        let definition = self.nodes[definition].form();
        let value = definition.and_then(|form| form.value).unwrap_or_default();
        term.write_fact(out, value);
    }

    /// Whether the model may want to do something with the node.
    fn is_operable(&self, at: usize, operable: Operable) -> bool {
        let Some(form) = self.nodes[at].form() else {
            return false;
        };
        if form.is_operated() {
            return true;
        }
        let has_pointer = |at: usize| {
            let form = self.nodes[at].form();
            form.is_some_and(|form| form.has("cursor=pointer"))
        };
        // A pointer is inherited; only the outermost node that shows one is what is clicked.
        let shows = || has_pointer(at) && !self.above(at).any(has_pointer);
        form.has_ref() && (operable == Operable::WithRef || shows())
    }

    /// Whether no node has a reference for its pointer alone within another such one: as compaction leaves them.
    fn may_be_compacted(&self) -> bool {
        let by_pointer = |at: usize| {
            let form = self.nodes[at].form();
            form.is_some_and(|form| form.has_ref() && !form.is_operated())
        };
        let mut nodes = (0..self.nodes.len()).filter(|&at| by_pointer(at));
        nodes.all(|at| !self.above(at).any(by_pointer))
    }

    /// The ancestors of a node, from its parent up.
    fn above(&self, at: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(self.nodes[at].parent, |&at| self.nodes[at].parent)
    }

    /// From the leaves to the root, so that a node is judged by what is left of its descendants.
    fn plan(&self, operable: &[bool]) -> Plan {
        let mut kept = self.without_labels(operable);
        let defined = self.defined(operable);
        for &definition in defined.values() {
            kept[definition] = false;
        }
        let mut unnamed = vec![false; kept.len()];
        let mut operable_below = vec![false; kept.len()];
        let mut shown_below = vec![false; kept.len()];
        for (at, node) in self.nodes.iter().enumerate().rev() {
            if let (true, Kind::Element(form)) = (kept[at], &node.kind) {
                if self.is_repeated_by_name(at, &kept, &unnamed) {
                    match operable_below[at] {
                        true => unnamed[at] = true,
                        false => kept[at + 1..node.end].fill(false),
                    }
                }
                let has_name = form.name.is_some() && !unnamed[at];
                // What one row has is told from what the next one has.
                let is_row = form.role == "row" && shown_below[at];
                let says = has_name || form.value.is_some() || form.has_state();
                kept[at] = operable[at] || says || is_row;
            }
            if let Some(parent) = node.parent {
                operable_below[parent] |= operable[at] || operable_below[at];
                shown_below[parent] |= kept[at] || shown_below[at];
            }
        }
        Plan {
            kept,
            unnamed,
            defined,
        }
    }

    /// Terms that are followed by one definition, both of text alone.
    fn defined(&self, operable: &[bool]) -> BTreeMap<usize, usize> {
        let is_text = |at: usize, role: &str| {
            let form = self.nodes.get(at).and_then(Node::form);
            let is_text = form.is_some_and(|form| form.role == role && form.is_text());
            is_text && self.nodes[at].end == at + 1 && !operable[at]
        };
        let is_beside = |at: usize, other: usize| {
            let parent = |at: usize| self.nodes.get(at).map(|node| node.parent);
            parent(at) == parent(other)
        };
        let is_definition = |term: usize, at: usize| {
            let form = self.nodes.get(at).and_then(Node::form);
            form.is_some_and(|form| form.role == "definition") && is_beside(term, at)
        };
        let terms = (0..self.nodes.len()).filter(|&at| is_text(at, "term"));
        terms
            .filter(|&at| self.nodes[at].form().is_some_and(Form::is_plain))
            .filter(|&at| is_definition(at, at + 1) && is_text(at + 1, "definition"))
            .filter(|&at| !is_definition(at, at + 2))
            .map(|at| (at, at + 1))
            .collect()
    }

    /// All nodes but properties and texts that only label the control directly after them.
    fn without_labels(&self, operable: &[bool]) -> Vec<bool> {
        let mut kept = vec![true; self.nodes.len()];
        // The innermost node around each that can be operated.
        let mut holders: Vec<Option<usize>> = Vec::with_capacity(kept.len());
        for node in &self.nodes {
            let holder = |parent: usize| match operable[parent] {
                true => Some(parent),
                false => holders[parent],
            };
            let holder = node.parent.and_then(holder);
            holders.push(holder);
        }
        // The control that is looked back from, and the label that was found before it.
        let mut next: Option<(usize, &Form<'_>, Option<usize>)> = None;
        for (at, node) in self.nodes.iter().enumerate().rev() {
            let Some(form) = node.form() else {
                kept[at] = !matches!(node.kind, Kind::Property);
                continue;
            };
            if form.is_control() {
                next = Some((at, form, None));
                continue;
            }
            // What is around the control is not before it, and what says nothing does not count.
            let says = form.name.is_some() || form.value.is_some() || operable[at];
            let Some((control, named, label)) =
                next.take_if(|(control, ..)| says && node.end <= *control)
            else {
                continue;
            };
            // The text of a button is no label of the next one.
            let is_free = holders[at].is_none_or(|holder| control < self.nodes[holder].end);
            let is_label = is_free && !operable[at] && self.is_label(at, named);
            match (is_label, label) {
                (true, None) => {
                    kept[at] = false;
                    next = Some((control, named, Some(at)));
                }
                // A text that is there twice says something.
                (true, Some(label)) => kept[label] = true,
                (false, _) => {}
            }
        }
        kept
    }

    /// Whether the node is a text that says no more than the name of `control`.
    fn is_label(&self, at: usize, control: &Form<'_>) -> bool {
        let node = &self.nodes[at];
        let is_leaf = node.end == at + 1;
        node.form().is_some_and(|form| {
            is_leaf
                && LABELS.contains(&form.role)
                && form.name.is_none()
                && !form.has_state()
                && form.value.is_some()
                && form.value_text() == control.name_text()
        })
    }

    /// Whether the node is the label of the checkbox that is shown before it.
    fn is_label_of_check(&self, last: usize, at: usize, kept: &[bool]) -> bool {
        let Some(check) = self.nodes[last].form() else {
            return false;
        };
        let shown_parent = |at: usize| self.above(at).find(|&at| kept[at]);
        CHECKS.contains(&check.role)
            && self.is_label(at, check)
            && shown_parent(last) == shown_parent(at)
    }

    /// Whether the node is a row whose name has all that is left in it to read.
    fn is_repeated_by_name(&self, at: usize, kept: &[bool], unnamed: &[bool]) -> bool {
        let node = &self.nodes[at];
        let row = node.form().filter(|form| form.role == "row");
        let name = row.and_then(Form::name_text);
        let Some(name) = name.filter(|name| name.len() <= ROW_NAME_BYTES_MAX) else {
            return false;
        };
        let mut has_text = false;
        let mut below = (at + 1..node.end).filter(|&at| kept[at]);
        let all_in_name = below.all(|at| {
            let Some(form) = self.nodes[at].form() else {
                return false;
            };
            if form.role == "option" {
                return true;
            }
            let has_name = !FIELDS.contains(&form.role) && !unnamed[at];
            let texts = [form.name_text().filter(|_| has_name), form.value_text()];
            has_text |= texts.iter().flatten().any(|text| !text.is_empty());
            texts.iter().flatten().all(|text| name.contains(&**text))
                && (form.is_operated() || !form.has_state())
        });
        all_in_name && has_text
    }

    /// Which nodes have one below them that is shown.
    fn parents(&self, kept: &[bool]) -> Vec<bool> {
        let mut parents = vec![false; kept.len()];
        for (at, node) in self.nodes.iter().enumerate().rev() {
            if let Some(parent) = node.parent {
                parents[parent] |= kept[at] || parents[at];
            }
        }
        parents
    }
}
