//! What the plan does in single situations. What holds in all of them is in `property`.

use super::*;

mod property;

const START: Timestamp = Timestamp(1_700_000_000_000_000);
const SECOND: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(240);

fn pool(name: &str, min: u32, max: u32) -> Pool {
    Pool {
        name: name.to_owned(),
        kinds: [JobKind::Rollout].into(),
        jobs_per_worker: 4,
        min,
        max,
        idle: 60 * SECOND,
        start: 300 * SECOND,
    }
}

/// What a look sees, which a test changes between looks.
struct Scene {
    now: Timestamp,
    pools: Vec<Pool>,
    jobs: u64,
    leads: bool,
    instances: Vec<Instance>,
    workers: BTreeMap<String, Seen>,
    budget: Budget,
    spent_today: f64,
    memory: Memory,
}

impl Scene {
    fn new(pools: Vec<Pool>) -> Self {
        Self {
            now: START,
            pools,
            jobs: 0,
            leads: true,
            instances: Vec::new(),
            workers: BTreeMap::new(),
            budget: Budget::default(),
            spent_today: 0.0,
            memory: Memory::default(),
        }
        .empty()
    }

    /// What comes after the first look is new, and was not there before anybody looked.
    fn empty(mut self) -> Self {
        let pools = std::mem::take(&mut self.pools);
        self.look();
        self.pools = pools;
        self
    }

    fn look(&mut self) -> Plan {
        let demand = [(JobKind::Rollout, self.jobs)].into();
        let look = Look {
            now: self.now,
            prefix: "x",
            pools: &self.pools,
            demand: self.leads.then_some(&demand),
            instances: &self.instances,
            workers: &self.workers,
            lease: LEASE,
            budget: self.budget,
            spent_today: self.spent_today,
        };
        plan(&look, &mut self.memory)
    }

    /// Looks `after` the last look; what was decided, in words.
    fn after(&mut self, after: Duration) -> Vec<String> {
        self.now = self.now + after;
        self.look().actions.iter().map(words).collect()
    }

    fn instance(&mut self, id: &str, name: &str, state: InstanceState) -> &mut Instance {
        let (pool, _) = name[2..].rsplit_once('-').unwrap();
        self.instances.push(Instance {
            id: id.to_owned(),
            pool: pool.to_owned(),
            name: name.to_owned(),
            state,
            created_at: self.now,
            price_per_hour: 0.0,
        });
        self.instances.last_mut().unwrap()
    }

    /// An instance that runs, with a worker that has `running` jobs.
    fn worker(&mut self, name: &str, running: u64) {
        self.instance(name, name, InstanceState::Running);
        let seen = Seen {
            open: vec![name.parse().unwrap()],
            drained: Vec::new(),
            running,
            processes: [name.to_owned()].into(),
        };
        self.workers.insert(name.to_owned(), seen);
    }

    fn has_jobs(&mut self, name: &str, running: u64) {
        self.workers.get_mut(name).unwrap().running = running;
    }

    fn is_drained(&mut self, name: &str) {
        let seen = self.workers.get_mut(name).unwrap();
        seen.drained.append(&mut seen.open);
    }
}

fn words(action: &Action) -> String {
    match action {
        Action::Create { name, .. } => format!("create {name}"),
        Action::Drain { name, .. } => format!("drain {name}"),
        Action::Delete { instance, why } => format!("delete {} {}", instance.id, why.as_str()),
    }
}

#[test]
fn as_many_are_wanted_as_jobs_need_within_the_bounds() {
    let mut scene = Scene::new(vec![pool("a", 1, 3)]);
    let wanted = |scene: &mut Scene, jobs| {
        scene.jobs = jobs;
        scene.look().wanted["a"].instances
    };
    for (jobs, instances) in [(0, 1), (4, 1), (5, 2), (12, 3), (1_000_000, 3)] {
        assert_eq!(wanted(&mut scene, jobs), instances, "{jobs} jobs");
    }
    scene.leads = false;
    assert_eq!(wanted(&mut scene, 5), 0);
}

#[test]
fn what_is_missing_gets_the_names_of_free_slots() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 13;
    scene.worker("x-a-1", 4);
    // It is on its way out: the provider lists it no more, and its name is not free yet.
    scene.workers.insert("x-a-2".to_owned(), Seen::default());
    let created = ["create x-a-0", "create x-a-3", "create x-a-4"];
    assert_eq!(scene.after(SECOND), created);
    for name in ["x-a-0", "x-a-3"] {
        scene.memory.created("a", name, scene.now);
    }
    // What was asked for counts though it is not listed, for a while.
    assert_eq!(scene.after(SECOND), ["create x-a-4"]);
    assert_eq!(scene.after(60 * SECOND), created);
}

#[test]
fn an_idle_instance_goes_after_a_while_drained_first_and_ended_when_it_still_has_no_job() {
    let mut scene = Scene::new(vec![pool("a", 1, 9)]);
    scene.worker("x-a-0", 1);
    scene.worker("x-a-1", 1);
    scene.worker("x-a-2", 1);
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene.has_jobs("x-a-1", 0);
    scene.has_jobs("x-a-2", 0);
    assert_eq!(scene.after(59 * SECOND), [""; 0]);
    assert_eq!(scene.after(SECOND), ["drain x-a-2", "drain x-a-1"]);
    // One of them was being given a job.
    scene.is_drained("x-a-1");
    scene.has_jobs("x-a-1", 1);
    scene.is_drained("x-a-2");
    assert_eq!(scene.after(SECOND), ["delete x-a-2 idle"]);
    scene.has_jobs("x-a-1", 0);
    assert_eq!(
        scene.after(SECOND),
        ["delete x-a-1 idle", "delete x-a-2 idle"],
        "until it is gone"
    );
    for instance in scene.instances.clone() {
        scene.memory.ended(&instance, Why::Idle, scene.now);
    }
    assert_eq!(
        scene.after(59 * SECOND),
        [""; 0],
        "the provider takes its time"
    );
    assert_eq!(scene.after(SECOND).len(), 2, "it is told again");
}

/// Rollouts run elsewhere, and ask these.
#[test]
fn who_serves_and_has_no_jobs_stays_as_long_as_so_many_were_wanted_a_moment_ago() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.worker("x-a-0", 0);
    scene.worker("x-a-1", 0);
    for _ in 0..100 {
        scene.jobs = 8;
        assert_eq!(scene.after(30 * SECOND), [""; 0]);
        // A step of a pipeline has ended, and the next one begins.
        scene.jobs = 0;
        assert_eq!(scene.after(30 * SECOND), [""; 0]);
    }
    scene.jobs = 4;
    assert_eq!(scene.after(29 * SECOND), [""; 0]);
    assert_eq!(scene.after(SECOND), ["drain x-a-1"]);
    scene.is_drained("x-a-1");
    assert_eq!(scene.after(SECOND), ["delete x-a-1 idle"]);
}

#[test]
fn a_training_that_lasts_for_days_keeps_its_instance_whatever_is_wanted() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.worker("x-a-0", 1);
    for _ in 0..10_000 {
        assert_eq!(scene.after(15 * SECOND), [""; 0]);
    }
    scene.spent_today = 1e9;
    scene.budget = Budget {
        per_hour: Some(0.01),
        per_day: Some(0.01),
    };
    scene.instances[0].price_per_hour = 5.0;
    assert_eq!(scene.after(SECOND), ["drain x-a-0"], "it takes no other");
    scene.is_drained("x-a-0");
    for leads in [true, false] {
        scene.leads = leads;
        for _ in 0..10_000 {
            assert_eq!(scene.after(15 * SECOND), [""; 0]);
        }
    }
    scene.pools.clear();
    assert_eq!(scene.after(SECOND), [""; 0], "its pool is no more");
    scene.has_jobs("x-a-0", 0);
    assert_eq!(scene.after(SECOND), ["delete x-a-0 idle"]);
}

#[test]
fn a_worker_that_comes_back_counts_its_idleness_anew() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.worker("x-a-0", 0);
    assert_eq!(scene.after(SECOND), [""; 0]);
    let seen = scene.workers.remove("x-a-0").unwrap();
    assert_eq!(scene.after(200 * SECOND), [""; 0]);
    scene.workers.insert("x-a-0".to_owned(), seen);
    assert_eq!(scene.after(SECOND), [""; 0]);
    assert_eq!(scene.after(59 * SECOND), [""; 0]);
    assert_eq!(scene.after(SECOND), ["drain x-a-0"]);
}

#[test]
fn one_whose_worker_never_connects_is_given_up_and_others_wait() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 4;
    scene.instance("1", "x-a-0", InstanceState::Running);
    assert_eq!(scene.after(SECOND), [""; 0]);
    assert_eq!(scene.after(199 * SECOND), [""; 0]);
    assert_eq!(scene.after(100 * SECOND), [""; 0]);
    assert_eq!(scene.after(SECOND), ["delete 1 lost"]);
    scene.instances.clear();
    assert_eq!(scene.after(SECOND), [""; 0], "not at once again");
    assert_eq!(scene.after(9 * SECOND), ["create x-a-0"]);
}

#[test]
fn failures_are_cleared_away_and_the_waits_after_them_grow() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 8;
    let failed = || InstanceState::Failed("no such image".to_owned());
    let mut waits = Vec::new();
    for n in 0..8 {
        scene.instance(&format!("{n}a"), "x-a-0", failed());
        scene.instance(&format!("{n}b"), "x-a-1", failed());
        let deleted = scene.after(SECOND);
        assert_eq!(deleted.len(), 2, "{deleted:?}");
        // The provider is slow: that is no further failure.
        assert_eq!(scene.after(SECOND), deleted);
        scene.instances.clear();
        let mut waited = 1;
        while scene.after(SECOND).is_empty() {
            waited += 1;
        }
        waits.push(waited);
    }
    assert_eq!(waits, [9, 19, 39, 79, 159, 319, 599, 599]);
}

/// They cost all that time, so that it is not tried again at once for ever.
#[test]
fn waits_after_instances_that_never_connect_grow_however_long_they_may_take_to_start() {
    let mut scene = Scene::new(vec![Pool {
        start: 1_200 * SECOND,
        ..pool("a", 0, 9)
    }]);
    scene.jobs = 4;
    let mut waits = Vec::new();
    for n in 0..5 {
        scene.instance(&n.to_string(), "x-a-0", InstanceState::Running);
        for _ in 0..12 {
            assert_eq!(scene.after(100 * SECOND), [""; 0]);
        }
        assert_eq!(scene.after(100 * SECOND), [format!("delete {n} lost")]);
        scene.instances.clear();
        let mut waited = 1;
        while scene.after(SECOND).is_empty() {
            waited += 1;
        }
        waits.push(waited);
    }
    assert_eq!(waits, [10, 20, 40, 80, 160]);
}

#[test]
fn a_budget_that_holds_instances_back_is_named_while_it_does() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.budget = Budget {
        per_hour: Some(1.5),
        per_day: Some(20.0),
    };
    scene.worker("x-a-0", 4);
    scene.instances[0].price_per_hour = 1.0;
    scene.jobs = 4;
    assert_eq!(scene.look().held, None);
    scene.jobs = 8;
    assert_eq!(scene.look().held, Some(Bound::Hour));
    scene.spent_today = 20.0;
    assert_eq!(scene.look().held, Some(Bound::Day));
    scene.jobs = 0;
    assert_eq!(scene.look().held, None);
}

#[test]
fn of_two_with_one_name_the_younger_goes_unless_nobody_knows_whose_the_worker_is() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 4;
    scene.instance("old", "x-a-0", InstanceState::Starting);
    scene.now = scene.now + SECOND;
    scene.instance("young", "x-a-0", InstanceState::Starting);
    assert_eq!(scene.after(SECOND), ["delete young duplicate"]);
    scene.instances[1].state = InstanceState::Running;
    assert_eq!(scene.after(SECOND), ["delete old duplicate"]);
    // Both run, and one worker is there: it may be of either.
    scene.instances.remove(0);
    scene.worker("x-a-0", 1);
    assert_eq!(scene.after(SECOND), ["drain x-a-0", "create x-a-1"]);
    scene.memory.created("a", "x-a-1", scene.now);
    scene.is_drained("x-a-0");
    assert_eq!(scene.after(SECOND), [""; 0], "it has a job");
    scene.has_jobs("x-a-0", 0);
    let both = ["delete young idle", "delete x-a-0 idle"];
    assert_eq!(scene.after(SECOND), both);
}

#[test]
fn an_instance_that_an_operator_drained_is_replaced() {
    let mut scene = Scene::new(vec![pool("a", 0, 2)]);
    scene.jobs = 4;
    scene.worker("x-a-0", 1);
    scene.is_drained("x-a-0");
    assert_eq!(scene.after(SECOND), ["create x-a-1"]);
    scene.memory.created("a", "x-a-1", scene.now);
    scene.has_jobs("x-a-0", 0);
    assert_eq!(scene.after(SECOND), ["delete x-a-0 idle"]);
}

#[test]
fn one_that_is_on_its_way_out_takes_a_place_of_the_most_there_may_be() {
    let mut scene = Scene::new(vec![pool("a", 0, 1)]);
    scene.jobs = 4;
    scene.worker("x-a-0", 1);
    scene.is_drained("x-a-0");
    assert_eq!(scene.after(SECOND), [""; 0]);
}

#[test]
fn one_that_is_still_starting_goes_when_it_is_wanted_no_more() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.instance("1", "x-a-0", InstanceState::Starting);
    assert_eq!(scene.after(SECOND), [""; 0]);
    assert_eq!(scene.after(60 * SECOND), ["delete 1 unneeded"]);
    // It began to run in the meantime.
    let (memory, instance) = (&scene.memory, &scene.instances[0]);
    let seen = Seen::default();
    assert!(!memory.may_end(instance, Why::Unneeded, Some(&seen), scene.now, LEASE));
}

#[test]
fn a_session_that_is_missing_may_have_jobs_for_as_long_as_a_lease() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.pools[0].idle = SECOND;
    scene.worker("x-a-0", 3);
    let cpu = "cpu".parse::<WorkerId>().unwrap();
    scene
        .workers
        .get_mut("x-a-0")
        .unwrap()
        .open
        .push(cpu.clone());
    assert_eq!(scene.after(SECOND), [""; 0]);
    let seen = scene.workers.get_mut("x-a-0").unwrap();
    (seen.open, seen.running) = (vec![cpu], 0);
    for _ in 0..24 {
        assert_eq!(scene.after(10 * SECOND), [""; 0]);
    }
    assert_eq!(scene.after(10 * SECOND), ["drain x-a-0"]);
    scene.is_drained("x-a-0");
    assert_eq!(scene.after(10 * SECOND), ["delete x-a-0 idle"]);
}

#[test]
fn sessions_of_one_that_was_ended_say_nothing_of_the_next_one_of_its_name() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene.worker("x-a-0", 0);
    scene.is_drained("x-a-0");
    assert_eq!(scene.after(SECOND), ["delete x-a-0 idle"]);
    let ended = scene.instances.remove(0);
    scene.memory.ended(&ended, Why::Idle, scene.now);
    // Its connection lasts a little longer than it is listed.
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene.workers.clear();
    scene.instance("2", "x-a-0", InstanceState::Running);
    let seen = Seen {
        open: vec!["w".parse().unwrap()],
        processes: ["p".to_owned()].into(),
        ..Seen::default()
    };
    scene.workers.insert("x-a-0".to_owned(), seen);
    assert_eq!(scene.after(SECOND), [""; 0]);
    assert_eq!(scene.after(60 * SECOND), ["drain x-a-0"]);
}

#[test]
fn a_time_at_which_nobody_looked_is_no_absence() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 4;
    scene.worker("x-a-0", 1);
    assert_eq!(scene.after(SECOND), [""; 0]);
    let seen = scene.workers.remove("x-a-0").unwrap();
    assert_eq!(
        scene.after(10_000 * SECOND),
        [""; 0],
        "it is between two streams"
    );
    scene.workers.insert("x-a-0".to_owned(), seen);
    assert_eq!(scene.after(SECOND), [""; 0]);
}

#[test]
fn of_two_of_one_name_none_goes_whose_worker_may_be_the_one_that_came() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 4;
    scene.instance("1", "x-a-0", InstanceState::Running);
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene.instance("2", "x-a-0", InstanceState::Starting);
    let seen = Seen {
        open: vec!["w".parse().unwrap()],
        running: 1,
        processes: ["w".to_owned()].into(),
        ..Seen::default()
    };
    scene.workers.insert("x-a-0".to_owned(), seen);
    assert_eq!(scene.after(SECOND), [""; 0], "it may be the second one's");
}

#[test]
fn whoever_takes_over_ends_nothing_before_every_session_had_time_to_come() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.pools[0].idle = Duration::ZERO;
    scene.worker("x-a-0", 0);
    scene.is_drained("x-a-0");
    scene.memory = Memory::default();
    for _ in 0..24 {
        assert_eq!(scene.after(10 * SECOND), [""; 0]);
    }
    assert_eq!(scene.after(10 * SECOND), ["delete x-a-0 idle"]);
}

#[test]
fn the_hourly_budget_bounds_what_is_asked_for() {
    let mut scene = Scene::new(vec![pool("a", 0, 9), pool("b", 0, 9)]);
    scene.budget.per_hour = Some(5.0);
    scene.jobs = 16;
    // Nobody knows a price: one of each pool is tried.
    assert_eq!(scene.after(SECOND), ["create x-a-0", "create x-b-0"]);
    scene.worker("x-a-0", 4);
    scene.worker("x-b-0", 4);
    scene.instances[0].price_per_hour = 1.0;
    scene.instances[1].price_per_hour = 2.0;
    assert_eq!(scene.after(SECOND), ["create x-a-1", "create x-a-2"]);
    scene.memory.created("a", "x-a-1", scene.now);
    assert_eq!(scene.after(SECOND), ["create x-a-2"]);
    scene.memory.created("a", "x-a-2", scene.now);
    assert_eq!(scene.after(SECOND), [""; 0]);
}

/// Two workers in each of two pools, with so many jobs, which cost all that they may.
fn four_at_a_dollar(jobs: u64, running: [u64; 4]) -> Scene {
    let mut scene = Scene::new(vec![pool("a", 0, 9), pool("b", 0, 9)]);
    scene.jobs = jobs;
    for (name, running) in ["x-a-0", "x-a-1", "x-b-0", "x-b-1"]
        .into_iter()
        .zip(running)
    {
        scene.worker(name, running);
    }
    for instance in &mut scene.instances {
        instance.price_per_hour = 1.0;
    }
    scene.budget.per_hour = Some(4.0);
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene
}

#[test]
fn where_all_cost_more_than_they_may_idle_ones_of_the_last_pool_go() {
    let mut scene = four_at_a_dollar(8, [0, 0, 1, 0]);
    scene.budget.per_hour = Some(2.5);
    assert_eq!(scene.after(SECOND), ["drain x-b-1", "drain x-a-1"]);
}

#[test]
fn beyond_the_most_and_the_hourly_budget_those_with_jobs_take_no_more() {
    let mut scene = four_at_a_dollar(80, [2, 1, 1, 0]);
    scene.budget.per_hour = Some(2.0);
    assert_eq!(scene.after(SECOND), ["drain x-b-1", "drain x-b-0"]);
    scene.is_drained("x-b-1");
    scene.is_drained("x-b-0");
    // What goes already need not be made up for by others.
    assert_eq!(scene.after(SECOND), ["delete x-b-1 idle"]);
    scene.pools[0].max = 1;
    let told = scene.after(SECOND);
    assert_eq!(told.last().unwrap(), "drain x-a-1");
    assert!(!told.iter().any(|action| action.contains("x-a-0")));
}

#[test]
fn one_that_is_unneeded_is_ended_again_where_that_failed() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.instance("1", "x-a-0", InstanceState::Starting);
    assert_eq!(scene.after(SECOND), [""; 0]);
    for _ in 0..3 {
        assert_eq!(scene.after(60 * SECOND), ["delete 1 unneeded"]);
    }
}

#[test]
fn of_a_pool_with_a_dear_instance_a_cheaper_one_is_asked_for() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 8;
    scene.budget.per_hour = Some(5.0);
    for (name, price) in [("x-a-0", 0.5), ("x-a-1", 3.0)] {
        scene.worker(name, 4);
        scene.instances.last_mut().unwrap().price_per_hour = price;
    }
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene.jobs = 12;
    assert_eq!(scene.after(SECOND), ["create x-a-2"]);
}

#[test]
fn after_a_time_without_looks_nobody_is_lost() {
    let mut scene = Scene::new(vec![pool("a", 0, 9)]);
    scene.jobs = 4;
    scene.instance("1", "x-a-0", InstanceState::Running);
    assert_eq!(scene.after(SECOND), [""; 0]);
    // It came meanwhile, has a job, and is between two streams.
    assert_eq!(scene.after(10_000 * SECOND), [""; 0]);
}

#[test]
fn when_the_days_money_is_spent_none_takes_a_job_and_none_is_asked_for() {
    let mut scene = Scene::new(vec![pool("a", 1, 9)]);
    scene.jobs = 8;
    scene.budget.per_day = Some(20.0);
    scene.worker("x-a-0", 1);
    scene.worker("x-a-1", 0);
    assert_eq!(scene.after(SECOND), [""; 0]);
    scene.spent_today = 20.0;
    // Or a backlog would keep it for ever.
    assert_eq!(scene.after(SECOND), ["drain x-a-1", "drain x-a-0"]);
    scene.is_drained("x-a-0");
    scene.instances.remove(1);
    scene.workers.remove("x-a-1");
    assert_eq!(scene.after(SECOND), [""; 0]);
    // Midnight.
    scene.jobs = 40;
    scene.spent_today = 0.0;
    assert_eq!(scene.after(SECOND).len(), 8);
}
