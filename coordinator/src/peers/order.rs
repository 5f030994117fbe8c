//! Orders of operators and people: whoever takes one shows it to all coordinators, and the one that has the worker's
//! stream carries it out.
//!
//! An order is told to all at once, and shown besides, since what is told may be missed. To obey twice is to obey once.

use std::sync::Arc;

use bytes::Bytes;
use espalier_core::id::{JobKey, WorkerId};
use espalier_core::time::Timestamp;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::tasks::with_deadline;
use serde::{Deserialize, Serialize};

use crate::api::{Shared, queue_error};
use crate::registry::Connected;
use crate::session;

/// What somebody has decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// A worker is given no more jobs, at whichever coordinator it is.
    Drain {
        /// Which.
        worker: WorkerId,
    },
    /// A question has an answer.
    Answer(Answer),
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whose question it is.
    pub job: JobKey,
    /// Its id.
    pub question: String,
    /// The answer.
    pub allow: bool,
    /// Until when it may be asked for: the question's deadline.
    pub until: Timestamp,
}

impl Order {
    /// Tells it from other orders.
    pub fn key(&self) -> String {
        match self {
            Self::Drain { worker } => format!("drain/{worker}"),
            Self::Answer(answer) => format!("answer/{}", answer.question),
        }
    }

    /// As others read it.
    pub fn encode(&self) -> Bytes {
        // Plain text and numbers are always written.
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// What another coordinator wrote; none of a kind that this version does not know.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// An answer on its way to a worker that is connected here.
pub type Delivery = (Arc<Connected>, v1::Answer);

/// Carries an order out as far as it concerns this coordinator. `here`: this is the one that it was given to.
pub fn obey(shared: &Shared, order: &Order, here: bool) -> Option<Delivery> {
    match order {
        Order::Drain { worker } => {
            shared.registry.drain(worker);
            None
        }
        Order::Answer(answer) => {
            let worker = shared.questions.answer(answer, here, shared.now())?;
            let connected = shared.registry.find(&worker)?;
            let answer = v1::Answer {
                id: answer.question.clone(),
                allow: answer.allow,
            };
            Some((connected, answer))
        }
    }
}

/// Hands an answer to its worker. One that does not take it is cut off: it asks again on its next stream.
pub async fn deliver((connected, answer): Delivery) -> Result<(), ApiError> {
    let message = session::message(Message::Answer(answer));
    let sent = connected.outbox().send(Ok(message));
    match with_deadline("session.answer", session::SEND_LIMIT, sent).await {
        // A stream that has just ended: the worker asks again on the next one.
        Ok(_) => Ok(()),
        Err(_) => {
            connected.ended.cancel();
            Err(ApiError::Unavailable(
                "the worker does not take the answer now; send it again".to_owned(),
            ))
        }
    }
}

/// Takes an order: when this returns, every coordinator sees it, and what concerns a worker that is connected here is
/// done.
pub async fn give(shared: &Shared, order: &Order) -> Result<(), ApiError> {
    let peers = &shared.peers;
    peers.show_order(order).await.map_err(queue_error)?;
    let delivery = obey(shared, order, true);
    // Others find it in what is shown, if they do not hear it now.
    if let Err(error) = peers.queue.tell(order.encode()).await {
        tracing::debug!(error = %error, "an order was not told, only shown");
    }
    match delivery {
        Some(delivery) => deliver(delivery).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written_and_later_kinds_are_left_out() {
        let orders = [
            Order::Drain {
                worker: "w1".parse().unwrap(),
            },
            Order::Answer(Answer {
                job: "p/b/j".parse().unwrap(),
                question: "q/1".to_owned(),
                allow: true,
                until: Timestamp(7),
            }),
        ];
        for order in &orders {
            assert_eq!(Order::parse(&order.encode()).as_ref(), Some(order));
        }
        let golden = r#"{"order":"answer","job":"p/b/j","question":"q/1","allow":true,"until":7}"#;
        assert_eq!(orders[1].encode(), golden.as_bytes());
        assert_eq!(Order::parse(br#"{"order":"dance"}"#), None);
        assert_eq!(Order::parse(b"\xff"), None);
    }
}
