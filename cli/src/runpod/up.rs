//! `espalier runpod up`: makes the pods that are missing, and waits until all run.

use std::time::Duration;

use espalier_coordinator::scaler::runpod::wire::{Pod, PodStatus};
use espalier_coordinator::scaler::runpod::{Runpod, instance};
use espalier_coordinator::scaler::{InstanceState, Provider};
use indicatif::ProgressBar;
use serde_json::json;
use tokio::time::Instant;

use super::args::{Up, Worker};
use super::status::{self, dollars};
use super::{Account, patiently};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{note, plain};
use crate::progress;

/// Between two looks at pods that start: minutes are common, and RunPod counts requests.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// `espalier runpod up`.
pub async fn run(context: &Context, args: &Up) -> Outcome {
    let config = args.config(Account::key(context)?, &context.environment)?;
    let pods = Pods {
        provider: Runpod::new(config)?,
        pool: args.worker.name(),
        names: (0..args.count)
            .map(|n| format!("{}-{}-{n}", args.name, args.worker.name()))
            .collect(),
    };
    let bar = progress::things(args.count.into(), "starting");
    let made = pods.make(&bar).await;
    let ended = match made {
        Ok(()) => pods.wait(&bar, Duration::from_secs(args.wait)).await,
        Err(problem) => Err(problem),
    };
    bar.finish_and_clear();
    if let Err(problem) = ended {
        return Err(pods.with_what_is_there(args, problem).await);
    }
    // Once more: where a reply was lost, a pod that RunPod lists late has a double.
    let pods = pods.without_doubles().await?;
    let now = status::now();
    context.out.show(
        || json!({"pods": pods.iter().map(|pod| pod_json(args, pod)).collect::<Vec<_>>()}),
        || {
            let mut lines = vec![status::table_of(&pods, now)];
            if args.worker == Worker::Infer {
                lines.extend(
                    pods.iter()
                        .map(|pod| format!("{}  {}", plain(&pod.marks.instance), address(pod))),
                );
            }
            lines.push(format!(
                "`espalier runpod down --name {}` ends them",
                args.name
            ));
            lines.join("\n")
        },
    )?;
    Ok(Exit::Ok)
}

fn pod_json(args: &Up, pod: &Pod) -> serde_json::Value {
    let mut value = status::pod_json(pod, status::now());
    if args.worker == Worker::Infer {
        value["url"] = json!(address(pod));
    }
    value
}

/// Where a pod serves.
fn address(pod: &Pod) -> String {
    format!("https://{}-8000.proxy.runpod.net/v1", plain(&pod.id))
}

/// The pods that there are to be.
struct Pods {
    provider: Runpod,
    pool: &'static str,
    names: Vec<String>,
}

impl Pods {
    /// Makes those that are missing; ones that have failed make room first.
    async fn make(&self, bar: &ProgressBar) -> Result<(), Problem> {
        for pod in self.seen().await? {
            let instance = instance(&pod);
            if let InstanceState::Failed(why) = &instance.state {
                note(format!(
                    "{}: {why}; it is ended and started anew",
                    instance.name
                ));
                patiently(|| self.provider.delete(&instance)).await?;
            }
        }
        for name in &self.names {
            bar.set_message(name.clone());
            patiently(|| self.provider.create(self.pool, name)).await?;
        }
        Ok(())
    }

    /// The pods of these names; where a reply that was lost has made two of one, both.
    async fn seen(&self) -> Result<Vec<Pod>, Problem> {
        let mut pods = patiently(|| self.provider.pods()).await?;
        pods.retain(|pod| self.names.contains(&pod.marks.instance));
        pods.sort_by(|a, b| {
            (&a.marks.instance, a.created_at, &a.id).cmp(&(&b.marks.instance, b.created_at, &b.id))
        });
        Ok(pods)
    }

    async fn wait(&self, bar: &ProgressBar, limit: Duration) -> Result<(), Problem> {
        let started = Instant::now();
        while !limit.is_zero() {
            let pods = self.without_doubles().await?;
            let running = pods.iter().filter(|pod| pod.status == PodStatus::Running);
            let running = running.count();
            bar.set_position(running as u64);
            bar.set_message("run");
            if running == self.names.len() {
                break;
            }
            let failed = pods
                .iter()
                .find(|pod| matches!(pod.status, PodStatus::Error | PodStatus::Exited));
            if let Some(pod) = failed {
                return Err(Problem::failed(format!(
                    "{}: RunPod says `{}`",
                    pod.marks.instance, pod.status
                ))
                .fix("look at its log in RunPod's console; `up` once more starts it anew"));
            }
            if started.elapsed() >= limit {
                let states: Vec<String> = pods
                    .iter()
                    .map(|pod| format!("{} is {}", pod.marks.instance, pod.status))
                    .collect();
                return Err(Problem::failed(format!(
                    "after {} s {running} of {} pods run: {}",
                    limit.as_secs(),
                    self.names.len(),
                    states.join(", ")
                ))
                .fix("wait longer with the same command and a greater --wait"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// The pods, once the younger of two of one name is ended.
    async fn without_doubles(&self) -> Result<Vec<Pod>, Problem> {
        let mut kept: Vec<Pod> = Vec::new();
        for pod in self.seen().await? {
            match kept
                .last()
                .is_some_and(|last| last.marks.instance == pod.marks.instance)
            {
                true => {
                    let double = instance(&pod);
                    patiently(|| self.provider.delete(&double)).await?;
                }
                false => kept.push(pod),
            }
        }
        Ok(kept)
    }

    /// The problem, and what costs money nevertheless.
    async fn with_what_is_there(&self, args: &Up, mut problem: Problem) -> Problem {
        let Ok(pods) = self.seen().await else {
            return problem;
        };
        if !pods.is_empty() {
            let cost: f64 = pods.iter().map(|pod| pod.cost).sum();
            problem.message = format!(
                "{}\n  {} of {} pods are there and cost {} an hour; `espalier runpod down --name {}` ends them",
                problem.message,
                pods.len(),
                args.count,
                dollars(cost),
                args.name
            );
        }
        problem
    }
}
