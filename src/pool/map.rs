//! One job for each item, and the results in the order of the items or of the jobs' ends.

use std::collections::VecDeque;
use std::fmt;
use std::iter::Fuse;
use std::sync::Arc;

use super::errors::{JobError, MapError, Rejected};
use super::group::Group;
use super::handle::JobHandle;
use super::job::Call;
use super::shared::Patience;
use super::submit::{Engine, Owned};

/// The items of a map, and the jobs made of them: what both maps share.
struct Source<'p, I: Iterator, F> {
    engine: &'p Engine<'static>,
    items: Fuse<I>,
    work: Arc<F>,
    look_ahead: usize,
    /// An item whose job found no room in the queue at its last try, or was refused because the pool drains.
    held_back: Option<I::Item>,
    /// How many items have had their job submitted, or refused.
    drawn: usize,
    /// Whether the pool has refused a job because it drains.
    drains: bool,
}

/// The work on one item.
struct OnItem<T, F> {
    item: T,
    work: Arc<F>,
}

impl<T: Send, F: Fn(T) -> R + Send + Sync, R> Call<R> for OnItem<T, F> {
    fn call(self) -> R {
        (self.work)(self.item)
    }
}

/// An item's job, or why it was not admitted.
type Submitted<R> = Result<JobHandle<R>, JobError>;

impl<'p, I: Iterator, F> Source<'p, I, F> {
    fn new(engine: &'p Engine<'static>, items: I, work: F) -> Self {
        // Two jobs for each worker: one that runs, and one that waits. A drained pool has no workers, and the first
        // item is an error.
        let look_ahead = (engine.workers.stats().workers * 2).max(1);
        let (items, work) = (items.fuse(), Arc::new(work));
        Source { engine, items, work, look_ahead, held_back: None, drawn: 0, drains: false }
    }

    /// Submits the job of the next item, which it waits for room for if `waits` is true. Returns `None` if there is no
    /// item or no room.
    fn submit<R>(&mut self, waits: bool) -> Option<Submitted<R>>
    where
        I::Item: Send + 'static,
        F: Fn(I::Item) -> R + Send + Sync + 'static,
        R: Send + 'static,
    {
        if self.drains {
            return None;
        }
        let item = self.held_back.take().or_else(|| self.items.next())?;
        let job = OnItem { item, work: Arc::clone(&self.work) };
        let patience = if waits { Patience::Must } else { Patience::Probe };
        let submitted = match self.engine.admit::<Owned, _, R>(job, None, patience) {
            Ok(job) => Ok(JobHandle::new(self.engine.handle(job))),
            Err(Rejected::Full(job)) => {
                self.held_back = Some(job.into_inner().item);
                return None;
            }
            Err(Rejected::Draining(job)) => {
                self.held_back = Some(job.into_inner().item);
                self.drains = true;
                Err(JobError::Draining)
            }
        };
        self.drawn += 1;
        Some(submitted)
    }

    /// The least and the most results that are to come, if `ahead` jobs were submitted and not asked for.
    fn size_hint(&self, ahead: usize) -> (usize, Option<usize>) {
        if self.drains {
            return (ahead, Some(ahead));
        }
        let in_hand = ahead + usize::from(self.held_back.is_some());
        let (least, most) = self.items.size_hint();
        // A drain may end it after one error.
        let least = ahead + usize::from(in_hand > ahead || least > 0);
        (least, most.and_then(|most| most.checked_add(in_hand)))
    }
}

/// Handles of jobs that were submitted ahead. Those that are left when it is dropped are cancelled.
struct Ahead<H: Cancels>(VecDeque<H>);

trait Cancels {
    fn cancel(&self);
}

impl<R: Send + 'static> Cancels for Submitted<R> {
    fn cancel(&self) {
        if let Ok(handle) = self {
            handle.cancel();
        }
    }
}

impl<R: Send + 'static> Cancels for (usize, JobHandle<R>) {
    fn cancel(&self) {
        self.1.cancel();
    }
}

impl<H: Cancels> Drop for Ahead<H> {
    fn drop(&mut self) {
        self.0.iter().for_each(H::cancel);
    }
}

/// The results of [`Pool::map`](crate::Pool::map), in the order of the items.
///
/// It blocks until the next result is there. On a worker of the same pool it runs jobs in place of waiting for them. If
/// the pool drains, the first item whose job is not admitted is an error, [`JobError::Draining`], and the last that the
/// iterator returns; [`into_rest`](Map::into_rest) has that item and those after it. Dropping the iterator cancels the
/// jobs that it has submitted and whose results were not asked for.
#[must_use = "nothing is submitted until the iterator is asked for a result"]
pub struct Map<'p, I: Iterator, F, R: Send + 'static> {
    source: Source<'p, I, F>,
    /// In the order of the items. An error is that of a job that was not admitted.
    ahead: Ahead<Submitted<R>>,
    /// How many results were returned.
    returned: usize,
}

impl<'p, I: Iterator, F, R: Send + 'static> Map<'p, I, F, R> {
    pub(super) fn new(engine: &'p Engine<'static>, items: I, work: F) -> Self {
        Map { source: Source::new(engine, items, work), ahead: Ahead(VecDeque::new()), returned: 0 }
    }

    /// Sets how many jobs may be submitted whose results are not yet asked for, at least 1. Unless set, twice the
    /// number of workers. A larger number evens out jobs of different length, and keeps more results in memory.
    pub fn look_ahead(mut self, jobs: usize) -> Self {
        self.source.look_ahead = jobs.max(1);
        self
    }

    /// Returns the items whose jobs were not admitted, in their order. Cancels the jobs that were submitted and whose
    /// results were not asked for.
    pub fn into_rest(self) -> impl Iterator<Item = I::Item> {
        self.source.held_back.into_iter().chain(self.source.items)
    }
}

impl<I, F, R> Iterator for Map<'_, I, F, R>
where
    I: Iterator,
    I::Item: Send + 'static,
    F: Fn(I::Item) -> R + Send + Sync + 'static,
    R: Send + 'static,
{
    type Item = Result<R, MapError>;

    fn next(&mut self) -> Option<Self::Item> {
        // Without a job to wait for, it waits for room.
        while self.ahead.0.len() < self.source.look_ahead
            && let Some(submitted) = self.source.submit(self.ahead.0.is_empty())
        {
            self.ahead.0.push_back(submitted);
        }
        let outcome = self.ahead.0.pop_front()?.and_then(JobHandle::join);
        let item = self.returned;
        self.returned += 1;
        Some(outcome.map_err(|error| MapError { item, error }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.source.size_hint(self.ahead.0.len())
    }
}

impl<I: Iterator, F, R: Send + 'static> fmt::Debug for Map<'_, I, F, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map")
            .field("look_ahead", &self.source.look_ahead)
            .field("ahead", &self.ahead.0.len())
            .finish_non_exhaustive()
    }
}

/// The results of [`Pool::map_unordered`](crate::Pool::map_unordered), each with the number of its item, in the order
/// in which the jobs end.
///
/// Otherwise it is as [`Map`].
#[must_use = "nothing is submitted until the iterator is asked for a result"]
pub struct MapUnordered<'p, I: Iterator, F, R: Send + 'static> {
    source: Source<'p, I, F>,
    group: Group,
    /// In the order of the items.
    ahead: Ahead<(usize, JobHandle<R>)>,
    /// The item whose job was not admitted.
    refused: Option<(usize, JobError)>,
}

impl<'p, I: Iterator, F, R: Send + 'static> MapUnordered<'p, I, F, R> {
    pub(super) fn new(engine: &'p Engine<'static>, items: I, work: F) -> Self {
        let source = Source::new(engine, items, work);
        MapUnordered { source, group: Group::default(), ahead: Ahead(VecDeque::new()), refused: None }
    }

    /// As [`Map::look_ahead`].
    pub fn look_ahead(mut self, jobs: usize) -> Self {
        self.source.look_ahead = jobs.max(1);
        self
    }

    /// As [`Map::into_rest`].
    pub fn into_rest(self) -> impl Iterator<Item = I::Item> {
        self.source.held_back.into_iter().chain(self.source.items)
    }
}

impl<I, F, R> Iterator for MapUnordered<'_, I, F, R>
where
    I: Iterator,
    I::Item: Send + 'static,
    F: Fn(I::Item) -> R + Send + Sync + 'static,
    R: Send + 'static,
{
    type Item = (usize, Result<R, JobError>);

    fn next(&mut self) -> Option<Self::Item> {
        let MapUnordered { source, group, ahead, refused } = self;
        while ahead.0.len() < source.look_ahead {
            let number = source.drawn;
            match source.submit(ahead.0.is_empty()) {
                Some(Ok(handle)) => {
                    group.watch(number, &handle);
                    ahead.0.push_back((number, handle));
                }
                Some(Err(error)) => *refused = Some((number, error)),
                None => break,
            }
        }
        if ahead.0.is_empty() {
            return refused.take().map(|(number, error)| (number, Err(error)));
        }
        let arrival = group.next(None, || ahead.0.iter().any(|(_, handle)| handle.run_here()));
        let number = arrival.expect("a wait without a timeout ends with an arrival").number;
        let place = ahead.0.iter().position(|(of, _)| *of == number).expect("a job ends once");
        let (_, handle) = ahead.0.remove(place)?;
        Some((number, handle.join()))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.source.size_hint(self.ahead.0.len() + usize::from(self.refused.is_some()))
    }
}

impl<I: Iterator, F, R: Send + 'static> fmt::Debug for MapUnordered<'_, I, F, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapUnordered")
            .field("look_ahead", &self.source.look_ahead)
            .field("ahead", &self.ahead.0.len())
            .finish_non_exhaustive()
    }
}
