//! `--replay teacher-forced`: both models are asked for the turns of recorded rollouts, some rollouts a job.

use espalier_core::spec::{JobDraft, ScoreDraft};
use espalier_proto::convert::draft_to_wire;

use super::recorded::Recorded;
use super::{ARMS, Evaluate};
use crate::exit::Problem;
use crate::expand::{ARM_LABEL, Expanded};

/// Recorded rollouts of a job: some hundred turns, which a worker asks for within minutes, and whose loss costs no more.
const TRACES_EACH: usize = 16;
/// What ids of the jobs have between their arm and their number.
const TURNS: &str = ".turns-";

/// Refuses options that say nothing of recorded turns.
pub fn check(args: &Evaluate) -> Result<(), Problem> {
    let given = [
        ("tasks", args.tasks.is_some()),
        ("split", args.split.is_some()),
        ("samples", args.samples > 1),
        ("training", !args.trainings.is_empty()),
        ("price", !args.prices.is_empty()),
        ("min-difference", args.min_difference.is_some()),
        ("min-tasks", args.min_tasks.is_some()),
        ("traces", args.traces.is_some()),
        ("gate", args.gate),
    ];
    match given.into_iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((name, _)) => {
            let message =
                format!("`--{name}` must be absent where `--replay teacher-forced` is given");
            let fix =
                "turns are those of the rollouts of --from; tasks are tried with --replay recorded";
            Err(Problem::refused(message).fix(fix))
        }
    }
}

/// Whether a job is one of those that `--replay teacher-forced` submits, by its id and its arm. The queue says of a job that
/// came to nothing only that it took the slot of a rollout.
pub fn scores_turns(id: &str, arm: Option<&str>) -> bool {
    let number = arm.and_then(|arm| id.strip_prefix(arm)?.strip_prefix(TURNS));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The jobs of both models. Rollouts that did not solve their task, or that nobody could go on with, are no measure and left
/// out.
pub fn jobs(
    args: &Evaluate,
    models: &[String; 2],
    recorded: &[Recorded],
) -> Result<Expanded, Problem> {
    let is_measure = |it: &&Recorded| it.solved != Some(false) && !it.unrecorded;
    let wanted = recorded.iter().filter(is_measure);
    let names: Vec<String> = wanted.map(Recorded::name).collect();
    if names.is_empty() {
        let from: Vec<String> = args.from.iter().map(ToString::to_string).collect();
        let message = format!(
            "no rollout of {} solved its task, of {} that are published",
            from.join(", "),
            recorded.len()
        );
        return Err(Problem::refused(message).fix("see `espalier traces list BATCH`"));
    }
    let mut jobs = Vec::new();
    for (n, traces) in names.chunks(TRACES_EACH).enumerate() {
        for (arm, model) in ARMS.iter().zip(models) {
            let job = JobDraft {
                id: Some(format!("{arm}{TURNS}{n:05}")),
                labels: [(ARM_LABEL.to_owned(), (*arm).to_owned())].into(),
                score: Some(ScoreDraft {
                    model: Some(model.clone()),
                    traces: traces.to_vec(),
                    hints: Some(args.hints),
                }),
                ..JobDraft::default()
            };
            jobs.push(draft_to_wire(&job));
        }
    }
    Ok(Expanded {
        places: vec![0; jobs.len()],
        rollouts: jobs.len() as u64,
        jobs,
        ..Expanded::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::args;
    use super::*;

    #[test]
    fn solved_rollouts_are_dealt_out_to_jobs_of_both_models() {
        let args = args("--replay teacher-forced --from r --model a --model b").unwrap();
        check(&args).unwrap();
        let recorded = |n: usize, solved| Recorded {
            job: format!("p/r/j{n}").parse().unwrap(),
            task: String::new(),
            solved,
            unrecorded: false,
        };
        let mut all: Vec<Recorded> = (0..17).map(|n| recorded(n, Some(true))).collect();
        all[0].solved = None;
        all.push(recorded(17, Some(false)));
        all.push(Recorded {
            unrecorded: true,
            ..recorded(18, None)
        });
        let models = ["a", "b"].map(str::to_owned);
        let made = jobs(&args, &models, &all).unwrap();
        assert_eq!(made.rollouts, 4, "as many as are held against the limit");
        let found: Vec<(&str, &str, usize)> = made
            .jobs
            .iter()
            .map(|job| {
                let score = job.score.as_ref().unwrap();
                (job.id(), score.model(), score.traces.len())
            })
            .collect();
        let expected = [
            ("a.turns-00000", "a", 16),
            ("b.turns-00000", "b", 16),
            ("a.turns-00001", "a", 1),
            ("b.turns-00001", "b", 1),
        ];
        assert_eq!(found, expected);
        for (id, arm, _) in found {
            assert!(scores_turns(id, Some(arm)), "{id}");
        }
        for (id, arm) in [("a.turns-00000", None), ("a.turns-1.s0", Some("a"))] {
            assert!(!scores_turns(id, arm), "{id}");
        }
        assert!(super::jobs(&args, &models, &all[17..]).is_err());
    }

    #[test]
    fn what_says_nothing_of_turns_is_refused() {
        let base = "--replay teacher-forced --from r --model a --model b";
        for more in ["--samples 2", "--gate", "--tasks x.jsonl", "--price 1,2"] {
            let problem = check(&args(&format!("{base} {more}")).unwrap()).unwrap_err();
            let name = more.split(' ').next().unwrap();
            assert!(
                problem
                    .message
                    .starts_with(&format!("`{name}` must be absent")),
                "{problem}"
            );
        }
    }
}
