//! Threads that run one function side by side: each on its own fixed share ([`Pool::split`]), where which thread computes
//! what depends on the number of threads alone, or each on what is next ([`Pool::each`]), where nobody waits for a thread
//! that has not come.

#![expect(
    unsafe_code,
    reason = "threads borrow the caller's closure and parts of one slice"
)]

use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The instructions that kernels are compiled for and chosen by at run time. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Any machine.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// The best that this machine has.
    #[must_use]
    pub fn detect() -> Self {
        [Self::Avx512, Self::Avx2]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Self::Portable)
    }

    /// What it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

/// A job's closure with its lifetime taken off; see [`Pool::run`] for why that holds.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));
// SAFETY: the closure is `Sync`, so other threads may call it through a shared reference.
unsafe impl Send for Job {}

struct Slot {
    /// Nothing: it is done, and whoever comes now is too late.
    job: Option<Job>,
    /// Whether every thread must call it. Else those do that come while it is there.
    by_all: bool,
    stop: bool,
}

struct Shared {
    slot: Mutex<Slot>,
    start: Condvar,
    /// Counts jobs: a thread runs when it is ahead of what the thread has seen.
    turn: AtomicUsize,
    /// Threads that are not done with the job: all that must call it, or those that came.
    running: AtomicUsize,
    panicked: AtomicBool,
}

/// How long a thread looks out for what comes next before it leaves its core to others: the time between two ops. What
/// follows a step (its ids on their way to whoever asked) needs a core, and all are taken by threads that look out.
const LOOK_OUT: Duration = Duration::from_micros(20);

/// A fixed number of threads, the caller among them.
pub struct Pool {
    shared: Arc<Shared>,
    others: Vec<JoinHandle<()>>,
    /// One job at a time.
    turn: Mutex<()>,
    isa: Isa,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// `threads` threads (at least one) with the best instructions of this machine.
    ///
    /// # Panics
    /// When the system gives no thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Pool::new`], with chosen instructions.
    ///
    /// # Panics
    /// When the machine has not got them.
    #[must_use]
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        assert!(isa.is_available(), "this machine has no {isa:?}");
        let shared = Arc::new(Shared {
            slot: Mutex::new(Slot {
                job: None,
                by_all: false,
                stop: false,
            }),
            start: Condvar::new(),
            turn: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
        });
        let threads = threads.max(1);
        let others = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || {
                        keep_on_core(index, threads);
                        work(&shared, index);
                    })
                    .unwrap_or_else(|error| panic!("no thread for kernels: {error}"))
            })
            .collect();
        Self {
            shared,
            others,
            turn: Mutex::new(()),
            isa,
        }
    }

    /// The instructions that kernels run with.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Keeps the calling thread, and what it starts, on the core that the other threads leave it: for a thread that does
    /// nothing but call this pool.
    pub fn keep_caller(&self) {
        keep_on_core(0, self.threads());
    }

    /// The number of threads, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.others.len() + 1
    }

    /// Calls `job(0..threads)`, each number on a thread of its own, and returns when all have.
    ///
    /// # Panics
    /// When a call panicked.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        match self.others.is_empty() {
            true => job(0),
            false => self.share_out(job, true),
        }
    }

    /// Calls `job` for each of `0..items`, on whichever thread is free, and returns when all were called: for jobs that do
    /// not depend on who does them. On a machine that has more to do, a thread may come milliseconds late, which is a
    /// thousand times what an item takes; the others have done its part by then.
    ///
    /// # Panics
    /// When a call panicked.
    pub fn each(&self, items: usize, job: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let take = |_| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    return;
                }
                job(item);
            }
        };
        match self.others.is_empty() || items < 2 {
            true => take(0),
            false => self.share_out(&take, false),
        }
    }

    /// Calls `job` here and on the other threads: on all of them, or on those that come before it has returned here.
    fn share_out(&self, job: &(dyn Fn(usize) + Sync), by_all: bool) {
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        let running = if by_all { self.others.len() } else { 0 };
        shared.running.store(running, Ordering::Relaxed);
        {
            let mut slot = lock(&shared.slot);
            // SAFETY: only the lifetime is taken off. The closure outlives every call: this function does not return
            // or unwind before `running` is 0. By then every thread has called it that must, and where none must, it is
            // taken out of the slot first, so that none begins. No thread calls a job twice.
            let job: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(job) };
            slot.job = Some(Job(job));
            slot.by_all = by_all;
            shared.turn.fetch_add(1, Ordering::Release);
        }
        shared.start.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        if !by_all {
            lock(&shared.slot).job = None;
        }
        let is_done = || shared.running.load(Ordering::Acquire) == 0;
        look_out(is_done);
        while !is_done() {
            std::thread::yield_now();
        }
        let others_panicked = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!others_panicked, "a kernel panicked on another thread");
    }

    /// Splits `0..items` into equal ranges, one a thread, in order.
    pub fn split(&self, items: usize, job: &(dyn Fn(Range<usize>) + Sync)) {
        let threads = self.threads();
        self.run(&|index| {
            let range = share(items, index, threads);
            if !range.is_empty() {
                job(range);
            }
        });
    }
}

/// The `index`th of `shares` equal parts of `0..items`.
pub(crate) fn share(items: usize, index: usize, shares: usize) -> Range<usize> {
    items * index / shares..items * (index + 1) / shares
}

/// Keeps this thread on a core of its own where there are as many threads as cores. One that is woken is otherwise put
/// beside the one that woke it, and both wait for each other on one core while another is idle.
#[cfg(target_os = "linux")]
fn keep_on_core(index: usize, threads: usize) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    if allowed.count() as usize != threads {
        return;
    }
    let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
    if let Some(core) = cores.nth(index) {
        let mut own = CpuSet::new();
        own.set(core);
        // Where the system refuses, threads run where it puts them: slower, and right.
        let _ = sched_setaffinity(None, &own);
    }
}

#[cfg(not(target_os = "linux"))]
fn keep_on_core(_index: usize, _threads: usize) {}

/// Waits for something that is about to happen, for [`LOOK_OUT`] at most.
fn look_out(has_happened: impl Fn() -> bool) {
    let began = Instant::now();
    while began.elapsed() < LOOK_OUT {
        // The clock costs as much as some looks.
        for _ in 0..16 {
            if has_happened() {
                return;
            }
            std::hint::spin_loop();
        }
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        look_out(|| shared.turn.load(Ordering::Acquire) != seen);
        let job = {
            let mut slot = lock(&shared.slot);
            while shared.turn.load(Ordering::Acquire) == seen && !slot.stop {
                slot = shared
                    .start
                    .wait(slot)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if slot.stop {
                return;
            }
            seen = shared.turn.load(Ordering::Relaxed);
            if slot.job.is_some() && !slot.by_all {
                shared.running.fetch_add(1, Ordering::Relaxed);
            }
            slot.job
        };
        let Some(Job(job)) = job else { continue };
        // SAFETY: `Pool::share_out` keeps the closure alive until `running` is counted down below.
        let job = unsafe { &*job };
        if catch_unwind(AssertUnwindSafe(|| job(index))).is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.running.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.slot).stop = true;
        self.shared.start.notify_all();
        for thread in self.others.drain(..) {
            // A thread ends by itself only; its panics were reported by `run`.
            let _ended = thread.join();
        }
    }
}

/// A slice of which threads write parts that do not overlap.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out as `&mut`, so sharing this is like sending those.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            of: PhantomData,
        }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No other part that lives at the same time overlaps it.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that parts do not overlap"
    )]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        // SAFETY: inside the slice; not aliased, by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The start of the slice, for writes of strided parts.
    pub(crate) fn start(&self) -> *mut T {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_share_runs_once_and_shares_cover_all() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            for items in [0, 1, 2, 5, 100] {
                for _ in 0..50 {
                    let mut counts = vec![0_u32; items];
                    let parts = Parts::new(&mut counts);
                    pool.split(items, &|range| {
                        // SAFETY: shares do not overlap.
                        for count in unsafe { parts.part(range) } {
                            *count += 1;
                        }
                    });
                    assert!(
                        counts.iter().all(|count| *count == 1),
                        "{threads} {counts:?}"
                    );
                }
            }
        }
    }

    /// Between jobs that every thread must call, so that one which came too late for the one before is there.
    #[test]
    fn each_item_is_taken_once_whoever_comes() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            for round in 0..2_000 {
                let items = [0, 1, 2, 40][round % 4];
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.each(items, &|item| {
                    counts[item].fetch_add(1, Ordering::Relaxed);
                });
                let counts = counts.into_iter().map(AtomicUsize::into_inner);
                assert!(counts.into_iter().all(|count| count == 1), "{threads}");
                let called = AtomicUsize::new(0);
                pool.run(&|_| {
                    called.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(called.into_inner(), threads);
            }
        }
    }

    #[test]
    fn who_has_begun_is_waited_for() {
        let pool = Pool::new(2);
        let (taken, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        // Both threads have begun once both items are taken.
        pool.each(2, &|_| {
            taken.fetch_add(1, Ordering::SeqCst);
            while taken.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            done.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(done.load(Ordering::SeqCst), 2);
        let slot = lock(&pool.shared.slot);
        assert!(
            slot.job.is_none(),
            "nothing is left for one that comes late"
        );
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..3 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|index| assert_ne!(index, bad));
            }));
            assert!(outcome.is_err(), "thread {bad}");
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.each(3, &|item| assert_ne!(item, bad));
            }));
            assert!(outcome.is_err(), "item {bad}");
        }
        let count = AtomicUsize::new(0);
        pool.run(&|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 3);
    }
}
