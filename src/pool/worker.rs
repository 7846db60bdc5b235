//! The worker thread: it takes a job, runs it, counts it, and looks for the next. If there is none, it sleeps.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::account::{Account, WorkerCell, outcome_of};
use super::current::{self, Counted, Worker};
use super::errors::quietly;
use super::identity::Stage;
use super::queue::{Queue, Queued, Rest, Seat};
use super::shared::{Job, Shared};

/// What one worker does with jobs. Each worker owns one value, so it may keep buffers and counters that no
/// other thread touches.
pub(crate) trait Handler<J>: Send {
    /// Runs a job. It may block, and it may panic. A panic ends the job and is counted, and the worker goes on with
    /// this value. So a handler must be in order at every point where it may panic.
    fn run(&mut self, job: J, turn: &mut Turn<'_, J>);

    /// Called when the worker has no job and is about to sleep: the moment to give back memory.
    fn rest(&mut self) {}
}

/// A job that a worker runs: its account, and what it may ask of its queue.
pub(crate) struct Turn<'a, J> {
    pub(crate) account: Account<'a>,
    queue: &'a Queue<J>,
}

impl<J> Turn<'_, J> {
    /// Whether other jobs wait now. A long job may use it to decide whether to give way.
    pub(crate) fn others_wait(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Puts a job at the back of the queue, so that it gives way and goes on later. It counts as submitted. The queue
    /// takes it even while the pool drains, because it continues an admitted job. Never blocks.
    ///
    /// # Errors
    ///
    /// If the queue is full, the job comes back.
    pub(crate) fn requeue(&self, job: J) -> Result<(), J> {
        self.queue.requeue(job, self.account.now_ns())
    }
}

/// Runs jobs until no more will come, or the pool has too many workers and this one retires. The first question was
/// asked for the worker.
pub(crate) fn work<J: Job, H: Handler<J>>(shared: &Shared<J>, cell: &WorkerCell, handler: &mut H) {
    let (queue, pool) = (&shared.queue, &*shared.pool);
    let mut seat = Seat::new(true);
    let mut free_ns = None;
    while pool.stage() < Stage::Aborted {
        // In a drain no worker retires: all leave soon, and only when no job is left.
        let retires = || pool.crew.has_surplus() && pool.stage() == Stage::Open && pool.crew.retire();
        if pool.crew.has_surplus() && queue.leave(&mut seat, retires) {
            break;
        }
        if let Some(queued) = queue.take(&mut seat) {
            let started_ns = free_ns.unwrap_or_else(|| shared.watch.now_ns());
            let free = run(shared, cell, handler, queued, started_ns);
            if free.is_some() {
                seat.served();
            } else {
                cell.rest(started_ns);
            }
            free_ns = free;
            continue;
        }
        if let Some(free_ns) = free_ns.take() {
            cell.rest(free_ns);
        }
        quietly(|| handler.rest());
        if queue.sleep(&mut seat, |admits| !admits || retires()) == Rest::Left {
            break;
        }
    }
    if let Some(free_ns) = free_ns {
        cell.rest(free_ns);
    }
    queue.pass_on(&mut seat);
    if pool.stage() == Stage::Aborted {
        // A job that ran while the abort emptied the queue may have requeued itself, and no other thread takes it.
        shared.drop_queued();
    }
}

/// Runs jobs that wait, until there are none or `enough` returns true for the time. For a thread that has other things
/// to do. `seat`, `cell` and `handler` belong to that thread.
pub(crate) fn help<J: Job, H: Handler<J>>(
    shared: &Shared<J>,
    seat: &mut Seat,
    cell: &WorkerCell,
    handler: &mut H,
    enough: impl Fn(u64) -> bool,
) {
    let mut free_ns = None;
    while shared.pool.stage() < Stage::Aborted
        && !free_ns.is_some_and(&enough)
        && !shared.queue.is_empty()
        && let Some(queued) = shared.queue.take(seat)
    {
        let started_ns = free_ns.unwrap_or_else(|| shared.watch.now_ns());
        free_ns = run(shared, cell, handler, queued, started_ns);
        if free_ns.is_some() {
            seat.served();
        }
    }
    if let Some(free_ns) = free_ns {
        cell.rest(free_ns);
    }
}

/// Runs one job and counts it. Returns when the worker was free again, or `None` if there was nothing to run, because
/// the job had been cancelled or the like.
fn run<J: Job, H: Handler<J>>(
    shared: &Shared<J>,
    cell: &WorkerCell,
    handler: &mut H,
    queued: Queued<J>,
    started_ns: u64,
) -> Option<u64> {
    let Queued { job, submitted_ns } = queued;
    let account = Account::new(&shared.pool, cell, shared.watch, submitted_ns, started_ns);
    let mut turn = Turn { account, queue: &shared.queue };
    let returned = catch_unwind(AssertUnwindSafe(|| handler.run(job, &mut turn)));
    let outcome = outcome_of(returned);
    turn.account.end_if_begun(outcome);
    turn.account.has_begun().then(|| turn.account.free_ns())
}

/// Runs queued jobs beside the job of the calling worker, which would wait for them, until none waits or `enough`
/// returns true.
pub(crate) fn run_beside<J: Job, H: Handler<J>>(
    shared: &Shared<J>,
    worker: &Worker,
    handler: &mut H,
    enough: impl Fn() -> bool,
) {
    while !enough()
        && let Some(Queued { job, submitted_ns }) = shared.queue.take_unasked()
    {
        let _beside = worker.pool.count_beside();
        let account = Account::beside(&worker.pool, &worker.cell, worker.watch, submitted_ns);
        let mut turn = Turn { account, queue: &shared.queue };
        let run = || catch_unwind(AssertUnwindSafe(|| handler.run(job, &mut turn)));
        let outcome = outcome_of(current::with_job_beside(None, Counted::Yes, run));
        turn.account.end_if_begun(outcome);
        if turn.account.has_begun() {
            // No worker had asked for it.
            worker.pool.places.free();
        } else {
            turn.account.cancel();
        }
    }
}
