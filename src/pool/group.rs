//! Waits for several jobs together.
//!
//! Each job of a group gets a waiter. When the job ends, its waiter puts the job's number into the group's inbox and
//! wakes the thread that waits there. The inbox has its own lock, which is always taken after a job's lock, or alone.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::errors::JobError;
use super::handle::JobHandle;
use super::job::{Audience, Waiter};
use crate::sync::checked::thread::{self, Thread};
use crate::sync::checked::{Mutex, lock};

/// Several jobs, and one thread that waits for them.
#[derive(Default)]
pub(super) struct Group {
    inbox: Arc<Inbox>,
}

/// Collects the ends of a group's jobs. Threads that end jobs write it, the waiting thread reads it.
#[derive(Default)]
struct Inbox {
    state: Mutex<Arrivals>,
}

#[derive(Default)]
struct Arrivals {
    /// Jobs that have ended and that the waiting thread has not taken yet.
    ended: VecDeque<Arrival>,
    /// The thread that sleeps until the next report.
    sleeper: Option<Thread>,
}

/// A job that has ended.
pub(super) struct Arrival {
    pub(super) number: usize,
    failed: bool,
}

impl Audience for Inbox {
    fn ended(&self, number: usize, failed: bool) {
        let mut state = lock(&self.state);
        state.ended.push_back(Arrival { number, failed });
        let sleeper = state.sleeper.take();
        drop(state);
        if let Some(thread) = sleeper {
            thread.unpark();
        }
    }
}

impl Group {
    /// Makes the job report its end under this number.
    pub(super) fn watch<T: Send + 'static>(&mut self, number: usize, handle: &JobHandle<T>) {
        let inbox = Arc::clone(&self.inbox) as Arc<dyn Audience>;
        if let Err(failed) = handle.watch(Waiter::Group(inbox, number)) {
            self.inbox.ended(number, failed);
        }
    }

    /// Blocks until a job has ended, and returns it. At `until` it returns `None`. `run_one` runs one of the jobs, if
    /// the calling worker can, and returns whether it did.
    pub(super) fn next(
        &mut self,
        until: Option<Instant>,
        mut run_one: impl FnMut() -> bool,
    ) -> Option<Arrival> {
        loop {
            if let Some(arrival) = lock(&self.inbox.state).ended.pop_front() {
                return Some(arrival);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return None;
            }
            if run_one() {
                continue;
            }
            let mut state = lock(&self.inbox.state);
            if !state.ended.is_empty() {
                continue;
            }
            state.sleeper = Some(thread::current());
            drop(state);
            match until {
                None => thread::park(),
                Some(at) => thread::park_timeout(at.saturating_duration_since(Instant::now())),
            }
        }
    }
}

/// Returns the outcomes of several jobs in the order in which the jobs end. The iterator blocks until the next job has
/// ended, and is over when all jobs have. On a worker of the jobs' own pool it runs those that are still queued.
///
/// Each item is the job's number, from 0 in the order of `handles`, and its outcome. If the iterator is dropped, the
/// remaining jobs still run.
///
/// ```
/// # let pool = millpond::Pool::builder("doc").workers(2).queue_capacity(2).build()?;
/// let (finish, wait) = std::sync::mpsc::channel::<()>();
/// let slow = pool.submit(move || { wait.recv().ok(); "slow" })?;
/// let fast = pool.submit(|| "fast")?;
/// let mut outcomes = millpond::as_completed([slow, fast]);
/// assert_eq!(outcomes.next(), Some((1, Ok("fast"))));
/// finish.send(())?;
/// assert_eq!(outcomes.next(), Some((0, Ok("slow"))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics
///
/// The iterator panics at a job whose outcome was already taken by awaiting its handle.
pub fn as_completed<T: Send + 'static>(handles: impl IntoIterator<Item = JobHandle<T>>) -> AsCompleted<T> {
    let mut group = Group::default();
    let handles: Vec<_> = handles.into_iter().map(Some).collect();
    for (number, handle) in handles.iter().flatten().enumerate() {
        group.watch(number, handle);
    }
    AsCompleted { left: handles.len(), group, handles, tried: 0 }
}

/// The iterator that [`as_completed`] returns.
pub struct AsCompleted<T> {
    group: Group,
    handles: Vec<Option<JobHandle<T>>>,
    left: usize,
    /// How many of the jobs were not queued when this thread last tried to run them. They will not be again.
    tried: usize,
}

impl<T: Send + 'static> Iterator for AsCompleted<T> {
    type Item = (usize, Result<T, JobError>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let AsCompleted { group, handles, tried, .. } = self;
        let arrival = group.next(None, || run_next(tried, |number| handles.get(number).map(Option::as_ref)));
        let number = arrival.expect("a wait without a timeout ends with an arrival").number;
        let handle = self.handles[number].take().expect("a job ends once");
        self.left -= 1;
        Some((number, handle.join()))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// Runs the next job that the calling worker can run, of jobs by their numbers. Returns whether there was one.
fn run_next<'h, T: Send + 'static>(
    tried: &mut usize,
    handle: impl Fn(usize) -> Option<Option<&'h JobHandle<T>>>,
) -> bool {
    while let Some(next) = handle(*tried) {
        *tried += 1;
        if next.is_some_and(JobHandle::run_here) {
            return true;
        }
    }
    false
}

impl<T: Send + 'static> ExactSizeIterator for AsCompleted<T> {}

impl<T> fmt::Debug for AsCompleted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsCompleted").field("left", &self.left).finish_non_exhaustive()
    }
}

/// The condition that [`wait`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// One job has ended.
    FirstCompleted,
    /// One job has failed, or all jobs have ended.
    FirstFailed,
    /// All jobs have ended.
    AllCompleted,
}

/// Blocks until one or all of several jobs have ended, for `timeout` at most, and returns whether they have. Without
/// handles it returns `true` at once. On a worker of the jobs' own pool it runs those that are still queued, unless the
/// timeout is zero.
///
/// The handles keep their outcomes. If [`JobHandle::is_finished`] returns `true` for a handle, its
/// [`join`](JobHandle::join) does not block.
///
/// ```
/// # let pool = millpond::Pool::builder("doc").workers(2).queue_capacity(2).build()?;
/// use std::time::Duration;
/// use millpond::{Until, wait};
/// let mut jobs = [pool.submit(|| 1)?, pool.submit(|| 2)?];
/// assert!(wait(&mut jobs, Until::AllCompleted, Duration::from_secs(10)));
/// assert_eq!(jobs.map(|job| job.join()), [Ok(1), Ok(2)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "it says whether the jobs have ended"]
pub fn wait<T: Send + 'static>(handles: &mut [JobHandle<T>], until: Until, timeout: Duration) -> bool {
    let deadline = Instant::now().checked_add(timeout);
    let mut group = Group::default();
    for (number, handle) in handles.iter().enumerate() {
        group.watch(number, handle);
    }
    let mut tried = 0;
    for _ in 0..handles.len() {
        // A job that ends after the timeout reports to the inbox of a group that no thread waits for. That is harmless.
        let run_one = || run_next(&mut tried, |number| handles.get(number).map(Some));
        let Some(arrival) = group.next(deadline, run_one) else {
            return false;
        };
        match until {
            Until::FirstCompleted => return true,
            Until::FirstFailed if arrival.failed => return true,
            Until::FirstFailed | Until::AllCompleted => {}
        }
    }
    true
}
