//! Questions that running rollouts ask before they call a tool, and the answers of people.
//!
//! In memory: a rollout asks again when its worker reconnects, and an answer is kept until the question's deadline,
//! so that neither a lost stream nor a lost reply loses it. Sessions put questions in, the API layer lists and
//! answers them, the event task takes out those of leases that ended.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, Fence, JobKey, ProjectId, WorkerId};
use espalier_core::time::Timestamp;
use espalier_proto::v1;

/// Most questions that are kept: more than people can answer, less than would hurt.
const QUESTIONS_MAX: usize = 10_000;
/// Longest id and tool name, in bytes.
const NAME_BYTES_MAX: usize = 256;
/// Longest arguments that are kept, in bytes.
const ARGUMENTS_BYTES_MAX: usize = 4 * 1024;
/// A question cannot stay open for longer than a job may ask for.
const OPEN_MAX: Duration = Duration::from_secs(86_400);

/// A question that waits, or whose answer may still be asked for.
#[derive(Clone, Debug)]
struct Entry {
    key: JobKey,
    fence: Fence,
    worker: WorkerId,
    tool: String,
    arguments_json: String,
    asked_at: Timestamp,
    deadline: Timestamp,
    answer: Option<bool>,
}

/// Where an answer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addressee {
    /// Who asked.
    pub worker: WorkerId,
}

/// Why an answer does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAnswered {
    /// There is no such question, or it is another project's, or its deadline has passed.
    Unknown,
    /// Somebody answered otherwise before.
    Otherwise(bool),
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
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// The questions of all projects.
#[derive(Debug, Default)]
pub struct Questions(Mutex<HashMap<String, Entry>>);

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
        let mut entries = self.lock();
        entries.retain(|_, entry| entry.deadline > now);
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
        let mut arguments_json = question.arguments_json;
        arguments_json.truncate(arguments_json.floor_char_boundary(ARGUMENTS_BYTES_MAX));
        let entry = Entry {
            key,
            fence,
            worker,
            tool: question.tool,
            arguments_json,
            asked_at: now,
            deadline,
            answer: None,
        };
        entries.insert(question.id, entry);
        Asked::Open
    }

    /// Open questions of a project, or of one batch of it, oldest first: those after `after`, at most `limit`.
    pub fn list(
        &self,
        project: &ProjectId,
        batch: Option<&BatchId>,
        after: Option<&Place>,
        limit: usize,
        now: Timestamp,
    ) -> Vec<(Place, v1::Question)> {
        let entries = self.lock();
        let after = after.map(|place| (place.asked_at, &place.id));
        let mut open: Vec<(Timestamp, &String, &Entry)> = entries
            .iter()
            .filter(|(_, entry)| entry.is_open(project, batch, now))
            .map(|(id, entry)| (entry.asked_at, id, entry))
            .filter(|(asked_at, id, _)| after.is_none_or(|after| (*asked_at, *id) > after))
            .collect();
        open.sort_unstable_by_key(|(asked_at, id, _)| (*asked_at, *id));
        open.into_iter()
            .take(limit)
            .map(|(asked_at, id, entry)| {
                let id = id.clone();
                let question = entry.view(&id, now);
                (Place { asked_at, id }, question)
            })
            .collect()
    }

    /// How many questions of a batch are open.
    pub fn count(&self, project: &ProjectId, batch: &BatchId, now: Timestamp) -> u32 {
        let entries = self.lock();
        let open = entries
            .values()
            .filter(|entry| entry.is_open(project, Some(batch), now));
        u32::try_from(open.count()).unwrap_or(u32::MAX)
    }

    /// Answers a question of `project`. The first answer counts; the same one again is harmless.
    pub fn answer(
        &self,
        project: &ProjectId,
        id: &str,
        allow: bool,
        now: Timestamp,
    ) -> Result<Addressee, NotAnswered> {
        let mut entries = self.lock();
        let entry = entries
            .get_mut(id)
            .filter(|entry| entry.key.project == *project && entry.deadline > now)
            .ok_or(NotAnswered::Unknown)?;
        match entry.answer {
            Some(earlier) if earlier != allow => Err(NotAnswered::Otherwise(earlier)),
            _ => {
                entry.answer = Some(allow);
                Ok(Addressee {
                    worker: entry.worker.clone(),
                })
            }
        }
    }

    /// Forgets the questions of a job whose lease is no more.
    pub fn forget(&self, key: &JobKey) {
        self.lock().retain(|_, entry| entry.key != *key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // No code that may panic runs under the lock, and the state is valid after every statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
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

    #[test]
    fn the_first_answer_counts_and_is_kept_for_a_worker_that_asks_again() {
        let questions = Questions::default();
        let project: ProjectId = "p".parse().unwrap();
        let other: ProjectId = "q".parse().unwrap();
        let answer =
            |project, allow, now| questions.answer(project, "1", allow, Timestamp::from_ms(now));
        assert_eq!(ask(&questions, "1", "p/b/j", 100, 10), Asked::Open);
        assert_eq!(answer(&other, true, 20), Err(NotAnswered::Unknown));
        assert!(answer(&project, true, 20).is_ok());
        assert!(answer(&project, true, 21).is_ok());
        assert_eq!(
            answer(&project, false, 22),
            Err(NotAnswered::Otherwise(true))
        );
        let open = questions.list(&project, None, None, 10, Timestamp::from_ms(22));
        assert!(open.is_empty());
        assert_eq!(
            ask(&questions, "1", "p/b/j", 100, 30),
            Asked::Answered(true)
        );
        assert_eq!(
            ask(&questions, "1", "p/b/other", 100, 30),
            Asked::Answered(false)
        );
        assert_eq!(answer(&project, true, 100), Err(NotAnswered::Unknown));
    }

    #[test]
    fn open_questions_are_listed_by_age_until_their_deadline() {
        let questions = Questions::default();
        let project: ProjectId = "p".parse().unwrap();
        ask(&questions, "b", "p/b/j", 100, 10);
        ask(&questions, "a", "p/c/j", 50, 20);
        let batch: BatchId = "b".parse().unwrap();
        let ids = |batch, now| -> Vec<String> {
            let open = questions.list(&project, batch, None, 10, Timestamp::from_ms(now));
            open.into_iter().map(|(_, q)| q.id).collect()
        };
        assert_eq!(ids(None, 30), ["b", "a"]);
        assert_eq!(ids(Some(&batch), 30), ["b"]);
        let listed = questions.list(&project, None, None, 1, Timestamp::from_ms(30));
        assert_eq!(listed[0].1.time_left_ms, 70);
        assert_eq!(ids(None, 60), ["b"]);
        assert_eq!(questions.count(&project, &batch, Timestamp::from_ms(60)), 1);
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
        let project: ProjectId = "p".parse().unwrap();
        for id in ["c-1", "a", "b"] {
            ask(&questions, id, "p/b/j", 100, 10);
        }
        let page = |after: Option<&Place>| -> (Vec<String>, Option<Place>) {
            let page = questions.list(&project, None, after, 2, Timestamp::from_ms(20));
            let last = page.last().map(|(place, _)| place.clone());
            (page.into_iter().map(|(_, q)| q.id).collect(), last)
        };
        let (first, last) = page(None);
        assert_eq!(first, ["a", "b"]);
        let last: Place = last.unwrap().to_string().parse().unwrap();
        questions
            .answer(&project, "b", true, Timestamp::from_ms(15))
            .unwrap();
        assert_eq!(page(Some(&last)).0, ["c-1"]);
        for broken in ["", "7", "x-a"] {
            assert!(broken.parse::<Place>().is_err(), "{broken}");
        }
    }
}
