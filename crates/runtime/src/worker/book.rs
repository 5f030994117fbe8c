//! What a worker holds: leases, results that nobody acknowledged yet, and what is due when. Pure but for the shared
//! [`Lease`] of each entry; time comes in as arguments.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_proto::v1;
use tokio::time::Instant;

use super::lease::{Lease, Stop, stop_at};

/// Most results that wait for an acknowledgement before the worker takes no more jobs: the coordinator is there but
/// its queue is not, and a result is some kilobytes.
const UNACKED_MAX: usize = 1_000;
/// How long a result waits before it is sent again over the same stream.
const RESEND_AFTER: Duration = Duration::from_secs(15);
/// Renewals of one lease that an answer may still come to. Each follows the one before after a third of the lease, so
/// that the answer to an older one would come after the end that it speaks of.
const RENEWALS_IN_FLIGHT_MAX: usize = 4;
/// Most leases in one message, as the protocol says.
const BATCH_MAX: usize = 1_000;

/// Names a lease.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LeaseId {
    pub job: JobKey,
    pub fence: Fence,
}

impl LeaseId {
    pub(super) fn from_wire(lease: Option<&v1::Lease>) -> Option<Self> {
        let lease = lease?;
        let job = lease.job.parse().ok()?;
        let fence = Fence(lease.fence);
        Some(Self { job, fence })
    }

    pub(super) fn to_wire(&self) -> v1::Lease {
        v1::Lease {
            job: self.job.to_string(),
            fence: self.fence.0,
        }
    }
}

struct Held {
    lease: Lease,
    ttl: Duration,
    renew_at: Instant,
    /// Renewals that are not answered yet, oldest first: their numbers, and when they were sent.
    in_flight: VecDeque<(u64, Instant)>,
    /// Whether its task still runs, which takes up a slot.
    running: bool,
    /// Whether anything is still to be reported of it.
    ours: bool,
    result: Option<Unacked>,
}

struct Unacked {
    result: v1::Result,
    send_at: Instant,
}

/// Everything that the worker holds.
#[derive(Default)]
pub(super) struct Book {
    held: BTreeMap<LeaseId, Held>,
    /// Of the renewals that were sent last, over whichever stream.
    last_number: u64,
    /// Longest time between two renewals.
    tell_every: Option<Duration>,
}

impl Book {
    /// Nothing is held. Leases are renewed at least every `tell_every`, if there is such a time.
    pub(super) fn new(tell_every: Option<Duration>) -> Self {
        Self {
            tell_every,
            ..Self::default()
        }
    }

    /// Takes up a granted lease. None: it is held already, since grants may come twice.
    pub(super) fn grant(&mut self, id: &LeaseId, ttl: Duration, now: Instant) -> Option<Lease> {
        if self.held.contains_key(id) {
            return None;
        }
        // A newer lease of the same job means that the older one is no more.
        let older: Vec<LeaseId> = self
            .held
            .keys()
            .filter(|held| held.job == id.job)
            .cloned()
            .collect();
        for old in older {
            self.lose(&old, Stop::Lost);
        }
        let lease = Lease::new(stop_at(now, ttl));
        let held = Held {
            lease: lease.clone(),
            ttl,
            renew_at: now + spread(ttl, self.tell_every),
            in_flight: VecDeque::new(),
            running: true,
            ours: true,
            result: None,
        };
        self.held.insert(id.clone(), held);
        Some(lease)
    }

    /// The job's task ended with `result`.
    pub(super) fn ended(&mut self, id: &LeaseId, result: v1::Result, now: Instant) {
        let Some(held) = self.held.get_mut(id) else {
            return;
        };
        held.running = false;
        if !held.ours {
            self.held.remove(id);
            return;
        }
        held.result = Some(Unacked {
            result,
            send_at: now,
        });
    }

    /// The coordinator has dealt with the result.
    pub(super) fn acknowledged(&mut self, id: &LeaseId) -> bool {
        let is_result = self.held.get(id).is_some_and(|held| held.result.is_some());
        is_result && self.held.remove(id).is_some()
    }

    /// The lease is gone: the work stops and nothing is reported. False: it was not held.
    pub(super) fn lose(&mut self, id: &LeaseId, reason: Stop) -> bool {
        let Some(held) = self.held.get_mut(id) else {
            return false;
        };
        held.lease.stop(reason);
        held.ours = false;
        if !held.running {
            self.held.remove(id);
        }
        true
    }

    /// The work stops; its result is still reported.
    pub(super) fn stop(&self, id: &LeaseId, reason: Stop) {
        if let Some(held) = self.held.get(id) {
            held.lease.stop(reason);
        }
    }

    /// All work stops.
    pub(super) fn stop_all(&self, reason: Stop) {
        for held in self.held.values() {
            held.lease.stop(reason);
        }
    }

    /// What the job was at, newest last.
    pub(super) fn last_progress(&self, id: &LeaseId) -> String {
        let held = self.held.get(id);
        held.map(|held| held.lease.last_progress())
            .unwrap_or_default()
    }

    /// The renewal with this number was answered. Those before it need no answer any more, and one that is answered out
    /// of turn says nothing new.
    pub(super) fn renewed(&mut self, id: &LeaseId, number: u64, ttl: Duration) {
        let Some(held) = self.held.get_mut(id) else {
            return;
        };
        let sent = held.in_flight.iter().position(|sent| sent.0 == number);
        let Some((_, sent)) = sent.and_then(|at| held.in_flight.drain(..=at).next_back()) else {
            return;
        };
        // Counted from when the renewal was sent: the answer may have lain in a buffer while the process stood still.
        held.ttl = ttl;
        held.lease.extend(stop_at(sent, ttl));
    }

    /// Stops what could not be renewed in time, and names it.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<LeaseId> {
        let is_over = |held: &Held| held.ours && held.running && now >= held.lease.stop_at();
        let over = self.held.iter().filter(|(_, held)| is_over(held));
        let over: Vec<LeaseId> = over.map(|(id, _)| id.clone()).collect();
        for id in &over {
            self.lose(id, Stop::Expired);
        }
        over
    }

    /// Renewals to send now: those that are due, and with them those that soon are.
    pub(super) fn renewals(&mut self, now: Instant) -> Vec<v1::Renewal> {
        let is_due = |held: &Held| held.ours && now >= held.renew_at;
        if !self.held.values().any(is_due) {
            return Vec::new();
        }
        self.last_number += 1;
        let number = self.last_number;
        let mut renewals = Vec::new();
        for (id, held) in &mut self.held {
            let soon = now + held.ttl / 6 >= held.renew_at;
            if !held.ours || !soon || renewals.len() >= BATCH_MAX {
                continue;
            }
            held.renew_at = now + spread(held.ttl, self.tell_every);
            if held.in_flight.len() >= RENEWALS_IN_FLIGHT_MAX {
                held.in_flight.pop_front();
            }
            held.in_flight.push_back((number, now));
            renewals.push(v1::Renewal {
                lease: Some(id.to_wire()),
                progress: held.lease.current_progress(),
                number,
            });
        }
        renewals
    }

    /// Results to send now. Their leases are not renewed beside them: the answer to a result that is accepted would
    /// cross the word that its lease is no more.
    pub(super) fn results(&mut self, now: Instant) -> Vec<v1::Result> {
        let mut results = Vec::new();
        for held in self.held.values_mut() {
            let Some(unacked) = &mut held.result else {
                continue;
            };
            if now < unacked.send_at || results.len() >= BATCH_MAX {
                continue;
            }
            unacked.send_at = now + RESEND_AFTER;
            held.renew_at = held.renew_at.max(now + spread(held.ttl, self.tell_every));
            results.push(unacked.result.clone());
        }
        results
    }

    /// A new stream begins: everything is told anew. Answers to earlier renewals may still come, on the old one.
    pub(super) fn reconnected(&mut self, now: Instant) {
        for held in self.held.values_mut() {
            held.renew_at = now;
            if let Some(unacked) = &mut held.result {
                unacked.send_at = now;
            }
        }
    }

    /// Leases to name in the greeting.
    pub(super) fn leases(&self) -> Vec<v1::Lease> {
        let ours = self.held.iter().filter(|(_, held)| held.ours);
        ours.map(|(id, _)| id.to_wire()).collect()
    }

    /// Slots that are free for new jobs.
    pub(super) fn free(&self, slots: u32) -> u32 {
        if self.unacked() >= UNACKED_MAX {
            return 0;
        }
        slots.saturating_sub(u32::try_from(self.running()).unwrap_or(u32::MAX))
    }

    /// Jobs whose tasks run.
    pub(super) fn running(&self) -> usize {
        self.held.values().filter(|held| held.running).count()
    }

    /// Results that nobody acknowledged yet.
    pub(super) fn unacked(&self) -> usize {
        self.held
            .values()
            .filter(|held| held.result.is_some())
            .count()
    }

    /// When something is due next; `connected`: whether anything can be sent.
    pub(super) fn next_due(&self, connected: bool) -> Option<Instant> {
        let expiries = self
            .held
            .values()
            .filter(|held| held.ours && held.running)
            .map(|held| held.lease.stop_at());
        let sends = self.held.values().filter(|_| connected).flat_map(|held| {
            let renewal = held.ours.then_some(held.renew_at);
            renewal
                .into_iter()
                .chain(held.result.as_ref().map(|unacked| unacked.send_at))
        });
        expiries.chain(sends).min()
    }
}

/// A third of the lease, or `at_most`, a little less at random, so that a thousand workers do not renew in step.
fn spread(ttl: Duration, at_most: Option<Duration>) -> Duration {
    let third = ttl / 3;
    let longest = at_most.map_or(third, |at_most| third.min(at_most));
    longest.mul_f64(0.85 + 0.15 * rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    fn id(job: &str, fence: u64) -> LeaseId {
        LeaseId {
            job: format!("p/b/{job}").parse().unwrap(),
            fence: Fence(fence),
        }
    }

    fn result(id: &LeaseId) -> v1::Result {
        v1::Result {
            lease: Some(id.to_wire()),
            outcome: None,
        }
    }

    async fn pass(seconds: u64) -> Instant {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        Instant::now()
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_watched_renews_more_often_than_the_lease_needs() {
        let now = Instant::now();
        let mut book = Book::new(Some(Duration::from_secs(2)));
        let lease = book.grant(&id("a", 1), TTL, now).unwrap();
        for n in 1..=3 {
            lease.progress(&format!("step {n}"));
            let at = now + Duration::from_secs(2) * n;
            assert!(book.next_due(true).unwrap() <= at);
            assert_eq!(book.renewals(at)[0].progress, format!("step {n}"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn leases_are_renewed_together_and_expire_at_four_fifths() {
        let mut book = Book::default();
        let now = Instant::now();
        let (a, b) = (id("a", 1), id("b", 2));
        let lease = book.grant(&a, TTL, now).unwrap();
        book.grant(&b, TTL, now).unwrap();
        assert!(book.renewals(now).is_empty());
        let now = pass(20).await;
        assert_eq!(book.renewals(now).len(), 2);
        book.renewed(&a, 1, TTL);
        let now = pass(29).await;
        assert_eq!(
            book.expire(now),
            std::slice::from_ref(&b),
            "a was renewed at 20 s, b ends at 48 s"
        );
        assert_eq!(lease.reason(), None);
        assert_eq!(book.running(), 2, "b's task still takes up its slot");
        book.ended(&b, result(&b), now);
        assert_eq!(
            (book.running(), book.unacked()),
            (1, 0),
            "nothing of b is reported"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_lay_in_a_buffer_does_not_revive_a_lease() {
        let mut book = Book::default();
        let a = id("a", 1);
        let lease = book.grant(&a, TTL, Instant::now()).unwrap();
        let now = pass(20).await;
        assert_eq!(book.renewals(now).len(), 1);
        // The process stands still for longer than the renewed lease lasts; then it reads the answer.
        let now = pass(100).await;
        assert!(!lease.may_publish());
        book.renewed(&a, 1, TTL);
        assert!(!lease.may_publish());
        assert_eq!(book.expire(now), [a]);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_are_lost_or_come_out_of_turn_shorten_no_lease() {
        let mut book = Book::default();
        let a = id("a", 1);
        let lease = book.grant(&a, TTL, Instant::now()).unwrap();
        // Five renewals, of which the first four are never answered.
        let mut numbers = Vec::new();
        for _ in 0..5 {
            let now = pass(9).await;
            let held = book.held.get_mut(&a).unwrap();
            held.renew_at = now;
            numbers.extend(book.renewals(now).iter().map(|renewal| renewal.number));
        }
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
        let sent = Instant::now();
        book.renewed(&a, 5, TTL);
        assert_eq!(
            lease.stop_at(),
            stop_at(sent, TTL),
            "counted from the fifth"
        );
        // The answers to earlier ones arrive after all, and one to a renewal that nobody sent.
        for number in [2, 4, 99] {
            book.renewed(&a, number, TTL * 100);
        }
        assert_eq!(lease.stop_at(), stop_at(sent, TTL));
        // An answer that comes over the old stream when the new one is up counts as well.
        let now = pass(20).await;
        assert_eq!(book.renewals(now)[0].number, 6);
        book.reconnected(now);
        assert_eq!(book.renewals(now)[0].number, 7);
        book.renewed(&a, 6, TTL);
        assert_eq!(lease.stop_at(), stop_at(now, TTL));
    }

    #[tokio::test(start_paused = true)]
    async fn results_are_sent_until_acknowledged() {
        let mut book = Book::default();
        let a = id("a", 1);
        book.grant(&a, TTL, Instant::now()).unwrap();
        book.ended(&a, result(&a), Instant::now());
        assert_eq!(book.free(1), 1, "a slot is free when the work is done");
        assert_eq!(book.results(Instant::now()).len(), 1);
        assert!(book.results(Instant::now()).is_empty());
        let now = pass(14).await;
        assert!(book.renewals(now).is_empty(), "the result says it all");
        let now = pass(1).await;
        assert_eq!(book.results(now).len(), 1);
        book.reconnected(now);
        assert_eq!(book.results(now).len(), 1);
        assert_eq!(book.leases().len(), 1, "its lease is held until then");
        assert!(book.acknowledged(&a));
        assert!(!book.acknowledged(&a));
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_lease_of_a_job_ends_the_older() {
        let mut book = Book::default();
        let now = Instant::now();
        let old = book.grant(&id("a", 1), TTL, now).unwrap();
        assert!(
            book.grant(&id("a", 1), TTL, now).is_none(),
            "a repeated grant is the same lease"
        );
        let new = book.grant(&id("a", 2), TTL, now).unwrap();
        assert_eq!((old.reason(), new.reason()), (Some(Stop::Lost), None));
        assert_eq!(book.leases().len(), 1);
    }
}
