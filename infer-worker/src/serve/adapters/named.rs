//! The names that requests may give: what answers to each, and who holds it. Pure: nothing is loaded here.
//!
//! A name has one holder. A person loads it, on the command line or over HTTP, or the follower does, for one adapter of
//! the store. Whoever has it keeps it until he gives it up: nobody takes it from the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use espalier_core::adapter::Canary;

use crate::api::backend::{AdapterInfo, Model, Target};
use crate::engine::Adapter;

/// An adapter in the engine, and what is said of it. It stays there until the last request that began with it has ended.
#[derive(Debug)]
pub(in crate::serve) struct Held {
    /// What answers call it.
    pub called: String,
    /// Holds it in the engine.
    pub handle: Arc<Adapter>,
    /// When it was loaded, in seconds since 1970.
    pub created_s: u64,
    /// What it is made of.
    pub info: AdapterInfo,
    /// When somebody last asked for this version by its name.
    pub asked: Asked,
}

/// A moment that requests move on.
#[derive(Debug, Default)]
pub(in crate::serve) struct Asked(Mutex<Option<Instant>>);

impl Asked {
    fn note(&self, now: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Whether it was less than `ago` before `now`.
    pub fn is_within(&self, ago: Duration, now: Instant) -> bool {
        let asked = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.is_some_and(|asked| now.saturating_duration_since(asked) < ago)
    }
}

/// What answers to a name.
#[derive(Clone, Debug)]
pub(in crate::serve) struct Answers {
    /// The adapter.
    pub held: Arc<Held>,
    /// Another one, for the share of conversations that an entry of the log gives it.
    pub canary: Option<(Split, Arc<Held>)>,
}

/// A canary, and the number of the entry that names it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::serve) struct Split {
    /// Which version, and its share.
    pub canary: Canary,
    /// The entry.
    pub seq: u64,
}

impl Answers {
    /// What answers the conversation that begins with `opening`, to a request for `name`.
    pub(super) fn target(&self, name: &str, opening: &dyn Fn() -> Vec<u8>) -> Target {
        let held = match &self.canary {
            Some((split, held)) if split.canary.answers(split.seq, &opening()) => held,
            _ => &self.held,
        };
        if held.called == name {
            held.asked.note(Instant::now());
        }
        Target {
            name: name.to_owned(),
            called: held.called.clone(),
            adapter: Some(Arc::clone(&held.handle)),
            digest: Some(held.info.digest.clone()),
        }
    }
}

/// Who holds a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A person.
    Person,
    /// The follower, for the adapter `project/name`.
    Follower(String),
}

/// All names.
#[derive(Default)]
pub(super) struct Named {
    names: BTreeMap<String, (Holder, Answers)>,
    /// How often people loaded each name, also those that are gone: a version never comes back.
    loads: BTreeMap<String, u64>,
}

impl Named {
    /// In order.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.names.keys()
    }

    /// The projects of those that are followed, by name.
    pub(super) fn projects(&self) -> BTreeMap<String, String> {
        let project = |(name, (holder, _)): (&String, &(Holder, Answers))| match holder {
            Holder::Person => None,
            Holder::Follower(of) => {
                let (project, _) = of.split_once('/')?;
                Some((name.clone(), project.to_owned()))
            }
        };
        self.names.iter().filter_map(project).collect()
    }

    /// What is served, by name.
    pub(super) fn models(&self) -> Vec<Model> {
        let model = |(name, (_, answers)): (&String, &(Holder, Answers))| Model {
            name: name.clone(),
            created_s: answers.held.created_s,
            adapter: Some(answers.held.info.clone()),
        };
        self.names.iter().map(model).collect()
    }

    pub(super) fn answers(&self, name: &str) -> Option<Answers> {
        Some(self.names.get(name)?.1.clone())
    }

    pub(super) fn holder(&self, name: &str) -> Option<&Holder> {
        Some(&self.names.get(name)?.0)
    }

    /// Places that names take in the engine: several of one adapter take one.
    pub(super) fn places(&self) -> usize {
        self.places_of(|_| true)
    }

    /// Those of names that people hold.
    pub(super) fn places_of_people(&self) -> usize {
        self.places_of(|holder| *holder == Holder::Person)
    }

    fn places_of(&self, counts: impl Fn(&Holder) -> bool) -> usize {
        let counted = self.names.values().filter(|(holder, _)| counts(holder));
        let held = counted.flat_map(|(_, answers)| {
            let canary = answers.canary.as_ref().map(|(_, held)| held);
            std::iter::once(&answers.held).chain(canary)
        });
        held.map(|held| Arc::as_ptr(&held.handle))
            .collect::<BTreeSet<_>>()
            .len()
    }

    /// How many loads of a name there were, with the one that is to come.
    pub(super) fn next_load(&mut self, name: &str) -> u64 {
        let loads = self.loads.entry(name.to_owned()).or_default();
        *loads += 1;
        *loads
    }

    /// Gives a name to a holder, or lets it answer with something else from now on.
    pub(super) fn set(&mut self, name: String, holder: Holder, answers: Answers) {
        self.names.insert(name, (holder, answers));
    }

    /// Whether there was such a name.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.names.remove(name).is_some()
    }

    /// Takes a holder all names but some.
    pub(super) fn release(&mut self, holder: &Holder, but: impl Fn(&str) -> bool) {
        let keeps = |name: &String, (of, _): &mut (Holder, Answers)| of != holder || but(name);
        self.names.retain(keeps);
    }
}

#[cfg(test)]
pub(in crate::serve) mod tests {
    use super::*;
    use crate::executor::AdapterSlot;

    /// An adapter that answers call `called`.
    pub(in crate::serve) fn held(called: &str) -> Arc<Held> {
        Arc::new(Held {
            called: called.to_owned(),
            handle: Arc::new(Adapter::new(AdapterSlot(1), [1; 32])),
            created_s: 1,
            info: AdapterInfo {
                digest: format!("digest of {called}"),
                path: called.to_owned(),
                rank: 4,
                version: 1,
                doubt: None,
            },
            asked: Asked::default(),
        })
    }

    fn alone(held: &Arc<Held>) -> Answers {
        Answers {
            held: Arc::clone(held),
            canary: None,
        }
    }

    #[test]
    fn several_names_of_an_adapter_take_one_place() {
        let [third, fourth, own] = ["shop@v3", "shop@v4", "own"].map(held);
        let follower = Holder::Follower("p/shop".to_owned());
        let mut named = Named::default();
        named.set("shop".to_owned(), follower.clone(), alone(&third));
        named.set("shop@v3".to_owned(), follower.clone(), alone(&third));
        named.set("own".to_owned(), Holder::Person, alone(&own));
        assert_eq!((named.places(), named.places_of_people()), (2, 1));
        let split = Split {
            canary: Canary {
                version: 4,
                share: 0.5,
            },
            seq: 1,
        };
        let both = Answers {
            canary: Some((split, fourth)),
            ..alone(&third)
        };
        named.set("shop".to_owned(), follower.clone(), both);
        assert_eq!(named.places(), 3);
        named.release(&follower, |name| name == "shop@v3");
        assert_eq!(named.names().collect::<Vec<_>>(), ["own", "shop@v3"]);
        assert_eq!(named.places(), 2);
    }

    #[test]
    fn a_canary_answers_its_conversations_under_its_own_name() {
        let split = Split {
            canary: Canary {
                version: 4,
                share: 0.5,
            },
            seq: 7,
        };
        let answers = Answers {
            held: held("shop@v3"),
            canary: Some((split, held("shop@v4"))),
        };
        for n in 0..50 {
            let opening = format!("hello {n}").into_bytes();
            let target = answers.target("shop", &|| opening.clone());
            let expected = match split.canary.answers(7, &opening) {
                true => "shop@v4",
                false => "shop@v3",
            };
            assert_eq!((&*target.name, &*target.called), ("shop", expected));
            assert_eq!(target.digest, Some(format!("digest of {expected}")));
        }
        let asked = |_: ()| -> Vec<u8> { panic!("nothing hangs on it") };
        let target = alone(&held("own")).target("own", &|| asked(()));
        assert_eq!(target.called, "own");
    }
}
