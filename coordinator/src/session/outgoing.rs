//! The stream to a worker. When the connection breaks, what waits in it was provably never sent.

use std::pin::Pin;
use std::task::{Context, Poll};

use espalier_core::id::{Fence, JobKey};
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Unsent, lock};

type Item = Result<v1::CoordinatorMessage, Status>;

/// Messages to one worker, in order.
#[derive(Debug)]
pub struct Outgoing {
    messages: mpsc::Receiver<Item>,
    unsent: Unsent,
    ended: CancellationToken,
    gone: CancellationToken,
}

impl Outgoing {
    pub(super) fn new(
        messages: mpsc::Receiver<Item>,
        unsent: Unsent,
        ended: CancellationToken,
        gone: CancellationToken,
    ) -> Self {
        Self {
            messages,
            unsent,
            ended,
            gone,
        }
    }
}

impl Stream for Outgoing {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Item>> {
        self.messages.poll_recv(context)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // Closed first: what is sent from here on fails at its sender.
        self.messages.close();
        let mut left = Vec::new();
        while let Ok(item) = self.messages.try_recv() {
            left.extend(granted_in(item));
        }
        lock(&self.unsent).append(&mut left);
        self.ended.cancel();
        self.gone.cancel();
    }
}

/// The leases that a message grants.
fn granted_in(item: Item) -> Vec<(JobKey, Fence)> {
    let Ok(v1::CoordinatorMessage {
        message: Some(Message::Grants(grants)),
    }) = item
    else {
        return Vec::new();
    };
    grants
        .grants
        .iter()
        .filter_map(|grant| super::lease_from_wire(grant.lease.as_ref()).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::message;
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn grants_that_were_not_read_are_kept_for_giving_back() {
        let (outbox, messages) = mpsc::channel(8);
        let (unsent, ended) = (Unsent::default(), CancellationToken::new());
        let gone = CancellationToken::new();
        let parts = (Arc::clone(&unsent), ended.clone(), gone.clone());
        let mut outgoing = Outgoing::new(messages, parts.0, parts.1, parts.2);
        for fence in [1, 2] {
            let lease = v1::Lease {
                job: "p/b/j".to_owned(),
                fence,
            };
            let grant = v1::Grant {
                lease: Some(lease),
                ..v1::Grant::default()
            };
            let grants = v1::Grants {
                grants: vec![grant],
            };
            outbox
                .send(Ok(message(Message::Grants(grants))))
                .await
                .unwrap();
        }
        let read = tokio_stream::StreamExt::next(&mut outgoing).await;
        assert!(read.is_some());
        drop(outgoing);
        assert!(ended.is_cancelled() && gone.is_cancelled());
        assert_eq!(*lock(&unsent), [("p/b/j".parse().unwrap(), Fence(2))]);
        assert!(outbox.is_closed());
    }
}
