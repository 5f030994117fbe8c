//! Two models, teacher-forced over the same recorded rollouts: how often each says what was said, turn by turn, and how
//! likely it finds that.
//!
//! Pure, as the comparison of rollouts is: `score` jobs leave [`Scores`], and a `compare` job over them makes a
//! [`TurnsReport`]. Each task counts with the mean over its turns, so that a long rollout is no stronger than a short one,
//! and intervals are over tasks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::words::{Table, kind_name, percent, points, signed};
use super::{Both, Estimate, REPORT_VERSION, Side, Source, stats};
use crate::error::FieldError;
use crate::id::JobKey;
use crate::time::Timestamp;

/// The version of [`Scores`] that this code writes, and the only one that it reads.
pub const SCORES_VERSION: u32 = 1;

/// What a `score` job found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// [`SCORES_VERSION`].
    pub scores_version: u32,
    /// The model that was asked.
    pub model: String,
    /// The job's labels, by which arms are told apart.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The traces that were looked at.
    pub sources: Vec<Source>,
    /// Every turn of theirs, in their order.
    pub turns: Vec<TurnScore>,
}

/// One recorded turn of an assistant, and what the model says in its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnScore {
    /// The rollout.
    pub trace: JobKey,
    /// Index of the recorded message.
    pub message: usize,
    /// The task; the rollout's own name where it has none.
    pub task: String,
    /// The family of tasks.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Whether it says the same; none where the prompt is too long for the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
    /// Mean log-probability of the recorded turn's tokens, in nats; none where the endpoint does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f64>,
    /// Tokens that it took: of the prompts, and drawn.
    pub tokens: (u64, u64),
}

/// How a turn compares with the recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// The recorded turn calls tools.
    Calls {
        /// The same tools are called, in the same order.
        tools: bool,
        /// And with the same arguments.
        arguments: bool,
    },
    /// The recorded turn answers.
    Answer {
        /// The answer is the same.
        same: bool,
    },
}

impl Said {
    /// Whether it is all the same.
    pub fn agrees(self) -> bool {
        match self {
            Self::Calls { arguments, .. } => arguments,
            Self::Answer { same } => same,
        }
    }
}

impl Scores {
    /// Reads scores that somebody else may have written.
    ///
    /// # Errors
    /// They are broken, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FieldError> {
        let scores: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be scores: {error}");
            FieldError::new("scores", String::from_utf8_lossy(bytes), rule)
        })?;
        match scores.scores_version {
            SCORES_VERSION => Ok(scores),
            other => {
                let rule = format!("must be {SCORES_VERSION}");
                Err(FieldError::new("scores.scores_version", other, rule))
            }
        }
    }

    /// What tables show of them.
    pub fn summary(&self) -> ScoreSummary {
        let said = self.turns.iter().filter_map(|turn| turn.said);
        let sum = |of: fn(&TurnScore) -> u64| self.turns.iter().map(of).sum();
        ScoreSummary {
            traces: self.sources.len() as u64,
            turns: self.turns.len() as u64,
            agreed: said.filter(|said| said.agrees()).count() as u64,
            prompt_tokens: sum(|turn| turn.tokens.0),
            completion_tokens: sum(|turn| turn.tokens.1),
        }
    }
}

/// What tables show of a `score` job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreSummary {
    /// Rollouts.
    pub traces: u64,
    /// Their turns.
    pub turns: u64,
    /// Turns in which the model says the same.
    pub agreed: u64,
    /// Prompt tokens of all calls.
    pub prompt_tokens: u64,
    /// Completion tokens of all calls.
    pub completion_tokens: u64,
}

/// A quantity of both arms and its difference, by task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Turns that it is of.
    pub turns: u64,
    /// Tasks that these are of.
    pub tasks: u64,
    /// Of each arm.
    pub arms: Both<Estimate>,
    /// Second less first.
    pub difference: Estimate,
}

/// Turns of some tasks, compared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnsGroup {
    /// Tasks.
    pub tasks: u64,
    /// Turns that both arms were asked for.
    pub turns: u64,
    /// The share of turns in which all is the same.
    pub agreement: Paired,
    /// Of turns that call tools, those in which the same tools are called.
    pub tools: Option<Paired>,
    /// Of these turns, those in which the arguments are the same too.
    pub arguments: Option<Paired>,
    /// Of turns that answer, those with the same answer.
    pub answers: Option<Paired>,
    /// Mean log-probability of the recorded tokens, in nats, over turns of which both arms tell it.
    pub logprob: Option<Paired>,
}

/// An arm, as a report names it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TurnsArm {
    /// What it is called.
    pub label: String,
    /// The models that were asked.
    pub models: Vec<String>,
    /// Turns that it was asked for.
    pub turns: u64,
    /// Those whose prompt was too long for it.
    pub too_long: u64,
    /// Those whose log-probability its endpoint did not tell.
    pub without_logprob: u64,
    /// Those that the other arm was not asked for.
    pub unpaired: u64,
}

/// All numbers of a comparison of turns, as they are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnsReport {
    /// [`REPORT_VERSION`](super::REPORT_VERSION).
    pub turns_report_version: u32,
    /// The job.
    pub job: String,
    /// When it was made, in microseconds since the epoch.
    pub created_at_us: Timestamp,
    /// The arms.
    pub arms: Both<TurnsArm>,
    /// All tasks.
    pub pooled: TurnsGroup,
    /// By family of tasks.
    pub kinds: BTreeMap<String, TurnsGroup>,
    /// What it was made from: the recorded rollouts.
    pub sources: Vec<Source>,
}

/// How intervals are made, in a sentence for reports.
pub const TURNS_METHOD: &str = "Each recorded turn is asked for after what was recorded before it, the most likely words each time. \
    Each task counts with the mean over its turns; 95 % intervals are Student's over tasks, of shares with tasks added that nobody \
    has seen, as in comparisons of rollouts.";

impl TurnsReport {
    /// Reads a report that somebody else may have written.
    ///
    /// # Errors
    /// It is broken, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FieldError> {
        let report: Self = serde_json::from_slice(bytes).map_err(|error| {
            let rule = format!("must be a report of turns: {error}");
            FieldError::new("report", String::from_utf8_lossy(bytes), rule)
        })?;
        match report.turns_report_version {
            REPORT_VERSION => Ok(report),
            other => {
                let rule = format!("must be {REPORT_VERSION}");
                Err(FieldError::new("report.turns_report_version", other, rule))
            }
        }
    }
}

/// What scores of both arms tell.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparedTurns {
    /// What each arm was asked for.
    pub arms: Both<TurnsArm>,
    /// All tasks.
    pub pooled: TurnsGroup,
    /// By family of tasks.
    pub kinds: BTreeMap<String, TurnsGroup>,
}

/// One turn in both arms.
struct TurnPair<'a> {
    before: &'a TurnScore,
    after: &'a TurnScore,
}

/// What both arms say of the same turns: all of them, by kind, and what is in no pair.
///
/// # Errors
/// There is no turn that both arms were asked for.
pub fn compare_turns(
    scores: &Both<Vec<Scores>>,
    labels: Both<String>,
) -> Result<ComparedTurns, FieldError> {
    let before = by_turn(&scores.before);
    let after = by_turn(&scores.after);
    let pairs: Vec<TurnPair<'_>> = before
        .iter()
        .filter_map(|(name, before)| {
            let after = after.get(name)?;
            (before.said.is_some() && after.said.is_some()).then_some(TurnPair { before, after })
        })
        .collect();
    let missing = || {
        let rule = "must have a recorded turn that both models were asked for";
        FieldError::new("arms", "no pair of turns", rule)
    };
    let all: Vec<&TurnPair<'_>> = pairs.iter().collect();
    let pooled = group(&all).ok_or_else(missing)?;
    let mut kinds: BTreeMap<&str, Vec<&TurnPair<'_>>> = BTreeMap::new();
    for pair in &all {
        kinds.entry(&pair.before.kind).or_default().push(pair);
    }
    let kinds = kinds.into_iter().filter_map(|(kind, pairs)| {
        let group = group(&pairs)?;
        Some((kind.to_owned(), group))
    });
    Ok(ComparedTurns {
        kinds: kinds.collect(),
        arms: Both {
            before: arm(labels.before, &scores.before, &before, &after),
            after: arm(labels.after, &scores.after, &after, &before),
        },
        pooled,
    })
}

type Turns<'a> = BTreeMap<(&'a JobKey, usize), &'a TurnScore>;

/// Of several scores of one turn the first counts.
fn by_turn(scores: &[Scores]) -> Turns<'_> {
    let mut turns = Turns::new();
    for turn in scores.iter().flat_map(|scores| &scores.turns) {
        turns.entry((&turn.trace, turn.message)).or_insert(turn);
    }
    turns
}

fn arm(label: String, scores: &[Scores], own: &Turns<'_>, other: &Turns<'_>) -> TurnsArm {
    let mut models: Vec<String> = scores.iter().map(|scores| scores.model.clone()).collect();
    models.sort_unstable();
    models.dedup();
    let count =
        |holds: &dyn Fn(&TurnScore) -> bool| own.values().filter(|turn| holds(turn)).count() as u64;
    TurnsArm {
        label,
        models,
        turns: own.len() as u64,
        too_long: count(&|turn| turn.said.is_none()),
        without_logprob: count(&|turn| turn.logprob.is_none()),
        unpaired: own.keys().filter(|name| !other.contains_key(*name)).count() as u64,
    }
}

fn group(pairs: &[&TurnPair<'_>]) -> Option<TurnsGroup> {
    let share = |of: fn(Said) -> Option<bool>| {
        let number = move |turn: &TurnScore| of(turn.said?).map(|holds| f64::from(u8::from(holds)));
        paired(pairs, number, stats::share, stats::difference_of_shares)
    };
    let agreement = share(|said| Some(said.agrees()))?;
    Some(TurnsGroup {
        tasks: agreement.tasks,
        turns: agreement.turns,
        agreement,
        tools: share(|said| match said {
            Said::Calls { tools, .. } => Some(tools),
            Said::Answer { .. } => None,
        }),
        arguments: share(|said| match said {
            Said::Calls { arguments, .. } => Some(arguments),
            Said::Answer { .. } => None,
        }),
        answers: share(|said| match said {
            Said::Calls { .. } => None,
            Said::Answer { same } => Some(same),
        }),
        logprob: paired(pairs, |turn| turn.logprob, stats::mean, stats::mean),
    })
}

/// The mean of each task over the turns of which both arms have a number.
fn paired(
    pairs: &[&TurnPair<'_>],
    of: impl Fn(&TurnScore) -> Option<f64>,
    estimate: fn(&[f64]) -> Option<Estimate>,
    difference: fn(&[f64]) -> Option<Estimate>,
) -> Option<Paired> {
    // Sums of both arms, and turns.
    let mut tasks: BTreeMap<&str, (f64, f64, f64)> = BTreeMap::new();
    let mut turns = 0;
    for pair in pairs {
        if let Some((before, after)) = of(pair.before).zip(of(pair.after)) {
            let sums = tasks.entry(&pair.before.task).or_default();
            *sums = (sums.0 + before, sums.1 + after, sums.2 + 1.0);
            turns += 1;
        }
    }
    let before: Vec<f64> = tasks.values().map(|sums| sums.0 / sums.2).collect();
    let after: Vec<f64> = tasks.values().map(|sums| sums.1 / sums.2).collect();
    let differences: Vec<f64> = before.iter().zip(&after).map(|(b, a)| a - b).collect();
    Some(Paired {
        turns,
        tasks: tasks.len() as u64,
        arms: Both {
            before: estimate(&before)?,
            after: estimate(&after)?,
        },
        difference: difference(&differences)?,
    })
}

/// What both models say, by kind of task, and of all together where there are several.
pub fn agreement_table(report: &TurnsReport) -> Table {
    let (before, after) = (&report.arms.before.label, &report.arms.after.label);
    let header = [
        "task kind",
        "of turns",
        "tasks",
        "turns",
        before,
        after,
        "difference",
    ];
    let mut table = Table {
        header: header.map(str::to_owned).to_vec(),
        rows: Vec::new(),
    };
    for (kind, group) in &report.kinds {
        group_rows(&mut table, kind_name(kind), group);
    }
    if report.kinds.len() != 1 {
        group_rows(&mut table, "all", &report.pooled);
    }
    table
}

fn group_rows(table: &mut Table, kind: &str, group: &TurnsGroup) {
    let shares = [
        ("all the same", Some(group.agreement)),
        ("the same tools", group.tools),
        ("the same arguments", group.arguments),
        ("the same answer", group.answers),
    ];
    let mut row = |what: &str, paired: &Paired, cells: [String; 3]| {
        let (tasks, turns) = (paired.tasks.to_string(), paired.turns.to_string());
        let [before, after, difference] = cells;
        let what = what.to_owned();
        let cells = vec![
            kind.to_owned(),
            what,
            tasks,
            turns,
            before,
            after,
            difference,
        ];
        table.rows.push(cells);
    };
    for (what, paired) in shares {
        if let Some(paired) = paired {
            let arms = Side::ALL.map(|side| percent(paired.arms.at(side)));
            let [before, after] = arms;
            let difference = format!("{} points", points(&paired.difference));
            row(what, &paired, [before, after, difference]);
        }
    }
    if let Some(paired) = group.logprob {
        let [before, after] = Side::ALL.map(|side| signed(paired.arms.at(side)));
        let cells = [before, after, signed(&paired.difference)];
        row("log-probability of a token, in nats", &paired, cells);
    }
}

/// What each arm was asked for, and what could not be told.
pub fn arms_table(report: &TurnsReport) -> Table {
    let row = |name: &str, of: &dyn Fn(&TurnsArm) -> String| {
        let cells = Side::ALL.map(|side| of(report.arms.at(side)));
        let [before, after] = cells;
        vec![name.to_owned(), before, after]
    };
    let (before, after) = (&report.arms.before.label, &report.arms.after.label);
    let not_told = |arm: &TurnsArm| match arm.without_logprob {
        0 => "of every turn".to_owned(),
        all if all == arm.turns => "not told by its endpoint".to_owned(),
        some => format!("not told of {some}"),
    };
    Table {
        header: vec![String::new(), before.clone(), after.clone()],
        rows: vec![
            row("models", &|arm| arm.models.join(", ")),
            row("turns", &|arm| arm.turns.to_string()),
            row("too long for it", &|arm| arm.too_long.to_string()),
            row("not asked of the other", &|arm| arm.unpaired.to_string()),
            row("log-probabilities", &not_told),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(task: &str, message: usize, said: Option<Said>, logprob: Option<f64>) -> TurnScore {
        TurnScore {
            trace: format!("p/r/{task}").parse().unwrap(),
            message,
            task: task.to_owned(),
            kind: task[..1].to_owned(),
            said,
            logprob,
            tokens: (10, 2),
        }
    }

    fn scores(model: &str, turns: Vec<TurnScore>) -> Vec<Scores> {
        vec![Scores {
            scores_version: SCORES_VERSION,
            model: model.to_owned(),
            labels: BTreeMap::new(),
            sources: Vec::new(),
            turns,
        }]
    }

    fn calls(tools: bool, arguments: bool) -> Option<Said> {
        Some(Said::Calls { tools, arguments })
    }

    fn answer(same: bool) -> Option<Said> {
        Some(Said::Answer { same })
    }

    fn report(before: Vec<TurnScore>, after: Vec<TurnScore>) -> TurnsReport {
        let both = Both {
            before: scores("base", before),
            after: scores("shop", after),
        };
        let labels = Both {
            before: "base".to_owned(),
            after: "shop".to_owned(),
        };
        let found = compare_turns(&both, labels).unwrap();
        TurnsReport {
            turns_report_version: REPORT_VERSION,
            job: "p/b/compare".to_owned(),
            created_at_us: Timestamp::default(),
            arms: found.arms,
            pooled: found.pooled,
            kinds: found.kinds,
            sources: Vec::new(),
        }
    }

    #[test]
    fn tasks_are_what_is_counted_and_each_turn_has_its_counterpart() {
        let before = vec![
            turn("a1", 1, calls(true, false), Some(-1.0)),
            turn("a1", 3, answer(true), Some(-3.0)),
            turn("b1", 1, answer(false), None),
            turn("b2", 1, None, None),
            turn("b3", 1, answer(true), None),
        ];
        let after = vec![
            turn("a1", 1, calls(true, true), Some(-0.5)),
            turn("a1", 3, answer(true), Some(-0.5)),
            turn("b1", 1, answer(true), Some(-0.5)),
            turn("b2", 1, answer(true), Some(-0.5)),
        ];
        let report = report(before, after);
        let group = &report.pooled;
        assert_eq!((group.tasks, group.turns), (2, 3));
        let of = |paired: Option<Paired>| {
            let paired = paired.unwrap();
            let arms = (paired.arms.before.value, paired.arms.after.value);
            (paired.turns, arms.0, arms.1, paired.difference.value)
        };
        assert_eq!(of(Some(group.agreement)), (3, 0.25, 1.0, 0.75));
        assert_eq!(of(group.tools), (1, 1.0, 1.0, 0.0));
        assert_eq!(of(group.arguments), (1, 0.0, 1.0, 1.0));
        assert_eq!(of(group.answers), (2, 0.5, 1.0, 0.5));
        assert_eq!(of(group.logprob), (2, -2.0, -0.5, 1.5));
        assert_eq!(report.kinds["b"].logprob, None);
        let arm = &report.arms.before;
        let counted = (arm.turns, arm.too_long, arm.without_logprob, arm.unpaired);
        assert_eq!(counted, (5, 1, 3, 1));
        let rows = agreement_table(&report).rows;
        let wanted = ["all", "all the same", "2", "3"];
        assert!(rows.iter().any(|row| row[..4] == wanted), "{rows:?}");
        let text = serde_json::to_vec(&report).unwrap();
        assert_eq!(TurnsReport::parse(&text).unwrap(), report);
        assert!(
            super::super::Report::parse(&text).is_err(),
            "no gate passes by it"
        );
    }

    #[test]
    fn without_a_pair_there_is_nothing_to_compare() {
        let both = Both {
            before: scores("base", vec![turn("a", 1, answer(true), None)]),
            after: scores("shop", vec![turn("a", 3, answer(true), None)]),
        };
        let error = compare_turns(&both, Both::default()).unwrap_err();
        assert_eq!(error.field, "arms");
        let summary = both.before[0].summary();
        assert_eq!((summary.turns, summary.agreed), (1, 1));
    }

    #[test]
    fn scores_of_another_version_are_refused() {
        let [one] = &scores("m", vec![turn("a", 1, calls(true, true), Some(-0.25))])[..] else {
            panic!("one")
        };
        let text = serde_json::to_string(one).unwrap();
        assert_eq!(&Scores::parse(text.as_bytes()).unwrap(), one);
        let newer = text.replacen("\"scores_version\":1", "\"scores_version\":2", 1);
        let error = Scores::parse(newer.as_bytes()).unwrap_err();
        assert_eq!(error.field, "scores.scores_version");
    }
}
