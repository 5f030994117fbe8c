//! What came of a batch: a table by kind of task, why things failed, and whether the numbers add up.

use std::collections::{BTreeMap, HashMap};

use espalier_proto::v1;
use serde_json::{Value, json};

use crate::evaluate::scores_turns;
use crate::expand::ARM_LABEL;
use crate::json;
use crate::output::{count, cut, duration, table};

/// Reasons that are shown; the rest is summed up.
const REASONS_SHOWN_MAX: usize = 12;
/// Longest reason in the table, in characters.
const REASON_CHARS_MAX: usize = 72;

/// What has ended, job by job, and the batch's own counters.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// As the coordinator last said.
    pub batch: v1::Batch,
    ended: HashMap<String, Ended>,
}

/// What the report keeps of a job.
#[derive(Clone, Debug, PartialEq)]
struct Ended {
    state: v1::JobState,
    work: v1::JobKind,
    /// Whether turns were scored, which takes the slot of a rollout.
    is_score: bool,
    kind: String,
    why: String,
    summary: Option<v1::RolloutSummary>,
}

/// One row of the table of rollouts: those of a kind of task.
#[derive(Clone, Debug, Default, PartialEq)]
struct Row {
    jobs: u64,
    solved: u64,
    unsolved: u64,
    unjudged: u64,
    dead: u64,
    cancelled: u64,
    finished: u64,
    reward: f64,
    turns: u64,
    tool_calls: u64,
    tool_errors: u64,
    tokens: u64,
    wall_ms: u64,
}

impl Report {
    /// Adds an event. A job that ended twice, because somebody retried it, counts as it ended last.
    pub fn take(&mut self, event: v1::BatchEvent) {
        if let Some(batch) = event.batch {
            self.batch = batch;
        }
        for job in event.ended {
            let (id, ended) = read(job);
            self.ended.insert(id, ended);
        }
    }

    /// The batch's counters.
    pub fn counts(&self) -> v1::Counts {
        self.batch.counts.unwrap_or_default()
    }

    /// How many jobs there are.
    pub fn jobs(&self) -> u64 {
        let c = self.counts();
        c.blocked + c.delayed + c.ready + c.leased + c.succeeded + c.dead + c.cancelled
    }

    /// What is wrong with a complete batch: dead jobs, and counters that do not add up.
    pub fn faults(&self) -> Vec<String> {
        let counts = self.counts();
        let mut faults = Vec::new();
        if counts.dead > 0 {
            let name = &self.batch.batch;
            faults.push(format!(
                "{} jobs are dead: see `espalier jobs {name} --state dead`, retry with `espalier retry {name}`",
                count(counts.dead)
            ));
        }
        let open = counts.blocked + counts.delayed + counts.ready + counts.leased;
        if self.batch.complete && open > 0 {
            faults.push(format!(
                "the batch is complete, and {} of its jobs are not",
                count(open)
            ));
        }
        for (state, counted) in [
            (v1::JobState::Succeeded, counts.succeeded),
            (v1::JobState::Dead, counts.dead),
            (v1::JobState::Cancelled, counts.cancelled),
        ] {
            let seen = self.ended.values().filter(|job| job.state == state).count() as u64;
            if seen != counted {
                faults.push(format!(
                    "the counters do not add up: {} jobs ended as {}, and the batch counts {}",
                    count(seen),
                    json::state(state),
                    count(counted)
                ));
            }
        }
        faults
    }

    fn rows(&self) -> BTreeMap<&str, Row> {
        let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
        for job in self.ended.values().filter(|job| job.is_rollout()) {
            rows.entry(&job.kind).or_default().add(job);
        }
        rows
    }

    /// Jobs that are no rollouts, by what they are.
    fn work(&self) -> BTreeMap<&'static str, Work> {
        let mut work: BTreeMap<_, Work> = BTreeMap::new();
        for job in self.ended.values().filter(|job| !job.is_rollout()) {
            work.entry(job.name()).or_default().add(job);
        }
        work
    }

    /// How often each thing went wrong, most frequent first.
    fn reasons(&self) -> Vec<(&str, u64)> {
        let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
        for job in self.ended.values().filter(|job| !job.why.is_empty()) {
            *reasons.entry(&job.why).or_default() += 1;
        }
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by_key(|(reason, n)| (std::cmp::Reverse(*n), *reason));
        reasons
    }

    /// For people.
    pub fn to_text(&self, store: Option<&str>) -> String {
        let tables = [self.rollouts_table(), self.work_table()];
        let tables: Vec<_> = tables.into_iter().flatten().collect();
        let mut text = tables.join("\n\n");
        let reasons = self.reasons();
        if !reasons.is_empty() {
            let rows = reasons
                .iter()
                .take(REASONS_SHOWN_MAX)
                .map(|(reason, n)| [count(*n), (*reason).to_owned()])
                .collect();
            let why = match self.rows().is_empty() {
                true => "why not done",
                false => "why not solved",
            };
            text.push_str(&format!("\n\n{}", table(["jobs", why], rows)));
            if let Some(rest) = reasons
                .get(REASONS_SHOWN_MAX..)
                .filter(|rest| !rest.is_empty())
            {
                let jobs: u64 = rest.iter().map(|(_, n)| n).sum();
                text.push_str(&format!(
                    "\n … and {} other reasons of {} jobs",
                    rest.len(),
                    count(jobs)
                ));
            }
        }
        text.push_str(&self.end());
        text.push_str(&self.places(store));
        text
    }

    /// None where the batch has other jobs only.
    fn rollouts_table(&self) -> Option<String> {
        let rows = self.rows();
        if rows.is_empty() && !self.ended.is_empty() {
            return None;
        }
        let mut total = Row::default();
        let mut lines: Vec<[String; 10]> = Vec::new();
        for (kind, row) in &rows {
            lines.push(row.cells(if kind.is_empty() { "(none)" } else { kind }));
            total.join(row);
        }
        if rows.len() != 1 {
            lines.push(total.cells("total"));
        }
        let header = [
            "task kind",
            "jobs",
            "solved",
            "failed",
            "dead",
            "reward",
            "turns",
            "tool calls",
            "tokens",
            "s/rollout",
        ];
        Some(table(header, lines))
    }

    /// None where all jobs are rollouts.
    fn work_table(&self) -> Option<String> {
        let work = self.work();
        let lines: Vec<_> = work.iter().map(|(kind, work)| work.cells(kind)).collect();
        let header = [
            "work",
            "jobs",
            "done",
            "dead",
            "cancelled",
            "requests",
            "failed",
            "tokens",
        ];
        (!lines.is_empty()).then(|| table(header, lines))
    }

    /// How long the batch took, and whether it was cancelled; empty while it is not complete.
    fn end(&self) -> String {
        let v1::Batch {
            created_at_us,
            completed_at_us,
            cancelled,
            ..
        } = self.batch;
        if completed_at_us == 0 {
            return String::new();
        }
        let what = if cancelled { "cancelled" } else { "complete" };
        let took_ms = completed_at_us.saturating_sub(created_at_us) / 1_000;
        format!("\n\n{what} after {}", duration(took_ms))
    }

    fn places(&self, store: Option<&str>) -> String {
        let v1::Batch { batch, project, .. } = &self.batch;
        let mut places = Vec::new();
        if !self.rows().is_empty() {
            places.push(format!("espalier traces list {batch}"));
        }
        if let Some(store) = store {
            let store = store.trim_end_matches('/');
            places.push(format!("{store}/{project}/batches/{batch}/"));
        }
        let what = if self.work().is_empty() {
            "traces"
        } else {
            "output"
        };
        match places.is_empty() {
            true => String::new(),
            false => format!("\n\n{what}: {}", places.join("\n        ")),
        }
    }

    /// For programs.
    pub fn to_json(&self, store: Option<&str>) -> Value {
        let kinds: BTreeMap<&str, Value> = self
            .rows()
            .iter()
            .map(|(kind, row)| (*kind, row.to_json()))
            .collect();
        let work: BTreeMap<&str, Value> = self
            .work()
            .iter()
            .map(|(kind, work)| (*kind, work.to_json()))
            .collect();
        let reasons: Vec<Value> = self
            .reasons()
            .iter()
            .map(|(reason, n)| json!({"reason": reason, "jobs": n}))
            .collect();
        json!({"report": {
            "batch": json::batch(&self.batch),
            "kinds": kinds,
            "work": work,
            "reasons": reasons,
            "faults": self.faults(),
            "store": store,
        }})
    }
}

impl Row {
    fn add(&mut self, job: &Ended) {
        self.jobs += 1;
        match job.state {
            v1::JobState::Dead => self.dead += 1,
            v1::JobState::Cancelled => self.cancelled += 1,
            _ => {}
        }
        let Some(summary) = &job.summary else { return };
        self.finished += 1;
        match summary.reward {
            Some(reward) if reward >= 1.0 => self.solved += 1,
            Some(_) => self.unsolved += 1,
            None => self.unjudged += 1,
        }
        self.reward += summary.reward.unwrap_or(0.0);
        self.turns += u64::from(summary.turns);
        self.tool_calls += u64::from(summary.tool_calls);
        self.tool_errors += u64::from(summary.tool_errors);
        self.tokens += summary.prompt_tokens + summary.completion_tokens;
        self.wall_ms += summary.wall_ms;
    }

    fn join(&mut self, other: &Self) {
        self.jobs += other.jobs;
        self.solved += other.solved;
        self.unsolved += other.unsolved;
        self.unjudged += other.unjudged;
        self.dead += other.dead;
        self.cancelled += other.cancelled;
        self.finished += other.finished;
        self.reward += other.reward;
        self.turns += other.turns;
        self.tool_calls += other.tool_calls;
        self.tool_errors += other.tool_errors;
        self.tokens += other.tokens;
        self.wall_ms += other.wall_ms;
    }

    /// A mean over finished rollouts; a dash where there are none.
    fn mean(&self, sum: f64, of: u64, digits: usize) -> String {
        if of == 0 {
            return "-".to_owned();
        }
        format!("{:.digits$}", sum / of as f64)
    }

    fn cells(&self, kind: &str) -> [String; 10] {
        let judged = self.solved + self.unsolved;
        let tokens = self.tokens.checked_div(self.finished);
        let tokens = tokens.map_or_else(|| "-".to_owned(), count);
        [
            kind.to_owned(),
            count(self.jobs),
            count(self.solved),
            count(self.unsolved),
            count(self.dead),
            self.mean(self.reward, judged, 2),
            self.mean(self.turns as f64, self.finished, 1),
            self.mean(self.tool_calls as f64, self.finished, 1),
            tokens,
            self.mean(self.wall_ms as f64 / 1000.0, self.finished, 1),
        ]
    }

    fn to_json(&self) -> Value {
        json!({
            "jobs": self.jobs,
            "solved": self.solved,
            "failed": self.unsolved,
            "unjudged": self.unjudged,
            "dead": self.dead,
            "cancelled": self.cancelled,
            "finished": self.finished,
            "reward_sum": self.reward,
            "turns": self.turns,
            "tool_calls": self.tool_calls,
            "tool_errors": self.tool_errors,
            "tokens": self.tokens,
            "wall_ms": self.wall_ms,
        })
    }
}

/// One row of the table of other jobs: those of a kind of work.
#[derive(Clone, Debug, Default, PartialEq)]
struct Work {
    jobs: u64,
    done: u64,
    dead: u64,
    cancelled: u64,
    /// Lines that were answered.
    requests: u64,
    /// Of these, with an error.
    failed: u64,
    tokens: u64,
}

impl Work {
    fn add(&mut self, job: &Ended) {
        self.jobs += 1;
        match job.state {
            v1::JobState::Dead => self.dead += 1,
            v1::JobState::Cancelled => self.cancelled += 1,
            _ => self.done += 1,
        }
        let Some(summary) = &job.summary else { return };
        if let Some(generate) = &summary.generate {
            self.requests += generate.lines;
            self.failed += generate.failed;
            self.tokens += generate.prompt_tokens + generate.completion_tokens;
        }
        if let Some(score) = &summary.score {
            self.tokens += score.prompt_tokens + score.completion_tokens;
        }
        self.tokens += summary.train.as_ref().map_or(0, |train| train.tokens);
        self.tokens += summary.curate.as_ref().map_or(0, |curate| curate.tokens);
    }

    fn cells(&self, kind: &str) -> [String; 8] {
        [
            kind.to_owned(),
            count(self.jobs),
            count(self.done),
            count(self.dead),
            count(self.cancelled),
            count(self.requests),
            count(self.failed),
            count(self.tokens),
        ]
    }

    fn to_json(&self) -> Value {
        json!({
            "jobs": self.jobs,
            "done": self.done,
            "dead": self.dead,
            "cancelled": self.cancelled,
            "requests": self.requests,
            "failed": self.failed,
            "tokens": self.tokens,
        })
    }
}

impl Ended {
    fn is_rollout(&self) -> bool {
        self.work == v1::JobKind::Rollout && !self.is_score
    }

    /// What it is called in the table of other jobs.
    fn name(&self) -> &'static str {
        match self.is_score {
            true => "score",
            false => json::kind(self.work),
        }
    }
}

fn read(job: v1::Job) -> (String, Ended) {
    let state = job.state();
    let why = why(&job);
    let label = job.labels.get("task_kind").cloned();
    let summary = job.summary.as_ref();
    let kind = summary.map(|summary| summary.task_kind.clone());
    let arm = job.labels.get(ARM_LABEL).map(String::as_str);
    let is_score = match summary {
        Some(summary) => summary.score.is_some(),
        None => scores_turns(&job.id, arm),
    };
    let ended = Ended {
        state,
        work: job.kind(),
        is_score,
        kind: kind.or(label).unwrap_or_default(),
        why,
        summary: job.summary.filter(|_| state == v1::JobState::Succeeded),
    };
    (job.id, ended)
}

/// Why a job is not solved; empty if it is, or if nothing judged it.
fn why(job: &v1::Job) -> String {
    match (job.state(), &job.summary, &job.last_error) {
        (v1::JobState::Cancelled, _, _) => "cancelled".to_owned(),
        (v1::JobState::Dead, _, Some(error)) => {
            let text = format!("dead, {}: {}", json::class(error.class()), error.message);
            cut(&text, REASON_CHARS_MAX)
        }
        (v1::JobState::Dead, _, None) => "dead".to_owned(),
        (_, Some(summary), _) if summary.reward.is_some_and(|reward| reward < 1.0) => {
            let stopped_early = summary.stop != "answered";
            match (stopped_early, summary.reason.is_empty()) {
                (true, _) => format!("stopped: {}", summary.stop),
                (false, true) => "reward below 1".to_owned(),
                (false, false) => cut(&summary.reason, REASON_CHARS_MAX),
            }
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(
        id: &str,
        state: v1::JobState,
        kind: &str,
        reward: Option<f64>,
        reason: &str,
    ) -> v1::Job {
        let summary = (state == v1::JobState::Succeeded).then(|| v1::RolloutSummary {
            reward,
            stop: "answered".to_owned(),
            reason: reason.to_owned(),
            task_kind: kind.to_owned(),
            turns: 4,
            tool_calls: 3,
            prompt_tokens: 1000,
            completion_tokens: 500,
            wall_ms: 2500,
            ..Default::default()
        });
        v1::Job {
            id: id.to_owned(),
            kind: v1::JobKind::Rollout.into(),
            state: state.into(),
            summary,
            ..Default::default()
        }
    }

    fn report(jobs: Vec<v1::Job>, counts: v1::Counts) -> Report {
        let mut report = Report::default();
        report.take(v1::BatchEvent {
            batch: Some(v1::Batch {
                batch: "b1".to_owned(),
                project: "default".to_owned(),
                closed: true,
                complete: true,
                counts: Some(counts),
                created_at_us: 1_000_000,
                completed_at_us: 62_000_000,
                cancelled: false,
            }),
            ended: jobs,
            cursor: 1,
            open_questions: 0,
        });
        report
    }

    #[test]
    fn golden_report() {
        let mut dead = job("d", v1::JobState::Dead, "", None, "");
        dead.last_error = Some(v1::JobError {
            class: v1::ErrorClass::Infra.into(),
            message: "the browser crashed".to_owned(),
            log_tail: String::new(),
        });
        let jobs = vec![
            job("a", v1::JobState::Succeeded, "shop", Some(1.0), ""),
            job(
                "b",
                v1::JobState::Succeeded,
                "shop",
                Some(0.0),
                "the answer is 5, not 7",
            ),
            job("c", v1::JobState::Succeeded, "login", Some(1.0), ""),
            dead,
        ];
        let counts = v1::Counts {
            succeeded: 3,
            dead: 1,
            ..Default::default()
        };
        let report = report(jobs, counts);
        let expected = [
            " TASK KIND  JOBS  SOLVED  FAILED  DEAD  REWARD  TURNS  TOOL CALLS  TOKENS  S/ROLLOUT",
            " (none)     1     0       0       1     -       -      -           -       -",
            " login      1     1       0       0     1.00    4.0    3.0         1,500   2.5",
            " shop       2     1       1       0     0.50    4.0    3.0         1,500   2.5",
            " total      4     2       1       1     0.67    4.0    3.0         1,500   2.5",
            "",
            " JOBS  WHY NOT SOLVED",
            " 1     dead, infra: the browser crashed",
            " 1     the answer is 5, not 7",
            "",
            "complete after 1 min 01 s",
            "",
            "traces: espalier traces list b1",
            "        file:///s/default/batches/b1/",
        ];
        assert_eq!(report.to_text(Some("file:///s")), expected.join("\n"));
        assert_eq!(report.faults().len(), 1);
    }

    #[test]
    fn work_that_is_no_rollout_has_a_table_of_its_own() {
        let mut answers = job("a", v1::JobState::Succeeded, "", None, "");
        answers.kind = v1::JobKind::Generate.into();
        answers.summary = Some(v1::RolloutSummary {
            generate: Some(v1::GenerateSummary {
                lines: 40,
                failed: 2,
                prompt_tokens: 3_000,
                completion_tokens: 500,
            }),
            ..Default::default()
        });
        let mut dead = job("d", v1::JobState::Dead, "", None, "");
        dead.kind = v1::JobKind::Generate.into();
        dead.last_error = Some(v1::JobError {
            class: v1::ErrorClass::Invalid.into(),
            message: "no such file".to_owned(),
            log_tail: String::new(),
        });
        let counts = v1::Counts {
            succeeded: 1,
            dead: 1,
            ..Default::default()
        };
        let jobs = vec![answers, dead];
        let mixed = [
            jobs.clone(),
            vec![job("r", v1::JobState::Succeeded, "shop", Some(1.0), "")],
        ];
        let mixed = report(mixed.concat(), counts).to_json(None);
        assert_eq!(mixed["report"]["kinds"]["shop"]["jobs"], 1);
        let report = report(jobs, counts);
        let expected = [
            " WORK      JOBS  DONE  DEAD  CANCELLED  REQUESTS  FAILED  TOKENS",
            " generate  2     1     1     0          40        2       3,500",
            "",
            " JOBS  WHY NOT DONE",
            " 1     dead, invalid: no such file",
            "",
            "complete after 1 min 01 s",
            "",
            "output: file:///s/default/batches/b1/",
        ];
        assert_eq!(report.to_text(Some("file:///s")), expected.join("\n"));
        let json = report.to_json(None);
        assert_eq!(json["report"]["work"]["generate"]["requests"], 40);
        assert_eq!(json["report"]["kinds"], json!({}));
    }

    #[test]
    fn turns_that_were_not_scored_are_no_rollout() {
        let mut dead = job("b.turns-00001", v1::JobState::Dead, "", None, "");
        dead.labels = [(ARM_LABEL.to_owned(), "b".to_owned())].into();
        let counts = v1::Counts {
            dead: 1,
            ..Default::default()
        };
        let json = report(vec![dead], counts).to_json(None);
        assert_eq!(json["report"]["work"]["score"]["dead"], 1);
        assert_eq!(json["report"]["kinds"], json!({}));
    }

    #[test]
    fn counters_must_add_up() {
        let jobs = || vec![job("a", v1::JobState::Succeeded, "shop", Some(1.0), "")];
        let counts = v1::Counts {
            succeeded: 1,
            ..Default::default()
        };
        assert_eq!(report(jobs(), counts).faults(), Vec::<String>::new());
        let more = v1::Counts {
            succeeded: 2,
            ..counts
        };
        let faults = report(jobs(), more).faults();
        assert_eq!(
            faults,
            ["the counters do not add up: 1 jobs ended as succeeded, and the batch counts 2"]
        );
        let open = v1::Counts {
            leased: 1,
            ..counts
        };
        assert_eq!(report(jobs(), open).faults().len(), 1);
    }

    #[test]
    fn a_job_that_ended_twice_counts_as_it_ended_last() {
        let counts = v1::Counts {
            succeeded: 1,
            ..Default::default()
        };
        let mut report = report(vec![job("a", v1::JobState::Dead, "", None, "")], counts);
        report.take(v1::BatchEvent {
            ended: vec![job("a", v1::JobState::Succeeded, "shop", Some(1.0), "")],
            ..Default::default()
        });
        assert_eq!(report.faults(), Vec::<String>::new());
    }
}
