//! Questions that running rollouts ask before they call a tool, and the answers of people.
//!
//! In memory: a rollout asks again when its worker reconnects, and an answer is kept until the question's deadline,
//! so that neither a lost stream nor a lost reply loses it. An answer that comes before its question is kept too: the
//! worker may have moved here in between. Sessions put questions in, the API layer lists them, orders answer them, the
//! event task takes out those of leases that ended. What others may see goes to `peers`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, Fence, JobKey, ProjectId, WorkerId};
use espalier_core::time::Timestamp;
use espalier_proto::v1;
use serde::{Deserialize, Serialize};

use crate::peers::Answer;

/// Most questions that are kept: more than people can answer, less than would hurt.
const QUESTIONS_MAX: usize = 10_000;
/// Longest id and tool name, in bytes.
const NAME_BYTES_MAX: usize = 256;
/// Longest arguments that are kept, in bytes.
const ARGUMENTS_BYTES_MAX: usize = 4 * 1024;
/// A question cannot stay open for longer than a job may ask for.
const OPEN_MAX: Duration = Duration::from_secs(86_400);

/// A question that waits, or whose answer may still be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Whose it is.
    pub key: JobKey,
    /// Under which lease.
    pub fence: Fence,
    /// Who asked it last.
    pub worker: WorkerId,
    /// The tool that is to be called.
    pub tool: String,
    /// With these arguments.
    pub arguments_json: String,
    /// When it was asked first.
    pub asked_at: Timestamp,
    /// After this nobody waits for an answer.
    pub deadline: Timestamp,
    /// The answer, if it has one.
    pub answer: Option<bool>,
}

/// Which questions a list is of.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Whose.
    pub project: &'a ProjectId,
    /// Of one batch, or of all.
    pub batch: Option<&'a BatchId>,
    /// Those behind this place.
    pub after: Option<&'a Place>,
    /// At most so many.
    pub limit: usize,
    /// The present moment.
    pub now: Timestamp,
}

/// What becomes of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It waits.
    Open,
    /// This is the answer: given before, or a refusal because the question cannot be taken.
    Answered(bool),
}

/// Where a question stands in the list of open ones; it stays there when the question goes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    asked_at: Timestamp,
    id: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.asked_at.0, self.id)
    }
}

impl FromStr for Place {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let parsed = text.split_once('-').and_then(|(asked_at, id)| {
            Some(Self {
                asked_at: Timestamp(asked_at.parse().ok()?),
                id: id.to_owned(),
            })
        });
        parsed
            .ok_or_else(|| FieldError::new("page_token", text, "must end with a question's place"))
    }
}

/// The questions of all projects at this coordinator.
#[derive(Debug, Default)]
pub struct Questions(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    entries: HashMap<String, Question>,
    /// Answers by question, whether the question has come here or not.
    answers: HashMap<String, Kept>,
}

#[derive(Debug)]
struct Kept {
    answer: Answer,
    /// This is the coordinator that it was given to.
    here: bool,
}

/// Open questions by age, as `wanted`.
pub fn list<'a>(
    all: impl Iterator<Item = (&'a String, &'a Question)>,
    wanted: &Wanted<'_>,
) -> Vec<(Place, v1::Question)> {
    let after = wanted.after.map(|place| (place.asked_at, &place.id));
    let mut open: Vec<(Timestamp, &String, &Question)> = all
        .filter(|(_, question)| question.is_open(wanted.project, wanted.batch, wanted.now))
        .map(|(id, question)| (question.asked_at, id, question))
        .filter(|(asked_at, id, _)| after.is_none_or(|after| (*asked_at, *id) > after))
        .collect();
    open.sort_unstable_by_key(|(asked_at, id, _)| (*asked_at, *id));
    let page = open.into_iter().take(wanted.limit);
    page.map(|(asked_at, id, question)| {
        let id = id.clone();
        let view = question.view(&id, wanted.now);
        (Place { asked_at, id }, view)
    })
    .collect()
}

impl Questions {
    /// Takes a question of the holder of a lease. The same question again finds its answer.
    pub fn ask(
        &self,
        key: JobKey,
        fence: Fence,
        worker: WorkerId,
        question: v1::Question,
        now: Timestamp,
    ) -> Asked {
        let mut state = self.lock();
        let State { entries, answers } = &mut *state;
        entries.retain(|_, entry| entry.deadline > now);
        answers.retain(|_, kept| kept.answer.until > now);
        if let Some(entry) = entries.get_mut(&question.id) {
            if entry.key != key || entry.fence != fence {
                return Asked::Answered(false);
            }
            entry.worker = worker;
            return entry.answer.map_or(Asked::Open, Asked::Answered);
        }
        let deadline = now + Duration::from_millis(question.time_left_ms).min(OPEN_MAX);
        let named = !question.id.is_empty()
            && question.id.len() <= NAME_BYTES_MAX
            && question.tool.len() <= NAME_BYTES_MAX;
        if !named || deadline <= now || entries.len() >= QUESTIONS_MAX {
            return Asked::Answered(false);
        }
        let known = answers.get(&question.id).map(|kept| &kept.answer);
        let answer = known.filter(|answer| answer.job == key).map(|a| a.allow);
        let mut arguments_json = question.arguments_json;
        arguments_json.truncate(arguments_json.floor_char_boundary(ARGUMENTS_BYTES_MAX));
        let entry = Question {
            key,
            fence,
            worker,
            tool: question.tool,
            arguments_json,
            asked_at: now,
            deadline,
            answer,
        };
        entries.insert(question.id, entry);
        answer.map_or(Asked::Open, Asked::Answered)
    }

    /// Those that are open here.
    pub fn list(&self, wanted: &Wanted<'_>) -> Vec<(Place, v1::Question)> {
        list(self.lock().entries.iter(), wanted)
    }

    /// How many questions of a batch, or of all of a project, are open here, and of those that `others` have and this
    /// coordinator has not.
    pub fn count(
        &self,
        others: &BTreeMap<String, Question>,
        project: &ProjectId,
        batch: Option<&BatchId>,
        now: Timestamp,
    ) -> u32 {
        let state = self.lock();
        let elsewhere = others
            .iter()
            .filter(|(id, _)| !state.entries.contains_key(*id));
        let all = state
            .entries
            .values()
            .chain(elsewhere.map(|(_, question)| question));
        let open = all.filter(|question| question.is_open(project, batch, now));
        u32::try_from(open.count()).unwrap_or(u32::MAX)
    }

    /// Those of `others` that this coordinator does not have itself.
    pub fn unknown<'a>(
        &self,
        others: &'a BTreeMap<String, Question>,
    ) -> Vec<(&'a String, &'a Question)> {
        let state = self.lock();
        let elsewhere = others.iter();
        elsewhere
            .filter(|(id, _)| !state.entries.contains_key(*id))
            .collect()
    }

    /// A question that has not passed its deadline.
    pub fn find(&self, id: &str, now: Timestamp) -> Option<Question> {
        let state = self.lock();
        let found = state.entries.get(id);
        found.filter(|question| question.deadline > now).cloned()
    }

    /// All that have not passed their deadline, answered or not.
    pub fn all(&self, now: Timestamp) -> Vec<(String, Question)> {
        let state = self.lock();
        let waiting = state.entries.iter().filter(|(_, q)| q.deadline > now);
        waiting.map(|(id, q)| (id.clone(), q.clone())).collect()
    }

    /// Answers that this coordinator was given and that may still be asked for.
    pub fn answered_here(&self, now: Timestamp) -> Vec<Answer> {
        let state = self.lock();
        let given = state.answers.values();
        let given = given.filter(|kept| kept.here && kept.answer.until > now);
        given.map(|kept| kept.answer.clone()).collect()
    }

    /// Keeps an answer. The first one counts. Returns the worker that is to be told: it asked here and did not hear it yet,
    /// or somebody (`here`) says it again.
    pub fn answer(&self, answer: &Answer, here: bool, now: Timestamp) -> Option<WorkerId> {
        let mut state = self.lock();
        let State { entries, answers } = &mut *state;
        if answers.len() < QUESTIONS_MAX || answers.contains_key(&answer.question) {
            let kept = answers
                .entry(answer.question.clone())
                .or_insert_with(|| Kept {
                    answer: answer.clone(),
                    here: false,
                });
            kept.here |= here;
        }
        let question = entries
            .get_mut(&answer.question)
            .filter(|question| question.key == answer.job && question.deadline > now)?;
        let tell = match question.answer {
            None => true,
            Some(before) => here && before == answer.allow,
        };
        question.answer.get_or_insert(answer.allow);
        tell.then(|| question.worker.clone())
    }

    /// Forgets the questions of a job whose lease is no more.
    pub fn forget(&self, key: &JobKey) {
        let mut state = self.lock();
        state.entries.retain(|_, entry| entry.key != *key);
        state.answers.retain(|_, kept| kept.answer.job != *key);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that may panic runs under the lock, and the state is valid after every statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Question {
    fn is_open(&self, project: &ProjectId, batch: Option<&BatchId>, now: Timestamp) -> bool {
        self.answer.is_none()
            && self.deadline > now
            && self.key.project == *project
            && batch.is_none_or(|batch| self.key.batch == *batch)
    }

    fn view(&self, id: &str, now: Timestamp) -> v1::Question {
        let time_left = self.deadline.since(now);
        v1::Question {
            id: id.to_owned(),
            batch: self.key.batch.to_string(),
            job: self.key.job.to_string(),
            tool: self.tool.clone(),
            arguments_json: self.arguments_json.clone(),
            time_left_ms: u64::try_from(time_left.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks at `now` with a deadline, both in milliseconds since some moment.
    fn ask(questions: &Questions, id: &str, job: &str, deadline: u64, now: u64) -> Asked {
        let question = v1::Question {
            id: id.to_owned(),
            tool: "t".to_owned(),
            time_left_ms: deadline.saturating_sub(now),
            ..v1::Question::default()
        };
        let (key, worker) = (job.parse().unwrap(), "w".parse().unwrap());
        questions.ask(key, Fence(1), worker, question, Timestamp::from_ms(now))
    }

    fn answer(id: &str, job: &str, allow: bool) -> Answer {
        Answer {
            job: job.parse().unwrap(),
            question: id.to_owned(),
            allow,
            until: Timestamp::from_ms(100),
        }
    }

    fn page(
        questions: &Questions,
        batch: Option<&BatchId>,
        after: Option<&Place>,
        now: u64,
    ) -> Vec<(Place, v1::Question)> {
        questions.list(&Wanted {
            project: &"p".parse().unwrap(),
            batch,
            after,
            limit: 2,
            now: Timestamp::from_ms(now),
        })
    }

    #[test]
    fn the_first_answer_counts_and_is_kept_for_a_worker_that_asks_again() {
        let questions = Questions::default();
        let told = |allow, here, now| {
            let answer = answer("1", "p/b/j", allow);
            questions.answer(&answer, here, Timestamp::from_ms(now))
        };
        let worker: WorkerId = "w".parse().unwrap();
        assert_eq!(ask(&questions, "1", "p/b/j", 100, 10), Asked::Open);
        assert_eq!(told(true, false, 20), Some(worker.clone()));
        assert_eq!(told(true, false, 21), None, "it has heard it");
        assert_eq!(told(true, true, 21), Some(worker), "somebody says it again");
        assert_eq!(told(false, true, 22), None);
        assert!(page(&questions, None, None, 22).is_empty());
        let again = |job| ask(&questions, "1", job, 100, 30);
        assert_eq!(again("p/b/j"), Asked::Answered(true));
        assert_eq!(again("p/b/other"), Asked::Answered(false));
        assert_eq!(told(true, true, 100), None, "too late");
    }

    #[test]
    fn an_answer_that_comes_before_its_question_is_kept() {
        let questions = Questions::default();
        let now = Timestamp::from_ms(5);
        for (id, here) in [("1", true), ("2", false)] {
            assert_eq!(
                questions.answer(&answer(id, "p/b/j", true), here, now),
                None
            );
        }
        let given = questions.answered_here(now);
        assert_eq!(given, [answer("1", "p/b/j", true)], "others show the other");
        assert_eq!(
            ask(&questions, "1", "p/b/j", 100, 10),
            Asked::Answered(true)
        );
        assert_eq!(
            ask(&questions, "2", "q/b/j", 100, 10),
            Asked::Open,
            "of another job"
        );
        questions.forget(&"p/b/j".parse().unwrap());
        assert!(questions.answered_here(now).is_empty());
    }

    #[test]
    fn a_question_that_is_at_another_coordinator_too_counts_once() {
        let (here, there) = (Questions::default(), Questions::default());
        for id in ["1", "2"] {
            ask(&there, id, "p/b/j", 100, 10);
        }
        ask(&here, "1", "p/b/j", 100, 20);
        let now = Timestamp::from_ms(30);
        let others: BTreeMap<String, Question> = there.all(now).into_iter().collect();
        let (project, batch) = ("p".parse().unwrap(), "b".parse().unwrap());
        assert_eq!(here.count(&others, &project, Some(&batch), now), 2);
        assert_eq!(here.count(&others, &project, None, now), 2);
        let unknown = here.unknown(&others);
        assert_eq!(unknown.len(), 1);
        assert_eq!(unknown[0].0, "2");
    }

    #[test]
    fn open_questions_are_listed_by_age_until_their_deadline() {
        let questions = Questions::default();
        let project: ProjectId = "p".parse().unwrap();
        ask(&questions, "b", "p/b/j", 100, 10);
        ask(&questions, "a", "p/c/j", 50, 20);
        let batch: BatchId = "b".parse().unwrap();
        let ids = |batch, now| -> Vec<String> {
            let open = page(&questions, batch, None, now);
            open.into_iter().map(|(_, q)| q.id).collect()
        };
        assert_eq!(ids(None, 30), ["b", "a"]);
        assert_eq!(ids(Some(&batch), 30), ["b"]);
        let listed = page(&questions, None, None, 30);
        assert_eq!(listed[0].1.time_left_ms, 70);
        assert_eq!(ids(None, 60), ["b"]);
        let others = BTreeMap::new();
        let count = questions.count(&others, &project, Some(&batch), Timestamp::from_ms(60));
        assert_eq!(count, 1);
        questions.forget(&"p/b/j".parse().unwrap());
        assert!(ids(None, 60).is_empty());
        assert_eq!(
            ask(&questions, "late", "p/b/j", 60, 60),
            Asked::Answered(false)
        );
    }

    #[test]
    fn a_list_goes_on_behind_a_question_that_was_answered_meanwhile() {
        let questions = Questions::default();
        for id in ["c-1", "a", "b"] {
            ask(&questions, id, "p/b/j", 100, 10);
        }
        let ids = |after: Option<&Place>| -> (Vec<String>, Option<Place>) {
            let page = page(&questions, None, after, 20);
            let last = page.last().map(|(place, _)| place.clone());
            (page.into_iter().map(|(_, q)| q.id).collect(), last)
        };
        let (first, last) = ids(None);
        assert_eq!(first, ["a", "b"]);
        let last: Place = last.unwrap().to_string().parse().unwrap();
        questions.answer(&answer("b", "p/b/j", true), true, Timestamp::from_ms(15));
        assert_eq!(ids(Some(&last)).0, ["c-1"]);
        for broken in ["", "7", "x-a"] {
            assert!(broken.parse::<Place>().is_err(), "{broken}");
        }
    }
}
