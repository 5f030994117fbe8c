//! Playwright's accessibility snapshot, and what of it is kept when it is too long.
//!
//! A snapshot is a fenced block of indented `- role "name" [ref=e5]: value` lines after a heading with the page's
//! address and title. The rule for one that does not fit, in this order:
//!
//! 1. names and values are shortened to [`line::TEXT_CHARS_MAX`] characters; role, state and ref stay;
//! 2. half of the room goes to the **outline**, in page order and with all ancestors: controls up to a quarter, then
//!    links, headings and messages. So what a page is operated by is there even at its end;
//! 3. the rest of the room is filled with nodes in page order, up to the first that does not fit.
//!
//! So the tree is complete down to one place, and an outline after it. A node is shown or not, never cut within role,
//! state and ref, and never without its ancestors; heading and fence are kept. The same text and limit always give the
//! same result.

use std::borrow::Cow;

use espalier_qwen3_text::Tokenizer;

use super::Shaped;
use super::line::{self, Rank};

/// What opens the block of a snapshot.
pub(super) const FENCE_OPEN: &str = "```yaml\n";
const FENCE_CLOSE: &str = "```";

/// A result in three parts that together are its text.
pub(super) struct Snapshot<'t> {
    /// All before the first node, the opening fence included.
    head: &'t str,
    /// In page order, so that a parent comes before its children.
    nodes: Vec<Node<'t>>,
    /// From the closing fence on; empty where the block never ends.
    tail: &'t str,
}

/// A node of a block.
pub(super) struct Node<'t> {
    /// The node's line with its line break, and lines that continue it.
    pub line: &'t str,
    /// Its place in the block.
    pub parent: Option<usize>,
    rank: Rank,
}

/// What has a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum References {
    /// Whatever can be seen: as Playwright gives them.
    All,
    /// What can be operated: as compaction leaves them.
    Operable,
}

impl<'t> Snapshot<'t> {
    /// `None` for text without a fenced block of nodes.
    pub(super) fn parse(text: &'t str, references: References) -> Option<Self> {
        let fence_at = if text.starts_with(FENCE_OPEN) {
            0
        } else {
            text.find(&format!("\n{FENCE_OPEN}"))? + 1
        };
        let (head, rest) = text.split_at(fence_at + FENCE_OPEN.len());
        let (block, tail) = rest.split_at(block_len(rest));
        let mut nodes = parse_nodes(block)?;
        for node in &mut nodes {
            if references == References::Operable
                && node.rank == Rank::Content
                && line::has_ref(node.line)
            {
                node.rank = Rank::Control;
            }
        }
        Some(Self { head, nodes, tail })
    }

    /// The snapshot within `max_tokens`; `None` where not even its frame fits. `text_len` is the length of the whole.
    pub(super) fn fit(
        &self,
        text_len: usize,
        max_tokens: usize,
        tokenizer: &Tokenizer,
    ) -> Option<Shaped> {
        let head = cut_head(self.head, max_tokens / 4, tokenizer);
        let tail = cut_tail(self.tail, max_tokens / 8, tokenizer);
        let note_tokens = tokenizer.count(&note(self.nodes.len(), self.nodes.len()));
        let frame_tokens = tokenizer.count(&head) + tokenizer.count(&tail) + note_tokens + 1;
        let mut room = max_tokens.checked_sub(frame_tokens)?;
        let mut costs = Costs::new(&self.nodes, tokenizer);
        while room > 0 {
            let kept = self.choose(room, &mut costs);
            let dropped_nodes = kept.iter().filter(|&&kept| !kept).count();
            let mut text = head.clone();
            for at in (0..self.nodes.len()).filter(|&at| kept[at]) {
                text.push_str(&shown(self.nodes[at].line));
            }
            end_line(&mut text);
            text.push_str(&tail);
            let dropped_bytes = text_len.saturating_sub(text.len());
            end_line(&mut text);
            text.push_str(&note(dropped_nodes, self.nodes.len()));
            let tokens = tokenizer.count(&text);
            if tokens <= max_tokens {
                return Some(Shaped {
                    text,
                    tokens,
                    truncated: true,
                    dropped_nodes,
                    dropped_bytes,
                });
            }
            // Lines' tokens add up with this tokenizer; the count above holds even where they would not.
            room = room.saturating_sub(tokens - max_tokens);
        }
        None
    }

    /// Which nodes are shown in `room` tokens.
    fn choose(&self, room: usize, costs: &mut Costs<'_, 't>) -> Vec<bool> {
        let mut kept = vec![false; self.nodes.len()];
        let mut used = 0;
        for (rank, limit) in [(Rank::Control, room / 4), (Rank::Signpost, room / 2)] {
            for at in (0..self.nodes.len()).filter(|&at| self.nodes[at].rank == rank) {
                let path = self.missing_path(at, &kept);
                let cost: usize = path.iter().map(|&at| costs.of(at)).sum();
                if used + cost > limit {
                    break;
                }
                used += cost;
                for at in path {
                    kept[at] = true;
                }
            }
        }
        for (at, kept) in kept.iter_mut().enumerate().filter(|(_, kept)| !**kept) {
            let cost = costs.of(at);
            if used + cost > room {
                break;
            }
            used += cost;
            *kept = true;
        }
        kept
    }

    /// The node and those of its ancestors that are not kept yet.
    fn missing_path(&self, at: usize, kept: &[bool]) -> Vec<usize> {
        let up = |&at: &usize| self.nodes[at].parent;
        std::iter::successors(Some(at), up)
            .take_while(|&at| !kept[at])
            .collect()
    }
}

/// The length of the block at the start of `text`, which is all up to its closing fence. Playwright writes values on one
/// line, so that no page can write a line of its own into the block.
pub(super) fn block_len(text: &str) -> usize {
    if text.starts_with(FENCE_CLOSE) {
        return 0;
    }
    text.find("\n```").map_or(text.len(), |at| at + 1)
}

/// The nodes of a block; `None` where it does not start with one.
pub(super) fn parse_nodes(block: &str) -> Option<Vec<Node<'_>>> {
    let mut nodes: Vec<Node<'_>> = Vec::new();
    // The path from the root to the last node: its columns and its place.
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut start = 0;
    while start < block.len() {
        let end = node_end(block, start);
        let line = &block[start..end];
        if !line::starts_node(line) {
            return None;
        }
        let indent = line::indent(line);
        path.truncate(path.partition_point(|&(above, _)| above < indent));
        let parent = path.last().map(|&(_, at)| at);
        path.push((indent, nodes.len()));
        // A pointer is inherited; only the outermost node that shows one is what is clicked.
        let inherits = parent.is_some_and(|at| line::has_pointer(nodes[at].line));
        let rank = match line::rank(line) {
            Rank::Content if line::has_pointer(line) && !inherits => Rank::Control,
            rank => rank,
        };
        nodes.push(Node { line, parent, rank });
        start = end;
    }
    (!nodes.is_empty()).then_some(nodes)
}

/// The end of the node that starts at `start`: before the next line that starts a node.
fn node_end(block: &str, start: usize) -> usize {
    let breaks = block[start..].match_indices('\n');
    let mut ends = breaks.map(|(at, _)| start + at + 1);
    ends.find(|&end| line::starts_node(&block[end..]))
        .unwrap_or(block.len())
}

/// The line as a snapshot that does not fit shows it.
fn shown(line: &str) -> Cow<'_, str> {
    line::shorten(line).map_or(line.into(), Into::into)
}

fn note(dropped: usize, all: usize) -> String {
    format!(
        "[Shortened to fit: {dropped} of {all} nodes are not shown, long texts end in \"…\". After the first gap only \
         controls, links and headings are listed. For one part in full, call browser_snapshot with its ref as target.]"
    )
}

/// `head` within `max_tokens`: what stands before the page's address loses its end first.
fn cut_head(head: &str, max_tokens: usize, tokenizer: &Tokenizer) -> String {
    if tokenizer.count_at_most(head, max_tokens).is_some() {
        return head.to_owned();
    }
    let frame = head.strip_suffix(FENCE_OPEN).unwrap_or(head);
    let page_at = frame
        .rfind("- Page URL:")
        .map_or(frame.len(), |at| line_start(frame, at));
    let (before, page) = frame.split_at(page_at);
    let page = tokenizer.prefix_within(page, max_tokens / 2);
    let before = tokenizer.prefix_within(before, max_tokens / 4);
    let mut out = String::new();
    for part in [before, page] {
        out.push_str(part);
        if !part.is_empty() && !part.ends_with('\n') {
            out.push_str("…\n");
        }
    }
    out + FENCE_OPEN
}

/// `tail` within about `max_tokens`, the fence whole.
fn cut_tail(tail: &str, max_tokens: usize, tokenizer: &Tokenizer) -> String {
    let after = tail.strip_prefix(FENCE_CLOSE).unwrap_or(tail);
    let short = tokenizer.prefix_within(after, max_tokens);
    let dots = if short.len() < after.len() { "…" } else { "" };
    format!("{FENCE_CLOSE}{short}{dots}")
}

fn end_line(text: &mut String) {
    if !text.ends_with('\n') {
        text.push('\n');
    }
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |at| at + 1)
}

/// Tokens of nodes as shown, each counted when first asked for: most nodes of a huge page never are.
struct Costs<'a, 't> {
    nodes: &'a [Node<'t>],
    tokenizer: &'a Tokenizer,
    known: Vec<Option<usize>>,
}

impl<'a, 't> Costs<'a, 't> {
    fn new(nodes: &'a [Node<'t>], tokenizer: &'a Tokenizer) -> Self {
        Self {
            nodes,
            tokenizer,
            known: vec![None; nodes.len()],
        }
    }

    fn of(&mut self, at: usize) -> usize {
        *self.known[at].get_or_insert_with(|| self.tokenizer.count(&shown(self.nodes[at].line)))
    }
}
