//! The plan against a world in which everything goes wrong: instances that fail, vanish and are listed late, workers
//! that come, go and take jobs at any moment. Whatever happens, no job is a victim and no bound is broken; and when it
//! stops, what is wanted is there.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const MAX: u32 = 6;
const PER_HOUR: f64 = 7.0;
const PRICE: f64 = 1.5;

#[derive(Clone, Debug)]
enum Step {
    Jobs(u64),
    Wait(u64),
    /// The provider says that it runs.
    Run(usize),
    Connect(usize),
    Disconnect(usize),
    Grant(usize),
    Finish(usize),
    Fail(usize),
    Vanish(usize),
    /// What is made from now on is listed only so many seconds later.
    Lag(u64),
    /// Replies to what is asked for are lost, and half of it is not made.
    LoseReplies(bool),
    /// Workers that are drained were just being given a job.
    Cross(bool),
    /// Another coordinator takes over.
    Forget,
    /// The session with the jobs is lost, and another one of the same worker is not.
    Part(usize),
    /// Nobody looks for so many steps, and for as long as a lease lasts: what begins and ends between two looks is not seen.
    Blind(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..8_usize;
    let which_more = which.clone();
    prop_oneof![
        3 => (0..40_u64).prop_map(Step::Jobs),
        6 => (1..200_u64).prop_map(Step::Wait),
        4 => which.clone().prop_map(Step::Run),
        6 => which.clone().prop_map(Step::Connect),
        2 => which.clone().prop_map(Step::Disconnect),
        6 => which.clone().prop_map(Step::Grant),
        4 => which.clone().prop_map(Step::Finish),
        1 => which.clone().prop_map(Step::Fail),
        1 => which.prop_map(Step::Vanish),
        1 => (0..100_u64).prop_map(Step::Lag),
        1 => any::<bool>().prop_map(Step::LoseReplies),
        1 => any::<bool>().prop_map(Step::Cross),
        1 => Just(Step::Forget),
        2 => which_more.prop_map(Step::Part),
        1 => (1..12_u8).prop_map(Step::Blind),
    ]
}

/// An instance as it is, whatever anybody knows of it.
#[derive(Debug)]
struct Real {
    instance: Instance,
    listed_at: Timestamp,
    connected: bool,
    /// Of the session with the jobs.
    away_since: Timestamp,
    /// Its session with the jobs is away, and another one is not.
    parted: bool,
    drained: bool,
    running: u64,
}

#[derive(Debug)]
struct World {
    now: Timestamp,
    jobs: u64,
    all: Vec<Real>,
    made: u64,
    blind: u8,
    lag: u64,
    lose_replies: bool,
    cross: bool,
    memory: Memory,
    pools: Vec<Pool>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            now: START,
            jobs: 0,
            all: Vec::new(),
            made: 0,
            blind: 0,
            lag: 0,
            lose_replies: false,
            cross: false,
            memory: Memory::default(),
            pools: vec![pool("a", 0, MAX)],
        };
        world.make("gone", "x-gone-0");
        world
    }

    fn make(&mut self, pool: &str, name: &str) {
        self.made += 1;
        self.all.push(Real {
            instance: Instance {
                id: format!("id-{}", self.made),
                pool: pool.to_owned(),
                name: name.to_owned(),
                state: InstanceState::Starting,
                created_at: self.now,
                price_per_hour: PRICE,
            },
            listed_at: self.now + Duration::from_secs(self.lag),
            connected: false,
            away_since: self.now,
            parted: false,
            drained: false,
            running: 0,
        });
    }

    fn take(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Jobs(jobs) => self.jobs = jobs,
            Step::Wait(seconds) => self.now = now + Duration::from_secs(seconds),
            Step::Lag(lag) => self.lag = lag,
            Step::LoseReplies(lose) => self.lose_replies = lose,
            Step::Cross(cross) => self.cross = cross,
            Step::Forget => self.memory = Memory::default(),
            Step::Blind(steps) => (self.blind, self.now) = (steps, now + LEASE),
            Step::Vanish(n) => {
                if !self.all.is_empty() {
                    self.all.remove(n % self.all.len());
                }
            }
            Step::Run(n) => self.change(n, |real| {
                if real.instance.state == InstanceState::Starting {
                    real.instance.state = InstanceState::Running;
                }
            }),
            Step::Connect(n) => self.change(n, |real| {
                real.connected = real.instance.state == InstanceState::Running;
                real.parted = false;
            }),
            Step::Part(n) => self.change(n, |real| {
                if real.connected && !std::mem::replace(&mut real.parted, true) {
                    real.away_since = now;
                }
            }),
            Step::Disconnect(n) => self.change(n, |real| {
                if std::mem::take(&mut real.connected) && !std::mem::take(&mut real.parted) {
                    real.away_since = now;
                }
            }),
            Step::Grant(n) => self.change(n, |real| {
                if real.connected && !real.parted && !real.drained {
                    real.running += 1;
                }
            }),
            Step::Finish(n) => self.change(n, |real| {
                real.running = real.running.saturating_sub(1);
            }),
            Step::Fail(n) => self.change(n, |real| {
                real.instance.state = InstanceState::Failed("it broke".to_owned());
                real.connected = false;
                real.running = 0;
            }),
        }
    }

    fn change(&mut self, n: usize, change: impl Fn(&mut Real)) {
        let count = self.all.len().max(1);
        if let Some(real) = self.all.get_mut(n % count) {
            change(real);
        }
    }

    fn seen(&self) -> BTreeMap<String, Seen> {
        let mut all: BTreeMap<String, Seen> = BTreeMap::new();
        for real in self.all.iter().filter(|real| real.connected) {
            let seen = all.entry(real.instance.name.clone()).or_default();
            let sessions = match real.drained {
                true => &mut seen.drained,
                false => &mut seen.open,
            };
            sessions.push(format!("{}-cpu", real.instance.id).parse().unwrap());
            if !real.parted {
                sessions.push(real.instance.id.parse().unwrap());
                seen.running += real.running;
            }
            seen.processes.insert(real.instance.id.clone());
        }
        all
    }

    /// Looks and does what is decided. Gives how much that was.
    fn round(&mut self) -> usize {
        let (demand, workers) = ([(JobKind::Rollout, self.jobs)].into(), self.seen());
        let listed = self.all.iter().filter(|real| real.listed_at <= self.now);
        let instances: Vec<Instance> = listed.map(|real| real.instance.clone()).collect();
        let look = Look {
            now: self.now,
            prefix: "x",
            pools: &self.pools,
            demand: Some(&demand),
            instances: &instances,
            workers: &workers,
            lease: LEASE,
            budget: Budget {
                per_hour: Some(PER_HOUR),
                per_day: None,
            },
            spent_today: 0.0,
        };
        let plan = plan(&look, &mut self.memory);
        check_bounds(&plan, &instances);
        let done = plan.actions.len();
        for action in plan.actions {
            self.perform(action);
        }
        done
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Create { pool, name } => {
                let taken = self.all.iter().any(|real| {
                    let known = real.listed_at <= self.now || real.connected;
                    known && real.instance.name == name
                });
                assert!(!taken, "{name} is taken");
                if !self.lose_replies || self.made.is_multiple_of(2) {
                    self.make(&pool, &name);
                }
                self.memory.created(&pool, &name, self.now);
            }
            Action::Drain { workers, .. } => {
                for real in &mut self.all {
                    let cpu = format!("{}-cpu", real.instance.id);
                    if workers.iter().any(|w| w.as_str() == cpu) {
                        real.drained = true;
                        real.running += u64::from(self.cross && !real.parted);
                    }
                }
            }
            Action::Delete { instance, why } => {
                let seen = self.seen();
                let seen = seen.get(&instance.name);
                if !self.memory.may_end(&instance, why, seen, self.now, LEASE) {
                    return;
                }
                if let Some(n) = self.all.iter().position(|r| r.instance.id == instance.id) {
                    let real = self.all.remove(n);
                    let away = self.now.since(real.away_since);
                    let is_over = (!real.connected || real.parted) && away >= LEASE;
                    assert!(real.running == 0 || is_over, "a victim: {why:?} {real:?}");
                }
                self.memory.ended(&instance, why, self.now);
            }
        }
    }

    /// Everything works from now on: instances start, connect, and have jobs where there are some. Gives how much was
    /// done at the last look.
    fn settle(&mut self) -> usize {
        (self.lag, self.lose_replies, self.cross) = (0, false, false);
        let mut done = 0;
        for _ in 0..300 {
            for real in &mut self.all {
                if real.instance.state == InstanceState::Starting {
                    real.instance.state = InstanceState::Running;
                }
                real.connected = real.instance.state == InstanceState::Running;
                real.parted = false;
                real.running = u64::from(self.jobs > 0 && real.connected && !real.drained);
            }
            done = self.round();
            self.now = self.now + 15 * SECOND;
        }
        done
    }
}

/// As far as the provider tells.
fn check_bounds(plan: &Plan, listed: &[Instance]) {
    let created = |action: &&Action| matches!(action, Action::Create { .. });
    let created = plan.actions.iter().filter(created).count();
    if created == 0 {
        return;
    }
    let there = listed.iter().filter(|i| i.pool == "a").count();
    assert!(
        there + created <= MAX as usize,
        "{there} and {created} more"
    );
    let sound = |i: &&Instance| !matches!(i.state, InstanceState::Failed(_));
    let price = PRICE * (listed.iter().filter(sound).count() + created) as f64;
    assert!(price <= PER_HOUR, "$ {price} an hour");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_job_is_a_victim_no_bound_is_broken_and_what_is_wanted_comes(
        steps in vec(step(), 1..60),
        jobs in 0..60_u64,
    ) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
            match world.blind {
                0 => drop(world.round()),
                _ => world.blind -= 1,
            }
        }
        world.jobs = 0;
        world.settle();
        prop_assert!(world.all.is_empty(), "left over: {:?}", world.all);
        world.jobs = jobs;
        prop_assert_eq!(world.settle(), 0, "it comes to rest");
        let pays = (PER_HOUR / PRICE) as u64;
        let wanted = jobs.div_ceil(4).min(u64::from(MAX)).min(pays);
        prop_assert_eq!(world.all.len() as u64, wanted);
    }
}
