//! What a pipeline has written down: records of steps, each created once, and plans, of which the newest counts.

use std::fmt::Display;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{PipelineName, ProjectId};
use espalier_core::layout;
use espalier_core::pipeline::{PipelinePlan, StepDigest, StepRecord};
use espalier_core::time::Timestamp;
use espalier_core::trace::sha256_hex;
use espalier_runtime::store::{Created, LIST_MAX, Store};
use serde::Serialize;
use serde_json::json;

use super::plan::{Known, Records};
use crate::exit::Problem;

/// Tries to find a free number for a plan, while others take theirs.
const NUMBER_TRIES_MAX: u32 = 16;

/// Where the records of one pipeline are.
#[derive(Clone, Debug)]
pub struct Desk {
    /// The store.
    pub store: Store,
    /// The project.
    pub project: ProjectId,
    /// The pipeline.
    pub name: PipelineName,
}

impl Desk {
    /// The record of a step; none while it has not ended.
    pub async fn step(&self, digest: &StepDigest) -> Result<Option<Known>, Problem> {
        self.stored(digest).await?.transpose()
    }

    /// The same, where it is no failure that it cannot be read.
    async fn stored(&self, digest: &StepDigest) -> Result<Option<Result<Known, Problem>>, Problem> {
        let path = layout::pipeline_step(&self.project, &self.name, digest);
        let bytes = match self.store.get(&path).await {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other?,
        };
        let record = StepRecord::parse(&bytes, &self.name, digest);
        let known = record.map(|record| Known {
            record,
            sha256: sha256_hex(&bytes),
        });
        Ok(Some(known.map_err(|error| {
            broken(&path, &error).fix(
                "remove it, and run the pipeline again: what the step's batch came to is written down anew, as long as the \
                 queue knows the batch",
            )
        })))
    }

    /// Every step that has ended, of this plan and of others, and what of them cannot be read: of a step that the plan has, it
    /// is said again when the step's turn comes.
    pub async fn steps(&self) -> Result<(Records, Vec<Problem>), Problem> {
        let folder = layout::pipeline_steps(&self.project, &self.name);
        let (mut records, mut broken) = (Records::new(), Vec::new());
        for path in self.listed(&folder).await? {
            let Some(digest) = layout::pipeline_step_of(&self.project, &self.name, &path) else {
                continue;
            };
            match self.stored(&digest).await? {
                Some(Ok(known)) => drop(records.insert(digest, known)),
                Some(Err(problem)) => broken.push(problem),
                None => {}
            }
        }
        Ok((records, broken))
    }

    /// Says that somebody runs the pipeline.
    pub async fn beat(&self, now: Timestamp) -> Result<(), Problem> {
        let path = layout::pipeline_beat(&self.project, &self.name);
        let content = encode(&json!({"at_us": now}))?;
        Ok(self.store.put(&path, content.into()).await?)
    }

    /// What was said last by whoever runs the pipeline: it changes while somebody does.
    pub async fn heard(&self) -> Result<Option<Bytes>, Problem> {
        let path = layout::pipeline_beat(&self.project, &self.name);
        match self.store.get(&path).await {
            Err(error) if error.is_not_found() => Ok(None),
            other => Ok(Some(other?)),
        }
    }

    /// Writes down what a step came to. Where somebody else did before, theirs counts.
    pub async fn create(&self, record: &StepRecord) -> Result<Known, Problem> {
        let path = layout::pipeline_step(&self.project, &self.name, &record.digest);
        let content = encode(record)?;
        let known = Known {
            record: record.clone(),
            sha256: sha256_hex(&content),
        };
        match self.store.create(&path, content.into()).await? {
            Created::New => Ok(known),
            Created::Exists => {
                let theirs = self.step(&record.digest).await?;
                theirs.ok_or_else(|| Problem::failed(format!("{path} was deleted meanwhile")))
            }
        }
    }

    /// The newest plan, if there is one.
    pub async fn plan(&self) -> Result<Option<PipelinePlan>, Problem> {
        let Some(seq) = self.newest().await? else {
            return Ok(None);
        };
        let path = layout::pipeline_plan(&self.project, &self.name, seq);
        let bytes = self.store.get(&path).await?;
        let plan = PipelinePlan::parse(&bytes, &self.name);
        plan.map(Some).map_err(|error| broken(&path, &error))
    }

    /// Makes `plan` the newest one, unless the newest is to do the same.
    pub async fn announce(&self, plan: &PipelinePlan) -> Result<(), Problem> {
        for _ in 0..NUMBER_TRIES_MAX {
            if self
                .plan()
                .await?
                .is_some_and(|newest| newest.is_like(plan))
            {
                return Ok(());
            }
            let seq = self.newest().await?.unwrap_or(0) + 1;
            let path = layout::pipeline_plan(&self.project, &self.name, seq);
            if self.store.create(&path, encode(plan)?.into()).await? == Created::New {
                return Ok(());
            }
        }
        let message = format!("no number is free for the plan of pipeline `{}`", self.name);
        Err(Problem::failed(message).fix("run it again"))
    }

    async fn newest(&self) -> Result<Option<u64>, Problem> {
        let folder = layout::pipeline_plans(&self.project, &self.name);
        let paths = self.listed(&folder).await?;
        let numbers = paths
            .iter()
            .filter_map(|path| layout::pipeline_plan_of(&self.project, &self.name, path));
        Ok(numbers.max())
    }

    async fn listed(&self, folder: &str) -> Result<Vec<String>, Problem> {
        let (mut paths, mut after) = (Vec::new(), None::<String>);
        loop {
            let folder = folder.trim_end_matches('/');
            let page = self.store.list(folder, after.as_deref(), LIST_MAX).await?;
            let is_last = page.len() < LIST_MAX;
            paths.extend(page.into_iter().map(|object| object.path));
            if is_last {
                return Ok(paths);
            }
            after = paths.last().cloned();
        }
    }
}

fn broken(path: &str, error: &FieldError) -> Problem {
    Problem::failed(format!("{path} cannot be read: {error}"))
}

fn encode(record: &(impl Serialize + ?Sized)) -> Result<Vec<u8>, Problem> {
    let failed = |error: &dyn Display| Problem::failed(format!("cannot be written down: {error}"));
    serde_json::to_vec_pretty(record).map_err(|error| failed(&error))
}

#[cfg(test)]
pub mod tests {
    use super::super::plan::{Resolved, tests};
    use super::*;

    /// One in memory.
    pub async fn desk() -> Desk {
        Desk {
            store: Store::open("memory://").await.unwrap(),
            project: "p".parse().unwrap(),
            name: "shop".parse().unwrap(),
        }
    }

    #[tokio::test]
    async fn a_step_ends_once_and_the_first_word_counts() {
        let desk = desk().await;
        let plan = tests::plan(1, false);
        let none = Records::new();
        let order = &Resolved::new(&plan, &none).ready()[0];
        let first = tests::known(&plan, order, true).record;
        assert_eq!(desk.step(&order.digest).await.unwrap(), None);
        let known = desk.create(&first).await.unwrap();
        let mut second = first.clone();
        second.counts.solved += 1;
        assert_eq!(desk.create(&second).await.unwrap(), known);
        assert_eq!(known.record, first);
        let all = desk.steps().await.unwrap();
        assert_eq!(all, ([(order.digest.clone(), known)].into(), Vec::new()));
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_stops_only_whoever_needs_it() {
        let desk = desk().await;
        let plan = tests::plan(1, true);
        let none = Records::new();
        let orders = Resolved::new(&plan, &none).ready();
        let good = tests::known(&plan, &orders[0], true).record;
        desk.create(&good).await.unwrap();
        let path = layout::pipeline_step(&desk.project, &desk.name, &orders[1].digest);
        desk.store.put(&path, "{".into()).await.unwrap();
        let (records, broken) = desk.steps().await.unwrap();
        assert_eq!(records.keys().collect::<Vec<_>>(), [&orders[0].digest]);
        assert!(broken.len() == 1 && broken[0].message.contains(&path));
        let problem = desk.step(&orders[1].digest).await.unwrap_err();
        assert_eq!(problem, broken[0]);
        assert!(problem.fix.unwrap().contains("remove it"));
    }

    #[tokio::test]
    async fn who_runs_it_is_heard() {
        let desk = desk().await;
        assert_eq!(desk.heard().await.unwrap(), None);
        desk.beat(Timestamp(1)).await.unwrap();
        let first = desk.heard().await.unwrap();
        desk.beat(Timestamp(2)).await.unwrap();
        assert!(first.is_some() && desk.heard().await.unwrap() != first);
    }

    #[tokio::test]
    async fn the_newest_plan_counts_and_the_same_one_is_no_new_one() {
        let desk = desk().await;
        assert_eq!(desk.plan().await.unwrap(), None);
        let one = tests::plan(1, false);
        desk.announce(&one).await.unwrap();
        let mut later = one.clone();
        later.created_at_us.0 += 5;
        desk.announce(&later).await.unwrap();
        assert_eq!(desk.plan().await.unwrap(), Some(one.clone()));
        let two = tests::plan(2, true);
        desk.announce(&two).await.unwrap();
        assert_eq!(desk.plan().await.unwrap(), Some(two));
        assert_eq!(desk.newest().await.unwrap(), Some(2));
        desk.announce(&one).await.unwrap();
        assert_eq!(desk.newest().await.unwrap(), Some(3));
    }
}
