//! Whether two projects of equal weight that both had ready jobs were granted equally many.
//!
//! A chunk surely has ready jobs from the first time that one of it is granted to the last first grant of one of it:
//! its jobs became ready together when it was taken, and that last one was ready all the while. Jobs that wait for
//! others or for a moment are not for this.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use espalier_core::id::JobKey;

use super::{Event, Grant, History};

/// The fences between which a project surely had ready jobs.
struct Ready<'a> {
    project: &'a str,
    fences: RangeInclusive<u64>,
}

/// Says where a project got more than `ahead_max` grants ahead of another, in any window in which both had ready jobs.
pub fn check(history: &History, ahead_max: u64, broken: &mut Vec<String>) {
    let mut grants: BTreeMap<u64, &Grant> = BTreeMap::new();
    for event in &history.events {
        if let Event::Granted(grant) = event {
            grants.insert(grant.fence, grant);
        }
    }
    let first: BTreeMap<&JobKey, u64> = grants
        .values()
        .filter(|grant| grant.attempt == 1)
        .map(|grant| (&grant.job, grant.fence))
        .collect();
    let chunks = history.chunks.iter();
    let ready: Vec<Ready<'_>> = chunks.filter_map(|chunk| ready(chunk, &first)).collect();
    for (n, one) in ready.iter().enumerate() {
        for other in ready[n + 1..].iter().filter(|o| o.project != one.project) {
            let from = *one.fences.start().max(other.fences.start());
            let to = *one.fences.end().min(other.fences.end());
            if from > to {
                continue;
            }
            let both = grants.range(from..=to).map(|(_, grant)| *grant);
            let ahead = widest(both, one.project, other.project);
            if ahead > ahead_max {
                broken.push(format!(
                    "of {} and {} one got {ahead} grants ahead between {from} and {to}",
                    one.project, other.project
                ));
            }
        }
    }
}

fn ready<'a>(chunk: &'a [JobKey], first: &BTreeMap<&JobKey, u64>) -> Option<Ready<'a>> {
    let fences = || chunk.iter().filter_map(|key| first.get(key).copied());
    Some(Ready {
        project: chunk.first()?.project.as_str(),
        fences: fences().min()?..=fences().max()?,
    })
}

/// The greatest lead that one of two projects gained over the other within any part of `grants`.
fn widest<'a>(grants: impl Iterator<Item = &'a Grant>, one: &str, other: &str) -> u64 {
    let (mut lead, mut lowest, mut highest) = (0_i64, 0_i64, 0_i64);
    for grant in grants {
        let project = grant.job.project.as_str();
        lead += i64::from(project == one) - i64::from(project == other);
        lowest = lowest.min(lead);
        highest = highest.max(lead);
    }
    highest.abs_diff(lowest)
}
