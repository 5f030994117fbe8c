//! Which conversations become a data set, and what is said of those that do not.
//!
//! Two passes over the sources, so that none has to stay in memory: [`Builder::offer`] each, [`Builder::choose`], then
//! [`Chosen::rows`] of each again, in the same order. Pure and deterministic: the same sources in the same order with the
//! same settings give the same rows and the same manifest.

use std::collections::{BTreeMap, HashMap};

use espalier_core::error::FieldError;
use espalier_core::trace::edits::Corrections;
use espalier_core::trace::sha256_hex;
use espalier_qwen3_text::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::filter::Filter;
use crate::manifest::{DropReason, SourceEntry};
use crate::near::{Index, Signature, digest};
use crate::recorded::{Drift, RowsOptions, rows};
use crate::render::Renderer;
use crate::row::{Row, Split};
use crate::source::Source;
use crate::unroll::{Unroll, cuts};

/// Most sources of one data set: the first pass keeps about a kilobyte of each.
pub const SOURCES_MAX: usize = 1_000_000;

/// How a data set is built. The default keeps everything but duplicates and holds a tenth of the tasks out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BuildSpec {
    /// Which conversations are wanted; absent: all.
    #[serde(rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
    /// How they become rows.
    pub unroll: Unroll,
    /// Whether hints stay in.
    pub keep_hints: bool,
    /// How like each other two conversations are, from 0 to 1, that count as the same; below 0.7 pairs may be missed.
    pub near: f64,
    /// Whether near duplicates stay in; they are then on one side of the split.
    pub keep_near: bool,
    /// Most conversations of one task kind; absent: any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_kind: Option<usize>,
    /// The share of tasks that is held out, in [0, 1).
    pub eval_share: f64,
    /// Of the choice of tasks that are held out, and of conversations where there are too many of a kind.
    pub seed: u64,
    /// The model whose tokenizer its tokens are of; absent: Qwen3's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
}

impl Default for BuildSpec {
    fn default() -> Self {
        Self {
            filter: None,
            unroll: Unroll::default(),
            keep_hints: false,
            near: 0.9,
            keep_near: false,
            max_per_kind: None,
            eval_share: 0.1,
            seed: 3407,
            tokenizer: None,
        }
    }
}

impl BuildSpec {
    /// Whether every value obeys its rule.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<(), FieldError> {
        if !(0.0..1.0).contains(&self.eval_share) {
            return Err(FieldError::new(
                "eval_share",
                self.eval_share,
                "must be in [0, 1)",
            ));
        }
        if !(0.5..=1.0).contains(&self.near) {
            return Err(FieldError::new("near", self.near, "must be in [0.5, 1]"));
        }
        if self.max_per_kind == Some(0) {
            return Err(FieldError::new("max_per_kind", 0, "must be at least 1"));
        }
        Ok(())
    }
}

/// The first pass.
#[derive(Debug)]
pub struct Builder {
    spec: BuildSpec,
    tokenizer: Tokenizer,
    entries: Vec<SourceEntry>,
    /// What is still wanted, in order.
    wanted: Vec<Wanted>,
    exact: HashMap<[u8; 32], usize>,
    near: Index,
    tasks: Tasks,
}

#[derive(Debug)]
struct Wanted {
    /// Index among the entries.
    entry: usize,
    task: usize,
    kind: Option<String>,
}

impl Builder {
    /// Begins a data set.
    ///
    /// # Errors
    /// A setting that breaks its rule.
    pub fn new(spec: BuildSpec, tokenizer: &Tokenizer) -> Result<Self, FieldError> {
        spec.check()?;
        Ok(Self {
            spec,
            tokenizer: tokenizer.clone(),
            entries: Vec::new(),
            wanted: Vec::new(),
            exact: HashMap::new(),
            near: Index::default(),
            tasks: Tasks::default(),
        })
    }

    /// Looks at one source, which `name` names in the manifest.
    ///
    /// # Errors
    /// There are too many.
    pub fn offer(&mut self, name: &str, source: &Source) -> Result<(), FieldError> {
        let fate = self.judge(source);
        self.enter(name, fate)
    }

    /// Enters a source that cannot be read.
    ///
    /// # Errors
    /// There are too many.
    pub fn offer_unreadable(&mut self, name: &str, error: &str) -> Result<(), FieldError> {
        self.enter(name, Some((DropReason::Unreadable, error.to_owned())))
    }

    fn enter(
        &mut self,
        name: &str,
        dropped: Option<(DropReason, String)>,
    ) -> Result<(), FieldError> {
        if self.entries.len() >= SOURCES_MAX {
            let rule = format!("must be at most {SOURCES_MAX}");
            return Err(FieldError::new("sources", self.entries.len() + 1, rule));
        }
        let mut entry = SourceEntry::new(name);
        if let Some((reason, detail)) = dropped {
            entry.drop(reason, detail);
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Why a source is dropped, if it is.
    fn judge(&mut self, source: &Source) -> Option<(DropReason, String)> {
        if source.facts.rejected {
            return Some((DropReason::Rejected, String::new()));
        }
        if cuts(&source.messages, self.spec.unroll).is_empty() {
            return Some((DropReason::NothingTrained, String::new()));
        }
        let filter = self.spec.filter.as_ref();
        if filter.is_some_and(|filter| !filter.admits(source)) {
            return Some((DropReason::Filtered, String::new()));
        }
        let entry = self.entries.len();
        let first = *self.exact.entry(digest(source)).or_insert(entry);
        if first != entry {
            return Some((DropReason::Duplicate, self.entries[first].source.clone()));
        }
        let signature = Signature::of(source, &self.tokenizer);
        let like = self.near.like(&signature, self.spec.near);
        if let Some(&first) = like.first().filter(|_| !self.spec.keep_near) {
            let first = self.wanted[first].entry;
            return Some((
                DropReason::NearDuplicate,
                self.entries[first].source.clone(),
            ));
        }
        self.near.add(signature);
        let task = self.tasks.enter(source);
        for other in like {
            self.tasks.join(task, self.wanted[other].task);
        }
        let kind = source.facts.task_kind.clone();
        self.wanted.push(Wanted { entry, task, kind });
        None
    }

    /// Decides which sources are in, and on which side.
    pub fn choose(mut self) -> Chosen {
        self.balance();
        let sides = self
            .tasks
            .split(&self.spec, self.wanted.iter().map(|w| w.task));
        let mut tasks = [0; 2];
        for split in sides.values() {
            tasks[usize::from(*split == Split::Eval)] += 1;
        }
        for wanted in &self.wanted {
            let side = self.tasks.root(wanted.task);
            self.entries[wanted.entry].split = sides.get(&side).copied();
        }
        Chosen {
            spec: self.spec,
            tokenizer_sha256: self.tokenizer.sha256().to_owned(),
            entries: self.entries,
            tasks,
            drift: Drift::default(),
        }
    }

    /// Drops what is too much of a kind: who stays is told by a hash, so that it does not depend on the order.
    fn balance(&mut self) {
        let Some(max) = self.spec.max_per_kind else {
            return;
        };
        let mut kinds: BTreeMap<Option<String>, Vec<(String, usize)>> = BTreeMap::new();
        for (at, wanted) in self.wanted.iter().enumerate() {
            let rank = drawn(self.spec.seed, &self.entries[wanted.entry].source);
            kinds
                .entry(wanted.kind.clone())
                .or_default()
                .push((rank, at));
        }
        let mut over: Vec<usize> = Vec::new();
        for (kind, mut members) in kinds {
            members.sort_unstable();
            for (_, at) in members.into_iter().skip(max) {
                let detail = kind.clone().unwrap_or_default();
                self.entries[self.wanted[at].entry].drop(DropReason::OverKind, detail);
                over.push(at);
            }
        }
        over.sort_unstable();
        let mut at = 0;
        self.wanted.retain(|_| {
            at += 1;
            over.binary_search(&(at - 1)).is_err()
        });
    }
}

/// The second pass.
#[derive(Debug)]
pub struct Chosen {
    pub(crate) spec: BuildSpec,
    pub(crate) tokenizer_sha256: String,
    pub(crate) entries: Vec<SourceEntry>,
    /// Groups of tasks that are trained on, and that are held out.
    pub(crate) tasks: [usize; 2],
    pub(crate) drift: Drift,
}

impl Chosen {
    /// Writes down what source `n` was read from: the SHA-256 of the object, in hex, and how it was corrected.
    pub fn read_from(&mut self, n: usize, sha256: &str, corrections: Option<&Corrections>) {
        if let Some(entry) = self.entries.get_mut(n) {
            entry.sha256 = Some(sha256.to_owned());
            entry.corrections = corrections.cloned();
        }
    }

    /// The side of the `n`th source; none where it is dropped and need not be read again.
    pub fn split(&self, n: usize) -> Option<Split> {
        self.entries.get(n)?.split
    }

    /// The rows of the `n`th source, none where it is dropped. One that cannot be rendered is dropped now.
    pub fn rows(&mut self, n: usize, source: &Source, renderer: &mut Renderer) -> Vec<Row> {
        let Some(split) = self.split(n) else {
            return Vec::new();
        };
        let options = RowsOptions {
            unroll: self.spec.unroll,
            keep_hints: self.spec.keep_hints,
        };
        match rows(source, options, split, renderer) {
            Ok((rows, drift)) => {
                self.drift.add(drift);
                self.entries[n].rows = rows.len();
                rows
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let cause =
                    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
                self.entries[n].drop(DropReason::Unrenderable, cause);
                Vec::new()
            }
        }
    }

    /// Drops the `n`th source, which could be read in the first pass and cannot any more.
    pub fn unreadable(&mut self, n: usize, error: &str) {
        if let Some(entry) = self.entries.get_mut(n) {
            entry.drop(DropReason::Unreadable, error.to_owned());
        }
    }
}

/// Tasks, joined where conversations of them are alike: a group is on one side of the split.
#[derive(Debug, Default)]
struct Tasks {
    numbers: HashMap<String, usize>,
    names: Vec<String>,
    /// The split that a job named.
    named: Vec<Option<Split>>,
    parents: Vec<usize>,
}

impl Tasks {
    fn enter(&mut self, source: &Source) -> usize {
        let key = source.task_key();
        let next = self.names.len();
        let task = *self.numbers.entry(key.clone()).or_insert(next);
        if task == next {
            self.names.push(key);
            self.named.push(None);
            self.parents.push(task);
        }
        // A task that is held out once is held out.
        self.named[task] = self.named[task].max(source.facts.split);
        task
    }

    fn root(&self, mut task: usize) -> usize {
        while self.parents[task] != task {
            task = self.parents[task];
        }
        task
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        // The earlier one stands for both, so that paths stay short.
        let (first, last) = (a.min(b), a.max(b));
        self.parents[last] = first;
    }

    /// The side of each group that has one of `tasks`. By a hash of its first name, so that a task keeps its side when
    /// others come or go.
    fn split(
        &self,
        spec: &BuildSpec,
        tasks: impl Iterator<Item = usize>,
    ) -> BTreeMap<usize, Split> {
        let mut groups: BTreeMap<usize, (Option<Split>, &str)> = BTreeMap::new();
        for task in tasks {
            let name = self.names[task].as_str();
            let group = groups.entry(self.root(task)).or_insert((None, name));
            *group = (group.0.max(self.named[task]), group.1.min(name));
        }
        let mut drawn: Vec<(String, usize)> = Vec::new();
        let mut sides = BTreeMap::new();
        for (&group, (named, name)) in &groups {
            let rank = self::drawn(spec.seed, name);
            let held_out = share(&rank) < spec.eval_share;
            let side = named.unwrap_or(if held_out { Split::Eval } else { Split::Train });
            sides.insert(group, side);
            if named.is_none() {
                drawn.push((rank, group));
            }
        }
        let none_held_out = !sides.values().any(|side| *side == Split::Eval);
        if none_held_out && spec.eval_share > 0.0 && sides.len() > 1 {
            // Too few to be drawn by chance: the first that would be.
            let first = drawn.into_iter().min().map(|(_, group)| group);
            sides.extend(first.map(|group| (group, Split::Eval)));
        }
        sides
    }
}

/// A name's place in the draw, in hex.
fn drawn(seed: u64, name: &str) -> String {
    sha256_hex(format!("{seed}\n{name}").as_bytes())
}

/// The first 52 bits of a place in the draw as a share of all: no more fit into a float.
fn share(rank: &str) -> f64 {
    let bits = u64::from_str_radix(&rank[..13], 16).unwrap_or_default();
    bits as f64 / (1_u64 << 52) as f64
}

#[cfg(test)]
mod tests;
