//! What is to be done so that there are as many workers as the jobs need. Pure: what is seen goes in, with what is
//! remembered of earlier looks, and actions come out. The loop performs them and looks again.
//!
//! Rules, which the property tests hold:
//! - No instance is ended whose worker has a job, or may get one. An idle one is drained first and ended at a later look, at
//!   which it is drained and still has none. One that is not connected, with all of its sessions, may have jobs, and is left
//!   alone for as long as a lease of its may last.
//! - A pool has at most `max` instances, those that are on their way out among them.
//! - Instances are asked for by the names of free slots, so that one which is asked for twice is seen as such.
//! - Nothing is asked for beyond the budget. What runs beyond it, or beyond `max`, is not ended for that, but takes no more jobs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use espalier_core::id::WorkerId;
use espalier_core::queue::JobKind;
use espalier_core::time::Timestamp;

use super::memory::Memory;
use super::provider::{Instance, InstanceState};

/// Most instances that one look asks for: the next look is soon.
const CREATES_MAX: usize = 32;
/// Of a sum of prices, in $: what rounding may make of it.
const ROUNDING: f64 = 1e-9;

/// Instances of one sort.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// The kinds of jobs whose number decides.
    pub kinds: BTreeSet<JobKind>,
    /// How many of these jobs one instance is for; at least 1.
    pub jobs_per_worker: u32,
    /// Instances that there are without a job too.
    pub min: u32,
    /// Most instances.
    pub max: u32,
    /// How long an instance without a job stays, where fewer are wanted.
    pub idle: Duration,
    /// How long an instance may be without a connection.
    pub start: Duration,
}

/// What all instances of a provider together may cost, in $.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Budget {
    /// At any time, by the hour.
    pub per_hour: Option<f64>,
    /// From midnight to midnight, in UTC.
    pub per_day: Option<f64>,
}

/// The worker of an instance: what the coordinators know of all its sessions together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Sessions that may be given jobs.
    pub open: Vec<WorkerId>,
    /// Sessions that are drained.
    pub drained: Vec<WorkerId>,
    /// Jobs that they have.
    pub running: u64,
    /// Processes that say they are this instance.
    pub processes: BTreeSet<String>,
}

impl Seen {
    /// It has no job and gets none.
    pub(super) fn is_done(&self) -> bool {
        !self.drained.is_empty() && self.open.is_empty() && self.running == 0
    }

    pub(super) fn sessions(&self) -> impl Iterator<Item = &WorkerId> {
        self.open.iter().chain(&self.drained)
    }
}

/// All that is seen at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// The moment.
    pub now: Timestamp,
    /// What names of instances begin with.
    pub prefix: &'a str,
    /// The pools; of two that compete for a budget the first one is served.
    pub pools: &'a [Pool],
    /// Jobs that wait and run, by kind. None: no worker is wanted here, whatever waits.
    pub demand: Option<&'a BTreeMap<JobKind, u64>>,
    /// What the provider has.
    pub instances: &'a [Instance],
    /// Workers by the name of their instance.
    pub workers: &'a BTreeMap<String, Seen>,
    /// A time after which no lease holds that was not renewed.
    pub lease: Duration,
    /// What it may cost.
    pub budget: Budget,
    /// What it has cost since midnight, in $.
    pub spent_today: f64,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Ask for an instance.
    Create {
        /// Of which pool.
        pool: String,
        /// The name of a free slot.
        name: String,
    },
    /// Give these sessions of an instance no more jobs.
    Drain {
        /// Its name.
        name: String,
        /// Which.
        workers: Vec<WorkerId>,
    },
    /// End an instance, if [`Memory::may_end`] still says so.
    Delete {
        /// Which.
        instance: Instance,
        /// Why.
        why: Why,
    },
}

/// Why an instance is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// It is drained and has no job.
    Idle,
    /// It is not needed any more and has not begun to run.
    Unneeded,
    /// There are two of one name.
    Duplicate,
    /// The provider says that it failed.
    Failed,
    /// Its worker never connected, or is away for too long.
    Lost,
}

impl Why {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Unneeded => "unneeded",
            Self::Duplicate => "duplicate",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }
}

/// What a pool should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Jobs that wait and run.
    pub jobs: u64,
    /// Instances.
    pub instances: u32,
}

/// What to do, and what for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// By pool.
    pub wanted: BTreeMap<String, Wanted>,
    /// In the order in which they are to be done.
    pub actions: Vec<Action>,
    /// The bound for which instances are not asked for though jobs wait.
    pub held: Option<Bound>,
}

/// A bound of what instances may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// By the hour.
    Hour,
    /// From midnight to midnight.
    Day,
}

/// Decides by one look.
pub fn plan(look: &Look<'_>, memory: &mut Memory) -> Plan {
    memory.see(look);
    let mut actions = Vec::new();
    let mut supply = sort_out(look, memory, &mut actions);
    let mut wanted = BTreeMap::new();
    for pool in look.pools {
        wanted.insert(pool.name.clone(), want(look, pool));
    }
    save(look, memory, &mut supply, &mut actions);
    for (pool, instances) in &mut supply {
        let beyond = instances.len().saturating_sub(most(look, pool));
        release(look, memory, instances, beyond, Which::All, &mut actions);
        let wanted = wanted.get(*pool).map_or(0, |wanted| wanted.instances);
        let idle = pool_of(look, pool).map_or(Duration::ZERO, |pool| pool.idle);
        let wanted = memory.most_wanted(pool, wanted, idle, look.now);
        let spare = instances.len().saturating_sub(wanted as usize);
        release(
            look,
            memory,
            instances,
            spare,
            Which::Idle(idle),
            &mut actions,
        );
    }
    let held = create(look, memory, &wanted, &supply, &mut actions);
    actions.retain(|action| match action {
        Action::Delete { instance, .. } => !memory.has_ended(instance, look.now),
        Action::Create { .. } | Action::Drain { .. } => true,
    });
    Plan {
        wanted,
        actions,
        held,
    }
}

/// Instances that do or will do jobs, by pool.
type Supply<'a> = BTreeMap<&'a str, Vec<&'a Instance>>;

/// Takes out what goes whatever the demand is.
fn sort_out<'a>(look: &Look<'a>, memory: &mut Memory, actions: &mut Vec<Action>) -> Supply<'a> {
    let mut by_name: BTreeMap<&str, Vec<&Instance>> = BTreeMap::new();
    for instance in look.instances {
        by_name.entry(&instance.name).or_default().push(instance);
    }
    let mut supply = Supply::new();
    for (name, mut instances) in by_name {
        instances.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let seen = look.workers.get(name);
        let in_state = |state: &InstanceState| {
            let found = instances.iter().filter(|i| i.state == *state);
            found.copied().collect::<Vec<_>>()
        };
        let (running, mut starting) = (
            in_state(&InstanceState::Running),
            in_state(&InstanceState::Starting),
        );
        instances.retain(|i| matches!(i.state, InstanceState::Failed(_)));
        for failed in instances {
            memory.failed(failed, look.now);
            delete(look, memory, failed, Why::Failed, actions);
        }
        // One that has not begun to run has no worker. Of two that run nobody knows whose the worker is: both go when
        // whoever is connected under their name has no job.
        if running.len() > 1 {
            running.iter().for_each(|instance| memory.leaves(instance));
        }
        let first = usize::from(running.is_empty()).min(starting.len());
        for younger in starting.split_off(first) {
            delete(look, memory, younger, Why::Duplicate, actions);
        }
        let mut asked = false;
        for instance in running.into_iter().chain(starting) {
            if memory.is_leaving(instance) || seen.is_some_and(|seen| !seen.drained.is_empty()) {
                memory.leaves(instance);
                leave(look, memory, instance, &mut asked, actions);
            } else if is_lost(look, memory, instance) {
                memory.failed(instance, look.now);
                delete(look, memory, instance, Why::Lost, actions);
            } else {
                supply.entry(&instance.pool).or_default().push(instance);
            }
        }
    }
    supply
}

/// Ends an instance, where what is seen lets it.
fn delete(
    look: &Look<'_>,
    memory: &Memory,
    instance: &Instance,
    why: Why,
    actions: &mut Vec<Action>,
) {
    let seen = look.workers.get(&instance.name);
    if memory.may_end(instance, why, seen, look.now, look.lease) {
        let instance = instance.clone();
        actions.push(Action::Delete { instance, why });
    }
}

/// Goes on with an instance that is on its way out. `asked`: its sessions have been drained at this look.
fn leave(
    look: &Look<'_>,
    memory: &Memory,
    instance: &Instance,
    asked: &mut bool,
    actions: &mut Vec<Action>,
) {
    let seen = look.workers.get(&instance.name);
    match seen {
        None if instance.state == InstanceState::Starting => {
            delete(look, memory, instance, Why::Unneeded, actions)
        }
        None if is_lost(look, memory, instance) => {
            delete(look, memory, instance, Why::Lost, actions)
        }
        None => {}
        Some(seen) if seen.open.is_empty() => delete(look, memory, instance, Why::Idle, actions),
        Some(seen) if !*asked => {
            *asked = true;
            actions.push(Action::Drain {
                name: instance.name.clone(),
                workers: seen.open.clone(),
            });
        }
        Some(_) => {}
    }
}

/// Whether its worker is away for longer than it may be, and than a lease of its may last.
fn is_lost(look: &Look<'_>, memory: &Memory, instance: &Instance) -> bool {
    let start = pool_of(look, &instance.pool).map_or(look.lease, |pool| pool.start);
    memory.away(instance, look.now) >= start.max(look.lease)
}

fn pool_of<'a>(look: &Look<'a>, name: &str) -> Option<&'a Pool> {
    look.pools.iter().find(|pool| pool.name == name)
}

/// Whether the day's money is spent.
fn is_spent(look: &Look<'_>) -> bool {
    let per_day = look.budget.per_day;
    per_day.is_some_and(|per_day| look.spent_today >= per_day)
}

fn want(look: &Look<'_>, pool: &Pool) -> Wanted {
    let Some(demand) = look.demand else {
        return Wanted {
            jobs: 0,
            instances: 0,
        };
    };
    let jobs = pool.kinds.iter().filter_map(|kind| demand.get(kind)).sum();
    let needed = u64::div_ceil(jobs, u64::from(pool.jobs_per_worker.max(1)));
    let needed = u32::try_from(needed).unwrap_or(u32::MAX);
    let instances = match is_spent(look) {
        true => 0,
        false => needed.max(pool.min).min(pool.max),
    };
    Wanted { jobs, instances }
}

/// How many of a pool may take jobs at most.
fn most(look: &Look<'_>, pool: &str) -> usize {
    match pool_of(look, pool) {
        Some(pool) if look.demand.is_some() && !is_spent(look) => pool.max as usize,
        _ => 0,
    }
}

/// What all instances cost by the hour, in $.
fn price_of_all(look: &Look<'_>) -> f64 {
    let all = look.instances.iter();
    let costs = all.filter(|instance| !matches!(instance.state, InstanceState::Failed(_)));
    costs.map(|instance| instance.price_per_hour).sum()
}

/// Lets instances go while those that take jobs cost more than they may: idle ones first, and those of the last pool.
fn save(look: &Look<'_>, memory: &mut Memory, supply: &mut Supply<'_>, actions: &mut Vec<Action>) {
    let Some(per_hour) = look.budget.per_hour else {
        return;
    };
    let price =
        |instances: &Vec<&Instance>| instances.iter().map(|i| i.price_per_hour).sum::<f64>();
    let mut over = supply.values().map(price).sum::<f64>() - per_hour;
    for which in [Which::Idle(Duration::ZERO), Which::All] {
        for pool in look.pools.iter().rev() {
            let Some(instances) = supply.get_mut(&*pool.name) else {
                continue;
            };
            while over > ROUNDING {
                let before = price(instances);
                release(look, memory, instances, 1, which, actions);
                let saved = before - price(instances);
                if saved <= ROUNDING {
                    break;
                }
                over -= saved;
            }
        }
    }
}

/// Which instances may be let go.
#[derive(Clone, Copy)]
enum Which {
    /// Those that have had no job for so long.
    Idle(Duration),
    /// All: those that have jobs bring them to an end.
    All,
}

/// Lets up to `spare` of `instances` go, the longest idle first.
fn release(
    look: &Look<'_>,
    memory: &mut Memory,
    instances: &mut Vec<&Instance>,
    spare: usize,
    which: Which,
    actions: &mut Vec<Action>,
) {
    let has_no_job = |instance: &Instance| match look.workers.get(&instance.name) {
        Some(seen) => seen.running == 0,
        // One that runs may have jobs of an earlier connection.
        None => instance.state == InstanceState::Starting,
    };
    let mut candidates: Vec<&Instance> = instances.to_vec();
    if let Which::Idle(idle) = which {
        candidates.retain(|i| has_no_job(i) && memory.idle(i, look.now) >= idle);
    }
    candidates.sort_by_key(|i| {
        let longest_idle = std::cmp::Reverse((memory.idle(i, look.now), &i.name));
        (!has_no_job(i), longest_idle)
    });
    for instance in candidates.into_iter().take(spare) {
        instances.retain(|other| other.id != instance.id);
        memory.leaves(instance);
        match look.workers.get(&instance.name) {
            Some(seen) => actions.push(Action::Drain {
                name: instance.name.clone(),
                workers: seen.open.clone(),
            }),
            None if instance.state == InstanceState::Starting => {
                delete(look, memory, instance, Why::Unneeded, actions)
            }
            None => {}
        }
    }
}

/// Asks for what is missing, within the budget; gives the bound that is in the way of more.
fn create(
    look: &Look<'_>,
    memory: &Memory,
    wanted: &BTreeMap<String, Wanted>,
    supply: &Supply<'_>,
    actions: &mut Vec<Action>,
) -> Option<Bound> {
    let waits = wanted.values().any(|wanted| wanted.jobs > 0);
    let mut held = Some(Bound::Day).filter(|_| waits && is_spent(look));
    let mut purse = Purse::new(look, memory);
    let mut left = CREATES_MAX;
    for pool in look.pools {
        let wanted = wanted.get(&pool.name).map_or(0, |wanted| wanted.instances);
        let pending = memory.asked(&pool.name);
        let has = supply.get(&*pool.name).map_or(0, Vec::len) + pending;
        let there = look.instances.iter().filter(|i| i.pool == pool.name);
        let room = (pool.max as usize).saturating_sub(there.count() + pending);
        let missing = (wanted as usize).saturating_sub(has).min(room).min(left);
        if missing == 0 || memory.waits(&pool.name, look.now) {
            continue;
        }
        let mut names = free_names(look, memory, pool);
        for _ in 0..missing {
            if !purse.pays_for(&pool.name, pending) {
                held = held.or_else(|| purse.bound(&pool.name));
                break;
            }
            if let Some(name) = names.next() {
                left -= 1;
                let pool = pool.name.clone();
                actions.push(Action::Create { pool, name });
            }
        }
    }
    held
}

/// Names of slots that nobody has: no instance, none that was asked for, and no worker, which may be on its way out.
fn free_names<'a>(
    look: &'a Look<'_>,
    memory: &'a Memory,
    pool: &'a Pool,
) -> impl Iterator<Item = String> {
    let taken: BTreeSet<&str> = look.instances.iter().map(|i| &*i.name).collect();
    let names = (0_u32..).map(|n| format!("{}-{}-{n}", look.prefix, pool.name));
    names.filter(move |name| {
        !taken.contains(&**name) && !look.workers.contains_key(name) && !memory.has_asked(name)
    })
}

/// What is left of the budget of one look.
struct Purse<'a> {
    memory: &'a Memory,
    /// None: it need not be counted.
    left: Option<f64>,
    spent: bool,
    /// Pools of an unknown price of which one was asked for.
    tried: BTreeSet<String>,
}

impl<'a> Purse<'a> {
    fn new(look: &Look<'_>, memory: &'a Memory) -> Self {
        let asked = memory.price_of_asked();
        let left = look.budget.per_hour;
        Self {
            memory,
            left: left.map(|per_hour| per_hour - price_of_all(look) - asked),
            spent: is_spent(look),
            tried: BTreeSet::new(),
        }
    }

    /// Takes out what one more instance costs; false: there is not enough. Of a pool whose price nobody has seen there is one
    /// instance first.
    fn pays_for(&mut self, pool: &str, pending: usize) -> bool {
        let Some(left) = &mut self.left else {
            return !self.spent;
        };
        let known = self.memory.price(pool);
        let unknown_again = known.is_none() && (pending > 0 || self.tried.contains(pool));
        let price = known.unwrap_or(0.0);
        let enough = *left >= price - ROUNDING && *left > 0.0;
        if self.spent || unknown_again || !enough {
            return false;
        }
        if known.is_none() {
            self.tried.insert(pool.to_owned());
        }
        *left -= price;
        true
    }

    /// The bound that one more instance would break; none where its price is to be seen first.
    fn bound(&self, pool: &str) -> Option<Bound> {
        let price = self.memory.price(pool).unwrap_or(0.0);
        let is_short = |left: f64| left <= 0.0 || left < price - ROUNDING;
        self.left
            .filter(|left| is_short(*left))
            .map(|_| Bound::Hour)
    }
}

#[cfg(test)]
mod tests;
