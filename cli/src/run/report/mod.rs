//! What a pipeline came to: told at its end, whatever end that is, and written down as a page and as Markdown.

mod page;
mod text;

use std::path::Path;

use espalier_core::adapter::{Agreement, LatestEntry};
use espalier_core::compare::words::{self, Table};
use espalier_core::compare::{MARKDOWN_FILE, PAGE_FILE, REPORT_FILE};
use espalier_core::id::{AdapterName, JobKey};
use espalier_core::pipeline::{PipelinePlan, Step, StepOutput, StepRecord};
use espalier_core::spec::AdapterRef;
use espalier_runtime::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use super::display::{Frame, Row, State, cost, money, outcome, published, tree};
use super::engine::Ended;
use super::plan::{At, End, Records, Resolved, steps};
use super::records::Desk;
use crate::adapters::latest::latest;
use crate::adapters::{Opened, Wanted};
use crate::context::Context;
use crate::evaluate::show::{Read, in_terminal};
use crate::exit::{Exit, Outcome, Problem};
use crate::lineage::Node;
use crate::output::{count, duration, note, plain};
use crate::{evaluate, lineage};

/// Columns of the tree where it is no terminal's.
const COLUMNS: usize = 160;

/// A pipeline that has come to an end.
pub struct Story<'a> {
    plan: &'a PipelinePlan,
    rows: Vec<Row>,
    /// What each step came to, in order.
    records: Vec<(At, StepRecord)>,
    ended: Result<Ended, Problem>,
    /// The comparison that published last, or else the last one that there is, with its round.
    compared: Option<(u32, Read)>,
    /// Why that comparison cannot be shown.
    unread: Option<String>,
    /// The version that is `latest` now, where that can be told.
    latest: Result<Option<AdapterRef>, Problem>,
    /// What the version was made from, or why that cannot be told.
    lineage: Option<Result<Node, Problem>>,
}

impl<'a> Story<'a> {
    /// Gathers what is told.
    pub async fn read(
        desk: &Desk,
        plan: &'a PipelinePlan,
        records: &Records,
        rows: Vec<Row>,
        ended: Result<Ended, Problem>,
    ) -> Self {
        let resolved = Resolved::new(plan, records);
        let of = |at: At| Some((at, resolved.record(at)?.clone()));
        let records: Vec<_> = steps(plan).into_iter().filter_map(of).collect();
        let is_published =
            |(_, record): &&(At, StepRecord)| matches!(record.output, StepOutput::Published { .. });
        let published = records.iter().rev().find(is_published);
        let told_of = published.map(|(at, _)| at.round);
        let last = records.iter().rev().find(|(at, _)| {
            at.step == Step::Comparison && told_of.is_none_or(|round| round == at.round)
        });
        let read = match last {
            Some((at, record)) => Some((at.round, comparison(desk, record).await)),
            None => None,
        };
        let (compared, unread) = match read {
            None => (None, None),
            Some((round, Ok(read))) => (Some((round, read)), None),
            Some((_, Err(problem))) => (None, Some(problem.message)),
        };
        Self {
            plan,
            rows,
            records,
            ended,
            compared,
            unread,
            latest: latest_now(desk).await,
            lineage: None,
        }
    }

    /// Walks from the version that it tells of to everything that this was made from.
    pub async fn walk(&mut self, desk: &Desk) {
        let trained = |(_, record): &(At, StepRecord)| record.adapter().cloned();
        let published = self.published().map(|(adapter, _)| adapter.clone());
        let version = published.or_else(|| self.records.iter().rev().find_map(trained));
        if let Some(AdapterRef { name, version }) = version {
            let wanted = Wanted {
                name,
                version: Some(version),
            };
            self.lineage = Some(lineage::of(&opened(desk), &wanted).await);
        }
    }

    /// Puts the report into a folder of this machine.
    pub fn write(&self, folder: &Path) -> Result<(), Problem> {
        let cannot = |path: &Path, error: std::io::Error| {
            Problem::failed(format!("cannot write {}: {error}", path.display()))
        };
        std::fs::create_dir_all(folder).map_err(|error| cannot(folder, error))?;
        for (name, content) in [
            (MARKDOWN_FILE, text::markdown(self)),
            (PAGE_FILE, page::html(self)),
            (REPORT_FILE, format!("{:#}\n", self.to_whole_json())),
        ] {
            let path = folder.join(name);
            std::fs::write(&path, content).map_err(|error| cannot(&path, error))?;
        }
        Ok(())
    }

    /// Says what came of it and how to go on.
    pub fn tell(&self, context: &Context, out: &Path) -> Outcome {
        if context.out.json {
            context.out.event(&self.to_json())?;
            return Ok(self.exit());
        }
        if let Some((_, read)) = &self.compared {
            let table = in_terminal(&words::success(&read.report));
            context.out.line(format!("{table}\n"))?;
        }
        for (adapter, agreement) in self.agreements() {
            let warning = if agreement.is_too_far() {
                "warning: "
            } else {
                ""
            };
            let told = plain(&agreement.to_string());
            context
                .out
                .line(format!("{warning}agreement of {adapter}: {told}"))?;
        }
        context.out.line(self.verdict())?;
        if let Some((adapter, _)) = self.published() {
            let name = &adapter.name;
            context.out.line(format!(
                "next: espalier lineage {adapter}    espalier adapters rollback {name}"
            ))?;
        }
        let page = out.join(PAGE_FILE);
        context.out.line(format!("report: {}", page.display()))?;
        if let Some(fix) = self.fix() {
            note(format!("  fix: {fix}"));
        }
        Ok(self.exit())
    }

    /// The same for who only looked on.
    pub fn tell_end(&self, context: &Context) -> Outcome {
        match context.out.json {
            true => context.out.event(&self.to_json())?,
            false => context.out.line(self.verdict())?,
        }
        Ok(self.exit())
    }

    /// For programs.
    fn to_json(&self) -> Value {
        let step = |(at, record): &(At, StepRecord)| {
            let mut value = json!(record);
            // Where a step is of another round's too, this is the round that is told of.
            value["round"] = json!(at.round);
            value["cost"] = json!(self.plan.prices.map(|prices| cost(prices, &record.counts)));
            value
        };
        let problem = self.ended.as_ref().err();
        let problem = problem.or(match &self.ended {
            Ok(Ended::Failed { problem, .. }) => Some(problem),
            _ => None,
        });
        json!({"report": {
            "pipeline": self.plan.pipeline,
            "end": self.end_name(),
            "exit_code": self.exit() as u8,
            "verdict": self.verdict(),
            "steps": self.records.iter().map(step).collect::<Vec<_>>(),
            "published": self.published().map(|(adapter, _)| adapter),
            "currency": self.plan.currency,
            "error": problem.map(|problem| json!({"message": problem.message, "fix": problem.fix})),
        }})
    }

    /// With the comparison's own report and the lineage.
    fn to_whole_json(&self) -> Value {
        let mut value = self.to_json();
        let compared = self.compared.as_ref();
        let report = compared.and_then(|(_, read)| file(read, REPORT_FILE));
        value["report"]["comparison"] = report.map_or(Value::Null, |text| {
            serde_json::from_str(&text).unwrap_or_default()
        });
        value["report"]["lineage"] = json!(self.lineage.as_ref().and_then(|of| of.as_ref().ok()));
        value
    }

    fn end_name(&self) -> &'static str {
        match &self.ended {
            Ok(Ended::Well(End::Complete)) => "complete",
            Ok(Ended::Well(End::GateShut { .. })) => "gate_shut",
            Ok(Ended::Well(End::AllSolved { .. })) => "all_solved",
            Ok(Ended::Nothing { .. }) => "no_signal",
            Ok(Ended::Unattended) => "unattended",
            Ok(Ended::Failed { .. }) | Err(_) => "failed",
        }
    }

    /// What came of it, in a sentence or two.
    fn verdict(&self) -> String {
        let published = match self.published() {
            Some((adapter, canary)) => match &self.latest {
                Ok(Some(latest)) if canary.is_none() && latest != adapter => {
                    format!("{adapter} was made latest; {latest} is now.")
                }
                Ok(None) => format!("{adapter} was made latest, and taken back."),
                _ => format!("{}.", published(adapter, canary)),
            },
            None => format!("Nothing was published{}.", self.held_back()),
        };
        let said = match &self.ended {
            Ok(Ended::Well(End::Complete)) => self.gate(self.plan.rounds),
            Ok(Ended::Well(End::GateShut { round })) => format!(
                "{} The rounds end here: the next one would begin with a model that is not shown to be better.",
                self.gate(*round)
            ),
            Ok(Ended::Well(End::AllSolved { round })) => format!(
                "Round {round}: the model solves every training task every time, so that there is nothing to learn."
            ),
            Ok(Ended::Nothing { at, why }) => format!(
                "Round {}, {}: the data carry no signal, so that nothing is trained: {}. Look at the checks of the tasks.",
                at.round,
                at.step,
                plain(why)
            ),
            Ok(Ended::Failed { at, problem }) => format!(
                "Round {}, {} failed: {}.",
                at.round,
                at.step,
                plain(&problem.message)
            ),
            Ok(Ended::Unattended) => {
                "Nobody runs the pipeline, and none of its jobs is under way: `espalier run` with its file goes on where it is."
                    .to_owned()
            }
            Err(problem) => format!("The pipeline stopped: {}.", plain(&problem.message)),
        };
        format!("{said} {published}")
    }

    fn gate(&self, round: u32) -> String {
        match self
            .of(round, Step::Comparison)
            .map(|record| &record.output)
        {
            Some(StepOutput::Comparison {
                passed, verdict, ..
            }) => {
                let gate = if *passed { "passes" } else { "does not pass" };
                format!("The gate {gate}: {}.", plain(verdict))
            }
            _ => String::new(),
        }
    }

    /// Why a version whose gate passed was not published.
    fn held_back(&self) -> String {
        let passed = |round| match &self.of(round, Step::Comparison)?.output {
            StepOutput::Comparison { passed: true, .. } => self.of(round, Step::Publish),
            _ => None,
        };
        let last = (1..=self.plan.rounds).rev().find_map(passed);
        match last.map(|record| &record.output) {
            Some(StepOutput::Unpublished { why }) => format!(": {}", plain(why)),
            _ => String::new(),
        }
    }

    fn fix(&self) -> Option<&str> {
        match &self.ended {
            Err(problem) | Ok(Ended::Failed { problem, .. }) => problem.fix.as_deref(),
            _ => None,
        }
    }

    /// Well, where the gate of a round passed.
    fn exit(&self) -> Exit {
        match &self.ended {
            Err(problem) | Ok(Ended::Failed { problem, .. }) => problem.exit.max(Exit::Failed),
            Ok(Ended::Unattended) => Exit::Failed,
            Ok(_) if self.has_passed() => Exit::Ok,
            Ok(_) => Exit::Failed,
        }
    }

    fn has_passed(&self) -> bool {
        let passed = |record: &StepRecord| {
            matches!(record.output, StepOutput::Comparison { passed: true, .. })
        };
        self.records.iter().any(|(_, record)| passed(record))
    }

    /// The last version that was published, with its share where it has not all.
    fn published(&self) -> Option<(&AdapterRef, Option<f64>)> {
        let mut records = self.records.iter().rev();
        records.find_map(|(_, record)| match &record.output {
            StepOutput::Published {
                adapter, canary, ..
            } => Some((adapter, *canary)),
            _ => None,
        })
    }

    fn of(&self, round: u32, step: Step) -> Option<&StepRecord> {
        let mut found = self.records.iter();
        let found = found.find(|(at, _)| *at == At { round, step });
        found.map(|(_, record)| record)
    }

    /// The steps with what they came to and took.
    fn steps_table(&self) -> Table {
        let header = [
            "round",
            "step",
            "what came of it",
            "jobs",
            "tokens",
            "cost",
            "time",
            "batch",
        ];
        let row = |row: &Row| {
            let mut cells = vec![row.at.round.to_string(), row.at.step.to_string()];
            match &row.state {
                State::Ended { record, .. } => cells.extend(self.ended(record)),
                State::Stopped { why: told } | State::Past { what: told } => {
                    cells.push(plain(told));
                }
                _ => cells.push("not reached".to_owned()),
            }
            cells.resize(header.len(), String::new());
            cells
        };
        Table {
            header: header.map(str::to_owned).to_vec(),
            rows: self.rows.iter().map(row).collect(),
        }
    }

    /// What a step came to, its jobs, tokens, cost, time and batch; empty where it has none.
    fn ended(&self, record: &StepRecord) -> [String; 6] {
        let counts = &record.counts;
        let tokens = counts.prompt_tokens + counts.completion_tokens;
        let jobs = format!("{} of {}", counts.succeeded, counts.jobs);
        [
            outcome(record),
            Some(jobs).filter(|_| counts.jobs > 0).unwrap_or_default(),
            Some(count(tokens))
                .filter(|_| tokens > 0)
                .unwrap_or_default(),
            money(self.plan, counts).unwrap_or_default(),
            duration(record.took_ms()),
            record
                .batch
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ]
    }

    /// Which round the comparison that is shown is of, where there are several.
    fn compared_in(&self) -> Option<String> {
        let (round, _) = self.compared.as_ref()?;
        (self.plan.rounds > 1).then(|| format!("What follows is the comparison of round {round}."))
    }

    /// What the version was made from, as lines, and how much of it is verified.
    fn lineage(&self) -> Option<[String; 2]> {
        Some(match self.lineage.as_ref()? {
            Ok(tree) => [tree.to_text(), lineage::counted(tree)],
            Err(problem) => [problem.message.clone(), "it cannot be told".to_owned()],
        })
    }

    /// How the rounds went.
    fn rounds_table(&self) -> Table {
        let row = |round: u32| {
            let StepOutput::Comparison {
                tasks,
                before,
                after,
                difference,
                verdict,
                ..
            } = &self.of(round, Step::Comparison)?.output
            else {
                return None;
            };
            let published = match self.of(round, Step::Publish).map(|record| &record.output) {
                Some(StepOutput::Published {
                    adapter, canary, ..
                }) => published(adapter, *canary),
                Some(StepOutput::Unpublished { why }) => format!("no: {why}"),
                _ => String::new(),
            };
            Some(vec![
                round.to_string(),
                tasks.to_string(),
                words::percent(before),
                words::percent(after),
                words::points(difference),
                plain(verdict),
                published,
            ])
        };
        Table {
            header: [
                "round",
                "tasks",
                "before",
                "after",
                "difference in points",
                "gate",
                "published",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows: (1..=self.plan.rounds).filter_map(row).collect(),
        }
    }

    /// How near trainings were to serving; without rows where none was compared.
    fn agreement_table(&self) -> Table {
        let row = |(adapter, agreement): (&AdapterRef, &Agreement)| {
            vec![adapter.to_string(), plain(&agreement.to_string())]
        };
        Table {
            header: ["version", "what was served and what is trained"]
                .map(str::to_owned)
                .to_vec(),
            rows: self.agreements().map(row).collect(),
        }
    }

    /// Versions that were held against serving, in order.
    fn agreements(&self) -> impl Iterator<Item = (&AdapterRef, &Agreement)> {
        self.records
            .iter()
            .filter_map(|(_, record)| match &record.output {
                StepOutput::Adapter {
                    adapter, agreement, ..
                } => Some((adapter, agreement.as_ref()?)),
                _ => None,
            })
    }

    /// How hard the training tasks are, by round; without rows where nothing was probed.
    fn difficulty_table(&self) -> Table {
        let row = |round: u32| {
            let StepOutput::Probe { tasks, dropped } = &self.of(round, Step::Probe)?.output else {
                return None;
            };
            Some(vec![
                round.to_string(),
                tasks.always.to_string(),
                tasks.sometimes.to_string(),
                tasks.never.to_string(),
                tasks.unjudged.to_string(),
                dropped.len().to_string(),
            ])
        };
        Table {
            header: [
                "round",
                "always solved",
                "sometimes",
                "never",
                "not judged",
                "dropped",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows: (1..=self.plan.rounds).filter_map(row).collect(),
        }
    }
}

/// A file of a comparison.
fn file<'a>(read: &'a Read, name: &str) -> Option<std::borrow::Cow<'a, str>> {
    let found = read.files.iter().find(|(of, _)| of == name);
    found.map(|(_, content)| String::from_utf8_lossy(content))
}

fn opened(desk: &Desk) -> Opened {
    Opened {
        store: desk.store.clone(),
        project: desk.project.clone(),
    }
}

/// The version of the pipeline's adapter that is `latest`.
async fn latest_now(desk: &Desk) -> Result<Option<AdapterRef>, Problem> {
    let name: AdapterName = desk.name.as_str().parse()?;
    let current = latest(&opened(desk), &name).current().await?;
    Ok(current.map(|LatestEntry { version, .. }| AdapterRef { name, version }))
}

async fn comparison(desk: &Desk, record: &StepRecord) -> Result<Read, Problem> {
    let batch = record.batch.clone();
    let batch = batch.ok_or_else(|| Problem::failed("the comparison names no batch"))?;
    let key = JobKey::new(desk.project.clone(), batch, evaluate::JOB.parse()?);
    Read::of(&desk.store, &key).await
}

/// What is done already, what is under way, and what would be.
pub fn once(context: &Context, plan: &PipelinePlan, records: &Records, rows: &[Row]) -> Outcome {
    let resolved = Resolved::new(plan, records);
    if context.out.json {
        let step = |row: &Row| {
            json!({
                "round": row.at.round,
                "step": row.at.step,
                "jobs": plan.step(row.at.step).map(|step| step.jobs),
                "digest": resolved.digest(row.at),
                "done": resolved.record(row.at).is_some(),
                "running": match &row.state {
                    State::Runs(running) => json!({"done": running.done, "of": running.of}),
                    _ => Value::Null,
                },
            })
        };
        let steps: Vec<Value> = rows.iter().map(step).collect();
        context.out.event(
            &json!({"plan": {"pipeline": plan.pipeline, "rounds": plan.rounds, "steps": steps}}),
        )?;
        return Ok(Exit::Ok);
    }
    let frame = Frame {
        plan,
        now: SystemClock.now(),
        width: COLUMNS,
    };
    context.out.line(tree(frame, rows).join("\n"))?;
    Ok(Exit::Ok)
}
