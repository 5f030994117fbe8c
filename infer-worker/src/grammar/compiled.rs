//! Grammars that were compiled, and the one place where they are.
//!
//! Compiling takes a core for as long as a grammar is large, and requests are strangers to each other: so one is compiled
//! at a time, whoever asks for the same one waits for it, and of those who ask for another one only a few wait, for a
//! while. What does not compile is remembered too.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::GrammarError;

/// Grammars that are kept: agents send the same tools again and again.
const KEPT_MAX: usize = 64;
/// Bytes of their texts, where the last one has its place whatever its size. llguidance keeps up to some hundred bytes for
/// each: a list of properties with a pattern each takes as much.
const KEPT_TEXT_BYTES_MAX: usize = 2 << 20;
/// Who may wait until another grammar is compiled. Fewer than requests that are prepared at once, so that grammars hold up
/// no request without one.
const WAITING_MAX: usize = 2;
/// How long they, and those who wait for their own, do so.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// What came of a grammar's text.
type Outcome<T> = Result<Arc<T>, GrammarError>;

/// The grammars of one vocabulary.
pub(super) struct Compiled<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// By text, the one that was used last first.
    kept: VecDeque<(Arc<str>, Outcome<T>)>,
    compiling: Option<Arc<str>>,
    waiting: usize,
}

impl<T> Default for Compiled<T> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                kept: VecDeque::new(),
                compiling: None,
                waiting: 0,
            }),
            changed: Condvar::new(),
        }
    }
}

/// Frees the place, also when compiling panics.
struct Place<'a, T>(&'a Compiled<T>);

impl<T> Drop for Place<'_, T> {
    fn drop(&mut self) {
        self.0.lock().compiling = None;
        self.0.changed.notify_all();
    }
}

impl<T> Compiled<T> {
    /// What `compile` makes, or made, of `text`.
    ///
    /// # Errors
    /// It does not compile, or others are compiled for too long.
    pub(super) fn get(
        &self,
        text: &str,
        compile: impl FnOnce() -> Result<T, GrammarError>,
    ) -> Outcome<T> {
        let until = Instant::now() + WAIT_MAX;
        let mut state = self.lock();
        loop {
            if let Some(known) = state.find(text) {
                return known;
            }
            let Some(now) = &state.compiling else { break };
            let own = **now == *text;
            if !own && state.waiting >= WAITING_MAX {
                return Err(GrammarError::Busy);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GrammarError::Busy);
            }
            state.waiting += usize::from(!own);
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= usize::from(!own);
        }
        let text: Arc<str> = text.into();
        state.compiling = Some(Arc::clone(&text));
        drop(state);
        let place = Place(self);
        let outcome = compile().map(Arc::new);
        self.lock().keep(text, outcome.clone());
        drop(place);
        outcome
    }

    /// No code that may panic runs under the lock, and what it holds is valid after every statement.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    /// What was compiled before, which then counts as used last.
    fn find(&mut self, text: &str) -> Option<Outcome<T>> {
        let at = self.kept.iter().position(|(known, _)| **known == *text)?;
        let entry = self.kept.remove(at)?;
        let outcome = entry.1.clone();
        self.kept.push_front(entry);
        Some(outcome)
    }

    fn keep(&mut self, text: Arc<str>, outcome: Outcome<T>) {
        let mut room = KEPT_TEXT_BYTES_MAX.saturating_sub(text.len());
        let fits = |(text, _): &&(Arc<str>, Outcome<T>)| {
            let left = room.checked_sub(text.len());
            room = left.unwrap_or(room);
            left.is_some()
        };
        let fitting = self.kept.iter().take(KEPT_MAX - 1).take_while(fits);
        let count = fitting.count();
        self.kept.truncate(count);
        self.kept.push_front((text, outcome));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn one_is_compiled_at_a_time_and_shared() {
        let compiled: Compiled<u32> = Compiled::default();
        let (begun, begins) = channel();
        let (go, goes) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                compiled.get("slow", move || {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                    Ok(1)
                })
            });
            begins.recv().unwrap();
            let same: Vec<_> = (0..5)
                .map(|_| scope.spawn(|| compiled.get("slow", || panic!("compiled twice"))))
                .collect();
            let others: Vec<_> = (0..WAITING_MAX)
                .map(|_| scope.spawn(|| compiled.get("other", || Ok(2))))
                .collect();
            while compiled.lock().waiting < WAITING_MAX {
                std::thread::yield_now();
            }
            assert_eq!(compiled.get("third", || Ok(3)), Err(GrammarError::Busy));
            go.send(()).unwrap();
            for (waits, value) in [(same, 1), (others, 2)] {
                for one in waits {
                    assert_eq!(one.join().unwrap().as_deref(), Ok(&value));
                }
            }
        });
    }

    #[test]
    fn what_does_not_compile_is_remembered_and_the_oldest_is_forgotten() {
        let compiled: Compiled<usize> = Compiled::default();
        let error = GrammarError::Compile {
            reason: "no".to_owned(),
        };
        for _ in 0..2 {
            let mut first = Some(error.clone());
            let got = compiled.get("bad", || Err(first.take().unwrap()));
            assert_eq!(got, Err(error.clone()));
        }
        assert_eq!(compiled.get("bad", || panic!("again")), Err(error));
        for i in 0..KEPT_MAX {
            compiled.get(&i.to_string(), || Ok(i)).unwrap();
        }
        assert_eq!(compiled.lock().kept.len(), KEPT_MAX);
        assert_eq!(*compiled.get("bad", || Ok(7)).unwrap(), 7);
    }

    #[test]
    fn large_ones_are_fewer() {
        let compiled: Compiled<usize> = Compiled::default();
        let keep = |text: &str| {
            compiled.get(text, || Ok(text.len())).unwrap();
            compiled.lock().kept.len()
        };
        let third = |name: &str| name.repeat(KEPT_TEXT_BYTES_MAX / 3);
        let counts = ["a", "b", "c", "d", "c"].map(|name| keep(&third(name)));
        assert_eq!(counts, [1, 2, 3, 3, 3]);
        assert_eq!(keep("small"), 3, "what was used last stays");
        assert_eq!(compiled.lock().kept[1].0.as_bytes()[0], b'c');
        let whole = "e".repeat(KEPT_TEXT_BYTES_MAX + 1);
        assert_eq!((keep(&whole), keep(&whole), keep("f")), (1, 1, 1));
    }

    #[test]
    fn one_that_panics_frees_the_place() {
        let compiled: Compiled<u32> = Compiled::default();
        let panics = std::panic::AssertUnwindSafe(|| compiled.get("a", || panic!("broken")));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert_eq!(*compiled.get("b", || Ok(2)).unwrap(), 2);
    }
}
