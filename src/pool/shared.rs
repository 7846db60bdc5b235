//! The state that submitters, workers and readers of the numbers share, and admission.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
#[cfg(not(millpond_loom))]
use std::task::Poll;
use std::time::{Duration, Instant};

use super::account::{Watch, WorkerCell};
use super::errors::quietly;
use super::identity::{Identity, Unrun};
#[cfg(not(millpond_loom))]
use super::places::Places;
use super::queue::{Queue, Refusal, Wakes};
use crate::sync::atomic::Ordering;
use crate::sync::event::Listener;

/// An item of a queue.
pub(crate) trait Job: Send {
    /// Ends a job that was queued and will not be run, because an abort took it out of the queue. Counts it before it
    /// tells the threads that wait for the job.
    fn abandon(self, pool: &Identity);

    /// Whether the job has ended or run elsewhere, so that nothing is left to do for it. Called under the queue's
    /// locks.
    fn is_dead(&self) -> bool {
        false
    }
}

/// See the module.
pub(crate) struct Shared<J> {
    pub(crate) pool: Arc<Identity>,
    pub(crate) watch: Watch,
    pub(crate) queue: Queue<J>,
    /// A worker's cell is at the worker's number, and outlives the worker: the next worker of that number counts on.
    /// Written by a resize, read by readers of the numbers.
    pub(crate) cells: RwLock<Vec<Arc<WorkerCell>>>,
    /// The cell of the [`Helper`](super::Helper), if there is one.
    pub(crate) helper: Option<Arc<WorkerCell>>,
    /// Whether the [`Helper`](super::Helper) is there and counts as a worker. Written when it is made and dropped.
    pub(crate) helps: AtomicBool,
    /// The largest busy time ever reported, in microseconds; see `metrics.rs`. Written by readers.
    pub(crate) busy_reported_us: AtomicU64,
    /// Submissions refused because the queue was full. Written by any submitter.
    pub(crate) rejected_full: AtomicU64,
    /// Submissions refused because the pool drains. Written by any submitter.
    pub(crate) rejected_draining: AtomicU64,
}

/// How long a submitter is willing to wait for room.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    None,
    /// As `None`, but a full queue is not counted as a rejection.
    Probe,
    Until(Instant),
    Endless,
    /// As endless. A worker of the pool that finds no room runs the job, however much of its stack is used.
    Must,
}

impl Patience {
    /// For this long. If that is beyond the reach of [`Instant`], for ever.
    pub(crate) fn lasting(timeout: Duration) -> Self {
        Instant::now().checked_add(timeout).map_or(Patience::Endless, Patience::Until)
    }
}

impl<J: Job> Shared<J> {
    /// Admits a job that was submitted at `now_ns`, if there is room. Counts no rejection. `make` makes the job when it is
    /// admitted; see [`Queue::admit`].
    pub(crate) fn probe(
        &self,
        make: &mut (impl FnMut() -> J + ?Sized),
        now_ns: u64,
        wakes: Wakes,
    ) -> Result<(), Refusal> {
        let admitted = self.queue.admit(make, now_ns, wakes);
        self.sweep_if_due();
        admitted
    }

    /// Takes dead jobs out of the queue, if they are more than half of it. Only submissions make it grow.
    pub(crate) fn sweep_if_due(&self) {
        if self.queue.sweep_is_due() {
            self.queue.sweep(J::is_dead);
        }
    }

    /// Admits a job that `make` makes, waits for room as long as `patience` lasts, or refuses it and counts that.
    pub(crate) fn submit(
        &self,
        make: &mut (impl FnMut() -> J + ?Sized),
        patience: Patience,
        wakes: Wakes,
    ) -> Result<(), Refusal> {
        let outcome = match (self.probe(make, self.watch.now_ns(), wakes), patience) {
            (Err(Refusal::Full), Patience::Until(at)) => self.wait_for_room(make, Some(at)),
            (Err(Refusal::Full), Patience::Endless | Patience::Must) => self.wait_for_room(make, None),
            (outcome, Patience::Probe) => return outcome,
            (outcome, _) => outcome,
        };
        outcome.inspect_err(|refusal| self.count_rejected(*refusal))
    }

    #[cold]
    fn wait_for_room(
        &self,
        make: &mut (impl FnMut() -> J + ?Sized),
        until: Option<Instant>,
    ) -> Result<(), Refusal> {
        let _waiting = self.queue.wait_for_room();
        let mut is_over = false;
        loop {
            let listener = self.pool.places.room.listen();
            let outcome = self.probe(make, self.watch.now_ns(), Wakes::One);
            if is_over || outcome != Err(Refusal::Full) {
                drop(listener);
                self.room_was_used();
                return outcome;
            }
            match until {
                None => listener.wait(),
                Some(at) => is_over = listener.wait_deadline(at).is_none(),
            }
        }
    }

    /// As [`submit`](Shared::submit) without an end to the patience, for a task in place of a thread.
    #[cfg(not(millpond_loom))]
    pub(crate) async fn submit_async(&self, mut make: impl FnMut() -> J) -> Result<(), Refusal> {
        let _waiting = self.queue.wait_for_room();
        let task = RoomTask { places: &self.pool.places, number: self.pool.places.new_task() };
        let outcome = std::future::poll_fn(|context| {
            // First the waker, then the look: see `queue.rs`, the part on waiting for room.
            task.places.set_task(task.number, Some(context.waker().clone()));
            match self.probe(&mut make, self.watch.now_ns(), Wakes::One) {
                Err(Refusal::Full) => Poll::Pending,
                outcome => Poll::Ready(outcome),
            }
        })
        .await;
        drop(task);
        self.room_was_used();
        outcome.inspect_err(|refusal| self.count_rejected(*refusal))
    }

    /// After a submitter that waited has its place or gives up: there may be room for the next.
    fn room_was_used(&self) {
        self.pool.places.notify_room();
    }

    /// Counts a submission that was refused.
    pub(crate) fn count_rejected(&self, refusal: Refusal) {
        let count = match refusal {
            Refusal::Full => &self.rejected_full,
            Refusal::Draining => &self.rejected_draining,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Drops what is queued, and counts it as aborted.
    pub(crate) fn drop_queued(&self) {
        while let Some(queued) = self.queue.take_unasked() {
            quietly(|| queued.job.abandon(&self.pool));
        }
    }

    /// How many jobs were submitted and have not ended. Reads what has ended first: if the two are equal, they were so
    /// at the second step.
    fn unended(&self) -> u64 {
        let by_workers =
            self.cells().iter().chain(&self.helper).map(|cell| cell.read().ended.sum()).sum::<u64>();
        let unrun = [Unrun::Cancelled, Unrun::Expired, Unrun::Aborted].map(|why| self.pool.unrun(why));
        self.queue.pushed().saturating_sub(by_workers + unrun.iter().sum::<u64>())
    }

    /// Whether no job waits or runs, except for jobs that wait for just that, and all workers without a job have asked
    /// for one.
    fn is_idle(&self) -> bool {
        let jobs = self.pool.aside();
        // Each of those jobs holds a worker, or a place in the queue.
        self.unended() <= jobs
            && self.queue.idle_workers() + jobs.cast_signed() >= self.pool.crew.workers().cast_signed() as i64
    }

    /// Blocks until no job waits and none runs, until `until` at most. Returns whether that was so. Jobs that wait for
    /// the same are not counted.
    pub(crate) fn wait_until_idle(&self, until: Option<Instant>) -> bool {
        let _waiting = self.queue.wait_for_idle();
        loop {
            let listener = self.pool.places.idle.listen();
            if self.is_idle() {
                return true;
            }
            match until {
                None => listener.wait(),
                Some(at) => {
                    if listener.wait_deadline(at).is_none() {
                        return self.is_idle();
                    }
                }
            }
        }
    }

    /// The workers' cells. The lock keeps out a resize only.
    pub(crate) fn cells(&self) -> RwLockReadGuard<'_, Vec<Arc<WorkerCell>>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task that waits for room, until it is dropped.
#[cfg(not(millpond_loom))]
struct RoomTask<'a> {
    places: &'a Places,
    number: u64,
}

#[cfg(not(millpond_loom))]
impl Drop for RoomTask<'_> {
    fn drop(&mut self) {
        self.places.set_task(self.number, None);
    }
}

#[cfg(test)]
impl<J> Shared<J> {
    /// Adds cells whose numbers a test sets by hand.
    pub(super) fn add_cells(&self, cells: impl IntoIterator<Item = Arc<WorkerCell>>) {
        self.cells.write().unwrap_or_else(PoisonError::into_inner).extend(cells);
    }
}
