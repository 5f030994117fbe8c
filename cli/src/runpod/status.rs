//! `espalier runpod status`: the pods of workers, and what they cost.

use clap::Args;
use espalier_coordinator::scaler::runpod::wire::{Pod, PodStatus};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use super::{Account, patiently};
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{duration, table, total};

/// Options of `status`.
#[derive(Args, Clone, Debug)]
pub struct Status {
    /// Only pods of this name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Where the account is.
    #[command(flatten)]
    pub account: Account,
}

/// `espalier runpod status`.
pub async fn run(context: &Context, args: &Status) -> Outcome {
    let client = args.account.client(context)?;
    let pods = of_name(patiently(|| client.pods()).await?, args.name.as_deref());
    let now = now();
    let per_hour = total(pods.iter().map(|pod| pod.cost));
    let spent = total(pods.iter().map(|pod| spent(pod, now)));
    context.out.show(
        || {
            json!({
                "pods": pods.iter().map(|pod| pod_json(pod, now)).collect::<Vec<_>>(),
                "price_per_hour": per_hour,
                "spent": spent,
            })
        },
        || match pods.is_empty() {
            true => "there are no pods of workers".to_owned(),
            false => format!(
                "{}\n{} an hour; {} so far",
                table_of(&pods, now),
                dollars(per_hour),
                dollars(spent)
            ),
        },
    )?;
    Ok(Exit::Ok)
}

/// The present moment.
pub fn now() -> Timestamp {
    SystemClock.now()
}

/// The pods that say they were started under `name`, or under any, by their names.
pub fn of_name(pods: Vec<Pod>, name: Option<&str>) -> Vec<Pod> {
    let is_meant = |pod: &Pod| match name {
        Some(name) => pod.is_of(name),
        None => !pod.marks.scaler.is_empty(),
    };
    let mut pods = pods;
    pods.retain(|pod| is_meant(pod) && pod.status != PodStatus::Terminated);
    pods.sort_by(|a, b| {
        (&a.marks.scaler, &a.marks.instance, &a.id).cmp(&(
            &b.marks.scaler,
            &b.marks.instance,
            &b.id,
        ))
    });
    pods
}

/// What a pod has cost at its present price since it was made, in $. What RunPod bills may be less: it counts from when the
/// pod ran.
fn spent(pod: &Pod, now: Timestamp) -> f64 {
    pod.cost * now.since(pod.created_at).as_secs_f64() / 3_600.0
}

/// Dollars and cents.
pub fn dollars(amount: f64) -> String {
    format!("${amount:.2}")
}

/// A pod for programs.
pub fn pod_json(pod: &Pod, now: Timestamp) -> Value {
    json!({
        "id": pod.id,
        "name": pod.marks.instance,
        "of": pod.marks.scaler,
        "pool": pod.marks.pool,
        "state": pod.status.to_string(),
        "gpu": pod.gpu.as_ref().map(|gpu| &gpu.id),
        "gpu_count": pod.gpu.as_ref().map_or(0, |gpu| gpu.count),
        "price_per_hour": pod.cost,
        "created_at": pod.created_at.to_string(),
        "age_s": now.since(pod.created_at).as_secs(),
        "spent": spent(pod, now),
    })
}

/// Pods for people.
pub fn table_of(pods: &[Pod], now: Timestamp) -> String {
    let rows = pods.iter().map(|pod| {
        let gpu = pod.gpu.as_ref().map_or_else(
            || "-".to_owned(),
            |gpu| match gpu.count {
                1 => gpu.id.clone(),
                count => format!("{count} × {}", gpu.id),
            },
        );
        let age = now.since(pod.created_at).as_millis();
        [
            pod.marks.instance.clone(),
            pod.status.to_string(),
            gpu,
            dollars(pod.cost),
            duration(u64::try_from(age).unwrap_or(u64::MAX)),
            dollars(spent(pod, now)),
            pod.id.clone(),
            pod.marks.scaler.clone(),
        ]
    });
    let header = ["name", "state", "gpu", "$/h", "age", "spent", "id", "of"];
    table(header, rows.collect())
}
