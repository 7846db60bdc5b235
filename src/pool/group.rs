//! Waits for several jobs together.
//!
//! Each job of a group gets a waiter. When the job ends, its waiter puts the job's number into the group's inbox and
//! wakes the thread that waits there. The inbox has its own lock, which is always taken after a job's lock.

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

/// Several jobs, and one thread that waits for them.
#[derive(Default)]
struct Group {
    inbox: Arc<Inbox>,
    deadlines: Deadlines,
}

/// The deadlines of jobs that are still in the queue, by the jobs' numbers.
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

/// Collects the ends of a group's jobs. Workers and cancelling threads write it, the waiting thread reads it.
#[derive(Default)]
struct Inbox {
    state: Mutex<Arrivals>,
}

#[derive(Default)]
struct Arrivals {
    /// Jobs that have ended and that the waiting thread has not taken yet.
    ended: VecDeque<Arrival>,
    /// Jobs that have started, so their deadline no longer applies.
    begun: Vec<usize>,
    /// The thread that sleeps until the next report, with its entry in the pool's list of waits.
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
        // Dropping the entry removes it from the list of waits. That happens under the lock, before the thread runs.
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
    /// Makes the job report its end under this number.
    fn watch<T: Send + 'static>(&mut self, number: usize, handle: &JobHandle<T>) {
        let inbox = Arc::clone(&self.inbox) as Arc<dyn Audience>;
        match handle.job.watch(Waiter::Group(inbox, number)) {
            Ok(pending) => pending.expires.into_iter().for_each(|at| self.deadlines.add(number, at)),
            Err(failed) => self.inbox.ended(number, failed),
        }
    }

    /// Blocks until a job has ended, and returns it. At `until` it returns `None`. `handles` holds the jobs that were
    /// not reported yet, each at its number.
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
                // A thread that woke up without an arrival waits again. Its old entry would count its wait twice.
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
                    // If the job is still in the queue, this call expires it, and so reports its end.
                    let _ended = handle.borrow().is_finished();
                }
            }
        }
    }
}

/// The ids of these handles' jobs, or `None` if a job belongs to another pool.
fn ids<T, H>(pool: PoolId, handles: &[Option<H>]) -> Option<Vec<JobId>>
where
    T: Send + 'static,
    H: Borrow<JobHandle<T>>,
{
    let handles = handles.iter().flatten().map(Borrow::borrow);
    handles.map(|handle| (handle.pool == pool).then(|| handle.id())).collect()
}

/// Returns the outcomes of several jobs in the order in which the jobs end. The iterator blocks until the next job has
/// ended, and is over when all jobs have.
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
/// If a worker of the jobs' own pool would wait here for ever, the item is [`JobError::Deadlock`] for the first job
/// that has not ended. That job stays in the queue, and runs if a worker becomes free.
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
    AsCompleted { left: handles.len(), group, handles }
}

/// The iterator that [`as_completed`] returns.
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
                Ok(arrival) => arrival.expect("a wait without a timeout ends with an arrival").number,
                Err(deadlock) => {
                    let number = self.handles.iter().position(Option::is_some)?;
                    self.handles[number] = None;
                    self.left -= 1;
                    return Some((number, Err(deadlock)));
                }
            };
            // A job that was returned as a deadlock has no handle here any more, and may still report its end.
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
/// handles it returns `true` at once.
///
/// The handles keep their outcomes. If [`JobHandle::is_finished`] returns `true` for a handle, its
/// [`join`](JobHandle::join) does not block.
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
/// [`JobError::Deadlock`] if a worker of the jobs' own pool would wait here for ever. This can happen only with a
/// timeout that [`Instant`] cannot represent, such as [`Duration::MAX`].
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
        // A job that ends after the timeout reports to the inbox of a group that no thread waits for. That is harmless.
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
