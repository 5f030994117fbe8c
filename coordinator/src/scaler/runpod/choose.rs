//! Which GPU a pod gets: the first of the pool's that RunPod has and that the budget allows. Pure.

use super::config::RunpodPool;
use super::wire::{Availability, GpuType};

/// Prices are sums of a few cents: below this nothing is a difference, in $.
const PRICE_EPSILON: f64 = 1e-6;

/// A pod that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer<'a> {
    /// The type of GPU.
    pub gpu: &'a str,
    /// $ an hour of the pod.
    pub price: f64,
}

/// What there is for a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Offers<'a> {
    /// In the order of the pool's `gpus`.
    pub offers: Vec<Offer<'a>>,
    /// Why each other one is not among them.
    pub passed_over: Vec<PassedOver>,
}

/// A type of GPU that is not asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct PassedOver {
    /// Which, and why.
    pub says: String,
    /// Whether time may change that; the configuration must, where not.
    pub may_change: bool,
}

impl Offers<'_> {
    /// Why there is nothing at all.
    pub fn says(&self) -> String {
        let all: Vec<&str> = self
            .passed_over
            .iter()
            .map(|passed| passed.says.as_str())
            .collect();
        all.join("; ")
    }

    /// Whether there may be something later.
    pub fn may_change(&self) -> bool {
        self.passed_over.iter().any(|passed| passed.may_change)
    }
}

/// What can be had for a pod of `pool` now, where `left` of the `max_per_hour` is not spent yet, both in $ an hour.
pub fn offers<'a>(
    pool: &'a RunpodPool,
    catalogue: &[GpuType],
    left: f64,
    max_per_hour: f64,
) -> Offers<'a> {
    let mut found = Offers {
        offers: Vec::new(),
        passed_over: Vec::new(),
    };
    for id in &pool.gpus {
        let gpu = catalogue.iter().find(|gpu| gpu.id == *id);
        match gpu.map_or_else(
            || Err(unknown(id)),
            |gpu| offer(pool, id, gpu, left, max_per_hour),
        ) {
            Ok(offer) => found.offers.push(offer),
            Err(passed) => found.passed_over.push(passed),
        }
    }
    found
}

fn unknown(id: &str) -> PassedOver {
    PassedOver {
        says: format!("`{id}` is not in RunPod's catalogue"),
        may_change: false,
    }
}

fn offer<'a>(
    pool: &RunpodPool,
    id: &'a str,
    gpu: &GpuType,
    left: f64,
    max_per_hour: f64,
) -> Result<Offer<'a>, PassedOver> {
    let (cloud, count) = (pool.cloud, pool.gpu_count);
    let pass = |may_change, why: String| {
        Err(PassedOver {
            says: format!("`{id}` {why}"),
            may_change,
        })
    };
    if !gpu.is_in(cloud) {
        return pass(false, format!("is not in the {} cloud", cloud.name()));
    }
    let most = gpu.max_count.of(cloud);
    if count > most {
        return pass(
            false,
            format!("comes at most {most} in a pod, and `gpu_count` is {count}"),
        );
    }
    let price = gpu.price.of(cloud) * f64::from(count);
    if let Some(max) = pool.max_price.filter(|max| price > max + PRICE_EPSILON) {
        return pass(
            false,
            format!("costs ${price:.2} an hour, and `max_price` is ${max:.2}"),
        );
    }
    if price > max_per_hour + PRICE_EPSILON {
        return pass(
            false,
            format!("costs ${price:.2} an hour, and `max_per_hour` is ${max_per_hour:.2}"),
        );
    }
    if price > left + PRICE_EPSILON {
        let left = left.max(0.0);
        return pass(
            true,
            format!(
                "costs ${price:.2} an hour, and ${left:.2} are left of the ${max_per_hour:.2} of `max_per_hour`"
            ),
        );
    }
    if gpu.availability == Availability::None {
        return pass(true, "is not to be had now".to_owned());
    }
    Ok(Offer { gpu: id, price })
}

/// Whether a sum of $ an hour is more than what is allowed.
pub fn is_over(sum: f64, max_per_hour: f64) -> bool {
    sum > max_per_hour + PRICE_EPSILON
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaler::runpod::config::Cloud;
    use proptest::prelude::*;
    use serde_json::json;

    /// A type of GPU of the secure cloud alone.
    fn gpu(id: &str, price: f64, availability: &str) -> GpuType {
        let gpu = json!({
            "id": id, "secure": true, "community": false, "price": {"secure": price, "community": 0.0},
            "maxCount": {"secure": 2, "community": 0}, "availability": availability,
        });
        serde_json::from_value(gpu).unwrap()
    }

    #[test]
    fn what_a_cloud_does_not_have_is_passed_over_for_good() {
        let mut pool = RunpodPool::new("a", None, vec!["x".to_owned()]);
        pool.cloud = Cloud::Community;
        let found = offers(&pool, &[gpu("x", 0.3, "HIGH")], 1.0, 1.0);
        assert_eq!(found.says(), "`x` is not in the community cloud");
        assert!(found.offers.is_empty() && !found.may_change());
    }

    proptest! {
        #[test]
        fn each_type_is_offered_in_its_place_or_passed_over_with_a_reason(
            prices in prop::collection::vec(0.05..4.0_f64, 1..6),
            known in prop::collection::vec(any::<(bool, bool)>(), 6),
            left in -1.0..5.0_f64,
            max_price in prop::option::of(0.1..4.0_f64),
            count in 1..4_u32,
        ) {
            let ids: Vec<String> = (0..prices.len()).map(|n| format!("gpu-{n}")).collect();
            let mut pool = RunpodPool::new("a", None, ids.clone());
            (pool.gpu_count, pool.max_price) = (count, max_price);
            let catalogue = ids.iter().zip(&prices).zip(&known).filter(|(_, known)| known.0);
            let catalogue: Vec<GpuType> = catalogue
                .map(|((id, price), (_, has))| gpu(id, *price, if *has { "LOW" } else { "NONE" }))
                .collect();
            let found = offers(&pool, &catalogue, left, 4.0);
            prop_assert_eq!(found.offers.len() + found.passed_over.len(), ids.len());
            let places = found.offers.iter().map(|offer| ids.iter().position(|id| id == offer.gpu));
            let places: Vec<_> = places.collect();
            prop_assert!(places.is_sorted() && places.iter().all(Option::is_some));
            for offer in &found.offers {
                prop_assert!(!is_over(offer.price, left.min(4.0)), "{:?} with {} left", offer, left);
                prop_assert!(max_price.is_none_or(|max| !is_over(offer.price, max)));
                prop_assert!(count <= 2);
            }
        }
    }
}
