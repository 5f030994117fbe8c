//! How far adapters are followed: what the store says of them, what the engine holds, and what is served. It decides what
//! is to be loaded, and who answers to which name; it loads nothing and reads no store.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_core::adapter::AdapterVersion;
use espalier_core::id::{AdapterName, ProjectId};

use super::look::Seen;
use super::option::Followed;
use super::roles::{Roles, version_name, within};
use crate::api::backend::{Candidate, Following};
use crate::serve::adapters::{Adapters, Answers, Held};

/// Longest wait between two tries of a version that does not load.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// How long a version that has no role any more is served after somebody asked for it by name: an evaluation of it may be under
/// way, whose rollouts wait for tools between their calls.
const ASKED_FOR: Duration = Duration::from_secs(600);

/// A version that is to be loaded.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Order {
    /// Its project.
    pub project: ProjectId,
    /// What it is made of.
    pub record: AdapterVersion,
}

/// All adapters that are followed, by their names: a name is followed once.
pub(super) struct States {
    all: BTreeMap<AdapterName, State>,
    /// How long a version that did not load is left alone, at least.
    wait_min: Duration,
    /// Options, by their places, that cannot look.
    blind: BTreeSet<usize>,
    /// How many were left out, when that was last looked at.
    left_out: usize,
}

/// One adapter.
struct State {
    project: ProjectId,
    name: AdapterName,
    /// The option that follows it, by its place among all, and whether it names it.
    place: usize,
    is_named: bool,
    seen: Seen,
    look_error: Option<String>,
    /// What of its roles there is room for.
    wanted: Roles,
    /// What answers.
    served: Roles,
    held: BTreeMap<u32, Arc<Held>>,
    loading: BTreeSet<u32>,
    failed: BTreeMap<u32, Failed>,
    /// Names that it cannot have, and why.
    refused: BTreeMap<String, String>,
    /// The errors that the log has.
    said: (Option<String>, Option<String>),
}

/// A version that did not load.
struct Failed {
    why: String,
    /// How often in a row.
    times: u32,
    /// When it is tried again.
    again_at: Instant,
}

impl States {
    /// Of what the options name; what they follow beside that turns up in the store. What did not load is tried again after
    /// `wait_min` and more.
    pub(super) fn new(options: &[Followed], wait_min: Duration) -> Self {
        let named = |(place, of): (usize, &Followed)| {
            let name = of.name()?.clone();
            let state = State::new(&of.project, &name, place, true);
            Some((name, state))
        };
        Self {
            all: options.iter().enumerate().filter_map(named).collect(),
            wait_min,
            blind: BTreeSet::new(),
            left_out: 0,
        }
    }

    /// What the option at `place` saw.
    pub(super) fn saw(&mut self, of: &Followed, place: usize, seen: Vec<(AdapterName, Seen)>) {
        self.blind.remove(&place);
        for state in self.all.values_mut().filter(|state| state.place == place) {
            state.look_error = None;
        }
        for (name, seen) in seen {
            let state = self.all.entry(name.clone());
            let state = state.or_insert_with(|| State::new(&of.project, &name, place, false));
            // Another option had the name first.
            if state.place == place {
                state.sees(seen);
            }
        }
    }

    /// The option at `place` could not look.
    pub(super) fn saw_nothing(&mut self, of: &Followed, place: usize, error: &str) {
        if self.blind.insert(place) {
            tracing::warn!(follow = %of, error, "the store does not say what is followed");
        }
        for state in self.all.values_mut().filter(|state| state.place == place) {
            state.look_error = Some(error.to_owned());
        }
    }

    /// What came of an order.
    pub(super) fn loaded(&mut self, order: &Order, loaded: Result<Held, String>, now: Instant) {
        let AdapterVersion { name, n, .. } = &order.record;
        let Some(state) = self.all.get_mut(name) else {
            return;
        };
        state.loading.remove(n);
        match loaded {
            Ok(held) => {
                state.failed.remove(n);
                state.held.insert(*n, Arc::new(held));
            }
            Err(why) => {
                let times = state.failed.get(n).map_or(1, |failed| failed.times + 1);
                let wait = self.wait_min * 2u32.saturating_pow(times.min(10));
                let again_at = now + wait.min(WAIT_MAX).max(self.wait_min);
                state.failed.insert(
                    *n,
                    Failed {
                        why,
                        times,
                        again_at,
                    },
                );
            }
        }
    }

    /// Serves what can be served, and gives what is to be loaded for the rest.
    pub(super) fn settle(&mut self, adapters: &Adapters, now: Instant) -> Vec<Order> {
        let mut spare = self.make_room(adapters.room());
        let mut orders = Vec::new();
        for state in self.all.values_mut() {
            let kept = state.kept(now, spare);
            spare -= kept.len();
            state.serve(adapters, &kept);
            orders.extend(state.orders(now));
            state.say();
        }
        orders
    }

    /// Those that are named come first, in their order, then those whose newest version is most recent. Gives the places that
    /// are left.
    fn make_room(&mut self, places: usize) -> usize {
        let mut states: Vec<&mut State> = self.all.values_mut().collect();
        states.sort_by_key(|state| {
            let newest = state.seen.newest.and_then(|n| state.seen.records.get(&n));
            let since = newest.map(|record| record.created_at_us);
            (
                !state.is_named,
                state.is_named.then_some(state.place),
                Reverse(since),
            )
        });
        let wanted: Vec<Roles> = states.iter().map(|state| state.seen.roles()).collect();
        let (mut left_out, mut spare) = (0, places);
        for (state, fits) in states.iter_mut().zip(within(&wanted, places)) {
            spare = spare.saturating_sub(fits.versions().len());
            state.wanted = fits;
            left_out += usize::from(state.is_left_out());
        }
        if left_out > 0 && self.left_out == 0 {
            tracing::warn!(
                followed = states.len() - left_out,
                left_out,
                "`--max-loras` leaves no room for all adapters: those whose newest version is most recent are served"
            );
        }
        self.left_out = left_out;
        spare
    }

    /// What is followed, for `/v1/adapters`.
    pub(super) fn told(&self) -> Vec<Following> {
        let states = self.all.values();
        let told = states.filter(|state| !state.is_left_out());
        told.map(State::told).collect()
    }
}

impl State {
    fn new(project: &ProjectId, name: &AdapterName, place: usize, is_named: bool) -> Self {
        Self {
            project: project.clone(),
            name: name.clone(),
            place,
            is_named,
            seen: Seen::default(),
            look_error: None,
            wanted: Roles::default(),
            served: Roles::default(),
            held: BTreeMap::new(),
            loading: BTreeSet::new(),
            failed: BTreeMap::new(),
            refused: BTreeMap::new(),
            said: (None, None),
        }
    }

    /// Whether it is one of all, and there is no room for it.
    fn is_left_out(&self) -> bool {
        !self.is_named && self.wanted == Roles::default()
    }

    fn sees(&mut self, seen: Seen) {
        if seen.roles() != self.seen.roles() {
            // Whatever is new is tried at once.
            self.failed.clear();
        }
        self.seen = seen;
    }

    /// Versions without a role that are asked for, as far as there is room, the newest first.
    fn kept(&self, now: Instant, spare: usize) -> Vec<u32> {
        let wanted = self.wanted.versions();
        let held = self.held.iter().rev();
        let asked =
            held.filter(|(n, held)| !wanted.contains(n) && held.asked.is_within(ASKED_FOR, now));
        asked.map(|(n, _)| *n).take(spare).collect()
    }

    /// Lets versions answer that are there, those that are `kept` by their own names alone, and lets go of the others.
    fn serve(&mut self, adapters: &Adapters, kept: &[u32]) {
        let before = self.served;
        self.served = self
            .wanted
            .served(before, |version| self.held.contains_key(&version));
        let mut names = self.served.names(&self.name, &self.held);
        for version in kept {
            if let Some(held) = self.held.get(version) {
                let name = version_name(&self.name, *version);
                names.entry(name).or_insert_with(|| Answers {
                    held: Arc::clone(held),
                    canary: None,
                });
            }
        }
        self.refused = adapters.follow(&self.to_string(), names);
        let (wanted, served) = (self.wanted.versions(), self.served.versions());
        self.held
            .retain(|n, _| wanted.contains(n) || served.contains(n) || kept.contains(n));
        self.failed.retain(|version, _| wanted.contains(version));
        if self.served != before {
            tracing::info!(
                adapter = %self,
                latest = self.served.latest,
                canary = self.served.canary.map(|split| split.canary.version),
                newest = self.served.newest,
                "what is served has changed"
            );
        }
    }

    /// What is wanted, is not there, and may be tried.
    fn orders(&mut self, now: Instant) -> Vec<Order> {
        let mut orders = Vec::new();
        for version in self.wanted.versions() {
            let waits = self
                .failed
                .get(&version)
                .is_some_and(|failed| now < failed.again_at);
            let is_refused = self.seen.refused.contains_key(&version);
            if waits || is_refused || self.held.contains_key(&version) {
                continue;
            }
            let Some(record) = self.seen.records.get(&version) else {
                continue;
            };
            if self.loading.insert(version) {
                orders.push(Order {
                    project: self.project.clone(),
                    record: record.clone(),
                });
            }
        }
        orders
    }

    /// Why what is latest is not what answers, or not all of it.
    fn error(&self) -> Option<String> {
        let Roles { latest, canary, .. } = self.seen.roles();
        let canary = canary.map(|split| split.canary.version);
        let absent = latest.into_iter().chain(canary);
        let absent = absent.filter_map(|version| self.why_not(version));
        let candidate = self.candidate().map(|n| version_name(&self.name, n));
        let names = self.refused.iter();
        let names = names.filter(|(name, _)| Some(*name) != candidate.as_ref());
        let all = self.seen.entry_error.iter().cloned().chain(absent);
        let all: Vec<String> = all.chain(names.map(|(_, why)| why.clone())).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// The newest version, where it is not the one that is latest.
    fn candidate(&self) -> Option<u32> {
        let Roles { latest, newest, .. } = self.seen.roles();
        newest.filter(|_| newest != latest)
    }

    /// Why a version is not there; none: it is, or it is on its way.
    fn why_not(&self, version: u32) -> Option<String> {
        if self.held.contains_key(&version) {
            return None;
        }
        let failed = self.failed.get(&version).map(|failed| &failed.why);
        if let Some(why) = self.seen.refused.get(&version).or(failed) {
            return Some(why.clone());
        }
        let fits = self.wanted.versions().contains(&version);
        (!fits).then(|| format!("`--max-loras` leaves no room for v{version}"))
    }

    fn candidate_error(&self) -> Option<String> {
        let version = self.candidate()?;
        let refused = || {
            self.refused
                .get(&version_name(&self.name, version))
                .cloned()
        };
        self.why_not(version).or_else(refused)
    }

    /// Tells the log of errors that are new.
    fn say(&mut self) {
        let now = (self.error(), self.candidate_error());
        let (latest, newest) = (self.seen.roles().latest, self.candidate());
        if let Some(error) = now.0.as_ref().filter(|_| now.0 != self.said.0) {
            tracing::warn!(
                adapter = %self,
                latest,
                served = self.served.latest,
                error,
                "latest is not served as it should be, and what was served is served on"
            );
        }
        if let Some(error) = now.1.as_ref().filter(|_| now.1 != self.said.1) {
            tracing::warn!(adapter = %self, version = newest, error, "the newest version is not served");
        }
        self.said = now;
    }

    fn told(&self) -> Following {
        let own = self.refused.contains_key(self.name.as_str());
        Following {
            name: self.name.to_string(),
            project: self.project.to_string(),
            served: self.served.latest.filter(|_| !own),
            latest: self.seen.roles().latest,
            canary: self.served.canary.map(|split| split.canary),
            candidate: self.candidate().map(|version| Candidate {
                version,
                error: self.candidate_error(),
            }),
            error: self.look_error.clone().or_else(|| self.error()),
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.project, self.name)
    }
}
