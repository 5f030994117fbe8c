//! `espalier traces label`, `drop` and `undrop`: what people say of a trace as a whole.

use std::collections::BTreeMap;
use std::str::FromStr;

use clap::Args;
use espalier_core::error::FieldError;
use espalier_core::trace::edits::{Change, Judgement};

use super::Place;
use super::pick::{Author, Whole, Writer, report};
use crate::context::Context;
use crate::exit::{Outcome, Problem};
use crate::jobs::JobName;
use crate::progress;

/// Options of `traces label`.
#[derive(Args, Clone, Debug)]
pub struct Label {
    /// Jobs, and labels to set
    #[arg(value_name = "BATCH/JOB | KEY=VALUE")]
    pub items: Vec<Item>,
    /// Removes a label; may be given several times
    #[arg(long, value_name = "KEY")]
    pub remove: Vec<String>,
    /// Fit for training
    #[arg(long, conflicts_with = "reject")]
    pub accept: bool,
    /// Not fit for training
    #[arg(long)]
    pub reject: bool,
    /// Counts in place of the reward that checks gave
    #[arg(long, value_name = "REWARD")]
    pub reward: Option<f64>,
    /// In place of single jobs.
    #[command(flatten)]
    pub whole: Whole,
    /// Who, and why.
    #[command(flatten)]
    pub author: Author,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// One word of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A trace.
    Job(JobName),
    /// A label to set.
    Label(String, String),
}

impl FromStr for Item {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        match text.split_once('=') {
            Some((key, value)) => Ok(Self::Label(key.to_owned(), value.to_owned())),
            None => text.parse().map(Self::Job),
        }
    }
}

/// Options of `traces drop` and `traces undrop`.
#[derive(Args, Clone, Debug)]
pub struct Omit {
    /// The jobs that made them
    #[arg(value_name = "BATCH/JOB")]
    pub jobs: Vec<JobName>,
    /// In place of single jobs.
    #[command(flatten)]
    pub whole: Whole,
    /// Who, and why.
    #[command(flatten)]
    pub author: Author,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs `traces label`.
pub async fn label(context: &Context, args: &Label) -> Outcome {
    let mut jobs = Vec::new();
    let mut labels: BTreeMap<String, Option<String>> = BTreeMap::new();
    for item in &args.items {
        match item {
            Item::Job(job) => jobs.push(job.clone()),
            Item::Label(key, value) => drop(labels.insert(key.clone(), Some(value.clone()))),
        }
    }
    labels.extend(args.remove.iter().map(|key| (key.clone(), None)));
    let judgement = match (args.accept, args.reject) {
        (true, _) => Some(Judgement::Accepted),
        (_, true) => Some(Judgement::Rejected),
        _ => None,
    };
    let reward = args.reward;
    if labels.is_empty() && judgement.is_none() && reward.is_none() {
        return Err(Problem::refused("nothing is said of the traces")
            .fix("give KEY=VALUE, --remove KEY, --accept, --reject or --reward"));
    }
    let change = Change::Label {
        labels,
        judgement,
        reward,
    };
    let writer = Writer::open(context, &args.place, &args.author).await?;
    write_all(context, &writer, &jobs, &args.whole, &change).await
}

/// Runs `traces drop`, or its opposite.
pub async fn omit(context: &Context, args: &Omit, change: Change) -> Outcome {
    let writer = Writer::open(context, &args.place, &args.author).await?;
    write_all(context, &writer, &args.jobs, &args.whole, &change).await
}

/// The same change for every trace that is meant.
pub async fn write_all(
    context: &Context,
    writer: &Writer,
    jobs: &[JobName],
    whole: &Whole,
    change: &Change,
) -> Outcome {
    let jobs = writer.choose(jobs, whole).await?;
    let bar = progress::things(jobs.len() as u64, "writing");
    let mut written = Vec::with_capacity(jobs.len());
    for job in &jobs {
        let loaded = writer.load(job).await?;
        written.push(writer.write(loaded, change.clone()).await?.0);
        bar.inc(1);
    }
    bar.finish_and_clear();
    report(context, &written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_traces_or_labels() {
        let label = Item::Label("stage".to_owned(), "a/b=c".to_owned());
        assert_eq!("stage=a/b=c".parse(), Ok(label));
        assert!(matches!("b1/price-1".parse(), Ok(Item::Job(_))));
        assert!("price-1".parse::<Item>().is_err());
    }
}
