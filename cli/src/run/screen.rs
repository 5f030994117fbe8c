//! Where a pipeline is shown: a tree that is drawn over on a terminal, a line at each begin and end where there is none, and
//! an event at each change for programs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use espalier_core::id::BatchId;
use espalier_core::pipeline::{PipelinePlan, Step, StepRecord};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, SystemClock};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::display::{Frame, Row, Running, State, line, tree};
use super::plan::{At, Resolved, steps};
use crate::context::Context;
use crate::exit::Problem;
use crate::output::{Out, note};

/// How often the tree is drawn, so that its clocks move.
pub const DRAW_EVERY: Duration = Duration::from_millis(500);
/// Shortest time between two events that say how far a step is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// Columns where there is no terminal: nothing is cut.
const COLUMNS: usize = 1_000;

/// How a step was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It was not there.
    New,
    /// Its batch was there already.
    Attached,
    /// Its jobs were dead, and were put back.
    Retried,
}

impl Begun {
    fn as_str(self) -> &'static str {
        match self {
            Self::New => "begun",
            Self::Attached => "attached",
            Self::Retried => "retried",
        }
    }
}

/// The screen of one pipeline.
pub struct Screen<'a> {
    out: Out,
    plan: &'a PipelinePlan,
    rows: Mutex<Vec<Row>>,
    told: Mutex<BTreeMap<At, Instant>>,
    bars: Vec<ProgressBar>,
}

impl<'a> Screen<'a> {
    /// With every step still to come.
    pub fn new(context: &Context, plan: &'a PipelinePlan) -> Self {
        let row = |at| Row {
            at,
            state: State::ToCome,
        };
        let rows: Vec<Row> = steps(plan).into_iter().map(row).collect();
        let lines = tree(frame(plan, COLUMNS), &rows).len();
        Self {
            out: context.out,
            plan,
            rows: Mutex::new(rows),
            told: Mutex::default(),
            bars: match context.out.json {
                true => Vec::new(),
                false => bars(lines),
            },
        }
    }

    /// The rows as they are now.
    pub fn rows(&self) -> Vec<Row> {
        lock(&self.rows).clone()
    }

    /// Shows what has ended; of `earlier` steps that they had before.
    pub fn resolved(&self, resolved: &Resolved<'_>, is_earlier: bool) -> Result<(), Problem> {
        for at in steps(self.plan) {
            if let Some(record) = resolved.record(at) {
                self.ended(at, record, is_earlier)?;
            }
        }
        Ok(())
    }

    /// A step has begun, in `batch`.
    pub fn begun(&self, at: At, batch: &BatchId, jobs: u64, how: Begun) -> Result<(), Problem> {
        let since = SystemClock.now();
        self.set(
            at,
            State::Runs(Running {
                since,
                of: jobs,
                ..Running::default()
            }),
        );
        if at.step == Step::Evaluation {
            self.past(at, "served")?;
        }
        let how = how.as_str();
        self.tell(
            at,
            || format!("{} {how}: batch {batch}", at.step),
            || json!({"state": how, "batch": batch, "jobs": jobs}),
        )
    }

    /// How far a step is.
    pub fn running(&self, at: At, running: Running) -> Result<(), Problem> {
        let (done, of, counts) = (running.done, running.of, running.counts);
        let words = running.words.clone();
        self.set(at, State::Runs(running));
        let now = Instant::now();
        let is_late = |last: &Instant| now - *last >= PROGRESS_EVERY;
        if !self.out.json || !lock(&self.told).get(&at).is_none_or(is_late) {
            return Ok(());
        }
        lock(&self.told).insert(at, now);
        self.event(
            at,
            json!({"state": "running", "done": done, "of": of, "counts": counts, "progress": words}),
        )
    }

    /// Nothing that a step waits for is a job.
    pub fn waits(&self, at: At, what: &str) -> Result<(), Problem> {
        let since = SystemClock.now();
        let what = what.to_owned();
        let state = State::Waits {
            what: what.clone(),
            since,
        };
        if let Some(row) = self.served(at) {
            self.set(row, state);
            return self.tell(
                row,
                || format!("{} waits {what}", row.step),
                || json!({"state": "waiting", "for": what}),
            );
        }
        self.set(at, state);
        Ok(())
    }

    /// The jobs of a step have ended, and somebody else is to write down what they came to.
    pub fn handed_on(&self, at: At) {
        let what = "for whoever runs it to write down what came of it".to_owned();
        let since = SystemClock.now();
        self.set(at, State::Waits { what, since });
    }

    /// Whether jobs of a step are under way.
    pub fn is_running(&self) -> bool {
        let rows = lock(&self.rows);
        rows.iter().any(|row| matches!(row.state, State::Runs(_)))
    }

    /// What a step waited for is there.
    pub fn past(&self, at: At, what: &str) -> Result<(), Problem> {
        let Some(row) = self.served(at) else {
            return Ok(());
        };
        let what = what.to_owned();
        self.set(row, State::Past { what });
        Ok(())
    }

    /// A step has ended.
    pub fn ended(&self, at: At, record: &StepRecord, is_earlier: bool) -> Result<(), Problem> {
        let state = State::Ended {
            record: Box::new(record.clone()),
            is_earlier,
        };
        if !self.set(at, state) {
            return Ok(());
        }
        if at.step == Step::Evaluation {
            self.past(at, "served")?;
        }
        let row = self.row(at);
        self.tell(
            at,
            || row.map_or_else(String::new, |row| line(frame(self.plan, COLUMNS), &row)),
            || json!({"state": "ended", "is_earlier": is_earlier, "record": record}),
        )
    }

    /// A step failed, or nothing came of it.
    pub fn stopped(&self, at: At, why: &str) -> Result<(), Problem> {
        let why = why.to_owned();
        self.set(at, State::Stopped { why: why.clone() });
        self.tell(
            at,
            || format!("✗ {}: {why}", at.step),
            || json!({"state": "stopped", "why": why}),
        )
    }

    /// Draws the tree, where there is a terminal.
    pub fn draw(&self) {
        if self.bars.is_empty() {
            return;
        }
        let (_, width) = Term::stderr().size();
        let lines = tree(frame(self.plan, width.into()), &lock(&self.rows));
        for (bar, line) in self.bars.iter().zip(lines) {
            bar.set_message(line);
        }
    }

    /// Draws it for the last time, and leaves it there.
    pub fn leave(&self) {
        self.draw();
        for bar in &self.bars {
            bar.abandon();
        }
    }

    /// The row of the wait before a step, where it has one.
    fn served(&self, at: At) -> Option<At> {
        let round = match at.step {
            Step::Evaluation => at.round,
            Step::Probe | Step::Rollouts => at.round - 1,
            _ => return None,
        };
        (round > 0).then_some(At {
            round,
            step: Step::Serve,
        })
    }

    fn row(&self, at: At) -> Option<Row> {
        lock(&self.rows).iter().find(|row| row.at == at).cloned()
    }

    /// Whether that is news.
    fn set(&self, at: At, state: State) -> bool {
        let mut rows = lock(&self.rows);
        let Some(row) = rows.iter_mut().find(|row| row.at == at) else {
            return false;
        };
        // What a step came to does not change.
        if matches!(
            (&row.state, &state),
            (State::Ended { .. }, State::Ended { .. })
        ) {
            return false;
        }
        row.state = state;
        true
    }

    fn tell(
        &self,
        at: At,
        text: impl FnOnce() -> String,
        event: impl FnOnce() -> Value,
    ) -> Result<(), Problem> {
        if self.out.json {
            return self.event(at, event());
        }
        match self.bars.is_empty() {
            true => note(text()),
            false => self.draw(),
        }
        Ok(())
    }

    fn event(&self, at: At, mut event: Value) -> Result<(), Problem> {
        event["step"] = json!(at.step);
        event["round"] = json!(at.round);
        Ok(self
            .out
            .event(&json!({"pipeline": self.plan.pipeline, "event": event}))?)
    }
}

fn frame(plan: &PipelinePlan, width: usize) -> Frame<'_> {
    let now: Timestamp = SystemClock.now();
    Frame { plan, now, width }
}

/// A bar a line; none where standard error is no terminal.
fn bars(lines: usize) -> Vec<ProgressBar> {
    let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    if all.is_hidden() {
        return Vec::new();
    }
    // The template is a constant; the default style shows the message too.
    let style =
        ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = |_| {
        let bar = all.add(ProgressBar::new_spinner());
        bar.set_style(style.clone());
        bar
    };
    (0..lines).map(bar).collect()
}

/// No code that may panic runs under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
