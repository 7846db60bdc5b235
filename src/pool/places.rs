//! Counts the queue's places that are freed by another thread than the worker that takes the job, and notifies
//! submitters that wait for room.
//!
//! The queue is generic over its jobs. A job that is cancelled, or that a worker runs while it waits for it, has to
//! free its place without knowing that type. So this part of the queue's bound is kept here. `queue.rs` has the
//! argument.
//!
//! Threads and tasks wait apart from each other. One thread is notified at a time, and it passes the notification on. A
//! task may never be polled again, and would keep the notification. So all tasks are woken, and each registers again if
//! it finds no room. Their wakers come from outside this crate: they are called without a lock, and may panic.

use std::task::Waker;

use super::errors::quietly;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::event::Event;
use crate::sync::lock;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Places freed minus requests withdrawn, modulo 2^64, because it may fall below 0. Written by any thread, read by
    /// submitters.
    freed: AtomicU64,
    /// Jobs that have ended or run elsewhere and are still in the queue. Written by any thread. It decides only when to
    /// sweep.
    dead: AtomicUsize,
    /// Threads that wait for room in the queue.
    pub(crate) room: Event,
    /// Tasks that wait for room in the queue, each by a number.
    tasks: std::sync::Mutex<Tasks>,
    /// Notified when the pool may be idle.
    pub(crate) idle: Event,
}

#[derive(Debug, Default)]
struct Tasks {
    waiting: Vec<(u64, Waker)>,
    last_number: u64,
}

impl Places {
    /// There may be room in the queue.
    pub(crate) fn notify_room(&self) {
        self.room.notify(1);
        self.wake_tasks();
    }

    /// There will be no more room.
    pub(crate) fn notify_all(&self) {
        self.room.notify(usize::MAX);
        self.wake_tasks();
    }

    fn wake_tasks(&self) {
        let waiting = std::mem::take(&mut lock(&self.tasks).waiting);
        for (_, waker) in waiting {
            quietly(|| waker.wake());
        }
    }

    /// Returns the number of a task that is going to wait.
    pub(crate) fn new_task(&self) -> u64 {
        let mut tasks = lock(&self.tasks);
        tasks.last_number += 1;
        tasks.last_number
    }

    /// Sets the waker of a task that waits, or takes it out.
    pub(crate) fn set_task(&self, number: u64, waker: Option<Waker>) {
        let mut tasks = lock(&self.tasks);
        let place = tasks.waiting.iter().position(|(of, _)| *of == number);
        let before = place.map(|place| tasks.waiting.swap_remove(place));
        tasks.waiting.extend(waker.map(|waker| (number, waker)));
        drop(tasks);
        quietly(|| drop(before));
    }

    /// A job has ended that no worker had asked for: cancelled, expired, dropped, or run by a worker beside its own
    /// job.
    pub(crate) fn free(&self) {
        self.freed.fetch_add(1, Ordering::AcqRel);
        self.notify_room();
        self.idle.notify(usize::MAX);
    }

    /// The same for a place that the caller takes at once.
    pub(super) fn free_uncontested(&self) {
        self.freed.fetch_add(1, Ordering::AcqRel);
    }

    /// A worker that had asked leaves.
    pub(super) fn take_back(&self) {
        self.freed.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn freed(&self) -> u64 {
        self.freed.load(Ordering::Acquire)
    }

    /// Counts so many places as freed.
    #[cfg(test)]
    pub(super) fn pretend_freed(&self, places: u64) {
        self.freed.fetch_add(places, Ordering::AcqRel);
    }

    /// A job in the queue is dead.
    pub(crate) fn has_died(&self) {
        self.dead.fetch_add(1, Ordering::Relaxed);
    }

    /// So many dead jobs have left the queue.
    pub(crate) fn dead_is_gone(&self, jobs: usize) {
        self.dead.fetch_sub(jobs, Ordering::Relaxed);
    }

    pub(super) fn dead(&self) -> usize {
        // A worker may have found a dead job before it was counted here.
        let dead = self.dead.load(Ordering::Relaxed);
        if dead > usize::MAX / 2 { 0 } else { dead }
    }
}
