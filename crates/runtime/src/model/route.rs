//! Which endpoint answers a call: rendezvous hashing, so that the calls of one rollout meet the endpoint that has their
//! prefix in its cache, and so that an endpoint which comes or goes moves no rollouts but its own; and the health of
//! each endpoint, as this process sees it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_core::trace::sha256_hex;
use tokio::time::Instant;

use super::caller::Caller;
use super::{ChatRequest, ChatTurn, ModelEndpoint, ModelError, Served};
use crate::backoff::Backoff;
use crate::config::Secret;

/// Failures in a row after which an endpoint is left out: one may be chance.
const FAILURES_MAX: u32 = 3;
/// How long an endpoint that is named no more is still called where no other is left: the coordinator that named it may
/// have gone, and the next one may not know of it yet.
const FORGET_AFTER: Duration = Duration::from_secs(30);
/// How long it is left out; then one call shows whether it is back, and the others go on elsewhere.
const OUT: Backoff = Backoff {
    first: Duration::from_secs(1),
    max: Duration::from_secs(30),
};

/// One endpoint.
pub(super) struct Member {
    name: String,
    /// What a coordinator said of it. None: the configuration names this one, for every model.
    served: Option<Served>,
    caller: Caller,
    health: Mutex<Health>,
}

impl Member {
    /// The endpoint of the configuration.
    pub(super) fn only(endpoint: ModelEndpoint) -> Result<Self, ModelError> {
        Ok(Self {
            name: String::new(),
            served: None,
            caller: Caller::new(endpoint)?,
            health: Mutex::default(),
        })
    }

    /// An endpoint that a coordinator told of; `keys` holds the one that it may ask for.
    pub(super) fn told(
        served: Served,
        keys: &BTreeMap<String, Secret>,
    ) -> Result<Self, ModelError> {
        let mut endpoint = ModelEndpoint::new(&served.base_url);
        endpoint.vllm_extensions = served.vllm_extensions;
        endpoint.logprobs = served.logprobs;
        if let Some(name) = &served.api_key_name {
            let key = keys.get(name).ok_or_else(|| ModelError::Settings {
                rule: format!("the configuration holds no key `{name}` under `model_keys`"),
            })?;
            endpoint.api_key = Some(key.clone());
        }
        Ok(Self {
            name: served.name.clone(),
            caller: Caller::new(endpoint)?,
            served: Some(served),
            health: Mutex::default(),
        })
    }

    /// Its name; empty for the endpoint of the configuration.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn url(&self) -> &str {
        self.caller.url()
    }

    /// Whether it is what a coordinator says now.
    pub(super) fn is(&self, served: &Served) -> bool {
        self.served.as_ref() == Some(served)
    }

    /// A coordinator names it again.
    pub(super) fn is_back(&self) {
        lock(&self.health).gone_at = None;
    }

    /// No coordinator names it any more. False: for so long that it is forgotten.
    pub(super) fn is_gone(&self, now: Instant) -> bool {
        let mut health = lock(&self.health);
        health.gone_at.get_or_insert(now);
        !health.is_forgotten(now)
    }

    /// Failures in a row.
    #[cfg(test)]
    pub(super) fn failures(&self) -> u32 {
        lock(&self.health).failures
    }

    fn serves(&self, model: &str, now: Instant) -> bool {
        self.served.as_ref().is_none_or(|s| s.model == model)
            && !lock(&self.health).is_forgotten(now)
    }

    /// Whether the model is another project's.
    fn is_foreign(&self, project: &str) -> bool {
        let of = self.served.as_ref().and_then(|s| s.project.as_deref());
        of.is_some_and(|of| of != project)
    }

    fn is_out(&self, now: Instant) -> bool {
        let said_to_be = self.served.as_ref().is_some_and(|s| !s.healthy);
        said_to_be || lock(&self.health).is_out(now)
    }

    /// Where it stands among the endpoints for calls with this affinity; the least comes first. The minimum of
    /// exponential variables falls to each in proportion to its rate, which is the weight.
    fn rank(&self, affinity: &str) -> f64 {
        let weight = self.served.as_ref().map_or(1, |s| s.weight);
        -uniform(affinity, &self.name).ln() / f64::from(weight)
    }

    /// Asks once, and notes what that says of its health.
    pub(super) async fn ask(&self, request: &ChatRequest<'_>) -> Result<ChatTurn, ModelError> {
        lock(&self.health).begin(Instant::now());
        let answered = self.caller.ask(request).await;
        let mut health = lock(&self.health);
        match &answered {
            Err(error) if error.blames_endpoint() => {
                if health.failed(Instant::now(), rand::random()) {
                    let class = error.as_str();
                    tracing::warn!(
                        endpoint = self.name,
                        class,
                        "model endpoint is left out for a while"
                    );
                }
            }
            _ => health.answered(),
        }
        answered
    }
}

/// What one endpoint did last.
#[derive(Debug, Default)]
struct Health {
    /// Failures in a row.
    failures: u32,
    out_until: Option<Instant>,
    /// Since when no coordinator names it.
    gone_at: Option<Instant>,
}

impl Health {
    fn is_out(&self, now: Instant) -> bool {
        self.gone_at.is_some() || self.out_until.is_some_and(|until| now < until)
    }

    fn is_forgotten(&self, now: Instant) -> bool {
        self.gone_at
            .is_some_and(|at| now.saturating_duration_since(at) >= FORGET_AFTER)
    }

    fn answered(&mut self) {
        (self.failures, self.out_until) = (0, None);
    }

    /// A call begins. After a time out it is the probe: others stay away for as long as the last wait was the least.
    fn begin(&mut self, now: Instant) {
        if self.out_until.is_some_and(|until| now >= until) {
            self.out_until = Some(now + OUT.delay(self.failures.saturating_sub(FAILURES_MAX), 0.0));
        }
    }

    /// True: it is left out from now on.
    fn failed(&mut self, now: Instant, random: f64) -> bool {
        self.failures = self.failures.saturating_add(1);
        let times = (self.failures + 1).saturating_sub(FAILURES_MAX);
        if times == 0 {
            return false;
        }
        self.out_until = Some(now + OUT.delay(times, random));
        true
    }
}

/// The endpoint for the next try: the first in the order of the call's affinity that works and was not tried. Where none
/// is left, one that was tried is better than one that is known to fail, and that is better than none.
pub(super) fn choose(
    endpoints: &[Arc<Member>],
    request: &ChatRequest<'_>,
    tried: &[Arc<Member>],
    now: Instant,
) -> Option<Arc<Member>> {
    let standing = |member: &Arc<Member>| {
        let times = tried.iter().filter(|t| t.name == member.name).count();
        (member.is_out(now), times, member.rank(request.affinity))
    };
    let serving = serving(endpoints, request, now).into_iter();
    let best = serving.map(|member| (standing(member), member));
    let best = best.min_by(|(a, _), (b, _)| {
        (a.0, a.1)
            .cmp(&(b.0, b.1))
            .then_with(|| a.2.total_cmp(&b.2))
    });
    best.map(|(_, member)| Arc::clone(member))
}

/// Whether there is an endpoint that works, as far as is known, and was not tried.
pub(super) fn has_fresh(
    endpoints: &[Arc<Member>],
    request: &ChatRequest<'_>,
    tried: &[Arc<Member>],
    now: Instant,
) -> bool {
    serving(endpoints, request, now).into_iter().any(|member| {
        let is_fresh = !tried.iter().any(|t| t.name == member.name);
        is_fresh && !member.is_out(now)
    })
}

/// The endpoints that serve the model of a request. Those where it is another project's are left out while there are others:
/// what has one name may be two models. A version of an adapter is its project's alone.
fn serving<'a>(
    endpoints: &'a [Arc<Member>],
    request: &ChatRequest<'_>,
    now: Instant,
) -> Vec<&'a Arc<Member>> {
    let all = endpoints.iter().filter(|m| m.serves(request.model, now));
    let (foreign, own): (Vec<_>, Vec<_>) = all.partition(|m| m.is_foreign(request.project));
    let is_version = request.model.contains("@v");
    match own.is_empty() && !is_version {
        true => foreign,
        false => own,
    }
}

/// A number in (0, 1) that is the same in every process and version for the same two names.
fn uniform(affinity: &str, name: &str) -> f64 {
    let digest = sha256_hex(format!("{affinity}\0{name}").as_bytes());
    let bits = digest.get(..13).unwrap_or_default();
    // 52 bits, which a float holds exactly.
    let bits = u64::from_str_radix(bits, 16).unwrap_or_default();
    (bits as f64 + 0.5) / (1_u64 << 52) as f64
}

/// No code that may panic runs under these locks, and the state is valid after every statement.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, weight: u32) -> Arc<Member> {
        let served = Served {
            name: name.to_owned(),
            model: "qwen3".to_owned(),
            base_url: "http://127.0.0.1:1/v1".to_owned(),
            api_key_name: None,
            weight,
            healthy: true,
            vllm_extensions: true,
            logprobs: true,
            project: None,
        };
        Arc::new(Member::told(served, &BTreeMap::new()).unwrap())
    }

    /// Where each of a thousand rollouts goes.
    fn homes(endpoints: &[Arc<Member>]) -> Vec<String> {
        let home = |n: usize| {
            let affinity = format!("p/b/j{n}");
            let best = endpoints
                .iter()
                .min_by(|a, b| a.rank(&affinity).total_cmp(&b.rank(&affinity)));
            best.unwrap().name.clone()
        };
        (0..1_000).map(home).collect()
    }

    fn share(homes: &[String], name: &str) -> usize {
        homes.iter().filter(|home| *home == name).count()
    }

    #[test]
    fn an_endpoint_that_leaves_moves_its_own_rollouts_and_no_others() {
        let all: Vec<Arc<Member>> = (0..5).map(|n| member(&format!("e{n}"), 1)).collect();
        let before = homes(&all);
        for endpoint in &all {
            let part = share(&before, &endpoint.name);
            assert!((140..=260).contains(&part), "{}: {part}", endpoint.name);
        }
        let after = homes(&all[1..]);
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a);
        let moved: Vec<&String> = moved.map(|(before, _)| before).collect();
        assert!(moved.iter().all(|home| *home == "e0"), "{moved:?}");
        assert_eq!(moved.len(), share(&before, "e0"));
        // Its rollouts are spread over all that are left.
        for name in ["e1", "e2", "e3", "e4"] {
            assert!(share(&after, name) > share(&before, name) + 20);
        }
        assert_eq!(homes(&all), before, "the same again when it is back");
    }

    #[test]
    fn rollouts_are_spread_by_weight() {
        let homes = homes(&[member("one", 1), member("three", 3)]);
        let part = share(&homes, "three");
        assert!((700..=800).contains(&part), "{part}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_that_fails_is_left_out_and_probed_by_one_call() {
        let mut health = Health::default();
        let now = Instant::now();
        assert!(!health.failed(now, 0.5) && !health.failed(now, 0.5));
        assert!(!health.is_out(now));
        assert!(health.failed(now, 0.5));
        assert!(health.is_out(now));
        let later = now + Duration::from_secs(1);
        assert!(!health.is_out(later));
        health.begin(later);
        assert!(health.is_out(later), "the first call is the probe");
        assert!(
            !health.is_out(later + Duration::from_secs(31)),
            "a probe that is dropped blocks nothing for long"
        );
        assert!(health.failed(later, 0.5));
        assert!(health.is_out(later + Duration::from_millis(1_999)));
        assert!(!health.is_out(later + Duration::from_secs(2)));
    }
}
