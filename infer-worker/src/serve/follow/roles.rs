//! Which versions of an adapter are served, and by which names. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_core::adapter::LatestEntry;
use espalier_core::id::AdapterName;
use espalier_core::spec::AdapterRef;

use crate::serve::adapters::{Answers, Held, Split};

/// What versions of an adapter are for. The same one may be for several things.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Roles {
    /// Answers to the adapter's own name.
    pub latest: Option<u32>,
    /// Answers to it for a share of conversations.
    pub canary: Option<Split>,
    /// The newest one, which can be evaluated before it becomes latest.
    pub newest: Option<u32>,
}

impl Roles {
    /// What the store asks for: the entry that counts, and the number of the newest version.
    pub(super) fn of(entry: Option<&LatestEntry>, newest: Option<u32>) -> Self {
        let split = |entry: &LatestEntry| {
            let seq = entry.seq;
            entry.canary.map(|canary| Split { canary, seq })
        };
        Self {
            latest: entry.map(|entry| entry.version),
            canary: entry.and_then(split),
            newest,
        }
    }

    fn canary_version(&self) -> Option<u32> {
        Some(self.canary?.canary.version)
    }

    /// Its versions, each once, the most important one first.
    pub(super) fn versions(&self) -> Vec<u32> {
        let mut versions = Vec::new();
        for version in [self.latest, self.canary_version(), self.newest]
            .into_iter()
            .flatten()
        {
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
        versions
    }

    /// As much of it as `places` versions are.
    pub(super) fn within(self, places: usize) -> Self {
        let versions = self.versions();
        let fits = |version: &u32| versions.iter().take(places).any(|fits| fits == version);
        Self {
            latest: self.latest.filter(fits),
            canary: self.canary.filter(|split| fits(&split.canary.version)),
            newest: self.newest.filter(fits),
        }
    }

    /// What is served on the way from `before` to this, as far as versions are there: each stays until the one that takes
    /// its place has come.
    pub(super) fn served(self, before: Self, is_there: impl Fn(u32) -> bool) -> Self {
        let place = |new: Option<u32>, old: Option<u32>| match new? {
            new if is_there(new) => Some(new),
            _ => old.filter(|old| is_there(*old)),
        };
        let latest = place(self.latest, before.latest);
        Self {
            latest,
            // Beside the version that its entry names, or not at all.
            canary: self
                .canary
                .filter(|split| latest == self.latest && is_there(split.canary.version)),
            newest: place(self.newest, before.newest),
        }
    }

    /// What answers to which name. Versions that are not in `held` have none.
    pub(super) fn names(
        &self,
        name: &AdapterName,
        held: &BTreeMap<u32, Arc<Held>>,
    ) -> BTreeMap<String, Answers> {
        let answers = |version: u32| {
            let held = Arc::clone(held.get(&version)?);
            let canary = None;
            Some(Answers { held, canary })
        };
        let own = self.latest.and_then(answers).map(|latest| Answers {
            canary: self.canary.and_then(|split| {
                let held = held.get(&split.canary.version)?;
                Some((split, Arc::clone(held)))
            }),
            ..latest
        });
        let own = own.map(|answers| (name.to_string(), answers));
        let versions = self.versions().into_iter();
        let versions = versions.filter_map(|n| Some((version_name(name, n), answers(n)?)));
        own.into_iter().chain(versions).collect()
    }
}

/// `NAME@vN`.
pub(super) fn version_name(name: &AdapterName, version: u32) -> String {
    let name = name.clone();
    AdapterRef { name, version }.to_string()
}

/// What of each adapter fits into so many places, the first ones first.
pub(super) fn within(wanted: &[Roles], mut places: usize) -> Vec<Roles> {
    let mut fitting = Vec::new();
    for roles in wanted {
        let fits = roles.within(places);
        places -= fits.versions().len();
        fitting.push(fits);
    }
    fitting
}

#[cfg(test)]
mod tests {
    use espalier_core::adapter::Canary;

    use super::*;
    use crate::serve::adapters::held;

    fn roles(latest: u32, canary: u32, newest: u32) -> Roles {
        let some = |version| (version > 0).then_some(version);
        let split = |version| Split {
            canary: Canary {
                version,
                share: 0.1,
            },
            seq: 9,
        };
        Roles {
            latest: some(latest),
            canary: some(canary).map(split),
            newest: some(newest),
        }
    }

    #[test]
    fn latest_comes_before_the_canary_and_that_before_the_newest() {
        for (wanted, versions) in [
            (roles(3, 4, 5), &[3, 4, 5][..]),
            (roles(3, 4, 4), &[3, 4]),
            (roles(3, 0, 3), &[3]),
            (roles(0, 0, 1), &[1]),
            (Roles::default(), &[]),
        ] {
            assert_eq!(wanted.versions(), versions);
        }
        for (wanted, places, expected) in [
            (roles(3, 4, 5), 3, roles(3, 4, 5)),
            (roles(3, 4, 5), 2, roles(3, 4, 0)),
            (roles(3, 4, 4), 2, roles(3, 4, 4)),
            (roles(3, 4, 4), 1, roles(3, 0, 0)),
            (roles(3, 0, 3), 1, roles(3, 0, 3)),
            (roles(3, 0, 3), 0, Roles::default()),
        ] {
            assert_eq!(wanted.within(places), expected, "{wanted:?}");
        }
        let all = [roles(1, 0, 2), roles(0, 0, 7), roles(4, 0, 5)];
        let fitting = [all[0], all[1], roles(4, 0, 0)];
        assert_eq!(within(&all, 4), fitting);
        assert_eq!(within(&all, 2)[1..], [Roles::default(); 2]);
    }

    #[test]
    fn a_version_is_served_until_the_next_one_has_come() {
        for (wanted, before, there, expected) in [
            // From the start: each as it comes.
            (roles(3, 0, 4), roles(0, 0, 0), &[][..], roles(0, 0, 0)),
            (roles(3, 0, 4), roles(0, 0, 0), &[4], roles(0, 0, 4)),
            (roles(3, 0, 4), roles(0, 0, 4), &[3, 4], roles(3, 0, 4)),
            // The one before is served on, of both kinds.
            (roles(4, 0, 5), roles(3, 0, 4), &[3, 4], roles(4, 0, 4)),
            (roles(5, 0, 5), roles(3, 0, 4), &[3, 4], roles(3, 0, 4)),
            (roles(5, 0, 5), roles(3, 0, 4), &[3, 4, 5], roles(5, 0, 5)),
            // A canary stands beside its own latest.
            (roles(3, 4, 4), roles(3, 0, 3), &[3], roles(3, 0, 3)),
            (roles(3, 4, 4), roles(3, 0, 3), &[3, 4], roles(3, 4, 4)),
            (roles(4, 5, 5), roles(3, 0, 3), &[3, 5], roles(3, 0, 5)),
            // What is not wanted at all goes.
            (roles(0, 0, 0), roles(3, 4, 4), &[3, 4], roles(0, 0, 0)),
        ] {
            let is_there = |version| there.contains(&version);
            let served = wanted.served(before, is_there);
            assert_eq!(served, expected, "{wanted:?} after {before:?}: {there:?}");
        }
    }

    #[test]
    fn every_version_has_a_name_and_latest_has_the_adapters_own() {
        let name: AdapterName = "shop".parse().unwrap();
        let held: BTreeMap<u32, Arc<Held>> =
            [3, 4, 5].map(|n| (n, held(&version_name(&name, n)))).into();
        let of = |roles: Roles| {
            let names = roles.names(&name, &held).into_iter();
            let said = names.map(|(name, answers)| {
                let canary = answers.canary.map(|(_, held)| held.called.clone());
                (name, answers.held.called.clone(), canary)
            });
            said.collect::<Vec<_>>()
        };
        let [shop, third, fourth, fifth] =
            ["shop", "shop@v3", "shop@v4", "shop@v5"].map(str::to_owned);
        let one = |name: &String| (name.clone(), name.clone(), None);
        assert_eq!(of(roles(0, 0, 5)), [one(&fifth)]);
        let own = (shop.clone(), third.clone(), None);
        assert_eq!(of(roles(3, 0, 3)), [own.clone(), one(&third)]);
        assert_eq!(of(roles(3, 0, 5)), [own, one(&third), one(&fifth)]);
        assert_eq!(
            of(roles(3, 4, 5)),
            [
                (shop, third.clone(), Some(fourth.clone())),
                one(&third),
                one(&fourth),
                one(&fifth)
            ]
        );
    }
}
