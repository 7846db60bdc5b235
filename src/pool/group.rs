//! Waiting for several jobs together.
//!
//! Each job of the group is given a waiter that, at its end, puts the job's number into one box and wakes
//! whoever waits at it. The box has a lock of its own, always taken after a job's.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::crew::JobId;
use super::current::PoolId;
use super::handle::{JobError, JobHandle, list_wait};
use super::job::{Audience, Listed, Waiter};
use crate::sync::checked::thread::{self, Thread};
use crate::sync::checked::{Mutex, lock};

/// Several jobs that are waited for together.
#[derive(Default)]
struct Group {
    inbox: Arc<Inbox>,
    deadlines: Deadlines,
}

/// When jobs that wait in the queue will have waited too long, by their numbers.
#[derive(Default)]
struct Deadlines {
    by_time: BTreeSet<(Instant, usize)>,
    of: HashMap<usize, Instant>,
}

impl Deadlines {
    fn add(&mut self, number: usize, at: Instant) {
        self.by_time.insert((at, number));
        self.of.insert(number, at);
    }

    fn remove(&mut self, number: usize) {
        if let Some(at) = self.of.remove(&number) {
            self.by_time.remove(&(at, number));
        }
    }

    fn first(&self) -> Option<(Instant, usize)> {
        self.by_time.first().copied()
    }
}

/// Where the ends of a group's jobs are reported.
#[derive(Default)]
struct Inbox {
    state: Mutex<Arrivals>,
}

#[derive(Default)]
struct Arrivals {
    /// Jobs that have ended and were not picked up.
    ended: VecDeque<Arrival>,
    /// Jobs whose deadline means nothing any more.
    begun: Vec<usize>,
    sleeper: Option<(Thread, Option<Listed>)>,
}

struct Arrival {
    number: usize,
    failed: bool,
}

impl Inbox {
    fn report(&self, change: impl FnOnce(&mut Arrivals)) {
        let mut state = lock(&self.state);
        change(&mut state);
        // Its entry in the list of waits is crossed out here, under the lock.
        let sleeper = state.sleeper.take().map(|(thread, _listed)| thread);
        drop(state);
        if let Some(thread) = sleeper {
            thread.unpark();
        }
    }
}

impl Audience for Inbox {
    fn begun(&self, number: usize) {
        self.report(|state| state.begun.push(number));
    }

    fn ended(&self, number: usize, failed: bool) {
        self.report(|state| state.ended.push_back(Arrival { number, failed }));
    }
}

impl Group {
    /// Has the end of this job reported under this number.
    fn watch<T: Send + 'static>(&mut self, number: usize, handle: &JobHandle<T>) {
        let inbox = Arc::clone(&self.inbox) as Arc<dyn Audience>;
        match handle.job.watch(Waiter::Group(inbox, number)) {
            Ok(pending) => pending.expires.into_iter().for_each(|at| self.deadlines.add(number, at)),
            Err(failed) => self.inbox.ended(number, failed),
        }
    }

    /// Blocks until a job has ended, or `until`. `handles` are those that have not been reported, each at its
    /// number.
    fn next<T, H>(
        &mut self,
        handles: &[Option<H>],
        until: Option<Instant>,
    ) -> Result<Option<Arrival>, JobError>
    where
        T: Send + 'static,
        H: Borrow<JobHandle<T>>,
    {
        loop {
            let wake_at;
            {
                let mut state = lock(&self.inbox.state);
                // One that awoke without an arrival waits anew, and must not stand in the list twice.
                state.sleeper = None;
                state.begun.drain(..).for_each(|number| self.deadlines.remove(number));
                if let Some(arrival) = state.ended.pop_front() {
                    self.deadlines.remove(arrival.number);
                    return Ok(Some(arrival));
                }
                if until.is_some_and(|until| Instant::now() >= until) {
                    return Ok(None);
                }
                let deadline = self.deadlines.first().map(|(at, _)| at);
                wake_at = until.into_iter().chain(deadline).min();
                let listed = if wake_at.is_none() { list_wait(|pool| ids(pool, handles))? } else { None };
                state.sleeper = Some((thread::current(), listed));
            }
            match wake_at {
                None => thread::park(),
                Some(at) => thread::park_timeout(at.saturating_duration_since(Instant::now())),
            }
            while let Some((at, number)) = self.deadlines.first()
                && Instant::now() >= at
            {
                self.deadlines.remove(number);
                if let Some(handle) = &handles[number] {
                    // The look ends it, if it still waits, and so reports it.
                    let _ended = handle.borrow().is_finished();
                }
            }
        }
    }
}

/// The jobs behind these handles, if they all belong to this pool.
fn ids<T, H>(pool: PoolId, handles: &[Option<H>]) -> Option<Vec<JobId>>
where
    T: Send + 'static,
    H: Borrow<JobHandle<T>>,
{
    let handles = handles.iter().flatten().map(Borrow::borrow);
    handles.map(|handle| (handle.pool == pool).then(|| handle.id())).collect()
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
/// first of those that have not ended. That job is left in its place, and will run if it can.
///
/// # Panics
///
/// The iterator does, at the turn of a job whose handle has been awaited to its end.
pub fn as_completed<T: Send + 'static>(handles: impl IntoIterator<Item = JobHandle<T>>) -> AsCompleted<T> {
    let mut group = Group::default();
    let handles: Vec<_> = handles.into_iter().map(Some).collect();
    for (number, handle) in handles.iter().flatten().enumerate() {
        group.watch(number, handle);
    }
    AsCompleted { left: handles.len(), group, handles }
}

/// See [`as_completed`].
pub struct AsCompleted<T> {
    group: Group,
    handles: Vec<Option<JobHandle<T>>>,
    left: usize,
}

impl<T: Send + 'static> Iterator for AsCompleted<T> {
    type Item = (usize, Result<T, JobError>);

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let number = match self.group.next(&self.handles, None) {
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
    let mut group = Group::default();
    let mut left: Vec<_> = handles.iter().map(Some).collect();
    for (number, handle) in handles.iter().enumerate() {
        group.watch(number, handle);
    }
    for _ in 0..handles.len() {
        // Whoever has not ended by then reports into a box that nobody looks into any more.
        let Some(arrival) = group.next(&left, deadline)? else {
            return Ok(false);
        };
        left[arrival.number] = None;
        match until {
            Until::FirstCompleted => return Ok(true),
            Until::FirstFailed if arrival.failed => return Ok(true),
            Until::FirstFailed | Until::AllCompleted => {}
        }
    }
    Ok(true)
}
