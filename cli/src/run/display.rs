//! A pipeline as lines of text: one a step, with its mark, how far it is, what it came to, what it took. Pure: whoever draws
//! brings the time.

use console::truncate_str;
use espalier_core::compare::{Prices, words};
use espalier_core::pipeline::{PipelinePlan, Step, StepCounts, StepOutput, StepRecord};
use espalier_core::spec::AdapterRef;
use espalier_core::time::Timestamp;

use super::plan::At;
use crate::output::{count, duration, plain};

/// Between two columns.
const GAP: usize = 2;
/// Columns of a row: name, how far, share solved, tokens, cost, time, and the rest in words.
const COLUMNS: usize = 7;

/// A step, as it is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Which.
    pub at: At,
    /// How it is.
    pub state: State,
}

/// How a step is.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// It has not begun.
    ToCome,
    /// It waits for something that is no job.
    Waits {
        /// For what.
        what: String,
        /// Since when.
        since: Timestamp,
    },
    /// Its jobs run.
    Runs(Running),
    /// It has ended.
    Ended {
        /// What it came to.
        record: Box<StepRecord>,
        /// Whether that was before this run.
        is_earlier: bool,
    },
    /// What it waited for is there.
    Past {
        /// What that is.
        what: String,
    },
    /// It failed, or nothing came of it.
    Stopped {
        /// Why.
        why: String,
    },
}

/// Jobs that run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Running {
    /// Since when there are any.
    pub since: Timestamp,
    /// When this was first seen, and how far it was then.
    pub first: Option<(Timestamp, u64)>,
    /// How far it is.
    pub done: u64,
    /// Of how much; 0: that is not known.
    pub of: u64,
    /// What came of those that have ended.
    pub counts: StepCounts,
    /// What a worker says.
    pub words: String,
    /// What a worker says of the time that is left, in milliseconds.
    pub left_ms: Option<u64>,
}

impl Running {
    /// The time that is left at the pace since it was first seen, where nobody says another, in milliseconds.
    fn left(&self, now: Timestamp) -> Option<u64> {
        if self.left_ms.is_some() {
            return self.left_ms;
        }
        let (since, before) = self.first?;
        let done = self.done.checked_sub(before).filter(|done| *done > 0)?;
        let took_ms = now.since(since).as_millis() as f64;
        let left = self.of.checked_sub(self.done)?;
        Some((took_ms / done as f64 * left as f64) as u64)
    }
}

/// What all rows have in common.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// What is to be done.
    pub plan: &'a PipelinePlan,
    /// The present moment.
    pub now: Timestamp,
    /// Columns of the terminal.
    pub width: usize,
}

/// The whole pipeline: a title, and a line a step.
pub fn tree(frame: Frame<'_>, rows: &[Row]) -> Vec<String> {
    let plan = frame.plan;
    let title = format!(
        "{}: {} of {}",
        plan.pipeline,
        rounds(plan.rounds),
        plan.base
    );
    let cells: Vec<[String; COLUMNS]> = rows.iter().map(|row| cells(frame, row)).collect();
    let widths: Vec<usize> = (0..COLUMNS)
        .map(|n| {
            cells
                .iter()
                .map(|row| row[n].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut lines = vec![title];
    for (n, (row, cells)) in rows.iter().zip(&cells).enumerate() {
        let is_first = n == 0 || rows[n - 1].at.round != row.at.round;
        if is_first && plan.rounds > 1 {
            lines.push(format!("round {}", row.at.round));
        }
        let is_last = rows
            .get(n + 1)
            .is_none_or(|next| next.at.round != row.at.round);
        let branch = if is_last { "└─" } else { "├─" };
        lines.push(format!("{branch} {}", joined(cells, &widths)));
    }
    let fit = |line: String| truncate_str(line.trim_end(), frame.width, "…").into_owned();
    lines.into_iter().map(fit).collect()
}

fn rounds(n: u32) -> String {
    match n {
        1 => "one round".to_owned(),
        n => format!("{n} rounds"),
    }
}

fn joined(cells: &[String; COLUMNS], widths: &[usize]) -> String {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(widths).filter(|(_, width)| **width > 0) {
        line.push_str(cell);
        let pad = width.saturating_sub(cell.chars().count()) + GAP;
        line.extend(std::iter::repeat_n(' ', pad));
    }
    line
}

/// A step in a line of its own, for where nothing can be drawn over.
pub fn line(frame: Frame<'_>, row: &Row) -> String {
    let mut parts: Vec<String> = cells(frame, row).into();
    parts.retain(|part| !part.is_empty());
    let round = match frame.plan.rounds {
        1 => String::new(),
        _ => format!("round {} ", row.at.round),
    };
    format!("{round}{}", parts.join("  "))
}

fn cells(frame: Frame<'_>, row: &Row) -> [String; COLUMNS] {
    let mut cells: [String; COLUMNS] = Default::default();
    cells[0] = format!("{} {}", mark(&row.state), row.at.step);
    match &row.state {
        State::ToCome => cells[1] = to_come(frame.plan, row.at.step),
        State::Waits { what, since } => {
            cells[5] = took(frame.now.since(*since).as_millis());
            cells[6] = format!("waits {}", plain(what));
        }
        State::Runs(running) => of_running(frame, running, &mut cells),
        State::Ended { record, is_earlier } => {
            of_record(frame, record, &mut cells);
            if *is_earlier {
                add(&mut cells[6], "done before");
            }
        }
        State::Past { what } | State::Stopped { why: what } => cells[6] = plain(what),
    }
    cells
}

/// Something more in a cell.
fn add(cell: &mut String, more: &str) {
    if !cell.is_empty() && !more.is_empty() {
        cell.push_str(" · ");
    }
    cell.push_str(more);
}

fn mark(state: &State) -> &'static str {
    match state {
        State::ToCome => "○",
        State::Waits { .. } | State::Runs(_) => "●",
        State::Ended { record, .. } => match record.output {
            StepOutput::Unpublished { .. } => "–",
            _ => "✓",
        },
        State::Past { .. } => "✓",
        State::Stopped { .. } => "✗",
    }
}

fn to_come(plan: &PipelinePlan, step: Step) -> String {
    match plan.step(step) {
        Some(planned) if planned.tasks > 0 => match step {
            Step::Rollouts if plan.step(Step::Probe).is_some() => {
                format!("{} at most", count(planned.jobs))
            }
            _ => count(planned.jobs),
        },
        _ => String::new(),
    }
}

fn of_running(frame: Frame<'_>, running: &Running, cells: &mut [String; COLUMNS]) {
    cells[1] = match (running.done, running.of) {
        (0, 0) => String::new(),
        (done, 0) => count(done),
        (done, of) => format!("{} of {}", count(done), count(of)),
    };
    cells[2] = solved(&running.counts).unwrap_or_default();
    of_tokens(frame.plan, &running.counts, cells);
    cells[5] = took(frame.now.since(running.since).as_millis());
    cells[6] = plain(&running.words);
    if let Some(left) = running.left(frame.now) {
        add(&mut cells[6], &format!("{} left", duration(left)));
    }
}

fn of_record(frame: Frame<'_>, record: &StepRecord, cells: &mut [String; COLUMNS]) {
    let counts = &record.counts;
    if record.counts.jobs > 1 || counts.judged > 0 {
        cells[1] = format!("{} of {}", count(counts.succeeded), count(counts.jobs));
    }
    cells[2] = solved(counts).unwrap_or_default();
    of_tokens(frame.plan, counts, cells);
    cells[5] = took(u128::from(record.took_ms()));
    if record.output != StepOutput::Rollouts {
        cells[6] = outcome(record);
    }
}

fn took(ms: u128) -> String {
    duration(u64::try_from(ms).unwrap_or(u64::MAX))
}

/// What a step came to, in words.
pub fn outcome(record: &StepRecord) -> String {
    match &record.output {
        StepOutput::Rollouts => solved(&record.counts).unwrap_or_default(),
        StepOutput::Probe { tasks, dropped } => {
            let mut text = format!(
                "always {}, sometimes {}, never {}",
                count(tasks.always),
                count(tasks.sometimes),
                count(tasks.never)
            );
            if !dropped.is_empty() {
                text.push_str(&format!("; {} dropped", count(dropped.len() as u64)));
            }
            text
        }
        StepOutput::Dataset {
            dataset,
            train_rows,
            eval_rows,
            ..
        } => format!(
            "{dataset}, {} rows and {} held out",
            count(*train_rows),
            count(*eval_rows)
        ),
        StepOutput::Adapter {
            adapter,
            steps,
            loss,
            eval_loss,
            agreement,
            ..
        } => {
            let held_out = eval_loss.map(|loss| format!(", held-out {loss:.4}"));
            let agreement = agreement.as_ref();
            let agreement = agreement.map(|agreement| format!(", {}", agreement.short()));
            format!(
                "{adapter}, {} steps, loss {loss:.4}{}{}",
                count(*steps),
                held_out.unwrap_or_default(),
                agreement.unwrap_or_default()
            )
        }
        StepOutput::Comparison {
            difference, passed, ..
        } => format!(
            "{} points, the gate {}",
            words::points(difference),
            if *passed { "passes" } else { "stays shut" }
        ),
        StepOutput::Published {
            adapter, canary, ..
        } => published(adapter, *canary),
        StepOutput::Unpublished { why } => plain(why),
    }
}

/// What a published version is.
pub fn published(adapter: &AdapterRef, canary: Option<f64>) -> String {
    match canary {
        None => format!("{adapter} is latest"),
        Some(share) => format!("{adapter} has {} % of conversations", share * 100.0),
    }
}

/// The share of judged rollouts that is solved; none where none is judged.
fn solved(counts: &StepCounts) -> Option<String> {
    let share = counts.solved as f64 / counts.judged as f64;
    (counts.judged > 0).then(|| format!("solved {:.0} %", share * 100.0))
}

fn of_tokens(plan: &PipelinePlan, counts: &StepCounts, cells: &mut [String; COLUMNS]) {
    let tokens = counts.prompt_tokens + counts.completion_tokens;
    if tokens > 0 {
        cells[3] = format!("{} tokens", short(tokens));
        cells[4] = money(plan, counts).unwrap_or_default();
    }
}

/// What rollouts cost; none where prices are not known.
pub fn money(plan: &PipelinePlan, counts: &StepCounts) -> Option<String> {
    plan.prices
        .map(|prices| format!("{:.2} {}", cost(prices, counts), plan.currency))
}

/// What rollouts cost, in the currency of the prices.
pub fn cost(prices: Prices, counts: &StepCounts) -> f64 {
    let of = |price: f64, tokens: u64| price * tokens as f64 / 1e6;
    of(prices.prompt, counts.prompt_tokens) + of(prices.completion, counts.completion_tokens)
}

/// 1234567 as 1.2 M.
pub fn short(n: u64) -> String {
    match n {
        0..10_000 => count(n),
        10_000..1_000_000 => format!("{:.0} k", n as f64 / 1e3),
        _ => format!("{:.1} M", n as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::adapter::{Agreement, Difference};

    use super::super::plan::{Resolved, steps, tests};
    use super::*;

    fn frame(plan: &PipelinePlan) -> Frame<'_> {
        Frame {
            plan,
            now: Timestamp(181_000_000),
            width: 120,
        }
    }

    /// A pipeline in the middle of its rollouts.
    fn rows(plan: &PipelinePlan) -> Vec<Row> {
        let (all, _) = tests::played(plan, &vec![true; plan.rounds as usize]);
        let resolved = Resolved::new(plan, &all);
        let of = |at: At| {
            let record = Box::new(resolved.record(at)?.clone());
            Some(State::Ended {
                record,
                is_earlier: at.step == Step::Baseline,
            })
        };
        let state = |at: At| match at.step {
            Step::Serve => State::ToCome,
            _ => of(at).unwrap(),
        };
        let row = |at| Row {
            at,
            state: state(at),
        };
        steps(plan).into_iter().map(row).collect()
    }

    #[test]
    fn golden_tree() {
        let mut plan = tests::plan(1, true);
        plan.prices = Some(Prices {
            prompt: 0.5,
            completion: 1.5,
        });
        let mut rows = rows(&plan);
        rows[2].state = State::Runs(Running {
            since: Timestamp(1_000_000),
            first: Some((Timestamp(61_000_000), 10)),
            done: 130,
            of: 480,
            counts: StepCounts {
                solved: 13,
                judged: 130,
                prompt_tokens: 7_000,
                ..StepCounts::default()
            },
            ..Running::default()
        });
        rows[3].state = State::ToCome;
        rows[5].state = State::Waits {
            what: "for an endpoint".to_owned(),
            since: Timestamp(121_000_000),
        };
        let expected = [
            "shop: one round of Qwen/Qwen3-4B",
            "├─ ✓ baseline    11 of 12    solved 50 %  1.2 M tokens  0.85 USD  1 min 00 s  done before",
            "├─ ✓ probe       11 of 12    solved 50 %  1.2 M tokens  0.85 USD  1 min 00 s  always 0, sometimes 0, never 0; 1 dropped",
            "├─ ● rollouts    130 of 480  solved 10 %  7,000 tokens  0.00 USD  3 min 00 s  5 min 50 s left",
            "├─ ○ dataset     12",
            "├─ ✓ train       11 of 12    solved 50 %  1.2 M tokens  0.85 USD  1 min 00 s  shop@v1, 1 steps, loss 1.0000",
            "├─ ● serve                                                        1 min 00 s  waits for an endpoint",
            "├─ ✓ evaluation  11 of 12    solved 50 %  1.2 M tokens  0.85 USD  1 min 00 s",
            "├─ ✓ comparison  11 of 12    solved 50 %  1.2 M tokens  0.85 USD  1 min 00 s  +50.0 (+50.0 to +50.0) points, the gate p…",
            "└─ ✓ publish     11 of 12    solved 50 %  1.2 M tokens  0.85 USD  1 min 00 s  shop@v1 is latest",
        ];
        assert_eq!(tree(frame(&plan), &rows), expected);
        rows[6].state = State::Stopped {
            why: "gone\u{1b}".to_owned(),
        };
        assert_eq!(line(frame(&plan), &rows[6]), "✗ evaluation  gone\u{fffd}");
    }

    #[test]
    fn rounds_have_a_line_of_their_own_and_narrow_terminals_are_not_overrun() {
        let plan = tests::plan(2, false);
        let rows = rows(&plan);
        let lines = tree(frame(&plan), &rows);
        assert_eq!((&*lines[1], &*lines[10]), ("round 1", "round 2"));
        assert!(lines[9].starts_with("└─ ✓ publish") && lines.len() == 18);
        assert!(line(frame(&plan), &rows[8]).starts_with("round 2 ✓ rollouts"));
        for width in [1, 20, 40] {
            let narrow = Frame {
                width,
                ..frame(&plan)
            };
            let fits = |line: &String| console::measure_text_width(line) <= width;
            assert!(tree(narrow, &rows).iter().all(fits));
        }
    }

    #[test]
    fn a_training_says_how_near_it_was_to_serving() {
        let plan = tests::plan(1, false);
        let (records, _) = tests::played(&plan, &[true]);
        let mut records = records.into_values().map(|known| known.record);
        let mut record = records.find(|record| record.step == Step::Train).unwrap();
        let mut told = |agreement| {
            if let StepOutput::Adapter { agreement: of, .. } = &mut record.output {
                *of = agreement;
            }
            outcome(&record)
        };
        let measured = Difference::of(1, [(-1.0, -1.25)]).map(Agreement::Measured);
        let unmeasured = Some(Agreement::unmeasured("no rollout was found"));
        for (agreement, more) in [
            (measured, ", agreement 2e-1, too far"),
            (unmeasured, ", agreement not measured"),
            (None, ""),
        ] {
            assert_eq!(
                told(agreement),
                format!("shop@v1, 1 steps, loss 1.0000{more}")
            );
        }
    }

    #[test]
    fn time_left_is_told_by_the_pace_since_it_was_seen() {
        let running = Running {
            first: Some((Timestamp(0), 10)),
            done: 20,
            of: 50,
            ..Running::default()
        };
        assert_eq!(running.left(Timestamp(10_000_000)), Some(30_000));
        let none = Running {
            done: 10,
            ..running.clone()
        };
        assert_eq!(none.left(Timestamp(10_000_000)), None);
        let said = Running {
            left_ms: Some(5),
            ..running
        };
        assert_eq!(said.left(Timestamp(10_000_000)), Some(5));
    }

    #[test]
    fn numbers_read_well() {
        let shown = [9_999, 10_000, 999_400, 1_234_567].map(short);
        assert_eq!(shown, ["9,999", "10 k", "999 k", "1.2 M"]);
    }
}
