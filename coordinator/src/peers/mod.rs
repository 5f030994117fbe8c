//! What the coordinators of one queue show and tell each other, so that any of them answers for all: workers, the MCP
//! servers that those offer, questions, and the orders of operators and people.
//!
//! The API layer reads what others show and gives orders, a maintenance task shows what this process has, and the event
//! task hears orders. Leases are not its business: those are in the queue.

mod order;
mod show;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::CoordinatorId;
use espalier_proto::v1;
use prost::Message;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::questions::Question;
use crate::queue::{Queue, QueueError, Shown, Table};

pub use order::{Answer, Order, deliver, give, obey};
pub use show::wanted;

/// How old what others show may be when it is used: lists are read again for whoever asks after that, once for all.
const READ_MAX_AGE: Duration = Duration::from_secs(1);

/// The other coordinators. One a process.
#[derive(Debug)]
pub struct Peers {
    me: CoordinatorId,
    queue: Arc<dyn Queue>,
    shown: Mutex<show::Shown>,
    workers: Read<BTreeMap<String, v1::Worker>>,
    servers: Read<BTreeSet<String>>,
    questions: Read<BTreeMap<String, Question>>,
}

impl Peers {
    /// Shows nothing yet.
    pub fn new(me: CoordinatorId, queue: Arc<dyn Queue>) -> Self {
        Self {
            me,
            queue,
            shown: Mutex::default(),
            workers: Read::default(),
            servers: Read::default(),
            questions: Read::default(),
        }
    }

    /// This process among the coordinators of the queue.
    pub fn me(&self) -> &CoordinatorId {
        &self.me
    }

    /// Workers of the others, by id. A worker that has just moved is where it came to last.
    pub async fn workers(&self) -> Result<Arc<BTreeMap<String, v1::Worker>>, QueueError> {
        let read = async {
            let mut workers: BTreeMap<String, v1::Worker> = BTreeMap::new();
            for shown in self.of_others(Table::Workers).await? {
                let Ok(mut worker) = v1::Worker::decode(shown.value) else {
                    continue;
                };
                worker.coordinator = shown.by.to_string();
                let known = workers.get(&worker.worker);
                if known.is_none_or(|known| known.connected_at_us < worker.connected_at_us) {
                    workers.insert(worker.worker.clone(), worker);
                }
            }
            Ok(workers)
        };
        self.workers.get(read).await
    }

    /// Names of the MCP servers that workers of the others offer.
    pub async fn servers(&self) -> Result<Arc<BTreeSet<String>>, QueueError> {
        let read = async {
            let shown = self.of_others(Table::Servers).await?;
            Ok(shown.into_iter().map(|shown| shown.key).collect())
        };
        self.servers.get(read).await
    }

    /// Questions at the others, by id. One that is at several, as its worker moved, is answered where one of them knows an
    /// answer.
    pub async fn questions(&self) -> Result<Arc<BTreeMap<String, Question>>, QueueError> {
        let read = async {
            let mut questions: BTreeMap<String, Question> = BTreeMap::new();
            for shown in self.of_others(Table::Questions).await? {
                let Ok(question) = serde_json::from_slice::<Question>(&shown.value) else {
                    continue;
                };
                let known = questions.get(&shown.key);
                if known.is_none_or(|known| known.answer.is_none()) {
                    questions.insert(shown.key, question);
                }
            }
            Ok(questions)
        };
        self.questions.get(read).await
    }

    /// Orders that the others know.
    pub async fn orders(&self) -> Result<Vec<Order>, QueueError> {
        let shown = self.of_others(Table::Orders).await?;
        Ok(shown
            .iter()
            .filter_map(|s| Order::parse(&s.value))
            .collect())
    }

    async fn of_others(&self, table: Table) -> Result<Vec<Shown>, QueueError> {
        let mut shown = self.queue.shown(table).await?;
        shown.retain(|shown| shown.by != self.me);
        Ok(shown)
    }
}

/// A list as it was last read. Whoever comes while it is read waits for that.
#[derive(Debug)]
pub struct Read<T>(Mutex<Option<(Instant, Arc<T>)>>);

impl<T> Default for Read<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Read<T> {
    /// The list, read again by `read` where it is too old.
    pub async fn get(
        &self,
        read: impl Future<Output = Result<T, QueueError>>,
    ) -> Result<Arc<T>, QueueError> {
        let mut last = self.0.lock().await;
        if let Some((at, value)) = &*last
            && at.elapsed() < READ_MAX_AGE
        {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(read.await?);
        *last = Some((Instant::now(), Arc::clone(&value)));
        Ok(value)
    }
}
