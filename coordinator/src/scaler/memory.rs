//! What the plan remembers from look to look. Lost with the process: a coordinator that takes over counts the times of
//! idleness and absence anew, so that it ends nothing too early.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_core::id::WorkerId;
use espalier_core::time::Timestamp;

use super::plan::{Look, Seen, Why};
use super::provider::Instance;

/// How long an instance that was asked for counts though the provider does not list it: replies are lost, and lists lag.
const ASKED_FOR: Duration = Duration::from_secs(60);
/// How long an instance that the provider was told to end may be listed before it is told again.
const ENDED_FOR: Duration = Duration::from_secs(60);
/// The wait after the first failure of a pool; each further one doubles it.
const WAIT_FIRST: Duration = Duration::from_secs(10);
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// By id.
    instances: BTreeMap<String, Kept>,
    /// By name.
    asked: BTreeMap<String, Asked>,
    /// By pool.
    trouble: BTreeMap<String, Trouble>,
    /// The lowest and the highest price that was seen of an instance, by pool; $ per hour.
    prices: BTreeMap<String, (f64, f64)>,
    /// How many instances pools should have had of late: each less than those before it. By pool.
    wanted: BTreeMap<String, Vec<(Timestamp, u32)>>,
    /// Sessions of workers, by the name of their instance.
    sessions: BTreeMap<String, BTreeMap<WorkerId, Session>>,
    looked_at: Option<Timestamp>,
}

/// A session with a coordinator. A worker has one for each sort of jobs, and may lose them one by one.
#[derive(Clone, Debug)]
struct Session {
    first_at: Timestamp,
    /// The first look at which it was missing. Not the last one at which it was there: nobody may have looked for long.
    missing_since: Option<Timestamp>,
    /// Its instance was ended when it had no job and got none: the next one of that name has nothing to do with it.
    over: bool,
}

#[derive(Clone, Debug)]
struct Kept {
    /// When it last had a job, or might have had one.
    busy_at: Timestamp,
    /// The first look at which its worker was missing.
    away_since: Option<Timestamp>,
    known_at: Timestamp,
    /// It was there before the first look, so that nobody knows which sessions it has.
    adopted: bool,
    /// A worker has said that it is this instance.
    named: bool,
    /// It was decided that it goes.
    leaving: bool,
    /// Its failure is counted.
    failed: bool,
    /// When the provider was told to end it.
    ended_at: Option<Timestamp>,
}

#[derive(Clone, Debug)]
struct Asked {
    pool: String,
    at: Timestamp,
}

#[derive(Clone, Debug)]
struct Trouble {
    failures: u32,
    last: Timestamp,
}

impl Kept {
    /// Whether it is not known yet which sessions it has, any of which may have jobs.
    fn is_new(&self, now: Timestamp, lease: Duration) -> bool {
        self.adopted && now.since(self.known_at) < lease
    }
}

/// Whether a session is missing that may have jobs, since its leases may last.
fn misses(known: Option<&BTreeMap<WorkerId, Session>>, seen: Option<&Seen>) -> bool {
    known.is_some_and(|known| known.keys().any(|id| !has(seen, id)))
}

fn has(seen: Option<&Seen>, id: &WorkerId) -> bool {
    seen.is_some_and(|seen| seen.sessions().any(|session| session == id))
}

impl Trouble {
    fn wait(&self) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(16);
        (WAIT_FIRST * 2_u32.pow(doublings)).min(WAIT_MAX)
    }
}

impl Memory {
    /// Takes a look in, before it is decided upon.
    pub(super) fn see(&mut self, look: &Look<'_>) {
        let now = look.now;
        if self.looked_at.is_some_and(|at| now.since(at) >= look.lease) {
            self.forget_seen();
        }
        self.see_sessions(look);
        self.instances
            .retain(|id, _| look.instances.iter().any(|i| i.id == *id));
        self.asked.retain(|name, asked| {
            let listed = look.instances.iter().any(|i| i.name == *name);
            !listed && now.since(asked.at) < ASKED_FOR
        });
        // One that never connects is a failure after `start` only, and follows a wait.
        self.trouble.retain(|pool, trouble| {
            let start = look.pools.iter().find(|it| it.name == *pool);
            let start = start.map_or(Duration::ZERO, |pool| pool.start);
            now.since(trouble.last) < WAIT_MAX * 2 + start.max(look.lease)
        });
        for instance in look.instances {
            let kept = self.instances.entry(instance.id.clone()).or_insert(Kept {
                busy_at: now,
                away_since: Some(now),
                known_at: now,
                adopted: self.looked_at.is_none(),
                named: false,
                leaving: false,
                failed: false,
                ended_at: None,
            });
            let seen = look.workers.get(&instance.name);
            // What it did while it was away nobody knows.
            let came = seen.is_some() && kept.away_since.is_some();
            kept.named |= seen.is_some();
            kept.away_since = match seen {
                Some(_) => None,
                None => kept.away_since.or(Some(now)),
            };
            let misses = misses(self.sessions.get(&instance.name), seen);
            if came
                || misses
                || kept.is_new(now, look.lease)
                || seen.is_some_and(|seen| seen.running > 0)
            {
                kept.busy_at = now;
            }
            if instance.price_per_hour > 0.0 {
                let price = instance.price_per_hour;
                let seen = self.prices.entry(instance.pool.clone());
                let (lowest, highest) = seen.or_insert((price, price));
                (*lowest, *highest) = (lowest.min(price), highest.max(price));
            }
        }
        self.looked_at = Some(now);
    }

    /// Nobody has looked for long, or somebody else may have: what there is now counts as taken over.
    pub(super) fn forget_seen(&mut self) {
        self.instances.clear();
        self.sessions.clear();
        self.looked_at = None;
    }

    fn see_sessions(&mut self, look: &Look<'_>) {
        for (name, seen) in look.workers {
            let known = self.sessions.entry(name.clone()).or_default();
            for id in seen.sessions() {
                let session = known.entry(id.clone()).or_insert(Session {
                    first_at: look.now,
                    missing_since: None,
                    over: false,
                });
                session.missing_since = None;
            }
        }
        for (name, known) in &mut self.sessions {
            let seen = look.workers.get(name);
            known.retain(|id, session| {
                if has(seen, id) {
                    return true;
                }
                if session.over {
                    return false;
                }
                let since = *session.missing_since.get_or_insert(look.now);
                look.now.since(since) < look.lease
            });
        }
        self.sessions.retain(|_, known| !known.is_empty());
    }

    /// Whether an instance may be ended for that reason, by what is seen of its worker right now.
    pub(super) fn may_end(
        &self,
        instance: &Instance,
        why: Why,
        seen: Option<&Seen>,
        now: Timestamp,
        lease: Duration,
    ) -> bool {
        let sessions = self.sessions.get(&instance.name);
        match why {
            Why::Idle => {
                let kept = self.instances.get(&instance.id);
                let is_new = kept.is_none_or(|kept| kept.is_new(now, lease));
                seen.is_some_and(Seen::is_done) && !is_new && !misses(sessions, seen)
            }
            Why::Unneeded | Why::Lost => seen.is_none(),
            // Whose the worker is tells whether it was there before.
            Why::Duplicate => seen.is_none_or(|seen| {
                let knew = |id| {
                    let session = sessions.and_then(|known| known.get(id));
                    session.is_some_and(|session| Some(session.first_at) < self.looked_at)
                };
                seen.processes.len() <= 1 && seen.sessions().all(knew)
            }),
            Why::Failed => seen.is_none_or(|seen| seen.running == 0),
        }
    }

    /// Whether a worker has said that it is the instance, as far as is remembered.
    pub(super) fn was_named(&self, instance: &Instance) -> bool {
        let kept = self.instances.get(&instance.id);
        kept.is_some_and(|kept| kept.named)
    }

    /// An instance of `pool` was asked for under `name`.
    pub fn created(&mut self, pool: &str, name: &str, now: Timestamp) {
        let asked = Asked {
            pool: pool.to_owned(),
            at: now,
        };
        self.asked.insert(name.to_owned(), asked);
    }

    /// An instance of `pool` cannot be had: the next one is asked for after a wait that grows.
    pub fn refused(&mut self, pool: &str, now: Timestamp) {
        let trouble = self.trouble.entry(pool.to_owned()).or_insert(Trouble {
            failures: 0,
            last: Timestamp::default(),
        });
        // Many that fail at one look are one failure.
        if trouble.failures == 0 || trouble.last != now {
            trouble.failures += 1;
            trouble.last = now;
        }
    }

    /// The provider was told to end an instance.
    pub fn ended(&mut self, instance: &Instance, why: Why, now: Timestamp) {
        if let Some(kept) = self.instances.get_mut(&instance.id) {
            kept.ended_at = Some(now);
        }
        if let (Why::Idle, Some(known)) = (why, self.sessions.get_mut(&instance.name)) {
            known.values_mut().for_each(|session| session.over = true);
        }
    }

    /// Whether the provider need not be told yet again.
    pub(super) fn has_ended(&self, instance: &Instance, now: Timestamp) -> bool {
        let kept = self.instances.get(&instance.id);
        let ended_at = kept.and_then(|kept| kept.ended_at);
        ended_at.is_some_and(|at| now.since(at) < ENDED_FOR)
    }

    /// An instance failed; counts once.
    pub(super) fn failed(&mut self, instance: &Instance, now: Timestamp) {
        let kept = self.instances.get_mut(&instance.id);
        if kept.is_some_and(|kept| !std::mem::replace(&mut kept.failed, true)) {
            self.refused(&instance.pool, now);
        }
    }

    /// It is decided that an instance goes.
    pub(super) fn leaves(&mut self, instance: &Instance) {
        if let Some(kept) = self.instances.get_mut(&instance.id) {
            kept.leaving = true;
        }
    }

    pub(super) fn is_leaving(&self, instance: &Instance) -> bool {
        let kept = self.instances.get(&instance.id);
        kept.is_some_and(|kept| kept.leaving)
    }

    /// For how long its worker has not been seen.
    pub(super) fn away(&self, instance: &Instance, now: Timestamp) -> Duration {
        let kept = self.instances.get(&instance.id);
        let since = kept.and_then(|kept| kept.away_since);
        since.map_or(Duration::ZERO, |since| now.since(since))
    }

    /// The most instances that `pool` should have had since `within` ago, now included. What serves others has no jobs, so that
    /// nothing else tells that it was needed a moment ago.
    pub(super) fn most_wanted(
        &mut self,
        pool: &str,
        instances: u32,
        within: Duration,
        now: Timestamp,
    ) -> u32 {
        let wanted = self.wanted.entry(pool.to_owned()).or_default();
        wanted.retain(|(at, more)| *more > instances && now.since(*at) < within);
        wanted.push((now, instances));
        wanted[0].1
    }

    /// For how long it has had no job.
    pub(super) fn idle(&self, instance: &Instance, now: Timestamp) -> Duration {
        let kept = self.instances.get(&instance.id);
        kept.map_or(Duration::ZERO, |kept| now.since(kept.busy_at))
    }

    /// How many of `pool` were asked for and are not listed.
    pub(super) fn asked(&self, pool: &str) -> usize {
        self.asked.values().filter(|a| a.pool == pool).count()
    }

    pub(super) fn has_asked(&self, name: &str) -> bool {
        self.asked.contains_key(name)
    }

    /// Whether `pool` asks for nothing now, since it failed.
    pub(super) fn waits(&self, pool: &str, now: Timestamp) -> bool {
        let trouble = self.trouble.get(pool);
        trouble.is_some_and(|trouble| now.since(trouble.last) < trouble.wait())
    }

    /// What an instance of `pool` costs at least, as far as one was seen; $ per hour. Which one it will be, its provider decides
    /// by what is left.
    pub(super) fn price(&self, pool: &str) -> Option<f64> {
        self.prices.get(pool).map(|(lowest, _)| *lowest)
    }

    /// What those cost at most that were asked for and are not listed; $ per hour.
    pub(super) fn price_of_asked(&self) -> f64 {
        let asked = self.asked.values();
        let highest = asked.filter_map(|asked| self.prices.get(&asked.pool));
        highest.map(|(_, highest)| highest).sum()
    }
}
