//! One job for each item, and the results in the order of the items.

use std::collections::VecDeque;
use std::fmt;
use std::iter::Fuse;
use std::sync::Arc;

use super::handle::{JobError, JobHandle};
use super::{Patience, Pool, Rejected};

/// The results of [`Pool::map`], in the order of the items.
///
/// An item whose job was not admitted, because the pool drains, is an error as well, and the next items follow. With
/// endless items, stop at the first such error. On a worker of the same pool, an item whose result could never come is
/// an error too, and its job is left in the queue. Dropping the iterator cancels the jobs that it has submitted and
/// whose results were not asked for.
#[must_use = "nothing is submitted until the iterator is asked for a result"]
pub struct Map<'p, I, F, R: Send + 'static> {
    pool: &'p Pool,
    items: Fuse<I>,
    work: Arc<F>,
    look_ahead: usize,
    /// A job that found no room in the queue at its last try.
    held_back: Option<Work<R>>,
    /// Submitted jobs, in the order of the items. An error is that of a job that was not admitted.
    ahead: VecDeque<Result<JobHandle<R>, JobError>>,
}

/// The work on one item.
type Work<R> = Box<dyn FnOnce() -> R + Send>;

impl<'p, I, F, R: Send + 'static> Map<'p, I, F, R> {
    pub(super) fn new(pool: &'p Pool, items: I, work: F) -> Self
    where
        I: Iterator,
    {
        let items = items.fuse();
        // For each worker one to run, and one to go on with. A drained pool has no workers, and each item is an error.
        let look_ahead = (pool.stats().workers * 2).max(1);
        Map { pool, items, work: Arc::new(work), look_ahead, held_back: None, ahead: VecDeque::new() }
    }

    /// Sets how many jobs may be submitted whose results are not yet asked for, at least 1. Unless set, twice the number
    /// of workers. A larger number evens out jobs of different length, and keeps more results in memory.
    pub fn look_ahead(mut self, jobs: usize) -> Self {
        self.look_ahead = jobs.max(1);
        self
    }
}

impl<I, F, R> Map<'_, I, F, R>
where
    I: Iterator,
    I::Item: Send + 'static,
    F: Fn(I::Item) -> R + Send + Sync + 'static,
    R: Send + 'static,
{
    /// Submits as many jobs as there is room for. If no submitted job is left to wait for, it waits for room for one.
    fn submit_ahead(&mut self) {
        while self.ahead.len() < self.look_ahead {
            let next = self.held_back.take().or_else(|| {
                let (work, item) = (Arc::clone(&self.work), self.items.next()?);
                Some(Box::new(move || work(item)))
            });
            let Some(job) = next else {
                return;
            };
            let patience = if self.ahead.is_empty() { Patience::Endless } else { Patience::Probe };
            let admitted = self.pool.admit(job, None, patience);
            self.ahead.push_back(match admitted {
                Ok(handle) => Ok(handle),
                Err(Rejected::Full(job)) => {
                    self.held_back = Some(job);
                    return;
                }
                Err(Rejected::Draining(_)) => Err(JobError::Draining),
                Err(Rejected::Deadlock(_)) => Err(JobError::Deadlock { pool: self.pool.name().to_owned() }),
            });
        }
    }
}

impl<I, F, R> Iterator for Map<'_, I, F, R>
where
    I: Iterator,
    I::Item: Send + 'static,
    F: Fn(I::Item) -> R + Send + Sync + 'static,
    R: Send + 'static,
{
    type Item = Result<R, JobError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.submit_ahead();
        self.ahead.pop_front().map(|job| job.and_then(JobHandle::join))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let in_hand = self.ahead.len() + usize::from(self.held_back.is_some());
        let (least, most) = self.items.size_hint();
        (least.saturating_add(in_hand), most.and_then(|most| most.checked_add(in_hand)))
    }
}

impl<I, F, R: Send + 'static> Drop for Map<'_, I, F, R> {
    fn drop(&mut self) {
        for handle in self.ahead.iter().flatten() {
            handle.cancel();
        }
    }
}

impl<I, F, R: Send + 'static> fmt::Debug for Map<'_, I, F, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map")
            .field("look_ahead", &self.look_ahead)
            .field("ahead", &self.ahead.len())
            .finish_non_exhaustive()
    }
}
