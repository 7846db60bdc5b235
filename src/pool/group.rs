//! Waiting for several jobs together.
//!
//! Each job of the group is given a waiter that, at its end, puts the job's number into one box and wakes
//! whoever waits at it. The box has a lock of its own, always taken after a job's.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::crew::Awaited;
use super::current::PoolId;
use super::handle::{JobError, JobHandle, list_wait};
use super::job::{Listed, Waiter};
use crate::sync::checked::thread::{self, Thread};
use crate::sync::checked::{Mutex, lock};

/// Where the ends of a group's jobs are reported.
#[derive(Default)]
struct Inbox {
    state: Mutex<Arrivals>,
}

#[derive(Default)]
struct Arrivals {
    /// Jobs that have ended and were not picked up.
    ended: VecDeque<Arrival>,
    sleeper: Option<(Thread, Option<Listed>)>,
}

struct Arrival {
    number: usize,
    failed: bool,
}

impl Inbox {
    fn arrive(&self, number: usize, failed: bool) {
        let mut state = lock(&self.state);
        state.ended.push_back(Arrival { number, failed });
        let sleeper = state.sleeper.take();
        if let Some((_, Some(listed))) = &sleeper {
            // Under the lock, so that the list is exact: see `crew.rs`.
            listed.cross_out();
        }
        drop(state);
        if let Some((thread, _)) = sleeper {
            thread.unpark();
        }
    }

    /// Blocks until a job has ended, or `until`. `pool` is the one that all the jobs belong to, if there is one.
    fn next(&self, pool: Option<PoolId>, until: Option<Instant>) -> Result<Option<Arrival>, JobError> {
        loop {
            {
                let mut state = lock(&self.state);
                if let Some(arrival) = state.ended.pop_front() {
                    state.sleeper = None;
                    return Ok(Some(arrival));
                }
                if until.is_some_and(|until| Instant::now() >= until) {
                    state.sleeper = None;
                    return Ok(None);
                }
                if state.sleeper.is_none() {
                    let listed = match (until, pool) {
                        (None, Some(pool)) => list_wait(pool, Awaited::AnyOf)?,
                        _ => None,
                    };
                    state.sleeper = Some((thread::current(), listed));
                }
            }
            match until {
                None => thread::park(),
                Some(until) => thread::park_timeout(until.saturating_duration_since(Instant::now())),
            }
        }
    }

    /// Has the end of this job reported under this number.
    fn watch<T: Send + 'static>(self: &Arc<Self>, number: usize, handle: &JobHandle<T>) {
        if let Some(failed) = handle.job.watch(&mut || {
            let inbox = Arc::clone(self);
            Waiter::Group(Box::new(move |failed| inbox.arrive(number, failed)))
        }) {
            self.arrive(number, failed);
        }
    }
}

/// Takes the outcomes of several jobs in the order in which they end, whatever the order of their
/// submission. The iterator blocks until the next one has ended, and is over when all have.
///
/// Each item is the number of the job, from 0 in the order of `handles`, and its outcome. Dropping the
/// iterator lets the rest run.
///
/// ```
/// # let pool = millpond::Pool::builder("doc").workers(2).queue_capacity(2).build()?;
/// use std::time::Duration;
/// let slow = pool.submit(|| { std::thread::sleep(Duration::from_millis(50)); "slow" })?;
/// let fast = pool.submit(|| "fast")?;
/// let order: Vec<_> = millpond::as_completed([slow, fast]).map(|(number, _)| number).collect();
/// assert_eq!(order, [1, 0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// On a worker of the jobs' own pool, when the wait would never end, the item is [`JobError::Deadlock`] for the
/// first of those that have not ended, which is then left to itself.
pub fn as_completed<T: Send + 'static>(handles: impl IntoIterator<Item = JobHandle<T>>) -> AsCompleted<T> {
    let inbox = Arc::new(Inbox::default());
    let handles: Vec<_> = handles.into_iter().map(Some).collect();
    for (number, handle) in handles.iter().flatten().enumerate() {
        inbox.watch(number, handle);
    }
    let pool = common_pool(handles.iter().flatten());
    AsCompleted { left: handles.len(), pool, inbox, handles }
}

/// The pool that all of these jobs belong to.
fn common_pool<'a, T: 'a>(mut handles: impl Iterator<Item = &'a JobHandle<T>>) -> Option<PoolId> {
    let first = handles.next()?.pool;
    handles.all(|handle| handle.pool == first).then_some(first)
}

/// See [`as_completed`].
pub struct AsCompleted<T> {
    inbox: Arc<Inbox>,
    pool: Option<PoolId>,
    handles: Vec<Option<JobHandle<T>>>,
    left: usize,
}

impl<T: Send + 'static> Iterator for AsCompleted<T> {
    type Item = (usize, Result<T, JobError>);

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let number = match self.inbox.next(self.pool, None) {
                Ok(arrival) => arrival.expect("a wait without an end has an arrival").number,
                Err(deadlock) => {
                    let number = self.handles.iter().position(Option::is_some)?;
                    self.handles[number] = None;
                    self.left -= 1;
                    return Some((number, Err(deadlock)));
                }
            };
            // One that was given up as a deadlock may still report.
            if let Some(handle) = self.handles[number].take() {
                self.left -= 1;
                return Some((number, handle.join()));
            }
        }
        None
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<T: Send + 'static> ExactSizeIterator for AsCompleted<T> {}

impl<T> fmt::Debug for AsCompleted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsCompleted").field("left", &self.left).finish_non_exhaustive()
    }
}

/// What [`wait`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The first job to end.
    FirstCompleted,
    /// The first job to fail, or the end of all.
    FirstFailed,
    /// The end of all jobs.
    AllCompleted,
}

/// Blocks until one or all of several jobs have ended, `timeout` at most, and says whether that came about.
/// The handles keep their outcomes: [`JobHandle::is_finished`] says whose [`join`](JobHandle::join) will not
/// block. With no handles it comes back at once.
///
/// ```
/// # let pool = millpond::Pool::builder("doc").workers(2).queue_capacity(2).build()?;
/// use std::time::Duration;
/// use millpond::{Until, wait};
/// let mut jobs = [pool.submit(|| 1)?, pool.submit(|| 2)?];
/// assert!(wait(&mut jobs, Until::AllCompleted, Duration::from_secs(10))?);
/// assert_eq!(jobs.map(|job| job.join()), [Ok(1), Ok(2)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`JobError::Deadlock`] when a worker of the jobs' own pool would wait here for ever, which only a timeout
/// beyond the reach of [`Instant`] can bring about.
pub fn wait<T: Send + 'static>(
    handles: &mut [JobHandle<T>],
    until: Until,
    timeout: Duration,
) -> Result<bool, JobError> {
    let deadline = Instant::now().checked_add(timeout);
    let pool = common_pool(handles.iter());
    let inbox = Arc::new(Inbox::default());
    for (number, handle) in handles.iter().enumerate() {
        inbox.watch(number, handle);
    }
    for _ in 0..handles.len() {
        // Whoever has not ended by then reports into a box that nobody looks into any more.
        let Some(arrival) = inbox.next(pool, deadline)? else {
            return Ok(false);
        };
        match until {
            Until::FirstCompleted => return Ok(true),
            Until::FirstFailed if arrival.failed => return Ok(true),
            Until::FirstFailed | Until::AllCompleted => {}
        }
    }
    Ok(true)
}
