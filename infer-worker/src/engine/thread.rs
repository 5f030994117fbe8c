//! The engine's thread: takes commands, keeps steps in flight, hands out what was drawn.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::adapters::{Load, Loads};
use super::{
    Adapter, Command, Event, FinishReason, Health, Priority, Shared, Snapshot, Submitted, lock,
};
use crate::executor::{Executor, ExecutorError, Input, Step, Ticket};
use crate::scheduler::{RequestId, Scheduler, Unexpected};

/// How often requests are looked through for receivers that were dropped and readers that have caught up.
pub const SWEEP_EVERY: Duration = Duration::from_millis(20);

/// How long the thread waits for a command when nothing runs.
const IDLE_WAIT: Duration = Duration::from_secs(1);

/// How long it waits for a result when another step could be submitted: it looks for requests in between.
const POLL_WITH_ROOM: Duration = Duration::from_millis(1);

/// Why the thread ends before it was told to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    #[error(transparent)]
    Unexpected(#[from] Unexpected),
    #[error("results must come in the order of steps: {got:?} came, and {expected:?} was due")]
    Order { got: Ticket, expected: Ticket },
    #[error("a step did not end within {0:?}")]
    Stuck(Duration),
}

/// Whoever asked for a request.
struct Client {
    events: mpsc::Sender<Event>,
    priority: Priority,
    /// Its place in the queue, until its first step and while it is set aside.
    queued: Option<OwnedSemaphorePermit>,
    held_since: Option<Instant>,
}

struct Thread<E: Executor> {
    executor: E,
    scheduler: Scheduler,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    loads: Loads<E::Adapter>,
    /// How many the executor has.
    adapters: usize,
    clients: HashMap<RequestId, Client>,
    /// Steps in flight, and since when.
    flights: VecDeque<(Ticket, Instant)>,
    totals: Snapshot,
    swept: Instant,
}

/// Tells that the thread is gone when it panics.
struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "the engine's thread panicked".into();
            self.0.health.send_replace(Health::Failed(reason));
        }
    }
}

/// The thread's life.
pub(super) fn run<E: Executor>(
    executor: E,
    scheduler: Scheduler,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    loads: Loads<E::Adapter>,
) {
    let mut thread = Thread {
        executor,
        scheduler,
        shared,
        commands,
        loads,
        adapters: 0,
        clients: HashMap::new(),
        flights: VecDeque::new(),
        totals: Snapshot::default(),
        swept: Instant::now(),
    };
    // Dropped before the thread's clients are: who hears that an answer ended finds out why.
    let _alive = Alive(Arc::clone(&thread.shared));
    let ended = loop {
        match thread.turn() {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(failure) => break Err(failure),
        }
    };
    let (health, reason) = match ended {
        Ok(()) => (Health::Stopped, FinishReason::Abort),
        Err(failure) => {
            tracing::error!(error = %failure, "the engine failed");
            (
                Health::Failed(failure.to_string().into()),
                FinishReason::Error,
            )
        }
    };
    // Nobody submits any more from here on: what was submitted before is ended too.
    thread.shared.health.send_replace(health);
    thread.end_all(reason);
    thread.publish();
}

impl<E: Executor> Thread<E> {
    /// One round. False: it has nothing more to do.
    fn turn(&mut self) -> Result<bool, Failure> {
        let connected = self.take_commands();
        self.change_adapters()?;
        self.sweep();
        let stop_at = *lock(&self.shared.stop_at);
        let late = stop_at.is_some_and(|at| Instant::now() >= at);
        let drained = stop_at.is_some() && self.scheduler.is_idle();
        if !connected || late || drained {
            return Ok(false);
        }
        self.submit_steps()?;
        self.take_result()?;
        self.publish();
        Ok(true)
    }

    /// Takes all commands that there are; waits for one when nothing runs. False: nobody has a handle any more.
    fn take_commands(&mut self) -> bool {
        if self.scheduler.steps_in_flight() == 0 && !self.scheduler.has_work() {
            // Readers that have to catch up give no sign.
            let wait = if self.clients.is_empty() {
                IDLE_WAIT
            } else {
                SWEEP_EVERY
            };
            match self.commands.recv_timeout(wait) {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Wake => {}
            Command::Submit(requests) => {
                for submitted in requests {
                    self.add(submitted);
                }
            }
        }
    }

    fn add(&mut self, submitted: Submitted) {
        let Submitted {
            request,
            events,
            queued,
        } = submitted;
        let priority = request.priority;
        match self.scheduler.add(request) {
            Ok(id) => {
                let client = Client {
                    events,
                    priority,
                    queued: Some(queued),
                    held_since: None,
                };
                self.clients.insert(id, client);
            }
            Err(refused) => {
                // The handle checks all but grammars.
                tracing::warn!(error = %refused, "request refused");
                self.totals.failed += 1;
                let _ = events.try_send(finished(FinishReason::Error));
            }
        }
    }

    /// Forgets adapters first: their places may be waited for.
    fn change_adapters(&mut self) -> Result<(), ExecutorError> {
        let dropped = std::mem::take(&mut *lock(&self.shared.dropped_adapters));
        for slot in dropped {
            self.executor.drop_adapter(slot)?;
            self.adapters -= 1;
        }
        while let Some(load) = self.next_load() {
            let loaded = match self.executor.load_adapter(load.slot, load.weights) {
                Ok(()) => {
                    self.adapters += 1;
                    let adapter = Adapter::new(load.slot, load.digest).on_drop(load.on_drop);
                    Ok(Arc::new(adapter))
                }
                Err(error @ ExecutorError::Adapter(_)) => Err(error),
                Err(error) => return Err(error),
            };
            // Where nobody waits for it any more it is dropped, and forgotten in the next round.
            let _ = load.reply.send(loaded);
        }
        Ok(())
    }

    /// The next adapter to load, if there is a place for it; those that waited for one for too long are told so.
    fn next_load(&mut self) -> Option<Load<E::Adapter>> {
        let (places, patience) = (
            self.shared.limits.adapters as usize,
            self.shared.config.adapter_patience,
        );
        let mut loads = lock(&self.loads);
        loads.retain(|load| !load.reply.is_closed());
        // An executor without any place says so itself.
        if self.adapters == 0 || self.adapters < places {
            return loads.pop_front();
        }
        while loads
            .front()
            .is_some_and(|load| load.since.elapsed() > patience)
        {
            let late = loads.pop_front()?;
            let _ = late.reply.send(Err(ExecutorError::Adapter(format!(
                "all {places} places are taken by versions that answers still run under, and none came free within {} s",
                patience.as_secs()
            ))));
        }
        None
    }

    /// Looks after requests that nobody reads.
    fn sweep(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.swept) < SWEEP_EVERY {
            return;
        }
        self.swept = now;
        let mut gone = Vec::new();
        let patience = self.shared.config.reader_patience;
        for (id, client) in &mut self.clients {
            if client.events.is_closed() {
                gone.push(*id);
            } else if let Some(since) = client.held_since {
                if client.events.capacity() >= self.shared.config.event_buffer / 2 {
                    (client.held_since, client.queued) = (None, None);
                    self.scheduler.resume(*id);
                } else if now.duration_since(since) > patience {
                    gone.push(*id);
                }
            }
        }
        for id in gone {
            self.abort(id);
        }
    }

    fn submit_steps(&mut self) -> Result<(), ExecutorError> {
        while let Some(step) = self.scheduler.decide() {
            self.leave_queue(&step);
            let ticket = self.executor.submit(step)?;
            self.flights.push_back((ticket, Instant::now()));
        }
        Ok(())
    }

    /// Requests with a first row wait no more.
    fn leave_queue(&mut self, step: &Step) {
        for row in &step.rows {
            // Only the ids of a prompt, or of an answer that was set aside, are known when they go in.
            if matches!(row.input, Input::Ids(_))
                && let Some(client) = self.clients.get_mut(&RequestId(row.seq.0))
                && client.held_since.is_none()
            {
                client.queued = None;
            }
        }
    }

    fn take_result(&mut self) -> Result<(), Failure> {
        let Some(&(expected, since)) = self.flights.front() else {
            return Ok(());
        };
        let full = self.flights.len() >= self.shared.limits.steps_in_flight as usize;
        let wait = if full { SWEEP_EVERY } else { POLL_WITH_ROOM };
        let Some(done) = self.executor.poll(wait)? else {
            let limit = self.shared.config.step_limit;
            return if since.elapsed() > limit {
                Err(Failure::Stuck(limit))
            } else {
                Ok(())
            };
        };
        if done.ticket != expected {
            return Err(Failure::Order {
                got: done.ticket,
                expected,
            });
        }
        self.flights.pop_front();
        for (id, event) in self.scheduler.apply(done)? {
            self.tell(id, event);
        }
        Ok(())
    }

    fn tell(&mut self, id: RequestId, event: Event) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        if let Event::Finished { reason, .. } = event {
            self.totals.count(reason);
            let _ = client.events.try_send(event);
            self.clients.remove(&id);
            return;
        }
        // What may still come after it is set aside: an id for each step in flight, and its end.
        let reserve = self.shared.limits.steps_in_flight as usize + 1;
        match client.events.try_send(event) {
            Ok(()) if client.events.capacity() > reserve => {}
            Ok(()) if client.held_since.is_some() => {}
            Ok(()) => self.set_aside(id),
            Err(TrySendError::Closed(_) | TrySendError::Full(_)) => self.abort(id),
        }
    }

    /// Sets a request aside until its reader has caught up.
    fn set_aside(&mut self, id: RequestId) {
        // Its end may be the very next event.
        if !self.scheduler.knows(id) {
            return;
        }
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let place = self.shared.queues.of(client.priority).try_acquire_owned();
        let Ok(place) = place else {
            return self.abort(id);
        };
        client.queued = Some(place);
        client.held_since = Some(Instant::now());
        self.scheduler.hold(id);
        self.totals.set_aside += 1;
    }

    fn abort(&mut self, id: RequestId) {
        self.scheduler.abort(id);
        if let Some(client) = self.clients.remove(&id) {
            self.totals.count(FinishReason::Abort);
            let _ = client.events.try_send(finished(FinishReason::Abort));
        }
    }

    /// Ends every request that there is, those that were submitted last included.
    fn end_all(&mut self, reason: FinishReason) {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        for (id, client) in self.clients.drain() {
            self.scheduler.abort(id);
            self.totals.count(reason);
            let _ = client.events.try_send(finished(reason));
        }
        lock(&self.loads).clear();
    }

    fn publish(&mut self) {
        self.totals.scheduler = self.scheduler.counters();
        self.totals.requests = self.clients.len();
        *lock(&self.shared.snapshot) = self.totals;
    }
}

impl Snapshot {
    fn count(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.stopped += 1,
            FinishReason::Length => self.at_length += 1,
            FinishReason::Abort => self.aborted += 1,
            FinishReason::Error | FinishReason::Grammar => self.failed += 1,
        }
    }
}

fn finished(reason: FinishReason) -> Event {
    Event::Finished {
        reason,
        cached_tokens: 0,
    }
}
