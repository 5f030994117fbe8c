//! Follows what scripts publish, on a connection of its own. A hint only: what is missed while the connection is away
//! is found by asking, and listeners are told that something may have been.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::{Fence, WorkerId};
use espalier_core::queue::{Event, RevokeReason};
use espalier_runtime::backoff::Backoff;
use espalier_runtime::tasks::with_deadline;
use futures::StreamExt;
use redis::aio::PubSub;
use tokio::sync::broadcast;

use super::core::Core;
use super::decode;
use super::link::CONNECT_LIMIT;
use super::peers::NOTICES;
use crate::queue::QueueError;

const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(100),
    max: Duration::from_secs(5),
};

/// Subscribes to the events of every shard, and to what coordinators tell each other.
pub async fn subscribe(shards: &[Arc<Core>]) -> Result<PubSub, QueueError> {
    let Some(first) = shards.first() else {
        return Err(QueueError::Closed);
    };
    let subscribing = async {
        let client = first.link.address().client().await?;
        let mut subscribed = client.get_async_pubsub().await?;
        for shard in shards {
            subscribed.subscribe(shard.key("events")).await?;
        }
        subscribed.subscribe(first.key(NOTICES)).await?;
        Ok::<_, redis::RedisError>(subscribed)
    };
    match with_deadline("queue.subscribe", CONNECT_LIMIT, subscribing).await {
        Ok(Ok(subscribed)) => Ok(subscribed),
        Ok(Err(error)) => Err(super::link::unavailable(&error)),
        Err(timeout) => Err(decode::unreadable(&timeout.to_string())),
    }
}

/// Passes events on until the process ends; subscribes anew after a break.
pub async fn listen(shards: Vec<Arc<Core>>, first: PubSub, events: broadcast::Sender<Event>) {
    pass_on(first, &events).await;
    let mut failures = 0;
    loop {
        match subscribe(&shards).await {
            Ok(subscribed) => {
                failures = 0;
                // Nobody listens: nobody has missed anything.
                let _ = events.send(Event::Missed);
                pass_on(subscribed, &events).await;
            }
            Err(error) => tracing::warn!(error = %error, "no events: subscribing failed"),
        }
        failures += 1;
        tokio::time::sleep(BACKOFF.jittered(failures)).await;
    }
}

/// Ends when the connection does, or when the server has not answered for a while: a connection whose other end has
/// vanished says nothing.
async fn pass_on(subscribed: PubSub, events: &broadcast::Sender<Event>) {
    let (mut sink, mut messages) = subscribed.split();
    loop {
        tokio::select! {
            message = messages.next() => match message {
                Some(message) => {
                    if message.get_channel_name().ends_with(NOTICES) {
            let _ = events.send(Event::Notice(message.get_payload_bytes().to_vec()));
            continue;
        }
        for told in parse(message.get_payload_bytes()) {
                        let _ = events.send(told);
                    }
                }
                None => return,
            },
            () = tokio::time::sleep(QUIET) => {
                let ping = with_deadline("queue.ping", CONNECT_LIMIT, sink.ping::<redis::Value>());
                if !matches!(ping.await, Ok(Ok(_))) {
                    return;
                }
            }
        }
    }
}

/// Without an event for so long, the server is asked whether it is there.
const QUIET: Duration = Duration::from_secs(15);

/// The events of one message, as `done.lua` writes them; what is not understood is left out.
fn parse(payload: &[u8]) -> Vec<Event> {
    let told: Vec<Vec<String>> = serde_json::from_slice(payload).unwrap_or_default();
    told.iter().filter_map(|words| event(words)).collect()
}

fn event(words: &[String]) -> Option<Event> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Some(match words.as_slice() {
        ["ready", lane] => {
            let (kind, needs) = decode::lane(lane).ok()?;
            Event::Ready { kind, needs }
        }
        ["cancel", worker, key, fence] => Event::CancelRequested {
            worker: WorkerId::new(worker).ok()?,
            key: key.parse().ok()?,
            fence: Fence(fence.parse().ok()?),
        },
        ["revoked", worker, key, fence, reason] => Event::Revoked {
            worker: WorkerId::new(worker).ok()?,
            key: key.parse().ok()?,
            fence: Fence(fence.parse().ok()?),
            reason: match *reason {
                "ran_too_long" => RevokeReason::RanTooLong,
                _ => RevokeReason::Expired,
            },
        },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_left_out() {
        let payload = br#"[["ready","0\nmcp:browser"],["later","x"],["cancel","w","p/b/j","7"]]"#;
        let events = parse(payload);
        assert_eq!(events.len(), 2);
        assert!(matches!(&events[0], Event::Ready { needs, .. } if needs.contains("mcp:browser")));
        assert!(matches!(
            &events[1],
            Event::CancelRequested {
                fence: Fence(7),
                ..
            }
        ));
        assert!(parse(b"no json").is_empty());
    }
}
