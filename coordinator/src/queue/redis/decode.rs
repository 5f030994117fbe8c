//! What the server answers, as the queue's own types. The lists are those of `view.lua` and of each script.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, Fence, JobId, JobKey, ProjectId, WorkerId};
use espalier_core::queue::{
    AttemptError, BatchSeq, BatchView, Budgets, Counters, DeadReason, End, JobKind, JobSeq,
    JobState, JobView, Lease, NewJob, StateName,
};
use espalier_core::time::Timestamp;
use redis::Value;

use crate::queue::{JobDetail, JobResult, QueueError};

/// The server's answer, or something stored in it, is not what this version writes.
pub fn unreadable(what: &str) -> QueueError {
    QueueError::Unavailable {
        reason: format!(
            "Redis holds or answered something that this version does not understand: {what}"
        ),
        retry_after: Duration::from_secs(5),
    }
}

/// Text of a string, or the digits of an integer.
pub fn text(value: Value) -> Result<String, QueueError> {
    match value {
        Value::BulkString(bytes) => {
            String::from_utf8(bytes).map_err(|_| unreadable("text that is not UTF-8"))
        }
        Value::SimpleString(text) => Ok(text),
        Value::Int(n) => Ok(n.to_string()),
        other => Err(unreadable(&format!("{other:?} in place of text"))),
    }
}

/// The bytes of a string.
pub fn bytes(value: Value) -> Result<Bytes, QueueError> {
    match value {
        Value::BulkString(bytes) => Ok(bytes.into()),
        other => Err(unreadable(&format!("{other:?} in place of bytes"))),
    }
}

/// A number, however it is written.
pub fn number<T: TryFrom<i64> + std::str::FromStr>(value: Value) -> Result<T, QueueError> {
    if let Value::Int(n) = value {
        return T::try_from(n).map_err(|_| unreadable("a number out of range"));
    }
    parse(&text(value)?)
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, QueueError> {
    text.parse()
        .map_err(|_| unreadable("text in place of a number or name"))
}

/// The entries of an array, taken one after the other.
pub struct Reader(std::vec::IntoIter<Value>);

impl Reader {
    /// Of an array, or of nothing at all.
    pub fn of(value: Value) -> Result<Self, QueueError> {
        match value {
            Value::Array(values) => Ok(Self(values.into_iter())),
            Value::Nil => Ok(Self(Vec::new().into_iter())),
            other => Err(unreadable(&format!("{other:?} in place of a list"))),
        }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    /// How many are left.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The next entry.
    pub fn value(&mut self) -> Result<Value, QueueError> {
        self.0
            .next()
            .ok_or_else(|| unreadable("a list that is too short"))
    }

    /// The next entry as text.
    pub fn text(&mut self) -> Result<String, QueueError> {
        text(self.value()?)
    }

    /// The next entry as bytes.
    pub fn bytes(&mut self) -> Result<Bytes, QueueError> {
        bytes(self.value()?)
    }

    /// The next entry as a number.
    pub fn number<T: TryFrom<i64> + std::str::FromStr>(&mut self) -> Result<T, QueueError> {
        number(self.value()?)
    }

    /// The next entry as a moment in microseconds.
    pub fn moment(&mut self) -> Result<Timestamp, QueueError> {
        self.number().map(Timestamp)
    }

    /// The next entry as a moment; empty for none.
    pub fn moment_or_none(&mut self) -> Result<Option<Timestamp>, QueueError> {
        match self.value()? {
            Value::BulkString(bytes) if bytes.is_empty() => Ok(None),
            value => number(value).map(|us| Some(Timestamp(us))),
        }
    }

    /// The next entry as a list.
    pub fn list(&mut self) -> Result<Self, QueueError> {
        Self::of(self.value()?)
    }
}

/// Fields of a hash by name.
struct Fields(HashMap<String, Value>);

impl Fields {
    fn of(mut flat: Reader) -> Result<Self, QueueError> {
        let mut fields = HashMap::with_capacity(flat.len() / 2);
        while !flat.is_empty() {
            fields.insert(flat.text()?, flat.value()?);
        }
        Ok(Self(fields))
    }

    fn take(&mut self, name: &str) -> Result<Value, QueueError> {
        self.0
            .remove(name)
            .ok_or_else(|| unreadable(&format!("a row without `{name}`")))
    }

    fn text(&mut self, name: &str) -> Result<String, QueueError> {
        text(self.take(name)?)
    }

    fn number<T: TryFrom<i64> + std::str::FromStr>(&mut self, name: &str) -> Result<T, QueueError> {
        number(self.take(name)?)
    }

    fn number_or<T: TryFrom<i64> + std::str::FromStr>(
        &mut self,
        name: &str,
        default: T,
    ) -> Result<T, QueueError> {
        self.0.remove(name).map_or(Ok(default), number)
    }

    fn moment(&mut self, name: &str) -> Result<Timestamp, QueueError> {
        self.number(name).map(Timestamp)
    }

    fn moment_or_none(&mut self, name: &str) -> Result<Option<Timestamp>, QueueError> {
        self.0
            .remove(name)
            .map(|value| number(value).map(Timestamp))
            .transpose()
    }

    fn digest(&mut self, name: &str) -> Result<[u8; 32], QueueError> {
        digest(self.take(name)?)
    }
}

/// A SHA-256.
pub fn digest(value: Value) -> Result<[u8; 32], QueueError> {
    bytes(value)?
        .as_ref()
        .try_into()
        .map_err(|_| unreadable("a digest of another length"))
}

/// `project/batch`.
pub fn batch_name(name: &str) -> Result<(ProjectId, BatchId), QueueError> {
    let (project, batch) = name
        .split_once('/')
        .ok_or_else(|| unreadable("the name of a batch"))?;
    Ok((parse(project)?, parse(batch)?))
}

/// The kind of number `n`.
pub fn kind(n: usize) -> Result<JobKind, QueueError> {
    JobKind::ALL
        .get(n)
        .copied()
        .ok_or_else(|| unreadable("a kind of job"))
}

/// A lane: the number of the kind, then the needs, one a line.
pub fn lane(value: &str) -> Result<(JobKind, BTreeSet<String>), QueueError> {
    let (of, needs) = value.split_once('\n').ok_or_else(|| unreadable("a lane"))?;
    let needs = needs.split('\n').filter(|need| !need.is_empty());
    Ok((kind(parse(of)?)?, needs.map(str::to_owned).collect()))
}

/// Labels as they are stored; empty for none.
pub fn labels(text: &str) -> Result<std::collections::BTreeMap<String, String>, QueueError> {
    if text.is_empty() {
        return Ok(Default::default());
    }
    serde_json::from_str(text).map_err(|_| unreadable("labels"))
}

/// The letters that states have in rows.
pub fn state_of_letter(letter: &str) -> Option<StateName> {
    let at = ["B", "D", "R", "L", "S", "X", "C"]
        .iter()
        .position(|l| *l == letter)?;
    Some(StateName::ALL[at])
}

/// Counters among the fields of a hash, each under its letter behind `before`.
pub fn counters(fields: &mut HashMap<String, Value>, before: &str) -> Result<Counters, QueueError> {
    let mut counts = [0; StateName::ALL.len()];
    for (n, letter) in ["B", "D", "R", "L", "S", "X", "C"].iter().enumerate() {
        if let Some(count) = fields.remove(&format!("{before}{letter}")) {
            counts[n] = number(count)?;
        }
    }
    Ok(Counters::from(counts))
}

/// A batch as `view_batch` shows it.
pub fn batch(mut view: Reader) -> Result<BatchView, QueueError> {
    let seq = BatchSeq(view.number()?);
    let mut fields = Fields::of(view.list()?)?;
    let (project, batch) = batch_name(&fields.text("name")?)?;
    Ok(BatchView {
        project,
        batch,
        seq,
        params_digest: fields.digest("digest")?,
        opened_at: fields.moment("opened")?,
        closed: fields.0.contains_key("closed"),
        cancelled: fields.0.contains_key("cancelled"),
        completed_at: fields.moment_or_none("completed")?,
        counters: counters(&mut fields.0, "")?,
        last_end: view.number()?,
    })
}

/// Reads jobs of one batch, whose deadlines were kept `outage_us` microseconds behind.
pub struct JobReader<'a> {
    pub batch: &'a BatchView,
    pub outage_us: u64,
}

impl JobReader<'_> {
    /// A job as `view_job` shows it, and the number of its end.
    pub fn job(&self, mut view: Reader) -> Result<(u64, JobDetail), QueueError> {
        let id = JobId::new(view.text()?).map_err(|_| unreadable("the name of a job"))?;
        let mut fields = Fields::of(view.list()?)?;
        let (kind, needs) = lane(&view.text()?)?;
        let waits_for = view.number()?;
        let mut deps: Vec<JobKey> = Vec::new();
        let mut listed = view.list()?;
        while !listed.is_empty() {
            deps.push(parse(&listed.text()?)?);
        }
        deps.sort_unstable();
        let error = view.bytes()?;
        let result = view.bytes()?;
        let progress = view.text()?;
        let changed_at = fields.moment("c")?;
        let state = self.state(&mut fields, changed_at, progress)?;
        let key = JobKey::new(self.batch.project.clone(), self.batch.batch.clone(), id);
        let max_runtime = fields.number_or("mr", 0)?;
        let job = JobView {
            key,
            seq: JobSeq(fields.number("n")?),
            batch_seq: self.batch.seq,
            kind,
            priority: fields.number("p")?,
            needs,
            labels: labels(&fields.text("L").unwrap_or_default())?,
            deps,
            waits_for,
            attempts: fields.number_or("st", 0)?,
            budgets: Budgets {
                max_attempts: fields.number_or("ma", NewJob::MAX_ATTEMPTS_DEFAULT)?,
                max_infra: fields.number_or("mi", NewJob::MAX_INFRA_DEFAULT)?,
                failures: fields.number_or("fa", 0)?,
                infra: fields.number_or("fi", 0)?,
            },
            submitted_at: fields.moment("t")?,
            changed_at,
            not_before: fields.moment_or_none("nb")?,
            max_runtime: (max_runtime > 0).then(|| Duration::from_micros(max_runtime)),
            traceparent: fields.0.remove("T").map(text).transpose()?,
            error: stored_error(&error)?,
            spec_digest: fields.digest("d")?,
            state,
        };
        let end = job.state.end().map_or(0, |end| end.seq);
        let succeeded = matches!(job.state, JobState::Succeeded(_));
        let result = succeeded.then(|| stored_result(result)).transpose()?;
        Ok((
            end,
            JobDetail {
                job,
                result: result.filter(|r| *r != JobResult::default()),
            },
        ))
    }

    fn state(
        &self,
        fields: &mut Fields,
        changed_at: Timestamp,
        progress: String,
    ) -> Result<JobState, QueueError> {
        let letter = fields.text("s")?;
        let name = state_of_letter(&letter).ok_or_else(|| unreadable("a state"))?;
        let end = |fields: &mut Fields| {
            Ok::<_, QueueError>(End {
                at: changed_at,
                seq: fields.number("en")?,
            })
        };
        Ok(match name {
            StateName::Blocked => JobState::Blocked,
            StateName::Ready => JobState::Ready,
            StateName::Delayed => JobState::Delayed {
                until: fields.moment("un")?,
            },
            StateName::Succeeded => JobState::Succeeded(end(fields)?),
            StateName::Cancelled => JobState::Cancelled(end(fields)?),
            StateName::Dead => JobState::Dead {
                end: end(fields)?,
                reason: dead_reason(&fields.text("dr")?)?,
            },
            StateName::Leased => JobState::Leased(Box::new(self.lease(fields, progress)?)),
        })
    }

    fn lease(&self, fields: &mut Fields, progress: String) -> Result<Lease, QueueError> {
        let shown = |kept: Timestamp| Timestamp(kept.0 + self.outage_us);
        Ok(Lease {
            worker: WorkerId::new(fields.text("w")?)
                .map_err(|_| unreadable("the name of a worker"))?,
            fence: Fence(fields.number("f")?),
            granted_at: fields.moment("ga")?,
            deadline: shown(fields.moment("dl")?),
            ttl_us: fields.number("tt")?,
            run_until: fields.moment_or_none("ru")?.map(shown),
            ready_since: fields.moment("rs")?,
            cancel_requested: fields.0.contains_key("cr"),
            progress: (!progress.is_empty()).then(|| progress.into()),
        })
    }
}

fn dead_reason(word: &str) -> Result<DeadReason, QueueError> {
    let reasons = [
        DeadReason::Invalid,
        DeadReason::Attempts,
        DeadReason::Infra,
        DeadReason::Dependency,
    ];
    let found = reasons.into_iter().find(|reason| reason.as_str() == word);
    found.ok_or_else(|| unreadable("a reason"))
}

fn stored_error(stored: &[u8]) -> Result<Option<AttemptError>, QueueError> {
    if stored.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(stored)
        .map(Some)
        .map_err(|_| unreadable("the error of an attempt"))
}

/// The length of the manifest's path in two bytes, the path, the summary.
fn stored_result(stored: Bytes) -> Result<JobResult, QueueError> {
    if stored.is_empty() {
        return Ok(JobResult::default());
    }
    let bad = || unreadable("the result of a job");
    let (length, rest) = stored.split_first_chunk::<2>().ok_or_else(bad)?;
    let length = usize::from(u16::from_le_bytes(*length));
    let manifest = rest.get(..length).ok_or_else(bad)?;
    Ok(JobResult {
        manifest: String::from_utf8(manifest.to_vec()).map_err(|_| bad())?,
        summary: stored.slice(2 + length..),
    })
}
