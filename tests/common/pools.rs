//! Pools whose workers can be held.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use millpond::{Pool, Stats};

use super::eventually;

/// Holds each thread that waits at it until it is opened.
#[derive(Clone, Default)]
pub struct Latch(Arc<(Mutex<bool>, Condvar)>);

impl Latch {
    pub fn open(&self) {
        *self.0.0.lock().expect("the latch") = true;
        self.0.1.notify_all();
    }

    pub fn wait(&self) {
        let open = self.0.0.lock().expect("the latch");
        drop(self.0.1.wait_while(open, |open| !*open).expect("the latch"));
    }
}

pub fn pool_of(workers: usize, queue_capacity: usize) -> Pool {
    let builder = Pool::builder("test").workers(workers).queue_capacity(queue_capacity);
    builder.build().expect("the threads")
}

/// A pool with all its workers held until the latch opens.
pub fn held(workers: usize, queue_capacity: usize) -> (Pool, Latch) {
    let (pool, latch) = (pool_of(workers, queue_capacity), Latch::default());
    let running = Arc::new(AtomicUsize::new(0));
    for number in 1..=workers {
        let (wait, runs) = (latch.clone(), Arc::clone(&running));
        let job = move || {
            runs.fetch_add(1, Ordering::AcqRel);
            wait.wait();
        };
        pool.execute(job).expect("room");
        eventually("the worker is held", || (running.load(Ordering::Acquire) == number).then_some(()));
    }
    (pool, latch)
}

/// Panics when it is dropped.
pub struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a destructor");
    }
}

/// Waits until there are this many threads whose name begins so, and all of them sleep.
pub fn all_asleep(name: &str, threads: usize) {
    eventually("they sleep", || (super::thread_states(name) == vec!['S'; threads]).then_some(()));
}

/// Describes these numbers if they break a law.
pub fn broken_law(stats: &Stats) -> Option<String> {
    let ended = stats.completed + stats.panicked + stats.cancelled + stats.expired + stats.aborted;
    let holds = stats.submitted == ended + stats.queue_depth + stats.busy as u64
        && stats.busy <= stats.workers
        && stats.queue_depth <= stats.queue_capacity as u64;
    (!holds).then(|| format!("{stats:?}"))
}

/// Runs `step`. Returns its result and the time it took.
pub fn timed<T>(step: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (step(), start.elapsed())
}
