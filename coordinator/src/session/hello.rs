//! The first exchange of a stream: who the worker is, and which of its leases it has lost meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;

use espalier_core::error::FieldError;
use espalier_core::id::WorkerId;
use espalier_core::queue::{JobKind, RenewReply};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_proto::v1::worker_message::Message as Said;
use espalier_runtime::tasks::with_deadline;

use super::{HELLO_LIMIT, Stream, lease_from_wire, message};
use crate::api::{Shared, queue_error, view};
use crate::queue::Renewal;
use crate::registry::{Connected, Introduction};

/// Most tags of a worker, as many as the queue takes.
const TAGS_MAX: usize = 256;
/// Longest tag, version or name of an instance, in bytes.
const TAG_BYTES_MAX: usize = 256;
/// Most jobs that one worker runs at once, and most leases that it may hold from before.
const CAPACITY_MAX: u32 = 10_000;

/// Waits for Hello, enters the worker, and answers with what it has lost.
pub async fn greet(shared: &Shared, stream: &mut Stream) -> Result<Arc<Connected>, ApiError> {
    let first = with_deadline("session.hello", HELLO_LIMIT, stream.incoming.message()).await;
    let said = match first {
        Ok(Ok(Some(said))) => said.message,
        Ok(_) => return Err(ApiError::Unavailable("the stream ended".to_owned())),
        Err(_) => None,
    };
    let Some(Said::Hello(hello)) = said else {
        let rule = format!(
            "must be the first message, within {} s",
            HELLO_LIMIT.as_secs()
        );
        return Err(FieldError::new("hello", "nothing", rule).into());
    };
    let who = check(&hello).map_err(|error| error.under("hello"))?;
    let held = held(&hello.held).map_err(|error| error.under("hello"))?;
    let connected = shared
        .registry
        .enter(
            who,
            shared.now(),
            stream.outbox.clone(),
            stream.ended.clone(),
        )
        .map_err(|full| ApiError::Exhausted(full.to_string()))?;
    let answered = welcome(shared, stream, &connected, held).await;
    if answered.is_err() {
        shared.registry.leave(&connected);
    }
    answered.map(|()| connected)
}

fn check(hello: &v1::Hello) -> Result<Introduction, FieldError> {
    if hello.tags.len() > TAGS_MAX {
        let rule = format!("must have at most {TAGS_MAX} entries");
        return Err(FieldError::new("tags", hello.tags.len(), rule));
    }
    for (i, tag) in hello.tags.iter().enumerate() {
        check_text(&format!("tags[{i}]"), tag)?;
    }
    check_text("version", &hello.version)?;
    check_text("instance", &hello.instance)?;
    if hello.capacity == 0 || hello.capacity > CAPACITY_MAX {
        let rule = format!("must be in 1..={CAPACITY_MAX}");
        return Err(FieldError::new("capacity", hello.capacity, rule));
    }
    let kinds = hello.kinds.iter().map(|kind| view::kind_from_wire(*kind));
    let kinds: BTreeSet<JobKind> = kinds.collect::<Result<_, _>>()?;
    if kinds.is_empty() {
        return Err(FieldError::new("kinds", "nothing", "must name a kind"));
    }
    let worker = WorkerId::new(&hello.worker)?;
    let process = match &*hello.process {
        "" => worker.clone(),
        process => {
            let process = WorkerId::new(process);
            process.map_err(|error| FieldError::new("process", error.value, error.rule))?
        }
    };
    Ok(Introduction {
        worker,
        process,
        instance: hello.instance.clone(),
        tags: hello.tags.iter().cloned().collect(),
        kinds,
        capacity: hello.capacity,
        version: hello.version.clone(),
    })
}

fn check_text(field: &str, text: &str) -> Result<(), FieldError> {
    if text.len() <= TAG_BYTES_MAX && !text.contains(char::is_control) {
        return Ok(());
    }
    let rule = format!("must be at most {TAG_BYTES_MAX} bytes of printable text");
    Err(FieldError::new(field, text, rule))
}

/// The leases of an earlier stream, as renewals: a worker that says it holds them is alive.
fn held(leases: &[v1::Lease]) -> Result<Vec<Renewal>, FieldError> {
    if leases.len() > CAPACITY_MAX as usize {
        let rule = format!("must have at most {CAPACITY_MAX} entries");
        return Err(FieldError::new("held", leases.len(), rule));
    }
    let one = |(i, lease): (usize, &v1::Lease)| {
        let (key, fence) =
            lease_from_wire(Some(lease)).map_err(|e| e.under(&format!("held[{i}]")))?;
        Ok(Renewal {
            key,
            fence,
            progress: None,
        })
    };
    leases.iter().enumerate().map(one).collect()
}

async fn welcome(
    shared: &Shared,
    stream: &mut Stream,
    connected: &Connected,
    held: Vec<Renewal>,
) -> Result<(), ApiError> {
    let replies = match held.is_empty() {
        true => Vec::new(),
        false => shared
            .queue
            .renew(held.clone())
            .await
            .map_err(queue_error)?,
    };
    let (mut lost, mut cancelled) = (Vec::new(), Vec::new());
    for (renewal, reply) in held.into_iter().zip(replies) {
        let lease = view::lease(&renewal.key, renewal.fence);
        match reply {
            RenewReply::Lost => lost.push(lease),
            RenewReply::Held {
                cancel_requested, ..
            } => {
                connected.started(renewal.key, renewal.fence);
                if cancel_requested {
                    cancelled.push(lease);
                }
            }
        }
    }
    connected.grants(false);
    let ttl = shared.config.lease_ttl();
    let shortest = connected.kinds.iter().map(|kind| kind.lease_ttl()).min();
    let ttl = ttl.or(shortest).unwrap_or_default();
    let welcome = Message::Welcome(v1::Welcome {
        lost,
        lease_ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
    });
    let mut messages = vec![welcome];
    // Before any grant: a rollout needs its model at once.
    let told = stream.endpoints.borrow_and_update().clone();
    if !told.endpoints.is_empty() {
        messages.push(Message::Endpoints(told));
    }
    if !cancelled.is_empty() {
        messages.push(Message::Cancels(v1::Cancels { leases: cancelled }));
    }
    for said in messages {
        // The outbox is new and has room for all; where it is closed the worker has gone.
        if stream.outbox.try_send(Ok(message(said))).is_err() {
            return Err(ApiError::Unavailable("the stream ended".to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> v1::Hello {
        v1::Hello {
            worker: "w1".to_owned(),
            kinds: vec![v1::JobKind::Rollout.into()],
            capacity: 8,
            ..v1::Hello::default()
        }
    }

    #[test]
    fn an_introduction_is_checked_field_by_field() {
        assert_eq!(check(&hello()).unwrap().capacity, 8);
        let with = |change: fn(&mut v1::Hello)| {
            let mut changed = hello();
            change(&mut changed);
            check(&changed).unwrap_err().field
        };
        assert_eq!(with(|h| h.worker.clear()), "worker");
        assert_eq!(with(|h| h.capacity = 0), "capacity");
        assert_eq!(with(|h| h.kinds.clear()), "kinds");
        assert_eq!(with(|h| h.kinds = vec![77]), "kind");
        assert_eq!(with(|h| h.instance = "a\nb".to_owned()), "instance");
        assert_eq!(with(|h| h.tags = vec!["a\nb".to_owned()]), "tags[0]");
        let lease = v1::Lease::default();
        assert_eq!(held(&[lease]).unwrap_err().field, "held[0].job");
    }
}
