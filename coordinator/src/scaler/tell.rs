//! What operators see of the work at one provider: lines of the log and metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_runtime::telemetry::{metrics, names::attribute};
use opentelemetry::KeyValue;

use super::Source;
use super::plan::{Bound, Budget, Plan, Wanted, Why};
use super::provider::{INSTANCE_VARIABLE, Instance, InstanceState, ProviderError};

/// See the module.
pub(super) struct Tell {
    provider: &'static str,
    budget: Budget,
    /// The bound that holds pools back, as it was told last.
    held: Option<Bound>,
    /// What was told last, by pool. None: nothing was told yet, or another coordinator does the work.
    wanted: Option<BTreeMap<String, Wanted>>,
    /// Pools of which gauges were told, those of instances that are left over among them.
    pools: Vec<String>,
}

/// What instances of one pool come to.
#[derive(Default)]
struct Sum {
    starting: u64,
    running: u64,
    failed: u64,
    price: f64,
}

impl Tell {
    pub(super) fn new(source: &Source) -> Self {
        Self {
            provider: source.key,
            budget: source.budget,
            held: None,
            wanted: None,
            pools: source.pools.iter().map(|pool| pool.name.clone()).collect(),
        }
    }

    /// What was seen and is wanted.
    pub(super) fn round(&mut self, plan: &Plan, instances: &[Instance], spent_today: f64) {
        for (pool, wanted) in &plan.wanted {
            let last = self.wanted.as_ref().and_then(|all| all.get(pool));
            let last = last.map_or(0, |last| last.instances);
            if wanted.instances != last {
                let (jobs, instances) = (wanted.jobs, wanted.instances);
                let provider = self.provider;
                tracing::info!(
                    provider,
                    pool,
                    jobs,
                    instances,
                    before = last,
                    "a pool should have another number of instances"
                );
            }
        }
        if plan.held != self.held {
            self.held = plan.held;
            self.holds(spent_today);
        }
        self.wanted = Some(plan.wanted.clone());
        self.gauges(&plan.wanted, instances, spent_today);
    }

    fn holds(&self, spent_today: f64) {
        let provider = self.provider;
        let (max_per_hour, max_per_day) = (self.budget.per_hour, self.budget.per_day);
        match self.held {
            Some(Bound::Day) => tracing::warn!(
                provider,
                spent_today,
                max_per_day,
                "the day's budget is spent: no instance is asked for before midnight UTC, though jobs wait"
            ),
            Some(Bound::Hour) => tracing::warn!(
                provider,
                max_per_hour,
                "one more instance would cost more than all of them may by the hour: jobs wait for those that there are"
            ),
            None => tracing::info!(provider, "the budget holds no instance back any more"),
        }
    }

    /// Another coordinator does the work now, or none: a gauge shows its last value for ever.
    pub(super) fn silence(&mut self) {
        if self.wanted.take().is_some() {
            self.gauges(&BTreeMap::new(), &[], 0.0);
        }
    }

    fn gauges(
        &mut self,
        wanted: &BTreeMap<String, Wanted>,
        instances: &[Instance],
        spent_today: f64,
    ) {
        for instance in instances {
            if !self.pools.contains(&instance.pool) {
                self.pools.push(instance.pool.clone());
            }
        }
        for pool in &self.pools {
            let mut sum = Sum::default();
            for instance in instances.iter().filter(|i| i.pool == *pool) {
                sum.price += instance.price_per_hour;
                match instance.state {
                    InstanceState::Starting => sum.starting += 1,
                    InstanceState::Running => sum.running += 1,
                    InstanceState::Failed(_) => sum.failed += 1,
                }
            }
            let labels = self.labels(pool);
            let states = [
                ("starting", sum.starting),
                ("running", sum.running),
                ("failed", sum.failed),
            ];
            for (state, count) in states {
                let state = KeyValue::new(attribute::SCALER_STATE, state);
                let labels = [labels[0].clone(), labels[1].clone(), state];
                metrics().scaler_instances.record(count, &labels);
            }
            let wanted = wanted.get(pool);
            let instances = wanted.map_or(0, |wanted| u64::from(wanted.instances));
            metrics().scaler_wanted.record(instances, &labels);
            let jobs = wanted.map_or(0, |wanted| wanted.jobs);
            metrics().scaler_demand.record(jobs, &labels);
            metrics().scaler_price.record(sum.price, &labels);
        }
        if let Some(per_day) = self.budget.per_day {
            let provider = [KeyValue::new(attribute::SCALER_PROVIDER, self.provider)];
            metrics().scaler_spent_today.record(spent_today, &provider);
            metrics().scaler_budget_day.record(per_day, &provider);
        }
    }

    pub(super) fn created(&self, pool: &str, name: &str) {
        tracing::info!(
            provider = self.provider,
            instance = name,
            "an instance was asked for"
        );
        metrics().scaler_creates.add(1, &self.labels(pool));
    }

    /// `was_named`: whether a worker has ever said that it is the instance.
    pub(super) fn deleted(&self, instance: &Instance, why: Why, was_named: bool) {
        if why == Why::Lost && !was_named {
            tracing::warn!(
                provider = self.provider,
                instance = instance.name,
                "no worker has said that it is this instance: it did not start, cannot reach a coordinator, or was started \
                 without {INSTANCE_VARIABLE}, which a wrapper such as sudo, ssh or docker has to pass on"
            );
        }
        let (provider, name, why) = (self.provider, &instance.name, why.as_str());
        match &instance.state {
            InstanceState::Failed(reason) => {
                tracing::warn!(
                    provider,
                    instance = name,
                    id = instance.id,
                    why,
                    reason,
                    "an instance was ended"
                );
            }
            _ => tracing::info!(
                provider,
                instance = name,
                id = instance.id,
                why,
                "an instance was ended"
            ),
        }
        let [provider, pool] = self.labels(&instance.pool);
        let why = KeyValue::new(attribute::SCALER_REASON, why);
        metrics().scaler_deletes.add(1, &[provider, pool, why]);
    }

    /// An instance of a pool cannot be had.
    pub(super) fn refused(&self, pool: &str, error: &ProviderError) {
        tracing::warn!(provider = self.provider, pool, error = %error, "an instance cannot be had");
        self.count_error(error);
    }

    /// The provider does not answer.
    pub(super) fn failed(&self, operation: &'static str, error: &ProviderError, wait: Duration) {
        let (provider, wait_s) = (self.provider, wait.as_secs_f64());
        tracing::warn!(provider, operation, wait_s, error = %error, "the provider of workers fails");
        self.count_error(error);
    }

    fn count_error(&self, error: &ProviderError) {
        let class = match error {
            ProviderError::RateLimited { .. } => "rate_limited",
            ProviderError::NoCapacity(_) => "no_capacity",
            ProviderError::Refused(_) => "refused",
            ProviderError::Unavailable(_) => "unavailable",
        };
        let labels = [
            KeyValue::new(attribute::SCALER_PROVIDER, self.provider),
            KeyValue::new(attribute::ERROR_TYPE, class),
        ];
        metrics().scaler_errors.add(1, &labels);
    }

    fn labels(&self, pool: &str) -> [KeyValue; 2] {
        [
            KeyValue::new(attribute::SCALER_PROVIDER, self.provider),
            KeyValue::new(attribute::SCALER_POOL, pool.to_owned()),
        ]
    }
}
